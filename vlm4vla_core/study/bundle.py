"""What a reviewer needs of a study: rows, settings, fingerprints and numbers, no weights; and checking it again.

BUNDLE/: manifest.json, plan.json (declaration, cells and jobs, each with its settings, cost and machine),
episodes.parquet and answers.parquet (all rows, by job), trainings.json (held-out values), probes/ID/ (small results),
numbers.json (success per cell with its interval) and pages.json (numbers and figures of the report's pages).
A study that names a bundle takes its rows as done, without weights.

Trap: rows are bound to the ids of their jobs. After a change that alters ids (another world version, preset or
backbone) they are no longer recognised, and the study says that they are missing rather than show them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from vlm4vla_core.study.jobs import Plan

KIND = "study"
PLAN, TRAININGS, NUMBERS, PAGES = "plan.json", "trainings.json", "numbers.json", "pages.json"
EPISODES, ANSWERS = "episodes.parquet", "answers.parquet"
_LARGEST = 2 << 20  # bytes of a probe's file that goes along


def shipped_jobs(bundle: Path) -> dict[str, int]:
    """Amounts (episodes) by id of the jobs whose rows a bundle holds; none where there is no bundle.

    Raises InputError when it is damaged.
    """
    if not (Path(bundle) / folders.MANIFEST).is_file():
        return {}
    return {one: int(amount) for one, amount in folders.read_manifest(bundle, KIND)["jobs"].items()}


@dataclass(frozen=True)
class Bundle:
    """A bundle that was opened. told: its plan.json."""

    path: Path
    told: dict[str, Any]
    trainings: dict[str, dict[str, Any]]

    @cached_property
    def _frames(self) -> dict[str, pd.DataFrame]:
        import pandas as pd

        found: dict[str, pd.DataFrame] = {}
        for name in (EPISODES, ANSWERS):
            if (self.path / name).is_file():
                rows = pd.read_parquet(self.path / name)
                found |= {str(one): part.drop(columns="job") for one, part in rows.groupby("job", sort=False)}
        return found

    def rows(self, one: str) -> pd.DataFrame:
        """The rows of a job; empty for one that has none."""
        import pandas as pd

        return self._frames.get(one, pd.DataFrame())

    def probe(self, one: str) -> Path:
        """Folder of a probe's results."""
        return self.path / "probes" / one

    def plan(self) -> Plan:
        """The plan as it was when the bundle was made: nothing but the bundle is read."""
        from vlm4vla_core.study.declare import Study
        from vlm4vla_core.study.jobs import Cell, Job
        from vlm4vla_core.study.jobs import Plan as AnyPlan

        told = {**self.told["study"], "live": (), "only_live": False}  # rows are read, wherever they were run
        study = Study(**told, shipped=".", folder=self.path.resolve())
        kept = ("kind", "name", "spec", "needs", "amount")
        jobs = {one: Job(one, **{key: job[key] for key in kept}) for one, job in self.told["jobs"].items()}
        cells = [Cell(**{**cell, "trainings": tuple(cell["trainings"])}) for cell in self.told["cells"]]
        asked = {one: (name, tuple(stages)) for one, (name, stages) in self.told["asked"].items()}
        probes = {one: tuple(key) for one, key in self.told["probes"].items()}
        return AnyPlan(study, jobs, cells, self.told["baselines"], asked, probes)


def open_bundle(bundle: Path, *, hashes: bool = False) -> Bundle:
    """Open a bundle; with hashes, every file is compared with the manifest. Raises InputError when it is none."""
    folders.read_manifest(bundle, KIND, hashes=hashes)
    bundle = Path(bundle)
    return Bundle(bundle, folders.read_json(bundle / PLAN), folders.read_json(bundle / TRAININGS))


