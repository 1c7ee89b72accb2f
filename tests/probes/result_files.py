"""Small result files in the layouts of other evaluators, built from nothing but their documented fields."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

RESULT_COLUMNS = (
    "sid", "eid", "eval_id", "task_name", "episode_id", "status", "metrics", "steps", "elapsed_sec", "context",
    "jsonl_path", "failure_reason", "failure_detail",
)  # fmt: skip


def episode(task: str, number: int, success: bool, *, task_idx: int | None = 0, **more: Any) -> dict[str, Any]:
    context = {"name": task} if task_idx is None else {"name": task, "task_idx": task_idx}
    return {
        "task_name": task, "episode_id": number, "status": "success" if success else "fail",
        "metrics": {"success": success}, "steps": 50 + number, "elapsed_sec": 1.5, "context": context, **more,
    }  # fmt: skip


def recording(
    path: Path,
    episodes: Iterable[Mapping[str, Any]],
    *,
    benchmark: str = "LIBEROBenchmark_libero_10",
    params: Mapping[str, Any] | None = None,
    done: Iterable[int] = (1,),
) -> Path:
    """A vla-eval 0.8 recording of one benchmark. done: the `done` flags of its work queue."""
    eval_id = f"e1-{benchmark}"
    metadata = {
        "benchmark": benchmark, "mode": "sync", "harness_version": "0.8.0", "metric_keys": {"success": "mean"},
        "config": {"benchmark": "some.module:Benchmark", "params": dict(params or {})},
        "server_info": {"model_server": "SomeServer"},
    }  # fmt: skip
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE eval_metadata (eval_id TEXT PRIMARY KEY, safe_name TEXT, metadata TEXT)")
        database.execute(f"CREATE TABLE episode_results ({', '.join(RESULT_COLUMNS)}, PRIMARY KEY (sid, eid))")
        database.execute("CREATE TABLE work_queue (eval_id TEXT, item INTEGER, task_idx INTEGER, done INTEGER)")
        database.execute("INSERT INTO eval_metadata VALUES (?, ?, ?)", (eval_id, benchmark, json.dumps(metadata)))
        for place, one in enumerate(episodes):
            row = dict.fromkeys(RESULT_COLUMNS) | {"sid": "s", "eid": str(place), "eval_id": eval_id} | dict(one)
            cells = [json.dumps(row[name]) if isinstance(row[name], dict) else row[name] for name in RESULT_COLUMNS]
            database.execute(f"INSERT INTO episode_results VALUES ({', '.join('?' * len(cells))})", cells)
        database.executemany(
            "INSERT INTO work_queue VALUES (?, ?, 0, ?)", [(eval_id, i, d) for i, d in enumerate(done)]
        )
        database.commit()
    return path


def harness_json(path: Path, outcomes: Mapping[str, Iterable[bool]], **more: Any) -> Path:
    """The result JSON of vla-eval: task -> outcomes of its episodes."""
    tasks = [
        {"task": task, "episodes": [{"episode_id": i, "metrics": {"success": one}, "steps": 50 + i, "elapsed_sec": 1.5}
                                    for i, one in enumerate(values)]}
        for task, values in outcomes.items()
    ]  # fmt: skip
    body = {"benchmark": "LIBEROBenchmark_libero_10", "mode": "sync", "harness_version": "0.8.0", "tasks": tasks,
            "config": {}, "eval_id": "e1-LIBEROBenchmark_libero_10", **more}  # fmt: skip
    return dump(path, body)


def lerobot_json(path: Path, groups: Mapping[str, Mapping[int, list[bool]]], **more: Any) -> Path:
    """eval_info.json of LeRobot 0.4: group -> task -> outcomes."""
    tasks = [
        {"task_group": group, "task_id": task, "metrics": {"sum_rewards": [0.0], "successes": successes}}
        for group, by_task in groups.items()
        for task, successes in by_task.items()
    ]
    flat = [one for by_task in groups.values() for successes in by_task.values() for one in successes]
    overall = {"pc_success": 100 * sum(flat) / len(flat) if flat else float("nan"), "n_episodes": len(flat)}
    return dump(path, {"per_task": tasks, "per_group": {}, "overall": overall, **more})


def lmms_results(
    path: Path, scores: Mapping[str, Mapping[str, Any]], *, model: str = "org/VLM", n: int = 100, **more: Any
) -> Path:
    """results JSON of lmms-eval: task -> metric -> number, or "metric,filter" -> anything."""
    results = {
        task: {
            "alias": task,
            "samples": n,
            **{key if "," in key else f"{key},none": value for key, value in one.items()},
        }
        for task, one in scores.items()
    }
    prompt = {"lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": "Answer briefly."}}}
    body = {
        "results": results, "configs": dict.fromkeys(scores, prompt), "versions": dict.fromkeys(scores, 1.0),
        "n-shot": dict.fromkeys(scores, 0), "n-samples": {task: {"original": 100, "effective": n} for task in scores},
        "config": {"model": "adapter", "model_args": f"pretrained={model},max_pixels=1"},
        "lmms_eval_version": "main@abcd1234", **more,
    }  # fmt: skip
    return dump(path, body)


def lmms_samples(path: Path, metric: str, values: Iterable[Any]) -> Path:
    lines = [
        {"doc_id": i, "target": "A", "filtered_resps": ["A"], "doc_hash": f"h{i}", metric: value}
        for i, value in enumerate(values)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def quoted_csv(path: Path, columns: list[str], rows: Iterable[Iterable[Any]], delimiter: str = ",") -> Path:
    """VLMEvalKit quotes every cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle, quoting=csv.QUOTE_ALL, delimiter=delimiter)
        writer.writerows([columns, *rows])
    return path


def dump(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path
