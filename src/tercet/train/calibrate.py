"""Measure how fast this machine trains a given shape, and cache the result.

bfloat16 is nearly twice as fast as float32 on a CPU that has the instructions, and hundreds of times slower
on a CPU that emulates them; a second thread speeds up training on an idle machine and slows it down on a busy
one. A second of measurement decides both. The result is stored in the user's cache, so that the same command
on the same machine plans the same run.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch

from tercet.errors import UserError
from tercet.files import cache_directory, fingerprint, read_json, write_json
from tercet.host import available_cores, emulates_bfloat, processor_name
from tercet.model.transformer import Transformer
from tercet.progress import say
from tercet.train.batch import Batch
from tercet.train.compilation import compile_blocks
from tercet.train.gradients import gradients_of, repeatable
from tercet.train.optimizer import Kind, Optimizer, Rates, clip_gradients
from tercet.train.state import trainable

# While a new measurement is within this factor of the cached speed, the cached speed is used, so that a plan
# repeats: a plan must predict the time within 15%, and one from a busier hour once predicted 19% too much.
AGREEMENT = 0.87

# For each configuration: timed steps per round, seconds after which a round ends early, and rounds on a CPU.
TIMED_STEPS, ROUND_SECONDS, ROUNDS = 3, 1.0, 2
# On a CPU a timed step takes at most about so many seconds, with at least so many rows: calibrating a LoRA of a model
# with 135M weights, whose steps of 16 examples take seven seconds, took two minutes.
LONGEST_STEP, FEWEST_ROWS = 1.5, 4


@dataclass(frozen=True)
class Speed:
    """Training speed of one shape on this machine, in tokens per second of whole optimizer steps."""

    tokens_per_second: float
    compute_dtype: str  # "float32" or "bfloat16"
    threads: int
    compiled: bool = False  # by PyTorch's compiler, on a GPU
    fixed_seconds: float = 0.0  # of a step, whatever its number of tokens: the update of the weights
    step_tokens: int = 0  # of the steps that the speed describes; 0: the speed holds for any number

    def step_seconds(self, tokens: float) -> float:
        """Return the seconds of a step with a number of tokens."""
        if not self.step_tokens:
            return tokens / self.tokens_per_second
        step = self.step_tokens / self.tokens_per_second
        return self.fixed_seconds + max(0.0, step - self.fixed_seconds) * tokens / self.step_tokens

    @property
    def dtype(self) -> torch.dtype:
        """The type that ``compute_dtype`` names."""
        return torch.bfloat16 if self.compute_dtype == "bfloat16" else torch.float32


def use_all_cores() -> None:
    """Let PyTorch use all available cores, whatever thread count training chose before."""
    torch.set_num_threads(available_cores())


def calibrate(
    model: Transformer, rows: int, time_steps: int, kind: Kind = "adamw", packed: bool = False
) -> Speed:
    """Return the fastest way to train ``model`` on its device, and set torch's thread count accordingly.

    The model itself is timed, with an optimizer whose rate is zero, so its weights do not change.

    Args:
        model: The network.
        rows: Rows of a batch.
        time_steps: Tokens in a row.
        kind: The optimizer's kind.
        packed: Batches have one shape and name the document of each token, as in pre-training.
    """
    trained = sum(parameter.numel() for parameter in trainable(model).values())
    key = fingerprint(
        [
            asdict(model.config),
            trained,
            rows,
            time_steps,
            kind,
            processor_name(),
            available_cores(),
            torch.__version__,
            *([] if model.device.type == "cpu" else [device_name(model.device)]),
        ]
    )
    path = cache_directory() / "speed.json"
    cached = _read_cache(path)
    before = cached.get(key)
    on_cpu = model.device.type == "cpu"
    if on_cpu:
        speed = _measure(model, rows, time_steps, kind)
    else:
        with repeatable(model.device):
            speed = measure_accelerator(model, _random_batch(model, rows, time_steps, packed), kind, packed)
    if before is not None and AGREEMENT < speed.tokens_per_second / before.tokens_per_second < 1 / AGREEMENT:
        # The machine is as fast as before, so repeat the plan; but its compiler may be gone.
        speed = replace(before, compiled=speed.compiled)
    else:
        with suppress(UserError):  # without a writable cache, plans are only less repeatable
            write_json(path, {name: asdict(value) for name, value in {**cached, key: speed}.items()})
    torch.set_num_threads(speed.threads)
    return speed


def _read_cache(path: Path) -> dict[str, Speed]:
    try:
        return {key: Speed(**value) for key, value in read_json(path).items()}
    except (UserError, AttributeError, TypeError):  # no such file, or one of another format
        return {}


def _measure(model: Transformer, rows: int, time_steps: int, kind: Kind) -> Speed:
    """Measure on a CPU.

    Where a step would take seconds, steps of fewer rows are timed, and the time of a whole step follows from the
    line through two numbers of rows.
    """
    before = model.compute_dtype
    timed_rows = _timed_rows(model, rows, time_steps, kind)
    batch = _random_batch(model, timed_rows, time_steps)
    times: dict[tuple[str, int], list[float]] = {}  # seconds of each step, by type and threads

    def pace(dtype: str, threads: int, patience: float) -> None:
        torch.set_num_threads(threads)
        model.compute_dtype = getattr(torch, dtype)
        times.setdefault((dtype, threads), []).extend(_pace(model, batch, kind, threads, patience))

    cores = available_cores()
    # Alternate between the types and compare their best steps: a busy moment once made float32 look twice as
    # fast.
    for number in range(ROUNDS):
        pace("float32", cores, 3.0)
        if emulates_bfloat():
            continue  # a single step can take minutes
        patience = 3 * min(times["float32", cores])
        if number == 0 or min(times["bfloat16", cores]) < patience:
            pace("bfloat16", cores, patience)
    dtype, _ = min(times, key=lambda configuration: min(times[configuration]))
    # Compare thread counts by their median: on a machine that is always busy, a second thread is slow most of
    # the time.
    if cores > 1:
        pace(dtype, 1, 2 * median(times[dtype, cores]))
    seconds, threads = min(
        (median(steps), threads) for (name, threads), steps in times.items() if name == dtype
    )
    fixed = 0.0
    if rows > FEWEST_ROWS:
        model.compute_dtype = getattr(torch, dtype)
        seconds, fixed = _whole_step(model, rows, timed_rows, seconds, time_steps, kind, threads)
    model.compute_dtype = before
    model.zero_grad(set_to_none=True)
    # The measurement is accurate to two digits, and rounding makes plans repeatable.
    speed = float(f"{rows * time_steps / seconds:.2g}")
    return Speed(speed, dtype, threads, False, float(f"{fixed:.2g}"), rows * time_steps)


def _timed_rows(model: Transformer, rows: int, time_steps: int, kind: Kind) -> int:
    """Return how many of the rows are timed to choose type and threads: about as many as take `LONGEST_STEP`."""
    if rows <= FEWEST_ROWS:
        return rows
    threads = torch.get_num_threads()
    few = min(_pace(model, _random_batch(model, FEWEST_ROWS, time_steps), kind, threads, 0.0))
    return min(rows, max(FEWEST_ROWS, int(FEWEST_ROWS * LONGEST_STEP / few)))


def _whole_step(
    model: Transformer, rows: int, timed_rows: int, seconds: float, time_steps: int, kind: Kind, threads: int
) -> tuple[float, float]:
    """Return the seconds of a step with ``rows`` rows, and the part of them that does not depend on the rows.

    A step of few rows waits for memory, so its time says little about a large one: the rows are doubled until a step
    takes `LONGEST_STEP`, and the line through the last two numbers of rows is followed from there.
    """
    torch.set_num_threads(threads)

    def pace(count: int) -> float:
        return min(_pace(model, _random_batch(model, count, time_steps), kind, threads, LONGEST_STEP))

    points = [(timed_rows, seconds)]
    while points[-1][0] < rows and points[-1][1] < LONGEST_STEP:
        count = min(2 * points[-1][0], rows)
        points.append((count, pace(count)))
    if len(points) == 1:
        half = timed_rows // 2
        points.insert(0, (half, pace(half)))
    (fewer, short), (more, long) = points[-2:]
    slope = max(0.0, long - short) / (more - fewer)
    return long + slope * (rows - more), max(0.0, long - slope * more)


def device_name(device: torch.device) -> str:
    """Return the GPU's name according to its driver, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a GPU computes bfloat16 in hardware."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def _random_batch(model: Transformer, rows: int, time_steps: int, packed: bool = False) -> Batch:
    """Return random tokens: like real ones they touch the whole embedding and its gradient."""
    size = (rows, time_steps)
    tokens = torch.randint(0, model.config.vocab_size, size, generator=torch.Generator().manual_seed(0))
    if not packed:
        return Batch(tokens, tokens)
    return Batch(tokens, tokens, torch.arange(time_steps).expand(size), torch.zeros(size, dtype=torch.long))


