"""Matrix products of bfloat16 with float32 sums, for processors that multiply pairs of bfloat16 (AVX-512 BF16).

One instruction adds to each of 16 sums the products of two pairs: a pair of one row, the same in all lanes, times
pairs of 16 columns. So a matrix is stored in pairs along the summed dimension, as 32-bit words, and its columns
are grouped in panels of 64:

    panels [ceil(columns / 64), pairs, 64] uint32, the first of a pair in the lower half; zeros beyond the end.

A tile of 4 rows and 64 columns keeps its 16 sums in registers from the first pair to the last. Weights are laid
out this way once a step, for both directions; rows of activations already have their pairs side by side. The
gradient of a weight is a sum over tokens. For it both sides are laid out, some hundred tokens at a time, and the
result is added to float32 sums without an intermediate rounding.

On processors with an instruction for whole tiles (AMX), and in float32, PyTorch's products are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from llvmlite import ir
from numpy.typing import NDArray
from torch import Tensor

from tercet.host import has_bfloat_dot, has_bfloat_tiles
from tercet.simd import I16, I32, I64, INTEGERS, LANES, VECTOR, Vectors, kernel
from tercet.train.cpu.compiling import addressing
from tercet.train.cpu.kernels import put

PANEL = 64  # columns that are stored together
ROWS = 4  # of a tile: its 4 x 4 vectors of sums hide the latency of one, and each load serves several of them
BLOCK = 128  # rows that go through all panels before the next rows do, so that they stay in the cache
TOKENS = 256  # tokens that are laid out at a time for a gradient
VECTORS = PANEL // LANES


def raw(tensor: Tensor) -> NDArray[Any]:
    """View a tensor's memory as a numpy array; bfloat16 as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


# Tiles. Addresses and strides in bytes, as integers.


def _tile(rows: int, write: str, vectors: int = VECTORS) -> Any:
    """Build the kernel (left, row_step, pair_step, panel, pairs, out, out_step) that multiplies a tile by a panel.

    Args:
        rows: Rows of the tile.
        write: "narrow" rounds to bfloat16, "single" stores float32, "add" adds to float32.
        vectors: Vectors of the panel's columns to compute, from the first on.
    """

    @kernel(7)
    def tile(
        v: Vectors, left: Any, row_step: Any, pair_step: Any, panel: Any, pairs: Any, out: Any, out_step: Any
    ) -> None:
        b = v.b
        sums = [[v.variable(VECTOR, v.constant(0.0)) for _ in range(vectors)] for _ in range(rows)]
        starts = [v.address(left, b.mul(row_step, I64(row))) for row in range(rows)]
        if write == "add":  # prefetch the previous sums while the products are computed
            for row in range(rows):
                for i in range(vectors):
                    v.fetch(v.address(b.add(out, b.mul(out_step, I64(row))), 64 * i))
        with v.loop(pairs) as pair:
            base = v.address(panel, b.mul(pair, I64(4 * PANEL)))
            columns = [v.load(v.address(base, 64 * i), INTEGERS, 4) for i in range(vectors)]
            offset = b.mul(pair, pair_step)
            for row in range(rows):
                both = v.splat(v.load(v.address(starts[row], offset), I32, 2))
                for i in range(vectors):
                    b.store(v.dot2(b.load(sums[row][i]), both, columns[i]), sums[row][i])
        for row in range(rows):
            place = v.address(out, b.mul(out_step, I64(row)))
            for i in range(vectors):
                value = b.load(sums[row][i])
                if write == "narrow":
                    v.store(v.narrow(value), v.address(place, 32 * i), 2)
                else:
                    at = v.address(place, 64 * i)
                    v.store(b.fadd(v.floats(at), value) if write == "add" else value, at, 4)

    return tile


