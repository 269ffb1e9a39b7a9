"""How fast this machine trains a given shape: measured, never assumed, and remembered.

bfloat16 is nearly twice as fast as float32 on a CPU that has the instructions and hundreds of
times slower on one that emulates them; a second thread helps an idle machine and hurts a busy one.
A second of measuring settles it. The answer is kept in the user's cache, so that the same command
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
from tercet.host import available_cores, processor_name
from tercet.model.transformer import Transformer
from tercet.progress import say
from tercet.train.compilation import compile_blocks
from tercet.train.gradients import gradients_of, repeatable
from tercet.train.loss import Batch
from tercet.train.optimizer import Kind, Optimizer, Rates, clip_gradients
from tercet.train.state import trainable

# A speed is remembered, so that a plan repeats, while new measurements agree with it this well: a plan is to
# tell the time within 15%, and one from a busier hour once told 19% too much.
AGREE = 0.87


# Steps timed for each way to train, and seconds spent on them at most; on a CPU twice, half of them each.
PASSES, LONGEST, ROUNDS = 3, 1.0, 2


@dataclass(frozen=True)
class Speed:
    """Training speed of one shape on this machine, in tokens per second of whole optimizer steps."""

    tokens_per_second: float
    compute_dtype: str  # "float32" or "bfloat16"
    threads: int
    compiled: bool = False  # by PyTorch's compiler, on a GPU

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.compute_dtype == "bfloat16" else torch.float32


def use_all_cores() -> None:
    """The thread count that measuring is done with, whatever training chose before."""
    torch.set_num_threads(available_cores())


def calibrate(
    model: Transformer, rows: int, time_steps: int, kind: Kind = "adamw", packed: bool = False
) -> Speed:
    """The fastest way to train ``model`` with batches of ``rows`` x ``time_steps`` tokens where it is.

    packed: batches are as in pre-training: all of one shape, and say which document each token is of.

    The model itself is timed, with an optimizer of ``kind`` whose rate is zero: its weights stay as they are.

    Sets torch's thread count to the chosen one.
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
    known = _remembered(path)
    before = known.get(key)
    on_cpu = model.device.type == "cpu"
    if on_cpu:
        speed = _measure(model, rows, time_steps, kind)
    else:
        with repeatable(model.device):
            speed = measure_accelerator(model, _random_batch(model, rows, time_steps, packed), kind, packed)
    if before is not None and AGREE < speed.tokens_per_second / before.tokens_per_second < 1 / AGREE:
        # The machine is as it was, so the plan is too; but a compiler may be gone since.
        speed = replace(before, compiled=speed.compiled)
    else:
        with suppress(UserError):  # a cache that can't be written makes plans less repeatable, nothing else
            write_json(path, {name: asdict(value) for name, value in {**known, key: speed}.items()})
    torch.set_num_threads(speed.threads)
    return speed


def _remembered(path: Path) -> dict[str, Speed]:
    try:
        return {key: Speed(**value) for key, value in read_json(path).items()}
    except (UserError, AttributeError, TypeError):  # no such file, or one that is not ours
        return {}


def _measure(model: Transformer, rows: int, time_steps: int, kind: Kind) -> Speed:
    before = model.compute_dtype
    batch = _random_batch(model, rows, time_steps)
    found: dict[tuple[str, int], list[float]] = {}  # seconds of steps, by type and threads

    def pace(dtype: str, threads: int, patience: float) -> None:
        torch.set_num_threads(threads)
        model.compute_dtype = getattr(torch, dtype)
        found.setdefault((dtype, threads), []).extend(_pace(model, batch, kind, threads, patience))

    cores = available_cores()
    # In turn, and the best step decides: a moment in which the machine was busy made float32 look twice as fast.
    for again in range(ROUNDS):
        pace("float32", cores, 3.0)
        patience = 3 * min(found["float32", cores])
        if not again or min(found["bfloat16", cores]) < patience:
            pace("bfloat16", cores, patience)
    dtype, _ = min(found, key=lambda way: min(found[way]))
    # A second thread is another question: on a machine that is always busy it is slow most of the time.
    if cores > 1:
        pace(dtype, 1, 2 * median(found[dtype, cores]))
    model.compute_dtype = before
    model.zero_grad(set_to_none=True)
    seconds, threads = min(
        (median(times), threads) for (name, threads), times in found.items() if name == dtype
    )
    # Two digits are what the measurement is worth, and rounding makes plans repeatable.
    return Speed(float(f"{rows * time_steps / seconds:.2g}"), dtype, threads)


def device_name(device: torch.device) -> str:
    """The GPU's name as its driver tells it, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU computes in bfloat16 by itself."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def _random_batch(model: Transformer, rows: int, time_steps: int, packed: bool = False) -> Batch:
    """Random tokens: as real ones do, they touch all of the embedding and of its gradient."""
    size = (rows, time_steps)
    tokens = torch.randint(0, model.config.vocab_size, size, generator=torch.Generator().manual_seed(0))
    if not packed:
        return Batch(tokens, tokens)
    return Batch(tokens, tokens, torch.arange(time_steps).expand(size), torch.zeros(size, dtype=torch.long))


def measure_accelerator(model: Transformer, batch: Batch, kind: Kind, compilable: bool) -> Speed:
    """bfloat16 where the device has it; in single operations or compiled, whichever is faster.

    compilable: all batches will have this one's shape. A copy of the model is compiled, which takes half a
        minute, before any clock runs.
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
        except Exception as problem:  # the compiler needs a C compiler and Triton, and fails in its own ways
            say(f"torch.compile does not work here ({type(problem).__name__}); training goes on without it")
        else:
            compiled = faster < seconds
            seconds = min(seconds, faster)
    model.compute_dtype = before
    model.zero_grad(set_to_none=True)
    return Speed(float(f"{batch.tokens.numel() / seconds:.2g}"), dtype, threads, compiled)


def _pace(model: Transformer, batch: Batch, kind: Kind, threads: int, patience: float) -> list[float]:
    """Seconds of optimizer steps, but for the first; gives up early past ``patience`` seconds a step."""
    parameters = trainable(model)
    optimizer = Optimizer(parameters, Rates(kind, 0.0), threads=threads, dtype=model.dtype)
    work = gradients_of(model, threads)
    on_cpu = model.device.type == "cpu"
    small = batch.tokens[:1, :8]
    # What has to be compiled is: on a GPU for batches of this shape, here for any.
    work.gradients([Batch(small, small) if on_cpu else batch])
    if not on_cpu:
        torch.accelerator.synchronize(model.device)
    times: list[float] = []
    for _ in range(1 + PASSES):
        begun = time.monotonic()
        work.gradients([batch])
        clip_gradients(list(parameters.values()), 1.0)
        optimizer.step(1.0)
        if not on_cpu:
            torch.accelerator.synchronize(model.device)  # so far it was only asked to
        times.append(time.monotonic() - begun)
        if times[-1] > patience or (sum(times) > LONGEST and (on_cpu or len(times) > 1)):
            break
    return times[1:] or times
