"""Two tidy tables in, one matrix of models by scores out; nothing is dropped without being named.

Required are only `model, score` and `model, benchmark, value`; what else is missing weakens the report and is listed
in `not_stated`; what is wrong is refused (`score_checks`). Trap: rows with a `task` belong below a benchmark: they tell
how noisy its total is and are never averaged into one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from probes.score_checks import (
    check_counts,
    check_lineages,
    check_names,
    check_totals,
    check_units,
    checked,
    no_duplicates,
)
from vlm4vla_core.errors import InputError, nearest

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class TaskCounts:
    """Outcomes below one benchmark: successes and episodes, (models, tasks), NaN where unknown.

    states: a (models, initial states, repeats) table of outcomes (1, 0) per task, NaN where a model did not run a state
    as often as the others; None when the rows name no initial states.
    """

    tasks: tuple[str, ...]
    successes: np.ndarray
    episodes: np.ndarray
    states: tuple[np.ndarray, ...] | None = None


@dataclass(frozen=True)
class Scores:
    """x, stderr: (models, capabilities), y, successes, episodes: (models, benchmarks); NaN where unknown.

    lineages: one per model, empty where not stated. step_rates: benchmark -> (models, 5), the share of chains with at
    least k tasks done. unmatched: model -> what it lacks.
    """

    models: tuple[str, ...]
    lineages: tuple[str, ...]
    capabilities: tuple[str, ...]
    benchmarks: tuple[str, ...]
    x: np.ndarray
    stderr: np.ndarray
    y: np.ndarray
    successes: np.ndarray
    episodes: np.ndarray
    task_counts: dict[str, TaskCounts]
    step_rates: dict[str, np.ndarray]
    metrics: dict[str, str]
    units: dict[str, str]
    selection: dict[str, str]
    unmatched: dict[str, str]
    not_stated: tuple[str, ...]


def gather(
    capability: pd.DataFrame,
    performance: pd.DataFrame,
    episodes: pd.DataFrame | None = None,
    names: tuple[str, str, str] = ("the capability table", "the performance table", "the episode rows"),
) -> Scores:
    """Join the tables on `model`. episodes: one row per episode; its counts by task replace those of `performance`.

    names: where the tables came from, for error messages. Raises InputError for missing columns, scores that are no
    finite numbers, duplicates, impossible counts, percentages given as fractions, and when fewer than three models
    are in both tables.
    """
    scores = checked(capability, ("model", "score"), names[0])
    values = checked(performance, ("model", "benchmark", "value"), names[1])
    if "benchmark" not in scores:
        scores["benchmark"] = "capability"
    task = values["task"].fillna("").astype(str).str.strip() if "task" in values else ""
    values["task"] = task
    below, totals = values[values["task"] != ""], values[values["task"] == ""]
    if totals.empty:
        raise InputError(
            "every row has a task, so no benchmark has a total", where=names[1], fix="add rows with an empty task"
        )
    no_duplicates(scores, "score", names[0])
    no_duplicates(totals, "value", names[1])
    check_counts(totals, names[1])
    check_units(scores, "score", names[0])
    check_units(totals, "value", names[1])

    both = [model for model in dict.fromkeys(scores["model"]) if model in set(totals["model"])]
    if len(both) < 3:
        raise InputError(
            f"{len(both)} model{'s' * (len(both) != 1)} in both tables, a correlation needs at least 3",
            where=f"{names[0]}, {names[1]}",
            fix=_naming_hint(scores["model"], totals["model"]) or "models are joined by their exact names",
        )
    capabilities = tuple(dict.fromkeys(scores["benchmark"]))
    benchmarks = tuple(dict.fromkeys(totals["benchmark"]))
    metrics = {name: _one(totals, name, "metric") for name in benchmarks}
    grid = _grid(totals, both, benchmarks)
    y, successes, number = (grid(column) for column in ("value", "successes", "episodes"))
    counts = _counts_by_task(episodes, both, names[2]) if episodes is not None else _counts_below(below, both, names[1])
    if episodes is not None and not set(counts) & set(benchmarks):
        raise InputError(
            f"episodes of {', '.join(counts)}, but performance on {', '.join(benchmarks)}",
            where=names[2],
            fix="the two name their benchmarks alike",
        )
    for b, name in enumerate(benchmarks):
        table = counts.get(name)
        check_totals(
            tuple(both), name, metrics[name], (y[:, b], successes[:, b], number[:, b]),
            None if table is None else (table.successes, table.episodes),
            (names[1], names[2] if episodes is not None else f"its tasks in {names[1]}"),
            episodes is not None and table is not None,
        )  # fmt: skip
    grid_x = _grid(scores, both, capabilities)
    x = grid_x("score")
    return Scores(
        models=tuple(both),
        lineages=_lineages(scores, totals, both, names),
        capabilities=capabilities,
        benchmarks=benchmarks,
        x=x,
        stderr=grid_x("stderr"),
        y=y,
        successes=successes,
        episodes=number,
        task_counts={name: table for name, table in counts.items() if name in benchmarks},
        step_rates=_step_rates(below, both, names[1]),
        metrics=metrics,
        units={name: _one(scores, name, "unit") for name in capabilities},
        selection={name: _one(totals, name, "selection") for name in benchmarks},
        unmatched=_unmatched(scores, totals, both, capabilities, benchmarks, x, y),
        not_stated=_not_stated(scores, totals, counted=set(benchmarks) <= set(counts)),
    )


# --- pieces of the join -----------------------------------------------------------------------------------


def _grid(frame: pd.DataFrame, models: list[str], benchmarks: tuple[str, ...]):
    """column name -> (models, benchmarks) floats, NaN where the table has no such row or column."""

    def of(column: str) -> np.ndarray:
        if column not in frame:
            return np.full((len(models), len(benchmarks)), np.nan)
        wide = frame.pivot(index="model", columns="benchmark", values=column)
        return wide.reindex(index=models, columns=list(benchmarks)).to_numpy(dtype=float, na_value=np.nan)

    return of


def _one(frame: pd.DataFrame, benchmark: str, column: str) -> str:
    """The value that all rows of a benchmark share in an optional text column, else several joined, else empty."""
    if column not in frame:
        return ""
    found = frame.loc[frame["benchmark"] == benchmark, column].dropna().astype(str).str.strip()
    return " / ".join(dict.fromkeys(text for text in found if text))


def _lineages(
    scores: pd.DataFrame, totals: pd.DataFrame, models: list[str], names: tuple[str, str, str]
) -> tuple[str, ...]:
    found: dict[str, tuple[str, str]] = {}
    for frame, where in ((scores, names[0]), (totals, names[1])):
        if "lineage" not in frame:
            continue
        stated = frame[frame["lineage"].notna()]
        for model, lineage in zip(stated["model"], stated["lineage"].astype(str).str.strip(), strict=True):
            if lineage and found.setdefault(model, (lineage, where))[0] != lineage:
                raise InputError(
                    f"lineage of {model} is '{found[model][0]}' and '{lineage}'",
                    where=f"{found[model][1]}, {where}",
                    fix="give a model one lineage",
                )
    check_lineages({model: found[model] for model in models if model in found})
    return tuple(found.get(model, ("", ""))[0] for model in models)


def _counts_below(below: pd.DataFrame, models: list[str], where: str) -> dict[str, TaskCounts]:
    if below.empty or "successes" not in below or "episodes" not in below:
        return {}
    known = below[below["successes"].notna() & below["episodes"].notna()]
    _tasks_once(known, where)
    check_counts(known.assign(benchmark=known["benchmark"] + ", " + known["task"]), where)
    return {str(name): _tabulate(rows, models) for name, rows in known.groupby("benchmark", sort=False)}


def _tasks_once(rows: pd.DataFrame, where: str) -> None:
    twice = rows[rows.duplicated(["model", "benchmark", "task"])]
    if not twice.empty:
        row = twice.iloc[0]
        what = f"{row['model']} has task {row['task']} of {row['benchmark']} twice"
        raise InputError(what, where=where, fix="keep one row")


def _counts_by_task(episodes: pd.DataFrame, models: list[str], where: str) -> dict[str, TaskCounts]:
    check_names(episodes, ("model", "benchmark", "task", "success"), where)
    if not episodes["success"].isin([0, 1]).all():
        raise InputError("success is neither true nor false in some episode", where=where, fix="write 1 or 0")
    rows = episodes.assign(success=episodes["success"].astype(int))
    for column in ("model", "benchmark", "task"):
        rows[column] = rows[column].astype(str).str.strip()
    counts = rows.groupby(["model", "benchmark", "task"], sort=False)["success"].agg(successes="sum", episodes="size")
    counts = counts.reset_index()
    tables = {str(name): _tabulate(group, models) for name, group in counts.groupby("benchmark", sort=False)}
    state = next((column for column in ("env_seed", "episode") if column in rows and rows[column].notna().all()), None)
    if state is None:
        return tables
    return {
        name: replace(table, states=_by_state(rows[rows["benchmark"] == name], state, models, table.tasks))
        for name, table in tables.items()
    }


def _by_state(rows: pd.DataFrame, state: str, models: list[str], tasks: tuple[str, ...]) -> tuple[np.ndarray, ...]:
    """(models, states, repeats) outcomes of every task, NaN where a model's repeats are fewer than the most."""
    tables = []
    for task in tasks:
        mine = rows[(rows["task"] == task) & rows["model"].isin(models)]
        repeat = mine.groupby(["model", state]).cumcount()
        states = {value: place for place, value in enumerate(sorted(mine[state].unique()))}
        table = np.full((len(models), len(states), int(repeat.max()) + 1 if len(mine) else 1), np.nan)
        at = mine["model"].map({name: place for place, name in enumerate(models)}), mine[state].map(states), repeat
        table[tuple(place.to_numpy(int) for place in at)] = mine["success"].to_numpy(float)
        tables.append(table)
    return tuple(tables)


