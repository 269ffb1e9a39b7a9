"""Pre-training compared with transformers' Trainer and LitGPT on the same machine in the same run.

    python benchmarks/pretraining.py speed [--peer-python PYTHON] [--rounds 3]
    python benchmarks/pretraining.py quality --data BOOKS.txt.gz [--minutes 5] [--seeds 3] [--part-seeds 1] [--sweep]

speed: tokens per second of whole training steps at a fixed shape (6 layers, width 256, vocabulary 4096,
context 512, 4 rows per step or --rows). The sides alternate, each in its own process. LitGPT is measured if
PYTHON can import it.

quality: bits per byte on held-out text after --minutes, which are those of the whole command for Tercet and of
training alone for the Trainer. The last hundredth of every document is held out; both train on the rest, with
their own tokenizers (of the same kind, the peer's with 4096 tokens). The same code measures both checkpoints,
with transformers, in windows of their training context. A second run of Tercet with 40% of the time, for the
first --part-seeds seeds, shows whether it reaches the peer's final quality.
--sweep: the Trainer with five rates and three batch sizes instead of the best known pair.

Nothing else should be running.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPE = {"layers": 6, "width": 256, "vocab": 4096, "context": 512, "rows": 4, "heads": 4, "kv_heads": 2}
SECONDS = 25.0  # of training steps per measurement of speed, after a few unmeasured ones
PEER_RATES, PEER_ROWS = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), (4, 8, 16)
PEER_BEST = (2e-3, 4)  # found by --sweep
NEARLY = 1.01  # ratio to the best bits per byte of a short sweep that a longer run may still reverse
PART = 0.4  # fraction of the time for a separate run of Tercet, compared with the peer's final quality
PEER_CONTEXT, PEER_LAYERS, PEER_WIDTH = 256, 4, 192


def llama(layers: int, width: int, vocab: int, context: int, heads: int, kv_heads: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
    )


# Speed


def steps_per_second(step: Any, tokens: int) -> float:
    """Return tokens per second of ``step()``, by the median of its times."""
    for _ in range(3):
        step()
    times: list[float] = []
    begun = time.perf_counter()
    while time.perf_counter() - begun < SECONDS:
        before = time.perf_counter()
        step()
        times.append(time.perf_counter() - before)
    return tokens / statistics.median(times)


def speed_tercet(kind: str) -> float:
    from dataclasses import replace

    import torch

    from tercet.model.transformer import Transformer
    from tercet.pretrain.initialize import initialize
    from tercet.pretrain.plan import network
    from tercet.train.batch import Batch
    from tercet.train.gradients import gradients_of
    from tercet.train.optimizer import Optimizer, Rates, clip_gradients

    s = SHAPE
    config = network(s["layers"], s["width"], s["vocab"], s["context"])
    config = replace(
        config,
        num_heads=s["heads"],
        num_kv_heads=s["kv_heads"],
        head_dim=s["width"] // s["heads"],
        tie_embeddings=True,  # like the peers
    )
    model = Transformer(config, compute_dtype=torch.bfloat16)
    initialize(model, 0)
    parameters = dict(model.named_parameters())
    threads = torch.get_num_threads()
    optimizer = Optimizer(parameters, Rates(kind, 1e-3), threads=threads, dtype=torch.bfloat16)  # type: ignore[arg-type]
    work = gradients_of(model, threads)
    tokens = torch.randint(0, s["vocab"], (s["rows"], s["context"] + 1))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def step() -> None:
        work.gradients([batch])
        clip_gradients(list(parameters.values()), 1.0)
        optimizer.step(1.0)

    return steps_per_second(step, s["rows"] * s["context"])


class Synthetic:
    """An endless data set of random rows for the Trainer."""

    def __init__(self, vocab: int, context: int) -> None:
        self.vocab, self.context = vocab, context

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        row = torch.randint(0, self.vocab, (self.context,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": row, "labels": row}


def trainer(config: Any, data: Any, rows: int, rate: float, seconds: float, steps: int, seed: int) -> Any:
    """Train with transformers' Trainer for ``seconds``: bf16, AdamW, cosine with 5% warm-up."""
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.times.append(time.perf_counter())
            if self.times[-1] - self.times[0] > seconds:
                control.should_training_stop = True

    set_seed(seed)
    clock = Clock()
    made = Trainer(
        model=LlamaForCausalLM(config),
        args=TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=rows,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            weight_decay=0.1,
            adam_beta2=0.95,
            max_steps=steps,
            bf16=True,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=data,
        callbacks=[clock],
    )
    made.train()
    return made.model, clock.times


def speed_trainer() -> float:
    s = SHAPE
    config = llama(s["layers"], s["width"], s["vocab"], s["context"], s["heads"], s["kv_heads"])
    data = Synthetic(s["vocab"], s["context"])
    _, times = trainer(config, data, s["rows"], 1e-3, SECONDS, 1 << 19, 0)
    pace = [after - before for before, after in itertools.pairwise(times[2:])]
    return s["rows"] * s["context"] / statistics.median(pace)