def export(plan: Plan, out: Path, bundle: Path, pages: Callable[[Path], Any] | None = None) -> dict[str, Any]:
    """Write the bundle of what is done in a study folder, and of what its own shipped bundle holds.

    pages: gives what the report's pages say of a bundle, as JSON values. Returns the manifest. Raises InputError when
    nothing is done yet.
    """
    import pandas as pd

    from vlm4vla_core.study.collect import ROWS, training_facts
    from vlm4vla_core.study.jobs import PRODUCT
    from vlm4vla_core.study.state import DONE, jobs_folder, look

    status, home = look(plan, out), jobs_folder(out)
    place = plan.study.folder / plan.study.shipped
    old = open_bundle(place) if plan.study.shipped and shipped_jobs(place) else None
    kept = {*shipped_jobs(place), *old.trainings} if old is not None else set()
    amounts: dict[str, int] = {}
    jobs: dict[str, Any] = {}
    trainings: dict[str, dict[str, Any]] = {}
    frames: dict[str, list[pd.DataFrame]] = {EPISODES: [], ANSWERS: []}
    with folders.new_folder(bundle, KIND) as folder:
        for one, job in plan.jobs.items():
            state, source = status.states[one].state, home / job.folder
            facts: dict[str, Any] = {
                "kind": job.kind,
                "name": job.name,
                "spec": job.spec,
                "needs": job.needs,
                "amount": job.amount,
            }
            if state == "done":
                done = folders.read_json(source / DONE)
                facts["amount"] = done["amount"]
                facts |= {"seconds": done["seconds"], "made_by": done["made_by"], "hardware": done.get("hardware", "")}
                if job.kind == "train":
                    trainings[one] = training_facts(source)
            elif old is not None and one in kept:
                facts = old.told["jobs"][one]
                if one in old.trainings:
                    trainings[one] = old.trainings[one]
            jobs[one] = folders.as_json(facts)
            if job.kind in ("record", "train") or "made_by" not in facts:
                continue
            amounts[one] = int(facts["amount"])
            if job.kind == "probe":
                _copy_small(source / PRODUCT if state == "done" else old.probe(one), folder / "probes" / one)  # type: ignore[union-attr]
                continue
            rows = pd.read_parquet(source / PRODUCT / ROWS) if state == "done" else old.rows(one)  # type: ignore[union-attr]
            frames[ANSWERS if "question" in rows else EPISODES].append(rows.assign(job=one))
        if not amounts:
            raise InputError("nothing of this study is done yet", where=out, fix="vlm4vla study run")
        for name, found in frames.items():
            if found:
                _write_rows(pd.concat(found, ignore_index=True), folder / name)
        folders.write_json(folder / TRAININGS, trainings)
        told = {
            "study": plan.study.model_dump(mode="json", exclude={"shipped", "folder"}),
            "cells": [asdict(cell) for cell in plan.cells], "baselines": plan.baselines, "asked": plan.asked,
            "probes": plan.probes, "jobs": jobs,
        }  # fmt: skip
        folders.write_json(folder / PLAN, told)
        config = {"name": plan.study.name, "cells": len(plan.cells)}
        folders.write_manifest(folder, KIND, config=config, inputs={}, jobs=amounts)
        folders.write_json(folder / NUMBERS, _numbers_of(open_bundle(folder)))
        if pages is not None:
            folders.write_manifest(folder, KIND, config=config, inputs={}, jobs=amounts)
            folders.write_json(folder / PAGES, pages(folder))
        return folders.write_manifest(folder, KIND, config=config, inputs={}, jobs=amounts)


def _numbers_of(opened: Bundle) -> list[dict[str, Any]]:
    """`numbers` of all rows that a bundle holds."""
    from vlm4vla_core.study.collect import collect

    return numbers(collect(opened.plan(), opened.path / "none").episodes)


def _write_rows(rows: pd.DataFrame, path: Path) -> None:
    """Rows of many jobs, small: a group's shared wall time to a millisecond, texts by dictionary."""
    for name in ("chain", "partial"):
        if name in rows:
            rows[name] = rows[name].astype("Float64")
    if "wall_s" in rows:
        rows["wall_s"] = rows["wall_s"].astype(float).round(3)
    rows.to_parquet(path, index=False, compression="zstd")


