"""Tasks of lm-evaluation-harness on the engine, against the harness's own HFLM on the same checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_model import CONTEXT, write_model

from tercet.cli import main as cli
from tercet.engine.request import Request, Sampling
from tercet.errors import UserError
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


CHOICES = [
    {"q": sentence(n, 3 + n % 5), "choices": [sentence(n + 11 * k, 1 + k) for k in range(3)], "gold": n % 3}
    for n in range(12)
]
# Shorter than the context of 96 tokens, longer, and four times as long.
TEXTS = [{"text": sentence(n, (4, 30, 90)[n % 3])} for n in range(6)]
PROMPTS = [{"q": sentence(n, 3 + 9 * (n % 4)), "a": sentence(n, 1)} for n in range(6)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), chat=True)


@pytest.fixture(scope="module")
def ours(directory: Path) -> TercetLM:
    return TercetLM(directory, quantize="none", threads=1)


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Any:
    return HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with three task files and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    common: dict[str, Any] = {"dataset_path": "json", "test_split": "test", "num_fewshot": 0}
    kinds: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
        "own_choice": (
            CHOICES,
            {
                "output_type": "multiple_choice",
                "doc_to_text": "Question: {{q}}\nAnswer:",
                "doc_to_choice": "choices",
                "doc_to_target": "gold",
                "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            },
        ),
        "own_rolling": (
            TEXTS,
            {
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "text",
                "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
            },
        ),
        "own_generation": (
            PROMPTS,
            {
                "output_type": "generate_until",
                "doc_to_text": "q",
                "doc_to_target": "a",
                "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False},
                "metric_list": [{"metric": "exact_match"}],
            },
        ),
    }
    for name, (rows, config) in kinds.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        source = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        content = {"task": name, **common, "dataset_kwargs": source, **config}
        (folder / f"{name}.yaml").write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return folder


def instances(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=row, idx=number) for number, row in enumerate(arguments)
    ]


def test_log_probabilities_equal_hflms(ours: TercetLM, theirs: Any) -> None:
    rows = [(f"Question: {row['q']}\nAnswer:", f" {choice}") for row in CHOICES for choice in row["choices"]]
    rows += [
        ("", "no context"),
        ("ends in spaces  ", "so they move"),
        ("<s>begins with BOS", " already"),
        (sentence(3, 60), " after too long a context"),
    ]
    ask = instances("loglikelihood", rows)
    for (mine, greedy), (other, others_greedy) in zip(
        ours.loglikelihood(ask, disable_tqdm=True), theirs.loglikelihood(ask, disable_tqdm=True), strict=True
    ):
        assert mine == pytest.approx(other, rel=1e-5) and greedy == others_greedy


def test_both_call_generated_tokens_greedy(ours: TercetLM, theirs: Any) -> None:
    context = ours.tok_encode("the cat")
    [done] = ours.engine.generate(
        [Request(tuple(context), Sampling(temperature=0, max_tokens=4, ignore_eos=True))]
    )
    other = [*done.tokens[:3], (done.tokens[3] + 1) % 200]
    ask: list[Any] = [(None, context, done.tokens), (None, context, other)]
    assert [greedy for _, greedy in ours._loglikelihood_tokens(ask)] == [True, False]
    assert [greedy for _, greedy in theirs._loglikelihood_tokens(ask, disable_tqdm=True)] == [True, False]


def test_rolling_log_probabilities_equal_hflms(ours: TercetLM, theirs: Any) -> None:
    lengths = [ours.tok_encode(row["text"]) for row in TEXTS]
    assert min(map(len, lengths)) < CONTEXT < max(map(len, lengths)) / 3  # one window, and several
    ask = instances("loglikelihood_rolling", [(row["text"],) for row in TEXTS])
    assert ours.loglikelihood_rolling(ask) == pytest.approx(theirs.loglikelihood_rolling(ask), rel=1e-5)


def test_greedy_texts_equal_hflms(ours: TercetLM, theirs: Any) -> None:
    settings = {"until": ["e", "\n"], "max_gen_toks": 16, "do_sample": False}
    rows = [(row["q"], dict(settings)) for row in PROMPTS]
    rows += [(sentence(5, 60), dict(settings)), ("no stops", {"max_gen_toks": 9})]  # the first is too long
    mine = ours.generate_until(instances("generate_until", rows))
    assert mine == theirs.generate_until(instances("generate_until", rows), disable_tqdm=True)
    assert any(mine)


def test_results_of_whole_tasks_equal_hflms(ours: TercetLM, theirs: Any, tasks: Path) -> None:
    names = ["own_choice", "own_rolling", "own_generation"]
    mine = evaluate_lm_eval(ours, names, include_path=tasks)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    other = simple_evaluate(model=theirs, tasks=names, task_manager=manager, log_samples=False)
    assert other is not None and set(mine["results"]) == set(names)
    for name in names:
        for metric, value in other["results"][name].items():
            if isinstance(value, float):
                assert mine["results"][name][metric] == pytest.approx(value, rel=1e-5), (name, metric)
    assert mine["results"]["own_rolling"]["bits_per_byte,none"] > 0
    assert mine["results"]["own_rolling"]["bits_per_byte_stderr,none"] is None  # the harness says "N/A"
    json.dumps(mine, allow_nan=False)


def test_chat_templates_equal_hflms(ours: TercetLM, theirs: Any) -> None:
    history = [{"role": "user", "content": "Say hi. "}, {"role": "assistant", "content": "Well, "}]
    assert ours.apply_chat_template(history[:1]) == theirs.apply_chat_template(history[:1])
    begun = ours.apply_chat_template(history, add_generation_prompt=False)
    assert begun == theirs.apply_chat_template(history, add_generation_prompt=False)
    assert begun.endswith("Well, ")
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.tokenizer_name


def test_a_template_that_trims_messages_trims_a_begun_answer(ours: TercetLM) -> None:
    trims = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}[end]{% endfor %}"
    lm = TercetLM(ours.engine)
    lm.tokenizer = ours.tokenizer.with_template(trims)
    assert lm.apply_chat_template([{"role": "assistant", "content": "Well, "}], False) == "[assistant]Well,"


def test_a_limit_and_a_conversation(ours: TercetLM, tasks: Path) -> None:
    few = evaluate_lm_eval(ours, ["own_choice"], include_path=tasks, limit=4)
    assert few["n-samples"]["own_choice"]["effective"] == 4
    chat = evaluate_lm_eval(ours, ["own_choice"], include_path=tasks, chat_template=True)
    assert set(chat["results"]["own_choice"]) == set(few["results"]["own_choice"])


def test_the_harness_knows_the_model_by_name(directory: Path, tasks: Path) -> None:
    assert get_model("tercet") is TercetLM and get_model("hf") is HFLM
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    options = {"model": str(directory), "quantize": "none", "threads": 1}
    results = simple_evaluate(
        model="tercet", model_args=options, tasks=["own_choice"], task_manager=manager, limit=2
    )
    assert results is not None and "acc,none" in results["results"]["own_choice"]


def test_settings_that_the_engine_lacks_are_refused(ours: TercetLM) -> None:
    with pytest.raises(UserError, match="num_beams, which Tercet's engine does not know"):
        ours.generate_until(instances("generate_until", [("a", {"num_beams": 4})]))
    with pytest.raises(UserError, match=f"the task requests {CONTEXT} tokens; .* takes {CONTEXT}"):
        ours.generate_until(instances("generate_until", [("a", {"max_gen_toks": CONTEXT})]))
    with pytest.raises(UserError, match="requests the log-probability of 200 tokens at once"):
        ours.loglikelihood(instances("loglikelihood", [("a", "b" * 200)]), disable_tqdm=True)


def test_the_command(directory: Path, tasks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = ["eval", str(directory), "--lm-eval", "own_choice, own_rolling", "--include-path", str(tasks)]
    assert cli.main([*line, "--quantize", "none", "--json"]) == 0
    results = json.loads(capfd.readouterr().out)  # and nothing else on standard output
    assert results["kind"] == "lm_eval" and results["model"] == str(directory)
    assert set(results["results"]) == {"own_choice", "own_rolling"}
    assert cli.main([*line, "--limit", "3"]) == 0
    assert "own_choice  acc_norm  0." in capfd.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lm-eval", "own_choise"], "lm-eval has no task 'own_choise'; did you mean own_choice"),
        (["--lm-eval", ","], "--lm-eval names no task"),
        (["--lm-eval", "own_choice", "--limit", "0"], "--limit is 0; it must be 1 or more"),
        (["--lm-eval", "own_choice", "--seed", "3"], "--seed has no effect on --lm-eval; leave it out"),
        (["task.yaml", "--lm-eval", "own_choice"], "give TASK (task.yaml) or --lm-eval, not both"),
    ],
)
def test_mistakes(
    more: list[str],
    message: str,
    directory: Path,
    tasks: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Without the harness's own tasks, which take six seconds to read.
    monkeypatch.setattr(
        "tercet.evaluate.lm_eval.TaskManager",
        lambda **paths: TaskManager(**{**paths, "include_defaults": False}),
    )
    assert cli.main(["eval", str(directory), *more, "--include-path", str(tasks)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}},
            r"lm-eval cannot run own: .*gone\.jsonl",
        ),
        ({"doc_to_text": "{{nothing}}"}, "lm-eval cannot run own: UndefinedError: 'nothing' is undefined"),
        ({"test_split": "exam"}, "lm-eval cannot run own: KeyError: 'exam'"),
    ],
)
def test_a_mistake_in_a_task_is_one_line(
    ours: TercetLM, tasks: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    content = json.loads((tasks / "own_choice.yaml").read_text(encoding="utf-8"))
    (tmp_path / "own.yaml").write_text(json.dumps({**content, "task": "own", **changed}), encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        evaluate_lm_eval(ours, ["own"], include_path=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_mistake_of_ours_keeps_its_traceback(
    ours: TercetLM, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TercetLM, "max_length", "96")
    with pytest.raises(TypeError, match="not supported between"):
        evaluate_lm_eval(ours, ["own_choice"], include_path=tasks)


def test_hosted_models_are_refused() -> None:
    with pytest.raises(UserError, match="openai:gpt is hosted, and lm-eval needs the log-probabilities"):
        TercetLM("openai:gpt")
