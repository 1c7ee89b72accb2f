"""What a reviewer needs of a study: rows, settings, fingerprints and numbers, no weights; and checking it again.

BUNDLE/: manifest.json, study.toml, jobs/ID/ (job.json, and rows.parquet, training.json or a probe's results),
numbers.json (success per cell with its interval, what the pages say).

Trap: a bundle is bound to the ids of its jobs. After a change that alters ids (another world version, another preset)
its rows are no longer recognised, and the study says that they are missing rather than show them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from vlm4vla_core.study.jobs import Plan

KIND = "study"
TRAINING, NUMBERS, DECLARATION = "training.json", "numbers.json", "study.toml"
_LARGEST = 2 << 20  # bytes of a probe's file that goes along


def job_folder(bundle: Path, one: str) -> Path:
    """Where a bundle keeps a job."""
    return Path(bundle) / "jobs" / one


def shipped_jobs(bundle: Path) -> dict[str, int]:
    """Amounts (episodes) by id of the jobs whose rows a bundle holds; none where there is no bundle.

    Raises InputError when it is damaged.
    """
    if not (Path(bundle) / folders.MANIFEST).is_file():
        return {}
    return {one: int(amount) for one, amount in folders.read_manifest(bundle, KIND)["jobs"].items()}


def export(plan: Plan, out: Path, declaration: Path, bundle: Path) -> dict[str, Any]:
    """Write the bundle of what is done in a study folder, and of what its own shipped bundle holds.

    Returns the manifest. Raises InputError when nothing is done yet.
    """
    from vlm4vla_core.study.collect import SHIPPED, collect, training_facts
    from vlm4vla_core.study.jobs import PRODUCT
    from vlm4vla_core.study.state import jobs_folder, look

    status, jobs = look(plan, out), jobs_folder(out)
    old = plan.study.folder / plan.study.shipped
    amounts: dict[str, int] = {}
    with folders.new_folder(bundle, KIND) as folder:
        for one, job in plan.jobs.items():
            state, target, source = status.states[one].state, job_folder(folder, one), jobs / job.folder
            if state == SHIPPED or (state != "done" and (job_folder(old, one) / TRAINING).is_file()):
                shutil.copytree(job_folder(old, one), target)
            elif state == "done":
                target.mkdir(parents=True)
                shutil.copy(source / "job.json", target)
                if job.kind == "train":
                    folders.write_json(target / TRAINING, training_facts(source))
                elif job.kind != "record":
                    _copy_small(source / PRODUCT, target)
            else:
                continue
            if job.kind not in ("train", "record"):
                amounts[one] = job.amount
        if not amounts:
            raise InputError("nothing of this study is done yet", where=out, fix="vlm4vla study run")
        shutil.copy(declaration, folder / DECLARATION)
        found = numbers(collect(plan, out, status).episodes)
        folders.write_json(folder / NUMBERS, found)
        config = {"name": plan.study.name, "cells": len(plan.cells)}
        return folders.write_manifest(folder, KIND, config=config, inputs={}, jobs=amounts)


def _copy_small(product: Path, target: Path) -> None:
    """Rows and results of a product, but no features or weights."""
    for file in sorted(product.iterdir()):
        if file.is_file() and file.suffix in (".parquet", ".json", ".csv") and file.stat().st_size <= _LARGEST:
            shutil.copy(file, target / ("product.json" if file.name == folders.MANIFEST else file.name))


def numbers(episodes: pd.DataFrame) -> list[dict[str, Any]]:
    """Per arm, backbone, protocol, execute length and training seed: episodes, successes, rate with its Wilson
    interval, and the mean chain where there are chains."""
    import pandas as pd

    from vlm4vla_core.results import wilson

    found: list[dict[str, Any]] = []
    if episodes.empty:
        return found
    keys = ["arm", "backbone", "protocol", "cell_seed", "execute"]
    for key, rows in episodes.groupby(keys, sort=True, dropna=False):
        k, n = int(rows["success"].sum()), len(rows)
        line = {name: None if pd.isna(value) else value for name, value in zip(keys, key, strict=True)}
        line |= {"episodes": n, "successes": k, "rate": k / n, "interval": list(wilson(k, n))}
        if rows["chain"].notna().any():
            line["mean_chain"] = float(rows["chain"].astype(float).mean())
        found.append(folders.as_json(line))
    return found


@dataclass(frozen=True)
class Check:
    """One thing that was checked: what, whether it holds, and what was found."""

    what: str
    holds: bool
    found: str


def verify(bundle: Path) -> list[Check]:
    """Check a bundle: every file's hash, the ids against the declaration, and every number against the rows.

    Raises InputError when it is no bundle, or its declaration cannot be read.
    """
    from vlm4vla_core.study.collect import collect
    from vlm4vla_core.study.declare import read_study
    from vlm4vla_core.study.jobs import expand

    manifest = folders.read_manifest(bundle, KIND, hashes=True)
    checks = [Check("files", True, f"{len(manifest['files'])} files have the hashes of the manifest")]
    study = read_study(Path(bundle) / DECLARATION).model_copy(update={"shipped": "", "live": ()})
    plan = expand(study.model_copy(update={"folder": Path(bundle).resolve(), "shipped": "."}))
    unknown = sorted(set(manifest["jobs"]) - set(plan.jobs))
    what = f"{len(manifest['jobs'])} jobs, of which the declaration gives {len(manifest['jobs']) - len(unknown)}"
    checks.append(Check("ids", not unknown, what))
    told, made = folders.read_json(Path(bundle) / NUMBERS), numbers(collect(plan, Path(bundle) / "none").episodes)
    same = len(told) == len(made) and all(_same(a, b) for a, b in zip(told, made, strict=True))
    checks.append(Check("numbers", same, f"{len(told)} told, {len(made)} computed from the rows"))
    return checks


def _same(told: Any, made: Any) -> bool:
    if isinstance(told, dict) and isinstance(made, dict):
        return told.keys() == made.keys() and all(_same(told[key], made[key]) for key in told)
    if isinstance(told, list) and isinstance(made, list):
        return len(told) == len(made) and all(map(_same, told, made))
    if isinstance(told, float) or isinstance(made, float):
        return bool(np.isclose(told, made, rtol=1e-9, atol=0))
    return bool(told == made)


def retrain(plan: Plan, count: int, out: Path, seed: int, go: Callable[[Plan, Path], Any]) -> list[Check]:
    """Train and evaluate randomly drawn shipped cells again in `out`, and compare their counts of successes.

    go: runs a plan in a folder. Exact equality is expected on the hardware class of the record; elsewhere the old rate
    has to lie in the new one's interval.
    """
    from vlm4vla_core.results import wilson
    from vlm4vla_core.study.collect import collect
    from vlm4vla_core.study.jobs import Plan as AnyPlan

    shipped = shipped_jobs(plan.study.folder / plan.study.shipped)
    known = [cell for cell in plan.cells if cell.evaluation in shipped]
    if not known:
        raise InputError("no shipped cell belongs to this study", where=plan.study.folder / plan.study.shipped)
    drawn = sorted(np.random.default_rng(seed).choice(len(known), min(count, len(known)), replace=False).tolist())
    cells = [known[i] for i in drawn]
    before = numbers(collect(plan, out / "none").episodes)
    alone = AnyPlan(plan.study.model_copy(update={"shipped": "", "live": ()}), dict(plan.jobs), cells)
    go(alone, out)
    after = numbers(collect(alone, out).episodes)
    keys = ("arm", "backbone", "protocol", "cell_seed", "execute")
    checks = []
    for line in after:
        old = next(one for one in before if all(one[key] == line[key] for key in keys))
        low, high = wilson(line["successes"], line["episodes"])
        same = old["successes"] == line["successes"] and old["episodes"] == line["episodes"]
        what = f"{line['arm']}/{line['backbone']}/{line['protocol']}/{line['cell_seed']}"
        found = f"{old['successes']} of {old['episodes']} shipped, {line['successes']} of {line['episodes']} again"
        checks.append(Check(what, same or low <= old["rate"] <= high, found + ("" if same else " (not the same)")))
    return checks
