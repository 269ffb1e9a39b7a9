"""The next steps that a report names."""

from __future__ import annotations

from pathlib import Path

from tercet.evaluate.task import Task
from tercet.ladder.conclusions import conclude
from tercet.ladder.result import Level, RungResult

ROWS = [{"text": f"{word} {n}", "label": word} for n in range(40) for word in ("ham", "spam")]


def rung(name: str, level: Level, score: float) -> RungResult:
    return RungResult(name, level, score=score, low=0.0, high=1.0)


def commands(task: Task, results: list[RungResult], out: Path) -> list[str]:
    return [step.command for step in conclude(task, results, model_given=False, seed=0, out=out).next_steps]


def test_of_trained_rungs_with_equal_scores_the_cheapest_is_tried(tmp_path: Path) -> None:
    task = Task.from_rows("mail", ROWS, prompt="{text}:", target="label", labels="auto")
    names: list[tuple[str, Level]] = [("lora", "tune"), ("full", "tune"), ("scratch", "build")]
    results = [rung("majority", "baseline", 0.5), *(rung(name, level, 0.5) for name, level in names)]
    assert f"tercet prompt {tmp_path}/rungs/lora/run" in commands(task, results, tmp_path)[0]


def test_a_task_file_with_spaces_in_its_name_is_quoted(tmp_path: Path) -> None:
    task = Task.from_rows("mail", ROWS, prompt="{text}\n:", target="label", labels="auto")
    task.reference = "my task.yaml"
    lines = commands(task, [rung("majority", "baseline", 0.5), rung("full", "tune", 0.9)], tmp_path)
    assert f"tercet eval {tmp_path}/rungs/full/run 'my task.yaml'" in lines
    assert "tercet climb 'my task.yaml' --model REF" in lines
