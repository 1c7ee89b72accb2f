"""Run a whole study that one file declares, and look at it: plan, run, status, export, verify.

plan: table of jobs, what exists already, and what the rest would cost. run: do what is missing; issue it again after a
kill, or when arms were added. status: done, running, failed with reason, time left. export: a bundle with rows,
settings, numbers and figures for reviewers, which the study may then name as shipped. verify: check a bundle (FILE is
its folder) and make its pages again, with --retrain N also by training N cells again.

Example: vlm4vla study plan studies/nano.toml --device h200
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from vlm4vla_core.study.declare import Study
    from vlm4vla_core.study.jobs import Job, Plan
    from vlm4vla_core.study.run import Executor
    from vlm4vla_core.study.state import Status

_SHOWN = 40  # cells in the table of a plan


@dataclass(frozen=True)
class Args:
    action: Positional[Literal["plan", "run", "status", "export", "verify"]]
    """What to do."""
    file: Positional[Path]
    """The study's TOML file; for verify, a bundle."""
    out: Path | None = None
    """Study folder; runs/studies/NAME when left out."""
    bundle: Path | None = None
    """export: folder to write; the one that the study names as shipped when left out."""
    executor: Literal["local", "ray"] = "local"
    """Where jobs run: processes on this machine, or tasks of a Ray cluster."""
    address: str | None = None
    """Ray: address of the cluster; a local one is started when left out."""
    jobs: int | None = None
    """Jobs at a time; by default one per GPU, else one per two cores."""
    only: tuple[str, ...] = ()
    """run: only these kinds of jobs, cells as ARM/BACKBONE/PROTOCOL/SEED with * for any, axes (freezing), or live (the
    cells that are run although they are shipped), and what they need."""
    no_pages: bool = False
    """export, verify: leave the report's pages out."""
    device: str = "cpu-core"
    """plan: what to price in: cpu-core, a100, h100, h200, b200, rtx4090."""
    watch: float | None = None
    """status: show it again every so many seconds until nothing runs."""
    retrain: int = 0
    """verify: cells to train and evaluate again."""
    seed: int = 0
    """verify: seed of which cells are drawn."""
    json: Path | None = None
    """Also write the answer as JSON."""


def run(args: Args) -> int:
    if args.action == "verify":
        return _verify(args)
    from vlm4vla_core.study import expand, read_study

    plan = expand(read_study(args.file))
    out = args.out or Path("runs/studies") / plan.study.name
    if args.action == "plan":
        return _plan(args, plan, out)
    if args.action == "status":
        return _status(args, plan, out)
    if args.action == "export":
        return _export(args, plan, out)
    return _run(args, plan, out)


def _export(args: Args, plan: Plan, out: Path) -> int:
    from vlm4vla_core.study.bundle import export, shipped_jobs

    bundle = args.bundle or (plan.study.folder / plan.study.shipped if plan.study.shipped else None)
    if bundle is None:
        raise InputError("where is the bundle to go?", fix="add --bundle FOLDER")
    before = set(shipped_jobs(plan.study.folder / plan.study.shipped)) if plan.study.shipped else set()
    manifest = export(plan, out, bundle, None if args.no_pages else pages)
    size = sum(entry["bytes"] for entry in manifest["files"].values()) / 1e6
    print(f"{bundle}: rows of {len(manifest['jobs'])} jobs, {len(manifest['files'])} files, {size:.1f} MB")
    if left := before - set(manifest["jobs"]):
        print(f"left out: rows of {len(left)} shipped jobs that no cell of the declaration has any more")
    return 0


