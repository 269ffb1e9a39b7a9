"""Numbers as text, for the page and the terminal."""

from __future__ import annotations

from typing import Any

from tercet.progress import duration


def percent(share: float | None) -> str:
    """Return a share as ``82.3%``; "" for None."""
    return "" if share is None else f"{100 * share:.1f}%"


def points(share: float) -> str:
    """Return a difference as ``+4.2`` percentage points; zero has no sign."""
    value = round(100 * share, 1)
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}") if value else "0.0"


def p_value(p: float) -> str:
    """Return a p-value as ``0.031`` or ``< 0.001``."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def seconds(value: float | None) -> str:
    """Return a latency as ``0.4 ms``, ``38 ms`` or ``1.24 s``; "" for None."""
    if value is None:
        return ""
    if value < 0.01:
        return f"{1000 * value:.2g} ms" if value >= 5e-5 else "< 0.1 ms"
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.2f} s" if value < 60 else duration(value)


def money(dollars: float | None) -> str:
    """Return an amount as ``$0.42``, with two significant digits below a cent; "" for None."""
    if dollars is None:
        return ""
    return f"${dollars:,.2f}" if dollars >= 0.01 or dollars == 0 else f"${dollars:.2g}"


def plain(value: Any) -> str:
    """Return a value of a free-form mapping as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(plain(entry) for entry in value)
    return str(value)
