"""What ``tercet tune --show-mask`` prints: the text as the model sees it, trained-on parts marked."""

from __future__ import annotations

import sys
from pathlib import Path

SHOWN = 3  # examples


def print_masks(
    ref: str, data: Path, max_tokens: int | None, over_length: str, chat_template: Path | None
) -> None:
    """Print the first examples: what the loss covers in green in a terminal, in ⟦ ⟧ elsewhere."""
    from tercet.data.examples import prepare, show_mask
    from tercet.data.rows import read_rows
    from tercet.finetune.sft import checked_limit, checked_policy, load_for_tuning, resolve

    directory = resolve(ref)
    rows = read_rows(data)
    tokenizer = load_for_tuning(directory, chat_template, rows)
    policy = checked_policy(over_length)
    prepared = prepare(rows, tokenizer, checked_limit(directory, max_tokens), policy)
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
