"""The view of `vision_injection`: action tokens as a first stage, by policy stage and by the look of its pictures.

The paper's 2 x 3: policy's vision encoder {frozen, trained} x first stage {none, FAST with a frozen encoder, FAST}.
Trap: without rows of both columns there is no interaction to speak of; each column has its own baseline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from probes.report.views import study as shared
from probes.report.views.study import ArmContrast, StudyTables

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

AXIS = "injection"


def found(study: StudyTables, *, level: float = 0.95) -> list[ArmContrast]:
    """Every arm with a first stage beside the one without, of the same policy stage."""
    return [one for one in shared.contrasts(study, AXIS, level=level) if study.arms[one.arm]["stages"]]


def square(study: StudyTables) -> pd.DataFrame:
    """The 2 x 3 as a table: first stages (with the look of their pictures) in rows, the policy's encoder in columns."""
    import pandas as pd

    arms = [arm for arm in study.on(AXIS) if arm["stages"]]
    firsts = {"none": {"frozen": "", "trained": ""}}
    for arm in arms:
        for policy in ("frozen", "trained"):
            if arm["name"].endswith(f"-then-{policy}"):
                title = arm["title"].rpartition(", then")[0] or arm["title"]
                firsts.setdefault(title, {"frozen": "", "trained": ""})[policy] = arm["name"]
                firsts["none"][policy] = arm["against"]
    rows = []
    for backbone in dict.fromkeys(study.cells.loc[study.cells["arm"].isin([arm["name"] for arm in arms]), "backbone"]):
        for first, cells in firsts.items():
            values = {f"encoder {policy}": _value(study, name, str(backbone)) for policy, name in cells.items()}
            rows.append({"backbone": backbone, "first stage": first, **values})
    frame = pd.DataFrame(rows)
    return frame.drop(columns="backbone") if len(frame) and frame["backbone"].nunique() == 1 else frame


def _value(study: StudyTables, arm: str, backbone: str) -> str:
    """Mean over seeds with the range of the seeds, on the benchmark of the injection arms."""
    protocols = set(study.cells.loc[study.cells["arm"].isin([one["name"] for one in study.on(AXIS) if one["stages"]]),
                                    "protocol"])  # fmt: skip
    rows = study.episodes
    if rows.empty:
        return shared.NOT_RUN
    rows = rows[(rows["arm"] == arm) & (rows["backbone"] == backbone) & rows["protocol"].isin(protocols)]
    if rows.empty:
        return shared.NOT_RUN
    column = "chain" if rows["chain"].notna().all() else "success"
    seeds = rows.groupby("cell_seed")[column].apply(lambda one: float(one.astype(float).mean()))
    return f"{seeds.mean():.2f} ({seeds.min():.2f} to {seeds.max():.2f}, {len(seeds)} seeds)"


def paper_table() -> pd.DataFrame:
    """The paper's 2 x 3 on SimplerEnv-Bridge, per cent of 96 episodes."""
    import pandas as pd

    from probes import paper

    frame = paper.table("vision_injection")
    frame = frame[frame["metric"] == "success_pct"]
    first = frame["setting"].str.partition("; ")
    made = frame.assign(first=first[0].str.removeprefix("first stage: "), policy=first[2])
    rows: list[dict[str, Any]] = []
    for stage, part in made.groupby("first", sort=False):
        rows.append({"first stage": stage, **{str(row.policy): f"{row.value:g}" for row in part.itertuples()}})
    return pd.DataFrame(rows)


def figure(found: list[ArmContrast], *, stacked: bool = False) -> Figure:
    """Differences from no first stage, here and in the paper."""
    from probes import tables

    papers = shared.paper_panels(tables.contrasts("injection"), lambda row: row.setting.removeprefix("first stage: "))
    return shared.beside_the_paper(found, papers, stacked=stacked)


def answer(study: StudyTables, found: list[ArmContrast]) -> str:
    """What injection did here, and in the paper."""
    from probes import tables

    table = tables.contrasts("injection")
    top, p = max(zip(table.rows, table.p_holm, strict=True), key=lambda pair: pair[0].difference)
    papers = (
        f"In the paper the largest of {len(table.rows)} differences is {top.difference:+.1f} points (95 % "
        f"{top.interval.low:+.1f} to {top.interval.high:+.1f}, p {p:.2f} after Holm)."
    )
    return shared.answer(study, AXIS, found, papers)


def figure_words(found: list[ArmContrast]) -> str:
    """What the figure shows, for readers who do not see it."""
    run = sum(one.run for one in found)
    return (
        f"Differences from no first stage, with intervals: {run} of {len(found)} comparisons measured here, beside the "
        "paper's four; the tables give the numbers."
    )
