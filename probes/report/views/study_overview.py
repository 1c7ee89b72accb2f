"""The view of `study_overview`: what a study asked, how much of it was run, and what it shows question by question.

Trap: "not run" is not "no effect"; the coverage stands before the results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from probes.report.views import study as shared
from probes.report.views.study import ArmContrast, StudyTables

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probes.pairs import Correlation

QUESTIONS = {
    "capability": "Does a VLM's capability predict its policy's performance?",
    "auxiliary": "Do auxiliary tasks before the policy help?",
    "freezing": "Which part has to be trained?",
    "scratch": "What is pretraining worth?",
    "injection": "Does action supervision of the encoder help?",
    "divergence": "Where do VLM and VLA training part?",
    "heads": "Does the kind of head matter?",
}
_PAGES = {
    "auxiliary": "auxiliary_tasks", "freezing": "module_ablation", "scratch": "module_ablation",
    "injection": "vision_injection", "divergence": "training_divergence", "capability": "capability_vs_performance",
    "heads": "module_ablation",
}  # fmt: skip
_LEAST = 5  # models below which nothing is concluded


def coverage(study: StudyTables) -> pd.DataFrame:
    """Per question: arms, cells, how many were run here, read from what ships, or not run; and hours of training."""
    import pandas as pd

    rows = []
    for axis, words in QUESTIONS.items():
        arms = [arm["name"] for arm in study.on(axis)]
        cells = study.cells[study.cells["arm"].isin(arms)]
        count = cells["state"].value_counts()
        done, ships = int(count.get("done", 0)), int(count.get("shipped", 0))
        seconds = cells["train_s"].astype(float).sum()
        rows.append({
            "axis": axis, "question": words, "arms": len(arms), "cells": len(cells), "run here": done, "shipped": ships,
            "not run": len(cells) - done - ships, "training hours": round(seconds / 3600, 2), "page": _PAGES[axis],
        })  # fmt: skip
    columns = list(rows[0])
    return pd.DataFrame([row for row in rows if row["arms"]], columns=columns)


def every(study: StudyTables, *, level: float = 0.95) -> dict[str, list[ArmContrast]]:
    """The contrasts of each question that has any."""
    return {axis: found for axis in QUESTIONS if (found := shared.contrasts(study, axis, level=level))}


def correlation(study: StudyTables) -> Correlation | None:
    """Capability against performance of this study's VLMs; None below five that have both.

    Raises InputError as `correlate` where the tables contradict each other.
    """
    import pandas as pd

    from probes.correlation import correlate

    capability, performance = study.capability, study.performance
    if not len(capability) or not len(performance):
        return None
    both = set(capability["model"]) & set(performance["model"])
    counts = [len(both & set(part["model"])) for _, part in performance.groupby("benchmark")]
    if not counts or max(counts) < _LEAST:
        return None
    keep = ["model", "lineage", "benchmark", "metric", "value", "episodes"]
    keep += ["successes"] if performance["successes"].notna().all() else []
    known = performance[performance["model"].isin(both)][keep]
    score = capability[capability["model"].isin(both)][["model", "lineage", "benchmark", "score", "stderr"]]
    return correlate(pd.DataFrame(score), pd.DataFrame(known))


def correlation_table(result: Correlation | None, study: StudyTables) -> pd.DataFrame:
    """One line per benchmark: r, its interval and the verdict; or how many models are still missing."""
    import pandas as pd

    from probes.numbers import signed, span

    if result is None:
        known = study.performance.groupby("benchmark")["model"].nunique() if len(study.performance) else {}
        protocols = dict.fromkeys(study.cells.loc[study.cells["arm"].isin([a["name"] for a in study.on("capability")]),
                                                  "protocol"])  # fmt: skip
        rows = [{"benchmark": name, "VLMs with a policy": int(known.get(name, 0)), "verdict": f"fewer than {_LEAST}"}
                for name in protocols]  # fmt: skip
        return pd.DataFrame(rows or [{"benchmark": "none declared", "verdict": shared.NOT_RUN}])
    return pd.DataFrame(
        {
            "benchmark": pair.benchmark, "VLMs with a policy": pair.n, "r": signed(pair.pearson.r),
            "95 %": span(*pair.pearson.ci_fisher), "p, exact": pair.pearson.p_exact,
            "verdict": pair.verdict,
        }
        for pair in result.pairs
    )  # fmt: skip


def live_table(study: StudyTables) -> pd.DataFrame:
    """Cells that were run here although rows of them ship: both counts."""
    import pandas as pd

    mine = study.cells[study.cells["state"].eq("done") & study.cells["shipped_episodes"].notna()]
    if mine.empty:
        return pd.DataFrame({"cell": ["none: no rows ship of what was run here"]})
    return pd.DataFrame(
        {
            "cell": row.cell, "run here": f"{int(row.successes)} of {int(row.counted)}",
            "shipped": f"{int(row.shipped_successes)} of {int(row.shipped_episodes)}",
            "the same": "yes" if row.successes == row.shipped_successes else "no",
        }
        for row in mine.itertuples()
    )  # fmt: skip


def coverage_figure(study: StudyTables, *, width: float = 7.2) -> Figure:
    """Of each question's cells the shares that were run here, read from what ships, or not run."""
    from probes.style import GRID, INK, PALETTE, SMALL, figure_style, new_figure

    table = coverage(study)
    with figure_style():
        fig, axes = new_figure(width=width, height=0.75 + 0.2 * len(table))
        ax = axes[0, 0]
        left = [0.0] * len(table)
        for column, colour in (("run here", PALETTE[0]), ("shipped", PALETTE[5]), ("not run", GRID)):
            values = [100 * count / cells for count, cells in zip(table[column], table["cells"], strict=True)]
            ax.barh(range(len(table)), values, left=left, color=colour, height=0.6, label=column)
            left = [a + b for a, b in zip(left, values, strict=True)]
        for y, row in enumerate(table.to_dict("records")):
            told = f"{row['run here'] + row['shipped']} of {row['cells']}"
            ax.annotate(told, (1.015, y), xycoords=("axes fraction", "data"), va="center", fontsize=SMALL, color=INK,
                        annotation_clip=False)  # fmt: skip
        ax.set_yticks(range(len(table)), list(table["axis"]))
        ax.set_ylim(len(table) - 0.4, -0.6)
        ax.set_xlim(0, 100)
        ax.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        fig.legend(*ax.get_legend_handles_labels(), loc="outside upper left", ncols=3, handlelength=1)
    return fig


