"""Signals end a run at once where nothing is half done, and after the step elsewhere; a resumed run is the same."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tercet.model.config import ModelConfig
from tercet.model.transformer import Transformer
from tercet.train.batch import Batch
from tercet.train.interrupts import stop_signals
from tercet.train.loop import STATE, Recipe, train
from tercet.train.optimizer import Optimizer
from tercet.train.schedule import Schedule
from tercet.train.state import FileState, load_progress

STEPS, AT = 12, 5
CONFIG = ModelConfig(
    family="qwen3", vocab_size=64, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2,
    num_kv_heads=1, head_dim=8, max_positions=32, qk_norm="head", tie_embeddings=True,
)  # fmt: skip


def batch_of(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch(*(torch.randint(0, 64, (2, 8), generator=generator) for _ in range(2)))


class Run:
    """A run in a directory that raises a signal at a chosen place, once."""

    def __init__(self, directory: Path, place: str = "") -> None:
        self.directory, self.place, self.evaluations = directory, place, 0
        torch.manual_seed(0)
        self.model = Transformer(CONFIG)

    def signal_at(self, place: str) -> None:
        if self.place == place:
            self.place = ""
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)  # an impatient second one

    def batches(self, step: int) -> list[Batch]:
        if step == AT:
            self.signal_at("gradients")
        return [batch_of(step)]

    def evaluate(self) -> dict[str, Any]:
        self.evaluations += 1
        if self.evaluations == 2:
            self.signal_at("evaluation")
        with torch.no_grad():
            return {"loss": float(self.model(batch_of(99).tokens).square().mean())}

    def train(self) -> None:
        recipe = Recipe(Schedule.of(STEPS), learning_rate=1e-2, evaluate_every=3, save_seconds=1000)
        train(
            self.model, recipe, self.batches, self.directory, fingerprint="x", title="test",
            evaluate=self.evaluate, keep_best=True,
        )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], str]:
    run = Run(tmp_path_factory.mktemp("whole"))
    run.train()
    return run.model.state_dict(), _measured(run.directory)


def _measured(directory: Path) -> str:
    """The metrics without times."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return "\n".join(line.partition(', "seconds"')[0] for line in lines)


@pytest.mark.parametrize(("place", "step"), [("gradients", AT), ("evaluation", 6), ("update", 1)])
def test_an_interrupted_run_resumes_bit_for_bit(
    place: str,
    step: int,
    whole: tuple[dict[str, torch.Tensor], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Run(tmp_path, place)
    update, save = Optimizer.step, FileState.save

    def signalled_update(self: Optimizer, rate: float) -> None:
        run.signal_at("update")
        update(self, rate)

    def signalled_save(self: FileState, *args: Any) -> None:
        if run.place != place:  # the save that the first signals cause is hit by another one
            signal.raise_signal(signal.SIGTERM)
        save(self, *args)

    monkeypatch.setattr(Optimizer, "step", signalled_update)
    monkeypatch.setattr(FileState, "save", signalled_save)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    progress = load_progress(tmp_path / STATE, "x")
    assert progress is not None and progress.step == step
    assert f"stopped at step {step}; saved in {tmp_path}" in capsys.readouterr().err
    monkeypatch.undo()
    again = Run(tmp_path)
    again.train()
    weights, measured = whole
    assert all(torch.equal(value, weights[name]) for name, value in again.model.state_dict().items())
    assert _measured(tmp_path) == measured


def test_only_interruptible_work_is_interrupted() -> None:
    with stop_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt), stop.interruptible():
            raise AssertionError("a signal before the work ends it too")
        signal.raise_signal(signal.SIGINT)
    with stop_signals(at_once=False) as stop, stop.interruptible():
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set(), "processes that train together stop after the same step"


def test_handlers_are_restored_and_other_threads_set_none() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) is before
    seen: list[Any] = []

    def other() -> None:
        with stop_signals() as stop, stop.interruptible():
            seen.append((stop.is_set(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
