"""A `Backend` over any causal language model of the transformers library.

For architectures that Tercet's own network does not cover: `transformers:REF`. Each sequence has a cache
of the library's own (keys and values, or the state of a recurrent network) and is fed alone. That is
correct for every architecture, and slower than Tercet's own network, whose sequences share a batch.

The abilities of a cache differ between architectures and are not documented: some recurrent networks
silently forget their state when several tokens are fed at once, and some models have no cache at all.
A model is therefore tried once on a few tokens, and then run in the fastest mode that gives the same
logits as feeding all tokens at once.
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

CACHE_BYTES = 1 << 30  # the default memory for caches: fits a laptop beside the model
LOGIT_VALUES = 1 << 25  # logits computed at a time when scoring: 128 MiB in float32
FORWARD_TOKENS = 4096  # in one forward pass: enough to keep any matrix product busy; bounds activations
UNBOUNDED = 1 << 17  # positions of a model without a limit (recurrent, or relative positions)
MIN_PAGE = 64  # positions; pages only count memory here, so larger ones cost nothing
MAX_PAGES = 1 << 16  # the engine keeps a list of them
CHUNKS = 256  # in one call; they are fed one after another in any case
POSITION_FIELDS = ("max_position_embeddings", "max_seq_len", "n_positions", "n_ctx", "seq_length")
CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")  # "cache" since transformers 5.24
TRIED, SPLIT = 12, 7  # tokens of the trial, and of its first part: longer than any convolution's kernel

# How a sequence is continued. "chunks": several tokens after a cache; "steps": one token at a time after a
# cache, because the model forgets its state otherwise; "recompute": all tokens each time, without a cache.
Mode = Literal["chunks", "steps", "recompute"]


@dataclass
class _Sequence:
    """The tokens of one sequence, and the library's cache of them."""

    tokens: list[int] = field(default_factory=list)
    cache: Any = None  # of all ``tokens``; None when they have to be fed again


