"""The sampling settings of a request that sets none: those that the model's publisher recommends.

``generation_config.json`` holds them. The fields mean what they mean in transformers 5: ``do_sample: false`` is
greedy decoding, and a file that samples without naming a temperature samples at 1. A request's own value takes
precedence field by field. A request for temperature 0 takes none of them, so that it always gets the most likely
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

from tercet.engine.request import Sampling, SamplingChoice
from tercet.errors import UserError
from tercet.model.checkpoint import read_generation_config

CHOICES: tuple[SamplingChoice, ...] = get_args(SamplingChoice)
FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_SAMPLES = ("top_k", "top_p", "min_p")  # a file with one of these is meant for sampling
_GREEDY: dict[str, float] = {"temperature": 0.0}
_NEUTRAL: dict[str, float] = {name: getattr(Sampling(temperature=1.0), name) for name in FIELDS}


def read_sampling_defaults(directory: str | Path) -> dict[str, float]:
    """Return the published values of FIELDS in ``generation_config.json``; empty where it holds none.

    Raises:
        UserError: the file holds a value out of its range; the message names file and field.
    """
    path = Path(directory) / "generation_config.json"
    content = read_generation_config(directory)
    samples = content.get("do_sample")
    if samples is not None and not isinstance(samples, bool):
        raise UserError(f"{path}: field 'do_sample' is {samples!r}; it must be true or false")
    if samples is False:
        return dict(_GREEDY)
    values = {name: _value(content[name], name, path) for name in FIELDS if content.get(name) is not None}
    if "temperature" not in values and (samples or any(name in values for name in _SAMPLES)):
        values["temperature"] = 1.0
    return values


def _value(value: Any, name: str, path: Path) -> float:
    """Return a checked value; -1, as vLLM writes it, and 0 both turn ``top_k`` off."""
    if name == "top_k" and value == -1:
        return 0
    try:
        Sampling(**{name: value})
    except UserError as problem:
        raise UserError(f"{path}: field '{name}' is wrong: {problem}; correct or remove it") from problem
    return cast(float, value)


def check_choice(choice: str) -> SamplingChoice:
    """Return the choice. UserError where it is none of CHOICES."""
    for known in CHOICES:
        if choice == known:
            return known
    raise UserError(f"`sampling` is {choice!r}; it must be {', '.join(CHOICES)}")


def chosen_defaults(choice: SamplingChoice, published: Mapping[str, float]) -> dict[str, float]:
    """Return the values for fields that a request leaves unset.

    Args:
        choice: "default" for the published values, "greedy" for the most likely token every time, "neutral"
            for the model's own distribution: temperature 1 and no truncation.
        published: those of `read_sampling_defaults`.
    """
    if choice == "default":
        return dict(published)
    return dict(_GREEDY if choice == "greedy" else _NEUTRAL)


def with_defaults(fields: Mapping[str, Any], defaults: Mapping[str, float]) -> dict[str, Any]:
    """Return ``fields`` with the defaults for those that are missing; none for temperature 0."""
    return dict(fields) if fields.get("temperature") == 0 else {**defaults, **fields}
