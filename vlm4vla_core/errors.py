"""The one exception for bad input; the CLI turns it into a single line and exit code 2.

Trap: it is for what a *user* can mend (a path, a key, a damaged file). A broken invariant of ours is
an AssertionError or ValueError and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """Bad input, told in one line: what is wrong, where, and what to do about it.

    `what` and `fix` are short clauses without a final stop; `where` is a path, a record or a key.
    """

    def __init__(self, what: str, *, where: object = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, str(where), fix
        line = what
        if self.where:
            line += f" [{self.where}]"
        if fix:
            line += f"; {fix}"
        super().__init__(line)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names what is known, the nearest first: `did you mean 'x'? known: x, y`."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listing = ", ".join(names) if names else "none"
    return (f"did you mean '{close[0]}'? " if close else "") + f"known: {listing}"
