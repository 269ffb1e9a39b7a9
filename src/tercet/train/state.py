"""The state that a killed run resumes from, in one safetensors file.

Its tensors are the weights, the optimizer's moments and the best weights so far (``weight:NAME``,
``MOMENT:NAME``, ``best:NAME``); its header holds the run's progress as JSON. It is one file because a file
can be replaced atomically and a directory can't.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tercet.errors import UserError
from tercet.files import replaced_when_complete
from tercet.train.optimizer import Optimizer
from tercet.train.ranks import Ranks


@dataclass
class RunProgress:
    """Where a run stands, saved beside the weights. Everything else follows from the seed and the step."""

    fingerprint: str
    step: int = 0
    tokens: int = 0  # supervised tokens so far
    seconds: float = 0.0  # training time so far, before and after every resume
    steps: int = 0  # the schedule in force, which a deadline may have shortened
    cooldown: int = 0
    best: float | None = None  # lowest held-out loss, and the step after which it was measured
    best_step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # held-out evaluations
    shortened: bool = False  # a deadline cut the schedule
    evaluated: int = 0  # the step after which the last evaluation ran
    skipped: int = 0  # updates that were skipped because their gradient was unusable
    norm: float = 0.0  # running mean of the gradient norms, to recognise a spike
    done: bool = False


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_state(
    path: Path,
    progress: RunProgress,
    parameters: dict[str, nn.Parameter],
    optimizer: Optimizer,
    best: dict[str, Tensor] | None,
) -> None:
    """Replace the state at ``path``; a kill at any moment leaves the old one or the new one.

    Raises:
        UserError: The disk is full or the file can't be written; the old state stays.
    """
    tensors = {f"weight:{name}": value.detach().contiguous() for name, value in parameters.items()}
    tensors |= optimizer.state()
    tensors |= {f"best:{name}": value for name, value in (best or {}).items()}
    with replaced_when_complete(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"progress": json.dumps(asdict(progress))})
        except SafetensorError as problem:
            raise OSError(str(problem)) from problem


def load_progress(path: Path, fingerprint: str) -> RunProgress | None:
    """Return the progress of the run at ``path``, or None where there is no state.

    Raises:
        UserError: The file is damaged, or belongs to a run with other data or settings.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as stored:
            progress = RunProgress(**json.loads(stored.metadata()["progress"]))
    except (SafetensorError, KeyError, TypeError, ValueError) as problem:
        raise unreadable_state(path, problem) from problem
    return check_fingerprint(progress, fingerprint, path)


def unreadable_state(path: Path, problem: Exception) -> UserError:
    """Return the error for a state file that is damaged."""
    return UserError(f"{path} can't be read ({problem}); delete it to start this run again")


def check_fingerprint(progress: RunProgress, fingerprint: str, path: Path) -> RunProgress:
    """Return ``progress``, which was read from ``path``.

    Raises:
        UserError: It belongs to a run with another fingerprint.
    """
    if progress.fingerprint != fingerprint:
        raise UserError(
            f"{path.parent} holds a run with other data or settings; choose another `out` or delete it"
        )
    return progress


class FileState:
    """The state of a run whose processes each hold all weights: one file, which the first process writes."""

    def __init__(self, path: Path, ranks: Ranks | None = None) -> None:
        self.path, self.ranks = path, ranks or Ranks()

    def progress(self, fingerprint: str) -> RunProgress | None:
        """Return what `load_progress` returns."""
        return load_progress(self.path, fingerprint)

    def save(
        self,
        progress: RunProgress,
        parameters: dict[str, nn.Parameter],
        optimizer: Optimizer,
        best: dict[str, Tensor] | None,
    ) -> None:
        """Save as `save_state` does; every process raises UserError where the first one can't write."""

        def write() -> None:
            if self.ranks.first:
                save_state(self.path, progress, parameters, optimizer, best)

        self.ranks.first_then_all(write)

    def load(self, parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Tensor] | None:
        """Load as `load_tensors` does."""
        return load_tensors(self.path, parameters, optimizer)

    def remove(self) -> None:
        """Delete the state of a finished run."""
        if self.ranks.first:
            self.path.unlink(missing_ok=True)


def check_weights(keys: Collection[str], parameters: Mapping[str, nn.Parameter], path: Path) -> None:
    """Raise UserError when the state lacks a weight: the network of an older version had others."""
    missing = [name for name in parameters if f"weight:{name}" not in keys]
    if missing:
        raise UserError(
            f"{path} has no {missing[0]}: another version of Tercet began this run; delete it to start again"
        )


def load_tensors(
    path: Path, parameters: dict[str, nn.Parameter], optimizer: Optimizer
) -> dict[str, Tensor] | None:
    """Load weights and optimizer moments in place; return the best weights, where the state has them.

    Raises:
        UserError: The state lacks a weight.
    """
    moments: dict[str, Tensor] = {}
    best: dict[str, Tensor] = {}
    with safe_open(path, "pt") as stored, torch.no_grad():
        keys = list(stored.keys())
        check_weights(keys, parameters, path)
        for key in keys:
            kind, _, name = key.partition(":")
            if kind == "weight":
                parameters[name].copy_(stored.get_tensor(key))
            elif kind == "best":
                best[name] = stored.get_tensor(key)
            else:
                moments[key] = stored.get_tensor(key)
    optimizer.load_state(moments)
    return best or None
