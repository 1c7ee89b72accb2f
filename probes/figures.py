"""Figures of results: what is drawn is what was computed, with its uncertainty in the same panel.

Trap: a least-squares line looks like a finding. It is solid only when the verdict is one, and dashed when it is
"undetermined"; the band is the line's 95 % confidence band, not where a new model would fall.
"""

from __future__ import annotations

import textwrap
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from probes.labels import place_labels
from probes.numbers import signed
from probes.style import INK, MUTED, SMALL, TWO_COLUMN, Mark, figure_style, lineage_marks, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from probes.pairs import Correlation, Pair

_METRICS = {"avg_len": "mean tasks in a row (of 5)", "success_pct": "success (%)", "success_rate": "success rate"}


def least_squares(x: np.ndarray, y: np.ndarray, at: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """(line, half width of its confidence band) at the places `at`; residual variance with n - 2 degrees of freedom."""
    from scipy.stats import t

    n, centre = len(x), x.mean()
    slope = ((x - centre) * (y - y.mean())).sum() / ((x - centre) ** 2).sum()
    line = y.mean() + slope * (at - centre)
    if n < 3:
        return line, np.full_like(line, np.inf)
    residual = ((y - y.mean() - slope * (x - centre)) ** 2).sum() / (n - 2)
    spread = np.sqrt(residual * (1 / n + (at - centre) ** 2 / ((x - centre) ** 2).sum()))
    return line, t.ppf(0.5 + level / 2, n - 2) * spread


def capability_scatter(result: Correlation, *, width: float = TWO_COLUMN) -> Figure:
    """One panel per pair: models by lineage, their 95 % intervals where episodes are known, the fit and the verdict.

    width: inches of the page it is meant for (`style.ONE_COLUMN`, `style.TWO_COLUMN`); panels wrap into it.
    """
    with figure_style():
        columns = max(1, min(len(result.pairs), int(width // 2.2)))
        rows = ceil(len(result.pairs) / columns)
        scores = list(dict.fromkeys(pair.capability for pair in result.pairs))
        fig, axes = new_figure(rows, columns, width=width, height=rows * 2.9 + 0.6)
        lineages = {point.lineage: None for pair in result.pairs for point in pair.points}
        marks = {name: mark for name, mark in lineage_marks(lineages).items() if name in lineages}
        for ax in axes.flat[len(result.pairs) :]:
            ax.set_visible(False)
        panels = list(zip(axes.flat, result.pairs, strict=False))
        drawn = [_panel(ax, pair, marks) for ax, pair in panels]
        room = int(72 * (width / columns - 0.45) / 3.45)  # letters of a heading that fit over a panel
        headings = [_heading(pair, room) for pair in result.pairs]
        for (ax, pair), heading in zip(panels, headings, strict=True):
            _write_heading(ax, pair.benchmark, heading, max(map(len, headings)))
        label = {name: f"{name} ({unit})" if unit else name for name, unit in result.units.items()}
        if len(scores) == 1:
            fig.supxlabel(textwrap.fill(label[scores[0]], int(width * 17)), fontsize=7.5)
        else:
            for ax, pair in panels:
                ax.set_xlabel(textwrap.fill(label[pair.capability], int(room * 0.85)))
        _legend(fig, marks, width)
        fig.draw_without_rendering()
        fig.set_layout_engine("none")  # names are placed on the final layout
        for (ax, pair), lines in zip(panels, drawn, strict=True):
            place_labels(
                ax,
                [(point.x, point.y) for point in pair.points],
                [_short(point.model) for point in pair.points],
                [marks[point.lineage].colour for point in pair.points],
                [point.interval for point in pair.points],
                lines,
            )
    return fig


def _panel(ax: Axes, pair: Pair, marks: dict[str, Mark]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw one pair; returns the lines that labels should keep off."""
    x, y = (np.array([getattr(point, side) for point in pair.points]) for side in ("x", "y"))
    at = np.linspace(x.min(), x.max(), 60)
    line, half = least_squares(x, y, at)
    found = pair.verdict != "undetermined"
    _limits(ax, pair, x, y)
    ax.fill_between(at, line - half, line + half, color=MUTED, alpha=0.12, linewidth=0, zorder=1)
    ax.plot(at, line, color=INK, linewidth=1.2, linestyle="-" if found else (0, (4, 2.5)), zorder=2)
    lines, without = [(at, line)], _most_telling(pair)
    for point in pair.points:
        keep = np.array([other.model != point.model for other in pair.points])
        if np.ptp(x[keep]) == 0:
            continue
        other = least_squares(x[keep], y[keep], at)[0]
        if point.model == without:
            ax.plot(at, other, color=INK, linewidth=0.9, linestyle=":", zorder=2)
            lines.append((at, other))
        else:
            ax.plot(at, other, color=MUTED, linewidth=0.4, alpha=0.45, zorder=1.5)
    for point in pair.points:
        mark = marks[point.lineage]
        if point.interval is not None:
            ax.vlines(point.x, *point.interval, color=mark.colour, linewidth=0.8, alpha=0.55, zorder=3)
        ax.plot(
            point.x, point.y, mark.marker, color=mark.colour, markeredgecolor="white", markeredgewidth=0.5, zorder=4
        )
    ax.set_ylabel(_METRICS.get(pair.metric, pair.metric or pair.benchmark))
    return lines


def _limits(ax: Axes, pair: Pair, x: np.ndarray, y: np.ndarray) -> None:
    """Room for the points, their intervals and their names; the band may leave the panel."""
    ends = np.array([end for point in pair.points if point.interval for end in point.interval] or y)
    low, high = min(ends.min(), y.min()), max(ends.max(), y.max())
    ax.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    ax.set_xlim(x.min() - 0.14 * np.ptp(x), x.max() + 0.14 * np.ptp(x))


def _most_telling(pair: Pair) -> str | None:
    """The model whose absence moves r most."""
    moved = {name: abs(r - pair.pearson.r) for name, r in pair.leave_one_out.items() if r is not None}
    return max(moved, key=lambda name: moved[name]) if moved else None


def _heading(pair: Pair, room: int) -> list[tuple[str, str, str]]:
    """Lines over a panel as (text, colour, slant): the numbers, then the verdict, wrapped to `room` letters."""
    span, p, without = pair.pearson.ci_fisher, pair.pearson.p_exact, _most_telling(pair)
    numbers = [
        f"r {signed(pair.pearson.r)} (95 % {signed(span.low)} to {signed(span.high)}), n {pair.n}",
        ("exact p " if pair.p_method == "exact" else "p ") + (f"{p:.4f}" if p < 0.01 else f"{p:.2f}"),
    ]
    if without is not None:
        influence = f"without {_short(without)} r {_signed(pair.leave_one_out[without])}"
        numbers[1:] = [both] if len(both := f"{numbers[1]}; {influence}") <= room else [numbers[1], influence]
    known = pair.reliability
    if known is not None:
        numbers.append(f"reliability {known.best:.2f}: expect |r| {known.best**0.5:.2f} at most")
    verdict = textwrap.wrap(pair.verdict + (f" ({pair.role})" if pair.role else ""), room)
    return [*((line, MUTED, "normal") for line in numbers), *((line, INK, "italic") for line in verdict)]


def _write_heading(ax: Axes, name: str, lines: list[tuple[str, str, str]], rows: int) -> None:
    """The title's pad keeps room for `rows` lines free, so that titles of neighbours stand level."""
    step = 8.4
    for row, (text, colour, slant) in enumerate(lines):
        label = ax.annotate(
            text, (0, 1), xytext=(0, 4 + step * (rows - 1 - row)), xycoords="axes fraction",
            textcoords="offset points", fontsize=SMALL, color=colour, fontstyle=slant,
        )  # fmt: skip
        label.set_in_layout(False)
    ax.set_title(name, pad=5.5 + step * rows)


def _short(model: str) -> str:
    """Every model here is a VLM: its name need not say so."""
    return model.replace("-VL-", " ")


def _signed(value: float | None) -> str:
    return "–" if value is None else signed(value)


def _legend(fig: Figure, marks: dict[str, Mark], width: float) -> None:
    from matplotlib.lines import Line2D

    keys = [
        Line2D([], [], color=mark.colour, marker=mark.marker, linestyle="none", label=name or "lineage not stated")
        for name, mark in marks.items()
    ]
    narrow = width < 5
    sampling, fit, without, others = (
        ("95 % by episodes", "fit, 95 % band (solid: finding)", "fit without the one named", "fits without each other")
        if narrow
        else ("95 %, sampling of episodes only", "fit, 95 % band (solid: a finding)", "fit without the model named",
              "fits without each other model")
    )  # fmt: skip
    keys += [
        Line2D([], [], color=MUTED, marker="|", markersize=8, linestyle="none", label=sampling),
        Line2D([], [], color=INK, linewidth=1.2, linestyle=(0, (4, 2.5)), label=fit),
        Line2D([], [], color=INK, linewidth=0.9, linestyle=":", label=without),
        Line2D([], [], color=MUTED, linewidth=0.6, alpha=0.7, label=others),
    ]
    columns = 2 if narrow else len(keys) if len(keys) <= 6 else ceil(len(keys) / 2)
    fig.legend(
        handles=keys, loc="outside upper left", ncols=columns, columnspacing=1.2, handletextpad=0.5, handlelength=1.8,
        fontsize=SMALL,
    )  # fmt: skip
