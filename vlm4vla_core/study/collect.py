"""A study's rows in one place: what its jobs measured, with the cell that each belongs to.

STUDY_FOLDER/tables/: episodes.parquet (one row per episode, with `arm`, `backbone`, `provenance`), capability.csv,
stages.csv (held-out values of every training before and after), jobs.csv. They are made anew from the jobs each time.

Trap: an evaluation that several cells share stands once per cell, so count episodes per cell, never over the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm4vla_core import checkpoint, folders
from vlm4vla_core.study import bundle
from vlm4vla_core.study.jobs import PRODUCT, Job, Plan
from vlm4vla_core.study.state import DONE, Status, jobs_folder, look

if TYPE_CHECKING:
    import pandas as pd

ROWS = "rows.parquet"
HERE, SHIPPED = "run here", "shipped"


@dataclass(frozen=True)
class Tables:
    """episodes, capability, stages and jobs of a study, as far as they are done."""

    episodes: pd.DataFrame
    capability: pd.DataFrame
    stages: pd.DataFrame
    jobs: pd.DataFrame

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.episodes.to_parquet(folder / "episodes.parquet", index=False)
        for name in ("capability", "stages", "jobs"):
            getattr(self, name).to_csv(folder / f"{name}.csv", index=False)


def collect(plan: Plan, out: Path, status: Status | None = None) -> Tables:
    """The tables of what is done in a study folder and what is shipped. Raises InputError on damaged products."""
    import pandas as pd

    status = status or look(plan, out)
    jobs = jobs_folder(out)
    shipped = plan.study.folder / plan.study.shipped if plan.study.shipped else None

    def place(one: str) -> tuple[Path, str] | None:
        """Folder of a job's product, and where it comes from."""
        state = status.states[one].state
        if state == "shipped" and shipped is not None:
            return bundle.job_folder(shipped, one), SHIPPED
        return (jobs / plan.jobs[one].folder / PRODUCT, HERE) if state == "done" else None

    episodes = [
        _read(found, plan.jobs[cell.evaluation]).assign(
            arm=cell.arm, backbone=cell.backbone, cell_seed=cell.seed, provenance=found[1]
        )
        for cell in plan.cells
        if (found := place(cell.evaluation))
    ]
    episodes += [
        _read(found, plan.jobs[one]).assign(arm="baseline", backbone=name, cell_seed=None, provenance=found[1])
        for one, name in plan.baselines.items()
        if (found := place(one))
    ]
    lines = [
        {
            "job": plan.jobs[one].folder, "id": one, "kind": plan.jobs[one].kind, "state": state.state,
            "note": state.note, "seconds": round(state.seconds, 1),
        }
        for one, state in status.states.items()
        if one in status.wanted
    ]  # fmt: skip
    every = pd.concat(episodes, ignore_index=True) if episodes else pd.DataFrame()
    return Tables(
        every.astype({"cell_seed": "Int64"}) if episodes else every,
        _capability(plan, place),
        _stages(plan, jobs, status, shipped),
        pd.DataFrame(lines, columns=["job", "id", "kind", "state", "note", "seconds"]),
    )


def _read(found: tuple[Path, str], job: Job) -> pd.DataFrame:
    """The rows that the study asked for: a product may hold more episodes."""
    import pandas as pd

    rows = pd.read_parquet(found[0] / ROWS)
    return rows[rows["episode" if "episode" in rows else "number"] < job.amount]


def _capability(plan: Plan, place: Callable[[str], tuple[Path, str] | None]) -> pd.DataFrame:
    """One capability row per VLM that was asked, and its accuracy per kind."""
    import pandas as pd

    from vlm4vla_core.vqa.benchmark import capability, score

    lineages = {entry.name: entry.lineage for entry in plan.study.backbone}
    lines = []
    for one, (name, stages) in plan.asked.items():
        if found := place(one):
            rows = _read(found, plan.jobs[one])
            line = capability(rows).iloc[0].to_dict() | {"model": name, "stages": "+".join(stages) or "none"}
            line["lineage"] = lineages[name] or line["lineage"]
            kinds = {f"accuracy_{kind.kind}": kind.accuracy for kind in score(rows).table.itertuples()}
            lines.append({**line, **kinds, "provenance": found[1]})
    return pd.DataFrame(lines)


def _stages(plan: Plan, jobs: Path, status: Status, shipped: Path | None) -> pd.DataFrame:
    """Held-out values of every training, before its first step and after its last."""
    import pandas as pd

    lines = []
    for one, job in plan.jobs.items():
        if job.config is None:
            continue
        facts: dict[str, Any] | None = None
        if status.states[one].state == "done":
            facts = training_facts(jobs / job.folder)
        elif shipped is not None and (bundle.job_folder(shipped, one) / bundle.TRAINING).is_file():
            facts = folders.read_json(bundle.job_folder(shipped, one) / bundle.TRAINING)
        if facts:
            for when in ("start", "end"):
                numbers = {name: value for name, value in facts[when].items() if isinstance(value, int | float)}
                known = {"job": job.folder, "id": one, "name": job.name, "when": when, "seconds": facts["seconds"]}
                lines.append({**known, "objective": job.config.objective, **numbers})
    return pd.DataFrame(lines)


def training_facts(folder: Path) -> dict[str, Any]:
    """What a finished training leaves behind beside its weights: held-out values, settings, cost, fingerprints."""
    run = folder / PRODUCT
    last = checkpoint.resolve(run)
    manifest = folders.read_manifest(last, checkpoint.KIND)
    first = folders.read_manifest(checkpoint.step_folder(run, 0), checkpoint.KIND)
    done = folders.read_json(folder / DONE)
    return {
        "start": first["metrics"], "end": manifest["metrics"], "step": manifest["step"],
        "fingerprint": manifest["fingerprint"], "seconds": done["seconds"], "inputs": manifest["inputs"],
        "parameters": folders.read_json(run / "run.json")["parameters"], "made_by": manifest["made_by"],
    }  # fmt: skip
