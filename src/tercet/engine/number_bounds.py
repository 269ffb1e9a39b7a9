"""Regular expressions of JSON numbers within bounds.

JSON Schema bounds the value of a number; a grammar allows or refuses its text. The texts here are plain
decimals without an exponent: ``-12``, ``0.5``, ``0.50``. Every such text of a value within the bounds is
allowed, as long as it is not longer than the limits below, and no other text is. There is no negative zero.

Every beginning of an allowed text can be completed, and the length of a text is limited, so that a model
can neither reach a dead end nor write digits without end:

- At most `WHOLE_DIGITS` digits before the point, or one more than the bounds have where these are longer.
- Next to zero, values from 1e-9 (or a thousandth of the last digit of a smaller bound), so that a model
  that means zero, where zero is excluded, does not write zeros to the limit.
- As many digits after the point as a double can tell apart from the bounds (15 significant digits in all),
  or one more than the bounds have where these are longer. So a value within an exclusive bound is still
  within it when it is read as a double.

The expressions use only what Rust's regex crate and Python's ``re`` have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor
from typing import Any

WHOLE_DIGITS = 19  # those of the largest int64
SIGNIFICANT_DIGITS = 15  # decimal digits that every double keeps
ZEROS = 8  # the most zeros behind the point of a value that is not zero
# Far from a bound with many digits before the point, values have at least this many digits after it.
FAR_PLACES = 8
_FAR = 10**6  # whole parts below this leave a double more than FAR_PLACES digits
_SUFFIXES = 200  # the most endings of digits that an expression of multiples lists


class UnsatisfiableError(ValueError):
    """No value is within the bounds."""


@dataclass(frozen=True)
class Bounds:
    """The bounds of a JSON number.

    Attributes:
        low: the smallest value; None: none.
        low_included: whether ``low`` itself is allowed.
        high: the largest value; None: none.
        high_included: whether ``high`` itself is allowed.
        step: the value is a multiple of this positive number; None: any.
        whole: whether the value is a whole number.
    """

    low: Fraction | None = None
    low_included: bool = True
    high: Fraction | None = None
    high_included: bool = True
    step: Fraction | None = None
    whole: bool = False

    @classmethod
    def of(cls, schema: dict[str, Any], whole: bool) -> Bounds:
        """Return the bounds that a JSON Schema gives numbers; draft 4's boolean exclusive bounds count.

        Raises:
            ValueError: a bound is no number, or ``multipleOf`` is not positive.
        """
        low, low_included = _bound(schema, "minimum", "exclusiveMinimum", max)
        high, high_included = _bound(schema, "maximum", "exclusiveMaximum", min)
        step = None
        if "multipleOf" in schema:
            step = _exact(schema["multipleOf"], "multipleOf")
            if step <= 0:
                raise ValueError(f"multipleOf is {schema['multipleOf']}; it must be above 0")
        return cls(low, low_included, high, high_included, step, whole)

    def contain(self, value: Fraction) -> bool:
        """Return whether a value is within the bounds."""
        above = self.low is None or value > self.low or (self.low_included and value == self.low)
        below = self.high is None or value < self.high or (self.high_included and value == self.high)
        fits = (self.step is None or value % self.step == 0) and (not self.whole or value.denominator == 1)
        return above and below and fits


@dataclass(frozen=True)
class NumberTexts:
    """A part of the allowed texts: those that match all of ``patterns``.

    Where the step has another factor than 2 and 5, no short expression describes its multiples. Then
    ``multiples`` is the JSON Schema of the digits after ``sign``, within inclusive bounds that are multiples.
    """

    patterns: tuple[str, ...] = ()
    sign: str = ""
    multiples: dict[str, Any] | None = None


def number_texts(bounds: Bounds) -> list[NumberTexts]:
    """Return the texts of the numbers within bounds, as alternatives.

    Raises:
        UnsatisfiableError: there is no such number.
    """
    bounds = _tightened(bounds)
    negative = replace(
        bounds,
        low=None if bounds.high is None else -bounds.high,
        low_included=bounds.high_included,
        high=None if bounds.low is None else -bounds.low,
        high_included=bounds.low_included,
    )
    above, below = _positive(bounds), _positive(negative)
    places = max(_places(above), _places(below), 0 if bounds.whole else FAR_PLACES)
    zero = ["0" + _fraction(f"0{{1,{places}}}" if places else None)] if bounds.contain(Fraction(0)) else []
    if bounds.step is not None and not _is_decimal_ending(bounds.step):
        parts = [NumberTexts(tuple(zero))] if zero else []
        return [*parts, *_multiples(above, ""), *_multiples(below, "-")]
    positive, minus = _magnitude(above), _magnitude(below)
    patterns = [*([positive] if positive else []), *zero, *([f"-{minus}"] if minus else [])]
    if not patterns:
        raise UnsatisfiableError(_no_number(bounds))
    endings = () if bounds.step is None else (_endings(bounds.step, places),)
    return [NumberTexts((_group(patterns), *endings))]


def _exact(value: Any, name: str) -> Fraction:
    """Return a number of a schema as it was written."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise ValueError(f"{name} is {value!r:.60}; it must be a number")
    return Fraction(str(value))


