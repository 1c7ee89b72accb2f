"""Tables with our own columns, and hand-made ones: one row per model and benchmark, or per episode.

Followed: the columns of `vlm4vla_core.results`, as this project's verbs write and read them. `SYNONYMS` are taken for
them, case and punctuation aside; any other column is listed as left out. A table names what it holds by its columns:
`success` makes episodes, `score` capability, `value` (or `success_rate`) performance; `result` and `accuracy` could be
either and need --as. Trap: 0.48 and 48 % are the same number only if somebody says so: see `merge.one_unit`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, get_args

from probes.imports.rows import (
    COLUMNS,
    FRACTION,
    PERCENT,
    RECORD,
    UNKNOWN,
    Content,
    Imported,
    Labels,
    Rows,
    blank,
    imported,
    listing,
    number,
    truth,
)
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

NAME = "table"
SYNONYMS = {
    "model_name": "model", "checkpoint": "model", "policy": "model", "vlm": "model", "backbone": "model",
    "dataset": "benchmark", "bench": "benchmark", "suite": "benchmark", "task_name": "task", "subtask": "task",
    "params": "params_b", "seed": "train_seed", "std_err": "stderr", "standard_error": "stderr", "se": "stderr",
    "n_samples": "n", "num_samples": "n", "n_questions": "n", "n_success": "successes", "num_success": "successes",
    "n_episodes": "episodes", "num_episodes": "episodes", "trials": "episodes", "n_trials": "episodes",
    "rollouts": "episodes", "reference": "source", "units": "unit", "success_rate": "value", "success_pct": "value",
    "avg_len": "value", "acc": "result", "accuracy": "result", "performance": "value", "env_steps": "steps",
    "episode_id": "episode", "episode_ix": "episode", "elapsed_sec": "wall_s", "notes": "note",
}  # fmt: skip
_METRICS = {"success_rate": "success_rate", "success_pct": "success_pct", "avg_len": "avg_len"}
_NUMBERS = {
    "episodes": ("params_b", "train_seed", "step", "env_seed", "execute", "steps", "chain", "partial", "wall_s"),
    "performance": ("successes", "episodes"),
    "capability": ("stderr", "n"),
}
_MEASURE = {"episodes": "success", "performance": "value", "capability": "score"}
# Columns that only the other kind of rows has: without them `value` and `score` mean what --as says.
_TELLING = {"performance": {"stderr", "n", "prompt"}, "capability": {"successes", "episodes", "task", "metric"}}
_UNITS = {"%": PERCENT, "percent": PERCENT, "per cent": PERCENT, "pct": PERCENT, "fraction": FRACTION, "0-1": FRACTION}


def plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.strip().lower()).strip("_")


def recognises(content: Content) -> bool:
    if content.form == "jsonl" or (content.form == "json" and isinstance(content.value, list)):
        content = _as_table(content)
    if content.form != "table":
        return False
    names = set(_columns(content)[0].values())
    return "model" in names or ("benchmark" in names and bool({*_MEASURE.values(), "result"} & names))


def read(content: Content, labels: Labels, wanted: Rows | None = None) -> Imported:
    """Rows of the kind that the columns name, or of the `wanted` kind where they leave it open. Raises InputError for
    missing columns, values that are no numbers, and columns that leave the kind open."""
    content = _as_table(content)
    if content.form != "table":
        raise InputError("not a table", where=content.path)
    mapping, unknown = _columns(content)
    if "model" not in mapping.values():
        labels.need_model(content.path)
    rows = _kind(content, set(mapping.values()), wanted)
    measure = _MEASURE[rows]
    used = next(old for name in (measure, "value", "score", "result") for old, new in mapping.items() if new == name)
    unknown += [old for old, new in mapping.items() if new not in COLUMNS[rows] and old != used]
    frame = content.value.rename(columns={**mapping, used: measure})
    records = list(_records(frame, rows, measure, plain(used), content, labels))
    return imported(content, NAME, rows, records, left_out=[f"column {name}" for name in unknown])


def _as_table(content: Content) -> Content:
    import pandas as pd

    lines = content.value
    if (
        content.form in ("json", "jsonl")
        and isinstance(lines, list)
        and lines
        and all(isinstance(one, dict) for one in lines)
    ):
        return Content(content.path, "table", pd.DataFrame(lines, dtype=object))
    return content


def _columns(content: Content) -> tuple[dict[str, str], list[str]]:
    """(column of the file -> ours, columns that are not known). Raises InputError when two mean the same."""
    known = {name for columns in COLUMNS.values() for name in columns} | {"result"}
    mapping: dict[str, str] = {}
    unknown = []
    for column in content.value.columns:
        name = plain(str(column))
        name = name if name in known else SYNONYMS.get(name, name)
        if name not in known:
            unknown.append(column)
        elif name in mapping.values():
            other = next(old for old, new in mapping.items() if new == name)
            raise InputError(f"columns {other} and {column} both mean {name}", where=content.path, fix="remove one")
        else:
            mapping[column] = name
    return mapping, unknown


def _kind(content: Content, names: set[str], wanted: Rows | None) -> Rows:
    found: list[Rows] = [kind for kind in get_args(Rows) if _MEASURE[kind] in names]
    if "episodes" in found and {"task", "episode"} <= names:
        return "episodes"
    if found == ["episodes"]:
        return "episodes"
    open_to: list[Rows] = [kind for kind in get_args(Rows)[1:] if not _TELLING[kind] & names] if found else []
    if "result" in names:
        open_to = ["performance", "capability"]
    if wanted in open_to or (wanted in found and len(found) > 1):
        return wanted
    if len(found) == 1 and "result" not in names:
        return found[0]
    if found or "result" in names:
        named = " or ".join(found if len(found) > 1 else open_to)
        fix = f"add --as {' or --as '.join(named.split(' or '))}"
        raise InputError(f"this table could hold {named}", where=content.path, fix=fix)
    fix = (
        "one row per model and benchmark, with a column score (capability), value (performance) or success (episodes);"
        f" the table has: {listing(content.value.columns, 12)}"
    )
    raise InputError("no column holds a result", where=content.path, fix=fix)


def _records(
    frame: pd.DataFrame, rows: Rows, measure: str, header: str, content: Content, labels: Labels
) -> Iterator[dict[str, Any]]:
    columns = [name for name in COLUMNS[rows] if name in frame]
    for place, row in enumerate(frame[columns].itertuples(index=False, name=None), 2):
        values = {name: None if blank(value) else _stripped(value) for name, value in zip(columns, row, strict=True)}
        where = f"{content.path}, row {place}"
        for name in ("model", "benchmark"):
            values[name] = values.get(name) or (labels.benchmark if name == "benchmark" else labels.model) or None
            if values[name] is None and not (name == "benchmark" and rows == "capability"):
                raise InputError(f"no {name}", where=where, fix=f"fill the column {name} or leave the row out")
        where += " ".join(f", {values['model']} on {values['benchmark']}".split())
        values["benchmark"] = values["benchmark"] or "capability"
        if rows == "episodes":
            values["success"] = truth(values.get("success"), where, "success")
            values["episode"] = _plain_number(values.get("episode"))
        else:
            given = row[columns.index(measure)]
            values[measure] = number(given, where, header)
            values["unit"] = _unit(values.get("unit"), given, header, str(values.get("metric") or ""), labels)
        if rows == "performance":
            values["task"] = values.get("task") or ""
            values["metric"] = values.get("metric") or _METRICS.get(header)
        for name in _NUMBERS[rows]:
            if values.get(name) is not None:
                exact = number(values[name], where, name)
                values[name] = (
                    int(exact) if exact.is_integer() and name not in ("stderr", "wall_s", "params_b") else exact
                )
        for name in ("family", "lineage"):
            values[name] = values.get(name) or getattr(labels, name) or None
        if rows != "episodes" and not values.get("source"):
            values["source"] = content.path.name
        yield {**values, RECORD: where}


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _plain_number(value: Any) -> Any:
    try:
        exact = float(value)
    except (TypeError, ValueError):
        return value
    return int(exact) if exact.is_integer() else value


def _unit(stated: Any, given: Any, header: str, metric: str, labels: Labels) -> str:
    """What the file says about a value's unit: a column, a per-cent sign, a name with pct; else what the user says."""
    if stated and str(stated).lower() != UNKNOWN:
        return _UNITS.get(str(stated).strip().lower(), str(stated))
    if (isinstance(given, str) and given.endswith("%")) or "pct" in metric or "pct" in header or "percent" in header:
        return PERCENT
    return labels.unit or UNKNOWN
