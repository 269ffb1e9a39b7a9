"""What a run needs to go on after a kill as if nothing had happened: safetensors and JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tercet.errors import UserError
from tercet.files import atomic_directory, read_json, write_json


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
    done: bool = False


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that gradients change, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_state(
    directory: Path,
    progressed: Progressed,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    best: dict[str, Tensor] | None,
) -> None:
    """Replace ``directory`` with the run's state; a kill at any moment leaves the old or the new."""
    names = list(parameters)
    moments: dict[str, Tensor] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            moments[f"{names[index]}:{key}"] = value
    with atomic_directory(directory) as temporary:
        save_file(
            {name: value.detach().contiguous() for name, value in parameters.items()},
            temporary / "weights.safetensors",
        )
        save_file(moments, temporary / "optimizer.safetensors")
        if best is not None:
            save_file(best, temporary / "best.safetensors")
        write_json(temporary / "progress.json", asdict(progressed))


def load_progress(directory: Path, fingerprint: str) -> Progressed | None:
    """The state in ``directory``, or None where there is none.

    Raises:
        UserError: it belongs to a run with other data or settings.
    """
    if not (directory / "progress.json").is_file():
        return None
    try:
        progressed = Progressed(**read_json(directory / "progress.json"))
    except TypeError as problem:
        raise UserError(f"{directory} was written by another version; choose another --out") from problem
    if progressed.fingerprint != fingerprint:
        raise UserError(
            f"{directory.parent} holds a run with other data or settings; choose another --out or delete it"
        )
    return progressed


def load_tensors(
    directory: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor] | None:
    """Put weights and optimizer moments back in place; return the best weights, if any were kept."""
    weights = load_file(directory / "weights.safetensors")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    index = {name: position for position, name in enumerate(parameters)}
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(directory / "optimizer.safetensors").items():
        name, _, moment = key.rpartition(":")
        moments.setdefault(index[name], {})[moment] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    best = directory / "best.safetensors"
    return load_file(best) if best.is_file() else None
