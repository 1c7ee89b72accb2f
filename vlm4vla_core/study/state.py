"""What has become of a study's jobs. The folder is the state; nothing else is kept.

STUDY_FOLDER/jobs/KIND-NAME-ID/: job.json (what it is), log.txt (what the verb printed), product/ (what it made), and
running.json (refreshed every few seconds), failed.json or done.json (written last).

Trap: a job is running as long as running.json is fresh. A process that was killed leaves it behind, and it counts as
waiting again once it is `STALE` seconds old.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError
from vlm4vla_core.study.bundle import shipped_jobs
from vlm4vla_core.study.jobs import PRODUCT, Job, Plan

DONE, FAILED, RUNNING = "done.json", "failed.json", "running.json"
BEAT, STALE = 5.0, 30.0  # seconds between refreshes of running.json, and after which it means nothing
MISSING = "there is no store"
STATES = ("done", "shipped", "running", "ready", "waiting", "failed", "blocked", "left out")


@dataclass(frozen=True)
class State:
    """What has become of one job: one of STATES; why and how far in words; seconds that it took or has taken."""

    state: str
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Status:
    """States by job id, and which jobs have to be done."""

    states: dict[str, State]
    wanted: set[str]

    def of(self, *names: str) -> list[str]:
        """Wanted jobs in these states."""
        return [one for one, state in self.states.items() if one in self.wanted and state.state in names]


def jobs_folder(out: Path) -> Path:
    return Path(out) / "jobs"


def look(plan: Plan, out: Path) -> Status:
    """States of all jobs of a plan in a study folder. Raises InputError when the shipped bundle is damaged."""
    from fnmatch import fnmatch

    study = plan.study
    shipped = shipped_jobs(study.folder / study.shipped) if study.shipped else {}
    live = {cell.evaluation for cell in plan.cells if any(fnmatch(cell.name, pattern) for pattern in study.live)}
    states: dict[str, State] = {}
    read_only = set(plan.leaves()) - live  # rows can ship, weights do not
    for one, job in plan.jobs.items():
        if one in read_only and shipped.get(one, -1) >= job.amount:
            states[one] = State("shipped")
        else:
            states[one] = _own(job, jobs_folder(out) / job.folder)
    if study.only_live:
        for one in set(plan.jobs) - plan.closure(live):
            if states[one].state in ("ready", "failed"):
                states[one] = State("left out")
    wanted = plan.closure(one for one in plan.leaves() if states[one].state not in ("shipped", "done", "left out"))
    wanted |= {one for one in plan.jobs if states[one].state in ("done", "failed", "running")}
    wanted |= {one for one in plan.leaves() if states[one].state == "shipped"}
    for one, job in plan.jobs.items():  # what a job needs comes before it
        if states[one].state == "ready":
            states[one] = _ready(job, plan, states)
    return Status(states, wanted)


def _ready(job: Job, plan: Plan, states: dict[str, State]) -> State:
    """A job that has not begun: whether it can."""
    for role, where in job.given.items():
        if role == "data" and not Path(where).exists():
            return State("blocked", f"{MISSING} {where}")
    before = [(plan.jobs[one], states[one]) for one in job.needs.values()]
    for need, state in before:
        if state.state in ("failed", "blocked"):
            how = "failed" if state.state == "failed" else "is blocked"
            return State("blocked", f"needs {need.folder}, which {how}")
    return State("ready" if all(state.state == "done" for _, state in before) else "waiting")


def _own(job: Job, folder: Path) -> State:
    """A job's state by its own folder."""
    done = _read(folder / DONE)
    if done and done.get("amount", 0) >= job.amount and (folder / PRODUCT).exists():
        return State("done", seconds=float(done["seconds"]))
    if running := beating(folder):
        return State("running", reached(job, folder), time.time() - running["began"])
    if failed := _read(folder / FAILED):
        return State("failed", failed["reason"], float(failed["seconds"]))
    return State("ready")


def beating(folder: Path) -> dict[str, Any] | None:
    """What a process that works on a job says of itself; None without a fresh sign of life."""
    facts = _read(folder / RUNNING)
    try:
        return facts if facts and time.time() - (folder / RUNNING).stat().st_mtime < STALE else None
    except OSError:  # it ended in this moment
        return None


def reached(job: Job, folder: Path) -> str:
    """How far a running job has come, as far as its product tells."""
    log = folder / PRODUCT / "log.jsonl"
    if job.config is not None and log.is_file():
        for line in reversed(log.read_text().splitlines()[-3:]):
            try:
                return f"step {json.loads(line)['step']} of {job.config.max_steps}"
            except (ValueError, KeyError):
                continue
    return ""


def _read(path: Path) -> dict[str, Any] | None:
    """A small JSON file; None when it is not there or being written on another machine."""
    try:
        found = folders.read_json(path)
    except (InputError, OSError):
        return None
    return found if isinstance(found, dict) else None
