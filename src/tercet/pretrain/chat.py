"""The last stage of a build: the base model is tuned on conversations until it answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tercet.data.conversation import Message, read_messages, text_of
from tercet.data.examples import CHATML, Prepared, prepare
from tercet.data.prompt_tokens import conversation_tokens
from tercet.data.row_forms import is_conversation, read_row
from tercet.data.rows import read_rows
from tercet.errors import UserError
from tercet.files import atomic_directory
from tercet.model.checkpoint import read_config, read_generation_config
from tercet.model.loading import load_model, save_model
from tercet.model.tokenizer import Tokenizer
from tercet.model.transformer import Transformer
from tercet.progress import say
from tercet.train.loop import STATE
from tercet.train.supervised import Supervision, ending_with, fine_tune, full_rate, hold_out

BATCH_SIZE = 16  # conversations an optimizer step
SAMPLES, SAMPLE_TOKENS = 4, 80  # conversations that are answered in the report, and the longest answer


@dataclass(frozen=True)
class ChatResult:
    """The result of the chat stage."""

    base: str  # the checkpoint directory of the base model
    examples: int
    tokens: int  # supervised tokens trained on
    steps: int
    seconds: float
    loss: float  # lowest held-out loss, nats a token; the weights of that step are saved
    shortened: bool  # the clock ended training early
    account: list[str] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)


def read_conversations(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a file of conversations.

    Raises:
        UserError: There is no such file, or a row is no conversation.
    """
    rows = read_rows(path)
    for number, row in enumerate(rows, start=1):
        # A completion without turns would teach the base to continue a text, not to answer.
        if not is_conversation(row):
            raise UserError(
                f"{path}, row {number}: a conversation needs messages, a list of {{role, content}}; "
                f"it has {', '.join(row) or 'nothing'}"
            )
        try:
            _messages(row)
        except UserError as problem:
            raise UserError(f"{path}, row {number}: {problem}") from problem
    return rows


def conversation_texts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the contents of all messages: the tokenizer is trained on their words too."""
    return [text_of(message) for row in rows for message in _messages(row)]


def _messages(row: dict[str, Any]) -> list[Message]:
    """Return the messages of a row, as all conversations are read; none for a row that is dropped."""
    read = read_row(row)
    return [] if read.messages is None or read.dropped else read_messages(read.messages)


def learn_to_chat(
    base: Path,
    rows: Sequence[dict[str, Any]],
    directory: Path,
    model_directory: Path,
    *,
    epochs: float,
    minutes: float | None,
    seed: int,
    key: str,
    device: torch.device,
) -> ChatResult:
    """Train all weights of a base model on the assistant's turns and write the chat model.

    Conversations are rendered with ChatML, which becomes the model's template. The weights with the
    lowest held-out loss are saved.

    Args:
        base: The checkpoint directory of the base model.
        rows: Conversations, as `read_conversations` returns them.
        directory: The training state is stored here; an unfinished run found here is resumed.
        model_directory: Where the chat model is written.
        epochs: Training length, where ``minutes`` allow it.
        minutes: The time limit; None: no limit.
        seed: Of the held-out rows and the order of the others.
        key: A fingerprint of everything that decides the result.
        device: Where the model is trained.

    Raises:
        UserError: The rows can't be trained on.
        KeyboardInterrupt: Stopped; the same call resumes.
    """
    tokenizer = Tokenizer.load(base).with_template(CHATML)
    limit = read_config(base).max_positions
    rows, held_out_rows = hold_out(list(rows), seed)
    prepared, held_out = (prepare(part, tokenizer, limit) for part in (rows, held_out_rows))
    account = [*prepared.account(), *(f"held out: {line}" for line in held_out.account())]
    for line in account:
        say(f"chat: {line}")
    model = load_model(base, dtype=torch.float32, device=device, trainable=True)
    rate = full_rate(sum(parameter.numel() for parameter in model.parameters()))
    trained = fine_tune(
        model,
        prepared.examples,
        held_out.examples,
        directory,
        Supervision(epochs, BATCH_SIZE, rate, minutes=minutes, seed=seed),
        key=key,
        title="chat training",
    )
    _write(model, base, tokenizer, prepared, model_directory)
    result = ChatResult(
        base=str(base),
        examples=len(prepared.examples),
        tokens=trained.tokens,
        steps=trained.steps,
        seconds=round(trained.seconds, 2),
        loss=trained.best if trained.best is not None else math.nan,
        shortened=trained.shortened,
        account=account,
        samples=_answers(model_directory, held_out_rows),
    )
    (directory / STATE).unlink(missing_ok=True)  # the stage is finished: nothing can resume from it
    return result


def _write(
    model: Transformer, base: Path, tokenizer: Tokenizer, prepared: Prepared, model_directory: Path
) -> None:
    generation = ending_with(prepared.stops, tokenizer, read_generation_config(base))
    with atomic_directory(model_directory) as directory:
        save_model(model, directory, generation=generation)
        tokenizer.save(directory)


def _answers(model_directory: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Answer the first messages of a few conversations with the model."""
    from tercet.engine.load import load_engine
    from tercet.engine.request import Request, Sampling

    engine = load_engine(model_directory)
    tokenizer = Tokenizer.load(model_directory)
    limit = read_config(model_directory).max_positions
    prompts: list[tuple[str, list[int]]] = []
    for row in rows:
        message = next(iter(_messages(row)), {})
        if message.get("role") != "user":
            continue
        content, ids = text_of(message), conversation_tokens(tokenizer, [message])
        if len(ids) < limit // 2:
            prompts.append((content, ids))
        if len(prompts) == SAMPLES:
            break
    sampling = Sampling(max_tokens=min(SAMPLE_TOKENS, limit // 2), temperature=0.0)
    completions = engine.generate([Request(tuple(ids), sampling) for _, ids in prompts])
    return [
        {"prompt": content, "continuation": "\n" + completion.text}
        for (content, _), completion in zip(prompts, completions, strict=True)
    ]