def _tabulate(rows: pd.DataFrame, models: list[str]) -> TaskCounts:
    tasks = tuple(dict.fromkeys(rows["task"]))
    wide = rows.pivot(index="model", columns="task", values=["successes", "episodes"]).astype(float)
    one = {
        column: wide[column].reindex(index=models, columns=list(tasks)).to_numpy(dtype=float, na_value=np.nan)
        for column in ("successes", "episodes")
    }
    return TaskCounts(tasks, one["successes"], one["episodes"])


def _step_rates(below: pd.DataFrame, models: list[str], where: str) -> dict[str, np.ndarray]:
    """Benchmark -> (models, 5) shares of chains with at least k tasks done, from rows with metric `step_rate`."""
    if below.empty or "metric" not in below:
        return {}
    rows = below[below["metric"] == "step_rate"]
    check_units(rows, "value", where)
    rates = {}
    _tasks_once(rows, where)
    for name, group in rows.groupby("benchmark", sort=False):
        wide = group.pivot(index="model", columns="task", values="value").reindex(models)
        rates[str(name)] = wide[sorted(wide.columns)].to_numpy(float)
    return rates


def _unmatched(
    scores: pd.DataFrame,
    totals: pd.DataFrame,
    both: list[str],
    capabilities: tuple[str, ...],
    benchmarks: tuple[str, ...],
    x: np.ndarray,
    y: np.ndarray,
) -> dict[str, str]:
    lacks: dict[str, str] = {}
    for model in dict.fromkeys([*scores["model"], *totals["model"]]):
        if model not in both:
            lacks[model] = "no performance" if model in set(scores["model"]) else "no capability score"
            continue
        row = both.index(model)
        gaps = [name for name, value in zip(capabilities, x[row], strict=True) if np.isnan(value)]
        gaps += [name for name, value in zip(benchmarks, y[row], strict=True) if np.isnan(value)]
        if gaps:
            lacks[model] = "no " + ", no ".join(gaps)
    return lacks


def _not_stated(scores: pd.DataFrame, totals: pd.DataFrame, counted: bool) -> tuple[str, ...]:
    """Optional columns that neither table fills: each one weakens what can be said.

    counted: episode rows or tasks tell the successes and episodes of every benchmark.
    """

    def filled(frame: pd.DataFrame, column: str) -> bool:
        if column not in frame:
            return False
        text = frame[column].dropna().astype(str).str.strip().str.lower()
        return bool((~text.isin(["", "unknown"])).any())

    wanted: dict[str, tuple[pd.DataFrame, ...]] = {
        "lineage": (scores, totals),
        "successes": (totals,),
        "episodes": (totals,),
        "selection": (totals,),
        "stderr": (scores,),
        "evaluator": (scores,),
    }
    if counted:
        del wanted["successes"], wanted["episodes"]
    return tuple(column for column, frames in wanted.items() if not any(filled(frame, column) for frame in frames))


def _naming_hint(left: pd.Series, right: pd.Series) -> str:
    """When names differ by spelling only, say so."""
    for name in dict.fromkeys(left):
        hint = nearest(str(name), map(str, set(right)))
        if name not in set(right) and hint.startswith("did you mean"):
            return f"'{name}' is not in the other table; {hint}"
    return ""
