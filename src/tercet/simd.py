"""Vector code of sixteen float32 lanes inside numba.

A kernel's inner loop is written as LLVM instructions on vectors of 16 lanes, through numba's ``@intrinsic``.
LLVM maps such a vector to the registers that the processor has: one of AVX-512, two of AVX2, four of NEON.
So one source serves every machine, and the speed does not depend on how well a compiler vectorises a scalar
loop. Only `dot2` and `narrow` have two forms each, because some processors have one instruction for
what otherwise takes ten.

Addresses pass between Python and kernels as 64-bit integers.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tercet.host import has_bfloat_dot, has_half

LANES = 16

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
VECTOR = ir.VectorType(F32, LANES)
INTEGERS = ir.VectorType(I32, LANES)


class Vectors:
    """Emits vector instructions at the current position of an ``ir.IRBuilder``.

    Methods take and return values of the program being built, not numbers, unless their types say otherwise.
    """

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    # Memory

    def address(self, base: ir.Value, offset: ir.Value | int = 0) -> ir.Value:
        """Return ``base`` plus ``offset`` bytes."""
        offset = offset if isinstance(offset, ir.Value) else I64(offset)
        return self.b.add(base, offset)

    def load(self, address: ir.Value, kind: ir.Type, align: int = 1) -> ir.Value:
        """Load a value of a type; the address is a multiple of ``align`` bytes."""
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=align)

    def store(self, value: ir.Value, address: ir.Value, align: int = 1) -> None:
        """Store a value; the address is a multiple of ``align`` bytes."""
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=align)

    def fetch(self, address: ir.Value) -> None:
        """Prefetch the line of memory at ``address`` into the cache; an invalid address has no effect."""
        pointer = self.b.inttoptr(address, I8.as_pointer())
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(3), I32(1))  # to read, keep, data

    def floats(self, address: ir.Value) -> ir.Value:
        """Load 16 float32."""
        return self.load(address, VECTOR, 4)

    def halves(self, address: ir.Value) -> ir.Value:
        """Load 16 float16 as float32."""
        if has_half():
            return self.b.fpext(self.load(address, ir.VectorType(F16, LANES), 2), VECTOR)
        b, raw = self.b, self.b.zext(self.load(address, ir.VectorType(I16, LANES), 2), INTEGERS)
        # The bits of a float32 that is 2**112 times too small, also where the float16 is subnormal; finite values only.
        size = b.bitcast(b.shl(b.and_(raw, self.integers(0x7FFF)), self.integers(13)), VECTOR)
        exact = b.bitcast(b.fmul(size, self.constant(2.0**112)), INTEGERS)
        sign = b.shl(b.and_(raw, self.integers(0x8000)), self.integers(16))
        return b.bitcast(b.or_(exact, sign), VECTOR)

    def bfloats(self, address: ir.Value) -> ir.Value:
        """Load 16 bfloat16 as float32, whose upper halves they are."""
        raw = self.load(address, ir.VectorType(I16, LANES), 2)
        wide = self.b.shl(self.b.zext(raw, INTEGERS), self.splat(I32(16)))
        return self.b.bitcast(wide, VECTOR)

    # Values

    def number(self, bits: ir.Value) -> ir.Value:
        """Return a float in every lane, from the integer that `tercet.host.bits` made of it."""
        return self.splat(self.b.bitcast(self.b.trunc(bits, I32), F32))

    def splat(self, value: ir.Value) -> ir.Value:
        """Return a vector with ``value`` in every lane."""
        first = self.b.insert_element(
            ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined), value, I32(0)
        )
        zeros = ir.Constant(INTEGERS, [0] * LANES)
        return self.b.shuffle_vector(first, ir.Constant(first.type, ir.Undefined), zeros)

    def constant(self, value: float) -> ir.Value:
        """Return a vector of 16 equal floats."""
        return ir.Constant(VECTOR, [value] * LANES)

    def integers(self, value: int) -> ir.Value:
        """Return a vector of 16 equal 32-bit integers."""
        return ir.Constant(INTEGERS, [value] * LANES)

    def call(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        """Call a function by name, such as an LLVM intrinsic."""
        kind = ir.FunctionType(result, [value.type for value in arguments])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), arguments)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """Return a * b + c, rounded once."""
        return self.call("llvm.fma.v16f32", VECTOR, a, b, c)

    def largest(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Return the larger of two floats in each lane; ``b`` where one is NaN."""
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def absolute(self, a: ir.Value) -> ir.Value:
        """Return the absolute value of each lane."""
        return self.call("llvm.fabs.v16f32", VECTOR, a)

    def round(self, a: ir.Value) -> ir.Value:
        """Round each lane to the nearest integer, ties to even, as a float."""
        return self.call("llvm.roundeven.v16f32", VECTOR, a)

    def maximum(self, a: ir.Value) -> ir.Value:
        """Return the largest lane."""
        return self.call("llvm.vector.reduce.fmax.v16f32", F32, a)

    def total(self, a: ir.Value) -> ir.Value:
        """Return the sum of the lanes; halves are added first, in the same order on every machine."""
        undefined = ir.Constant(VECTOR, ir.Undefined)
        for step in (8, 4, 2, 1):
            order = [(lane + step) % LANES for lane in range(LANES)]
            a = self.b.fadd(a, self.b.shuffle_vector(a, undefined, ir.Constant(INTEGERS, order)))
        return self.b.extract_element(a, I32(0))

    def exp(self, x: ir.Value) -> ir.Value:
        """Return e to the power of each lane, within 3 units in the last place; exactly 0 below -87, 1 at 0.

        The result is 2**n * e**r, where r = x - n ln 2 is computed in two parts (Cody and Waite), e**r by its
        Taylor series to the seventh power (|r| <= 0.35, so the remainder is below 1e-8), and 2**n by adding n to
        the exponent's bits. Above 88 the result is that of 88.
        """
        small = self.b.fcmp_ordered("<", x, self.constant(-87.0))
        x = self.b.select(small, self.constant(-87.0), x)
        x = self.b.select(self.b.fcmp_ordered(">", x, self.constant(88.0)), self.constant(88.0), x)
        n = self.round(self.b.fmul(x, self.constant(1.4426950408889634)))
        r = self.fma(n, self.constant(-0.693145751953125), x)
        r = self.fma(n, self.constant(-1.4286068203094172e-6), r)
        power = self.constant(1 / 5040)
        for factor in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
            power = self.fma(power, r, self.constant(factor))
        bits = self.b.shl(self.b.add(self.b.fptosi(n, INTEGERS), self.integers(127)), self.integers(23))
        return self.b.select(small, self.constant(0.0), self.b.fmul(power, self.b.bitcast(bits, VECTOR)))

    def tanh(self, x: ir.Value) -> ir.Value:
        """Return 1 - 2 / (e**2x + 1), which does not overflow, since `exp` is at most e**88."""
        power = self.exp(self.b.fadd(x, x))
        two, unit = self.constant(2.0), self.constant(1.0)
        return self.b.fsub(unit, self.b.fdiv(two, self.b.fadd(power, unit)))

    def dot2(self, sums: ir.Value, left: ir.Value, right: ir.Value, native: bool = True) -> ir.Value:
        """Add to each lane of ``sums`` the products of the lane's two bfloat16 in the other two.

        With ``native`` this is one instruction where the machine has it. It rounds once, after both products,
        and treats subnormal numbers as zero; otherwise each product is added with a rounding of its own.
        """
        if native and has_bfloat_dot():
            return self.call("llvm.x86.avx512bf16.dpbf16ps.512", VECTOR, sums, left, right)
        upper, shift = self.integers(-65536), self.integers(16)
        for part in (partial(self.b.shl, rhs=shift), partial(self.b.and_, rhs=upper)):
            a, b = (self.b.bitcast(part(x), VECTOR) for x in (left, right))
            sums = self.fma(a, b, sums)
        return sums

    def narrow(self, a: ir.Value, native: bool = True) -> ir.Value:
        """Round each lane to the nearest bfloat16, ties to even, and return its bits; ``native`` as for `dot2`."""
        halves = ir.VectorType(I16, LANES)
        if native and has_bfloat_dot():
            return self.call("llvm.x86.avx512bf16.cvtneps2bf16.512", halves, a)
        bits = self.b.bitcast(a, INTEGERS)
        odd = self.b.and_(self.b.lshr(bits, self.integers(16)), self.integers(1))
        rounded = self.b.add(bits, self.b.add(odd, self.integers(0x7FFF)))
        return self.b.trunc(self.b.lshr(rounded, self.integers(16)), halves)

    # Control

    def variable(self, kind: ir.Type, value: ir.Value) -> ir.Value:
        """Return a place on the stack that holds ``value`` and may be stored to; LLVM makes it a register."""
        place = cgutils.alloca_once(self.b, kind)
        self.b.store(value, place)
        return place

    @contextmanager
    def loop(self, count: ir.Value | int) -> Iterator[ir.Value]:
        """Emit a loop around the body; yields the index, 64 bits, which runs from 0 to ``count`` - 1."""
        count = count if isinstance(count, ir.Value) else I64(count)
        with cgutils.for_range(self.b, count, intp=I64) as loop:
            yield loop.index


