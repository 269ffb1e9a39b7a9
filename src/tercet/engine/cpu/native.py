"""Functions compiled by numba, kept as machine code, and loaded again without numba.

numba takes most of a second and a hundred megabytes to import; its compiled code needs neither. So
each function is kept as one object file, and llvmlite alone puts it into memory next time. The file's
place says what it was made from: the sources of this package and of `simd`, the compiler and the processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from tercet.errors import UserError
from tercet.files import cache_directory, write_atomic
from tercet.host import host_features
from tercet.progress import say

SOURCES = Path(__file__).parent
DIRECTORY_VARIABLE = "TERCET_KERNELS"  # where compiled code is kept, if not in the user's cache

_lock = threading.RLock()
_engine: Any = None
_announced = False


@functools.cache
def _directory() -> Path:
    digest = hashlib.sha256()
    package = SOURCES.parent.parent
    for file in (*sorted(SOURCES.glob("*.py")), package / "simd.py", package / "host.py"):
        digest.update(file.read_bytes())
    for part in (
        version("numba"),
        version("llvmlite"),
        llvm.get_host_cpu_name(),
        str(sorted(host_features())),
    ):
        digest.update(part.encode())
    home = os.environ.get(DIRECTORY_VARIABLE)
    directory = cache_directory() / "kernels" if home is None else Path(home)
    return directory / digest.hexdigest()[:16]


@functools.cache
def address(name: str) -> int:
    """Where the compiled function ``name`` of `programs`, or `kernels.run`, is in memory.

    Compiles it, and says so, the first time on a machine.
    """
    with _lock:
        path = _directory() / f"{name}.o"
        kept = _read(path)
        if kept is None:
            kept = _compile(name)
            try:
                write_atomic(path, hashlib.sha256(kept).hexdigest().encode() + kept)
            except (OSError, UserError) as problem:
                say(f"The compiled kernels could not be kept ({problem}); they are compiled again next time.")
        symbol, _, code = kept.partition(b"\n")
        return _link(symbol.decode(), code)


def _read(path: Path) -> bytes | None:
    """What was kept in a file, behind its checksum; None where it is not there or not whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, kept = content[:64], content[64:]
    return kept if hashlib.sha256(kept).hexdigest().encode() == digest else None


def _compile(name: str) -> bytes:
    """The function's symbol, a line break, and its object file."""
    global _announced
    if not _announced and not _directory().is_dir():
        say("Compiling the CPU kernels for this machine: about fifteen seconds, once.")
    _announced = True
    from numba import njit, types

    from tercet.engine.cpu import kernels, programs

    function = kernels.run if name == "run" else getattr(programs, name)
    arguments = [types.int64] * function.__code__.co_argcount
    result = types.int64 if name == "run" else types.void
    compiled = njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)
    compiled.compile(result(*arguments))
    [overload] = compiled.overloads.values()
    _, kind, (code, _) = overload.library.serialize_using_object_code()
    assert kind == "object"
    symbol: str = overload.fndesc.llvm_func_name
    return symbol.encode() + b"\n" + bytes(code)


def _link(symbol: str, code: bytes) -> int:
    global _engine
    if _engine is None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine()
        _engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        # Destroys arrays that own memory. Ours are views, which own none, so it is never called.
        llvm.add_symbol(
            "NRT_MemInfo_call_dtor", ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p).value
        )
    _engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    _engine.finalize_object()
    found = int(_engine.get_function_address(symbol))
    if found == 0:
        raise RuntimeError(f"the compiled function {symbol} was not found after linking")
    return found


@functools.cache
def function(name: str, arguments: int) -> Callable[..., int]:
    """The compiled function ``name`` of so many integers, to be called from Python; runs without the GIL."""
    kind = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * arguments)
    native = kind(address(name))

    def call(*values: int) -> int:
        # numba's convention: where to put the result, where an exception; none is ever raised.
        result, problem = ctypes.c_int64(0), ctypes.c_void_p()
        native(ctypes.addressof(result), ctypes.addressof(problem), *values)
        return result.value

    return call
