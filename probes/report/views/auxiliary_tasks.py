"""The view of `auxiliary_tasks`: extra VLM training before the policy, here and in the paper.

Trap: the paper's seven are three checkpoints of one run each; ours are several runs of one checkpoint each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from probes.report.views import study as shared
from probes.report.views.study import ArmContrast, StudyTables

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probes.figures_compare import Line

AXIS = "auxiliary"


def found(study: StudyTables, *, level: float = 0.95) -> list[ArmContrast]:
    """Every auxiliary task beside no auxiliary task."""
    return shared.contrasts(study, AXIS, level=level)


def paper_table() -> pd.DataFrame:
    """The paper's seven tasks on CALVIN, as published."""
    import pandas as pd

    from probes import tables
    from probes.numbers import signed

    return pd.DataFrame(
        {
            "model": row.model, "extra VLM training": row.task, "best": row.best, "median": row.median,
            "worst": row.worst, "baseline": " / ".join(f"{value:.2f}" for value in row.baseline),
            "medians apart": f"{signed(row.difference)} ±{row.sampling:.2f}", "ranges": row.verdict,
        }
        for row in tables.auxiliary().rows
    )  # fmt: skip


def figure(found: list[ArmContrast], *, stacked: bool = False) -> Figure:
    """Differences from no auxiliary task: here, and between the medians in the paper."""
    return shared.beside_the_paper(found, _papers(), stacked=stacked, note="(paper: ranges apart)")


def _papers() -> list[tuple[str, list[Line], str]]:
    from probes import tables
    from probes.figures_compare import Line
    from probes.numbers import signed
    from vlm4vla_core.results import Interval

    table = tables.auxiliary()
    panels = []
    for model in dict.fromkeys(row.model for row in table.rows):
        lines = [
            Line(shared.wrapped(row.task), row.difference,
                 Interval(row.difference - row.sampling, row.difference + row.sampling),
                 row.verdict != "undetermined", signed(row.difference))
            for row in table.rows if row.model == model
        ]  # fmt: skip
        panels.append((f"Paper: CALVIN, {model}", lines, "difference of the medians, tasks in a row"))
    return panels


def answer(study: StudyTables, found: list[ArmContrast]) -> str:
    """What extra VLM training did here, and in the paper."""
    from probes import tables

    rows = tables.auxiliary().rows
    above = sum(row.verdict.startswith("above") for row in rows)
    below = sum(row.verdict.startswith("below") for row in rows)
    papers = (
        f"In the paper {above} of {len(rows)} fine-tuned VLMs had all three checkpoints above the baseline's, {below} "
        "all below; three checkpoints of one run cannot reach p 0.05."
    )
    return shared.answer(study, AXIS, found, papers)


def figure_words(found: list[ArmContrast]) -> str:
    """What the figure shows, for readers who do not see it."""
    run = sum(one.run for one in found)
    return (
        f"Differences from no auxiliary task with intervals: {run} of {len(found)} arms measured here, beside the "
        "paper's seven tasks on CALVIN; the tables give the numbers."
    )