def kernel(arguments: int) -> Callable[[Callable[..., None]], Any]:
    """Make ``body(v: Vectors, *values)`` callable from compiled code with that many integers."""

    def wrap(body: Callable[..., None]) -> Any:
        signature = types.void(*[types.int64] * arguments)

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            body(Vectors(builder), *args)
            return context.get_dummy_value()

        names = [f"a{number}" for number in range(arguments)]
        namespace: dict[str, Any] = {"result": (signature, codegen)}
        # numba takes the number of arguments from the function's signature, so it needs named parameters.
        exec(f"def {body.__name__}(context, {', '.join(names)}): return result", namespace)
        return intrinsic(namespace[body.__name__])

    return wrap


@kernel(0)
def pause(v: Vectors) -> None:
    """Emit the instruction that tells the processor that this thread waits in a loop."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        v.call("llvm.x86.sse2.pause", ir.VoidType())
    elif machine in ("arm64", "aarch64"):
        v.call("llvm.aarch64.hint", ir.VoidType(), I32(1))  # yield


def caller(arguments: int) -> Any:
    """Build ``call(address, ...)``, which calls a compiled function of that many integers by its address.

    It follows numba's calling convention: the first two arguments point to places for a result and for an
    exception.
    """
    pointer = I64.as_pointer()
    kind = ir.FunctionType(I32, [pointer, pointer] + [I64] * arguments)

    @kernel(arguments + 1)
    def call(v: Vectors, address: Any, *values: Any) -> None:
        places = [cgutils.alloca_once(v.b, I64) for _ in range(2)]
        v.b.call(v.b.inttoptr(address, kind.as_pointer()), [*places, *values])

    return call


@intrinsic
def atomic_add(context: Any, address: Any, amount: Any) -> Any:
    """Add to a 64-bit integer in memory and return its value before, sequentially consistent for all threads."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        place = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", place, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_load(context: Any, address: Any) -> Any:
    """Load a 64-bit integer that other threads change, sequentially consistent."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.load_atomic(builder.inttoptr(args[0], I64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), codegen


def _view(kind: Any) -> Any:
    """Build ``pointer(address)``, which makes a typed pointer of an integer."""

    @intrinsic
    def pointer(context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            return builder.inttoptr(args[0], context.get_value_type(types.CPointer(kind)))

        return types.CPointer(kind)(types.int64), codegen

    return pointer


float_pointer = _view(types.float32)
integer_pointer = _view(types.int64)
