"""Several files' rows become one table: one kind of rows, one unit per benchmark, every statement once.

Trap: two files that hold the same episodes (a recording and its export, shards and their merge) would double n without
a word. Rows with the same key must agree; then they are one row and counted, else both are named and nothing is
written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from probes.imports.rows import COLUMNS, FRACTION, PERCENT, RECORD, STATED, UNKNOWN, Imported, Rows, blank
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

KEYS: dict[str, tuple[str, ...]] = {
    "episodes": ("model", "benchmark", "run_id", "task", "episode"),
    "performance": ("model", "benchmark", "task"),  # and the metric, where both state one
    "capability": ("model", "benchmark"),
}
# What must agree when the key does; the rest may differ, and what one file leaves open another fills.
_AGREE: dict[str, tuple[str, ...]] = {
    "episodes": ("success", "chain", "steps"),
    "performance": ("value", "successes", "episodes"),
    "capability": ("score", "n"),
}
_FIXES = {
    "episodes": "leave one out; if the evaluation was repeated, import one of them with another --run-id",
    "performance": "leave one out",
    "capability": "leave one out",
}
_CLOSE = 1e-9  # relative: the same number written with other digits


@dataclass(frozen=True)
class Table:
    """frame: the tidy table. duplicates: how many rows said what another had said; notes: what was converted."""

    rows: Rows
    frame: pd.DataFrame
    duplicates: int
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        return self.frame

    def unknown(self) -> dict[str, int]:
        """Column -> how many rows leave it open, for the columns that provenance consists of."""
        columns = [*STATED, "stderr", "n", "lineage", "successes", "episodes", "env_seed", "execute", "success_rule"]
        counts = {
            name: sum(
                blank(one) or one == UNKNOWN or (name == "version" and UNKNOWN in one) for one in self.frame[name]
            )
            for name in columns
            if name in self.frame
        }
        return {name: count for name, count in counts.items() if count}


def merge(parts: Sequence[Imported], wanted: Rows | None = None) -> Table:
    """One table of the files' rows; episodes are counted up when `wanted` is performance, or when both kinds are there
    and it is wanted. Raises InputError for kinds that do not go together, conflicting rows, and mixed units."""
    import pandas as pd

    rows = wanted or _common(parts)
    for part in parts:
        if part.rows != rows and not (rows == "performance" and part.rows == "episodes"):
            fix = f"leave --as {rows} out, or import it on its own"
            raise InputError(f"this file holds {part.rows}, not {rows}", where=part.path, fix=fix)
    duplicates, notes, frames = 0, [], []
    episodes = [part for part in parts if part.rows == "episodes"]
    if episodes:
        frame, duplicates = _once(pd.concat([part.frame for part in episodes], ignore_index=True), "episodes")
        if rows == "performance":
            repeated = frame.groupby(["model", "benchmark"], sort=False)["run_id"].nunique()
            notes += [
                f"{model} on {name}: {runs} runs counted together"
                for (model, name), runs in repeated.items()
                if runs > 1
            ]
            frame = _count(frame, episodes)
        frames.append(frame)
    rest = [part.frame for part in parts if part.rows != "episodes"]
    if rest:
        frames.append(pd.concat(rest, ignore_index=True))
    frame = pd.concat(frames, ignore_index=True)
    if rows != "episodes":
        frame, converted = one_unit(frame, "value" if rows == "performance" else "score")
        notes += converted
        frame, more = _once(frame, rows)
        duplicates += more
    if rows == "performance":
        notes += _counts(frame)
    return Table(rows, _typed(frame[list(COLUMNS[rows])]), duplicates, tuple(notes))


def _common(parts: Sequence[Imported]) -> Rows:
    kinds = list(dict.fromkeys(part.rows for part in parts))
    if len(kinds) == 1:
        return kinds[0]
    named = "; ".join(f"{kind}: {next(part.path for part in parts if part.rows == kind)}" for kind in kinds)
    fix = "add --as performance" if "capability" not in kinds else "import capability and policies into two tables"
    raise InputError("these files hold different kinds of rows", where=named, fix=fix)


# --- the same statement twice -----------------------------------------------------------------------------


def _once(frame: pd.DataFrame, rows: Rows) -> tuple[pd.DataFrame, int]:
    """Rows with equal keys become one. Raises InputError naming both records when they disagree."""
    import pandas as pd

    kept: list[dict[str, Any]] = []
    by_key: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in frame.to_dict("records"):
        key = tuple("" if blank(row[name]) else str(row[name]) for name in KEYS[rows])
        alike = by_key.setdefault(key, [])
        first = next((one for one in alike if rows != "performance" or _fits(one["metric"], row["metric"])), None)
        if first is None or (rows == "episodes" and not key[-1]):  # an episode without a number has no double
            alike.append(row)
            kept.append(row)
            continue
        for name in _AGREE[rows]:
            if not blank(first[name]) and not blank(row[name]) and not _same(first[name], row[name]):
                what = " on ".join(key[:2]) + (
                    f" ({' '.join(filter(None, key[2:]))})" if len(key) > 2 and any(key[2:]) else ""
                )
                said = f"{name} of {what} is {_plain(first[name])} and {_plain(row[name])}"
                raise InputError(said, where=f"{first[RECORD]} | {row[RECORD]}", fix=_FIXES[rows])
        for name, value in row.items():
            if _open(first[name]) and not _open(value):
                first[name] = value
        if (
            "source" in first
            and not _open(row["source"])
            and str(row["source"]) not in str(first["source"]).split(" + ")
        ):
            first["source"] = f"{first['source']} + {row['source']}"
    return pd.DataFrame(kept, columns=frame.columns, dtype=object), len(frame) - len(kept)


def _fits(a: Any, b: Any) -> bool:
    return blank(a) or blank(b) or a == b


def _open(value: Any) -> bool:
    return blank(value) or value == UNKNOWN


def _same(a: Any, b: Any) -> bool:
    return abs(float(a) - float(b)) <= _CLOSE * max(abs(float(a)), abs(float(b)), 1e-300)


def _plain(value: Any) -> str:
    return str(value) if isinstance(value, bool) else f"{float(value):.10g}"


# --- units ------------------------------------------------------------------------------------------------


def one_unit(frame: pd.DataFrame, column: str) -> tuple[pd.DataFrame, list[str]]:
    """Every benchmark (and task and metric) in one unit.

    Where some rows say fraction and others per cent, fractions are multiplied by 100, errors too; a success rate always
    becomes per cent (metric `success_pct`). Where a unit is not stated and a benchmark has values both in (0, 1] and
    above 1, nobody can tell, and an InputError names one of each.
    """
    import pandas as pd

    frame, notes = frame.reset_index(drop=True), []
    metric = frame["metric"] if "metric" in frame else frame["unit"].map(lambda _: None)
    task = frame.get("task", metric)
    rate = metric.isin(["success_rate", "success_pct"])
    same = metric.map(lambda name: "" if blank(name) else str(name)).mask(rate, "")  # unnamed values stand beside rates
    groups = [
        tuple("" if blank(cell) else str(cell) for cell in key)
        for key in zip(frame["benchmark"], task, same, strict=True)
    ]
    for _, index in frame.groupby(pd.Series(groups, dtype=object), sort=False).groups.items():
        part, units = frame.loc[index], set(frame.loc[index, "unit"])
        if any(str(unit).startswith(UNKNOWN) for unit in units) and "avg_len" not in set(same[index]):
            _refuse_mixed(part, column)
        rates = index[rate[index].to_numpy(bool)]
        unstated = rates[(frame.loc[rates, "unit"] == UNKNOWN).to_numpy(bool)]
        small = bool((part[column].astype(float) <= 1).all()) and PERCENT not in units
        frame.loc[unstated, "unit"] = FRACTION if small else PERCENT
        fractions = index[(frame.loc[index, "unit"] == FRACTION).to_numpy(bool)]
        if len(fractions) and (len(rates) or PERCENT in units):
            for name in {column, "stderr"} & set(frame.columns):
                frame.loc[fractions, name] = [None if blank(one) else 100 * one for one in frame.loc[fractions, name]]
            frame.loc[fractions, "unit"] = PERCENT
            notes.append(f"{part['benchmark'].iloc[0]}: {len(fractions)} fractions written in per cent")
        if len(rates):
            frame.loc[rates, "metric"] = "success_pct"
    for row in frame[frame["unit"].isin([PERCENT, FRACTION])].to_dict("records"):
        top = 100 if row["unit"] == PERCENT else 1
        if row[column] > top * (1 + _CLOSE):
            raise InputError(
                f"{row[column]:g} as a {row['unit']}", where=row[RECORD], fix="correct the value or its unit"
            )
    return frame, notes


def _refuse_mixed(part: pd.DataFrame, column: str) -> None:
    values = part[column].astype(float)
    small, large = part[(values > 0) & (values <= 1)], part[values > 1]
    if len(small):  # one model with two values is a conflict, and told as that
        large = large[large["model"] != small["model"].iloc[0]]
    if small.empty or large.empty:
        return
    low, high = small.iloc[0], large.iloc[0]
    both = f"{low['model']} has {low[column]:g} and {high['model']} {high[column]:g}"
    what = f"{both} on {low['benchmark']}: one may be a fraction"
    fix = "say it in a column unit (fraction, per cent, points), or import each file with its --unit"
    raise InputError(what, where=f"{low[RECORD]} | {high[RECORD]}", fix=fix)


def _counts(frame: pd.DataFrame) -> list[str]:
    """Fill in the successes that a rate and its episodes leave no choice about. Raises InputError where rate and counts
    differ by more than a point (less is rounding, or a mean over tasks)."""
    filled = 0
    for index, row in frame[(frame["metric"] == "success_pct") & (frame["unit"] == PERCENT)].iterrows():
        if blank(row["episodes"]) or not float(row["episodes"]) > 0:
            continue
        exact = float(row["value"]) * float(row["episodes"]) / 100
        if blank(row["successes"]):
            if abs(exact - round(exact)) < 1e-6:
                frame.loc[index, "successes"], filled = round(exact), filled + 1
        elif abs(float(row["value"]) - 100 * float(row["successes"]) / float(row["episodes"])) > 1:
            what = f"{row['value']:g} % is not {row['successes']} of {row['episodes']} episodes"
            raise InputError(what, where=row[RECORD], fix="correct the value or the counts")
    return [f"{filled} counts of successes follow from rate and episodes"] if filled else []


# --- episodes -> performance ------------------------------------------------------------------------------


def _count(frame: pd.DataFrame, parts: Sequence[Imported]) -> pd.DataFrame:
    """Episodes counted up: a total per model and benchmark, below it a row per task (or per step of a chain)."""
    import pandas as pd

    evaluators = " + ".join(dict.fromkeys(part.evaluator for part in parts))
    source = " + ".join(dict.fromkeys(part.path.name for part in parts))
    records = []
    for (model, name), rows in frame.groupby(["model", "benchmark"], sort=False):
        base = dict.fromkeys((*COLUMNS["performance"], RECORD)) | {
            "model": model, "benchmark": name, "task": "", "source": source, "quality": "counted from episodes",
            "evaluator": evaluators, "version": _one(rows["protocol"]), "episodes": len(rows), "unit": PERCENT,
            "metric": "success_pct", "family": _one(rows["family"], None), "lineage": _one(rows["lineage"], None),
            RECORD: f"{source}, {model} on {name}",
        }  # fmt: skip
        if rows["chain"].notna().all():
            lengths = rows["chain"].astype(int)
            longest = max(5, int(lengths.max()))
            records.append({**base, "metric": "avg_len", "value": float(lengths.mean()), "unit": "tasks in a row"})
            for k in range(1, longest + 1):
                done = int((lengths >= k).sum())
                records.append({**base, "task": f"{k} in a row", "metric": "step_rate", "value": done / len(rows),
                                "successes": done, "unit": FRACTION})  # fmt: skip
            continue
        tasks = list(rows.groupby("task", sort=False, dropna=False))
        for task, some in [("", rows), *(tasks if len(tasks) > 1 else [])]:
            done = int(some["success"].astype(bool).sum())
            counts = {"value": 100 * done / len(some), "successes": done, "episodes": len(some)}
            records.append({**base, **counts, "task": task})
    return pd.DataFrame(records, dtype=object)


def _one(values: Any, none: str | None = UNKNOWN) -> str | None:
    """What all rows say, or what they say differently; `none` when nobody says anything."""
    found = list(dict.fromkeys(str(value) for value in values if not blank(value)))
    return " / ".join(found) if found else none


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Numbers as numbers, text as text, empty where unknown: what `evaluate` writes."""
    import pandas as pd

    frame = frame.copy()
    whole = ("successes", "episodes", "n", "steps", "chain", "step", "train_seed", "env_seed", "execute")
    for name in frame.columns:
        values = [None if blank(value) else value for value in frame[name]]
        if name in whole and all(value is None or float(value).is_integer() for value in values):
            frame[name] = pd.array([None if value is None else int(value) for value in values], dtype="Int64")
        elif name in (*whole, "value", "score", "stderr", "wall_s", "params_b", "partial"):
            frame[name] = pd.array([None if value is None else float(value) for value in values], dtype="Float64")
        elif name == "success":
            frame[name] = pd.array(values, dtype="boolean")
        elif name == "episode":
            integers = all(isinstance(value, int) for value in values)
            frame[name] = pd.array(values if integers else [None if v is None else str(v) for v in values],
                                   dtype="Int64" if integers else "string")  # fmt: skip
        else:
            text = ["" if value is None and name == "task" else value for value in values]
            frame[name] = pd.array([None if value is None else str(value) for value in text], dtype="string")
    return frame.reset_index(drop=True)
