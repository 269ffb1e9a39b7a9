"""The last stage of a build: the base model is tuned on conversations until it answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tercet.data.examples import CHATML, Prepared, prepare
from tercet.data.rows import read_rows
from tercet.errors import UserError
from tercet.files import atomic_directory
from tercet.model.checkpoint import read_config, read_generation_config
from tercet.model.loading import load_model, save_model
from tercet.model.tokenizer import Tokenizer
from tercet.progress import say
from tercet.train.loop import STATE
from tercet.train.supervised import Supervision, ending_with, fine_tune, full_rate, hold_out

BATCH = 16  # conversations an optimizer step
SHOWN = 4  # conversations whose answers are shown in the report


@dataclass(frozen=True)
class Chatted:
    """What the stage made of the base."""

    base: str  # the checkpoint directory of the base model
    examples: int
    tokens: int  # supervised tokens trained on
    steps: int
    seconds: float
    loss: float  # best held-out loss, nats a token; these weights are the ones written
    shortened: bool  # the clock ended training early
    account: list[str] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)


def read_conversations(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file of conversations.

    Raises:
        UserError: no such file, or a row that has no ``messages``.
    """
    rows = read_rows(path)
    for number, row in enumerate(rows, start=1):
        # A completion without turns would teach the base to go on, not to answer.
        if not isinstance(row.get("messages"), list):
            raise UserError(
                f"{path}, row {number}: a conversation needs messages, a list of {{role, content}}; "
                f"it has {', '.join(row) or 'nothing'}"
            )
    return rows


def conversation_texts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is said in the conversations: the tokenizer should know these words too."""
    contents = (
        message.get("content") for row in rows for message in row["messages"] if isinstance(message, dict)
    )
    return [content for content in contents if isinstance(content, str)]


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
) -> Chatted:
    """Train all weights of ``base`` on the assistant's turns of ``rows`` and write ``model_directory``.

    Conversations are rendered with ChatML, which becomes the model's template; the weights with the
    lowest held-out loss are kept. ``directory`` holds what resuming needs.

    Raises:
        UserError: rows that can't be trained on.
        KeyboardInterrupt: stopped; the same call goes on from there.
    """
    tokenizer = Tokenizer.load(base).with_template(CHATML)
    limit = read_config(base).max_positions
    rows, held_rows = hold_out(list(rows), seed)
    prepared, held = (prepare(part, tokenizer, limit) for part in (rows, held_rows))
    for line in prepared.account():
        say(f"chat: {line}")
    model = load_model(base, dtype=torch.float32, device=device, trainable=True)
    rate = full_rate(sum(parameter.numel() for parameter in model.parameters()))
    trained = fine_tune(
        model,
        prepared.examples,
        held.examples,
        directory,
        Supervision(epochs, BATCH, rate, minutes=minutes, seed=seed),
        pad=tokenizer.pad_id if tokenizer.pad_id is not None else 0,
        key=key,
        title="learning to chat",
    )
    _write(model, base, tokenizer, prepared, model_directory)
    result = Chatted(
        base=str(base),
        examples=len(prepared.examples),
        tokens=trained.tokens,
        steps=trained.steps,
        seconds=round(trained.seconds, 2),
        loss=trained.best if trained.best is not None else math.nan,
        shortened=trained.shortened,
        account=prepared.account(),
        samples=_answers(model_directory, held_rows),
    )
    (directory / STATE).unlink(missing_ok=True)  # nothing is left to resume
    return result


def _write(model: Any, base: Path, tokenizer: Tokenizer, prepared: Prepared, model_directory: Path) -> None:
    generation = ending_with(prepared.stops, tokenizer, read_generation_config(base))
    with atomic_directory(model_directory) as directory:
        save_model(model, directory, generation=generation)
        tokenizer.save(directory)


def _answers(model_directory: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """What the model says to the first messages of a few conversations."""
    from tercet.engine.load import load_engine
    from tercet.engine.request import Request, Sampling

    engine = load_engine(model_directory)
    tokenizer = Tokenizer.load(model_directory)
    limit = read_config(model_directory).max_positions
    said = []
    for row in rows:
        message = row["messages"][0] if row["messages"] else {}
        content = message.get("content")
        if message.get("role") != "user" or not isinstance(content, str):
            continue
        ids = tokenizer.encode_chat([{"role": "user", "content": content}], add_generation_prompt=True)
        if len(ids) < limit // 2:
            said.append((content, ids))
        if len(said) == SHOWN:
            break
    sampling = Sampling(max_tokens=min(80, limit // 2), temperature=0.0)
    completions = engine.generate([Request(tuple(ids), sampling) for _, ids in said])
    return [
        {"prompt": content, "continuation": "\n" + completion.text}
        for (content, _), completion in zip(said, completions, strict=True)
    ]
