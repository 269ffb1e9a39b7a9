"""Settings of one call of a model: sampling fields, as keywords or an object, and the form of the answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from tercet.data.prompt_tokens import NEW_MESSAGE, PromptEnding
from tercet.engine.request import Sampling, SamplingChoice
from tercet.engine.sampling_defaults import check_choice, chosen_defaults, with_defaults
from tercet.errors import UserError, nearest
from tercet.prompt.output import OPTIONS, Output, requested_output

if TYPE_CHECKING:
    from tercet.prompt.output import Schema

FIELDS = tuple(field.name for field in dataclasses.fields(Sampling))


class SamplingFields(TypedDict, total=False):
    """The fields of `tercet.engine.request.Sampling` as keywords, so that editors complete and check them."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    logprobs: int | None
    ignore_eos: bool
    logit_bias: Mapping[int, float] | None


@dataclasses.dataclass(frozen=True)
class CallSettings:
    """Checked settings of one call.

    Attributes:
        sampling: every field, with Tercet's own defaults.
        sent: the fields that the caller set. A hosted model is sent only these, so its own defaults hold.
        output: the form of the answer; None: any text.
        fields: the fields for a local model, whose own defaults hold for the others; None: ``sampling`` is whole.
        ending: how the prompt of a conversation ends.
    """

    sampling: Sampling
    sent: dict[str, Any]
    output: Output | None = None
    fields: Mapping[str, Any] | None = None
    ending: PromptEnding = NEW_MESSAGE

    def for_local(self, defaults: Mapping[str, float]) -> Sampling:
        """Return the settings for a local model with these published defaults."""
        return self.sampling if self.fields is None else Sampling(**with_defaults(self.fields, defaults))


def call_settings(
    sampling: Sampling | SamplingChoice | None,
    fields: Mapping[str, Any],
    *,
    schema: Schema | None = None,
    regex: str | None = None,
    choices: Sequence[str] | None = None,
    grammar: str | None = None,
    ending: PromptEnding = NEW_MESSAGE,
) -> CallSettings:
    """Combine the keywords of a call; ``fields`` take precedence over ``sampling``.

    A Sampling object sets every field. "greedy" and "neutral" set those that choose a token, and "default" or
    None leaves them to the model.

    Raises:
        UserError: an unknown field (the message names the nearest), a value outside of its range, more
            than one form of the answer.
    """
    for name in fields:
        if name not in FIELDS:
            near = nearest(name, [*FIELDS, *OPTIONS])
            suggestion = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"there is no sampling setting {name!r}{suggestion} (settings: {', '.join(FIELDS)})"
            )
    output = requested_output(schema, regex, choices, grammar)
    if isinstance(sampling, Sampling):
        merged = dataclasses.replace(sampling, **fields)
        return CallSettings(merged, _sent(merged, sampling, fields), output, ending=ending)
    choice = check_choice("default" if sampling is None else sampling)
    whole = {**chosen_defaults(choice, {}), **fields}
    merged = Sampling(**whole)
    # The other fields of "neutral" are off, which is what servers do where they are not sent.
    sent = {name: value for name, value in whole.items() if name in {*fields, "temperature", "top_p"}}
    return CallSettings(merged, _sent(merged, None, sent), output, whole, ending)


def _sent(merged: Sampling, sampling: Sampling | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that go to a server: keywords, and those of ``sampling`` that matter there.

    Of a Sampling object these are ``max_tokens``, ``temperature`` and the fields that differ from the
    defaults.
    """
    default = Sampling()
    names = set(fields)
    if sampling is not None:
        names |= {"max_tokens", "temperature"}
        names |= {name for name in FIELDS if getattr(sampling, name) != getattr(default, name)}
    values = {name: getattr(merged, name) for name in FIELDS if name in names}
    # None (no seed, no log-probabilities) is the protocol's default too: not sent.
    return {name: value for name, value in values.items() if value is not None}