narrow, narrow_one = _tile(ROWS, "narrow"), _tile(1, "narrow")
single, single_one = _tile(ROWS, "single"), _tile(1, "single")
single_half = _tile(ROWS, "single", VECTORS // 2)  # for the last panel where half of it is empty
add = _tile(ROWS, "add")


# Laying out


@kernel(3)
def _interleave(v: Vectors, upper: Any, lower: Any, out: Any) -> None:
    """Emit PANEL pairs of bfloat16, each of one number from ``upper`` and one from ``lower``."""
    halves, b = ir.VectorType(I16, LANES), v.b
    for i in range(VECTORS):
        first, second = (
            b.zext(v.load(v.address(line, 32 * i), halves, 2), INTEGERS) for line in (upper, lower)
        )
        v.store(b.or_(first, b.shl(second, v.integers(16))), v.address(out, 64 * i), 4)


@addressing
def pair_rows(matrix, panels, first):
    """Set panels[., first + p, c] = the pair matrix[2 p, c], matrix[2 p + 1, c]; pair an odd last row with zeros.

    ``matrix`` is bfloat16 and contiguous along its rows. Whole panels are written, with zeros beyond the last
    column.
    """
    rows, columns = matrix.shape
    source, step = matrix.ctypes.data, matrix.strides[0]
    lines = np.zeros((2, PANEL), np.uint16)
    low, high = lines.ctypes.data, lines.ctypes.data + 2 * PANEL
    for start in range(0, columns, PANEL):
        width = min(PANEL, columns - start)
        panel = panels[start // PANEL]
        out, out_step = panel.ctypes.data + first * panel.strides[0], panel.strides[0]
        for p in range((rows + 1) // 2):
            paired = 2 * p + 1 < rows
            if width == PANEL and paired:
                at = source + 2 * p * step + 2 * start
                _interleave(at, at + step, out + p * out_step)
            else:
                lines[:, width:] = 0
                lines[0, :width] = matrix[2 * p, start : start + width]
                if paired:
                    lines[1, :width] = matrix[2 * p + 1, start : start + width]
                else:
                    lines[1] = 0
                _interleave(low, high, out + p * out_step)


@addressing
def pair_columns(matrix, panels, first):
    """Set panels[., p, first + r] = the pair matrix[r, 2 p], matrix[r, 2 p + 1]: rows of bfloat16 become columns."""
    for row in range(len(matrix)):
        pairs = matrix[row].view(np.uint32)
        panel, lane = panels[(first + row) // PANEL], (first + row) % PANEL
        for p in range(len(pairs)):
            panel[p, lane] = pairs[p]


@addressing
def lay_out(weight, forward, backward, first):
    """Lay out rows of a weight [O, K] float32, from ``first`` on, for products with its transpose and with itself.

    In ``forward`` [., K / 2, PANEL] each row is a column with its pairs along K. In ``backward`` [., O / 2, PANEL]
    rows are paired.
    """
    rows, columns = weight.shape
    lines = np.empty((LANES, columns), np.uint16)
    for begin in range(0, rows, LANES):
        block = lines[: min(LANES, rows - begin)]
        for row in range(len(block)):
            line, source = block[row], weight[begin + row]
            for column in range(columns):
                put(line, column, source[column])
        pair_columns(block, forward, first + begin)
        pair_rows(block, backward, (first + begin) // 2)


# Products


@addressing
def exact_tile(left, step, panel, pairs, out, out_step, rows, width):
    """Multiply ``rows`` rows at address ``left`` by a panel, into float32 at ``out``.

    Only the first ``width`` columns of the panel are needed; the others may be left out.
    """
    if rows == ROWS and width <= PANEL // 2:
        single_half(left, step, 4, panel, pairs, out, out_step)
    elif rows == ROWS:
        single(left, step, 4, panel, pairs, out, out_step)
    else:
        for row in range(rows):
            single_one(left + row * step, step, 4, panel, pairs, out + row * out_step, out_step)


@addressing
def tile(left, step, panel, pairs, out, first, rest):
    """As `exact_tile`, into the bfloat16 rows ``out`` from column ``first`` on; ``rest`` [ROWS, PANEL] is scratch."""
    rows, width = len(out), min(PANEL, out.shape[1] - first)
    if width < PANEL:
        exact_tile(left, step, panel, pairs, rest.ctypes.data, 4 * PANEL, rows, width)
        for row in range(rows):
            line, result = out[row], rest[row]
            for column in range(width):
                put(line, first + column, result[column])
        return
    place, out_step = out.ctypes.data + 2 * first, out.strides[0]
    if rows == ROWS:
        narrow(left, step, 4, panel, pairs, place, out_step)
    else:
        for row in range(rows):
            narrow_one(left + row * step, step, 4, panel, pairs, place + row * out_step, out_step)


@addressing
def product(left, panels, out):
    """Compute out [M, N] = left [M, K] times ``panels`` of K / 2 pairs and N columns; all bfloat16, K even."""
    rows, pairs = len(out), left.shape[1] // 2
    source, step, base, size = left.ctypes.data, left.strides[0], panels.ctypes.data, panels.strides[0]
    rest = np.empty((ROWS, PANEL), np.float32)
    target, out_step = out.ctypes.data, out.strides[0]
    for begin in range(0, rows, BLOCK):
        end = min(begin + BLOCK, rows)
        for panel in range(len(panels)):
            here, first, done = base + panel * size, panel * PANEL, begin
            if first + PANEL <= out.shape[1]:
                done = begin + (end - begin) // ROWS * ROWS
                for row in range(begin, done, ROWS):
                    at = target + row * out_step + 2 * first
                    narrow(source + row * step, step, 4, here, pairs, at, out_step)
            for row in range(done, end, ROWS):
                tile(source + row * step, step, here, pairs, out[row : min(row + ROWS, end)], first, rest)


@addressing
def gradient(d_out, inputs, total, fresh):
    """Add d_out [T, O] transposed times inputs [T, K] to total [O, K] float32; ``fresh``: replace the old total."""
    tokens, outs = d_out.shape
    columns = inputs.shape[1]
    right = np.empty(((columns + PANEL - 1) // PANEL, (tokens + 1) // 2, PANEL), np.uint32)
    left = np.empty((1, (min(tokens, TOKENS) + 1) // 2, PANEL), np.uint32)
    rest = np.empty((ROWS, PANEL), np.float32)
    lefts, rights, size = left.ctypes.data, right.ctypes.data, right.strides[0]
    sums, step = total.ctypes.data, total.strides[0]
    pair_rows(inputs, right, 0)
    for start in range(0, outs, PANEL):
        stop = min(start + PANEL, outs)
        for begin in range(0, tokens, TOKENS):  # inside, so that the sums of some rows stay in the cache
            end = min(begin + TOKENS, tokens)
            pairs = (end - begin + 1) // 2
            pair_rows(d_out[begin:end, start:stop], left, 0)
            replaces = fresh and begin == 0
            for panel in range(len(right)):
                first, width = panel * PANEL, min(PANEL, columns - panel * PANEL)
                there = rights + panel * size + begin // 2 * (4 * PANEL)
                for row in range(start, stop, ROWS):
                    place, at = lefts + (row - start) * 4, sums + row * step + 4 * first
                    if width == PANEL and row + ROWS <= stop:
                        if replaces:
                            single(place, 4, 4 * PANEL, there, pairs, at, step)
                        else:
                            add(place, 4, 4 * PANEL, there, pairs, at, step)
                        continue
                    if width <= PANEL // 2:
                        single_half(place, 4, 4 * PANEL, there, pairs, rest.ctypes.data, 4 * PANEL)
                    else:
                        single(place, 4, 4 * PANEL, there, pairs, rest.ctypes.data, 4 * PANEL)
                    for i in range(min(ROWS, stop - row)):
                        line, exact = total[row + i], rest[i]
                        for j in range(width):
                            line[first + j] = exact[j] if replaces else line[first + j] + exact[j]


# The interface of the passes


class Matrix(Protocol):
    """A weight [O, K], laid out for products."""

    def refresh(self) -> None:
        """Read the parameters' present values."""

    def forward(self, inputs: Tensor, out: Tensor) -> None:
        """Multiply inputs [M, K] by the transpose, into out [M, O]."""

    def backward(self, d_out: Tensor, d_inputs: Tensor) -> None:
        """Multiply d_out [M, O] by the weight, into d_inputs [M, K]."""


class Sum:
    """A float32 tensor that gradients are added to; the first of a step replaces the old value."""

    def __init__(self, *shape: int) -> None:
        self.value = torch.zeros(*shape)
        self.fresh = True  # nothing was added in this step; the value is an old one

    def settle(self) -> None:
        """Set the value to zero if nothing was added."""
        if self.fresh:
            self.value.zero_()
            self.fresh = False


class Products(Protocol):
    """An implementation of matrix products."""

    def matrix(self, parts: Sequence[Tensor]) -> Matrix:
        """Join parameters [., K], one below the other. The matrix is empty until `Matrix.refresh`."""

    def gradient(self, total: Sum, d_out: Tensor, inputs: Tensor) -> None:
        """Add the gradient of a weight, d_out [M, O] transposed times inputs [M, K], to total [O, K]."""


class PlainMatrix:
    """A weight for PyTorch's products, in one type."""

    def __init__(self, parts: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.parts, self.dtype = parts, dtype
        self.weight = torch.empty(0)

    def refresh(self) -> None:
        """Join the parameters' present values."""
        whole = self.parts[0] if len(self.parts) == 1 else torch.cat([part.detach() for part in self.parts])
        self.weight = whole.detach().to(self.dtype)

    def forward(self, inputs: Tensor, out: Tensor) -> None:
        """Multiply inputs [M, K] by the transpose, into out [M, O]."""
        torch.mm(inputs, self.weight.T, out=out)

    def backward(self, d_out: Tensor, d_inputs: Tensor) -> None:
        """Multiply d_out [M, O] by the weight, into d_inputs [M, K]."""
        torch.mm(d_out, self.weight, out=d_inputs)


class PlainProducts:
    """PyTorch's products, in one type."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def matrix(self, parts: Sequence[Tensor]) -> Matrix:
        """Join parameters [., K], one below the other."""
        return PlainMatrix(parts, self.dtype)

    def gradient(self, total: Sum, d_out: Tensor, inputs: Tensor) -> None:
        """Add d_out [M, O] transposed times inputs [M, K] to total [O, K]."""
        total.settle()
        total.value += d_out.T @ inputs


class PairedMatrix:
    """A weight in panels of pairs of bfloat16, for both directions."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = parts
        outputs, inputs = sum(len(part) for part in parts), parts[0].shape[1]
        self._forward, self._backward = (
            np.zeros((-(-columns // PANEL), pairs // 2, PANEL), np.uint32)
            for columns, pairs in ((outputs, inputs), (inputs, outputs))
        )

    def refresh(self) -> None:
        """Lay out the parameters' present values."""
        first = 0
        for part in self.parts:
            lay_out(part.detach().numpy(), self._forward, self._backward, first)
            first += len(part)

    def forward(self, inputs: Tensor, out: Tensor) -> None:
        """Multiply inputs [M, K] by the transpose, into out [M, O]."""
        product(raw(inputs), self._forward, raw(out))

    def backward(self, d_out: Tensor, d_inputs: Tensor) -> None:
        """Multiply d_out [M, O] by the weight, into d_inputs [M, K]."""
        product(raw(d_out), self._backward, raw(d_inputs))


class PairedProducts:
    """This module's products of pairs of bfloat16."""

    def matrix(self, parts: Sequence[Tensor]) -> Matrix:
        """Join parameters [., K], one below the other."""
        return PairedMatrix(parts)

    def gradient(self, total: Sum, d_out: Tensor, inputs: Tensor) -> None:
        """Add d_out [M, O] transposed times inputs [M, K] to total [O, K]."""
        if not len(d_out):
            return
        gradient(raw(d_out), raw(inputs), total.value.numpy(), total.fresh)
        total.fresh = False


def products_for(dtype: torch.dtype, sizes: Sequence[int]) -> Products:
    """Return the fastest products for activations of ``dtype``; pairs need matrices of even ``sizes``."""
    fast = dtype == torch.bfloat16 and has_bfloat_dot() and not has_bfloat_tiles()
    return PairedProducts() if fast and all(size % 2 == 0 for size in sizes) else PlainProducts(dtype)
