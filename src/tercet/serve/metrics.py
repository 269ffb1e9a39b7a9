"""/metrics: counts and times of the server, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0, generate_latest
from prometheus_client.registry import Collector

from tercet.engine.request import Usage
from tercet.serve.models import Models

router = APIRouter()

# From a small model's first token on a GPU to an answer that waited in the queue for minutes.
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self, models: Models) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._requests = Counter(
            "tercet_requests",
            "Answers, by route and HTTP status (499: the client had disconnected).",
            ("route", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "tercet_request_seconds",
            "Seconds from a request's headers to the last byte of its answer.",
            ("route",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "tercet_prompt_tokens", "Tokens read.", ("model",), registry=self.registry
        )
        self.completion_tokens = Counter(
            "tercet_completion_tokens", "Tokens generated.", ("model",), registry=self.registry
        )
        self.first_token_seconds = Histogram(
            "tercet_first_token_seconds",
            "Seconds from a request for generation to its first piece of text, including the time in the queue.",
            ("model",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.registry.register(_Load(models))
        for worker in models.workers:
            # Clients' names for this engine's model and adapters, by the engine's name of the adapter.
            names = {model.adapter: model.name for model in models if model.local is worker}
            worker.meter = ModelMeter(self, names)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Record a complete answer."""
        self._requests.labels(route, str(status or 499)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class ModelMeter:
    """Counts the tokens that one engine reads and writes."""

    def __init__(self, metrics: Metrics, names: dict[str | None, str]) -> None:
        self._metrics, self._names = metrics, names

    def _name(self, adapter: str | None) -> str:
        return self._names.get(adapter, adapter or "")

    def first_token(self, adapter: str | None, seconds: float) -> None:
        """Record the time to an answer's first piece of text."""
        self._metrics.first_token_seconds.labels(self._name(adapter)).observe(seconds)

    def finished(self, adapter: str | None, usage: Usage) -> None:
        """Record the tokens of a complete answer."""
        self._metrics.prompt_tokens.labels(self._name(adapter)).inc(usage.prompt_tokens)
        self._metrics.completion_tokens.labels(self._name(adapter)).inc(usage.completion_tokens)

    def read(self, adapter: str | None, tokens: int) -> None:
        """Record tokens that were read without an answer."""
        self._metrics.prompt_tokens.labels(self._name(adapter)).inc(tokens)


class _Load(Collector):
    """Running and waiting requests, counted when the metrics are read."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[GaugeMetricFamily]:
        running = GaugeMetricFamily(
            "tercet_requests_running", "Requests that are being computed.", labels=["model"]
        )
        waiting = GaugeMetricFamily(
            "tercet_requests_waiting", "Requests that wait in the queue.", labels=["model"]
        )
        seen: set[int] = set()
        for model in self._models:
            if model.local is not None and id(model.local) not in seen:
                seen.add(id(model.local))
                load = model.local.load
                running.add_metric([model.name], load.running)
                waiting.add_metric([model.name], load.waiting)
        yield running
        yield waiting


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Return all metrics in Prometheus' text format."""
    collected: Metrics = request.app.state.metrics
    return Response(collected.text(), media_type=CONTENT_TYPE_PLAIN_1_0_0)