class TransformersBackend:
    """A `Backend` over a model of transformers. Pages only count memory; they hold nothing.

    Attributes:
        model: the library's.
        mode: how a sequence is continued.
        cache_bytes_per_token: bytes that each token adds to a sequence's cache.

    Raises:
        UserError: the model's logits are not finite, or it is no causal language model.
    """

    shares_pages: bool = False  # sequences cannot share a page's keys and values

    def __init__(self, model: Any, cache_bytes: int = CACHE_BYTES) -> None:
        """Try the model on a few tokens, to choose its mode and to measure its cache.

        Args:
            model: an AutoModelForCausalLM.
            cache_bytes: the memory for the caches of all sequences; one sequence of the model's full
                length always fits.
        """
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
        parameters = inspect.signature(model.forward).parameters
        self._selects_logits = "logits_to_keep" in parameters  # computes only the requested logits
        self._cache_names = [name for name in CACHE_NAMES if name in parameters]
        self.vocab_size = int(config.vocab_size)
        fixed, per_token = self._try()
        self.cache_bytes_per_token = per_token
        self.max_tokens = min(self.max_positions, FORWARD_TOKENS if self.mode == "chunks" else UNBOUNDED)
        self.max_chunks = CHUNKS
        # The memory of a page includes the part of a cache that does not grow, so a page is made long enough
        # that this part is at most half of it. A state that never grows is one page.
        longest = fixed // per_token if per_token else self.max_positions
        self.page_size = min(max(MIN_PAGE, longest), self.max_positions)
        pages = cache_bytes // max(1, fixed + per_token * self.page_size)
        self.num_pages = min(max(1, pages), MAX_PAGES)
        if known is None and per_token:
            self.max_positions = min(self.max_positions, self.num_pages * self.page_size)
        self.num_pages = max(self.num_pages, -(-self.max_positions // self.page_size))

    @torch.inference_mode()
    def feed(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """Return the logits [outputs, V], in order of chunks."""
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
        """Return the natural log-probability of every target, and whether it is the likeliest there."""
        values: list[Tensor] = []
        likeliest: list[Tensor] = []
        place = 0
        for chunk in chunks:
            for part in self._logits(chunk.sequence, chunk.tokens, chunk.start, chunk.outputs):
                logits = part.float()
                part_targets = targets[place : place + len(logits)]
                place += len(logits)
                rows = self._index([row for row, tokens in enumerate(part_targets) for _ in tokens])
                ids = self._index([token for tokens in part_targets for token in tokens])
                values.append(logits[rows, ids] - logits.logsumexp(-1)[rows])
                likeliest.append(logits.argmax(-1)[rows] == ids)
        if not values:
            return np.zeros(0, np.float32), np.zeros(0, np.bool_)
        return _numpy(torch.cat(values)), torch.cat(likeliest).cpu().numpy()

    @torch.inference_mode()
    def hidden(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """Return the decoder's output [outputs, H]; whole sequences are fed again for it.

        Raises:
            UserError: the model's class does not separate its decoder from the head.
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
        """Return the decoder's output [T, H] for a whole sequence."""
        decoder = self.model.base_model
        batch = None
        if decoder is not self.model:
            output = decoder(input_ids=self._index([tokens]), use_cache=False, return_dict=True)
            batch = output.get("last_hidden_state")
        if batch is None:
            raise UserError(
                f"{type(self.model).__name__} of transformers does not expose the input of its head, "
                "so it gives no embeddings; use another model for them"
            )
        states: Tensor = batch[0]
        return states

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Raise NotImplementedError: the engine never copies pages when ``shares_pages`` is False."""
        raise NotImplementedError("a cache of transformers can't be shared between sequences")

    def add_adapter(self, directory: str | Path) -> int:
        """Raise UserError: a model of transformers computes each sequence with the weights it has."""
        raise UserError(
            f"{directory}: adapters can't be chosen by request for a model that transformers runs; "
            "merge it first with tercet export, or leave out 'transformers:'"
        )

    def release(self, sequence: int) -> None:
        """Forget a sequence and free its cache."""
        self._sequences.pop(sequence, None)

    def _index(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """Return the values as an index on the model's device."""
        return torch.tensor(values, dtype=torch.long, device=self.model.device)

    def _logits(
        self, number: int, tokens: Sequence[int], start: int, outputs: Sequence[int]
    ) -> Iterator[Tensor]:
        """Yield the logits [n, V] of the outputs in order, with n V at most `LOGIT_VALUES`."""
        sequence = self._rewound(number, start)
        sequence.tokens.extend(tokens)
        whole = sequence.tokens
        positions = [start + index for index in outputs]
        # An exception half-way must not leave a cache that does not belong to the tokens.
        cache, sequence.cache = sequence.cache, None
        if self._rotated_long(start) != self._rotated_long(len(whole)):
            cache = None  # its keys were rotated with the factors for short texts
        limit = max(1, LOGIT_VALUES // self.vocab_size)
        in_parts = len(positions) > limit or not self._selects_logits
        if self.mode == "recompute" or (in_parts and (self.mode == "steps" or self._longrope is not None)):
            for first in range(0, len(positions), limit):
                group = positions[first : first + limit]
                end = group[-1] + 1 if self._longrope is None else len(whole)
                yield self._forward(whole[:end], None, group)[0]
            return
        begin = start if cache is not None else 0
        step = limit if in_parts else len(whole) - begin
        if self.mode == "steps" and cache is not None:
            step = 1
        for first in range(begin, len(whole), step):
            piece = whole[first : first + step]
            inside = [position - first for position in positions if first <= position < first + len(piece)]
            logits, cache = self._forward(piece, cache, inside)
            if inside:
                yield logits
        sequence.cache = cache

    def _rewound(self, number: int, start: int) -> _Sequence:
        """Return the sequence cut to its first ``start`` tokens, with a cache of exactly these or none."""
        sequence = self._sequences.setdefault(number, _Sequence())
        surplus = len(sequence.tokens) - start
        if surplus < 0:
            raise ValueError(f"sequence {number} holds {len(sequence.tokens)} tokens; it is fed from {start}")
        if surplus:
            cache, sequence.cache = sequence.cache, None
            same = self._rotated_long(start) == self._rotated_long(len(sequence.tokens))
            del sequence.tokens[start:]
            if start and same and self._crops and getattr(cache, "is_croppable", False):
                # A sliding window raises when it has dropped positions that are needed again.
                with contextlib.suppress(RuntimeError, ValueError):
                    cache.crop(-surplus)
                    sequence.cache = cache
        return sequence

    def _rotated_long(self, length: int) -> bool:
        """Return whether keys of a sequence of this length are rotated with LongRoPE's long factors."""
        return self._longrope is not None and length > self._longrope

    def _forward(self, tokens: list[int], cache: Any, outputs: list[int]) -> tuple[Tensor, Any]:
        """Feed tokens that follow the cache; return the logits [outputs, V] and the extended cache."""
        options: dict[str, Any] = {} if cache is None else {self._cache_name: cache}
        places = self._index(outputs)
        if self._selects_logits:
            options["logits_to_keep"] = places if outputs else 1
        ids = self._index([tokens])
        # A single sequence without padding needs no mask.
        output = self.model(input_ids=ids, use_cache=self.mode != "recompute", return_dict=True, **options)
        logits: Tensor = output.logits[0]
        return logits if self._selects_logits else logits[places], self._cache_of(output)

    def _cache_of(self, output: Any) -> Any:
        """Return the cache in the output of a forward pass, and note the name of its field."""
        if self.mode == "recompute":
            return None
        for name in self._cache_names:
            if (cache := output.get(name)) is not None:
                self._cache_name = name
                return cache
        raise ValueError("the model returned no cache")

    # The trial

    @torch.inference_mode()
    def _try(self) -> tuple[int, int]:
        """Choose ``mode``; return the bytes of an empty cache, and the bytes that each token adds."""
        ids = np.random.default_rng(0).integers(0, self.vocab_size, TRIED).tolist()
        self.mode = "recompute"
        with _quiet():
            expected, _ = self._forward(ids, None, list(range(TRIED)))
            self.vocab_size = expected.shape[-1]
            dtype = str(expected.dtype).removeprefix("torch.")
            if not torch.isfinite(expected).all():
                raise UserError(f"the model's logits are not finite in {dtype}; use another `dtype`")
            candidates: list[tuple[Mode, bool]] = [("chunks", True), ("chunks", False), ("steps", False)]
            for self.mode, self._crops in candidates:
                # A model without support for a mode may raise anything.
                with contextlib.suppress(Exception):
                    if (sizes := self._cache_sizes(ids, expected)) is not None:
                        return sizes
            self.mode, self._crops = "recompute", False
            first, _ = self._forward(ids[:SPLIT], None, list(range(SPLIT)))
        if not self._agrees(first, expected[:SPLIT]):
            name = type(self.model).__name__
            raise UserError(
                f"{name} is no causal language model: its output at a token depends on later tokens"
            )
        return 0, 0

    def _cache_sizes(self, ids: list[int], expected: Tensor) -> tuple[int, int] | None:
        """Feed the tokens in parts in the present mode; return the bytes as `_try`.

        Return None unless the logits agree with ``expected`` [tokens, V].
        """
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
        if not (self._agrees(torch.cat(fed), expected) and self._agrees(again, expected[SPLIT:])):
            return None
        per_token = (after - before) // (TRIED - SPLIT)
        return max(0, after - per_token * TRIED), per_token

    def _agrees(self, logits: Tensor, expected: Tensor) -> bool:
        """Return whether logits are equal up to rounding: in a wrong mode they differ by about their spread."""
        bound = 1e-3 if self.model.dtype == torch.float32 else 5e-2
        logits, expected = logits.float(), expected.float()
        spread = (expected - expected.mean(-1, keepdim=True)).norm()
        return bool((logits - expected).norm() <= bound * spread)


def load_transformers(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    cache_bytes: int = CACHE_BYTES,
) -> TransformersBackend:
    """Return the model of a checkpoint directory as a `Backend`.

    Only safetensors are read, and no code of the directory is run.

    Args:
        directory: holds the checkpoint.
        dtype: of the weights; None for the type on disk.
        device: that computes the model.
        cache_bytes: the memory for the caches of all sequences.

    Raises:
        UserError: transformers is not installed or does not know the architecture, or the directory
            holds no complete model.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "transformers:REF needs the transformers library: pip install 'tercet[transformers]'"
        ) from error
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
    except Exception as error:  # the library raises KeyError, ValueError, OSError, RuntimeError, ...
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{directory} needs Python code of its own (config.json: auto_map), which is never run"
            ) from error
        raise UserError(f"transformers cannot load {directory}: {_line(error)}") from error
    if missing := sorted(report["missing_keys"]):  # the library would use random weights for them
        raise UserError(
            f"{directory}: tensor {missing[0]} is missing from the weights"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
        )
    return TransformersBackend(model.to(device), cache_bytes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Switch off transformers' warnings and progress bars; errors are raised as exceptions."""
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
    """Return the length above which LongRoPE rotates with other factors (arXiv:2402.13753); None without it.

    All tokens are then fed again, as in transformers' own generate.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    original = getattr(config, "original_max_position_embeddings", None)
    return original or rope.get("original_max_position_embeddings")


def _nbytes(thing: Any) -> int:
    """Return the bytes of all tensors in a cache of any class."""
    if isinstance(thing, Tensor):
        return thing.numel() * thing.element_size()
    if isinstance(thing, dict):
        return sum(_nbytes(value) for value in thing.values())
    if isinstance(thing, list | tuple):
        return sum(_nbytes(value) for value in thing)
    cache_class = type(thing)
    is_cache = cache_class.__module__.startswith("transformers.") and cache_class.__name__.endswith(
        ("Cache", "Layer")
    )
    return _nbytes(vars(thing)) if is_cache else 0


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    """Return the tensor as a float32 array."""
    return tensor.float().cpu().numpy()


def _line(error: Exception) -> str:
    """Return the message of an error in one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
