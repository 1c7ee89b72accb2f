"""Progress bars for long work: rate and remaining time on a terminal, silence anywhere else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def progress(iterable: Iterable[Any] | None = None, *, total: int | None = None, what: str, unit: str = "it") -> Any:
    """A tqdm bar over `iterable` (or to be `.update`d by hand); nothing is printed when stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(iterable, total=total, desc=what, unit=unit, disable=None, leave=False, dynamic_ncols=True)
