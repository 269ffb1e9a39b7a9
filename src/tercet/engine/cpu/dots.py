"""Sums of products of bytes, by the fastest instructions that the processor has.

Weights are unsigned up to a limit, or signed; activations are signed and at least -127. The sums are whole
numbers, so they are the same by every way.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from tercet.engine.cpu.instructions import Instructions
from tercet.simd import I8, I16, I32, INTEGERS, Vectors

BYTES, HALF_BYTES = ir.VectorType(I8, 64), ir.VectorType(I8, 32)
HALF_WORDS, HALF_SUMS = ir.VectorType(I16, 16), ir.VectorType(I32, 8)
LARGEST_ACTIVATION = 127
LARGEST_WORD = 32767


class Dots:
    """Emits the sum, in each of 16 lanes, of the products of the lane's 4 bytes in several pairs of vectors.

    Args:
        v: Where the code goes.
        tokens: Number of rows of activations, each of which has sums of its own.
        limit: The largest absolute value of a weight.
        signed: Whether weights are signed.
        instructions: What to use.
    """

    def __init__(self, v: Vectors, tokens: int, limit: int, signed: bool, instructions: Instructions) -> None:
        self.v, self.signed, self.instructions = v, signed, instructions
        self.sums: list[Any] = [None] * tokens
        # AVX2 adds products in 16 bits, which hold so many of them.
        self._capacity = LARGEST_WORD // (2 * limit * LARGEST_ACTIVATION)
        self._words: list[list[Any]] = [[] for _ in range(tokens)]
        self._held = [0] * tokens

    def add(self, weights: ir.Value, activations: list[ir.Value]) -> None:
        """Add the products of 16 lanes of four weights with the activations of every token."""
        v, b = self.v, self.v.b
        if self.instructions == "vnni":
            # The instruction takes unsigned weights: 128 more than the signed ones.
            unsigned = b.xor(weights, v.integers(-0x7F7F7F80)) if self.signed else weights
            for token, x in enumerate(activations):
                before = v.integers(0) if self.sums[token] is None else self.sums[token]
                self.sums[token] = v.call("llvm.x86.avx512.vpdpbusd.512", INTEGERS, before, unsigned, x)
        elif self.instructions == "avx2":
            self._add_halves(self._halves(weights), activations)
        else:
            for token, x in enumerate(activations):
                before = v.integers(0) if self.sums[token] is None else self.sums[token]
                self.sums[token] = self._one_by_one(before, weights, x)

    @property
    def offset(self) -> int:
        """What was added to every weight: the sums are too large by this times the sum of the activations."""
        return 128 if self.instructions == "vnni" and self.signed else 0

    def total(self, token: int) -> ir.Value:
        """Return a token's sums as 16 integers of 32 bits."""
        self._flush(token)
        return self.sums[token]

    def _one_by_one(self, sums: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
        v, b = self.v, self.v.b
        for byte in range(4):
            up, down = v.integers(24 - 8 * byte), v.integers(24)
            left = b.shl(weights, up)
            left = b.ashr(left, down) if self.signed else b.lshr(left, down)
            sums = b.add(sums, b.mul(left, b.ashr(b.shl(x, up), down)))
        return sums

    def _halves(self, value: ir.Value) -> list[ir.Value]:
        """Return the lower and upper 32 of 64 bytes: two registers of AVX2."""
        b = self.v.b
        whole = b.bitcast(value, BYTES)
        undefined = ir.Constant(BYTES, ir.Undefined)
        orders = [ir.Constant(ir.VectorType(I32, 32), list(range(first, first + 32))) for first in (0, 32)]
        return [b.shuffle_vector(whole, undefined, order) for order in orders]

    def _add_halves(self, weights: list[ir.Value], activations: list[ir.Value]) -> None:
        v, b = self.v, self.v.b
        sizes = weights
        if self.signed:
            false = ir.Constant(ir.IntType(1), 0)
            sizes = [v.call("llvm.abs.v32i8", HALF_BYTES, half, false) for half in weights]
        for token, x in enumerate(activations):
            products = []
            for half, size, values in zip(weights, sizes, self._halves(x), strict=True):
                if self.signed:  # |w| * (x with the sign of w)
                    values = v.call("llvm.x86.avx2.psign.b", HALF_BYTES, values, half)
                products.append(v.call("llvm.x86.avx2.pmadd.ub.sw", HALF_WORDS, size, values))
            if self._held[token] == self._capacity:
                self._flush(token)
            held = self._words[token]
            self._words[token] = (
                [b.add(x, y) for x, y in zip(held, products, strict=True)] if held else products
            )
            self._held[token] += 1

    def _flush(self, token: int) -> None:
        """Add the sums of 16 bits to those of 32."""
        if self._held[token] == 0:
            return
        v, b = self.v, self.v.b
        ones = ir.Constant(HALF_WORDS, [1] * 16)
        low, high = (v.call("llvm.x86.avx2.pmadd.wd", HALF_SUMS, words, ones) for words in self._words[token])
        both = b.shuffle_vector(low, high, ir.Constant(INTEGERS, list(range(16))))
        self.sums[token] = both if self.sums[token] is None else b.add(self.sums[token], both)
        self._words[token], self._held[token] = [], 0
