"""lm-eval's ``local-completions`` through the server gives the scores of the same model in process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
pytest.importorskip("tenacity", reason="lm-eval's clients of servers need lm-eval[api]")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from tercet.evaluate.lm_eval import TercetLM, evaluate_lm_eval

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "two",
    "dogs;",
    "héllo",
    "wörld,",
    "42",
    "times",
]


def sentence(number: int, length: int) -> str:
    return " ".join(WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(length))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Write two small tasks: one scores choices, one generates text."""
    rows = [
        {
            "q": sentence(n, 2 + n % 3),
            "choices": [sentence(n + 11 * k, 1 + k) for k in range(3)],
            "gold": n % 3,
        }
        for n in range(10)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "num_fewshot": 0,
    }
    choice = {
        "task": "served_choice", "output_type": "multiple_choice", "doc_to_text": "Question: {{q}}\nAnswer:",
        "doc_to_choice": "choices", "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    written = {
        "task": "served_text", "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "e",
        "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    for task in (choice, written):
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(common | task), encoding="utf-8")
    return tmp_path


def through_the_server(url: str, directory: Path, tasks: Path, tokenizer: str) -> dict[str, Any]:
    arguments = {
        "model": "tiny", "base_url": f"{url}/v1/completions", "tokenizer_backend": tokenizer,
        "max_length": 96, "num_concurrent": 1, "max_retries": 1, "batch_size": 4,
    }  # fmt: skip
    if tokenizer == "huggingface":
        arguments["tokenizer"] = str(directory)
    results = simple_evaluate(
        model="local-completions",
        model_args=arguments,
        tasks=["served_choice", "served_text"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        log_samples=True,
    )
    assert results is not None
    return results


@pytest.mark.parametrize("tokenizer", ["huggingface", "remote"])
def test_scores_through_the_server_are_those_in_process(
    tiny_url: str, tiny_directory: Path, tasks: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")  # the harness requires a key
    served = through_the_server(tiny_url, tiny_directory, tasks, tokenizer)
    local = TercetLM(tiny_directory, quantize="none", threads=1)
    here = evaluate_lm_eval(local, ["served_choice", "served_text"], include_path=tasks)
    for task, metrics in (
        ("served_choice", ("acc,none", "acc_norm,none")),
        ("served_text", ("exact_match,none",)),
    ):
        for metric in metrics:
            assert served["results"][task][metric] == pytest.approx(here["results"][task][metric])
    # Compare the scores themselves, not only the metrics computed from them.
    for sample in served["samples"]["served_choice"]:
        question = f"Question: {sample['doc']['q']}\nAnswer:"
        for choice, [[logprob, greedy]] in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            right = local.engine.score([(question, f" {choice}")], special=False)[0]
            assert float(logprob) == pytest.approx(right.logprob, abs=1e-3)
            assert str(greedy) == str(right.is_greedy)
