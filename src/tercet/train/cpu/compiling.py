"""How the functions of a training step are compiled.

By numba, when first used; the machine code is kept beside the sources or in numba's cache directory.
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
    """Compiles a function whose array arguments never overlap.

    Not told so, LLVM writes a loop twice, sixteen at a time and one by one, and chooses when it runs by how
    near to each other the arrays lie. The two add up in different orders, so that one run in a hundred
    differed in a last digit.
    """

    def __init__(
        self, typing: Any, target: Any, library: Any, arguments: Any, result: Any, flags: Any, variables: Any
    ) -> None:
        flags = flags.copy()
        flags.noalias = True
        super().__init__(typing, target, library, arguments, result, flags, variables)


@functools.cache
def _sources() -> str:
    """A digest of everything that compiled code is made from."""
    digest = hashlib.sha256()
    package = Path(tercet.__file__).parent
    for file in (*sorted(Path(__file__).parent.glob("*.py")), package / "simd.py", package / "host.py"):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _kept(function: Any, **options: Any) -> Any:
    made = njit(cache=True, nogil=True, error_model="numpy", **options)(function)
    # numba looks at the age of the function's own file, and would go on with code of what it calls in others.
    made._cache._cache_file._source_stamp = _sources()
    return made


def compiled(function: Any, **changes: Any) -> Any:
    return _kept(function, **{"fastmath": FAST, "pipeline_class": Apart} | changes)


def addressing(function: Any) -> Any:
    """For functions that take addresses of arrays, about which nothing may be promised then.

    Only such may be called by compiled functions. Called by another, a function is compiled twice, alone and
    as a part of the other, and which of the two runs depends on whether the code was kept or just made. Here
    nothing may be reordered, so both compute the same; `compiled` ones differed in a last digit.
    """
    return _kept(function)


def compiled_without_nan(function: Any) -> Any:
    """For functions that look for a maximum: only where no number is NaN can that run sixteen at a time.

    A NaN in the network is still found: it goes on in the hidden states, which the head's gradient is
    a product of.
    """
    return compiled(function, fastmath=FAST | {"nnan"})


def inlined(function: Any) -> Any:
    return _kept(function, fastmath=FAST, inline="always")