def _copy_small(product: Path, target: Path) -> None:
    """Results of a product, but no features or weights."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(product.iterdir()):
        if file.is_file() and file.suffix in (".parquet", ".json", ".csv") and file.stat().st_size <= _LARGEST:
            shutil.copy(file, target / ("product.json" if file.name == folders.MANIFEST else file.name))


def numbers(episodes: pd.DataFrame) -> list[dict[str, Any]]:
    """Per arm, backbone, protocol, execute length, training seed and draw (where there is one): episodes, successes,
    rate with its Wilson interval, the mean chain where there are chains, and the mean share of goals where tasks have
    several."""
    import pandas as pd

    from vlm4vla_core.results import wilson

    found: list[dict[str, Any]] = []
    if episodes.empty:
        return found
    keys = ["arm", "backbone", "protocol", "cell_seed", "execute", *(["draw"] if "draw" in episodes else [])]
    for key, rows in episodes.groupby(keys, sort=True, dropna=False):
        k, n = int(rows["success"].sum()), len(rows)
        line = {name: None if pd.isna(value) else value for name, value in zip(keys, key, strict=True)}
        if line.get("draw", 0) is None:
            del line["draw"]
        line |= {"episodes": n, "successes": k, "rate": k / n, "interval": list(wilson(k, n))}
        for name, column in (("mean_chain", "chain"), ("mean_partial", "partial")):
            if column in rows and rows[column].notna().any():
                line[name] = float(rows[column].astype(float).mean())
        found.append(folders.as_json(line))
    return found


@dataclass(frozen=True)
class Check:
    """One thing that was checked: what, whether it holds, and what was found."""

    what: str
    holds: bool
    found: str


def verify(bundle: Path, pages: Callable[[Path], Any] | None = None) -> list[Check]:
    """Check a bundle: every file's hash, every job's id against its settings, every number against the rows, and with
    `pages` (as in `export`) every number and figure of the report's pages.

    Raises InputError when it is no bundle.
    """
    from vlm4vla_core.study.jobs import job_id

    manifest = folders.read_manifest(bundle, KIND, hashes=True, fix="get the bundle anew, or export it again")
    opened = open_bundle(bundle)
    checks = [Check("files", True, f"{len(manifest['files'])} files have the hashes of the manifest")]
    plan = opened.plan()
    wrong = [one for one, job in plan.jobs.items() if job_id(job.kind, job.spec, job.needs) != one]
    strange = [one for one in manifest["jobs"] if one not in plan.leaves()]
    what = f"{len(plan.jobs)} jobs, {len(wrong)} with another id than their settings give"
    checks.append(Check("ids", not wrong and not strange, what + (f", {len(strange)} unknown" if strange else "")))
    told = folders.read_json(Path(bundle) / NUMBERS)
    made = _numbers_of(opened)
    odd = [(a, b) for a, b in zip(told, made, strict=False) if not _same(a, b)]
    what = f"{len(told)} told, {len(made)} computed from the rows"
    if odd:
        what += f", {len(odd)} differ; the first: told {_line(odd[0][0])}, the rows say {_line(odd[0][1])}"
    checks.append(Check("numbers", len(told) == len(made) and not odd, what))
    if pages is not None and (Path(bundle) / PAGES).is_file():
        checks += _pages(folders.read_json(Path(bundle) / PAGES), pages(Path(bundle)))
    return checks


def _line(line: dict[str, Any]) -> str:
    """A line of `numbers` in words."""
    name = "/".join(str(line[key]) for key in ("arm", "backbone", "protocol", "cell_seed"))
    draw = f"/draw{line['draw']}" if "draw" in line else ""
    return f"{line['successes']} of {line['episodes']} for {name}{draw}"


def _pages(told: dict[str, Any], made: dict[str, Any]) -> list[Check]:
    """What the pages say now beside what they said; figures byte for byte where the same library draws them."""
    drawn = told["drawn_with"] == made["drawn_with"]
    checks = []
    for name, old in told["pages"].items():
        new = made["pages"].get(name)
        if new is None:
            checks.append(Check(f"page {name}", False, "could not be made again"))
            continue
        numbers_hold = _same(old["numbers"], new["numbers"]) and old["answer"] == new["answer"]
        figures_hold = len(old["figures"]) == len(new["figures"]) and (not drawn or old["figures"] == new["figures"])
        how = "byte for byte" if drawn else f"by their number alone ({told['drawn_with']} drew them)"
        words = f"answer and numbers {'as told' if numbers_hold else 'differ'}, figures"
        words += f" {'as told' if figures_hold else 'differ'} ({len(new['figures'])} compared {how})"
        checks.append(Check(f"page {name}", numbers_hold and figures_hold, words))
    return checks


def _same(told: Any, made: Any) -> bool:
    if isinstance(told, dict) and isinstance(made, dict):
        return told.keys() == made.keys() and all(_same(told[key], made[key]) for key in told)
    if isinstance(told, list) and isinstance(made, list):
        return len(told) == len(made) and all(map(_same, told, made))
    if isinstance(told, float) or isinstance(made, float):
        return told is not None and made is not None and bool(np.isclose(told, made, rtol=1e-9, atol=0))
    return bool(told == made)


def retrain(plan: Plan, count: int, out: Path, seed: int, go: Callable[[Plan, Path], Any]) -> list[Check]:
    """Train and evaluate randomly drawn shipped cells again in `out`, and compare their counts of successes.

    plan: of the bundle's study as it expands now. go: runs a plan in a folder. On the hardware class of the record the
    counts have to be equal. Elsewhere rounding makes another training of it: the 95 % interval of the new rate has to
    meet the span of the intervals of the shipped seeds of that arm. What `out` holds of an earlier time is not trained
    once more. Raises InputError when no cell can be drawn.
    """
    from vlm4vla_core.study.collect import collect
    from vlm4vla_core.study.jobs import Plan as AnyPlan
    from vlm4vla_core.study.state import DONE, jobs_folder

    place = plan.study.folder / plan.study.shipped
    shipped = shipped_jobs(place)
    known = [cell for cell in plan.cells if cell.evaluation in shipped]
    if not known:
        commits = {job["made_by"].get("commit") for job in open_bundle(place).told["jobs"].values() if "made_by" in job}
        what = "none of its cells can be trained again: presets, the built-in world or a backbone are others by now"
        made = ", ".join(sorted(str(commit) for commit in commits))
        raise InputError(what, where=place, fix=f"use the version that made it ({made})")
    drawn = sorted(np.random.default_rng(seed).choice(len(known), min(count, len(known)), replace=False).tolist())
    cells = [known[i] for i in drawn]
    before = numbers(collect(plan, out / "none").episodes)
    recorded = open_bundle(place).told["jobs"]
    alone = AnyPlan(plan.study.model_copy(update={"shipped": ""}), dict(plan.jobs), cells)
    status = go(alone, out)
    after = {cell.name: line for cell in cells for line in numbers(collect(alone, out).episodes) if _is(line, cell)}
    checks = []
    for cell in cells:
        if cell.name not in after:
            mine = plan.closure([cell.evaluation])
            why = "; ".join(status.states[one].note for one in status.of("failed") if one in mine)
            checks.append(Check(cell.name, False, "could not be trained again" + (f" ({why})" if why else "")))
            continue
        new, old = after[cell.name], next(line for line in before if _is(line, cell))
        jobs = [*cell.trainings, cell.evaluation]
        now = [folders.read_json(jobs_folder(out) / plan.jobs[one].folder / DONE)["hardware"] for one in jobs]
        then = [recorded[one].get("hardware", "unknown") for one in jobs]
        seeds = [line for line in before if _is(line, cell, any_seed=True)]
        checks.append(_again(cell.name, old, new, seeds, then, now))
    return checks


def _is(line: dict[str, Any], cell: Any, *, any_seed: bool = False) -> bool:
    """Whether a line of `numbers` is of this cell."""
    same = (line["arm"], line["backbone"], line["protocol"]) == (cell.arm, cell.backbone, cell.protocol)
    execute = cell.execute is None or line["execute"] == cell.execute
    return same and execute and line.get("draw") == cell.draw and (any_seed or line["cell_seed"] == cell.seed)


def _again(
    name: str, old: dict[str, Any], new: dict[str, Any], seeds: list[dict[str, Any]], then: list[str], now: list[str]
) -> Check:  # fmt: skip
    """One cell's counts beside those that were shipped. then, now: hardware class of each of its jobs."""
    found = f"{old['successes']} of {old['episodes']} shipped, {new['successes']} of {new['episodes']} again"
    if then == now:
        same = old["successes"] == new["successes"] and old["episodes"] == new["episodes"]
        return Check(name, same, f"{found}; the same hardware class ({now[-1]}), so they have to be equal")
    low, high = min(line["interval"][0] for line in seeds), max(line["interval"][1] for line in seeds)
    meets = new["interval"][0] <= high and new["interval"][1] >= low
    again = "{:.3f} to {:.3f}".format(*new["interval"])
    spans = f"95 % again {again}, of {len(seeds)} shipped seeds {low:.3f} to {high:.3f}"
    classes = f"recorded on {', '.join(dict.fromkeys(then))}; here {', '.join(dict.fromkeys(now))}"
    return Check(name, meets, f"{found}; other hardware, so intervals have to meet: {spans} ({classes})")
