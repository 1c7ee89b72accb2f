"""Figures of probes, similarities and divergences, each from the tidy table that its result writes.

    save_figure(probe_figure(result.to_frame()), folder / "probe")          # name.svg and name.png

Every figure shows what its numbers must be compared with: baselines beside a probe, the shuffled floor of a
similarity, the random null of a cosine. Readable at one printed column. Trap: a table read back from JSON has None
where a number is not known; `_number` takes both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from probes.numbers import plain
from probes.style import GRID, INK, MUTED, PALETTE, SMALL, figure_style, new_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

A_COLOUR, C_COLOUR, BASELINE = PALETTE[0], PALETTE[1], PALETTE[6]
MANY = 18  # more names than this do not fit under an axis of one column


# --- probe ------------------------------------------------------------------------------------------------


@figure_style()
def probe_figure(rows: pd.DataFrame, *, title: str = "") -> Figure:
    """R² of a linear readout per layer, with intervals over test episodes, above its baselines.

    rows: `Probe.to_frame()`: kind, name, layer, chosen, r2, low, high. The layer that was chosen on the selection
    episodes is marked with a triangle.
    """
    bars = _probe_bars(rows)
    fig, axes = new_figure(height=0.62 + 0.19 * len(bars))
    axis = axes[0, 0]
    places = np.cumsum([0.55 if bar["gap"] else 0.0 for bar in bars]) + np.arange(len(bars))
    for place, bar in zip(places, bars, strict=True):
        axis.barh(
            place, bar["r2"], height=0.78, color=bar["colour"], hatch=bar["hatch"], edgecolor="white", linewidth=0
        )
        end = bar["r2"]
        if np.isfinite(bar["low"]):
            axis.plot([bar["low"], bar["high"]], [place, place], color=INK, linewidth=1.0, solid_capstyle="butt")
            end = max(end, bar["high"])
        axis.annotate(
            plain(bar["r2"]), (max(end, 0.0), place), xytext=(3, 0), textcoords="offset points",
            va="center", fontsize=SMALL,
        )  # fmt: skip
    axis.axvline(0, color=MUTED, linewidth=0.7)
    axis.set_yticks(places, [bar["label"] for bar in bars])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("R² on held-out episodes (0: mean predictor)\n▸ chosen layer; lines: 95 % intervals")
    ends = [end for bar in bars for end in (bar["r2"], bar["low"], bar["high"]) if np.isfinite(end)]
    low, high = max(min(0.0, *ends), -1.0), min(max(0.25, *ends), 1.0)
    axis.set_xlim(low - 0.03 * (high - low), high + 0.16 * (high - low))  # room for the number after the longest line
    if title:
        axis.set_title(title)
    _probe_legend(axis, rows)
    return fig


def _probe_bars(rows: pd.DataFrame) -> list[dict[str, Any]]:
    looks = {"features": (A_COLOUR, ""), "against": (PALETTE[5], "////")}
    bars: list[dict[str, Any]] = []
    layers = list(dict.fromkeys(rows.loc[rows["kind"] == "features", "layer"]))
    for layer in layers:
        for kind, (colour, hatch) in looks.items():
            for row in rows[(rows["kind"] == kind) & (rows["layer"] == layer)].to_dict("records"):
                mark = " ▸" if row["chosen"] and kind == "features" else ""
                label = layer + mark if kind == "features" else ""
                bars.append(_bar(row, label, colour, hatch, gap=kind == "features" and layer != layers[0]))
    for kind, label in (("pixels", "pixels"), ("shuffled", "shuffled labels")):
        for row in rows[rows["kind"] == kind].to_dict("records"):
            bars.append(_bar(row, label, BASELINE, "", gap=kind == "pixels"))
    return bars


def _bar(row: dict[str, Any], label: str, colour: str, hatch: str, *, gap: bool) -> dict[str, Any]:
    values = {name: _number(row[name]) for name in ("r2", "low", "high")}
    return {**values, "label": label, "colour": colour, "hatch": hatch, "gap": gap}


def _probe_legend(axis: Axes, rows: pd.DataFrame) -> None:
    from matplotlib.patches import Patch

    names = {kind: rows.loc[rows["kind"] == kind, "name"] for kind in ("features", "against")}
    if names["against"].empty:
        return
    handles = [
        Patch(facecolor=A_COLOUR, label=names["features"].iloc[0]),
        Patch(facecolor=PALETTE[5], hatch="////", edgecolor="white", linewidth=0, label=names["against"].iloc[0]),
    ]
    axis.figure.legend(handles=handles, loc="outside upper left", ncols=2, handlelength=1.4)


# --- similarity -------------------------------------------------------------------------------------------


@figure_style()
def similarity_figure(rows: pd.DataFrame, *, label_a: str = "A", label_b: str = "B") -> Figure:
    """Debiased CKA, layers of A down and layers of B across; a value in brackets is not above the shuffled floor.

    rows: `CkaMatrix.to_frame()`: layer_a, layer_b, cka, floor.
    """
    down, across = list(dict.fromkeys(rows["layer_a"])), list(dict.fromkeys(rows["layer_b"]))
    value = np.array(rows["cka"], float).reshape(len(down), len(across))
    floor = np.array(rows["floor"], float).reshape(value.shape)
    cell = min(0.42, 2.2 / len(across))
    fig, axes = new_figure(height=max(1.7, 1.15 + cell * len(down)))
    axis = axes[0, 0]
    image = axis.imshow(value, vmin=0, vmax=1, aspect="equal")
    if max(value.shape) <= 10:
        for i, j in np.ndindex(*value.shape):
            number = plain(float(value[i, j]))
            text = f"({number})" if value[i, j] <= floor[i, j] else number
            colour = "white" if value[i, j] < 0.55 else INK
            axis.text(j, i, text, ha="center", va="center", fontsize=SMALL, color=colour)
    axis.set_xticks(range(len(across)), _thinned(across), rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(down)), _thinned(down))
    axis.tick_params(length=0)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.set_xlabel(label_b)
    axis.set_ylabel(label_a)
    bar = fig.colorbar(image, ax=axis, shrink=0.9, pad=0.03)
    bar.set_label("debiased CKA")
    bar.outline.set_visible(False)
    return fig


# --- divergence -------------------------------------------------------------------------------------------


@figure_style()
def divergence_figure(
    weights: pd.DataFrame,
    gradients: pd.DataFrame | None = None,
    *,
    label_a: str = "VLM-trained",
    label_c: str = "VLA-trained",
) -> Figure:
    """Per module group, in network order: size of both weight changes, their cosine, and the gradients' cosine.

    weights: `WeightDivergence.to_frame()`. gradients: `GradientDivergence.to_frame()`. Shaded: where the cosine of two
    random changes lies (±2 sd); error bars: bootstrap over batches; crosses: gradients below noise.
    """
    groups = list(weights["group"])
    panels = 2 if gradients is None else 3
    fig, axes = new_figure(panels, 1, height=0.75 + 1.35 * panels, sharex=True)
    place = np.arange(len(groups))
    sizes, cosines = axes[0, 0], axes[1, 0]
    for column, label, colour, marker, aside in (
        ("rel_norm_a", label_a, A_COLOUR, "o", -0.13),
        ("rel_norm_c", label_c, C_COLOUR, "s", 0.13),
    ):
        values = [_number(value) for value in weights[column]]
        sizes.plot(place + aside, values, marker=marker, linestyle="none", color=colour, label=label)
    top = float(np.nanmax(weights[["rel_norm_a", "rel_norm_c"]].to_numpy(float), initial=0.0)) or 1.0
    sizes.set_ylim(-0.04 * top, 1.35 * top)  # the legend stands above all points
    sizes.set_ylabel("|change| / |base|")
    sizes.set_title("How far the weights moved")
    _legend(sizes)

    null = 2 * np.array([_number(value) for value in weights["null_sd"]])
    cosines.bar(place, 2 * null, bottom=-null, width=0.8, color=GRID, label="random changes, ±2 sd")
    cosines.plot(
        place, [_number(value) for value in weights["cosine"]], "D", color=PALETTE[2], label="cosine of the changes"
    )
    _cosine_axis(cosines, [_number(value) for value in weights["cosine"]] + [-float(np.nanmax(null))])
    cosines.set_title("In the same direction?")
    _legend(cosines)
    if gradients is not None:
        _gradient_panel(axes[2, 0], groups, gradients)
    axes[-1, 0].set_xticks(place, _thinned(groups), rotation=60, ha="right", rotation_mode="anchor")
    axes[-1, 0].set_xlim(-0.7, len(groups) - 0.3)
    if len(groups) > MANY:
        for axis in axes[:, 0]:
            axis.grid(axis="x", visible=False)
            for line in axis.lines:
                line.set_markersize(2.5)
    return fig


def _gradient_panel(axis: Axes, groups: list[str], gradients: pd.DataFrame) -> None:
    rows = {row["group"]: row for row in gradients.to_dict("records")}
    drawn: list[float] = []
    labels = {"corrected": "noise-corrected", "naive": "naive", "below": "too noisy to say"}
    for place, group in enumerate(groups):
        if group not in rows:
            continue
        row = {name: value if name in ("group", "verdict") else _number(value) for name, value in rows[group].items()}
        if np.isfinite(row["low"]):
            axis.plot([place, place], [row["low"], row["high"]], color=PALETTE[3], linewidth=1.2)
            axis.plot(place, row["corrected"], "o", color=PALETTE[3], label=labels.pop("corrected", None))
            drawn += [row["low"], row["high"]]
        elif row["verdict"] != "no gradient":
            axis.plot(place, 0, "x", color=PALETTE[3], label=labels.pop("below", None))
        if np.isfinite(row["naive"]):
            axis.plot(place, row["naive"], "o", markerfacecolor="none", color=MUTED, label=labels.pop("naive", None))
            drawn.append(row["naive"])
    _cosine_axis(axis, drawn)
    axis.set_title("Gradients of the two losses at the base")
    _legend(axis)


def _cosine_axis(axis: Axes, values: list[float]) -> None:
    """Cosines on an axis that always shows 0; at most ±1.5, since corrected ones may pass 1 by their noise."""
    finite = [min(1.5, max(-1.5, value)) for value in values if np.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    reach = max(0.1, high, -low)
    axis.set_ylim(min(1.15 * low, -0.3 * reach), 1.1 * max(high, 0.3 * reach) + 0.35 * reach)  # legend above all
    axis.axhline(0, color=MUTED, linewidth=0.7)
    axis.set_ylabel("cosine")


def _legend(axis: Axes) -> None:
    axis.legend(loc="upper left", ncols=3, handletextpad=0.2, handlelength=1.2, columnspacing=1.0, borderaxespad=0.1)


def _thinned(names: list[str]) -> list[str]:
    """Names for the ticks of one column: all, or every k-th where there are too many to read."""
    step = -(-len(names) // MANY)
    return [name if place % step == 0 else "" for place, name in enumerate(names)]


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
