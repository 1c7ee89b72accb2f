"""What verbs print for people: columns, wrapped sentences, p values. Trap: nothing here may be read by a program."""

from __future__ import annotations

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """Left-aligned columns; one that is empty (`–` or nothing) throughout is left out."""
    keep = [i for i in range(len(head)) if any(row[i] not in ("–", "") for row in rows)]
    table = [[row[i] for i in keep] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(keep))]
    lines = ("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in table)
    return "\n".join(f"  {line}" for line in lines)


def say(text: str, indent: str = "") -> None:
    """Print a sentence wrapped to the terminal, at most 110 letters a line."""
    import shutil
    import textwrap

    width = min(shutil.get_terminal_size((110, 24)).columns, 110)
    print(textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent or "  "))


def p_value(p: float) -> str:
    """Four decimals, or the power of ten."""
    return f"{p:.4f}" if p >= 5e-5 else f"{p:.0e}" if p >= 1e-99 else "<1e-99"


def signed_span(span: Sequence[float], digits: int) -> str:
    """`+0.10 to +0.35`."""
    return f"{span[0]:+.{digits}f} to {span[1]:+.{digits}f}"
