"""What tables of scores must not hold: found before anything is computed, and refused by name with the way out.

Trap: 0.48 beside 52 and 33 correlates as happily as 48. A column is judged as a whole: by its counts where it has some,
by the name of its metric, else by a gap that no benchmark leaves between a model and all others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlm4vla_core.errors import InputError
from vlm4vla_core.results import CAPABILITY_COLUMNS, EPISODE_COLUMNS, PERFORMANCE_COLUMNS, require_columns

if TYPE_CHECKING:
    import pandas as pd

_KNOWN = {*CAPABILITY_COLUMNS, *PERFORMANCE_COLUMNS, *EPISODE_COLUMNS, "selection", "unit"}
_LARGEST = 1e100  # squares of larger ones overflow
_NEAR = 0.02  # a printed rate may differ from its counts by rounding
# Optional columns of numbers: (smallest, whole).
_NUMBERS = {"stderr": (0, False), "n": (1, True), "successes": (0, True), "episodes": (1, True)}


def checked(frame: pd.DataFrame, required: tuple[str, ...], where: str) -> pd.DataFrame:
    """A copy with trimmed labels and floats in the last required column and all of `_NUMBERS`.

    Raises InputError for columns that are missing, stand twice or are named otherwise, for empty labels, and for
    what is no number.
    """
    import pandas as pd

    check_names(frame, required, where)
    frame = frame.copy()
    for column in ("model", "benchmark"):
        if column in frame:
            text = frame[column].astype("string").str.strip()
            if text.isna().any() or (text == "").any():
                row = int(np.flatnonzero(text.isna() | (text == ""))[0]) + 1
                raise InputError(f"row {row} has no {column}", where=where, fix="name it or leave the row out")
            frame[column] = text.astype(object)
    for column in (required[-1], *(name for name in _NUMBERS if name in frame)):
        needed = column not in _NUMBERS
        least, whole = _NUMBERS.get(column, (-_LARGEST, False))
        truth = frame[column].map(lambda value: isinstance(value, bool | np.bool_))
        numbers = pd.to_numeric(frame[column].astype(object), errors="coerce").astype(float)
        values = numbers.to_numpy()
        good = np.isfinite(values) & (values >= least) & (values <= _LARGEST) & ~truth.to_numpy()
        if whole:
            good &= values % 1 == 0
        if not needed:
            good |= ~_stated(frame[column]).to_numpy()
        if not good.all():
            row = frame.iloc[int(np.flatnonzero(~good)[0])]
            kind = f"a {'whole' if whole else 'finite'} number" + ("" if needed else f" of {least} or more")
            kind += " of reasonable size" if isinstance(row[column], float) and abs(row[column]) > _LARGEST else ""
            place = " on ".join(str(row[name]) for name in ("model", "benchmark") if name in frame)
            if "task" in frame and _stated(frame["task"])[row.name]:
                place += f", task {row['task']},"
            raise InputError(
                f"{column} of {place} is '{row[column]}', not {kind}",
                where=where,
                fix="leave the row out if the value is unknown" if needed else "leave it empty if it is unknown",
            )
        frame[column] = numbers
    return frame


def check_names(frame: pd.DataFrame, required: tuple[str, ...], where: str) -> None:
    """Raise InputError for columns that are missing, stand twice, or are ours but for case and spaces."""
    columns = list(map(str, frame.columns))
    if twice := [name for i, name in enumerate(columns) if name in columns[:i]]:
        raise InputError(f"two columns are called {twice[0]}", where=where, fix="rename or remove one")
    other = {name: name.strip().lower() for name in columns if name not in _KNOWN and name.strip().lower() in _KNOWN}
    if other:
        raise InputError(
            f"column{'s' * (len(other) > 1)} {', '.join(map(repr, other))} would not be read",
            where=where,
            fix=f"name {'them' if len(other) > 1 else 'it'} {', '.join(other.values())}",
        )
    try:
        require_columns(frame, required, where)
    except InputError as error:
        fix = f"{error.fix}; `vlm4vla import-results` makes the table from other evaluators' files and other names"
        raise InputError(error.what, where=where, fix=fix) from None


def no_duplicates(frame: pd.DataFrame, column: str, where: str) -> None:
    """One row per model and benchmark."""
    twice = frame[frame.duplicated(["model", "benchmark"], keep=False)]
    if twice.empty:
        return
    first = twice[(twice["model"] == twice["model"].iloc[0]) & (twice["benchmark"] == twice["benchmark"].iloc[0])]
    details = ", ".join(f"{value:g}" for value in first[column])
    if "metric" in first and first["metric"].nunique() > 1:
        details = ", ".join(f"{row.metric} {getattr(row, column):g}" for row in first.itertuples())
    raise InputError(
        f"{first['model'].iloc[0]} stands {len(first)} times under {first['benchmark'].iloc[0]} ({details})",
        where=where,
        fix="keep one row per model and benchmark",
    )


def check_units(frame: pd.DataFrame, column: str, where: str) -> None:
    """Raise InputError for a benchmark in two metrics or units, and for fractions among percentages."""
    for benchmark, rows in frame.groupby("benchmark", sort=False):
        values, models = rows[column].to_numpy(float), rows["model"].tolist()
        for kind in ("metric", "unit"):
            stated = rows[kind].where(_stated(rows[kind])).dropna() if kind in rows else ()
            if len(own := list(dict.fromkeys(stated))) > 1:
                first = [rows.loc[rows[kind] == name, "model"].iloc[0] for name in own[:2]]
                raise InputError(
                    f"{benchmark} has {kind} {own[0]} ({first[0]}) and {own[1]} ({first[1]})",
                    where=where,
                    fix=f"give every {column} of a benchmark in the same {kind}",
                )
        rate = _rates(rows)
        percent = np.abs(values - 100 * rate) < np.abs(values - rate)  # False where no counts are known
        metric, top = str(rows["metric"].iloc[0]) if "metric" in rows else "", values.max()
        if "pct" in metric and 0 < top <= 1 and not percent.any():
            raise InputError(
                f"{metric} on {benchmark} goes up to {top:g} only: these are fractions, not per cent",
                where=where,
                fix="multiply by 100, or name the metric success_rate",
            )
        limit = 100 if metric == "success_pct" else 1 if metric in ("success_rate", "step_rate") else np.inf
        if limit < np.inf and ((values < 0) | (values > limit)).any():
            row = int(np.flatnonzero((values < 0) | (values > limit))[0])
            raise InputError(
                f"{models[row]} has {values[row]:g} on {benchmark}, but {metric} lies between 0 and {limit}",
                where=where,
                fix="per cent is named success_pct" if limit == 1 else "correct it",
            )
        mixed = _fractions(values, rate, percent)
        if mixed.any() and not mixed.all():
            row, other = int(np.flatnonzero(mixed)[0]), int(np.flatnonzero(~mixed & (values >= 1))[0])
            raise InputError(
                f"{models[row]} has {values[row]:g} on {benchmark}, a fraction among percentages "
                f"({models[other]} has {values[other]:g})",
                where=where,
                fix=f"give every {column} of a benchmark in the same unit"
                + ("" if column == "score" else "; if it is right, state its successes and episodes"),
            )


def _rates(rows: pd.DataFrame) -> np.ndarray:
    """(rows,) successes / episodes, NaN where either is unknown."""
    if "successes" not in rows or "episodes" not in rows:
        return np.full(len(rows), np.nan)
    return (rows["successes"] / rows["episodes"]).to_numpy(float)


def _fractions(values: np.ndarray, rate: np.ndarray, percent: np.ndarray) -> np.ndarray:
    """(rows,) which values are fractions although others are percentages: by the counts, else by a gap in the values.

    The gap: nothing negative, everything else up to 100 and at least ten times the largest value below 1, while a
    hundred times those values would be among the others (within a factor of two).
    """
    # Up to 3 % the two readings are too close; a value that fits neither is the business of `check_totals`.
    by_counts = (np.abs(values - rate) <= _NEAR) & (rate > 0.03)
    by_percent = (np.abs(values / 100 - rate) <= _NEAR) & (rate > 0.03)
    if by_counts.any() and (by_percent & ~by_counts).any():
        return np.asarray(by_counts & ~by_percent)
    low = (values > 0) & (values < 1) & ~percent
    rest = values[(values > 0) & ~low]
    if not low.any() or not rest.size or (values < 0).any() or not 10 < rest.max() <= 100:
        return np.zeros(len(values), bool)
    among = rest.min() / 2 <= 100 * np.median(values[low]) <= 2 * rest.max()
    return low & bool(among and rest.min() >= 10 * values[low].max())


def check_counts(rows: pd.DataFrame, where: str) -> None:
    """Raise InputError for more successes than episodes."""
    if "successes" not in rows or "episodes" not in rows:
        return
    wrong = rows[rows["successes"] > rows["episodes"]]
    if not wrong.empty:
        row = wrong.iloc[0]
        raise InputError(
            f"{row['successes']:g} successes of {row['episodes']:g} episodes",
            where=f"{where}, {row['model']} on {row['benchmark']}",
            fix="correct the counts or leave them empty",
        )


def check_totals(
    models: tuple[str, ...],
    benchmark: str,
    metric: str,
    totals: tuple[np.ndarray, np.ndarray, np.ndarray],
    below: tuple[np.ndarray, np.ndarray] | None,
    places: tuple[str, str],
    from_episodes: bool,
) -> None:
    """A total, its own counts and what stands below it tell one story.

    totals: value, successes, episodes of each model; below: successes and episodes, (models, tasks). places: where both
    stand. Raises InputError for other counts, and for a success rate that its counts do not give.
    """
    values, said, of = totals
    rates = [said / of]
    done = number = np.full(len(models), np.nan)
    if below is not None:
        some = np.isfinite(below[1]).any(axis=1)
        done, number = (np.where(some, np.nansum(one, axis=1), np.nan) for one in below)
        apart = (np.isfinite(said) & (said != done)) | (np.isfinite(of) & (of != number))
        whole = from_episodes | (np.isfinite(below[0]).all(axis=1) & (of == number))  # a table may list some tasks only
        for row in np.flatnonzero(some & apart & whole):
            stated = f"{said[row]:g} successes" if np.isfinite(said[row]) else "a total"
            stated += f" of {of[row]:g} episodes" if np.isfinite(of[row]) else ""
            raise InputError(
                f"{models[row]} on {benchmark}: {stated} in {places[0]}, "
                f"but {done[row]:g} of {number[row]:g} in {places[1]}",
                where=", ".join(places),
                fix="correct one of the two, or leave the counts of the total empty",
            )
        share = below[0] / below[1]
        tasks = np.isfinite(share).sum(axis=1)
        rates += [done / number, np.where(tasks > 0, np.nansum(share, axis=1) / np.maximum(tasks, 1), np.nan)]
    gaps = np.minimum(np.abs(values - np.array(rates)), np.abs(values / 100 - np.array(rates)))
    gaps = np.where(np.isfinite(gaps), gaps, np.inf).min(axis=0)  # pooled, or the mean over tasks
    known = np.isfinite(gaps)
    named = metric in ("success_pct", "success_rate")
    if not named and (metric not in ("", "unknown") or 2 * (gaps <= _NEAR).sum() < known.sum()):
        return  # another measure
    rows_decide = from_episodes and named  # else they may be of another measure, or of some episodes only
    for row in np.flatnonzero(known & (gaps > (0.01 if rows_decide else _NEAR))):
        counts = (done[row], number[row]) if rows_decide else (said[row], of[row])
        if not np.isfinite(counts).all():
            continue
        raise InputError(
            f"{models[row]} on {benchmark}: {metric or 'value'} {values[row]:g} in {places[0]}, but {counts[0]:g} of "
            f"{counts[1]:g} episodes in {places[1] if rows_decide else 'the same row'}",
            where=", ".join(places) if rows_decide else places[0],
            fix="give the results of one evaluation" if rows_decide else "correct one of the two",
        )


def check_lineages(lineages: dict[str, tuple[str, str]]) -> None:
    """lineages: model -> (lineage, table). Raises InputError for two that differ by case or spaces only."""
    seen: dict[str, tuple[str, str]] = {}
    for model, (lineage, where) in lineages.items():
        other, before = seen.setdefault("".join(lineage.lower().split()), (lineage, model))
        if other != lineage:
            raise InputError(
                f"lineage '{other}' ({before}) and '{lineage}' ({model}) would count as two",
                where=where,
                fix="write it one way",
            )


def _stated(column: pd.Series) -> pd.Series:
    """Which cells say something: not empty, not `unknown`."""
    return column.notna() & ~column.astype(str).str.strip().str.lower().isin(["", "unknown", "nan"])
