"""Episode rows in, outcomes of named policies on their initial states out.

A policy is called by the folder that `vlm4vla evaluate` wrote, by its model, by MODEL@STEP, or by its run_id (six
letters of it will do). Trap: a name that fits runs of several checkpoints or execute lengths is no policy and is
refused; runs that differ in their training seed only are one policy with several seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.results import read_table

if TYPE_CHECKING:
    import pandas as pd

STEPS = 5  # tasks of a CALVIN chain
_ORIGIN = "folder"
_STATE = ("benchmark", "task", "episode", "env_seed")
_CONFIGURATION = ("model", "init", "freeze", "aux", "step", "execute")  # what else may differ is a training seed


@dataclass(frozen=True)
class Outcomes:
    """values[i]: (states, seeds) of policy i; task[i]: (states,) task names. Paired: the same states in the same order.

    steps: tasks of a chain. unpaired: policy -> task -> episodes that some other policy lacks, or
    whose task it lacks where episodes are not paired.
    """

    metric: Literal["success", "chain"]
    paired: bool
    names: tuple[str, ...]
    values: tuple[np.ndarray, ...]
    task: tuple[np.ndarray, ...]
    seeds: tuple[tuple[str, ...], ...]
    tasks: tuple[str, ...]
    protocol: str
    execute: str
    unpaired: dict[str, dict[str, int]]
    notes: tuple[str, ...]
    steps: int = STEPS


def read_rows(paths: Iterable[Path]) -> pd.DataFrame:
    """Rows of files (parquet, CSV) and folders of `vlm4vla evaluate`, with the folder's name in column `folder`.

    Raises InputError when a table cannot be read, holds no `task`, or names neither run nor model.
    """
    import pandas as pd

    frames = []
    for path in map(Path, paths):
        file = path / "rows.parquet" if path.is_dir() else path
        frame = read_table(file, required=("task",)).astype(object)
        if not {"run_id", "model"} & set(frame.columns):
            raise InputError("no column says whose episodes these are", where=file, fix="add a column model or run_id")
        frames.append(frame.assign(**{_ORIGIN: file.parent.name if file.name == "rows.parquet" else ""}))
    if not frames:
        raise InputError("no episode rows", fix="give --episodes FILE, as `vlm4vla evaluate` writes them")
    rows = pd.concat(frames, ignore_index=True)
    return rows.where(rows.notna(), None)


def outcomes(
    rows: pd.DataFrame,
    policies: Sequence[str] = (),
    *,
    metric: Literal["success", "chain"] | None = None,
    paired: bool = True,
    benchmark: str | None = None,
    any_execute: bool = False,
) -> Outcomes:
    """The policies named (all when none is), on one benchmark, and on their common states when `paired`."""
    if _ORIGIN not in rows:
        rows = rows.astype(object).assign(**{_ORIGIN: ""})
        rows = rows.where(rows.notna(), None)
    rows = _one_benchmark(rows, benchmark)
    rows = rows.assign(task=rows["task"].fillna(""))  # chains belong to no single task
    chosen = _named(rows, policies) if policies else _every(rows)
    if len(chosen) < 2:
        raise InputError(f"{len(chosen)} policy to compare ({', '.join(chosen)})", fix="give rows of at least two")
    used = rows.loc[[row for part in chosen.values() for row in part.index]]
    protocol, execute = _protocol(chosen), _execute(chosen, any_execute)
    kind = _metric(used, metric)
    key = [name for name in _STATE if name in rows and used[name].notna().all()]
    if not {"episode", "env_seed"} & set(key):
        fix = "add a column episode or env_seed" + ("" if paired else ", any running number will do")
        raise InputError("the rows do not say which initial state an episode started from", fix=fix)
    tables = {name: _states(part, key, kind, name) for name, part in chosen.items()}
    kept = _common(tables) if paired else _common_tasks(tables)
    unpaired = {}
    for name, part in chosen.items():
        states = set(map(tuple, kept[name].index))
        left = part[[state not in states for state in part[key].itertuples(index=False, name=None)]]
        if len(left):
            unpaired[name] = {str(task): int(count) for task, count in left.groupby("task", sort=False).size().items()}
    tasks = tuple(dict.fromkeys(str(task) for table in kept.values() for task in table.index.get_level_values("task")))
    return Outcomes(
        metric=kind,
        paired=paired,
        names=tuple(kept),
        values=tuple(table.to_numpy(dtype=float) for table in kept.values()),
        task=tuple(np.array(table.index.get_level_values("task"), dtype=object) for table in kept.values()),
        seeds=tuple(tuple(map(str, table.columns)) for table in kept.values()),
        tasks=tasks,
        protocol=protocol,
        execute=execute,
        unpaired=unpaired,
        notes=_notes(kept, chosen) + (() if paired else _mixture(kept)),
    )


def _one_benchmark(rows: pd.DataFrame, wanted: str | None) -> pd.DataFrame:
    columns = [column for column in ("protocol", "benchmark") if column in rows]
    known = list(dict.fromkeys(value for column in columns for value in rows[column] if value is not None))
    if wanted is not None:
        for column in columns:
            if wanted in set(rows[column]):
                return rows[rows[column] == wanted]
        raise InputError(f"no rows of benchmark '{wanted}'", fix=nearest(wanted, map(str, known)))
    names = list(dict.fromkeys(rows["benchmark"])) if "benchmark" in rows else []
    if len(names) > 1:
        raise InputError(f"rows of {len(names)} benchmarks: {', '.join(map(str, names))}", fix="add --benchmark NAME")
    return rows


# --- which rows a name means ----------------------------------------------------------------------------------


def _aliases(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """What a policy may be called, by kind, the most specific first; None where a row has no such name."""
    import pandas as pd

    names = {_ORIGIN: rows[_ORIGIN].where(rows[_ORIGIN] != "", None)}
    if "run_id" in rows:
        names["run_id"] = rows["run_id"]
    if "model" in rows:
        names["model"] = rows["model"]
        if "step" in rows:
            stepped = [
                f"{model}@{_number(step)}" if step is not None else None
                for model, step in zip(rows["model"], rows["step"], strict=True)
            ]
            names["model@step"] = pd.Series(stepped, index=rows.index, dtype=object)
    return names


def _number(value: object) -> str:
    """A CSV with gaps turns whole numbers into 10.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _named(rows: pd.DataFrame, policies: Sequence[str]) -> dict[str, pd.DataFrame]:
    if twice := [name for name in dict.fromkeys(policies) if policies.count(name) > 1]:
        raise InputError(f"{twice[0]} is named twice", fix="name two different policies")
    aliases = _aliases(rows)
    found = {}
    for name in policies:
        picked = next((alias == name for alias in aliases.values() if (alias == name).any()), None)
        if picked is None and len(name) >= 6 and "run_id" in aliases:
            starts = aliases["run_id"].map(lambda run, name=name: run is not None and str(run).startswith(name))
            picked = starts if starts.any() else None
        if picked is None:
            known = {str(value) for alias in aliases.values() for value in alias if value is not None}
            raise InputError(f"no rows of a policy '{name}'", fix=nearest(name, known))
        found[name] = part = _one_policy(rows[picked.astype(bool)], name)
        for other, rest in found.items():
            if other != name and not part.index.intersection(rest.index).empty:
                raise InputError(f"'{name}' and '{other}' name the same episodes", fix="name two different policies")
    return found


