"""Make the model that a reference names: one that runs in this process, or one on a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from tercet.errors import UserError
from tercet.model.control_text import ControlTokenMode
from tercet.model.reference import Reference

if TYPE_CHECKING:
    from tercet.prompt.model import Model


def load_model(
    reference: Reference,
    *,
    dtype: str | None = None,
    device: str | None = None,
    quantize: str | None = None,
    threads: int | None = None,
    speculation: Literal["ngram"] | Model | None = None,
    control_tokens: ControlTokenMode | None = None,
    timeout: float | None = None,
    retries: int | None = None,
) -> Model:
    """Return the model, ready to be called. The options are those of `tercet.LLM`.

    Raises:
        UserError: a model that cannot be loaded, an option that would do nothing.
    """
    if reference.is_local:
        if timeout is not None or retries is not None:
            raise UserError(
                f"`timeout` and `retries` are for hosted models; {reference.text} runs in this process"
            )
        from tercet.prompt.local import LocalModel

        drafter = speculation if speculation is None or speculation == "ngram" else speculation.draft_engine()
        model = LocalModel(
            reference,
            dtype,
            device,
            quantize=quantize,
            threads=threads,
            speculation=drafter,
            control_tokens=control_tokens or "text",
        )
        if control_tokens is not None and not model.has_chat_template:
            raise UserError(
                f"`control_tokens` is for conversations; {reference.text} has no chat template, so it continues text"
            )
        return model
    if any(option is not None for option in (dtype, device, quantize, threads, speculation, control_tokens)):
        raise UserError(
            "`dtype`, `device`, `quantize`, `threads`, `speculation` and `control_tokens` are for local models; "
            f"{reference.text} runs on its server"
        )
    from tercet.prompt.hosted import RETRIES, TIMEOUT, HostedModel

    return HostedModel(
        reference,
        timeout=TIMEOUT if timeout is None else timeout,
        retries=RETRIES if retries is None else retries,
    )
