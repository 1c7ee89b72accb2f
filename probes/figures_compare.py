"""Figures of comparisons: forest plots of differences and of ranked policies, the auxiliary tasks' three checkpoints.

Trap: two intervals that overlap do not mean that two policies are alike; the difference has an interval of its own,
and that is what the forest of two policies shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from probes.numbers import signed
from probes.style import INK, MUTED, ONE_COLUMN, PALETTE, SMALL, figure_style, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from probes.compare import Comparison
    from probes.tables import AuxiliaryTable, Contrast, Contrasts
    from vlm4vla_core.results import Interval


@dataclass(frozen=True)
class Line:
    """One line of a forest plot. found: drawn full in colour, else hollow and grey. note: to the right of the panel."""

    label: str
    value: float
    interval: Interval | None
    found: bool
    note: str = ""
    heading: bool = False


def forest(ax: Axes, lines: Sequence[Line], *, zero: bool = True) -> None:
    """Values with intervals, the first on top; zero=True draws the line of no difference."""
    if zero:
        ax.axvline(0, color=INK, linewidth=0.8, zorder=1)
    for y, line in enumerate(lines):
        if line.heading:
            continue
        colour = PALETTE[0] if line.found else MUTED
        if line.interval is not None:
            ax.plot(line.interval, [y, y], color=colour, linewidth=1.5, solid_capstyle="butt", zorder=2)
        face = colour if line.found else "white"
        ax.plot(line.value, y, "o" if line.found else "s", markersize=4.2, color=colour, markerfacecolor=face,
                markeredgewidth=1, zorder=3, clip_on=False)  # fmt: skip
        ax.annotate(line.note, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=SMALL, color=INK,
                    annotation_clip=False)  # fmt: skip
    ax.set_yticks(range(len(lines)), [line.label for line in lines])
    for tick, line in zip(ax.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("bold" if line.heading else "normal")
        tick.set_fontsize(SMALL)
    ax.set_ylim(len(lines) - 0.4, -0.6)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)


def comparison_forest(result: Comparison, *, width: float = ONE_COLUMN) -> Figure:
    """Two policies: their difference, all tasks and each. More: every policy's own value, ranked, with its letters."""
    chains, percent = result.metric == "chain", f"{100 * result.level:g} %"
    if len(result.policies) == 2:
        (whole,) = result.differences
        tasks = result.by_task if len(result.by_task) > 1 else ()
        lines = [
            Line(_wrapped(one.task), one.difference, one.interval, one.verdict() != "undetermined",
                 signed(one.difference)) for one in (whole, *tasks)
        ]  # fmt: skip
        label = f"{whole.a} minus {whole.b}, {'tasks in a row' if chains else 'success rate'} ({percent})"
    else:
        lines = [Line(_wrapped(one.name), one.mean, one.mean_interval, True, one.group) for one in result.policies]
        label = (
            f"{'mean tasks in a row' if chains else 'success rate'} ({percent}); who shares a letter is not told apart"
        )
    with figure_style():
        fig, axes = new_figure(width=width, height=0.7 + 0.2 * sum(line.label.count("\n") + 1 for line in lines))
        forest(axes[0, 0], lines, zero=len(result.policies) == 2)
        axes[0, 0].set_xlabel(_wrapped(label, int(width * 14)))
    return fig


