"""Training on a GPU: FLOPs utilisation of a step, compared with transformers' Llama under torch.compile.

    python benchmarks/gpu.py [--shapes 124M 350M] [--seconds 8] [--peer] [--free] [--profile FILE]

A step goes from token ids to updated weights: forward, backward, the norm of the gradient, clipping, the
optimizer. Model FLOPs utilisation as in PaLM (Chowdhery et al. 2022, appendix B): 6 N + 12 L H T
operations a token, with N the weights of matrix products (including the head, not the embedding) and
attention counted in full, divided by the maker's figure for dense bfloat16. ``products`` counts 6 N alone.
By this convention recomputation is not counted, and the masked half of causal attention is.

whole: each row is a document of the context's length. packed: rows of documents of 60 to 1,000 tokens, as
packing makes them; attention between them is neither allowed nor computed.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from tercet.model.transformer import Transformer
from tercet.pretrain.hardware import HARDWARE
from tercet.pretrain.initialize import initialize
from tercet.pretrain.plan import network
from tercet.train.batch import Batch
from tercet.train.compilation import compile_blocks
from tercet.train.gradients import Autograd, repeatable
from tercet.train.optimizer import Optimizer, Rates, clip_gradients
from tercet.train.state import trainable

# GPT-2 small and medium: layers, width, sequences per step. Its vocabulary is rounded up to a multiple of 64.
SHAPES = {"124M": (12, 768, 64), "350M": (24, 1024, 32)}
VOCABULARY, CONTEXT = 50_304, 1024
DEVICE = torch.device("cuda")


def rows_of(rows: int, packed: bool) -> Batch:
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(0, VOCABULARY, (rows, CONTEXT + 1), generator=generator)
    segments = torch.zeros(rows, CONTEXT, dtype=torch.long)
    positions = torch.arange(CONTEXT).repeat(rows, 1)
    if packed:
        for row in range(rows):
            at = 0
            while at < CONTEXT:
                length = int(torch.randint(60, 1000, (), generator=generator))
                segments[row, at:] += 1
                positions[row, at:] = torch.arange(CONTEXT - at)
                at += length
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions, segments)


def timed(step: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Return the median and minimal seconds of ``step``, after three steps that compile."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    times: list[float] = []
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        before = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    return statistics.median(times), min(times)


class Report:
    """Prints a line per measurement."""

    def __init__(self, peak: float) -> None:
        self.peak = peak
        print(
            f"{torch.cuda.get_device_name(DEVICE)}, torch {torch.__version__}, peak {peak / 1e12:.0f} TFLOP/s"
        )

    def line(self, name: str, shape: str, weights: int, tokens: int, seconds: tuple[float, float]) -> None:
        layers, width, _ = SHAPES[shape]
        products = 6 * weights
        full = products + 12 * layers * width * CONTEXT
        pace = tokens / seconds[0]
        print(
            f"{shape} {name:<34} {pace:>10,.0f} tokens/s  MFU {full * pace / self.peak:6.1%} "
            f"(best step {full * tokens / seconds[1] / self.peak:6.1%}; products {products * pace / self.peak:6.1%})  "
            f"{torch.cuda.max_memory_allocated() / 1e9:5.1f} GB",
            flush=True,
        )
        torch.cuda.reset_peak_memory_stats()


def ours(shape: str, report: Report, seconds: float, profile: Path | None) -> None:
    layers, width, rows = SHAPES[shape]
    config = network(layers, width, VOCABULARY, CONTEXT)
    model = Transformer(config, compute_dtype=torch.bfloat16)
    initialize(model, 0)
    model.to(DEVICE).train()
    parameters = trainable(model)
    work = Autograd(model)
    batches = {"whole": rows_of(rows, False), "packed": rows_of(rows, True)}
    kinds = {"AdamW": Rates("adamw", 1e-4), "Muon": Rates("muon", 1e-4, embedding=1e-4)}
    optimizers: dict[str, Optimizer] = {}  # a single one at a time: each stores moments

    def step_with(kind: str, rows: str) -> Callable[[], None]:
        if kind not in optimizers:
            optimizers.clear()
            optimizers[kind] = Optimizer(parameters, kinds[kind], dtype=torch.bfloat16)

        def step() -> None:
            work.gradients([batches[rows]])
            clip_gradients(list(parameters.values()), 1.0)
            optimizers[kind].step(1.0)

        return step

    def measure(name: str, kind: str, rows_name: str) -> None:
        times = timed(step_with(kind, rows_name), seconds)
        report.line(name, shape, config.matmul_parameters, rows * CONTEXT, times)

    measure("AdamW, whole, not compiled", "AdamW", "whole")
    before = time.perf_counter()
    compile_blocks(model)
    step_with("AdamW", "packed")()
    print(f"{shape} compiled in {time.perf_counter() - before:.0f} s", flush=True)
    for kind in kinds:
        for name in batches:
            measure(f"{kind}, {name}", kind, name)
    optimizers.clear()
    times = timed(lambda: work.gradients([batches["whole"]]), seconds / 2)
    report.line("gradients alone, whole", shape, config.matmul_parameters, rows * CONTEXT, times)
    if profile:
        for kind in kinds:
            step = step_with(kind, "whole")
            with torch.profiler.profile() as profiler:
                for _ in range(2):
                    step()
                torch.cuda.synchronize()
            table = profiler.key_averages().table(
                sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90
            )
            profile.with_name(f"{profile.stem}-{shape}-{kind}.txt").write_text(table)
            profiler.export_chrome_trace(str(profile.with_name(f"{profile.stem}-{shape}-{kind}.json")))


def peer(shape: str, report: Report, seconds: float) -> None:
    """Measure transformers' Llama of the same shape: autocast to bfloat16, compiled, fused AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, rows = SHAPES[shape]
    ours = network(layers, width, VOCABULARY, CONTEXT)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=ours.num_heads,
        num_key_value_heads=ours.num_kv_heads,
        head_dim=ours.head_dim,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = rows_of(rows, False).tokens.to(DEVICE)
    compiled = torch.compile(model)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = compiled(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    times = timed(step, seconds)
    report.line("transformers, compiled, AdamW", shape, ours.matmul_parameters, rows * CONTEXT, times)


def forget() -> None:
    """Free memory: compiled models are in reference cycles."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--seconds", type=float, default=8, help="of steps for each measurement")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--free", action="store_true", help="sums in any order: runs that can't be repeated")
    parser.add_argument("--profile", type=Path, help="tables of kernels are written beside this name")
    parser.add_argument("--peak", type=float, default=HARDWARE["h100"].flops, help="operations a second")
    arguments = parser.parse_args()
    report = Report(arguments.peak)
    for shape in arguments.shapes:
        with nullcontext() if arguments.free else repeatable(DEVICE):
            ours(shape, report, arguments.seconds, arguments.profile)
        forget()
        if arguments.peer:
            peer(shape, report, arguments.seconds)
            forget()


if __name__ == "__main__":
    main()
