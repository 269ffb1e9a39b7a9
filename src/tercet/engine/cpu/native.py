"""Functions compiled by numba, stored as machine code, and loaded again without numba.

Importing numba takes most of a second and a hundred megabytes; its compiled code needs neither. So each
function is stored as one object file, which llvmlite alone loads the next time. The directory's name is a
digest of everything the code depends on: the sources of this package, `simd` and `host`, the compiler and
the processor.

The code that runs always comes from the stored object, also right after compiling. So a function that is
compiled both alone and as a part of another has one result, whether the file existed or not; the rule of
`tercet.train.cpu.compiling` about functions called by others is not needed here.
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
DIRECTORY_VARIABLE = (
    "TERCET_KERNELS"  # environment variable: where to store compiled code instead of the cache
)

_lock = threading.RLock()
_engine: Any = None
_announced = False


@functools.cache
def _directory() -> Path:
    """Return the directory for code compiled from these sources, by this compiler, for this processor."""
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
    """Return the address in memory of the compiled function ``name`` of `programs`, or of `kernels.run`.

    The first time on a machine the function is compiled, which is reported.
    """
    with _lock:
        path = _directory() / f"{name}.o"
        program = _read(path)
        if program is None:
            program = _compile(name)
            try:
                write_atomic(path, hashlib.sha256(program).hexdigest().encode() + program)
            except (OSError, UserError) as problem:
                say(f"Could not store the compiled kernels ({problem}); the next start compiles them again.")
        symbol, _, code = program.partition(b"\n")
        return _link(symbol.decode(), code)


def _read(path: Path) -> bytes | None:
    """Return the program stored in a file behind its checksum; None if it is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, program = content[:64], content[64:]
    return program if hashlib.sha256(program).hexdigest().encode() == digest else None


def _compile(name: str) -> bytes:
    """Compile a function: its symbol, a line break, and its object file."""
    global _announced
    if not _announced and not _directory().is_dir():
        say("Compiling the CPU kernels for this machine: about fifteen seconds, once.")
    _announced = True
    from numba import njit, types

    from tercet.engine.cpu import kernels, programs

    function = kernels.run if name == "run" else programs.program(name)
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
    """Load an object file and return the address of its function."""
    global _engine
    if _engine is None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine()
        _engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        # This function destroys arrays that own memory. Ours are views, so it is never called.
        llvm.add_symbol(
            "NRT_MemInfo_call_dtor", ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p).value
        )
    _engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    _engine.finalize_object()
    place = int(_engine.get_function_address(symbol))
    if place == 0:
        raise RuntimeError(f"the compiled function {symbol} is missing after linking")
    return place


@functools.cache
def function(name: str, arguments: int) -> Callable[..., int]:
    """Return a compiled function of ``arguments`` integers for calls from Python; it runs without the GIL."""
    kind = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * arguments)
    native = kind(address(name))

    def call(*values: int) -> int:
        # numba's calling convention: addresses for the result and for an exception; none is ever raised.
        result, problem = ctypes.c_int64(0), ctypes.c_void_p()
        native(ctypes.addressof(result), ctypes.addressof(problem), *values)
        return result.value

    return call