def glance_figure(study: StudyTables, found: dict[str, list[ArmContrast]], *, columns: int = 2) -> Figure | None:
    """Every difference that is known on the first benchmark, question by question; None while there is none.

    columns: 2, or 1 for a phone.
    """
    from probes.figures_compare import Line, forest
    from probes.style import MUTED, SMALL, figure_style, new_figure

    first = str(study.cells["protocol"].iloc[0]) if len(study.cells) else ""
    blocks: list[list[Line]] = []
    drawn: set[tuple[str, str]] = set()
    for axis, contrasts in found.items():
        known = [one for one in contrasts if one.run and one.protocol == first and (one.arm, one.backbone) not in drawn]
        drawn |= {(one.arm, one.backbone) for one in known}
        if known:
            blocks.append([Line(axis, 0, None, False, heading=True), *shared.forest_lines(known, headings=False)])
    if not blocks:
        return None
    sides: list[list[Line]] = [[] for _ in range(columns)]
    for block in blocks:  # each question whole, into the column that is shorter
        min(sides, key=len).extend(block)
    sides = [side for side in sides if side]
    tall = max(map(shared.tall, sides))
    with figure_style():
        width = 7.2 if columns > 1 else 3.3
        fig, axes = new_figure(1, len(sides), width=width, height=0.75 + 0.165 * tall, sharex=True)
        for ax, lines in zip(axes.flat, sides, strict=True):
            forest(ax, [*lines, *[Line("", 0, None, False, heading=True)] * (max(map(len, sides)) - len(lines))])
            ax.set_xlabel("difference, tasks in a row")
        fig.supxlabel(
            f"{first}, against each arm's baseline;{' ' if columns > 1 else chr(10)}"
            "95 % over training seeds; filled: told apart",
            fontsize=SMALL,
            color=MUTED,
        )
    return fig


