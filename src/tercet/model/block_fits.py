"""Compiled searches for the scales of quantised blocks: those with the least weighted squared error.

A scale is found in two steps. A scan tries ranges from a little beyond a group's extreme values to well inside
them, since clipping an extreme value often makes the rest of its group more exact. Then the best range is
refined: the scale by least squares for the codes, the codes for the scale, in turn. Every error that decides is
computed with the scale rounded to float16, as it is stored.

All functions write into arrays that the caller made; rows are independent of each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

FAST = {"reassoc", "contract", "nsz", "arcp"}
TINY = np.float32(1e-30)  # sums below it are taken for zero
BIG = np.float32(3e38)


@njit(cache=True, nogil=True)
def half(x: Any) -> Any:
    """Round to float16's precision and range. Without fast arithmetic, which would cancel the two products."""
    size = abs(x)
    if size >= np.float32(65504):
        return np.float32(65504) if x > 0 else np.float32(-65504)
    if size < np.float32(2.0**-14):  # subnormal: a fixed step
        return np.float32(np.rint(x * np.float32(2.0**24)) * np.float32(2.0**-24))
    upper = np.float32(x * np.float32(8193))  # Veltkamp's splitting: keeps 11 of the 24 bits
    return np.float32(upper - np.float32(upper - x))


@njit(cache=True, nogil=True, fastmath=FAST)
def scaled_error(x: Any, w: Any, d: Any, low: Any, high: Any) -> Any:
    """Return the weighted squared error of codes low..high times ``d`` over a group."""
    inverse = np.float32(0) if d == 0 else np.float32(1) / d
    error = np.float32(0)
    for i in range(x.size):
        q = min(max(np.rint(x[i] * inverse), low), high)
        rest = x[i] - d * q
        error += w[i] * rest * rest
    return error


@njit(cache=True, nogil=True, fastmath=FAST)
def refitted_scale(x: Any, w: Any, d: Any, low: Any, high: Any) -> Any:
    """Return the scale with the least error for the codes that ``d`` gives."""
    inverse = np.float32(0) if d == 0 else np.float32(1) / d
    xq, qq = np.float32(0), np.float32(0)
    for i in range(x.size):
        q = min(max(np.rint(x[i] * inverse), low), high)
        weighted = w[i] * q
        xq += weighted * x[i]
        qq += weighted * q
    return xq / qq if qq > TINY else d


@njit(cache=True, nogil=True)
def stored(d: Any, exact: bool) -> Any:
    """Return ``d`` as it is stored: in float16's precision unless ``exact``."""
    return d if exact else half(d)


@njit(cache=True, nogil=True, fastmath=FAST)
def fit_scale(x: Any, w: Any, low: Any, high: Any, steps: int, step: Any, exact: bool) -> Any:
    """Return the scale with the least error for codes low..high; 0 for a group of zeros.

    The scan divides the extreme value by ``low + step * k`` for k of -steps..steps, and where the codes reach
    farther below zero than above also by the same numbers with the other sign.
    """
    extreme = np.float32(0)
    for i in range(x.size):
        if abs(x[i]) > abs(extreme):
            extreme = x[i]
    best, least = np.float32(0), BIG
    signs = 1 if low == -high else 2
    for sign in range(signs):
        for k in range(-steps, steps + 1):
            d = stored(extreme / (low + step * np.float32(k)), exact)
            if sign:
                d = -d
            error = scaled_error(x, w, d, low, high)
            if error < least:
                best, least = d, error
    for _ in range(3):
        d = stored(refitted_scale(x, w, best, low, high), exact)
        error = scaled_error(x, w, d, low, high)
        if error >= least:
            break
        best, least = d, error
    return best


@njit(cache=True, nogil=True, fastmath=FAST)
def scaled_codes(x: Any, d: Any, low: Any, high: Any, q: Any) -> None:
    """Write the codes of a group for the scale ``d``."""
    inverse = np.float32(0) if d == 0 else np.float32(1) / d
    for i in range(x.size):
        q[i] = np.int8(min(max(np.rint(x[i] * inverse), low), high))


