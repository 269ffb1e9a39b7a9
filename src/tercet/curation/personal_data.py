"""Mask personal data: find it by its form, verify its check digits, replace it by its kind.

Data without check digits is masked only in forms that hardly mean anything else. Names and postal addresses
are not masked. All patterns are bounded, so that time grows in proportion to the text.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator

# Patterns begin with something rare, and a lookbehind comes after it: the search skips ordinary text fast.
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9-])"
)
_IBAN = re.compile(r"[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_COLONS = re.compile(r":[0-9A-Fa-f]{0,4}:")
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]{3,39}(?![\w:])")
_RUN = re.compile(r"[+(]?[0-9][0-9 .()/+-]{6,}")  # contains every match of the following patterns
_NUMBERS = (
    ("IP_ADDRESS", re.compile(r"(?<![\w.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?!\w|\.[0-9])")),
    ("CARD", re.compile(r"(?<![\w.,-])[2-6][0-9]{3}(?:[ -]?[0-9]{4}){2}[ -]?[0-9]{1,7}(?![\w-])")),
    ("CARD", re.compile(r"(?<![\w.,-])3[47][0-9]{2}[ -]?[0-9]{6}[ -]?[0-9]{5}(?![\w-])")),
    (
        "PHONE",
        re.compile(
            r"(?<![\w+])\+[0-9]{1,3}[ ./-]?(?:\([0-9]{1,4}\)[ ./-]?)?[0-9]{1,12}(?:[ ./-][0-9]{2,8}){0,5}(?!\w)"
        ),
    ),
    ("PHONE", re.compile(r"(?<![\w+.-])(?:\([0-9]{3}\) ?|[0-9]{3}[.-])[0-9]{3}[.-][0-9]{4}(?![\w-])")),
)

Span = tuple[int, int, str]


def mask_personal_data(text: str) -> tuple[str, Counter[str]]:
    """Replace personal data in ``text``.

    The kinds are ``[EMAIL]``; ``[IP_ADDRESS]`` (public addresses only; private and reserved ones identify
    nobody); ``[PHONE]`` (with a country code, or ten digits in North American form); ``[IBAN]`` and
    ``[CARD]`` (with correct check digits: ISO 7064 mod 97-10 and ISO/IEC 7812 Luhn).

    Returns:
        The masked text, and the number of values by kind.
    """
    spans = [*_numbers(text), *_ibans(text)]
    if "@" in text:
        spans += [(*match.span(), "EMAIL") for match in _EMAIL.finditer(text)]
    if ":" in text:
        spans += _ipv6(text)
    if not spans:
        return text, Counter()
    counts: Counter[str] = Counter()
    pieces: list[str] = []
    end = 0
    for first, last, kind in sorted(spans):
        if first < end:  # inside a span that was replaced
            continue
        pieces += [text[end:first], f"[{kind}]"]
        counts[kind] += 1
        end = last
    return "".join([*pieces, text[end:]]), counts


def _numbers(text: str) -> Iterator[Span]:
    """Yield the spans of IPv4 addresses, card and phone numbers."""
    for run in _RUN.finditer(text):
        if sum(map(run.group().count, "0123456789")) < 4:
            continue
        for kind, pattern in _NUMBERS:
            # One character more, for the lookahead at the end of a pattern.
            for match in pattern.finditer(text, run.start(), run.end() + 1):
                if _CHECKS[kind](match.group()):
                    yield *match.span(), kind


def _ibans(text: str) -> Iterator[Span]:
    for match in _IBAN.finditer(text):
        before = text[match.start() - 1 : match.start()]
        if not (before.isascii() and before.isalnum()) and _mod_97(match.group()):
            yield *match.span(), "IBAN"


def _ipv6(text: str) -> Iterator[Span]:
    end = 0
    for colons in _COLONS.finditer(text):
        if colons.start() < end:
            continue
        for match in _IPV6.finditer(text, max(end, colons.start() - 5), colons.start() + 41):
            end = match.end()
            if match.start() <= colons.start() and _public(match.group()):
                yield *match.span(), "IP_ADDRESS"


def _public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def _digits(text: str) -> str:
    return "".join(character for character in text if character.isdigit())


def _mod_97(text: str) -> bool:
    code = text.replace(" ", "")
    if not 15 <= len(code) <= 34:
        return False
    return int("".join(str(int(character, 36)) for character in code[4:] + code[:4])) % 97 == 1


def _luhn(text: str) -> bool:
    digits = [int(character) for character in _digits(text)]
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    doubled = [2 * digit - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _phone_length(text: str) -> bool:
    return 8 <= len(_digits(text)) <= 15  # ITU-T E.164


_CHECKS: dict[str, Callable[[str], bool]] = {"IP_ADDRESS": _public, "CARD": _luhn, "PHONE": _phone_length}