def speed_litgpt(compiled: bool) -> float:
    """Measure LitGPT's network, loss and precision, set up as in its own pretraining."""
    import lightning
    import litgpt
    import torch
    from litgpt.utils import chunked_cross_entropy

    s = SHAPE
    config = litgpt.Config(
        block_size=s["context"],
        n_layer=s["layers"],
        n_embd=s["width"],
        n_head=s["heads"],
        n_query_groups=s["kv_heads"],
        padded_vocab_size=s["vocab"],
        vocab_size=s["vocab"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=3 * s["width"],
    )
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model = litgpt.GPT(config)
    model.lm_head.weight = model.transformer.wte.weight
    if compiled:
        model = torch.compile(model)
    model = fabric.setup(model)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True))
    tokens = torch.randint(0, s["vocab"], (s["rows"], s["context"] + 1))

    def step() -> None:
        loss = chunked_cross_entropy(model(tokens[:, :-1].contiguous()), tokens[:, 1:].contiguous())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()

    return steps_per_second(step, s["rows"] * s["context"])


SPEEDS = {
    "tercet (Muon)": lambda: speed_tercet("muon"),
    "tercet (AdamW)": lambda: speed_tercet("adamw"),
    "trainer": speed_trainer,
    "litgpt": lambda: speed_litgpt(False),
    "litgpt compiled": lambda: speed_litgpt(True),
}


