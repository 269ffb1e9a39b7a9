"""The inputs of a fine-tuning run, read and checked: checkpoint, tokenizer, rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tercet.data.examples import CHATML
from tercet.data.row_forms import is_conversation
from tercet.data.rows import read_rows
from tercet.errors import UserError
from tercet.files import fingerprint, read_text
from tercet.finetune.settings import Rows, TuneSettings
from tercet.model.checkpoint import read_config, weights_identity
from tercet.model.reference import parse_reference
from tercet.model.source import directory_of, lasting_name
from tercet.model.tokenizer import Tokenizer
from tercet.progress import say

# The default limit on an example, in tokens, for models whose context is longer.
DEFAULT_MAX_TOKENS = 2048


@dataclass(frozen=True)
class Inputs:
    """What a run reads."""

    checkpoint: Path  # the directory of the model to tune
    base_model: str  # the name under which an adapter refers to the model
    tokenizer: Tokenizer
    rows: list[dict[str, Any]]
    dev_rows: list[dict[str, Any]] | None

    def fingerprint(self, config: dict[str, Any]) -> str:
        """Return a fingerprint of these inputs and of the settings in ``config``."""
        weights = weights_identity(self.checkpoint)
        return fingerprint([config, self.rows, self.dev_rows, weights, self.tokenizer.fingerprint])


def read_inputs(settings: TuneSettings) -> Inputs:
    """Read the inputs that ``settings`` name.

    Raises:
        UserError: An input is missing, or can't be used for tuning.
    """
    checkpoint = checkpoint_directory(settings.model)
    rows = read_examples(settings.data)
    dev_rows = None if settings.dev is None else read_examples(settings.dev)
    tokenizer = load_tokenizer(checkpoint, settings.chat_template, rows)
    base_model = lasting_name(parse_reference(str(settings.model)))
    return Inputs(checkpoint, base_model, tokenizer, rows, dev_rows)


def checkpoint_directory(reference: str | Path) -> Path:
    """Return the checkpoint directory of a local or Hub reference.

    Raises:
        UserError: It is a hosted model or an adapter, needs the transformers library, or does not exist.
    """
    model = parse_reference(str(reference))
    if model.kind == "adapter":
        raise UserError(f"{reference} is an adapter; tune its base, or merge it first (tercet export)")
    if model.kind == "transformers":
        raise UserError(
            f"{reference} runs through transformers; only models that run on Tercet's own network can be tuned"
        )
    if not model.is_local:
        raise UserError(f"{reference} is a hosted model: its weights are not available for tuning")
    return directory_of(model)


def read_examples(data: str | Path | Rows) -> list[dict[str, Any]]:
    """Return the rows of a file, or rows that were passed as they are."""
    return read_rows(data) if isinstance(data, str | Path) else list(data)


def token_limit(checkpoint: Path, max_tokens: int | None) -> int:
    """Return the length limit of an example: ``max_tokens``, or the model's context but at most 2048.

    Raises:
        UserError: ``max_tokens`` is longer than the model's context.
    """
    context = read_config(checkpoint).max_positions
    if max_tokens is not None and max_tokens > context:
        raise UserError(f"`max_tokens` is {max_tokens}, but the context of {checkpoint} is {context} tokens")
    return max_tokens or min(DEFAULT_MAX_TOKENS, context)


def load_tokenizer(
    checkpoint: str | Path, chat_template: str | Path | None, rows: Sequence[dict[str, Any]]
) -> Tokenizer:
    """Load the tokenizer of ``checkpoint``, with a chat template where the rows need it.

    Args:
        checkpoint: The directory of the model.
        chat_template: A file that replaces the model's template.
        rows: The training data. Conversations need a template; without one, the tokenizer must have the
            special tokens of ChatML, which is then used.

    Raises:
        UserError: The rows are conversations, and there is no template for them.
    """
    tokenizer = Tokenizer.load(checkpoint)
    if chat_template is not None:
        return tokenizer.with_template(read_text(chat_template))
    if not tokenizer.chat_template and any(is_conversation(row) for row in rows):
        if tokenizer.id_of("<|im_start|>") is None or tokenizer.id_of("<|im_end|>") is None:
            raise UserError(
                f"{checkpoint} has no chat template; set `chat_template`, or replace messages by prompt and "
                f"completion"
            )
        say("the model has no chat template: using ChatML, because its tokenizer has ChatML's special tokens")
        return tokenizer.with_template(CHATML)
    return tokenizer