def _bound(
    schema: dict[str, Any], name: str, exclusive: str, tighter: Callable[[Fraction, Fraction], Fraction]
) -> tuple[Fraction | None, bool]:
    """Return a bound and whether it is included: the tighter of the inclusive and the exclusive one."""
    plain = None if name not in schema else _exact(schema[name], name)
    open_end = schema.get(exclusive, False)
    if isinstance(open_end, bool):  # draft 4: whether the other keyword's bound is exclusive
        return plain, not open_end
    open_end = _exact(open_end, exclusive)
    if plain is None or tighter(plain, open_end) == open_end:
        return open_end, False
    return plain, True


def _tightened(bounds: Bounds) -> Bounds:
    """Return the same set of values with bounds that are themselves allowed, where there is a step.

    Raises:
        UnsatisfiableError: there is no such value.
    """
    low, high, step = bounds.low, bounds.high, bounds.step
    if bounds.whole:
        step = Fraction(1) if step is None else _common_multiple(step, Fraction(1))
    if step is not None:
        if low is not None:
            count = ceil(low / step)
            low = (count + (not bounds.low_included and count * step == low)) * step
        if high is not None:
            count = floor(high / step)
            high = (count - (not bounds.high_included and count * step == high)) * step
    if low is not None and high is not None:
        closed = step is not None or (bounds.low_included and bounds.high_included)
        if low > high or (low == high and not closed):
            raise UnsatisfiableError(_no_number(bounds))
    if step is None:
        return bounds
    return Bounds(low, True, high, True, None if bounds.whole and step == 1 else step, bounds.whole)


def _common_multiple(first: Fraction, second: Fraction) -> Fraction:
    """Return the smallest positive number that is a multiple of both."""
    from math import gcd, lcm

    return Fraction(lcm(first.numerator, second.numerator), gcd(first.denominator, second.denominator))


def _no_number(bounds: Bounds) -> str:
    """Return what is wrong with bounds that no number satisfies."""
    low, high = (None if value is None else _written(value) for value in (bounds.low, bounds.high))
    kind = "whole number" if bounds.whole else "number"
    if bounds.low is not None and bounds.high is not None and bounds.low > bounds.high:
        return f"minimum ({low}) is greater than maximum ({high})"
    return f"no {kind} satisfies the bounds (minimum {low}, maximum {high})"


def _written(value: Fraction) -> str:
    """Return a number as a schema would write it."""
    return str(value.numerator) if value.denominator == 1 else str(float(value))


# Digits


def _decimals(value: Fraction) -> int:
    """Return how many digits after the point a decimal has."""
    digits = 0
    while (value * 10**digits).denominator != 1:
        digits += 1
    return digits


def _places(bounds: Bounds) -> int:
    """Return the largest number of digits after the point."""
    if bounds.whole:
        return 0
    ends = [abs(value) for value in (bounds.low, bounds.high) if value is not None]
    written = max((_decimals(value) for value in ends), default=0)
    longest = max((len(str(floor(value))) for value in ends), default=1)
    exclusive = not (bounds.low_included and bounds.high_included)
    needed = written + (1 if exclusive or (written and len(ends) == 2) else 0)
    if bounds.step is not None:
        needed = max(written, _decimals(bounds.step))
    return max(needed, SIGNIFICANT_DIGITS - longest)


def _positive(bounds: Bounds) -> Bounds:
    """Return the bounds of the values above zero that are written."""
    if bounds.low is not None and bounds.low > 0:
        return bounds
    if bounds.whole or bounds.step is not None:
        return replace(bounds, low=bounds.step or Fraction(1), low_included=True)
    digits = ZEROS + 1 if bounds.high is None else max(ZEROS + 1, _decimals(bounds.high) + 3)
    return replace(bounds, low=Fraction(1, 10**digits), low_included=True)


