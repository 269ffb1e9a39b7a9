"""The quality cost of quantised weights: bits per byte of a text for each form of the weights.

    python benchmarks/quantization.py runs/mine/model held-out.txt

A window holds the model's context, at most 512 tokens; its first token has no context and is not counted.
"""

import argparse
import math
from pathlib import Path

from tercet.engine.backend import Chunk
from tercet.engine.load import load_engine

FORMS = ("none", "bf16", "int8", "int4")
WINDOW = 512


def bits_per_byte(directory: Path, text: str, form: str) -> float:
    engine = load_engine(directory, device="cpu", quantize=form)
    backend, tokenizer = engine.backend, engine.tokenizer
    size = min(WINDOW, backend.max_positions, backend.max_tokens)
    pages = list(range(-(-size // backend.page_size)))
    tokens = tokenizer.encode(text, special=False)
    bits = count = 0.0
    for begin in range(0, len(tokens) - 1, size):
        window = tokens[begin : begin + size + 1]
        chunk = Chunk(begin, window[:-1], 0, pages, list(range(len(window) - 1)))
        logprobs, _ = backend.logprobs([chunk], [[token] for token in window[1:]])
        bits -= float(logprobs.sum(dtype="float64")) / math.log(2)
        count += len(window) - 1
    return bits / (len(text.encode()) * count / len(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    exact = None
    print(f"{'weights':8} {'bits per byte':>14} {'worse by':>9}")
    for form in FORMS:
        bits = bits_per_byte(arguments.model, text, form)
        exact = exact or bits
        print(f"{form:8} {bits:14.4f} {100 * (bits / exact - 1):8.3f}%")


if __name__ == "__main__":
    main()
