"""A benchmark of a model's speed on this machine, beside the limit that the memory bandwidth sets.

Decoding one token reads every weight once, so one sequence cannot be faster than the memory bandwidth
divided by the bytes of the weights and of the keys and values so far. That limit is measured in the
same run and reported beside the speed.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from tercet.engine.backend import Backend, Chunk, split_calls
from tercet.engine.cpu import QUANTIZATIONS
from tercet.engine.engine import Engine
from tercet.engine.memory_traffic import bytes_per_token, memory_bandwidth, weights_of
from tercet.engine.request import Request, Sampling
from tercet.errors import UserError
from tercet.host import available_cores, peak_memory

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
PROMPT_TOKENS = 512  # the default
FIRST_SEQUENCE = 1 << 30  # far above the numbers that an engine gives its sequences

Advance = Callable[[float], None]


@dataclass(frozen=True)
class Settings:
    """The work that is measured: prefill of ``batch`` prompts, then decoding of new tokens for each.

    Attributes:
        prompt_tokens: tokens of each prompt; None for 512, or fewer where the model's context is short.
        new_tokens: tokens decoded after each prompt.
        batch: sequences at the same time.
        repeat: measurements; their median is reported.
        seed: of the random tokens.

    Raises:
        UserError: a value is below 1.
    """

    prompt_tokens: int | None = None
    new_tokens: int = 128
    batch: int = 1
    repeat: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "batch", "repeat"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"`{name}` is {getattr(self, name)}; it must be at least 1")

    @property
    def work(self) -> float:
        """The number of tokens that `measure` feeds in total and reports to its ``advance``."""
        once = self.batch * (self.prompt + self.new_tokens)
        return float((self.repeat + 1) * (once + self.prompt))

    @property
    def prompt(self) -> int:
        """The number of tokens of a prompt; before `for_model`, its upper limit."""
        return PROMPT_TOKENS if self.prompt_tokens is None else self.prompt_tokens

    @property
    def mean_length(self) -> float:
        """The mean number of positions that a decoded token attends to, itself included."""
        return self.prompt + (self.new_tokens + 1) / 2

    def for_model(self, max_positions: int) -> Settings:
        """Return the settings with a prompt length that fits the model, where none is set."""
        if self.prompt_tokens is not None:
            return self
        return replace(self, prompt_tokens=max(1, min(PROMPT_TOKENS, max_positions - self.new_tokens)))


@dataclass(frozen=True)
class Speeds:
    """The measurements, one value for each repetition.

    Attributes:
        prefill: tokens per second.
        decode: tokens per second.
        first_token: seconds.
    """

    prefill: list[float]
    decode: list[float]
    first_token: list[float]


@dataclass(frozen=True)
class Report:
    """The result of a benchmark. Rates and the time to the first token are medians of the repetitions.

    ``fraction_of_limit`` is the share of the memory bandwidth that decoding one sequence uses. It is None
    for a larger batch, where arithmetic may be the limit, and on devices whose memory is not measured.
    """

    model: str
    parameters: int
    quantization: str
    backend: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    batch: int
    prefill_tokens_per_second: float
    prefill_tokens_per_second_min: float
    prefill_tokens_per_second_median: float
    decode_tokens_per_second: float
    decode_tokens_per_second_min: float
    decode_tokens_per_second_median: float
    time_to_first_token: float  # seconds
    time_to_first_token_min: float
    time_to_first_token_median: float
    load_seconds: float
    peak_memory_bytes: int
    weight_bytes: int
    bandwidth_bytes_per_second: float | None
    fraction_of_limit: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return asdict(self)


def bench(
    reference: str,
    settings: Settings = Settings(),
    quantize: str | None = None,
    threads: int | None = None,
    advance: Advance = lambda tokens: None,
) -> Report:
    """Load a local model and measure it. ``advance`` is called with the number of tokens after each feed.

    Raises:
        UserError: a hosted or unknown model, a setting out of range, or sequences too long for it.
    """
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise UserError(f"`quantize` is {quantize!r}; it must be {', '.join(QUANTIZATIONS)}")
    if threads is not None:
        use_threads(threads)
    begun = time.perf_counter()
    engine = load(reference, quantize, threads)
    load_seconds = time.perf_counter() - begun
    backend = engine.backend
    weights, used = weights_of(backend), threads_of(backend)
    settings = settings.for_model(backend.max_positions)
    speeds = measure(engine, settings, advance)
    peak = peak_memory()  # before the bandwidth is measured, which allocates a large array
    bandwidth = memory_bandwidth(used) if _device(backend) == "cpu" else None
    decode = statistics.median(speeds.decode)
    fraction = None
    if bandwidth is not None and settings.batch == 1:
        fraction = decode * bytes_per_token(backend, weights, settings.mean_length) / bandwidth
    prefill, first = statistics.median(speeds.prefill), statistics.median(speeds.first_token)
    return Report(
        model=reference,
        parameters=weights.parameters,
        quantization=_quantization(backend, quantize),
        backend=getattr(backend, "name", type(backend).__name__.removesuffix("Backend").lower()),
        threads=used,
        prompt_tokens=settings.prompt,
        new_tokens=settings.new_tokens,
        batch=settings.batch,
        prefill_tokens_per_second=prefill,
        prefill_tokens_per_second_min=min(speeds.prefill),
        prefill_tokens_per_second_median=prefill,
        decode_tokens_per_second=decode,
        decode_tokens_per_second_min=min(speeds.decode),
        decode_tokens_per_second_median=decode,
        time_to_first_token=first,
        time_to_first_token_min=min(speeds.first_token),
        time_to_first_token_median=first,
        load_seconds=load_seconds,
        peak_memory_bytes=peak,
        weight_bytes=weights.nbytes,
        bandwidth_bytes_per_second=bandwidth,
        fraction_of_limit=fraction,
    )


def load(reference: str, quantize: str | None = None, threads: int | None = None) -> Engine:
    """Return the engine of a local reference.

    Raises:
        UserError: the reference is a hosted model, or contains none that can be loaded.
    """
    from tercet.engine.load import load_engine, load_transformers_engine
    from tercet.model.reference import parse_reference
    from tercet.model.source import directory_of

    source = parse_reference(reference)
    if not source.is_local:
        raise UserError(
            f"{reference} is a hosted model: its speed is its server's; bench measures local models"
        )
    directory = directory_of(source)
    if source.kind == "transformers":
        if quantize is not None:
            raise UserError(
                "`quantize` is for models that Tercet's own network runs; transformers: runs them as stored"
            )
        return load_transformers_engine(directory)
    return load_engine(directory, quantize=quantize, threads=threads)


# Speed


def measure(engine: Engine, settings: Settings, advance: Advance = lambda tokens: None) -> Speeds:
    """Return the speeds of every repetition.

    One more repetition comes before them and is not counted: it maps weights and compiles kernels.

    Raises:
        UserError: the model or its cache cannot hold such sequences.
    """
    backend = engine.backend
    rng = np.random.default_rng(settings.seed)
    pages = _pages(backend, settings)
    # Through the engine first: the feeds that bypass it afterwards overwrite pages in its prefix cache.
    first = [
        first_token(engine, _random(rng, settings.prompt, backend), advance) for _ in _repetitions(settings)
    ]
    prefill: list[float] = []
    decode: list[float] = []
    for _ in _repetitions(settings):
        prompts = [_random(rng, settings.prompt, backend) for _ in range(settings.batch)]
        seconds = _prefill(backend, prompts, pages, advance)
        prefill.append(settings.batch * settings.prompt / seconds)
        seconds = _decode(backend, settings, pages, rng, advance)
        decode.append(settings.batch * settings.new_tokens / seconds)
        for row in range(settings.batch):
            backend.release(FIRST_SEQUENCE + row)
    return Speeds(prefill[1:], decode[1:], first[1:])


def first_token(engine: Engine, prompt: Sequence[int], advance: Advance = lambda tokens: None) -> float:
    """Return the seconds from a request with this prompt to its first token."""
    request = Request(tuple(prompt), Sampling(max_tokens=1, temperature=0, ignore_eos=True))
    begun = time.perf_counter()
    engine.generate([request])
    seconds = time.perf_counter() - begun
    advance(len(prompt))
    return seconds


def _prefill(backend: Backend, prompts: list[list[int]], pages: list[list[int]], advance: Advance) -> float:
    """Return the seconds to prefill the prompts, with logits after the last token of each."""
    chunks = [
        Chunk(FIRST_SEQUENCE + row, prompt, 0, pages[row], [len(prompt) - 1])
        for row, prompt in enumerate(prompts)
    ]
    return _feed(backend, chunks, advance)


def _decode(
    backend: Backend, settings: Settings, pages: list[list[int]], rng: np.random.Generator, advance: Advance
) -> float:
    """Return the seconds to feed ``new_tokens`` to every sequence, one at a time, with logits after each."""
    seconds = 0.0
    for step in range(settings.new_tokens):
        tokens = _random(rng, settings.batch, backend)
        chunks = [
            Chunk(FIRST_SEQUENCE + row, [token], settings.prompt + step, pages[row], [0])
            for row, token in enumerate(tokens)
        ]
        seconds += _feed(backend, chunks, advance)
    return seconds


def _feed(backend: Backend, chunks: list[Chunk], advance: Advance) -> float:
    """Return the seconds that the backend takes for the chunks, in as many calls as its bounds require."""
    seconds = 0.0
    for call in split_calls(backend, chunks):
        begun = time.perf_counter()
        backend.feed(call)
        seconds += time.perf_counter() - begun
        advance(sum(len(chunk.tokens) for chunk in call))
    return seconds


def _pages(backend: Backend, settings: Settings) -> list[list[int]]:
    """Return the pages of every sequence. Raise UserError when positions or pages are too few."""
    length = settings.prompt + settings.new_tokens
    if length > backend.max_positions:
        raise UserError(
            f"`prompt_tokens` and `new_tokens` are {length} together; the model takes {backend.max_positions}"
        )
    pages = -(-length // backend.page_size)  # of one sequence
    if pages * settings.batch > backend.num_pages:
        limit = backend.num_pages // pages
        raise UserError(f"`batch` is {settings.batch}; the cache holds {limit} sequences of {length} tokens")
    return [list(range(row * pages, (row + 1) * pages)) for row in range(settings.batch)]


def _repetitions(settings: Settings) -> Iterator[int]:
    """Yield the numbers of the repetitions; 0 is not counted."""
    return iter(range(settings.repeat + 1))


def _random(rng: np.random.Generator, count: int, backend: Backend) -> list[int]:
    """Return random tokens."""
    tokens: list[int] = rng.integers(0, backend.vocab_size, count).tolist()
    return tokens


# The machine


def use_threads(count: int) -> None:
    """Compute with ``count`` threads from now on. Raise UserError when there are fewer cores.

    Environment variables set the threads of libraries that are not loaded yet.
    """
    cores = available_cores()
    if not 1 <= count <= cores:
        raise UserError(f"`threads` is {count}; this machine has {cores} cores, so use 1 to {cores}")
    for name in THREAD_VARIABLES:
        os.environ[name] = str(count)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(count)


def threads_of(backend: Any) -> int:
    """Return the number of threads a backend computes with: its own attribute, or PyTorch's setting."""
    own = getattr(backend, "threads", None)
    if own is not None:
        return int(own)
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch else available_cores()


def _quantization(backend: Any, requested: str | None) -> str:
    """Return the form of the weights in memory: the backend's attribute ``quantization``, or their dtype."""
    own = getattr(backend, "quantization", None)
    if own is not None:
        return str(own)
    dtype = getattr(getattr(backend, "model", None), "dtype", None)
    return str(dtype).removeprefix("torch.") if dtype is not None else requested or "none"


def _device(backend: Any) -> str:
    """Return the type of the device that a backend computes on."""
    device = getattr(getattr(backend, "model", None), "device", None)
    return str(getattr(device, "type", "cpu"))
