"""The result of ``tercet task check`` for people, at most 80 columns wide."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Sequence

from tercet.ladder.check import TaskCheck
from tercet.ladder.check_model import ModelCheck, PromptingCost, PromptShown
from tercet.progress import duration

WIDTH = 80
LABELS_SHOWN = 16
PROMPT_LINES = 16
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def check_lines(check: TaskCheck) -> list[str]:
    """Return the lines of a report: the warnings first."""
    sizes = ", ".join(f"{count:,} {split}" for split, count in check.splits.items())
    kind = "open task" if check.labels is None else f"{len(check.labels)} labels"
    lines = [*_wrapped(f"{check.name}: {sizes} examples; {kind}; metric {check.metric}"), ""]
    if check.warnings:
        lines += ["Warnings", *(line for warning in check.warnings for line in _wrapped(warning, "- "))]
    else:
        lines.append("No warnings.")
    if check.notes:
        lines += [
            "",
            "When the data was loaded",
            *(line for note in check.notes for line in _wrapped(note, "- ")),
        ]
    lines += ["", *_targets(check), "", *_near_copies(check)]
    if check.model is not None:
        lines += ["", *_model(check.model, check)]
    for prompt in check.prompts:
        lines += ["", *_prompt(prompt)]
    if check.model is None:
        lines += [
            "",
            *_wrapped(
                "With --model REF: the prompts as that model reads them, what fits its context, and times."
            ),
        ]
    return lines


def _targets(check: TaskCheck) -> list[str]:
    from rich.cells import cell_len

    base = check.baseline
    beat = f"To beat: {100 * base.score:.1f}% by always answering {_short(base.answer, 40)}"
    if check.labels is None:
        different = ", ".join(f"{count:,} in {split}" for split, count in check.targets.items())
        return [*_wrapped(f"Different targets: {different}"), beat]
    rows = sorted(check.labels.items(), key=lambda row: (-row[1]["train"], row[0]))
    hidden = len(rows) - LABELS_SHOWN
    shown = rows if hidden <= 1 else [*rows[: LABELS_SHOWN // 2], *rows[-LABELS_SHOWN // 2 :]]
    named = [(_short(label, 44), counts) for label, counts in shown]
    width = max(5, *(cell_len(label) for label, _ in named))
    splits = list(check.splits)
    lines = [_padded("Label", width) + "".join(f"{split:>9}" for split in splits)]
    for number, (label, counts) in enumerate(named):
        if hidden > 1 and number == LABELS_SHOWN // 2:
            lines.append(f"... {hidden} more labels")
        lines.append(_padded(label, width) + "".join(f"{counts[split]:>9,}" for split in splits))
    return [*lines, beat]


def _near_copies(check: TaskCheck) -> list[str]:
    near = check.near_copies
    if not near.test and not near.dev:
        return ["No dev or test example is a near-copy of a training example."]
    lines = _wrapped(
        f"Near-copies of training examples: {near.test:,} in test, {near.dev:,} in dev"
        + (f"; {near.other_target:,} of them have another target" if near.other_target else "")
    )
    for pair in near.shown:
        same = "" if pair.same_target else " (another target)"
        lines.append(f"  {pair.split:<6}{_short(pair.text, WIDTH - 8)}")
        lines.append(f"  train {_short(pair.copy, WIDTH - 8 - len(same))}{same}")
    return lines


def _model(check: ModelCheck, task: TaskCheck) -> list[str]:
    lines = _wrapped(f"With {check.model}: answers by {check.answers_by}")
    if check.context is not None and check.longest is not None:
        fitting = f"{check.shots_that_fit} of {check.shots} shots fit"
        cut = ", ".join(f"{count:,} in {rung}" for rung, count in check.shortened.items() if count)
        lines += _wrapped(
            f"Context {check.context:,} tokens; the longest test prompt has {check.longest:,}; {fitting}; "
            f"inputs that are shortened: {cut or 'none'}"
        )
    if check.same_but_last:
        first, second = check.same_but_last[0]
        lines += _wrapped(
            f"Pairs of labels that differ only in their last token: {len(check.same_but_last):,}, such as "
            f"{first!r} and {second!r}"
        )
    return [*lines, "", *_costs(check, task)]


def _costs(check: ModelCheck, task: TaskCheck) -> list[str]:
    rows = [("majority, tfidf, nearest", "seconds")]
    shots = f" with {check.shots_shown} shots"
    rows += [
        (cost.rung, _answers(cost, shots if cost.rung == "few-shot" else "")) for cost in check.prompting
    ]
    if check.tokens_per_epoch is not None:
        examples = (
            f"{task.splits['train']:,} examples, about {_rounded(check.tokens_per_epoch):,} tokens an epoch"
        )
        rows += [
            (method, f"{examples}: {duration(60 * minutes)}")
            for method, minutes in check.minutes_per_epoch.items()
        ]
    elif check.not_tunable is not None:
        rows.append(("lora, full", f"not possible: {check.not_tunable}"))
    rows.append(("scratch", "the time left to it: the climb builds a small network of its own"))
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"Cost of each rung on this machine ({os.cpu_count()} processors), without choices on dev"]
    for name, text in rows:
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=f"  {name:<{width}}", subsequent_indent=" " * (width + 2)
        )
    return lines


def _answers(cost: PromptingCost, shots: str) -> str:
    if cost.seconds is None:
        price = "" if cost.dollars is None else f", about ${cost.dollars:.2g}"
        return f"{cost.answers:,} requests{shots}{price}"
    each = cost.seconds / cost.answers
    return f"about {duration(cost.seconds)} for the test split{shots}, {each:.2g} s an answer"


def _prompt(prompt: PromptShown) -> list[str]:
    facts = [] if prompt.tokens is None else [f"{prompt.tokens:,} tokens"]
    facts += ["shortened"] if prompt.shortened else []
    facts.append(f"answer: {_short(prompt.target, 40)}")
    lines: list[str] = []
    for line in _visible(prompt.text).split("\n"):
        pieces = _pieces(line, WIDTH - 4)
        lines += [f"  {'|' if number == 0 else ':'} {piece}".rstrip() for number, piece in enumerate(pieces)]
    hidden = len(lines) - PROMPT_LINES
    if hidden > 1:
        half = PROMPT_LINES // 2
        lines = [*lines[:half], f"  ... {hidden} more lines (--json has all)", *lines[-half:]]
    return [*_wrapped(f"Prompt: {prompt.title} ({'; '.join(facts)})"), *lines]


def _rounded(count: int) -> int:
    """Return a count with three significant digits."""
    return round(count, min(0, 3 - len(str(count))))


def _pieces(line: str, width: int) -> Sequence[str]:
    """Return the pieces of a line, with every character of it, of at most ``width`` columns."""
    from rich.cells import cell_len, chop_cells

    pieces = textwrap.wrap(
        line,
        width,
        drop_whitespace=False,
        replace_whitespace=False,
        expand_tabs=False,
        break_on_hyphens=False,
    )
    # An ideograph takes two columns, which textwrap counts as one.
    return [
        part
        for piece in pieces or [""]
        for part in (chop_cells(piece, width) if cell_len(piece) > width else [piece])
    ]


def _wrapped(text: str, bullet: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=bullet, subsequent_indent=" " * len(bullet))


def _short(text: str, width: int) -> str:
    """Return a text in one line of at most ``width`` columns."""
    from rich.cells import cell_len, chop_cells

    line = _visible(" ".join(text.split()))
    return line if cell_len(line) <= width else chop_cells(line, width - 4)[0] + " ..."


def _padded(text: str, width: int) -> str:
    from rich.cells import cell_len

    return text + " " * (width - cell_len(text))


def _visible(text: str) -> str:
    """Return a text with its control characters spelled out, which would confuse a terminal."""
    return _CONTROL.sub(lambda match: repr(match.group())[1:-1], text)
