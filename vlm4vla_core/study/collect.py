"""A study's rows in one place: what its jobs measured, with the cell that each belongs to.

STUDY_FOLDER/tables/: episodes.parquet (one row per episode, with `arm`, `backbone`, `provenance`), cells.csv (what each
cell is and what has become of it), capability.csv and performance.csv (for `vlm4vla correlate`), stages.csv (held-out
values of every training before and after), jobs.csv, study.json. They are made anew from the jobs each time.

Trap: an evaluation that several cells share stands once per cell, so count episodes per cell, never over the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm4vla_core import checkpoint, folders
from vlm4vla_core.study import bundle
from vlm4vla_core.study.jobs import PRODUCT, Plan
from vlm4vla_core.study.state import DONE, Status, jobs_folder, look

if TYPE_CHECKING:
    import pandas as pd

    from vlm4vla_core.study.bundle import Bundle

ROWS = "rows.parquet"
HERE, SHIPPED = "run here", "shipped"
Place = Callable[[str], "tuple[pd.DataFrame, str] | None"]
FILES = ("cells", "capability", "stages", "jobs")


@dataclass(frozen=True)
class Tables:
    """What is known of a study, as far as it is done; cells also says what is not."""

    episodes: pd.DataFrame
    cells: pd.DataFrame
    capability: pd.DataFrame
    stages: pd.DataFrame
    jobs: pd.DataFrame
    study: dict[str, Any]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.episodes.to_parquet(folder / "episodes.parquet", index=False)
        for name in FILES:
            getattr(self, name).to_csv(folder / f"{name}.csv", index=False)
        performance(self).to_csv(folder / "performance.csv", index=False)
        folders.write_json(folder / "study.json", self.study)


def collect(plan: Plan, out: Path, status: Status | None = None) -> Tables:
    """The tables of what is done in a study folder and what is shipped. Raises InputError on damaged products."""
    import pandas as pd

    status = status or look(plan, out)
    jobs = jobs_folder(out)
    place = plan.study.folder / plan.study.shipped
    shipped = bundle.open_bundle(place) if plan.study.shipped and bundle.shipped_jobs(place) else None

    def rows(one: str) -> tuple[pd.DataFrame, str] | None:
        """Rows that the study asked for (a product may hold more), and where they come from."""
        state, job = status.states[one].state, plan.jobs[one]
        if state == "shipped" and shipped is not None:
            found, origin = shipped.rows(one), SHIPPED
        elif state == "done":
            found, origin = pd.read_parquet(jobs / job.folder / PRODUCT / ROWS), HERE
        else:
            return None
        return found[found["episode" if "episode" in found else "number"] < job.amount], origin

    def training(one: str) -> dict[str, Any] | None:
        if status.states[one].state == "done":
            return training_facts(jobs / plan.jobs[one].folder)
        return shipped.trainings.get(one) if shipped is not None else None

    episodes = [
        found[0].assign(arm=cell.arm, backbone=cell.backbone, cell_seed=cell.seed, provenance=found[1])
        for cell in plan.cells
        if (found := rows(cell.evaluation))
    ]
    episodes += [
        found[0].assign(arm="baseline", backbone=name, cell_seed=None, provenance=found[1])
        for one, name in plan.baselines.items()
        if (found := rows(one))
    ]
    lines = [
        {
            "job": plan.jobs[one].folder, "id": one, "kind": plan.jobs[one].kind, "state": state.state,
            "note": state.note, "seconds": round(state.seconds, 1),
        }
        for one, state in status.states.items()
        if one in status.wanted
    ]  # fmt: skip
    for frame in episodes:  # empty columns of one cell and numbers of another are one kind of column
        for name, kind in (("chain", "Float64"), ("partial", "Float64"), ("draw", "Int64")):
            if name in frame:
                frame[name] = frame[name].astype(kind)
    every = pd.concat(episodes, ignore_index=True) if episodes else pd.DataFrame()
    facts = {key: getattr(plan.study, key) for key in ("name", "question", "deviations", "filled_by")}
    return Tables(
        every.astype({"cell_seed": "Int64"}) if episodes else every,
        _cells(plan, status, training, rows, shipped),
        _capability(plan, rows),
        _stages(plan, training),
        pd.DataFrame(lines, columns=["job", "id", "kind", "state", "note", "seconds"]),
        facts | {"live": list(plan.study.live), "arms": [_arm(arm) for arm in plan.study.arm]},
    )


def _arm(arm: Any) -> dict[str, Any]:
    """What the reports have to know of an arm."""
    return {
        "name": arm.name, "title": arm.title or arm.name, "axis": list(arm.axis), "against": arm.against,
        "stages": list(arm.stages),
    }  # fmt: skip


def _cells(
    plan: Plan, status: Status, training: Callable[[str], dict[str, Any] | None], rows: Place, shipped: Bundle | None
) -> pd.DataFrame:  # fmt: skip
    """One row per cell: what it is, what has become of it, what its trainings took, its earlier stages' jobs, and its
    successes, beside those that ship where it was run here all the same."""
    import pandas as pd

    lineages = {entry.name: entry.lineage for entry in plan.study.backbone}
    lines = []
    for cell in plan.cells:
        state = status.states[cell.evaluation]
        # Cells that differ in their draw alone share the training, which counts once.
        facts = [told for one in cell.trainings if cell.draw is None and (told := training(one))]
        settings = plan.jobs[cell.trainings[-1]].spec["settings"]
        mine = found[0] if (found := rows(cell.evaluation)) else None
        old = shipped.rows(cell.evaluation) if shipped is not None and state.state == "done" else pd.DataFrame()
        old = old[old["episode"] < plan.jobs[cell.evaluation].amount] if len(old) else old
        lines.append({
            "cell": cell.name, "arm": cell.arm, "backbone": cell.backbone, "lineage": lineages.get(cell.backbone, ""),
            "protocol": cell.protocol, "seed": cell.seed, "execute": cell.execute, "draw": cell.draw,
            "state": state.state,
            "episodes": plan.jobs[cell.evaluation].amount, "init": settings.get("init", "pretrained"),
            "freeze": "+".join(settings.get("freeze", [])), "head": settings.get("head", "fc"),
            "steps": settings.get("max_steps"), "earlier": " ".join(cell.trainings[:-1]),
            "train_s": round(sum(f["seconds"] for f in facts), 1) if len(facts) == len(cell.trainings) else None,
            "successes": None if mine is None else int(mine["success"].sum()),
            "counted": None if mine is None else len(mine),
            "shipped_successes": int(old["success"].sum()) if len(old) else None,
            "shipped_episodes": len(old) or None,
        })  # fmt: skip
    names = "cell arm backbone lineage protocol seed execute draw state episodes init freeze head steps earlier train_s"
    names += " successes counted shipped_successes shipped_episodes"
    return pd.DataFrame(lines, columns=names.split())


def performance(tables: Tables) -> pd.DataFrame:
    """The rows of `vlm4vla correlate --performance`: one per VLM (a backbone, or what comes out of its earlier stages)
    and benchmark, of the arms on the axis `capability`: the mean over training seeds. Chains count by their mean
    length, tasks of several goals by the share that was reached."""
    import pandas as pd

    arms = {arm["name"]: arm for arm in tables.study["arms"] if "capability" in arm["axis"]}
    lines: list[dict[str, Any]] = []
    rows = tables.episodes
    if not rows.empty:
        lineages = dict(zip(tables.cells["backbone"], tables.cells["lineage"], strict=True))
        rows = rows[rows["arm"].isin(arms) & (rows["draw"].isna() if "draw" in rows else True)]
        for (arm, backbone, protocol), part in rows.groupby(["arm", "backbone", "protocol"], sort=False):
            chain, partial = part["chain"].notna().all(), part["partial"].notna().all()
            column = "chain" if chain else "partial" if partial else "success"
            values = part.groupby("cell_seed")[column].apply(lambda one: float(one.astype(float).mean()))
            lines.append({
                "model": "+".join([backbone, *arms[arm]["stages"]]), "family": part["family"].iloc[0],
                "lineage": lineages.get(backbone) or part["lineage"].iloc[0], "benchmark": protocol,
                "metric": {"chain": "avg_len", "partial": "share of goals"}.get(column, "success"),
                "value": float(values.mean()), "seeds": len(values), "spread": float(values.std(ddof=1)),
                "successes": int(part["success"].sum()) if column == "success" else None,
                "episodes": len(part), "source": tables.study["name"], "quality": "measured",
            })  # fmt: skip
    names = "model family lineage benchmark metric value seeds spread successes episodes source quality"
    return pd.DataFrame(lines, columns=names.split())


def _capability(plan: Plan, place: Place) -> pd.DataFrame:
    """One capability row per VLM that was asked (called BACKBONE+STAGE… after stages), and its accuracy per kind."""
    import pandas as pd

    from vlm4vla_core.vqa.benchmark import capability, score

    lineages = {entry.name: entry.lineage for entry in plan.study.backbone}
    lines = []
    for one, (name, stages) in plan.asked.items():
        if found := place(one):
            rows = found[0]
            line = capability(rows).iloc[0].to_dict() | {"model": "+".join([name, *stages])}
            line |= {"backbone": name, "stages": "+".join(stages) or "none"}
            line["lineage"] = lineages[name] or line["lineage"]
            kinds = {f"accuracy_{kind.kind}": kind.accuracy for kind in score(rows).table.itertuples()}
            lines.append({**line, **kinds, "provenance": found[1]})
    return pd.DataFrame(lines)


def _stages(plan: Plan, training: Callable[[str], dict[str, Any] | None]) -> pd.DataFrame:
    """Held-out values of every training, before its first step and after its last."""
    import pandas as pd

    lines = []
    for one, job in plan.jobs.items():
        if job.kind != "train" or not (facts := training(one)):
            continue
        for when in ("start", "end"):
            numbers = {name: value for name, value in facts[when].items() if isinstance(value, int | float)}
            known = {"job": job.folder, "id": one, "name": job.name, "when": when, "seconds": facts["seconds"]}
            lines.append({**known, "objective": job.spec["settings"].get("objective", "action"), **numbers})
    return pd.DataFrame(lines, columns=None if lines else ["job", "id", "name", "when", "seconds", "objective"])


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
        "parameters": folders.read_json(run / "run.json")["parameters"],
    }  # fmt: skip