def speed(peer: str | None, rounds: int, rows: int) -> None:
    results: dict[str, list[float]] = {}
    for _ in range(rounds):
        for side in SPEEDS:
            python = peer if side.startswith("litgpt") else sys.executable
            if python is None:
                continue
            done = subprocess.run(
                [python, __file__, "one", side, str(rows)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(f"{side} failed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            results.setdefault(side, []).append(float(done.stdout.split()[-1]))
            print(f"  {side}: {results[side][-1]:,.0f} tokens/s", file=sys.stderr)
    print("| | tokens/s, median (best) | Tercet with Muon over it |\n|---|---|---|")
    ours = statistics.median(results["tercet (Muon)"])
    for side, values in results.items():
        middle = statistics.median(values)
        print(f"| {side} | {middle:,.0f} ({max(values):,.0f}) | {ours / middle:.2f} |")


# Quality


def documents(path: Path) -> list[str]:
    """Return the texts with line feeds only, as Tercet reads them: both sides train on the same characters."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8").replace("\r\n", "\n")
    return [text for text in text.split("<|endoftext|>\n") if text.strip()]


def bits_per_byte(directory: Path, texts: list[str]) -> float:
    """Return the bits per byte of texts after an end-of-text token, in disjoint windows of the model's context."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    context = model.config.max_position_embeddings
    nats, size = 0.0, 0
    with torch.inference_mode():
        for text in texts:
            ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
            size += len(text.encode())
            for start in range(0, len(ids) - 1, context):
                window = torch.tensor([ids[start : start + context + 1]])
                logits = model(window[:, :-1]).logits[0].float()
                nats += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
    return nats / math.log(2) / size


class Windows:
    """A data set of consecutive windows of a token stream."""

    def __init__(self, ids: Any, context: int) -> None:
        self.ids, self.context = ids, context

    def __len__(self) -> int:
        return len(self.ids) // self.context

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.ids[index * self.context : (index + 1) * self.context]
        return {"input_ids": row, "labels": row}


def peer_quality(texts: list[str], out: Path, minutes: float, rate: float, rows: int, seed: int) -> Path:
    """Train the peer for ``minutes``; a short timed run determines the number of steps for the cosine."""
    import torch

    from tercet.pretrain.vocabulary import train_tokenizer

    tokenizer = train_tokenizer(texts, 4096)
    end = tokenizer.eos_id
    ids = [token for text in tokenizer.encode_batch(texts, special=False) for token in (*text, end)]
    config = llama(PEER_LAYERS, PEER_WIDTH, tokenizer.vocab_size, PEER_CONTEXT, 6, 6)
    config.bos_token_id = config.eos_token_id = end
    data = Windows(torch.tensor(ids), PEER_CONTEXT)
    _, times = trainer(config, data, rows, rate, 10.0, 1 << 19, seed)
    steps = int(60 * minutes * (len(times) - 1) / (times[-1] - times[0]))
    model, _ = trainer(config, data, rows, rate, 60 * minutes, steps, seed)
    model.save_pretrained(out)
    tokenizer.save(out)
    return out


def quality(
    data: Path, minutes: float, seeds: int, sweep: bool, part_seeds: int, sweep_minutes: float
) -> None:
    """Compare bits per byte after training.

    With ``sweep`` the peer trains with every pair of rate and rows, as long as Tercet and with all seeds. With
    ``sweep_minutes`` each pair first trains that long with a single seed, and only the pairs within `NEARLY`
    of the best train in full.
    """
    texts = documents(data)
    train, held = [], []
    for text in texts:
        cut = text.find("\n", len(text) - len(text) // 100)
        train.append(text[:cut])
        held.append(text[cut:])
    pairs = [(rate, rows) for rate in PEER_RATES for rows in PEER_ROWS] if sweep else [PEER_BEST]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        corpus = directory / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in train), encoding="utf-8")
        (directory / "train.json").write_text(json.dumps(train), encoding="utf-8")
        ours: list[float] = []
        part: list[float] = []
        theirs: dict[tuple[float, int], list[float]] = {}

        def peer_bits(rate: float, rows: int, seed: int, minutes: float) -> float:
            out = directory / f"peer{seed}-{rate}-{rows}-{minutes}"
            arguments = [str(directory / "train.json"), str(out), minutes, rate, rows, seed]
            subprocess.run(
                [sys.executable, __file__, "peer", *map(str, arguments)],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            value = bits_per_byte(out, held)
            print(
                f"trainer, rate {rate:g}, {rows} rows, seed {seed}, {minutes:g} minutes: {value:.4f}",
                flush=True,
            )
            return value

        if sweep_minutes:
            short = {pair: peer_bits(*pair, 0, sweep_minutes) for pair in pairs}
            # A short run favours lower rates, so all nearly equal pairs train in full.
            pairs = [pair for pair in pairs if short[pair] < NEARLY * min(short.values())]
        for seed in range(seeds):
            for share, values in [(1.0, ours), *([(PART, part)] if seed < part_seeds else [])]:
                out = directory / f"ours{seed}-{share}"
                begun = time.perf_counter()
                command = [sys.executable, "-m", "tercet", "build", "--data", str(corpus), "--out", str(out)]
                subprocess.run([*command, "--minutes", str(minutes * share), "--seed", str(seed)], check=True)
                took = time.perf_counter() - begun
                values.append(bits_per_byte(out / "model", held))
                print(f"tercet, seed {seed}: {values[-1]:.4f} bits per byte, {took:.0f} s in all", flush=True)
            for rate, rows in pairs:
                theirs.setdefault((rate, rows), []).append(peer_bits(rate, rows, seed, minutes))
    best = min(theirs, key=lambda pair: statistics.mean(theirs[pair]))
    mean, peer_mean = statistics.mean(ours), statistics.mean(theirs[best])
    print(
        f"| bits per byte after {minutes:g} minutes | {mean:.3f} ({min(ours):.3f} to {max(ours):.3f}) | "
        f"{peer_mean:.3f} ({min(theirs[best]):.3f} to {max(theirs[best]):.3f}; rate {best[0]:g}, {best[1]} rows) | "
        f"{100 * (1 - mean / peer_mean):.1f}% lower |"
    )
    if part:
        print(
            f"| after {PART:.0%} of the time | {statistics.mean(part):.3f} ({min(part):.3f} to {max(part):.3f}) | "
            f"{peer_mean:.3f} after all of it | {'reached' if max(part) <= min(theirs[best]) else 'not reached'} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    speeds = kinds.add_parser("speed")
    speeds.add_argument("--peer-python")
    speeds.add_argument("--rounds", type=int, default=3)
    speeds.add_argument("--rows", type=int, default=4, help="sequences per step, on all sides")
    qualities = kinds.add_parser("quality")
    qualities.add_argument("--data", type=Path, required=True)
    qualities.add_argument("--minutes", type=float, default=5)
    qualities.add_argument("--seeds", type=int, default=3)
    qualities.add_argument("--part-seeds", type=int, default=1)
    qualities.add_argument("--sweep", action="store_true")
    qualities.add_argument(
        "--sweep-minutes",
        type=float,
        default=0,
        help="minutes of the sweep; then the best pairs train in full",
    )
    single = kinds.add_parser("one")
    single.add_argument("side")
    single.add_argument("rows", type=int)
    peer = kinds.add_parser("peer")
    for field in ("texts", "out", "minutes", "rate", "rows", "seed"):
        peer.add_argument(field)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if arguments.kind == "speed":
        speed(arguments.peer_python, arguments.rounds, arguments.rows)
    elif arguments.kind == "one":
        SHAPE["rows"] = arguments.rows
        print(SPEEDS[arguments.side]())
    elif arguments.kind == "peer":
        texts = json.loads(Path(arguments.texts).read_text(encoding="utf-8"))
        rate, rows, seed = float(arguments.rate), int(arguments.rows), int(arguments.seed)
        peer_quality(texts, Path(arguments.out), float(arguments.minutes), rate, rows, seed)
    else:
        quality(
            arguments.data,
            arguments.minutes,
            arguments.seeds,
            arguments.sweep or arguments.sweep_minutes > 0,
            arguments.part_seeds,
            arguments.sweep_minutes,
        )


if __name__ == "__main__":
    main()
