"""The tidy tables that everything downstream reads, and the intervals that success rates never go without.

Three row kinds (design contract): one row per episode, per published or aggregated performance value, per
capability score. Trap: an unknown value is an empty cell, never a zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

EPISODE_COLUMNS = (
    "run_id", "model", "family", "lineage", "params_b", "init", "freeze", "aux", "train_seed", "step", "benchmark",
    "protocol", "task", "episode", "env_seed", "execute", "success", "success_rule", "steps", "chain", "partial",
    "wall_s", "note",
)  # fmt: skip
# Beyond the contract: of the simulators that tell them apart, and where a sampling head's noise was asked for.
FURTHER_COLUMNS = ("success_last", "success_ever", "draw")
PERFORMANCE_COLUMNS = (
    "model", "family", "lineage", "benchmark", "task", "metric", "value", "successes", "episodes", "source", "quality",
)  # fmt: skip
CAPABILITY_COLUMNS = (
    "model", "family", "lineage", "benchmark", "score", "stderr", "n", "evaluator", "version", "source", "quality",
)  # fmt: skip


class Interval(NamedTuple):
    """A closed interval [low, high]."""

    low: float
    high: float


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a proportion (Wilson 1927). Raises ValueError unless 0 <= successes <= n, n > 0."""
    from statistics import NormalDist  # scipy's import would be half of what a verb takes that has nothing to do

    _check_counts(successes, n)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # The bounds are exact at the ends; rounding must not push them outside [0, 1].
    return Interval(0.0 if successes == 0 else float(centre - half), 1.0 if successes == n else float(centre + half))


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Exact interval of a proportion (Clopper and Pearson 1934). Raises ValueError as `wilson`."""
    from scipy.stats import beta

    _check_counts(successes, n)
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, n - successes + 1))
    high = 1.0 if successes == n else float(beta.ppf(1 - tail, successes + 1, n - successes))
    return Interval(low, high)


def _check_counts(successes: int, n: int) -> None:
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} episodes is no proportion")


def episode_row(
    benchmark: Any, labels: Mapping[str, Any], execute: int, cell: tuple[str, int], *, env_seed: int, wall_s: float,
    outcome: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """One row of EPISODE_COLUMNS, with FURTHER_COLUMNS where the outcome has them; notes of policy and world joined."""
    row: dict[str, Any] = dict.fromkeys(EPISODE_COLUMNS)
    row.update(labels)
    row.update(
        benchmark=benchmark.name, protocol=benchmark.protocol, task=cell[0], episode=cell[1], env_seed=env_seed,
        execute=execute, success_rule=benchmark.success_rule, wall_s=round(wall_s, 4), **outcome,
    )  # fmt: skip
    row["note"] = "; ".join(note for note in (labels.get("note"), outcome.get("note")) if note) or None
    return row


def read_table(path: Path, *, required: tuple[str, ...] = ()) -> pd.DataFrame:
    """Read a CSV or parquet table.

    Raises InputError when it is missing, empty, lacks a required column, or is a CSV that is not UTF-8, not separated
    by commas, names a column twice or has a row of another length than its header.
    """
    import csv

    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise InputError("no such table", where=path)
    try:
        if path.suffix != ".parquet":
            _check_csv(path)
        frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except UnicodeDecodeError:
        raise InputError("is not text in UTF-8", where=path, fix="save the table as CSV in UTF-8") from None
    except (ValueError, OSError, csv.Error) as error:  # pandas' and pyarrow's errors derive from these
        raise InputError(f"cannot be read as a table ({str(error).splitlines()[0]})", where=path) from None
    require_columns(frame, required, path)
    if frame.empty:
        raise InputError("the table has no rows", where=path)
    return frame


def _check_csv(path: Path) -> None:
    """Refuse what pandas repairs in silence: it shifts columns under rows that are too long, and renames the second of
    two columns with one name."""
    import csv

    with path.open(encoding="utf-8-sig", newline="") as handle:
        lines = csv.reader(handle)
        header = next((row for row in lines if row), [])
        if len(header) == 1 and (found := [name for sign, name in ((";", "';'"), ("\t", "tabs")) if sign in header[0]]):
            fix = "save it with commas, or let `vlm4vla import-results` read it"
            raise InputError(f"cells are separated by {found[0]}, not by commas", where=path, fix=fix)
        if twice := [name for i, name in enumerate(header) if name and name in header[:i]]:
            raise InputError(f"two columns are called {twice[0]}", where=path, fix="rename or remove one")
        for row in lines:
            if row and len(row) != len(header):
                raise InputError(
                    f"line {lines.line_num} has {len(row)} cells, the header {len(header)}",
                    where=path,
                    fix="an unknown value is an empty cell; quote a cell that holds a comma",
                )


def require_columns(frame: pd.DataFrame, required: tuple[str, ...], where: object) -> None:
    """Raise InputError naming the required columns that a table lacks, and those it has."""
    if missing := [column for column in required if column not in frame.columns]:
        raise InputError(
            f"missing column{'s' * (len(missing) > 1)} {', '.join(missing)}",
            where=where,
            fix=f"the table has: {', '.join(map(str, frame.columns))}",
        )


def success_table(rows: pd.DataFrame, by: list[str], level: float = 0.95) -> pd.DataFrame:
    """Success per group with its n and its interval.

    rows: episode rows (columns `success` and `by`). Returns one row per group in order of appearance:
    by…, episodes, successes, rate, low, high (Wilson).
    """
    import pandas as pd

    table = []
    for key, group in rows.groupby(by, sort=False, dropna=False):
        k, n = int(group["success"].sum()), len(group)
        table.append((*(key if isinstance(key, tuple) else (key,)), n, k, k / n, *wilson(k, n, level)))
    return pd.DataFrame(table, columns=[*by, "episodes", "successes", "rate", "low", "high"])