def contrast_forest(*tables: Contrasts, width: float = ONE_COLUMN) -> Figure:
    """The paper's contrasts: a panel per table and benchmark, grouped; hollow where Holm's p is 0.05 or more."""
    units = {"success_pct": "difference of success, points", "avg_len": "difference of mean tasks in a row"}
    panels: list[tuple[str, list[Line], str]] = []
    for table in tables:
        for benchmark in dict.fromkeys(row.benchmark for row in table.rows):
            chosen = [(row, p) for row, p in zip(table.rows, table.p_holm, strict=True) if row.benchmark == benchmark]
            title = f"{benchmark}: {_TITLES[table.table]}"
            panels.append((title, _contrast_lines(table.table, chosen), units[chosen[0][0].metric]))
    with figure_style():
        heights = [0.62 + 0.17 * len(lines) for _, lines, _ in panels]
        fig, axes = new_figure(len(panels), 1, width=width, height=sum(heights) + 0.25, height_ratios=heights)
        for ax, (title, lines, unit) in zip(axes.flat, panels, strict=True):
            forest(ax, lines)
            ax.set_title(title, fontsize=7.5)
            ax.set_xlabel(unit)
        flagged = any(row.flag for table in tables for row in table.rows)
        note = "95 %; filled: p < 0.05 after Holm" + ("; *: fits no count" if flagged else "")
        fig.supxlabel(note, fontsize=SMALL, color=MUTED)
    return fig


_TITLES = {"freezing": "frozen parts", "injection": "actions first", "scratch": "random init"}


def _contrast_lines(table: str, chosen: list[tuple[Contrast, float]]) -> list[Line]:
    """Freezing by model, injection by policy stage; from scratch every model has one line."""
    lines: list[Line] = []
    for row, p in chosen:
        stage, policy = _stages(row.setting)
        group, name = {"freezing": (row.model, row.setting), "injection": (policy, stage)}.get(table, ("", row.model))
        if group and group not in [line.label for line in lines if line.heading]:
            lines.append(Line(group, 0, None, False, heading=True))
        digits = 1 if row.metric == "success_pct" else 2
        note = signed(row.difference, digits) + ("*" if row.flag else "")
        lines.append(Line(name, row.difference, row.interval, p < 0.05, note))
    return lines


def _stages(setting: str) -> tuple[str, str]:
    """(`FAST tokens, vision frozen`, `policy: vision frozen`) of an injection setting."""
    first, _, policy = setting.partition("; ")
    return first.removeprefix("first stage: "), policy


def auxiliary_strip(table: AuxiliaryTable, *, width: float = ONE_COLUMN) -> Figure:
    """Three checkpoints of every kind of extra VLM training; the band is the range of the baseline's three."""
    models = list(dict.fromkeys(row.model for row in table.rows))
    counts = [sum(row.model == model for row in table.rows) + 1 for model in models]
    with figure_style():
        fig, axes = new_figure(
            len(models), 1, width=width, height=0.55 * len(models) + 0.22 * sum(counts) + 0.3, height_ratios=counts,
            sharex=True,
        )  # fmt: skip
        for ax, model in zip(axes.flat, models, strict=True):
            rows = [row for row in table.rows if row.model == model]
            base = rows[0].baseline
            ax.axvspan(base[2], base[0], color=PALETTE[2], alpha=0.16, linewidth=0)
            triples = [("baseline", base, PALETTE[2], "^")]
            for row in rows:
                apart = row.verdict != "undetermined"
                triples.append((row.task, (row.best, row.median, row.worst), PALETTE[1] if apart else MUTED,
                                "o" if apart else "s"))  # fmt: skip
            for y, (_, (best, median, worst), colour, marker) in enumerate(triples):
                ax.plot([worst, best], [y, y], color=colour, linewidth=0.9, zorder=2)
                ax.plot([best, worst], [y, y], marker, color=colour, markerfacecolor="white", markersize=4, zorder=3)
                ax.plot(median, y, marker, color=colour, markersize=5, zorder=4)
            ax.set_yticks(range(len(triples)), [name for name, *_ in triples])
            ax.set_ylim(len(triples) - 0.5, -0.5)
            ax.grid(axis="y", visible=False)
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
            ax.set_title(model, fontsize=7.5)
        axes.flat[-1].set_xlabel("CALVIN ABC-D, mean tasks in a row")
        note = (
            "best, median (filled) and worst of three checkpoints;\nband: the baseline's; grey squares: overlap with it"
        )
        fig.supxlabel(note, fontsize=SMALL, color=MUTED)
    return fig


def _wrapped(text: str, width: int = 22) -> str:
    import textwrap

    return textwrap.fill(text, width)
