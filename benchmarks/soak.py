"""A soak test of the engine with random requests: no wrong token, no lost page, no growing memory.

    python benchmarks/soak.py runs/mine/model --minutes 60

Each of a few hundred kinds of request (lengths, seeds, stop strings, forms, log-probabilities) is
first answered alone. Then they arrive at random, many at a time, some are cancelled, and there are few
pages. Each finished request must have the same tokens as alone.
"""

import argparse
import random
import time
from pathlib import Path

from tercet.engine.engine import Engine, QueueFull
from tercet.engine.grammar import Grammar
from tercet.engine.load import load_engine
from tercet.engine.request import Request, Sampling

KINDS = 240
WORDS = [
    "the",
    "a",
    "little",
    "bird",
    "sat",
    "in",
    "tree",
    "and",
    "sang",
    "while",
    "it",
    "rained",
    "on",
    "old",
    "house",
    "by",
    "river",
    "where",
    "nobody",
    "came",
]
FORMS = (
    Grammar.regex("[a-z]{3,12}( [0-9]{1,4})?"),
    Grammar.choices(["yes", "no", "perhaps not"]),
    Grammar.json_schema({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}),
)


def resident() -> int:
    """Return the bytes of this process in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmRSS in /proc/self/status")


def request(engine: Engine, number: int) -> Request:
    rng = random.Random(number)
    shared = " ".join(random.Random(number % 5).choices(WORDS, k=150)) if rng.random() < 0.4 else ""
    text = shared + " " + " ".join(rng.choices(WORDS, k=rng.choice((1, 3, 20, 90, 220))))
    sampling = Sampling(
        max_tokens=rng.choice((1, 2, 10, 40, 120)),
        temperature=rng.choice((0.0, 0.0, 0.7, 1.2)),
        top_p=rng.choice((1.0, 0.9)),
        top_k=rng.choice((0, 40)),
        repetition_penalty=rng.choice((1.0, 1.0, 1.2)),
        seed=number,
        stop=rng.choice(((), (), (" the",), ("and", "."))),
        logprobs=rng.choice((None, None, 2)),
        ignore_eos=rng.random() < 0.5,
    )
    tokens = engine.tokenizer.encode(text)[: engine.max_positions - 130]
    return Request(tuple(tokens), sampling, rng.choice(FORMS) if rng.random() < 0.2 else None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--quantize", default="int8")
    arguments = parser.parse_args()
    alone = load_engine(arguments.model, device="cpu", quantize=arguments.quantize)
    requests = [request(alone, number) for number in range(KINDS)]
    expected = [alone.generate([item])[0].tokens for item in requests]
    loaded = load_engine(arguments.model, device="cpu", quantize=arguments.quantize)
    loaded.backend.num_pages = (
        40  # few enough that pages run out and are evicted, and requests return to the queue
    )
    engine = Engine(
        loaded.backend, loaded.tokenizer, sorted(loaded.stop_ids), 24, max_waiting=64, speculation="ngram"
    )
    rng = random.Random(0)
    kind_of: dict[int, int] = {}
    done = cancelled = refused = tokens = 0
    begin = shown = time.monotonic()
    first = 0
    while True:
        elapsed = time.monotonic() - begin
        over = elapsed > 60 * arguments.minutes
        if over and not engine.has_work:
            break
        while not over and rng.random() < 0.35:
            kind = rng.randrange(KINDS)
            try:
                kind_of[engine.submit(requests[kind])] = kind
            except QueueFull:
                refused += 1
        if kind_of and rng.random() < 0.03:
            handle = rng.choice(list(kind_of))
            engine.cancel(handle)
            del kind_of[handle]
            cancelled += 1
        for delta in engine.step() if engine.has_work else ():
            if delta.error is not None:
                raise delta.error
            if delta.completion is not None:
                kind = kind_of.pop(delta.index)
                if delta.completion.tokens != expected[kind]:
                    raise SystemExit(f"request of kind {kind} got other tokens than alone")
                done, tokens = done + 1, tokens + len(expected[kind])
        if done and not first:
            first = resident() if elapsed > 20 else 0
        if time.monotonic() - shown > 60 or (over and not engine.has_work):
            shown = time.monotonic()
            print(
                f"{elapsed / 60:.0f} min: {done} answered, {tokens} tokens, {cancelled} cancelled, {refused} refused, "
                f"{resident() / 2**20:.0f} MiB (after 20 s: {first / 2**20:.0f})",
                flush=True,
            )
    pool = engine.pool
    if pool.available != pool.num_pages or any(pool.users):
        raise SystemExit(f"{pool.num_pages - pool.available} pages were never freed")
    print("at the end every page is free again")


if __name__ == "__main__":
    main()
