"""Figures of similarities, each from the tidy table that its result writes.

    save_figure(similarity_figure(result.to_frame()), folder / "similarity")          # name.svg and name.png

Trap: a high value says little without what unrelated images and another seed of the same run give; both are drawn
where they are known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from probes.numbers import plain
from probes.style import INK, MUTED, ONE_COLUMN, PALETTE, SMALL, TWO_COLUMN, figure_style, new_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MANY = 18  # more names than this do not fit under an axis of one column


# --- similarity -------------------------------------------------------------------------------------------


@figure_style()
def similarity_figure(rows: pd.DataFrame, *, label_a: str = "A", label_b: str = "B", twin: str = "") -> Figure:
    """Debiased CKA, layers of A down and layers of B across; a value in brackets is not above the shuffled floor.

    rows: `CkaMatrix.to_frame()`: layer_a, layer_b, cka, floor. With a column `ceiling` (and ceiling_low, ceiling_high),
    A against `twin`, another seed of its run, a second panel shows every layer with itself between floor and ceiling.
    """
    down, across = list(dict.fromkeys(rows["layer_a"])), list(dict.fromkeys(rows["layer_b"]))
    value = np.array(rows["cka"], float).reshape(len(down), len(across))
    floor = np.array(rows["floor"], float).reshape(value.shape)
    cell = min(0.42, 2.2 / len(across))
    same = rows[rows["layer_a"] == rows["layer_b"]]
    two = "ceiling" in rows and len(same) > 0
    fig, axes = new_figure(
        1, 1 + two, width=TWO_COLUMN if two else ONE_COLUMN, height=max(1.7, 1.15 + cell * len(down))
    )
    axis = axes[0, 0]
    image = axis.imshow(value, vmin=0, vmax=1, aspect="equal")
    if max(value.shape) <= 10:
        for i, j in np.ndindex(*value.shape):
            number = plain(float(value[i, j]))
            text = f"({number})" if value[i, j] <= floor[i, j] else number
            colour = "white" if value[i, j] < 0.55 else INK
            axis.text(j, i, text, ha="center", va="center", fontsize=SMALL, color=colour)
    axis.set_xticks(range(len(across)), thinned(across), rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(down)), thinned(down))
    axis.tick_params(length=0)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.set_xlabel(label_b)
    axis.set_ylabel(label_a)
    bar = fig.colorbar(image, ax=axis, shrink=0.9, pad=0.03)
    bar.set_label("debiased CKA")
    bar.outline.set_visible(False)
    if two:
        _same_layers(axes[0, 1], same, label_a, label_b, twin or "another seed")
    return fig


def _same_layers(axis: Axes, rows: pd.DataFrame, label_a: str, label_b: str, twin: str) -> None:
    """Every layer of A with the same of B, between another seed's and what shuffled images give."""
    x, names = np.arange(len(rows)), list(rows["layer_a"])
    for column, low, high, colour, marker, aside, label in (
        ("ceiling", "ceiling_low", "ceiling_high", PALETTE[2], "s", -0.08, f"{label_a} and {twin} (ceiling)"),
        ("cka", "low", "high", PALETTE[0], "o", 0.08, f"{label_a} and {label_b}"),
    ):
        value = rows[column].to_numpy(float)
        if low in rows:
            axis.vlines(x + aside, rows[low].to_numpy(float), rows[high].to_numpy(float), color=colour, linewidth=1.0)
        axis.plot(x + aside, value, marker=marker, color=colour, linewidth=1.0, label=label)
    if (floor := rows["floor"].to_numpy(float)).size and np.isfinite(floor).any():
        axis.fill_between(x, -0.05, floor, color=MUTED, alpha=0.25, linewidth=0, label="shuffled images (95 %)")
    axis.set_ylim(-0.05, 1.05)
    axis.set_xticks(x, thinned(names), rotation=45, ha="right", rotation_mode="anchor")
    axis.set_ylabel("debiased CKA")
    axis.legend(loc="best", fontsize=SMALL)


def thinned(names: list[str]) -> list[str]:
    """Names for the ticks of one column: all, or every k-th where there are too many to read."""
    step = -(-len(names) // MANY)
    return [name if place % step == 0 else "" for place, name in enumerate(names)]
