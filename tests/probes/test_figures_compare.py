"""Forest plots, strips and power curves: what is drawn is what was computed, whole at one column width."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest

from probes import figures_compare, figures_power, style, tables
from probes.compare import compare
from probes.correlation import correlate
from probes.figures import capability_scatter
from probes.pairs import Correlation
from probes.paper import capability, performance
from probes.power import plan, power_of_r, reference


@cache
def published() -> Correlation:
    return correlate(capability(), performance())


def rows(policies: dict[str, float]) -> pd.DataFrame:
    told = [(name, task, i, i < rate * 20) for name, rate in policies.items() for task in "xy" for i in range(20)]
    return pd.DataFrame(told, columns=["model", "task", "episode", "success"])


def texts_inside(fig) -> None:
    """Everything lies on the page, up to two pixels; notes and names are not in the layout and looked at one by one."""
    fig.draw_without_rendering()
    page, whole = fig.bbox, fig.get_tightbbox().transformed(fig.dpi_scale_trans)
    for box in (whole, *(text.get_window_extent() for ax in fig.axes for text in ax.texts if text.get_text())):
        assert page.x0 - 2 <= box.x0 and box.x1 <= page.x1 + 2
        assert page.y0 - 2 <= box.y0 and box.y1 <= page.y1 + 2


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures_compare.contrast_forest(tables.contrasts("freezing")),
        lambda: figures_compare.contrast_forest(tables.contrasts("injection")),
        lambda: figures_compare.contrast_forest(tables.contrasts("scratch")),
        lambda: figures_compare.contrast_forest(*map(tables.contrasts, ("freezing", "injection", "scratch"))),
        lambda: figures_compare.auxiliary_strip(tables.auxiliary()),
        lambda: figures_power.power_figure(plan(9, 96, reference=reference())),
        lambda: figures_power.power_figure(plan(9, 96, reference=reference()), width=style.TWO_COLUMN),
        lambda: figures_power.reliability_figure(["a benchmark", "b"], [0.6, 0.9], [(0.1, 0.8), (0.8, 1.0)]),
        lambda: figures_compare.comparison_forest(compare(rows({"a": 0.5, "b": 0.2}))),
        lambda: figures_compare.comparison_forest(compare(rows({"a long name of a policy": 0.5, "b": 0.2, "c": 1}))),
        lambda: capability_scatter(published(), width=style.ONE_COLUMN),
    ],
    ids=[
        "freezing",
        "injection",
        "scratch",
        "three",
        "auxiliary",
        "power",
        "wide",
        "reliability",
        "two",
        "many",
        "scatter",
    ],
)
def test_all_text_is_on_the_page(draw):
    texts_inside(draw())


def points(ax) -> list[tuple[float, float]]:
    return [tuple(line.get_xydata()[0]) for line in ax.lines if len(line.get_xydata()) == 1]


def spans(ax) -> list[tuple[float, float]]:
    found = [line.get_xydata() for line in ax.lines if len(line.get_xydata()) == 2]
    return [(xy[0, 0], xy[1, 0]) for xy in found if xy[0, 1] == xy[1, 1]]


def test_forest_shows_differences_and_intervals_of_the_table():
    table = tables.contrasts("freezing")
    fig = figures_compare.contrast_forest(table)
    for ax, benchmark in zip(fig.axes, (tables.CALVIN, tables.BRIDGE), strict=True):
        chosen = [row for row in table.rows if row.benchmark == benchmark]
        assert ax.get_title(loc="left") == f"{benchmark}: frozen parts"
        assert [x for x, _ in points(ax)] == [row.difference for row in chosen]
        assert spans(ax) == [pytest.approx(tuple(row.interval)) for row in chosen]
        hollow = [line.get_markerfacecolor() == "white" for line in ax.lines if len(line.get_xydata()) == 1]
        holm = dict(zip(table.rows, table.p_holm, strict=True))
        assert hollow == [holm[row] >= 0.05 for row in chosen]


def test_comparison_forest_of_two_and_of_many():
    result = compare(rows({"a": 0.9, "b": 0.2}))
    ax = figures_compare.comparison_forest(result).axes[0]
    assert [x for x, _ in points(ax)] == pytest.approx([0.7, 0.7, 0.7])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["all tasks", "x", "y"]
    result = compare(rows({"a": 0.9, "b": 0.2, "c": 0.25}))
    ax = figures_compare.comparison_forest(result).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "c", "b"]
    assert [text.get_text() for text in ax.texts] == [policy.group for policy in result.policies]


def test_a_comparison_without_an_interval_can_be_drawn():
    told = rows({"a": 1, "b": 1}).assign(chain=5)
    fig = figures_compare.comparison_forest(compare(told, metric="chain"))
    assert not spans(fig.axes[0]) and len(points(fig.axes[0])) == 3


def test_strip_shows_all_three_checkpoints_beside_the_baseline():
    table = tables.auxiliary()
    fig = figures_compare.auxiliary_strip(table)
    drawn = {round(float(x), 4) for ax in fig.axes for line in ax.lines for x in line.get_xdata()}
    for row in table.rows:
        assert {row.best, row.median, row.worst, *row.baseline} <= drawn


def test_power_curves_are_the_power():
    found = plan(9, 96, reference=reference())
    ax = figures_power.power_figure(found).axes[0]
    curves = {line.get_label(): line for line in ax.lines}
    curve = curves["9"].get_xydata()
    nearest = curve[np.argmin(np.abs(curve[:, 0] - 100))]
    seen = found.rho * (found.spread**2 / (found.spread**2 + found.episode_variance / nearest[0])) ** 0.5
    assert nearest[1] == pytest.approx(power_of_r(seen, 9))
    assert (96, pytest.approx(found.power)) in points(ax)
    named = [text.get_text() for text in ax.get_legend().get_texts()]
    assert named == ["6", "9", "20", "50"]


def test_scatter_draws_every_fit_without_one_model_and_the_ceiling():
    result = published()
    for ax, pair in zip(capability_scatter(result).axes, result.pairs, strict=True):
        lines = [line for line in ax.lines if len(line.get_xydata()) > 2]
        assert len(lines) == 1 + 9
        told = " ".join(text.get_text() for text in ax.texts)
        assert f"expect |r| {pair.reliability.best**0.5:.2f} at most" in told
