"""Encode the rows of a data file as masked training examples, and account for every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tercet.data.batches import Encoded
from tercet.data.chat_mask import Rendered, Span, mask_conversation
from tercet.data.continuation import encode_rendered
from tercet.data.conversation import read_messages, read_tools
from tercet.data.generic_tools import has_tools
from tercet.data.prompt_tokens import RESERVED
from tercet.data.row_forms import FIELD_OF_MESSAGE, TrainingRow, read_row
from tercet.data.rows import OverLength
from tercet.data.tool_format import tool_format
from tercet.errors import UserError
from tercet.model.chat_template import REASONING
from tercet.model.control_text import ControlText, ControlTokenMode
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
    unused: Counter[str] = field(default_factory=Counter)  # column that nothing reads -> rows
    context: int = 0  # answers that are not trained on because their row says so
    described: int = 0  # conversations whose tools, calls and results are text
    spelling: int = 0  # training texts whose messages spell control tokens, which are ordinary text there
    inside: int = 0  # prompts that end inside a token
    inside_example: str = ""  # the text around the end of one of them

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
        if self.context:
            lines.append(f"{self.context:,} answers are context only, because their rows say so (weight 0)")
        if self.described:
            lines.append(
                f"{self.described:,} conversations have tools, for which the chat template has no format that is read: "
                f"functions, calls and results are trained on as text, as the server shows them"
            )
        if self.spelling:
            lines.append(
                f"{self.spelling:,} training texts spell control tokens in their messages, which are trained on as "
                f"ordinary text (`control_tokens=control` makes them control tokens)"
            )
        if self.inside:
            lines.append(
                f"{self.inside:,} prompts end inside a token (such as {self.inside_example}): trained on with the "
                f"prompt's own tokens, as at inference"
            )
        if self.unused:
            columns = ", ".join(f"{name} ({count:,} rows)" for name, count in self.unused.most_common())
            lines.append(f"not used: {columns}")
        if self.truncated_rows:
            lines.append(
                f"truncated {self.truncated_rows:,} examples by {self.truncated_tokens:,} tokens; "
                f"{self.stops_cut:,} of them lost their stop token"
            )
        return lines


def prepare(
    rows: Iterable[dict[str, Any]],
    tokenizer: Tokenizer,
    max_tokens: int,
    over_length: OverLength = "drop",
    *,
    control_tokens: ControlTokenMode = "text",
) -> Prepared:
    """Encode and mask every row.

    Args:
        rows: rows in one of the forms that `tercet.data.row_forms` describes.
        tokenizer: encodes the rows; its template renders conversations.
        max_tokens: the maximal length of an example.
        over_length: drop a longer example, truncate it, or raise an error.
        control_tokens: what control tokens that messages spell become: ordinary text, or these tokens.

    Raises:
        UserError: a row has no known form (its number is given), the template can't be trained on,
            a row is too long and ``over_length`` is "error", or no row is left.
    """
    prepared = Prepared()
    for number, row in enumerate(rows, start=1):
        prepared.rows += 1
        try:
            read = read_row(row)
            texts = [] if read.dropped else render_row(read, tokenizer, control_tokens)
            prepared.unused.update(_unread(read, tokenizer))
        except UserError as problem:
            raise UserError(f"row {number}: {problem}") from problem
        prepared.context += read.context
        prepared.described += bool(texts) and _is_described(read, tokenizer)
        if read.dropped:
            prepared.dropped[read.dropped] += 1
        for rendered in texts:
            prepared.stops.update(span.stop for span in rendered.spans)
            prepared.spelling += isinstance(rendered.text, ControlText) and bool(rendered.text.literal)
            examples, places = encode_rendered(tokenizer, rendered)
            prepared.inside += len(places)
            if places and not prepared.inside_example:
                prepared.inside_example = f"{places[0][0]!r} before {places[0][1]!r}"
            for example in examples:
                _add(prepared, example, number, max_tokens, over_length)
    if not prepared.examples:
        reasons = (
            "; ".join(f"{count} {reason}" for reason, count in prepared.dropped.items())
            or "the file is empty"
        )
        raise UserError(f"none of the {prepared.rows} rows became a training example ({reasons})")
    return prepared


def _add(prepared: Prepared, example: Encoded, number: int, max_tokens: int, over_length: OverLength) -> None:
    """Add an example of row ``number``, if it is short enough or may be truncated."""
    if len(example.ids) > max_tokens:
        if over_length == "error":
            raise UserError(
                f"row {number} has {len(example.ids)} tokens, more than the {max_tokens} allowed; "
                f"raise `max_tokens` or choose `over_length=drop` or `over_length=truncate`"
            )
        if over_length == "drop":
            prepared.dropped[f"longer than {max_tokens} tokens"] += 1
            return
        prepared.truncated_rows += 1
        prepared.truncated_tokens += len(example.ids) - max_tokens
        prepared.stops_cut += int(example.supervised[-1])
        example = example.truncated(max_tokens)
    if example.count:
        prepared.examples.append(example)
    else:
        prepared.dropped["nothing left to train on"] += 1


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


def render_row(
    row: TrainingRow, tokenizer: Tokenizer, control_tokens: ControlTokenMode = "text"
) -> list[Rendered]:
    """Return the training texts of a row with their supervised spans, and the stop token that ends each span.

    Raises:
        UserError: the chat template can't be trained on, or can't show the conversation.
    """
    if row.messages is None:
        return [_stopped(tokenizer, row.prompt + row.completion, len(row.prompt))]
    tools = read_tools(row.tools)
    if own := sorted(RESERVED & row.variables.keys()):
        raise UserError(f"chat_template_kwargs.{own[0]} is no variable of a template; it is set from the row")
    template = tokenizer.template_text(tools=tools is not None)
    return mask_conversation(
        tokenizer,
        read_messages(row.messages, template=template),
        tools=tools,
        supervised=row.supervised,
        control_tokens=control_tokens,
        **row.variables,
    )


def _is_described(row: TrainingRow, tokenizer: Tokenizer) -> bool:
    """Whether the tools of a row become text, because the template has no format that is read."""
    return row.messages is not None and has_tools(row.messages, row.tools) and tool_format(tokenizer) is None


def _unread(row: TrainingRow, tokenizer: Tokenizer) -> list[str]:
    """Return the row's columns that nothing reads, without fields of messages that the template names."""
    template = "" if row.messages is None or row.dropped else tokenizer.template_text(tools=bool(row.tools))

    def is_read(name: str) -> bool:
        names = REASONING if name in REASONING else (name,)
        return any(name in template for name in names)

    return [
        name
        for name in row.unused
        if not (name.startswith(FIELD_OF_MESSAGE) and is_read(name.removeprefix(FIELD_OF_MESSAGE)))
    ]


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