def _magnitude(bounds: Bounds) -> str | None:
    """Return the expression, one group, of the decimals within bounds above zero; None where there are none."""
    low, high, high_included = bounds.low, bounds.high, bounds.high_included
    assert low is not None
    ends = [low] if high is None else [low, high]
    longest = max(WHOLE_DIGITS, *(len(str(floor(value))) + 1 for value in ends)) if ends else WHOLE_DIGITS
    if high is None:
        high, high_included = Fraction(10**longest), False
    if high < low or high <= 0:
        return None
    places = _places(bounds)
    first, last = floor(low), floor(high)
    low_digits, high_digits = _fraction_digits(low), _fraction_digits(high)
    if first == last:
        return _numbers(first, _tail(low_digits, bounds.low_included, high_digits, high_included, places))
    far = 0 if bounds.whole else max(places, FAR_PLACES)
    parts = []
    begin, end = first, last - 1
    if low_digits or not bounds.low_included:
        room = far if first < min(end, _FAR) else places
        parts.append(_numbers(first, _tail(low_digits, bounds.low_included, None, True, room)))
        begin += 1
    if far > places and begin < min(end, _FAR):
        parts.append(_whole_numbers(begin, min(end, _FAR) - 1) + _fraction(_any_digits(far)))
        begin = min(end, _FAR)
    if begin <= end:
        parts.append(_whole_numbers(begin, end) + _fraction(_any_digits(places)))
    parts.append(_numbers(last, _tail("", True, high_digits, high_included, places)))
    present = [part for part in parts if part is not None]
    return _group(present) if present else None


def _fraction_digits(value: Fraction) -> str:
    """Return the digits of a decimal after the point, without zeros at the end."""
    places = _decimals(value)
    return str(int((value - floor(value)) * 10**places)).rjust(places, "0") if places else ""


def _any_digits(places: int) -> str | None:
    """Return the expression of 1 to ``places`` digits; None where there is no place."""
    return f"[0-9]{{1,{places}}}" if places else None


def _fraction(digits: str | None) -> str:
    """Return the expression of an optional fraction with these digits."""
    return rf"(?:\.{digits})?" if digits else ""


