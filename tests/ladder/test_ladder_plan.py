"""How a climb shares its time."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_model import write_model

from tercet.evaluate.task import Task
from tercet.files import read_json
from tercet.finetune.estimate import Estimate
from tercet.ladder.plan import BASE, Plan, _shares, plan_climb, share_time
from tercet.ladder.settings import LADDER
from tercet.ladder.speed import PromptCosts
from tercet.prompt.llm import LLM
from tercet.train.calibrate import Speed

ROWS = [{"text": f"{label} {number}", "label": label} for number in range(200) for label in ("yes", "no")]
TASK = Task.from_rows("words", ROWS, prompt="{text}:", target="label", labels=["yes", "no"])
COSTS = PromptCosts(speed=1000, plain=60, zero_shot=100, few_shot=300)


def test_the_shares_are_the_whole_time_and_answering_comes_first() -> None:
    shares = share_time(TASK, [*LADDER, BASE], 1200, COSTS, model_given=True)
    # The base is built inside the rung that trains from it, so its seconds stand there too.
    assert sum(shares[name].seconds for name in LADDER) == pytest.approx(1200, rel=1e-6)
    answers = len(TASK.test) + 30
    assert shares["few-shot"].answering == pytest.approx(answers * 300 / 1000)
    assert shares["lora"].answering == pytest.approx(answers * 60 / 1000)
    assert shares["lora"].minutes and shares["full"].minutes and shares["scratch"].minutes
    assert shares["zero-shot"].tokens < shares["few-shot"].tokens


def test_a_rung_alone_gets_the_whole_time() -> None:
    share = share_time(TASK, ["lora"], 540, COSTS, model_given=True)["lora"]
    assert share.minutes is not None
    assert share.minutes * 60 > 540 - share.answering - 6


def test_training_keeps_a_part_of_the_time_where_answering_takes_too_long() -> None:
    slow = PromptCosts(speed=10, plain=60, zero_shot=100, few_shot=300)
    shares = share_time(TASK, ["few-shot", "lora"], 60, slow, model_given=True)
    assert shares["lora"].minutes is not None and 60 * shares["lora"].minutes > 10
    plan = Plan({}, shares)
    plan.rungs = dict.fromkeys(shares)  # type: ignore[misc, assignment]
    assert "Fewer rungs, or a smaller test_size of the task, take less" in plan.lines(1.0)[-1]


def test_a_rung_that_cannot_train_in_its_share_is_refused_and_gives_its_time_to_the_others() -> None:
    slow, fast = Speed(10.0, "float32", 2), Speed(2000.0, "float32", 2)
    estimates = {"lora": Estimate(fast, 60, 300), "full": Estimate(slow, 60, 300)}
    stages = ["few-shot", "lora", "full"]
    shares = _shares(TASK, stages, 200, COSTS, estimates, model_given=True)
    assert shares["full"].refused is not None and shares["full"].minutes is None
    assert "are enough for" in shares["full"].refused and "8 take" in shares["full"].refused
    alone = share_time(TASK, ["few-shot", "lora"], 200, COSTS, model_given=True)
    assert shares["lora"].minutes == alone["lora"].minutes
    assert "steps of 16 examples" in shares["lora"].training
    plan = Plan(dict.fromkeys(stages), shares)  # type: ignore[misc]
    assert any(line.startswith("    full: not run: ") for line in plan.lines(3.3))
    assert plan.estimated_seconds(stages) == pytest.approx(200, rel=0.01)


def test_without_a_given_model_the_base_gets_half() -> None:
    shares = share_time(TASK, [*LADDER, BASE], 600, None, model_given=False)
    assert shares[BASE].minutes == pytest.approx(0.5 * (10 - 8 / 60 - 15 / 60), rel=0.02)


def test_the_speed_of_a_model_is_measured_and_a_stored_plan_is_repeated(tmp_path: Path) -> None:
    llm = LLM(str(write_model(tmp_path / "model", chat=True)))
    names = ["majority", "zero-shot", "lora"]
    plan = plan_climb(TASK, llm, names, 1.0, 0, tmp_path)
    assert plan.speed is not None and plan.speed > 0
    assert plan.lines(1.0)[0].startswith("plan for 1 min 0 s at ")
    stored = read_json(tmp_path / "plan.json")
    assert stored["shares"]["lora"]["minutes"] == plan.shares["lora"].minutes
    again = plan_climb(TASK, llm, names, 9.0, 0, tmp_path)
    assert again.shares == plan.shares, "a resumed climb makes the same choices"


def test_a_longer_prompt_costs_more_tokens(tmp_path: Path) -> None:
    llm = LLM(str(write_model(tmp_path / "model", chat=True)))
    costs = PromptCosts.measure(llm, TASK)
    assert costs.plain <= costs.zero_shot < costs.few_shot


def test_baselines_alone_do_not_load_the_model(tmp_path: Path) -> None:
    llm = LLM(str(write_model(tmp_path / "model", chat=True)))
    assert plan_climb(TASK, llm, ["majority", "nearest"], 1.0, 0, tmp_path / "run").speed is None