@njit(cache=True, nogil=True)
def scaled_rows(
    x: Any, w: Any, size: int, low: Any, high: Any, steps: int, step: Any, scales: Any, q: Any
) -> None:
    """Fit x [rows, columns] by scales [rows, columns / size] and signed codes q [rows, columns]."""
    for row in range(x.shape[0]):
        for group in range(x.shape[1] // size):
            begin, end = group * size, (group + 1) * size
            values = x[row, begin:end]
            d = fit_scale(values, w[begin:end], low, high, steps, step, False)
            scales[row, group] = d
            scaled_codes(values, d, low, high, q[row, begin:end])


@njit(cache=True, nogil=True, fastmath=FAST)
def affine_error(x: Any, w: Any, d: Any, m: Any, high: Any) -> Any:
    """Return the weighted squared error of ``d`` times codes 0..high plus ``m`` over a group."""
    inverse = np.float32(0) if d == 0 else np.float32(1) / d
    error = np.float32(0)
    for i in range(x.size):
        q = min(max(np.rint((x[i] - m) * inverse), np.float32(0)), high)
        rest = x[i] - (d * q + m)
        error += w[i] * rest * rest
    return error


@njit(cache=True, nogil=True, fastmath=FAST)
def refitted_affine(x: Any, w: Any, d: Any, m: Any, high: Any, below_zero: bool) -> Any:
    """Return the scale and the minimum with the least error for the codes that ``d`` and ``m`` give, and that error.

    With ``below_zero`` the minimum is at most zero.
    """
    inverse = np.float32(0) if d == 0 else np.float32(1) / d
    total, q1, q2 = np.float32(0), np.float32(0), np.float32(0)
    r1, rq, rr = np.float32(0), np.float32(0), np.float32(0)
    for i in range(x.size):
        shifted = x[i] - m
        q = min(max(np.rint(shifted * inverse), np.float32(0)), high)
        rest = shifted - d * q  # sums of what is left lose fewer digits than sums of the values
        total += w[i]
        q1 += w[i] * q
        q2 += w[i] * q * q
        r1 += w[i] * rest
        rq += w[i] * rest * q
        rr += w[i] * rest * rest
    determinant = total * q2 - q1 * q1
    if determinant <= np.float32(1e-6) * total * q2:
        return d, m, rr
    more = (total * rq - q1 * r1) / determinant
    shift = (q2 * r1 - q1 * rq) / determinant
    if below_zero and m + shift > 0:
        shift = -m
        more = (rq - shift * q1) / q2
    error = (
        rr - np.float32(2) * (more * rq + shift * r1)
        + more * more * q2 + np.float32(2) * more * shift * q1 + shift * shift * total
    )  # fmt: skip
    return d + more, m + shift, error


@njit(cache=True, nogil=True, fastmath=FAST)
def refitted_slope(x: Any, w: Any, d: Any, m: Any, high: Any) -> Any:
    """Return the scale with the least error for the minimum ``m`` and the codes that ``d`` and ``m`` give."""
    inverse = np.float32(0) if d == 0 else np.float32(1) / d
    rq, qq = np.float32(0), np.float32(0)
    for i in range(x.size):
        shifted = x[i] - m
        q = min(max(np.rint(shifted * inverse), np.float32(0)), high)
        rq += w[i] * q * (shifted - d * q)
        qq += w[i] * q * q
    return d + rq / qq if qq > TINY else d


@njit(cache=True, nogil=True, fastmath=FAST)
def scan_affine(x: Any, w: Any, high: Any, below_zero: bool, steps: int, step: Any) -> Any:
    """Return the scale and minimum of the best of the ranges whose ends are moved by 0..steps times ``step`` codes.

    Each is judged after fitting it to its codes by least squares, before any rounding of the two numbers.
    """
    lowest, highest = x[0], x[0]
    for i in range(x.size):
        lowest, highest = min(lowest, x[i]), max(highest, x[i])
    if below_zero:
        lowest = min(lowest, np.float32(0))
        highest = max(highest, np.float32(0)) if lowest == 0 else highest
    best, start, least = (highest - lowest) / high, lowest, BIG
    for down in range(-1, steps):
        for up in range(-1, steps):
            inside = high - step * np.float32(down) - step * np.float32(up)
            d = (highest - lowest) / high
            m = lowest + d * step * np.float32(down)
            d = d * inside / high
            if below_zero and m > 0:
                continue
            d, m, error = refitted_affine(x, w, d, m, high, below_zero)
            if error < least:
                best, start, least = d, m, error
    return best, start


@njit(cache=True, nogil=True, fastmath=FAST)
def affine_codes(x: Any, d: Any, m: Any, high: Any, q: Any) -> None:
    """Write the codes of a group for a scale and a minimum."""
    inverse = np.float32(0) if d == 0 else np.float32(1) / d
    for i in range(x.size):
        q[i] = np.int8(min(max(np.rint((x[i] - m) * inverse), np.float32(0)), high))


@njit(cache=True, nogil=True)
def fit_affine(x: Any, w: Any, high: Any, steps: int, step: Any) -> Any:
    """Return the scale and the minimum, in float16's precision, with the least error for codes 0..high."""
    lowest, highest = x[0], x[0]
    for i in range(x.size):
        lowest, highest = min(lowest, x[i]), max(highest, x[i])
    best, start, least = np.float32(0), np.float32(0), BIG
    for scan in range(2):
        # First the full range: the exact answer for values that are already such codes.
        d, m = (highest - lowest) / high, lowest
        if scan:
            d, m = scan_affine(x, w, high, False, steps, step)
        for _ in range(3):
            d, m = half(d), half(m)
            error = affine_error(x, w, d, m, high)
            if error >= least:
                break
            best, start, least = d, m, error
            d, m, _ = refitted_affine(x, w, d, m, high, False)
    # Rounding the minimum moves the best scale.
    d = half(refitted_slope(x, w, best, start, high))
    if affine_error(x, w, d, start, high) < least:
        best = d
    return best, start


@njit(cache=True, nogil=True)
def affine_rows(
    x: Any, w: Any, size: int, high: Any, steps: int, step: Any, scales: Any, minima: Any, q: Any
) -> None:
    """Fit x [rows, columns] by scales and minima [rows, columns / size] and codes q [rows, columns] of 0..high."""
    for row in range(x.shape[0]):
        for group in range(x.shape[1] // size):
            begin, end = group * size, (group + 1) * size
            values = x[row, begin:end]
            d, m = fit_affine(values, w[begin:end], high, steps, step)
            scales[row, group], minima[row, group] = d, m
            affine_codes(values, d, m, high, q[row, begin:end])


@njit(cache=True, nogil=True, fastmath=FAST)
def refitted_pair(x: Any, w: Any, size: int, d: Any, m: Any, scales: Any, minima: Any, high: Any) -> Any:
    """Return the two scales of a super-block with the least error for the codes that the present ones give."""
    aa, ab, bb = np.float32(0), np.float32(0), np.float32(0)
    ar, br = np.float32(0), np.float32(0)
    for part in range(scales.size):
        scale, minimum = np.float32(scales[part]), np.float32(minima[part])
        step, start = d * scale, m * minimum
        inverse = np.float32(0) if step == 0 else np.float32(1) / step
        total, q1, q2 = np.float32(0), np.float32(0), np.float32(0)
        r1, rq = np.float32(0), np.float32(0)
        values, weights = x[part * size : (part + 1) * size], w[part * size : (part + 1) * size]
        for i in range(values.size):
            shifted = values[i] + start
            q = min(max(np.rint(shifted * inverse), np.float32(0)), high)
            rest = shifted - step * q
            total += weights[i]
            q1 += weights[i] * q
            q2 += weights[i] * q * q
            r1 += weights[i] * rest
            rq += weights[i] * rest * q
        aa += scale * scale * q2
        ab -= scale * minimum * q1
        bb += minimum * minimum * total
        ar += scale * rq
        br -= minimum * r1
    determinant = aa * bb - ab * ab
    if determinant <= np.float32(1e-6) * aa * bb:
        if aa > TINY:
            d += ar / aa
        return d, m
    return d + (ar * bb - br * ab) / determinant, m + (br * aa - ar * ab) / determinant


@njit(cache=True, nogil=True)
def choose_pairs(
    x: Any, w: Any, size: int, d: Any, m: Any, scales: Any, minima: Any, reach: int, high: Any
) -> Any:
    """Move each group's two 6-bit numbers by up to ``reach`` to its least error; return the sum of the errors."""
    total = np.float32(0)
    for part in range(scales.size):
        values, weights = x[part * size : (part + 1) * size], w[part * size : (part + 1) * size]
        scale, minimum = int(scales[part]), int(minima[part])
        least, best, start = BIG, scale, minimum
        for a in range(max(scale - reach, 0), min(scale + reach, 63) + 1):
            for b in range(max(minimum - reach, 0), min(minimum + reach, 63) + 1):
                error = affine_error(values, weights, d * np.float32(a), -m * np.float32(b), high)
                if error < least:
                    least, best, start = error, a, b
        scales[part], minima[part] = best, start
        total += least
    return total


@njit(cache=True, nogil=True)
def nested_affine_rows(
    x: Any, w: Any, high: Any, steps: int, step: Any, scales: Any, minima: Any, parts: Any, starts: Any, q: Any
) -> None:  # fmt: skip
    """Fit super-blocks of 8 groups of 32: value = scale * part * q - minimum * start.

    ``scales`` and ``minima`` are [rows, columns / 256] in float16's precision, ``parts`` and ``starts``
    [rows, columns / 32] of 0..63, ``q`` [rows, columns] of 0..high.
    """
    size, count = 32, 8
    d, m = np.empty(count, np.float32), np.empty(count, np.float32)
    a, b = np.empty(count, np.uint8), np.empty(count, np.uint8)
    for row in range(x.shape[0]):
        for block in range(x.shape[1] // 256):
            values, weights = x[row, block * 256 : (block + 1) * 256], w[block * 256 : (block + 1) * 256]
            best, start = parts[row, block * 8 : (block + 1) * 8], starts[row, block * 8 : (block + 1) * 8]
            for part in range(count):
                begin, end = part * size, (part + 1) * size
                d[part], m[part] = scan_affine(values[begin:end], weights[begin:end], high, True, steps, step)
            outer, lower = half(d.max() / np.float32(63)), half(-m.min() / np.float32(63))
            for part in range(count):
                a[part] = 0 if outer == 0 else min(np.rint(d[part] / outer), 63)
                b[part] = 0 if lower == 0 else min(np.rint(-m[part] / lower), 63)
            least = BIG
            for _ in range(3):
                error = choose_pairs(values, weights, size, outer, lower, a, b, 1, high)
                if error >= least:
                    break
                least = error
                scales[row, block], minima[row, block] = outer, lower
                best[:], start[:] = a, b
                outer, lower = refitted_pair(values, weights, size, outer, lower, a, b, high)
                outer, lower = half(max(outer, np.float32(0))), half(max(lower, np.float32(0)))
            for part in range(count):
                begin, end = part * size, (part + 1) * size
                affine_codes(
                    values[begin:end], scales[row, block] * np.float32(best[part]),
                    -minima[row, block] * np.float32(start[part]), high, q[row, block * 256 + begin : block * 256 + end],
                )  # fmt: skip


@njit(cache=True, nogil=True, fastmath=FAST)
def refitted_outer(x: Any, w: Any, size: int, d: Any, scales: Any, low: Any, high: Any) -> Any:
    """Return the scale of a super-block with the least error for the codes that the present one gives."""
    up, down = np.float32(0), np.float32(0)
    for part in range(scales.size):
        values, weights = x[part * size : (part + 1) * size], w[part * size : (part + 1) * size]
        scale = np.float32(scales[part])
        step = d * scale
        inverse = np.float32(0) if step == 0 else np.float32(1) / step
        xq, qq = np.float32(0), np.float32(0)
        for i in range(values.size):
            q = min(max(np.rint(values[i] * inverse), low), high)
            xq += weights[i] * values[i] * q
            qq += weights[i] * q * q
        up += scale * xq
        down += scale * scale * qq
    return up / down if down > TINY else d


@njit(cache=True, nogil=True)
def choose_scales(x: Any, w: Any, size: int, d: Any, scales: Any, low: Any, high: Any) -> Any:
    """Move each group's 8-bit scale by up to 1 to its least error; return the sum of the errors."""
    total = np.float32(0)
    for part in range(scales.size):
        values, weights = x[part * size : (part + 1) * size], w[part * size : (part + 1) * size]
        scale = int(scales[part])
        least, best = BIG, scale
        for a in range(max(scale - 1, -128), min(scale + 1, 127) + 1):
            error = scaled_error(values, weights, d * np.float32(a), low, high)
            if error < least:
                least, best = error, a
        scales[part] = best
        total += least
    return total


@njit(cache=True, nogil=True)
def nested_scaled_rows(x: Any, w: Any, steps: int, step: Any, scales: Any, parts: Any, q: Any) -> None:
    """Fit super-blocks of 16 groups of 16: value = scale * part * q, q in -32..31.

    ``scales`` are [rows, columns / 256] in float16's precision, ``parts`` [rows, columns / 16] of -128..127,
    ``q`` [rows, columns].
    """
    size, count = 16, 16
    low, high = np.float32(-32), np.float32(31)
    d, a = np.empty(count, np.float32), np.empty(count, np.int8)
    for row in range(x.shape[0]):
        for block in range(x.shape[1] // 256):
            values, weights = x[row, block * 256 : (block + 1) * 256], w[block * 256 : (block + 1) * 256]
            best = parts[row, block * 16 : (block + 1) * 16]
            extreme = np.float32(0)
            for part in range(count):
                begin, end = part * size, (part + 1) * size
                d[part] = fit_scale(values[begin:end], weights[begin:end], low, high, steps, step, True)
                if abs(d[part]) > abs(extreme):
                    extreme = d[part]
            outer = half(extreme / np.float32(-128))
            for part in range(count):
                a[part] = 0 if outer == 0 else min(max(np.rint(d[part] / outer), -128), 127)
            least = BIG
            for _ in range(3):
                error = choose_scales(values, weights, size, outer, a, low, high)
                if error >= least:
                    break
                least = error
                scales[row, block] = outer
                best[:] = a
                outer = half(refitted_outer(values, weights, size, outer, a, low, high))
            for part in range(count):
                begin, end = part * size, (part + 1) * size
                scale = scales[row, block] * np.float32(best[part])
                scaled_codes(
                    values[begin:end], scale, low, high, q[row, block * 256 + begin : block * 256 + end]
                )