def _group(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"


def _numbers(whole: int, tail: tuple[bool, str | None]) -> str | None:
    """Return the expression of a whole part with its fractions."""
    empty, digits = tail
    if empty:
        return f"{whole}{_fraction(digits)}"
    return rf"{whole}\.{digits}" if digits else None


def _tail(
    low: str, low_included: bool, high: str | None, high_included: bool, room: int
) -> tuple[bool, str | None]:
    """Return the digits after a point, within bounds that are the digits of two fractions.

    Args:
        low: digits of the lower bound, without zeros at the end.
        low_included: whether that bound is allowed.
        high: digits of the upper bound; None: all fractions are below it.
        high_included: whether that bound is allowed.
        room: the largest number of digits.

    Returns:
        Whether no digit at all is within the bounds, and the expression of one digit or more.
    """
    free = not low and low_included
    empty = free and (high is None or high != "" or high_included)
    if room == 0:
        return empty, None
    if free and high is None:
        return empty, _any_digits(room)
    if free and high == "":
        return empty, f"0{{1,{room}}}" if high_included else None
    groups: dict[str, list[int]] = {}
    for digit in range(10):
        at_low, at_high = int(low[:1] or 0), 10 if high is None else int(high[:1] or 0)
        if digit < at_low or digit > at_high:
            continue
        below = (low[1:], low_included) if digit == at_low else ("", True)
        above = (None if high is None else high[1:], high_included) if digit == at_high else (None, True)
        rest_empty, rest = _tail(*below, *above, room - 1)
        if rest is None and not rest_empty:
            continue
        following = "" if rest is None else f"(?:{rest})?" if rest_empty else rest
        groups.setdefault(following, []).append(digit)
    parts = [_digit_class(digits) + following for following, digits in groups.items()]
    return empty, _group(parts) if parts else None


def _digit_class(digits: list[int]) -> str:
    """Return the expression of one of some neighbouring digits."""
    return str(digits[0]) if len(digits) == 1 else f"[{''.join(map(str, digits))}]"


def _whole_numbers(low: int, high: int) -> str:
    """Return the expression of the whole numbers from ``low`` to ``high``, 0 <= low <= high."""
    parts = []
    free: list[int] = []  # lengths all of whose numbers are allowed
    for length in range(len(str(low)), len(str(high)) + 1):
        least, most = (10 ** (length - 1) if length > 1 else 0), 10**length - 1
        begin, end = max(low, least), min(high, most)
        if length > 1 and (begin, end) == (least, most):
            free.append(length)
        else:
            parts.append(_same_length(str(begin), str(end)))
    if free:
        parts.append(f"[1-9][0-9]{{{free[0] - 1},{free[-1] - 1}}}")
    return _group(parts)


def _same_length(low: str, high: str) -> str:
    """Return the expression of the digits from ``low`` to ``high``, which have the same length."""
    if not low:
        return ""
    if low == "0" * len(low) and high == "9" * len(high):
        return "[0-9]" if len(low) == 1 else f"[0-9]{{{len(low)}}}"
    groups: dict[str, list[int]] = {}
    for digit in range(int(low[0]), int(high[0]) + 1):
        begin = low[1:] if digit == int(low[0]) else "0" * (len(low) - 1)
        end = high[1:] if digit == int(high[0]) else "9" * (len(high) - 1)
        groups.setdefault(_same_length(begin, end), []).append(digit)
    return _group([_digit_class(digits) + following for following, digits in groups.items()])


# Multiples


def _is_decimal_ending(step: Fraction) -> bool:
    """Return whether a multiple is known by its last digits, and these have few endings."""
    scaled, count = _scaled(step)
    power: int = 10**count
    return power % scaled == 0 and power // scaled <= _SUFFIXES


def _scaled(step: Fraction) -> tuple[int, int]:
    """Return a step without its point, and how many last digits a multiple of it is known by."""
    scaled = int(step * 10 ** _decimals(step))
    count = next((count for count in range(30) if 10**count % scaled == 0), 0)
    return scaled, count


def _endings(step: Fraction, places: int) -> str:
    """Return the expression of decimals, a sign included, that are multiples of ``step`` by their last digits."""
    scaled, count = _scaled(step)
    decimals = _decimals(step)
    zeros = places - decimals
    endings = [str(value).rjust(count, "0") for value in range(0, 10**count, scaled)] if count else [""]
    if count <= decimals:
        # The whole part, and the first digits after the point, are free.
        before = decimals - count
        longer = [_stripped(ending, zeros) for ending in endings]
        fractions = [f"[0-9]{{{before}}}" * bool(before) + ending for ending in longer if ending]
        if before:
            fractions.insert(0, f"[0-9]{{1,{before}}}")
        if zeros + count > 0:  # zeros, which are the ending of some multiple
            fractions.append(f"[0-9]{{{before}}}" * bool(before) + f"0{{1,{zeros + count}}}")
        return "-?[0-9]+" + _fraction(_group(fractions) if fractions else None)
    parts = []
    for ending in endings:
        whole, fraction = ending[: count - decimals], ending[count - decimals :]
        stripped = _stripped(fraction, zeros)
        present = fraction.strip("0") != ""
        after = rf"\.{stripped}" if present else _fraction(f"0{{1,{places}}}" if places else None)
        parts.append(_group([f"[0-9]*{whole}", whole.lstrip("0") or "0"]) + after)
    return "-?" + _group(parts)


def _stripped(ending: str, zeros: int) -> str:
    """Return the expression of the last digits of a fraction, whose zeros at the end may be left out."""
    digits = ending.rstrip("0")
    if not digits:
        return ""
    spare = len(ending) - len(digits) + zeros
    return digits + (f"0{{0,{spare}}}" if spare else "")


def _multiples(bounds: Bounds, sign: str) -> Iterator[NumberTexts]:
    """Yield the texts of the multiples above zero, whose bounds are inclusive multiples of the step."""
    step, high = bounds.step, bounds.high
    assert step is not None
    low = bounds.low or step
    if high is None:  # as far as a double counts
        high = floor(Fraction(10**SIGNIFICANT_DIGITS) / step) * step
    if low > high:
        return
    number = int if bounds.whole or step.denominator == 1 else float
    schema = {"type": "integer" if number is int else "number", "multipleOf": number(step)}
    yield NumberTexts((), sign, schema | {"minimum": number(low), "maximum": number(high)})
