"""Any causal language model that the transformers library runs, behind the engine's `Backend`.

For architectures that our own network does not cover: `transformers:REF`. Each sequence has a
cache of the library's own (keys and values, or the state of a recurrent network) and is fed alone.
That is right for every architecture, and slower than our own network, whose sequences share a batch.

What a cache can do differs between architectures and is written down nowhere: some recurrent
networks silently forget their state when they are fed several tokens at once, some keep no cache at
all. So a model is tried once, on a few tokens, and continued in the fastest way that gives the same
logits as reading everything at once.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tercet.errors import UserError

if TYPE_CHECKING:
    from tercet.engine.backend import Chunk

CACHE_BYTES = 1 << 30  # the memory for caches unless asked otherwise: fits a laptop beside the model
LOGIT_VALUES = 1 << 25  # logits computed at a time when scoring: 128 MiB in float32
FORWARD_TOKENS = 4096  # fed at once: enough to keep any matrix product busy; bounds activations
UNBOUNDED = 1 << 17  # positions of a model that names no limit (recurrent, or relative positions)
MIN_PAGE = 64  # positions; pages are bookkeeping only, so larger ones cost nothing
MOST_PAGES = 1 << 16  # the engine keeps a list of them
CHUNKS = 256  # in one call; they are fed one by one in any case
POSITION_FIELDS = ("max_position_embeddings", "max_seq_len", "n_positions", "n_ctx", "seq_length")
CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")  # "cache" since transformers 5.24
TRIED, SPLIT = 12, 7  # tokens a model is tried on, and fed first: longer than any convolution's kernel

# How a sequence goes on: several tokens after a cache; one at a time after a cache, since the model
# forgets its state otherwise; or without a cache, from the first token each time.
Mode = Literal["chunks", "steps", "recompute"]


@dataclass
class _Sequence:
    tokens: list[int] = field(default_factory=list)
    cache: Any = None  # of all ``tokens``; None: they have to be read again


class TransformersBackend:
    """A `Backend` over a model of transformers. Pages are counted, never used.

    cache_bytes: what the caches of all sequences should take at most; one sequence of the model's
        full length always fits.

    Raises:
        UserError: the model gives no finite logits, or is no causal language model.
    """

    shares_pages: bool = False  # a page's keys and values can't be given to another sequence

    def __init__(self, model: Any, cache_bytes: int = CACHE_BYTES) -> None:
        self.model = model.eval()
        config = model.config.get_text_config(decoder=True)
        limits = [getattr(config, name, None) for name in POSITION_FIELDS]
        known = next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)
        self.max_positions = known or UNBOUNDED
        self.mode: Mode = "chunks"
        self._crops = True
        self._sequences: dict[int, _Sequence] = {}
        self._cache_name = ""
        self._longrope = _longrope_switch(config)
        takes = inspect.signature(model.forward).parameters
        self._keeps = "logits_to_keep" in takes  # it can leave out logits that nobody wants
        self._cache_names = [name for name in CACHE_NAMES if name in takes]
        self.vocab_size = int(config.vocab_size)
        fixed, per_token = self._try()
        self.cache_bytes_per_token = per_token
        self.max_tokens = min(self.max_positions, FORWARD_TOKENS if self.mode == "chunks" else UNBOUNDED)
        self.max_chunks = CHUNKS
        # A page is charged with the part of the memory that does not grow, so it is made long
        # enough that this is at most half of it. A state that never grows is one page.
        longest = fixed // per_token if per_token else self.max_positions
        self.page_size = min(max(MIN_PAGE, longest), self.max_positions)
        pages = cache_bytes // max(1, fixed + per_token * self.page_size)
        self.num_pages = min(max(1, pages), MOST_PAGES)
        if known is None and per_token:
            self.max_positions = min(self.max_positions, self.num_pages * self.page_size)
        self.num_pages = max(self.num_pages, -(-self.max_positions // self.page_size))

    @torch.inference_mode()
    def feed(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """Logits [wanted places, V], in order of chunks."""
        rows = [
            _numpy(part)
            for chunk in chunks
            for part in self._logits(chunk.sequence, chunk.tokens, chunk.start, chunk.outputs)
        ]
        return np.concatenate(rows) if rows else np.zeros((0, self.vocab_size), np.float32)

    @torch.inference_mode()
    def logprobs(
        self, chunks: Sequence[Chunk], targets: Sequence[Sequence[int]]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Natural log-probability of every target, and whether it is the likeliest there."""
        values: list[Tensor] = []
        likeliest: list[Tensor] = []
        place = 0
        for chunk in chunks:
            for part in self._logits(chunk.sequence, chunk.tokens, chunk.start, chunk.outputs):
                logits = part.float()
                asked = targets[place : place + len(logits)]
                place += len(logits)
                rows = torch.tensor(
                    [row for row, ids in enumerate(asked) for _ in ids], dtype=torch.long, device=part.device
                )
                ids = torch.tensor([i for ids in asked for i in ids], dtype=torch.long, device=part.device)
                values.append(logits[rows, ids] - logits.logsumexp(-1)[rows])
                likeliest.append(logits.argmax(-1)[rows] == ids)
        if not values:
            return np.zeros(0, np.float32), np.zeros(0, np.bool_)
        return _numpy(torch.cat(values)), torch.cat(likeliest).cpu().numpy()

    @torch.inference_mode()
    def hidden(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """What the head reads at the wanted places [places, H]; whole sequences are read again for it.

        Raises:
            UserError: the model's class does not set its decoder apart from the head.
        """
        rows: list[Tensor] = []
        for chunk in chunks:
            sequence = self._rewound(chunk.sequence, chunk.start)
            sequence.tokens.extend(chunk.tokens)
            sequence.cache = None
            places = [chunk.start + index for index in chunk.outputs]
            rows.append(self._states(sequence.tokens)[places])
        return _numpy(torch.cat(rows))

    def _states(self, tokens: list[int]) -> Tensor:
        """The decoder's output [T, H] for a whole sequence."""
        decoder = self.model.base_model
        ids = torch.tensor([tokens], dtype=torch.long, device=self.model.device)
        found = None
        if decoder is not self.model:
            found = decoder(input_ids=ids, use_cache=False, return_dict=True).get("last_hidden_state")
        if found is None:
            raise UserError(
                f"{type(self.model).__name__} of transformers does not show what its head reads, "
                "so it gives no embeddings; use another model for them"
            )
        states: Tensor = found[0]
        return states

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Never asked of a backend whose ``shares_pages`` is False."""
        raise NotImplementedError("a cache of transformers can't be shared between sequences")

    def add_adapter(self, directory: str | Path) -> int:
        """Not possible: a model of transformers computes one sequence at a time with the weights it has."""
        raise UserError(
            f"{directory}: adapters can't be chosen by request for a model that transformers runs; "
            "merge it first (tercet export ADAPTER --format hf), or leave out 'transformers:'"
        )

    def release(self, sequence: int) -> None:
        """Forget a sequence and free its cache."""
        self._sequences.pop(sequence, None)

    def _logits(
        self, number: int, tokens: Sequence[int], start: int, wanted: Sequence[int]
    ) -> Iterator[Tensor]:
        """Logits [some, V] of the wanted places in order, so many at a time as `LOGIT_VALUES` allows."""
        sequence = self._rewound(number, start)
        sequence.tokens.extend(tokens)
        whole = sequence.tokens
        places = [start + index for index in wanted]
        # Whatever stops this half-way must not leave a cache that does not belong to the tokens.
        cache, sequence.cache = sequence.cache, None
        if self._rotated_long(start) != self._rotated_long(len(whole)):
            cache = None  # its keys were rotated with the factors for short texts
        most = max(1, LOGIT_VALUES // self.vocab_size)
        in_parts = len(places) > most or not self._keeps
        if self.mode == "recompute" or (in_parts and (self.mode == "steps" or self._longrope is not None)):
            for at in range(0, len(places), most):
                group = places[at : at + most]
                end = group[-1] + 1 if self._longrope is None else len(whole)
                yield self._forward(whole[:end], None, group)[0]
            return
        begin = start if cache is not None else 0
        step = most if in_parts else len(whole) - begin
        if self.mode == "steps" and cache is not None:
            step = 1
        for at in range(begin, len(whole), step):
            piece = whole[at : at + step]
            inside = [place - at for place in places if at <= place < at + len(piece)]
            logits, cache = self._forward(piece, cache, inside)
            if inside:
                yield logits
        sequence.cache = cache

    def _rewound(self, number: int, start: int) -> _Sequence:
        """The sequence with its first ``start`` tokens, and a cache of just those or none."""
        sequence = self._sequences.setdefault(number, _Sequence())
        surplus = len(sequence.tokens) - start
        if surplus < 0:
            raise ValueError(f"sequence {number} holds {len(sequence.tokens)} tokens; it is fed from {start}")
        if surplus:
            cache, sequence.cache = sequence.cache, None
            same = self._rotated_long(start) == self._rotated_long(len(sequence.tokens))
            del sequence.tokens[start:]
            if start and same and self._crops and getattr(cache, "is_croppable", False):
                # A sliding window that has dropped what would be needed again raises.
                with contextlib.suppress(RuntimeError, ValueError):
                    cache.crop(-surplus)
                    sequence.cache = cache
        return sequence

    def _rotated_long(self, length: int) -> bool:
        return self._longrope is not None and length > self._longrope

    def _forward(self, tokens: list[int], cache: Any, wanted: list[int]) -> tuple[Tensor, Any]:
        """Logits [wanted, V] after these tokens, which follow the cache, and the cache with them."""
        device = self.model.device
        options: dict[str, Any] = {} if cache is None else {self._cache_name: cache}
        places = torch.tensor(wanted, dtype=torch.long, device=device)
        if self._keeps:
            options["logits_to_keep"] = places if wanted else 1
        ids = torch.tensor([tokens], dtype=torch.long, device=device)
        # A single sequence without padding needs no mask.
        output = self.model(input_ids=ids, use_cache=self.mode != "recompute", return_dict=True, **options)
        logits: Tensor = output.logits[0]
        return logits if self._keeps else logits[places], self._cache_of(output)

    def _cache_of(self, output: Any) -> Any:
        if self.mode == "recompute":
            return None
        for name in self._cache_names:
            if (cache := output.get(name)) is not None:
                self._cache_name = name
                return cache
        raise ValueError("the model gave no cache")

    # Trying

    @torch.inference_mode()
    def _try(self) -> tuple[int, int]:
        """Choose ``mode``; the bytes a cache takes in any case, and those more for every token."""
        ids = np.random.default_rng(0).integers(0, self.vocab_size, TRIED).tolist()
        self.mode = "recompute"
        with _quiet():
            wanted, _ = self._forward(ids, None, list(range(TRIED)))
            self.vocab_size = wanted.shape[-1]
            dtype = str(wanted.dtype).removeprefix("torch.")
            if not torch.isfinite(wanted).all():
                raise UserError(f"the model's logits are not finite in {dtype}; use another dtype")
            ways: list[tuple[Mode, bool]] = [("chunks", True), ("chunks", False), ("steps", False)]
            for self.mode, self._crops in ways:
                # A model that can't do it may fail in any way there is.
                with contextlib.suppress(Exception):
                    if (sizes := self._agrees(ids, wanted)) is not None:
                        return sizes
            self.mode, self._crops = "recompute", False
            first, _ = self._forward(ids[:SPLIT], None, list(range(SPLIT)))
        if not self._close(first, wanted[:SPLIT]):
            name = type(self.model).__name__
            raise UserError(
                f"{name} is no causal language model: what it says of a token depends on later ones"
            )
        return 0, 0

    def _agrees(self, ids: list[int], wanted: Tensor) -> tuple[int, int] | None:
        """Bytes as in `_try` if feeding the tokens in parts, in the present mode, gives ``wanted``."""
        number, places = -1, list(range(len(ids)))
        try:
            self._sequences[number] = _Sequence()
            fed = list(self._logits(number, ids[:SPLIT], 0, places[:SPLIT]))
            before = _nbytes(self._sequences[number].cache)
            fed += self._logits(number, ids[SPLIT:], SPLIT, places[: TRIED - SPLIT])
            after = _nbytes(self._sequences[number].cache)
            again = torch.cat(list(self._logits(number, ids[SPLIT:], SPLIT, places[: TRIED - SPLIT])))
        finally:
            self.release(number)
        if not (self._close(torch.cat(fed), wanted) and self._close(again, wanted[SPLIT:])):
            return None
        per_token = (after - before) // (TRIED - SPLIT)
        return max(0, after - per_token * TRIED), per_token

    def _close(self, one: Tensor, other: Tensor) -> bool:
        """Equal up to rounding: a way that is wrong differs by about as much as the logits themselves."""
        bound = 1e-3 if self.model.dtype == torch.float32 else 5e-2
        one, other = one.float(), other.float()
        spread = (other - other.mean(-1, keepdim=True)).norm()
        return bool((one - other).norm() <= bound * spread)


def load_transformers(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    cache_bytes: int = CACHE_BYTES,
) -> TransformersBackend:
    """The model of a checkpoint directory as a `Backend`; safetensors only, and no code from the directory.

    dtype: of the weights; None: the type on disk.

    Raises:
        UserError: transformers is not installed or does not know the architecture, or the directory
            holds no complete model.
    """
    try:
        import transformers
    except ImportError as problem:
        raise UserError(
            "transformers:REF needs the transformers library: pip install 'tercet[transformers]'"
        ) from problem
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} has no config.json, so it holds no model")
    if not any(directory.glob("*.safetensors")):
        raise UserError(f"{directory} holds no .safetensors; no other weights are read (never pickles)")
    automatic: Any = transformers.AutoModelForCausalLM
    try:
        with _quiet():
            model, report = automatic.from_pretrained(
                directory,
                dtype=dtype or "auto",
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as problem:  # the library raises KeyError, ValueError, OSError, RuntimeError, ...
        if "trust_remote_code" in str(problem):
            raise UserError(
                f"{directory} needs Python code of its own (config.json: auto_map), which is never run"
            ) from problem
        raise UserError(f"transformers cannot load {directory}: {_line(problem)}") from problem
    if missing := sorted(report["missing_keys"]):  # it would go on with random weights
        raise UserError(
            f"{directory}: tensor {missing[0]} is missing from the weights"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
        )
    return TransformersBackend(model.to(device), cache_bytes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings and progress bars; errors come as exceptions."""
    import transformers

    logging: Any = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _longrope_switch(config: Any) -> int | None:
    """The length above which LongRoPE rotates with other factors (arXiv:2402.13753), None without it.

    As transformers' own generate does, everything is then read again.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    original = getattr(config, "original_max_position_embeddings", None)
    return original or rope.get("original_max_position_embeddings")


def _nbytes(thing: Any) -> int:
    """Bytes of all tensors in a cache, however it is built."""
    if isinstance(thing, Tensor):
        return thing.numel() * thing.element_size()
    if isinstance(thing, dict):
        return sum(_nbytes(value) for value in thing.values())
    if isinstance(thing, list | tuple):
        return sum(_nbytes(value) for value in thing)
    own = type(thing).__module__.startswith("transformers.") and type(thing).__name__.endswith(
        ("Cache", "Layer")
    )
    return _nbytes(vars(thing)) if own else 0


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.float().cpu().numpy()


def _line(problem: Exception) -> str:
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= 300 else text[:297] + "..."
