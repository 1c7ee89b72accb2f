"""Numbers as readers see them, in figures and sentences alike: a true minus, and never a minus before a zero."""

from __future__ import annotations

from collections.abc import Sequence


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign: `+0.12`, `−0.12`, `+0.00`."""
    return f"{value:+z.{digits}f}".replace("-", "−")


def plain(value: float, digits: int = 2) -> str:
    """A number without a plus: `0.12`, `−0.12`, `0.00`."""
    return f"{value:z.{digits}f}".replace("-", "−")


def span(low: float, high: float, digits: int = 2) -> str:
    """`+0.12 to +0.34`."""
    return f"{signed(low, digits)} to {signed(high, digits)}"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
