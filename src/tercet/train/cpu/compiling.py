"""Decorators that compile the functions of a training step.

numba compiles them when they are first used and stores the machine code beside the sources or in its cache
directory.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.compiler import Compiler

import tercet

FAST = {"reassoc", "contract", "nsz", "arcp"}


class Apart(Compiler):
    """A compiler for functions whose array arguments never overlap.

    Without this promise LLVM compiles a loop twice, sixteen elements at a time and one by one, and chooses
    between them at run time by the distance of the arrays. The two sum in different orders, so that one run
    in a hundred differed in a last digit.
    """

    def __init__(
        self, typing: Any, target: Any, library: Any, arguments: Any, result: Any, flags: Any, variables: Any
    ) -> None:
        flags = flags.copy()
        flags.noalias = True
        super().__init__(typing, target, library, arguments, result, flags, variables)


@functools.cache
def _sources() -> str:
    """Return a digest of all sources that compiled code depends on."""
    digest = hashlib.sha256()
    package = Path(tercet.__file__).parent
    for file in (*sorted(Path(__file__).parent.glob("*.py")), package / "simd.py", package / "host.py"):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _cached(function: Any, **options: Any) -> Any:
    dispatcher = njit(cache=True, nogil=True, error_model="numpy", **options)(function)
    # numba checks only the age of the function's own file, and would reuse stale code of functions in others.
    dispatcher._cache._cache_file._source_stamp = _sources()
    return dispatcher


def compiled(function: Any, **changes: Any) -> Any:
    """Compile a function of arrays that do not overlap; sums in it may be reordered.

    Other compiled functions must not call it; see `addressing`.
    """
    return _cached(function, **{"fastmath": FAST, "pipeline_class": Apart} | changes)


def addressing(function: Any) -> Any:
    """Compile a function that takes addresses of arrays, without the promise that arrays do not overlap.

    Only such functions may be called by compiled functions. A function that is called by another is compiled
    twice, alone and as a part of the other, and which of the two runs depends on whether the code was stored
    or just compiled. Here nothing may be reordered, so both give the same result; functions made by
    `compiled` differed in a last digit.
    """
    return _cached(function)


def compiled_without_nan(function: Any) -> Any:
    """Compile a function that computes a maximum, which runs sixteen at a time only if no number is NaN.

    A NaN in the network is still noticed: it spreads through the hidden states, which are a factor of the
    head's gradient.
    """
    return compiled(function, fastmath=FAST | {"nnan"})


def inlined(function: Any) -> Any:
    """Compile a function into its callers; sums in it may be reordered."""
    return _cached(function, fastmath=FAST, inline="always")
