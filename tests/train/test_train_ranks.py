"""Two processes train like one: summed gradients, sharded weights, checkpoints for any number of processes."""

from __future__ import annotations

import json
import os
import socket
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemWriter

import forked
from tercet.errors import UserError
from tercet.model.transformer import Transformer
from tercet.pretrain.plan import network
from tercet.train.optimizer import Optimizer, Rates
from tercet.train.ranks import Ranks
from tercet.train.sharded import ShardedState
from tercet.train.state import RunProgress, trainable

STEPS = 12

# A tiny network, batches of 5 rows (so that two processes get unequal shares), and the loop. Its arguments:
# directory, fsdp or ddp, kind of optimizer, steps until it stops itself (0: never).
SCRIPT = textwrap.dedent(
    """
    import json, os, signal, sys
    from pathlib import Path
    import torch
    from safetensors.torch import save_file
    from tercet.pretrain.initialize import initialize
    from tercet.pretrain.plan import network
    from tercet.model.transformer import Transformer
    from tercet.train.loop import Recipe, train
    from tercet.train.batch import Batch
    from tercet.train.optimizer import Rates
    from tercet.train.ranks import exit_process, open_ranks
    from tercet.train.schedule import Schedule

    directory, parallel, kind, stop_at = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    with open_ranks() as ranks:
        model = Transformer(network(2, 64, 96, 32))
        initialize(model, 0)
        if parallel == "fsdp":
            from tercet.train.sharded import shard, unsharded
            shard(model, ranks)

        def batches_at(step):
            if stop_at and step == stop_at and ranks.rank == ranks.size - 1:
                os.kill(os.getpid(), signal.SIGTERM)  # to any one of them
            rows = torch.randint(96, (5, 33), generator=torch.Generator().manual_seed(step))
            mine = rows[ranks.rank :: ranks.size]
            return [Batch(mine[:, :-1], mine[:, 1:])]

        def evaluate():
            model.eval()
            with torch.no_grad():
                rows = torch.arange(32)[None] % 96
                hidden = model.hidden(rows)
                return {"loss": float(model.logits(hidden).float().logsumexp(-1).mean())}

        rates = Rates("muon", 0.02, embedding=0.01, momentum=0.9) if kind == "muon" else Rates("adamw", 3e-3)
        recipe = Recipe(Schedule.of(12, warmup=0.1, cooldown=0.5), rates.matrices, rates=rates, threads=1,
                        evaluate_every=5)
        train(model, recipe, batches_at, directory, fingerprint="test", title="test", evaluate=evaluate,
              ranks=ranks, sharded=parallel == "fsdp")
        result = unsharded(model) if parallel == "fsdp" else model
        if ranks.first:
            save_file({name: value.detach().clone() for name, value in result.named_parameters()},
                      directory / "weights.safetensors")
    exit_process(0)
    """
)


def port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launch(count: int, directory: Path, parallel: str, kind: str, stop_at: int = 0) -> list[int]:
    """Run ``count`` processes like torchrun and return their exit codes."""
    directory.mkdir(exist_ok=True)
    common = {
        **os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port(), "WORLD_SIZE": str(count),
    }  # fmt: skip
    children = [
        forked.Program(
            SCRIPT,
            str(directory),
            parallel,
            kind,
            str(stop_at),
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]
    codes = []
    for child in children:
        codes.append(child.wait())
        if codes[-1] and not stop_at:
            raise AssertionError(child.stderr[-3000:])
    return codes


def losses(directory: Path) -> list[float]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def weights(directory: Path) -> dict[str, Any]:
    return load_file(directory / "weights.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("alone")
    for kind in ("muon", "adamw"):
        launch(1, root / kind, "ddp", kind)
    return {kind: root / kind for kind in ("muon", "adamw")}


@pytest.mark.parametrize(("parallel", "kind"), [("ddp", "muon"), ("fsdp", "muon")])
def test_two_processes_have_the_losses_of_one(
    parallel: str, kind: str, alone: dict[str, Path], tmp_path: Path
) -> None:
    launch(2, tmp_path / "two", parallel, kind)
    ours, theirs = losses(tmp_path / "two"), losses(alone[kind])
    assert len(ours) == len(set(ours)) == STEPS
    assert ours == pytest.approx(theirs, rel=2e-5)
    expected, result = weights(alone[kind]), weights(tmp_path / "two")
    assert set(expected) == set(result)
    for name, value in expected.items():
        # Twelve steps of sums rounded in another order; Muon's products are bfloat16 by default.
        assert torch.allclose(value, result[name], atol=2e-3), name
    # Only the first process writes: a line per step and a line per evaluation.
    assert len((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()) == STEPS + 3


@pytest.mark.parametrize(
    ("parallel", "kind", "before", "after"),
    [("fsdp", "muon", 2, 1), ("fsdp", "adamw", 1, 2)],
)
def test_a_stopped_run_resumes_with_another_number_of_processes(
    parallel: str, kind: str, before: int, after: int, alone: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # The signal reaches one process; all stop after the same step. One process alone drops the step.
    assert all(code != 0 for code in launch(before, run, parallel, kind, stop_at=6))
    assert not (run / "weights.safetensors").exists()
    assert len(losses(run)) == (7 if before > 1 else 6)
    launch(after, run, parallel, kind)
    assert losses(run) == pytest.approx(losses(alone[kind]), rel=2e-5)
    for name, value in weights(alone[kind]).items():
        assert torch.allclose(value, weights(run)[name], atol=2e-3), name


def test_a_sharded_checkpoint_stays_until_the_next_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Transformer(network(1, 32, 96, 32))
    parameters = trainable(model)
    optimizer = Optimizer(parameters, Rates("adamw", 1e-2))
    state, progress = ShardedState(tmp_path, Ranks()), RunProgress("x", step=3)
    state.save(progress, parameters, optimizer, None)
    saved = {name: value.detach().clone() for name, value in parameters.items()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1)
    with monkeypatch.context() as patched:
        patched.setattr(FileSystemWriter, "write_data", full)
        for step in (3, 4):  # the same step again, as at the end of a run; a later one
            with pytest.raises(UserError, match=r"cannot write .* No space left on device"):
                state.save(RunProgress("x", step=step), parameters, optimizer, None)
    restored = ShardedState(tmp_path, Ranks())
    assert restored.progress("x") == progress
    restored.load(parameters, optimizer)
    assert all(torch.equal(value, saved[name]) for name, value in parameters.items())

    for _ in range(3):
        restored.save(progress, parameters, optimizer, None)
        restored = ShardedState(tmp_path, Ranks())
        assert restored.progress("x") == progress
        restored.load(parameters, optimizer)
    (directory,) = tmp_path.glob("state-*")
    next(directory.glob("*.distcp")).unlink()
    with pytest.raises(UserError, match=r"can't be read .* delete .*state\.json"):
        restored.load(parameters, optimizer)
    (directory / ".metadata").write_bytes(b"")
    with pytest.raises(UserError, match="can't be read"):
        restored.load(parameters, optimizer)
