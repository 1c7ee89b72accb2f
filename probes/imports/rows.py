"""What every reader shares: a file's content, what the user states about it, and rows with their provenance.

Trap: what a file does not say stays unknown ("unknown" in a text column, an empty cell in a numeric one); a reader
never fills it with what is usual for its evaluator.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from vlm4vla_core.errors import InputError
from vlm4vla_core.results import CAPABILITY_COLUMNS, EPISODE_COLUMNS, PERFORMANCE_COLUMNS

if TYPE_CHECKING:
    import pandas as pd

Rows = Literal["episodes", "performance", "capability"]
UNKNOWN = "unknown"
PERCENT, FRACTION = "per cent", "fraction"
# The tidy columns of the design, and behind them what an import knows beyond them.
COLUMNS: dict[str, tuple[str, ...]] = {
    "episodes": EPISODE_COLUMNS,
    "performance": (*PERFORMANCE_COLUMNS, "evaluator", "version", "unit"),
    "capability": (*CAPABILITY_COLUMNS, "unit", "prompt"),
}
# Text that an import states as unknown; episode rows keep empty cells, as `evaluate` writes them.
STATED = ("source", "quality", "evaluator", "version", "unit", "prompt")
RECORD = "_record"  # file and record, for messages; never written


@dataclass(frozen=True)
class Labels:
    """What the user states about files that do not say it themselves; an empty string means: not stated."""

    model: str = ""
    family: str = ""
    lineage: str = ""
    benchmark: str = ""
    run_id: str = ""
    unit: str = ""

    def need_model(self, where: object, hint: str = "") -> str:
        """The stated model. Raises InputError when there is none."""
        if not self.model:
            raise InputError(
                f"the file does not say which model it is about{hint}", where=where, fix="add --model NAME"
            )
        return self.model


@dataclass(frozen=True)
class Content:
    """A file as it was read. form: what it is; value: the parsed JSON, a list of JSON lines, or a table of text."""

    path: Path
    form: Literal["sqlite", "json", "jsonl", "table"]
    value: Any = None


@dataclass(frozen=True)
class Imported:
    """One file's rows. left_out: what it holds beyond them; notes: what a reader of the table must know; says: the
    model that the file itself names, if it names one."""

    path: Path
    evaluator: str
    rows: Rows
    frame: pd.DataFrame
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    says: str = ""


def imported(
    content: Content,
    evaluator: str,
    rows: Rows,
    records: Iterable[Mapping[str, Any]],
    *,
    left_out: Sequence[str] = (),
    notes: Iterable[str] = (),
    says: str = "",
) -> Imported:
    """Rows from dicts: what misses is empty, in provenance "unknown". Raises InputError when none are there."""
    import pandas as pd

    table = list(records)
    if not table:
        what = f"the file holds no results{f' ({listing(left_out)})' if left_out else ''}"
        raise InputError(what, where=content.path)
    columns = COLUMNS[rows]
    frame = pd.DataFrame([{**dict.fromkeys(columns), **row} for row in table], dtype=object)
    for column in STATED:
        if column in columns:
            frame[column] = [UNKNOWN if blank(value) else value for value in frame[column]]
    frame = frame[[*columns, RECORD]]
    return Imported(content.path, evaluator, rows, frame, tuple(left_out), tuple(notes), says)


def blank(value: Any) -> bool:
    """Whether a cell says nothing: None, NaN, NA, or text that means one of them."""
    return str(value).strip().lower() in ("", "nan", "na", "<na>", "n/a", "none")


def number(value: Any, where: object, what: str) -> float:
    """A finite float, also from text such as "48.2" or "48.2%". Raises InputError naming record and value."""
    try:
        found = float(value.strip().removesuffix("%") if isinstance(value, str) else value)
    except (TypeError, ValueError):
        found = math.nan
    if isinstance(value, bool) or not math.isfinite(found):
        fix = "leave the record out if the value is unknown"
        raise InputError(f"{what} is {_shown(value)}, not a finite number", where=where, fix=fix)
    return found


def is_number(value: Any) -> TypeGuard[float]:
    """A number as JSON writes it; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def truth(value: Any, where: object, what: str) -> bool:
    """An outcome: true or false, 1 or 0, also as text. Raises InputError for anything else."""
    known = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    found = known.get(str(value).strip().lower())
    if found is None:
        raise InputError(f"{what} is {_shown(value)}, neither true nor false", where=where, fix="write 1 or 0")
    return found


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


def listing(names: Iterable[str], most: int = 6) -> str:
    """`a, b, c and 4 more`."""
    found = list(dict.fromkeys(map(str, names)))
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
