"""Muon's step for one matrix on a CPU (`train.optimizer.Muon`), by pairs of bfloat16 (`products.py`).

The formulas are those of the optimizer's `_update`; each number is read and written once where memory is slow. A
wide matrix is multiplied by its transpose from the right, a tall one from the left, so that none is transposed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tercet.train.cpu.compiling import addressing, compiled
from tercet.train.cpu.kernels import get, put
from tercet.train.cpu.products import BLOCK, PANEL, ROWS, exact_tile, pair_columns, pair_rows, single


@compiled
def _look_ahead(gradient, momentum, decay, ahead):
    """Update the momentum, set ``ahead`` to Nesterov's direction, and return the sum of its squares."""
    squares = np.float32(0)
    for row in range(len(gradient)):
        new, average, out = gradient[row], momentum[row], ahead[row]
        for i in range(len(new)):
            value = average[i] + (np.float32(1) - decay) * (new[i] - average[i])
            average[i] = value
            value = new[i] + decay * (value - new[i])
            out[i] = value
            squares += value * value
    return squares


@compiled
def _scaled(values, scale, out):
    """Compute out = scale * values, in bfloat16."""
    for row in range(len(values)):
        source, target = values[row], out[row]
        for i in range(len(source)):
            put(target, i, scale * source[i])


@compiled
def row_squares(matrix, squares):
    """Compute the sum of squares of each row."""
    for row in range(len(matrix)):
        source = matrix[row]
        total = np.float32(0)
        for i in range(len(source)):
            total += get(source, i) * get(source, i)
        squares[row] = total


@compiled
def move(parameter, direction, factors, shrink):
    """Compute parameter = shrink * parameter + each row of direction times its factor, in place."""
    for row in range(len(parameter)):
        place, source, factor = parameter[row], direction[row], factors[row]
        for i in range(len(place)):
            place[i] = shrink * place[i] + factor * get(source, i)


@addressing
def _mirror(matrix):
    """Copy the panels left of the diagonal's, transposed, above the diagonal: the matrix is symmetric."""
    size = len(matrix)
    for below in range(PANEL, size, PANEL):
        for left in range(0, below, PANEL):
            for row in range(below, min(below + PANEL, size)):
                for column in range(left, left + PANEL):
                    matrix[column, row] = matrix[row, column]


@addressing
def _squared(panels, sums, out):
    """Compute out = the product of the matrix in ``panels`` with its own transpose, bfloat16.

    ``sums`` is scratch for float32, in whole panels.
    """
    pairs, size = panels.shape[1], panels.strides[0]
    base, target, step = panels.ctypes.data, sums.ctypes.data, sums.strides[0]
    for down in range(len(panels)):
        for across in range(down + 1):
            for row in range(0, PANEL, ROWS):
                at = target + (down * PANEL + row) * step + 4 * across * PANEL
                single(base + down * size + 4 * row, 4, 4 * PANEL, base + across * size, pairs, at, step)
    for row in range(len(out)):
        line, exact = out[row], sums[row]
        for column in range(min(len(line), (row // PANEL + 1) * PANEL)):
            put(line, column, exact[column])
    _mirror(out)


@addressing
def _add_product(left, panels, base, share, factor, out, symmetric):
    """Compute out = share * base + factor * left times ``panels``, rounded to bfloat16 once.

    Sizes are as for `products.product`. ``symmetric``: only the panels up to the diagonal are computed, and
    mirrored.
    """
    rows, columns = out.shape
    pairs, step = left.shape[1] // 2, left.strides[0]
    sums = np.empty((ROWS, PANEL), np.float32)
    for begin in range(0, rows, BLOCK):
        end = min(begin + BLOCK, rows)
        for panel in range(len(panels)):
            first, last = panel * PANEL, min(panel * PANEL + PANEL, columns)
            for row in range(max(begin, first) if symmetric else begin, end, ROWS):
                count = min(ROWS, end - row)
                exact_tile(
                    left.ctypes.data + row * step, step, panels[panel].ctypes.data, pairs,
                    sums.ctypes.data, 4 * PANEL, count, last - first,
                )  # fmt: skip
                for i in range(count):
                    before, after, exact = base[row + i, first:last], out[row + i, first:last], sums[i]
                    for j in range(last - first):
                        put(after, j, share * get(before, j) + factor * exact[j])
    if symmetric:
        _mirror(out)


@addressing
def orthogonal(x, coefficients):
    """Apply to x [R, C] (bfloat16, R and C even) the polynomials a x + b x^3 + c x^5, one for each row (a, b, c)."""
    rows, columns = x.shape
    wide = rows <= columns
    small = min(rows, columns)
    over, down = (columns + PANEL - 1) // PANEL, (small + PANEL - 1) // PANEL
    panels = np.zeros((down, max(rows, columns) // 2, PANEL), np.uint32)
    paired = np.empty((over, rows // 2 if wide else 0, PANEL), np.uint32)
    squares = np.empty((down, small // 2, PANEL), np.uint32)
    sums = np.empty((down * PANEL, down * PANEL), np.float32)
    gram, inner, after = (
        np.empty((small, small), np.uint16),
        np.empty((small, small), np.uint16),
        np.empty_like(x),
    )
    unit = np.float32(1)
    for step in range(len(coefficients)):
        a, b, c = coefficients[step]
        if wide:
            pair_columns(x, panels, 0)
        else:
            pair_rows(x, panels, 0)
        _squared(panels, sums, gram)
        pair_rows(gram, squares, 0)
        _add_product(gram, squares, gram, b, c, inner, True)
        if wide:
            pair_rows(x, paired, 0)
            _add_product(inner, paired, x, a, unit, after, False)
        else:
            pair_rows(inner, squares, 0)
            _add_product(x, squares, x, a, unit, after, False)
        x, after = after, x
    return x


def direction(
    gradient: Tensor,
    momentum: Tensor,
    decay: float,
    safety: float,
    coefficients: Sequence[tuple[float, float, float]],
) -> NDArray[np.uint16]:
    """Return Muon's direction for a matrix, [R, C] bfloat16, and update ``momentum`` in place.

    Args:
        gradient: [R, C] float32.
        momentum: [R, C] float32, the running average of gradients.
        decay: Decay of the momentum.
        safety: Factor on the norm that the matrix is divided by, so that no singular value is above 1.
        coefficients: (a, b, c) of each polynomial; see `orthogonal`.
    """
    ahead, x = np.empty(gradient.shape, np.float32), np.empty(gradient.shape, np.uint16)
    length = _look_ahead(gradient.numpy(), momentum.numpy(), np.float32(decay), ahead) ** 0.5
    _scaled(ahead, np.float32(1 / (length * safety + 1e-20)), x)
    result: NDArray[np.uint16] = orthogonal(x, np.array(coefficients, np.float32))
    return result


def prepare() -> None:
    """Compile this module's functions on a machine that has not compiled them yet, before any time is measured."""
    zeros, rows = torch.zeros(2, 2), np.zeros(2, np.float32)
    moved = direction(zeros, zeros.clone(), 0.0, 1.0, [(1.0, 1.0, 1.0)])
    row_squares(moved, rows)
    move(zeros.numpy(), moved, rows, np.float32(1))