def answer(study: StudyTables, found: dict[str, list[ArmContrast]], result: Correlation | None) -> str:
    """One sentence: how much was run, and what could be told apart."""
    cells = study.cells
    done = int(cells["state"].isin(["done", "shipped"]).sum())
    if not done:
        return (
            f"None of the {len(cells)} cells of the study {study.name} was run yet; “{study.command()}” runs them, and "
            f"“vlm4vla study plan {study.file}” says what they cost."
        )
    apart = [f"{one.title} {one.verdict}" for every in found.values() for one in every if one.verdict in _APART]
    open_ones = sum(one.run and one.verdict not in _APART for every in found.values() for one in every)
    text = f"{done} of {len(cells)} cells of the study {study.name} have rows. "
    text += f"Told apart from its baseline: {'; '.join(dict.fromkeys(apart))}. " if apart else ""
    text += f"{open_ones} comparisons leave it open. " if open_ones else ""
    if result is None:
        return text + "Capability against performance: fewer than five VLMs have both."
    return text + "Capability against performance: " + "; ".join(
        f"{pair.benchmark} {pair.verdict} (n {pair.n})" for pair in result.pairs
    ) + "."  # fmt: skip


_APART = ("higher", "lower")


def at_a_glance(
    study: StudyTables, found: dict[str, list[ArmContrast]], result: Correlation | None
) -> list[tuple[str, str]]:  # fmt: skip
    """A line per question: what was told apart, how many comparisons leave it open, or that it was not run."""
    lines = []
    for axis, words in QUESTIONS.items():
        if not study.on(axis):
            continue
        told = _verdicts(found.get(axis, []))
        if axis == "capability" and result is not None:
            told = "; ".join(f"{pair.benchmark}: {pair.verdict} (n {pair.n})" for pair in result.pairs)
        elif axis == "capability" and len(study.performance):
            told = f"fewer than {_LEAST} VLMs have both a score and policies"
        elif axis == "divergence" and study.cells.loc[study.cells["arm"].isin([a["name"] for a in study.on(axis)]),
                                                      "state"].isin(["done", "shipped"]).any():  # fmt: skip
            told = f"the page {_PAGES[axis]} measures it"
        lines.append((words, told or f"{shared.NOT_RUN}: {study.command(axis)}"))
    return lines


def _verdicts(contrasts: list[ArmContrast]) -> str:
    """`lower: decoder frozen (tabletop-shift@1); 7 of 8 undetermined`."""
    run = [one for one in contrasts if one.run]
    parts = []
    for word in (*_APART, "not tested"):
        names = [f"{one.title} ({one.protocol}, {one.backbone})" for one in run if one.verdict == word]
        parts += [f"{word}: {'; '.join(names)}"] if names else []
    rest = sum(one.verdict not in (*_APART, "not tested") for one in run)
    parts += [f"{rest} of {len(run)} comparisons undetermined"] if rest else []
    return "; ".join(parts)


def numbers(study: StudyTables, found: dict[str, list[ArmContrast]], result: Correlation | None) -> dict[str, Any]:
    """What the page rests on, as JSON values."""
    from probes.jsonable import jsonable

    pairs = [] if result is None else [
        {"benchmark": pair.benchmark, "n": pair.n, "r": pair.pearson.r, "verdict": pair.verdict}
        for pair in result.pairs
    ]  # fmt: skip
    told = {"coverage": coverage(study).to_dict("records"), "correlation": pairs}
    return dict(jsonable(told)) | {"contrasts": {axis: shared.numbers(one) for axis, one in found.items()}}


def glance_words(found: dict[str, list[ArmContrast]]) -> str:
    """What `glance_figure` shows, for readers who do not see it."""
    run = sum(one.run for every in found.values() for one in every)
    return f"Differences of arms from their baselines with intervals, by question: {run} were run; the pages tell more."


def coverage_words(study: StudyTables) -> str:
    """What `coverage_figure` shows, for readers who do not see it."""
    table = coverage(study)
    done = int(table["run here"].sum() + table["shipped"].sum())
    return f"Shares of the cells of {len(table)} questions that were run, {done} in all; the table gives the numbers."