def _one_policy(part: pd.DataFrame, name: str) -> pd.DataFrame:
    for column in _CONFIGURATION:
        if column in part and part[column].nunique(dropna=False) > 1:
            values = ", ".join(map(_number, dict.fromkeys(part[column])))
            fix = "name it MODEL@STEP" if column == "step" else "name it by its folder or run_id"
            raise InputError(f"'{name}' is more than one policy: its rows have {column} {values}", fix=fix)
    return part


def _every(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """All policies under the shortest names that tell them apart."""
    import pandas as pd

    columns = [column for column in _CONFIGURATION if column in rows]
    seeded = "train_seed" in rows and rows["train_seed"].notna().any()
    if "run_id" in rows and not seeded:
        columns.append("run_id")
    parts = [part for _, part in rows.groupby(columns, sort=False, dropna=False)]
    for kind in ("model", "model@step", _ORIGIN, "run_id"):
        labels = []
        for part in parts:
            alias = _aliases(part).get(kind, pd.Series([None], dtype=object))
            labels.append(alias.iloc[0] if alias.nunique(dropna=False) == 1 else None)
        if None not in labels and len(set(labels)) == len(labels):
            return {str(label): part for label, part in zip(labels, parts, strict=True)}
    return {
        ", ".join(str(part[column].iloc[0]) for column in columns if rows[column].nunique(dropna=False) > 1): part
        for part in parts
    }


# --- what may be compared ---------------------------------------------------------------------------------------


def _protocol(chosen: dict[str, pd.DataFrame]) -> str:
    parts = []
    for column in ("protocol", "success_rule"):
        told = {name: _told(part, column) for name, part in chosen.items()}
        if len(set(told.values())) > 1:
            listing = ", ".join(f"{name}: {value}" for name, value in told.items())
            raise InputError(f"the policies ran under different {column.replace('_', ' ')}s ({listing})",
                             fix="compare policies under one")  # fmt: skip
        parts.append(next(iter(told.values())))
    return parts[0] if parts[1] == "not stated" else f"{parts[0]}, success at {parts[1].replace('_', ' ')}"


def _execute(chosen: dict[str, pd.DataFrame], any_execute: bool) -> str:
    """Baselines never look, so their execute length means nothing and is not held against them."""
    from vlm4vla_core.evaluation import BASELINES

    looking = {
        name: part for name, part in chosen.items() if "model" not in part or part["model"].iloc[0] not in BASELINES
    }
    told = {name: _told(part, "execute") for name, part in looking.items()}
    if len(set(told.values())) > 1:
        listing = ", ".join(f"{name}: {value}" for name, value in told.items())
        if not any_execute:
            raise InputError(f"the policies executed different numbers of actions before looking again ({listing})",
                             fix="evaluate them alike, or add --any-execute")  # fmt: skip
        return listing
    return next(iter(told.values()), "not stated")


def _told(part: pd.DataFrame, column: str) -> str:
    values = list(dict.fromkeys(part[column])) if column in part else [None]
    return " and ".join("not stated" if value is None else str(value) for value in values)


def _metric(rows: pd.DataFrame, wanted: Literal["success", "chain"] | None) -> Literal["success", "chain"]:
    stated = "chain" in rows and rows["chain"].notna().all()
    kind = wanted or ("chain" if stated else "success")
    if kind not in rows or rows[kind].isna().any():
        raise InputError(f"some episodes state no {kind}", fix="use --metric success" if kind == "chain" else "")
    allowed = range(STEPS + 1) if kind == "chain" else range(2)
    if wrong := [value for value in dict.fromkeys(rows[kind]) if value not in allowed]:
        what = f"a whole number from 0 to {STEPS}" if kind == "chain" else "true or false"
        raise InputError(f"{kind} is {wrong[0]!r} in some episode, it should be {what}")
    return kind


# --- outcomes by state --------------------------------------------------------------------------------------------


def _states(part: pd.DataFrame, key: list[str], kind: str, name: str) -> pd.DataFrame:
    """(states x training seeds); states that some seed lacks are left out."""
    seeds = part["train_seed"] if "train_seed" in part else [None] * len(part)
    table = part.assign(_seed=["not stated" if seed is None else _number(seed) for seed in seeds])
    if (again := table.duplicated([*key, "_seed"])).any():
        state = ", ".join(f"{column} {table.loc[again, column].iloc[0]}" for column in key if column != "benchmark")
        raise InputError(f"an episode of '{name}' stands more than once ({state})",
                         fix="give each file once, and runs of one training seed under their own names")  # fmt: skip
    return table.set_index([*key, "_seed"])[kind].astype(float).unstack("_seed", sort=False).dropna()


def _common(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Every policy on the states that all of them ran."""
    first, *others = tables.values()
    common = first.index
    for other in others:
        common = common[common.isin(other.index)]
    if not len(common):
        raise InputError(f"{', '.join(tables)} have no initial state in common, so nothing can be paired",
                         fix="evaluate them on the same episodes, or add --unpaired")  # fmt: skip
    return {name: table.loc[common] for name, table in tables.items()}


def _common_tasks(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Every policy on the tasks that all of them ran: rates over different tasks are not comparable either."""
    common = set.intersection(*(set(table.index.get_level_values("task")) for table in tables.values()))
    if not common:
        raise InputError(f"{', '.join(tables)} have no task in common", fix="evaluate them on the same tasks")
    return {name: table[table.index.get_level_values("task").isin(common)] for name, table in tables.items()}


def _notes(kept: dict[str, pd.DataFrame], chosen: dict[str, pd.DataFrame]) -> tuple[str, ...]:
    notes = []
    if several := {name: table.columns for name, table in kept.items() if table.shape[1] > 1}:
        told = ", ".join(f"{name} ({', '.join(map(str, seeds))})" for name, seeds in several.items())
        notes.append(
            f"several training seeds: {told}; an outcome is the mean over seeds at one initial state, and intervals "
            "of rates count its episodes as independent, which is a little too narrow"
        )
    if any(table.shape[1] == 1 for table in kept.values()):
        notes.append("one training seed each" if not several else "the others have one training seed")
        notes[-1] += ": how far another training of the same recipe would land is not in these intervals"
    missing = [c for c in ("protocol", "execute") if all(_told(part, c) == "not stated" for part in chosen.values())]
    if missing:
        notes.append(f"not stated: {', '.join(missing)}")
    return tuple(notes)


def _mixture(kept: dict[str, pd.DataFrame]) -> tuple[str, ...]:
    shares = {
        tuple(sorted(table.index.get_level_values("task").value_counts(normalize=True).round(9).to_dict().items()))
        for table in kept.values()
    }
    if len(shares) == 1:
        return ()
    return ("tasks have different shares of the policies' episodes: over all tasks, easy tasks may decide",)