def pages(bundle: Path) -> dict[str, Any]:
    """What the report's pages of a study say of a bundle: answers, numbers and figures' hashes, by page.

    The pages are made by the verb `report` in a process of its own. Raises InputError when it fails.
    """
    import subprocess
    import sys
    import tempfile
    from importlib.metadata import version

    with tempfile.TemporaryDirectory(prefix="vlm4vla-pages-") as scratch:
        words = ["report", "study", "-p", "study", str(bundle.resolve()), "--out", scratch]
        done = subprocess.run([sys.executable, "-m", "vlm4vla_core.cli", *words], capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()[-1]
            raise InputError(f"the pages could not be made ({said})", where=bundle, fix="--no-pages leaves them out")
        found = {}
        for results in sorted(Path(scratch).glob("*/results.json")):
            told = folders.read_json(results)
            drawn = folders.read_json(results.parent / f"{results.parent.name}.ipynb")
            outputs = [one.get("data", {}) for cell in drawn["cells"] for one in cell.get("outputs", [])]
            figures = ["".join(data["image/svg+xml"]) for data in outputs if "image/svg+xml" in data]
            hashes = [folders.fingerprint(figure) for figure in figures]
            found[results.parent.name] = {"answer": told["answer"], "numbers": told["numbers"], "figures": hashes}
    return {"drawn_with": f"matplotlib {version('matplotlib')}", "pages": found}


def _plan(args: Args, plan: Plan, out: Path) -> int:
    from vlm4vla_core.study.cost import DEVICES, UTILISATION, costs, remaining
    from vlm4vla_core.study.state import MISSING, look

    status, prices = look(plan, out), costs(plan)
    print(f"{plan.study.name}: {plan.study.question}".rstrip(": "))
    print(f"{len(plan.cells)} cells, {len(plan.jobs)} jobs, of which {len(status.wanted)} are needed")
    print(f"{'kind':<10}{'jobs':>6}{'done':>6}{'shipped':>9}{'to do':>7}{args.device + ' hours':>18}{'core hours':>13}")
    lines = []
    for kind in dict.fromkeys(job.kind for job in plan.jobs.values()):
        mine = [one for one in status.wanted if plan.jobs[one].kind == kind]
        count = Counter(status.states[one].state for one in mine)
        todo = [one for one in mine if status.states[one].state not in ("done", "shipped")]
        line = {
            "kind": kind, "jobs": len(mine), "done": count["done"], "shipped": count["shipped"], "todo": len(todo),
            "device_hours": sum(prices[one].gpu_hours(args.device) for one in todo),
            "core_hours": sum(prices[one].core_s for one in todo) / 3600,
        }  # fmt: skip
        lines.append(line)
        hours, core = line["device_hours"], line["core_hours"]
        print(
            f"{kind:<10}{len(mine):>6}{count['done']:>6}{count['shipped']:>9}{len(todo):>7}{hours:>18.3g}{core:>13.3g}"
        )
    todo = status.of("ready", "waiting", "failed", "blocked", "running")
    seconds = remaining(plan, status, todo, args.device, prices)
    told = f"{DEVICES[args.device] * UTILISATION / 1e12:.3g} TFLOP/s"
    print(f"left: about {_span(seconds)} of one {args.device} ({told} of it used) and one core in turn")
    for note in sorted({status.states[one].note for one in status.of("blocked")}):
        if note.startswith(MISSING):
            print(f"blocked: {note}")
    axes = _axes(plan, status, args.device, prices)
    if axes:
        print(f"{'axis':<14}{'arms':>5}{'cells':>7}{'done':>6}{'shipped':>9}{'left, hours':>13}")
    for axis in axes:
        print(
            f"{axis['axis']:<14}{axis['arms']:>5}{axis['cells']:>7}{axis['done']:>6}{axis['shipped']:>9}"
            f"{axis['seconds_left'] / 3600:>13.3g}"
        )
    for cell in plan.cells[:_SHOWN]:
        left = remaining(plan, status, _missing(plan, status, [cell]), args.device, prices)
        print(f"  {cell.name:<64}{_cell_state(cell, status)}{f', {_span(left)}' if left else ''}")
    if len(plan.cells) > _SHOWN:
        print(f"  … and {len(plan.cells) - _SHOWN} more cells")
    if args.json:
        cells = [{"cell": cell.name, "state": _cell_state(cell, status)} for cell in plan.cells]
        answer = {"study": plan.study.name, "cells": cells, "kinds": lines, "axes": axes}
        folders.write_json(args.json, {**answer, "device": args.device, "seconds_left": seconds})
    return 0


def _missing(plan: Plan, status: Status, cells: list[Any]) -> list[str]:
    """Jobs that these cells still need."""
    ends = [cell.evaluation for cell in cells if status.states[cell.evaluation].state not in ("done", "shipped")]
    return [one for one in plan.closure(ends) if status.states[one].state != "done"]


def _axes(plan: Plan, status: Status, device: str, prices: dict[str, Any]) -> list[dict[str, Any]]:
    """Per axis: its arms and cells, and what is left of it by itself (what several axes share counts in each)."""
    from vlm4vla_core.study.cost import remaining

    lines = []
    for axis in dict.fromkeys(axis for arm in plan.study.arm for axis in arm.axis):
        arms = [arm.name for arm in plan.study.arm if axis in arm.axis]
        cells = [cell for cell in plan.cells if cell.arm in arms]
        count = Counter(status.states[cell.evaluation].state for cell in cells)
        line = {"axis": axis, "arms": len(arms), "cells": len(cells), "done": count["done"]}
        left = remaining(plan, status, _missing(plan, status, cells), device, prices)
        lines.append({**line, "shipped": count["shipped"], "seconds_left": left})
    return lines


def _cell_state(cell: Any, status: Status) -> str:
    state = status.states[cell.evaluation].state
    if state in ("done", "shipped"):
        return state
    for training in cell.trainings:
        if status.states[training].state not in ("done", "shipped"):
            return f"training {status.states[training].state}"
    return state


def _status(args: Args, plan: Plan, out: Path) -> int:
    from vlm4vla_core.study.collect import collect
    from vlm4vla_core.study.cost import remaining
    from vlm4vla_core.study.state import STATES, look

    while True:
        status = look(plan, out)
        count = Counter(status.states[one].state for one in status.wanted)
        print(f"{plan.study.name} in {out}: " + ", ".join(f"{count[name]} {name}" for name in STATES if count[name]))
        for one in status.of("running"):
            state = status.states[one]
            print(f"  running {plan.jobs[one].folder}  {state.note}  since {_span(state.seconds)}")
        for one in status.of("failed"):
            print(f"  failed  {plan.jobs[one].folder}: {status.states[one].note}")
        todo = status.of("ready", "waiting", "running", "failed", "blocked")
        if todo:
            print(f"  left: about {_span(remaining(plan, status, todo, 'cpu-core'))} of one core, jobs in turn")
        if args.watch is None or not count["running"]:
            break
        time.sleep(max(0.5, args.watch))
    tables = collect(plan, out, status)
    _results(tables.episodes)
    if args.json:
        jobs = tables.jobs.astype(object).where(tables.jobs.notna(), None).to_dict("records")
        folders.write_json(args.json, {"study": plan.study.name, "count": dict(count), "jobs": jobs})
    return 0


def _results(episodes: Any) -> None:
    from vlm4vla_core.study.bundle import numbers

    for line in numbers(episodes):
        low, high = line["interval"]
        tail = f"  mean chain {line['mean_chain']:.2f}" if "mean_chain" in line else ""
        seed = "" if line["cell_seed"] is None else f"/{line['cell_seed']}"
        seed += f"/draw{line['draw']}" if "draw" in line else ""
        name = f"{line['arm']}/{line['backbone']}/{line['protocol']}{seed}"
        told = f"{line['successes']:>5} of {line['episodes']:<5} {line['rate']:.3f} [{low:.3f}, {high:.3f}]{tail}"
        print(f"  {name:<64}{told}")


def _run(args: Args, plan: Plan, out: Path) -> int:
    from vlm4vla_core.study.collect import collect
    from vlm4vla_core.study.run import held
    from vlm4vla_core.study.run import run as go
    from vlm4vla_core.study.state import look

    plan = _part(plan, args.only)
    status = look(plan, out)
    if not status.of("ready", "waiting", "failed", "blocked", "running"):
        print(f"{plan.study.name} in {out} is complete: nothing to do")
    else:
        status = go(plan, out, _executor(args, plan.study), told=_told)
    tables = collect(plan, out, status)
    with held(out, plan):
        tables.write(out / "tables")
    _results(tables.episodes)
    bad = status.of("failed", "blocked")
    for one in bad:
        print(f"{status.states[one].state}: {plan.jobs[one].folder}: {status.states[one].note}")
    if args.json:
        from vlm4vla_core.study.bundle import numbers

        count = Counter(status.states[one].state for one in status.wanted)
        folders.write_json(args.json, {"study": plan.study.name, "count": count, "cells": numbers(tables.episodes)})
    return 1 if bad else 0


def _part(plan: Plan, only: tuple[str, ...]) -> Plan:
    """The plan of some cells or kinds of jobs alone. Raises InputError on a word that names none."""
    from fnmatch import fnmatch

    from vlm4vla_core.study.jobs import Plan as AnyPlan

    if not only:
        return plan
    kinds = {job.kind for job in plan.jobs.values()}
    axes = {
        axis: [arm.name for arm in plan.study.arm if axis in arm.axis] for arm in plan.study.arm for axis in arm.axis
    }
    for word in only:
        if word not in {*kinds, *axes, "live"} and not any(fnmatch(cell.name, word) for cell in plan.cells):
            known = ", ".join(cell.name for cell in plan.cells[:6])
            fix = f"kinds: {', '.join(sorted(kinds))}; axes: {', '.join(axes) or 'none'}; cells: {known}…"
            raise InputError(f"no cell, axis or kind of jobs is called '{word}'", fix=fix)
    only += tuple(f"{arm}/*" for word in only if word in axes for arm in axes[word])
    only += plan.study.live if "live" in only else ()
    cells = [cell for cell in plan.cells if any(fnmatch(cell.name, word) for word in only)]
    asked = plan.asked if "ask" in only else {}
    probes = plan.probes if "probe" in only else {}
    baselines = plan.baselines if "evaluate" in only else {}
    if "evaluate" in only:
        cells = plan.cells
    return AnyPlan(plan.study, plan.jobs, cells, baselines, asked, probes)


def _executor(args: Args, study: Study) -> Executor:
    from vlm4vla_core.study.run import Local, Ray

    if args.jobs is not None and args.jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {args.jobs}")
    resources = study.resources
    if args.executor == "ray":
        return Ray(args.address, args.jobs)
    return Local(args.jobs, None if resources.train_gpus else [], resources.threads)


def _told(job: Job, code: int) -> None:
    print(f"{'done   ' if code == 0 else f'exit {code} '} {job.folder}", flush=True)


def _verify(args: Args) -> int:
    from vlm4vla_core.study import expand
    from vlm4vla_core.study.bundle import open_bundle, retrain, verify
    from vlm4vla_core.study.run import run as go

    checks = verify(args.file, None if args.no_pages else pages)
    if args.retrain:
        study = open_bundle(args.file).plan().study
        out = args.out or Path("runs/studies") / f"{study.name}-again"
        checks += retrain(
            expand(study), args.retrain, out, args.seed, lambda plan, folder: go(plan, folder, _executor(args, study))
        )
    for check in checks:
        print(f"{'ok  ' if check.holds else 'BAD '} {check.what}: {check.found}")
    if args.json:
        folders.write_json(args.json, {"bundle": args.file, "checks": [asdict(check) for check in checks]})
    return 0 if all(check.holds for check in checks) else 1


def _span(seconds: float) -> str:
    """A length of time for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
