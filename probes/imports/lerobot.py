"""LeRobot's `eval_info.json` (`lerobot-eval`), one row per episode where the file has them.

Followed: 0.4.4 (`scripts/lerobot_eval.py`: `per_task`, `per_group`, `overall`; the same keys up to 0.6.2) and 0.3.3
(`scripts/eval.py`: `per_episode`, `aggregated`). pc_success is in per cent by its name. A file whose lists were cut
away still gives performance rows from `per_group` or `aggregated`. Checked against a file that 0.4.4's own
`eval_policy_all` made of stand-in rollouts; 0.3.3 only against its code.

The file names neither the policy nor LeRobot's version; since 0.4 it also holds no seeds. Trap: what counts as a
success is the environment's affair (`is_success` of its last info), so `success_rule` stays "unknown".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from probes.imports.rows import PERCENT, RECORD, UNKNOWN, Content, Imported, Labels, imported, is_number, number, truth
from vlm4vla_core.errors import InputError

NAME = "lerobot"


def recognises(content: Content) -> bool:
    if content.form != "json" or not isinstance(content.value, dict):
        return False
    keys = set(content.value)
    return (
        {"per_group", "overall"} <= keys
        or {"per_task", "overall"} <= keys
        or (
            "aggregated" in keys
            and isinstance(content.value["aggregated"], dict)
            and "pc_success" in content.value["aggregated"]
        )
    )


def read(content: Content, labels: Labels) -> Imported:
    """Episode rows, or performance rows from a file without its episodes. Raises InputError for a file that contradicts
    itself, holds no outcomes, or whose model or benchmark nobody states."""
    body = content.value
    model = labels.need_model(content.path, " (LeRobot does not write the policy's name)")
    base = {"model": model, "family": labels.family or None, "lineage": labels.lineage or None}
    found = list(_outcomes(content, labels))
    overall = body.get("overall", body.get("aggregated"))
    if found:
        _check(content, overall, [row["success"] for row in found])
        run = {
            "run_id": labels.run_id or UNKNOWN,
            "protocol": f"lerobot-eval, version {UNKNOWN}",
            "success_rule": UNKNOWN,
        }
        rows = [{**base, **run, **row, "note": f"from {content.path.name}"} for row in found]
        return imported(content, NAME, "episodes", rows, left_out=["rewards", "video paths"])
    groups = body.get("per_group") or {_benchmark(None, content, labels): overall}
    if not isinstance(groups, dict):
        raise InputError("per_group is no table of groups", where=content.path)
    rows = [{**base, **_total(name, group, content, labels)} for name, group in groups.items()]
    return imported(
        content, NAME, "performance", rows, notes=["no episodes in the file: only its totals"], left_out=["rewards"]
    )


def _outcomes(content: Content, labels: Labels) -> Iterator[dict[str, Any]]:
    body = content.value
    tasks = body.get("per_task") if isinstance(body.get("per_task"), list) else []
    for entry in tasks:
        metrics = entry.get("metrics") if isinstance(entry, dict) else None
        successes = metrics.get("successes") if isinstance(metrics, dict) else None
        if not isinstance(successes, list):
            continue
        name, task = _benchmark(entry.get("task_group"), content, labels), f"task {entry.get('task_id')}"
        if name != entry.get("task_group"):  # several groups under one stated name keep their tasks apart
            task = f"{entry.get('task_group')} {task}"
        for episode, success in enumerate(successes):
            where = f"{content.path}, {name} {task} episode {episode}"
            yield {"benchmark": name, "task": task, "episode": episode, "success": truth(success, where, "success"),
                   RECORD: where}  # fmt: skip
    for place, one in enumerate(body.get("per_episode") or []):
        where = f"{content.path}, episode {place}"
        if not isinstance(one, dict):
            raise InputError("an episode that is no record", where=where)
        yield {"benchmark": _benchmark(None, content, labels), "task": UNKNOWN, "episode": one.get("episode_ix", place),
               "env_seed": one.get("seed"), "success": truth(one.get("success"), where, "success"),
               RECORD: where}  # fmt: skip


def _benchmark(group: Any, content: Content, labels: Labels) -> str:
    name = labels.benchmark or (str(group) if group is not None else "")
    if not name:
        raise InputError(
            "the file does not say which benchmark it is about", where=content.path, fix="add --benchmark NAME"
        )
    return name


def _check(content: Content, overall: Any, successes: list[bool]) -> None:
    stated = overall.get("pc_success") if isinstance(overall, dict) else None
    if stated is None:
        return
    mean = 100 * sum(successes) / len(successes)
    if abs(number(stated, content.path, "pc_success") - mean) > 1e-6:
        what = f"it states {stated:g} % success, but its {len(successes)} episodes give {mean:g} %"
        raise InputError(what, where=content.path, fix="copy the file again")


def _total(name: str, group: Any, content: Content, labels: Labels) -> dict[str, Any]:
    if not isinstance(group, Mapping) or "pc_success" not in group:
        raise InputError("no pc_success, and no outcomes of episodes", where=f"{content.path}, {name}")
    where = f"{content.path}, {_benchmark(name, content, labels)}"
    value = number(group["pc_success"], where, "pc_success")
    episodes = group.get("n_episodes")
    count = value * episodes / 100 if is_number(episodes) and episodes else None
    whole = count is not None and abs(count - round(count)) < 1e-6
    return {
        "benchmark": _benchmark(name, content, labels),
        "task": "",
        "metric": "success_pct",
        "value": value,
        "successes": round(count) if count is not None and whole else None,
        "episodes": episodes if count is not None else None,
        "source": content.path.name,
        "quality": "measured",
        "evaluator": NAME,
        "unit": PERCENT,
        RECORD: where,
    }
