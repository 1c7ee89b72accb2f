"""vla-evaluation-harness (`vla-eval`): its SQLite recordings and its result JSON, one row per episode.

Followed: version 0.8.0 (`recording.py`, `results/export.py`): tables `eval_metadata` and `episode_results`, of an item
that was run again the last committed row, and the `*_aggregate.json` that `vla-eval export` makes of them. The result
JSON of 0.1.0 has the same layout without `eval_id`. Both were checked against files that these versions' own writers
made. An episode that ended in an error is a failure, as the harness counts it; its reason stands in `note`.

Neither says which checkpoint sat behind the model server, nor the seed of an episode, nor how many actions of a chunk
were carried out. Trap: SimplerEnv's `success_mode` decides what a success is, so it becomes `success_rule`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from probes.imports.content import sqlite_rows, tables
from probes.imports.rows import RECORD, UNKNOWN, Content, Imported, Labels, imported, is_number, listing, number, truth
from vlm4vla_core.errors import InputError

NAME = "vla-eval"
_RULES = {"truncation": "last_step", "accumulate": "any_step", "early_stop": "any_step"}
_USED = {"success", "completed_subtasks"}


def recognises(content: Content) -> bool:
    if content.form == "sqlite":
        return {"episode_results", "eval_metadata"} <= set(tables(content.path))
    return content.form == "json" and isinstance(content.value, dict) and {"benchmark", "tasks"} <= set(content.value)


def read(content: Content, labels: Labels) -> Imported:
    """Episode rows. Raises InputError for outcomes that are missing, no model name, or an aggregate that contradicts
    its own episodes."""
    entries = list(_recording(content)) if content.form == "sqlite" else [_result(content)]
    records: list[dict[str, Any]] = []
    unused: set[str] = set()
    notes: list[str] = []
    for entry in entries:
        episodes = list(_episodes(entry, content, labels))
        records += episodes
        unused |= {name for one in entry["episodes"] for name in one["metrics"] if name not in _USED}
        errors = sum("error" in (row["note"] or "") for row in episodes)
        if errors:
            notes.append(
                f"{entry['benchmark']}: {errors} of {len(episodes)} episodes ended in an error, counted as failures"
            )
        if entry["partial"]:
            notes.append(f"{entry['benchmark']}: the evaluation was not finished")
    left_out = [f"metric {name}" for name in sorted(unused)]
    return imported(content, NAME, "episodes", records, left_out=left_out, notes=notes)


def _episodes(entry: Mapping[str, Any], content: Content, labels: Labels) -> Iterator[dict[str, Any]]:
    server = entry["server"].get("model_server")
    model = labels.need_model(content.path, f" (its model server was {server})" if server else "")
    config = entry["config"]
    params = config.get("params") if isinstance(config.get("params"), dict) else {}
    for one in entry["episodes"]:
        where = f"{content.path}, {one['task']} episode {one['episode']}"
        metrics = one["metrics"]
        outcome = metrics.get("success", {"success": True, "fail": False, "error": False}.get(one["status"] or ""))
        chain = metrics.get("completed_subtasks")
        notes = [f"from {content.path.name}", *([f"error: {one['failure']}"] if one["failure"] else [])]
        yield {
            "run_id": labels.run_id or entry["run_id"],
            "model": model,
            "family": labels.family or None,
            "lineage": labels.lineage or None,
            "benchmark": labels.benchmark or entry["benchmark"],
            "protocol": f"{NAME} {entry['version']}: {config.get('benchmark') or UNKNOWN}, {entry['mode'] or UNKNOWN}",
            # CALVIN in the harness has one task per chain; ours has one task with that many episodes.
            "task": one["task"] if chain is None else "chain",
            "episode": one["episode"] if chain is None or one["sequence"] is None else one["sequence"],
            "success": truth(outcome, where, "success"),
            "success_rule": _RULES.get(str(params.get("success_mode")), UNKNOWN),
            "steps": one["steps"],
            "chain": None if chain is None else int(number(chain, where, "completed_subtasks")),
            "wall_s": one["seconds"],
            "note": "; ".join([*notes, *(["evaluation not finished"] if entry["partial"] else [])]),
            RECORD: where,
        }


# --- the two layouts --------------------------------------------------------------------------------------


def _recording(content: Content) -> Iterator[dict[str, Any]]:
    known = tables(content.path)
    needed = {"eval_id", "task_name", "episode_id", "status", "metrics", "steps", "elapsed_sec", "context"}
    if missing := needed - known.get("episode_results", set()) | {"metadata", "eval_id"} - known.get(
        "eval_metadata", set()
    ):
        what = f"this recording lacks the columns {listing(sorted(missing))}"
        raise InputError(what, where=content.path, fix="the layout of vla-eval 0.8 is read")
    with sqlite_rows(content.path) as connection:
        entries = connection.execute("SELECT eval_id, metadata FROM eval_metadata").fetchall()
        for eval_id, text in entries:
            metadata = _object(text, f"{content.path}, metadata of {eval_id}")
            rows = connection.execute(
                "SELECT rowid, * FROM episode_results WHERE eval_id = ? ORDER BY rowid", (eval_id,)
            )
            latest: dict[tuple[Any, ...], dict[str, Any]] = {}
            for row in rows:
                where = f"{content.path}, {row['task_name']} episode {row['episode_id']}"
                context = _object(row["context"] or "{}", where)
                place = context.get("task_idx", ("row", row["rowid"]))  # without it rows cannot be told from repeats
                latest[row["task_name"], row["episode_id"], place] = {
                    "episode_id": row["episode_id"],
                    "task": row["task_name"],
                    "status": row["status"],
                    "metrics": _object(row["metrics"] or "{}", where),
                    "steps": row["steps"],
                    "elapsed_sec": row["elapsed_sec"],
                    "failure_reason": row["failure_reason"] if "failure_reason" in row.keys() else None,  # noqa: SIM118
                    **{key: context[key] for key in ("seq_idx",) if key in context},
                }
            yield _entry(metadata, eval_id, list(latest.values()), _unfinished(connection, known, eval_id))


def _unfinished(connection: Any, known: Mapping[str, set[str]], eval_id: str) -> bool:
    if {"done", "eval_id"} <= known.get("work_queue", set()):
        queue = connection.execute("SELECT done FROM work_queue WHERE eval_id = ?", (eval_id,)).fetchall()
        if queue:
            return not all(row[0] for row in queue)
    if {"complete", "num_shards"} <= known.get("eval_shards", set()):
        shards = connection.execute(
            "SELECT complete, num_shards FROM eval_shards WHERE eval_id = ?", (eval_id,)
        ).fetchall()
        return bool(shards) and (len(shards) < max(row[1] for row in shards) or not all(row[0] for row in shards))
    return False


def _result(content: Content) -> dict[str, Any]:
    body = content.value
    if not isinstance(body, dict) or not isinstance(body.get("tasks"), list):
        raise InputError("no result of vla-eval: it has no list of tasks", where=content.path)
    episodes = []
    for task in body["tasks"]:
        if not isinstance(task, dict) or not isinstance(task.get("episodes"), list):
            raise InputError("a task without its list of episodes", where=content.path)
        if not all(isinstance(one, dict) for one in task["episodes"]):
            raise InputError("an episode that is no record", where=f"{content.path}, {task.get('task')}")
        episodes += [{**one, "task": task.get("task")} for one in task["episodes"]]
    entry = _entry(body, str(body.get("eval_id") or UNKNOWN), episodes, bool(body.get("partial")))
    stated, outcomes = body.get("mean_success"), [one["metrics"].get("success") for one in entry["episodes"]]
    if is_number(stated) and outcomes and all(isinstance(one, bool) for one in outcomes):
        mean = sum(outcomes) / len(outcomes)
        if abs(mean - stated) > 1e-4:  # the harness rounds to four decimals
            what = f"it states a mean success of {stated:g}, but its {len(outcomes)} episodes give {mean:.4f}"
            raise InputError(what, where=content.path, fix="export the recording again")
    return entry


def _entry(body: Mapping[str, Any], run_id: str, episodes: list[dict[str, Any]], partial: bool) -> dict[str, Any]:
    def part(name: str) -> dict[str, Any]:
        return body[name] if isinstance(body.get(name), dict) else {}

    return {
        "benchmark": str(body.get("benchmark") or UNKNOWN),
        "version": str(body.get("harness_version") or UNKNOWN),
        "mode": body.get("mode"),
        "config": part("config"),
        "server": part("server_info"),
        "run_id": run_id,
        "partial": partial,
        "episodes": [
            {
                "task": str(one.get("task") or UNKNOWN),
                "episode": one.get("episode_id"),
                "sequence": one.get("seq_idx", _sequence(one.get("task"))),
                "status": one.get("status"),
                "metrics": one["metrics"] if isinstance(one.get("metrics"), dict) else {},
                "steps": one.get("steps"),
                "seconds": one.get("elapsed_sec"),
                "failure": one.get("failure_reason"),
            }
            for one in episodes
        ],
    }


def _sequence(task: Any) -> int | None:
    """CALVIN's tasks are called seq_0000, seq_0001, …; 0.1.0 states the number nowhere else."""
    name, _, digits = str(task).rpartition("_")
    return int(digits) if name == "seq" and digits.isdigit() else None


def _object(text: Any, where: object) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (TypeError, json.JSONDecodeError) as error:
        raise InputError(f"a cell that should hold JSON does not ({error})", where=where) from None
    return value if isinstance(value, dict) else {}
