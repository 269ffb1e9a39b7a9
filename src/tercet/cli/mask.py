"""The output of ``tercet tune --show-mask``: the text that the model reads, with the trained-on parts marked."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tercet.finetune.settings import TuneSettings

SHOWN = 3  # examples


def print_masks(settings: TuneSettings) -> None:
    """Print the first examples. The parts that the loss covers are green in a terminal, and in ⟦ ⟧ elsewhere."""
    from tercet.data.examples import prepare, show_mask
    from tercet.finetune.inputs import checkpoint_directory, load_tokenizer, read_examples, token_limit

    checkpoint = checkpoint_directory(settings.model)
    rows = read_examples(settings.data)
    tokenizer = load_tokenizer(checkpoint, settings.chat_template, rows)
    limit = token_limit(checkpoint, settings.max_tokens)
    prepared = prepare(rows, tokenizer, limit, settings.over_length, control_tokens=settings.control_tokens)
    colour = sys.stdout.isatty()
    for number, example in enumerate(prepared.examples[:SHOWN], start=1):
        print(f"--- example {number}: {len(example.ids)} tokens, {example.count} trained on")
        for text, supervised in show_mask(example, tokenizer):
            if supervised:
                text = f"\x1b[30;42m{text}\x1b[0m" if colour else f"⟦{text}⟧"
            sys.stdout.write(text)
        sys.stdout.write("\n")
    print("---")
    for line in prepared.account():
        print(line)
    print(f"each supervised part ends with: {', '.join(sorted(prepared.stops))}")