def measure_accelerator(model: Transformer, batch: Batch, kind: Kind, compilable: bool) -> Speed:
    """Measure training on a GPU, in bfloat16 where it has it, and compiled where that is faster.

    Args:
        model: The network, on the GPU.
        batch: A typical batch.
        kind: The optimizer's kind.
        compilable: All batches will have the shape of ``batch``. A copy of the model is then compiled, which
            takes half a minute, before the timing begins.
    """
    before, threads = model.compute_dtype, torch.get_num_threads()
    dtype = "bfloat16" if has_bfloat16(model.device) else "float32"
    model.compute_dtype = getattr(torch, dtype)
    seconds, compiled = median(_pace(model, batch, kind, 1, math.inf)), False
    if compilable:
        copy = deepcopy(model)
        try:
            compile_blocks(copy)
            faster = median(_pace(copy, batch, kind, 1, math.inf))
        except Exception as problem:  # it needs a C compiler and Triton, and raises many kinds of errors
            say(f"torch.compile does not work here ({type(problem).__name__}); training continues without it")
        else:
            compiled = faster < seconds
            seconds = min(seconds, faster)
    model.compute_dtype = before
    model.zero_grad(set_to_none=True)
    return Speed(float(f"{batch.tokens.numel() / seconds:.2g}"), dtype, threads, compiled)


def _pace(model: Transformer, batch: Batch, kind: Kind, threads: int, patience: float) -> list[float]:
    """Return the seconds of optimizer steps after the first; end early when a step exceeds ``patience``."""
    parameters = trainable(model)
    optimizer = Optimizer(parameters, Rates(kind, 0.0), threads=threads, dtype=model.dtype)
    work = gradients_of(model, threads)
    on_cpu = model.device.type == "cpu"
    small = batch.tokens[:1, :8]
    # Compile before timing: on a GPU programs are specific to this batch shape, on a CPU they fit any.
    work.gradients([Batch(small, small) if on_cpu else batch])
    if not on_cpu:
        torch.accelerator.synchronize(model.device)
    times: list[float] = []
    for _ in range(1 + TIMED_STEPS):
        begun = time.monotonic()
        work.gradients([batch])
        clip_gradients(list(parameters.values()), 1.0)
        optimizer.step(1.0)
        if not on_cpu:
            torch.accelerator.synchronize(model.device)  # until here the step was only queued
        times.append(time.monotonic() - begun)
        if times[-1] > patience or (sum(times) > ROUND_SECONDS and (on_cpu or len(times) > 1)):
            break
    return times[1:] or times
