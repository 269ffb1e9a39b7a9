"""What a run needs to go on after a kill as if nothing had happened: one safetensors file.

Weights, the optimizer's moments and the best weights so far are its tensors (``weight:NAME``,
``MOMENT:NAME``, ``best:NAME``); how far the run is stands in its header as JSON. One file, because a
file can be replaced in one step and a directory can't.
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
class Progressed:
    """How far a run is. Written beside the weights; everything else follows from seed and step."""

    fingerprint: str
    step: int = 0
    tokens: int = 0  # supervised tokens so far
    seconds: float = 0.0  # training time so far, over all processes
    steps: int = 0  # the schedule in force, which a deadline may have shortened
    cooldown: int = 0
    best: float | None = None  # lowest held-out loss and the step it was seen after
    best_step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # held-out measurements
    shortened: bool = False  # a deadline cut the schedule
    evaluated: int = 0  # the step after which was last measured
    skipped: int = 0  # updates left out because their gradient was no use
    norm: float = 0.0  # running mean of the gradient norms, to know a spike by
    done: bool = False


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that gradients change, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_state(
    path: Path,
    progressed: Progressed,
    parameters: dict[str, nn.Parameter],
    optimizer: Optimizer,
    best: dict[str, Tensor] | None,
) -> None:
    """Replace the state at ``path``; a kill at any moment leaves the old one or the new one.

    Raises:
        UserError: the disk is full or refuses; the old state stays.
    """
    tensors = {f"weight:{name}": value.detach().contiguous() for name, value in parameters.items()}
    tensors |= optimizer.state()
    tensors |= {f"best:{name}": value for name, value in (best or {}).items()}
    with replaced_when_complete(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"progress": json.dumps(asdict(progressed))})
        except SafetensorError as problem:
            raise OSError(str(problem)) from problem


def load_progress(path: Path, fingerprint: str) -> Progressed | None:
    """How far the run at ``path`` is, or None where there is none.

    Raises:
        UserError: the file is damaged, or of a run with other data or settings.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as stored:
            progressed = Progressed(**json.loads(stored.metadata()["progress"]))
    except (SafetensorError, KeyError, TypeError, ValueError) as problem:
        raise UserError(f"{path} can't be read ({problem}); delete it to start this run again") from problem
    return checked_progress(progressed, fingerprint, path)


def checked_progress(progressed: Progressed, fingerprint: str, path: Path) -> Progressed:
    """``progressed``, read from ``path``. UserError where it is of a run with another fingerprint."""
    if progressed.fingerprint != fingerprint:
        raise UserError(
            f"{path.parent} holds a run with other data or settings; choose another --out or delete it"
        )
    return progressed


class FileState:
    """The state of a run whose processes all hold all of it: one file, which the first writes."""

    def __init__(self, path: Path, ranks: Ranks | None = None) -> None:
        self.path, self.ranks = path, ranks or Ranks()

    def progress(self, fingerprint: str) -> Progressed | None:
        """As `load_progress`."""
        return load_progress(self.path, fingerprint)

    def save(
        self,
        progressed: Progressed,
        parameters: dict[str, nn.Parameter],
        optimizer: Optimizer,
        best: dict[str, Tensor] | None,
    ) -> None:
        """As `save_state`; the others raise UserError too where the first one can't write."""

        def write() -> None:
            if self.ranks.first:
                save_state(self.path, progressed, parameters, optimizer, best)

        self.ranks.first_then_all(write)

    def load(self, parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Tensor] | None:
        """As `load_tensors`."""
        return load_tensors(self.path, parameters, optimizer)

    def remove(self) -> None:
        """Nothing is left to resume."""
        if self.ranks.first:
            self.path.unlink(missing_ok=True)


def check_weights(kept: Collection[str], parameters: Mapping[str, nn.Parameter], path: Path) -> None:
    """Raises UserError when the state lacks a weight: an older version's network had others."""
    missing = [name for name in parameters if f"weight:{name}" not in kept]
    if missing:
        raise UserError(
            f"{path} has no {missing[0]}: another version of Tercet began this run; delete it to start again"
        )


def load_tensors(
    path: Path, parameters: dict[str, nn.Parameter], optimizer: Optimizer
) -> dict[str, Tensor] | None:
    """Put weights and optimizer moments back in place; return the best weights, if any were kept."""
    moments: dict[str, Tensor] = {}
    best: dict[str, Tensor] = {}
    with safe_open(path, "pt") as stored, torch.no_grad():
        kept = list(stored.keys())
        check_weights(kept, parameters, path)
        for key in kept:
            kind, _, name = key.partition(":")
            if kind == "weight":
                parameters[name].copy_(stored.get_tensor(key))
            elif kind == "best":
                best[name] = stored.get_tensor(key)
            else:
                moments[key] = stored.get_tensor(key)
    optimizer.load_state(moments)
    return best or None
