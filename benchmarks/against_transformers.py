"""Tercet against transformers on the same weights: a training step, batched generation, label scoring.

    python benchmarks/against_transformers.py [--rounds 5]

Both sides run alternately in this process with the same thread count. The table gives medians, minima and
the ratio of medians. Nothing else should be running.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM

from tercet.engine.load import load_engine
from tercet.engine.request import Request, Sampling
from tercet.model.loading import load_model, save_model
from tercet.model.transformer import Transformer
from tercet.pretrain.initialize import initialize
from tercet.pretrain.plan import network
from tercet.pretrain.vocabulary import train_tokenizer
from tercet.train.batch import Batch
from tercet.train.loss import loss_sum

LAYERS, WIDTH, VOCAB, CONTEXT = 6, 256, 4096, 512
ROWS = 4


def alternate(
    rounds: int, a: Callable[[], object], b: Callable[[], object]
) -> tuple[list[float], list[float]]:
    """Return the seconds of each side, run alternately, after an unmeasured first round."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for side, work in enumerate((a, b)):
            begun = time.perf_counter()
            work()
            if number:
                times[side].append(time.perf_counter() - begun)
    return times


def row(name: str, unit: str, amount: float, times: tuple[list[float], list[float]]) -> None:
    ours, theirs = (amount / statistics.median(side) for side in times)
    best = [amount / min(side) for side in times]
    print(
        f"| {name} | {ours:,.0f} ({best[0]:,.0f}) {unit} | {theirs:,.0f} ({best[1]:,.0f}) | {ours / theirs:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        text = [Path(file).read_text(encoding="utf-8") for file in (statistics.__file__, argparse.__file__)]
        tokenizer = train_tokenizer(text, VOCAB)
        model = Transformer(network(LAYERS, WIDTH, tokenizer.vocab_size, CONTEXT))
        initialize(model, 0)
        save_model(model, directory)
        tokenizer.save(directory)
        print(
            f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads"
        )
        print(f"{LAYERS} layers, width {WIDTH}, vocabulary {tokenizer.vocab_size}; median (best)\n")
        print("| | Tercet | transformers | ratio |\n|---|---|---|---|")
        training(directory, rounds)
        generation(directory, rounds)
        scoring(directory, rounds)


def training(directory: Path, rounds: int) -> None:
    """Compare forward, backward and AdamW in bfloat16 with float32 weights, on 4 x 512 tokens."""
    ours = load_model(directory, dtype=torch.float32, trainable=True)
    ours.compute_dtype = torch.bfloat16
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    tokens = torch.randint(0, ours.config.vocab_size, (ROWS, CONTEXT + 1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for m in (ours, theirs)]

    def step_ours() -> None:
        (loss_sum(ours, batch) / batch.supervised).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()

    def step_theirs() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = theirs(batch.tokens).logits
        F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten()).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()

    row("training step, bfloat16", "tokens/s", ROWS * CONTEXT, alternate(rounds, step_ours, step_theirs))


def generation(directory: Path, rounds: int) -> None:
    """Compare 8 prompts of unequal length, 64 new tokens each, greedy, float32, without stop tokens."""
    engine = load_engine(directory, dtype="float32", device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    lengths = [20, 35, 50, 65, 80, 95, 110, 125]
    prompts = [torch.randint(3, engine.backend.vocab_size, (n,)).tolist() for n in lengths]
    requests = [Request(tuple(p), Sampling(max_tokens=64, temperature=0, ignore_eos=True)) for p in prompts]
    width = max(lengths)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])

    def generate_theirs() -> None:
        with torch.inference_mode():
            theirs.generate(ids, attention_mask=mask, max_new_tokens=64, min_new_tokens=64, do_sample=False)

    row(
        "generation, 8 at once",
        "tokens/s",
        8 * 64,
        alternate(rounds, lambda: engine.generate(requests), generate_theirs),
    )


def scoring(directory: Path, rounds: int) -> None:
    """Compare the choice of the likeliest of 12 labels for 32 prompts with a common header of 300 tokens."""
    engine = load_engine(directory, dtype="float32", device="cpu")
    tokenizer = engine.tokenizer
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    words = "def class return value list string number parse file open".split()  # noqa: SIM905
    header = " ".join(words[i * i % 10] for i in range(300)) + "\n\n"
    prompts = [header + " ".join(words[(i * j) % 10] for j in range(30)) + "\nArea:" for i in range(32)]
    labels = [f" {words[i % 10]} {words[(i * 3 + 1) % 10]}" for i in range(12)]

    def choose_theirs() -> None:
        # As in evaluation harnesses, every (prompt, label) is a separate row.
        with torch.inference_mode():
            for prompt in prompts:
                rows = [tokenizer.encode(prompt + label) for label in labels]
                width = max(map(len, rows))
                logits = theirs(torch.tensor([row + [0] * (width - len(row)) for row in rows])).logits
                torch.log_softmax(logits.float(), dim=-1)

    times = alternate(min(rounds, 3), lambda: engine.choose(prompts, [labels] * len(prompts)), choose_theirs)
    row("label scoring, 12 labels", "prompts/s", len(prompts), times)


if __name__ == "__main__":
    main()
