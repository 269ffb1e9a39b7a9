"""A climb with a hosted model, behind a server that names the label of the nearest shot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_openai_server import Answer, FakeServer, completion

from tercet.evaluate.task import Task
from tercet.ladder.climb import climb
from tercet.prompt.llm import LLM

COLOURS = {"sky": "blue", "grass": "green", "blood": "red"}
ROWS = [
    {"text": f"the {thing} in picture {number} of {thing}s", "label": colour}
    for number in range(60)
    for thing, colour in COLOURS.items()
]
TASK = Task.from_rows(
    "colours", ROWS, prompt="{text}\nColour:", target="label", labels=["blue", "green", "red"], test_size=30
)


class Nearest(FakeServer):
    """Answers with the last message of an assistant in the prompt, and without one with the first label."""

    def echo(self, body: dict[str, Any]) -> Answer:
        shown = [message["content"] for message in body["messages"] if message["role"] == "assistant"]
        return completion(f"{shown[-1].title()}." if shown else "blue")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Nearest]:
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    running = Nearest()
    yield running
    running.close()


def test_a_hosted_model_is_told_the_labels_and_shown_the_nearest_examples(
    server: Nearest, tmp_path: Path
) -> None:
    llm = LLM(server.reference, retries=0)
    report = climb(TASK, model=llm, rungs=["majority", "zero-shot", "few-shot", "lora"], out=tmp_path / "run")
    zero, few = report.rung("zero-shot"), report.rung("few-shot")
    right = sum(example.target == "blue" for example in TASK.test) / len(TASK.test)
    assert zero.score == pytest.approx(right) and few.score == 1.0
    listed = "Answer with exactly one of these and nothing else: blue, green, red."
    bodies = [seen.body for seen in server.seen if seen.body]
    assert all(body["messages"][0] == {"role": "system", "content": listed} for body in bodies)
    assert sorted({len(body["messages"]) for body in bodies}) == [2, 2 + 2 * TASK.few_shot]
    # Every test example once for each rung: tokens cost money, so nothing is raced and nothing is timed again.
    assert len(bodies) == 2 * len(TASK.test)
    assert few.details["shots"] == 8 and "chosen on dev" not in few.details
    lora = report.rung("lora")
    assert lora.status == "failed" and "hosted model" in str(lora.reason)
    stored = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert stored["prompt_tokens_per_second"] is None
