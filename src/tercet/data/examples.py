"""Encode the rows of a data file as masked training examples, and account for every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tercet.data.batches import Encoded
from tercet.data.chat_mask import Rendered, Span, encode_spans, mask_conversation
from tercet.data.conversation import Message
from tercet.data.rows import OverLength
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer

# For a base model that has no template but has ChatML's markers as single tokens.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Prepared:
    """Examples ready for training, and counts of dropped and truncated rows."""

    examples: list[Encoded] = field(default_factory=list)
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows
    truncated_rows: int = 0
    truncated_tokens: int = 0
    stops_cut: int = 0  # truncated examples that lost their stop token
    stops: set[str] = field(default_factory=set)  # the stop tokens of the supervised parts

    @property
    def supervised(self) -> int:
        """Number of tokens in the loss, per epoch."""
        return sum(example.count for example in self.examples)

    def account(self) -> list[str]:
        """Return lines to show before training: how many rows were used, dropped and truncated."""
        total = sum(len(example.ids) for example in self.examples)
        lines = [
            f"{self.rows:,} rows gave {len(self.examples):,} examples: {total:,} tokens, "
            f"{self.supervised:,} of them trained on"
        ]
        lines += [f"dropped {count:,} rows: {reason}" for reason, count in self.dropped.most_common()]
        if self.truncated_rows:
            lines.append(
                f"truncated {self.truncated_rows:,} examples by {self.truncated_tokens:,} tokens; "
                f"{self.stops_cut:,} of them lost their stop token"
            )
        return lines


def prepare(
    rows: Iterable[dict[str, Any]], tokenizer: Tokenizer, max_tokens: int, over_length: OverLength = "drop"
) -> Prepared:
    """Encode and mask every row.

    Args:
        rows: rows in one of the forms that `render_row` lists.
        tokenizer: encodes the rows; its template renders conversations.
        max_tokens: the maximal length of an example.
        over_length: drop a longer example, truncate it, or raise an error.

    Raises:
        UserError: a row has no known form (its number is given), the template can't be trained on,
            a row is too long and ``over_length`` is "error", or no row is left.
    """
    prepared = Prepared()
    for number, row in enumerate(rows, start=1):
        prepared.rows += 1
        try:
            texts = render_row(row, tokenizer)
        except UserError as problem:
            raise UserError(f"row {number}: {problem}") from problem
        if isinstance(texts, str):
            prepared.dropped[texts] += 1
            continue
        for rendered in texts:
            prepared.stops.update(span.stop for span in rendered.spans)
            example = encode_spans(
                tokenizer,
                rendered.text,
                [(span.start, span.end) for span in rendered.spans],
                special=rendered.special,
            )
            if len(example.ids) > max_tokens:
                if over_length == "error":
                    raise UserError(
                        f"row {number} has {len(example.ids)} tokens, more than the {max_tokens} allowed; "
                        f"raise `max_tokens` or choose `over_length=drop` or `over_length=truncate`"
                    )
                if over_length == "drop":
                    prepared.dropped[f"longer than {max_tokens} tokens"] += 1
                    continue
                prepared.truncated_rows += 1
                prepared.truncated_tokens += len(example.ids) - max_tokens
                prepared.stops_cut += int(example.supervised[-1])
                example = example.truncated(max_tokens)
            if not example.count:
                prepared.dropped["nothing left to train on"] += 1
                continue
            prepared.examples.append(example)
    if not prepared.examples:
        reasons = (
            "; ".join(f"{count} {reason}" for reason, count in prepared.dropped.items())
            or "the file is empty"
        )
        raise UserError(f"none of the {prepared.rows} rows became a training example ({reasons})")
    return prepared


def check_embedding(examples: Iterable[Encoded], tokenizer: Tokenizer, rows: int) -> None:
    """Raise UserError for an example with a token that has none of the ``rows`` of the model's embedding."""
    for example in examples:
        token = int(example.ids.max(initial=0))
        if token >= rows:
            name = tokenizer.token_text(token)
            advice = "remove it from the rows"
            if token == tokenizer.eos_id:
                advice = "name a token of the vocabulary as 'eos_token' in tokenizer_config.json"
            raise UserError(
                f"the token {name} has the id {token}, but the model's embedding has only {rows} rows; {advice}"
            )


def render_row(row: dict[str, Any], tokenizer: Tokenizer) -> list[Rendered] | str:
    """Return the training texts of a row with their supervised spans, or the reason to drop the row.

    A row has one of three forms:

    - ``messages``: a conversation [{role, content}, ...], optionally with ``tools``; the assistant's turns
      are supervised.
    - ``prompt`` and ``completion``: strings that are concatenated; the completion and a stop token after it
      are supervised. Or lists of messages.
    - ``text``: the whole text and a stop token after it are supervised.

    Raises:
        UserError: the row has none of these fields, or a field has the wrong type.
    """
    if "messages" in row:
        return _conversation(row["messages"], tokenizer, row.get("tools"))
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return _conversation([*prompt, *completion], tokenizer, row.get("tools"), first=len(prompt))
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise UserError("prompt and completion must both be strings or both be lists of messages")
        if not completion.strip():
            return "empty completion"
        return [_stopped(tokenizer, prompt + completion, len(prompt))]
    if "text" in row:
        if not isinstance(row["text"], str):
            raise UserError(f"text is a {type(row['text']).__name__}, not a string")
        return [_stopped(tokenizer, row["text"], 0)] if row["text"].strip() else "empty text"
    raise UserError(
        f"needs messages, or prompt and completion, or text; it has {', '.join(row) or 'nothing'}"
    )


def _conversation(
    messages: Any, tokenizer: Tokenizer, tools: Any = None, first: int = 0
) -> list[Rendered] | str:
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise UserError("messages must be a list of objects with role and content")
    if not messages:
        return "empty conversation"
    if all(message["role"] != "assistant" for message in messages[first:]):
        return "no assistant message"
    typed: Sequence[Message] = messages
    return mask_conversation(tokenizer, typed, tools=tools, supervised=range(first, len(typed)))


def _stopped(tokenizer: Tokenizer, text: str, start: int) -> Rendered:
    """Append the stop token to ``text``; everything from ``start`` on is supervised."""
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer has no end-of-text token to end a completion with")
    stop = tokenizer.token_text(tokenizer.eos_id)
    return Rendered(text + stop, (Span(start, len(text) + len(stop), stop),), special=True)


def show_mask(example: Encoded, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Return the example's text as runs of supervised and unsupervised text, to show the mask."""
    runs: list[tuple[list[int], bool]] = []
    for token, supervised in zip(example.ids.tolist(), example.supervised.tolist(), strict=True):
        if not runs or runs[-1][1] != supervised:
            runs.append(([], supervised))
        runs[-1][0].append(token)
    return [(tokenizer.decode(ids, skip_special=False), supervised) for ids, supervised in runs]
