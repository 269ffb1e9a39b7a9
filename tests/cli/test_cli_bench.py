from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from tercet.cli import main as cli
from tercet.cli.bench import limit
from tercet.engine import bench
from tercet.engine.bench import Report, Settings

REPORT = Report(
    model="runs/mine",
    parameters=134_515_008,
    quantization="int8",
    backend="cpu",
    threads=2,
    prompt_tokens=512,
    new_tokens=128,
    batch=1,
    prefill_tokens_per_second=1234.5,
    prefill_tokens_per_second_min=1200.0,
    prefill_tokens_per_second_median=1234.5,
    decode_tokens_per_second=100.0,
    decode_tokens_per_second_min=90.0,
    decode_tokens_per_second_median=100.0,
    time_to_first_token=0.4147,
    time_to_first_token_min=0.4,
    time_to_first_token_median=0.4147,
    load_seconds=1.25,
    peak_memory_bytes=3 << 29,
    weight_bytes=136 << 20,
    bandwidth_bytes_per_second=28.8e9,
    fraction_of_limit=0.5,
)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replace the benchmark; return the arguments that the command calls it with."""
    arguments: dict[str, Any] = {}

    def run(reference: str, settings: Settings, **options: Any) -> Report:
        options.pop("advance")(1)
        arguments.update(reference=reference, settings=settings, **options)
        return REPORT

    monkeypatch.setattr(bench, "bench", run)
    return arguments


def test_the_defaults(measured: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "runs/mine"]) == 0
    assert measured == {
        "reference": "runs/mine",
        "settings": Settings(),
        "quantize": None,
        "threads": None,
    }
    shown = capsys.readouterr()
    assert shown.err == ""
    for part in ("135M parameters", "int8", "1,234.5 tokens/s", "90.0", "415 ms", "1.50 GiB", "136.0 MiB"):
        assert part in shown.out


def test_every_option_arrives(measured: dict[str, Any]) -> None:
    options = "--quantize int4 --prompt-tokens 7 --new-tokens 6 --batch 5 --threads 2 --repeat 4"
    assert cli.main(["bench", "runs/mine", *options.split()]) == 0
    assert measured["settings"] == Settings(prompt_tokens=7, new_tokens=6, batch=5, repeat=4)
    assert (measured["quantize"], measured["threads"]) == ("int4", 2)


def test_json_is_one_object_and_nothing_else(
    measured: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "runs/mine", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == dataclasses.asdict(REPORT)
    assert shown.err == ""


def test_one_line_says_what_the_limit_is() -> None:
    assert "28.8 GB/s, so the limit is 200.0 tokens/s, and this run reached 50% of it" in limit(REPORT)
    several = dataclasses.replace(REPORT, batch=8, fraction_of_limit=None)
    assert "for all 8 sequences" in limit(several)
    assert "only for models on the CPU" in limit(
        dataclasses.replace(several, bandwidth_bytes_per_second=None)
    )
    assert "\n" not in limit(REPORT)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["openai:small"], "openai:small is a hosted model"),
        (["http://127.0.0.1:9/v1#m"], "is a hosted model"),
        (["no/such/model"], "no model at no/such/model"),
        (["no/such/model", "--quantize", "int2"], "--quantize is 'int2'"),
        (["no/such/model", "--batch", "0"], "--batch is 0"),
        (["no/such/model", "--threads", "0"], "--threads is 0"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert part in shown.err
