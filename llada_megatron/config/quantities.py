"""Quantities for people: counts, bytes and times in a few digits. Standard library only."""

from __future__ import annotations

GB = 1e9


def short_count(number: float | None) -> str:
    """A count for people: 950, 12.3k, 1.2M, 4.1B, 2.0T; `-` for None."""
    if number is None:
        return "-"
    for limit, divisor, suffix in ((1e3, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M"), (1e12, 1e9, "B")):
        if number < limit:
            return f"{number:.0f}" if divisor == 1 else f"{number / divisor:.1f}{suffix}"
    return f"{number / 1e12:.1f}T"


def so_many(number: int, name: str) -> str:
    """1 token, 2 tokens."""
    return f"{number:,} {name}{'s' * (number != 1)}"


def quantity(number: float) -> str:
    """Three digits and a letter before a unit: 1.29 G, 512 M, 34.1 k."""
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def amount(size: float) -> str:
    """Bytes as 71.7 GB, or 8.5 MB below one."""
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / 1e6:.1f} MB"


def duration(hours: float) -> str:
    """Seconds, minutes, hours or days, in a sentence."""
    if hours < 1 / 60:
        return f"{3600 * hours:.1f} seconds"
    if hours < 1:
        return f"{60 * hours:.1f} minutes"
    return f"{hours / 24:.1f} days" if hours >= 72 else f"{hours:.1f} hours"


def short_time(seconds: float) -> str:
    """Seconds, minutes or hours, in a table."""
    if seconds < 600:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 36_000 else f"{seconds / 3600:.1f} h"


def short_hours(hours: float) -> str:
    """Whole from 100 on; small ones to a third of a second."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2f}" if hours >= 1 else f"{hours:.4f}"
