"""Training where each process holds a part of every weight (FSDP2), for models too large for one process.

Weights, gradients and moments are PyTorch's DTensors, sharded along their first dimension. All processes
write a checkpoint together, and any number of processes can resume from it.
"""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from tercet.errors import UserError
from tercet.files import write_json
from tercet.model.transformer import Transformer
from tercet.train.batch import Batch
from tercet.train.loss import losses_of
from tercet.train.optimizer import Optimizer
from tercet.train.ranks import Ranks
from tercet.train.state import RunProgress, check_fingerprint, check_weights, unreadable_state

POINTER = "state.json"  # names the directory of the last complete checkpoint, and holds the run's progress


def shard(model: Transformer, ranks: Ranks) -> Transformer:
    """Shard ``model``, whose weights are equal in all processes, block by block; return it.

    Afterwards each process holds a part of every weight.
    """
    mesh = init_device_mesh(model.device.type, (ranks.size,))
    # Gradients are summed, not averaged: each is already divided by the tokens of all processes.
    for block in [*model.model.layers, model]:
        fully_shard(block, mesh=mesh)
        block.set_gradient_divide_factor(1.0)
        block.set_force_sum_reduction_for_comms(True)
    for name in ("hidden", "logits"):  # called instead of forward
        register_fsdp_forward_method(model, name)
    return model


def unsharded(model: Transformer) -> Transformer:
    """Return a copy of a sharded model with all weights, in every process; each process must call it."""
    copy = Transformer(model.config)
    sharded = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            parameter.copy_(_full(sharded[name]))
    return copy


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class ShardedGradients:
    """Gradients of a step whose rows are distributed over processes that share the weights (FSDP)."""

    def __init__(self, model: Transformer, ranks: Ranks, z_weight: float = 0.0) -> None:
        self.model, self.ranks, self.z_weight = model, ranks, z_weight

    def gradients(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Implement `Gradients.gradients`. All processes must have the same number of micro-batches."""
        tokens = self.ranks.summed([float(sum(batch.supervised for batch in batches))])[0]
        for parameter in self.model.parameters():
            parameter.grad = None
        total = torch.zeros((), device=self.model.device)
        for batch in batches:
            losses = losses_of(self.model, batch, 1 / max(1.0, tokens), self.z_weight)
            losses.total.backward()  # type: ignore[no-untyped-call]
            total += losses.entropy
        return self.ranks.summed([float(total) / max(1.0, tokens)])[0], int(tokens)


class ShardedState:
    """Checkpoints in directories of ``torch.distributed.checkpoint``; the last complete one is kept.

    A directory is complete before `POINTER`, which is replaced atomically, names it.
    """

    def __init__(self, directory: Path, ranks: Ranks) -> None:
        self.directory, self.ranks = directory, ranks
        self._last = ""  # the directory that `POINTER` named when this process last wrote or read it

    @property
    def path(self) -> Path:
        """The file that names the last complete checkpoint."""
        return self.directory / POINTER

    def progress(self, fingerprint: str) -> RunProgress | None:
        """Return the run's progress, or None where there is no state.

        Raises:
            UserError: The file is damaged, or belongs to a run with other data or settings.
        """
        if not self.path.is_file():
            return None
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            progress = RunProgress(**stored["progress"])
        except (KeyError, TypeError, ValueError) as problem:
            raise unreadable_state(self.path, problem) from problem
        return check_fingerprint(progress, fingerprint, self.path)

    def save(
        self,
        progress: RunProgress,
        parameters: dict[str, nn.Parameter],
        optimizer: Optimizer,
        best: dict[str, Tensor] | None,
    ) -> None:
        """Write a checkpoint; every process must call it.

        Raises:
            UserError: The disk is full or can't be written to, in any process; the last checkpoint stays.
        """
        assert best is None, "a sharded run ends with its last weights"
        # A step may be saved twice (before and after its evaluation): never overwrite what `POINTER` names.
        name = f"state-{progress.step}"
        name = f"{name}-again" if name == self._last else name
        target = self.directory / name
        if self.ranks.first:
            shutil.rmtree(target, ignore_errors=True)
        self.ranks.barrier()
        tensors = {f"weight:{name}": value.detach() for name, value in parameters.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                state_dict_saver.save({**tensors, **optimizer.state()}, checkpoint_id=target)
            except CheckpointException as problem:  # raised in all processes, whichever of them failed
                raise UserError(f"cannot write {target}: {_reason(problem)}") from problem
        self.ranks.barrier()
        self._last = name
        if self.ranks.first:
            write_json(self.path, {"directory": name, "progress": asdict(progress)})
            for old in self.directory.glob("state-*"):
                if old.name != name:
                    shutil.rmtree(old, ignore_errors=True)

    def load(self, parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> None:
        """Load weights and moments in place, however many processes wrote them.

        Raises:
            UserError: The checkpoint is damaged or lacks a weight.
        """
        self._last = json.loads(self.path.read_text(encoding="utf-8"))["directory"]
        source = self.directory / self._last
        damaged = f"{source} can't be read (%s); delete {self.path} to start this run again"
        try:
            metadata = filesystem.FileSystemReader(source).read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError) as problem:
            raise UserError(damaged % problem) from problem
        check_weights(metadata.state_dict_metadata, parameters, self.path)
        tensors: dict[str, Tensor] = {}
        for key, stored in metadata.state_dict_metadata.items():
            kind, _, name = key.partition(":")
            parameter = parameters[name].detach()
            if kind == "weight":
                tensors[key] = parameter
            elif tuple(stored.size) == tuple(parameter.shape):  # type: ignore[union-attr]
                tensors[key] = torch.zeros_like(parameter)
            else:  # AdamW's step count
                tensors[key] = torch.zeros(stored.size)  # type: ignore[union-attr]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                state_dict_loader.load(tensors, checkpoint_id=source)
            except CheckpointException as problem:
                raise UserError(damaged % _reason(problem)) from problem
        optimizer.load_state({key: value for key, value in tensors.items() if not key.startswith("weight:")})

    def remove(self) -> None:
        """Delete the state of a finished run."""
        self.ranks.barrier()
        if self.ranks.first:
            self.path.unlink(missing_ok=True)
            for old in self.directory.glob("state-*"):
                shutil.rmtree(old, ignore_errors=True)


def _reason(problem: CheckpointException) -> str:
    """Return the failure of the first process that failed."""
    return " ".join(str(next(iter(problem.failures.values()))[0]).split())
