"""Figures of probes over many layers and checkpoints: what appears, moves or is lost, and maps of dense readouts.

    save_figure(layers_figure(rows), folder / "layers")        # one panel per target, one line per checkpoint

Every panel shows what a line must be above: pixels, labels of other episodes, the control task. Trap: the lines are of
the test episodes, the marked layers were chosen on others; the highest point of a line is not the chosen one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from probes.style import INK, MARKERS, MUTED, PALETTE, SMALL, TWO_COLUMN, figure_style, new_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from probes.probe import Probe
    from vlm4vla_core.episodes.store import EpisodeStore

MANY, SHOWN = 12, 4  # ticks of a panel; frames of a sheet


@figure_style()
def layers_figure(rows: pd.DataFrame) -> Figure:
    """Scores of every checkpoint over its layers, with intervals over test episodes; one panel per target.

    rows: `Probe.to_frame()` of one kind of readout, several targets one below the other.
    """
    targets = list(dict.fromkeys(rows["target"]))
    across = min(2, len(targets))
    down = -(-len(targets) // across)
    fig, axes = new_figure(down, across, width=TWO_COLUMN if across > 1 else 5.0, height=0.7 + 2.1 * down)
    for axis, target in zip(axes.flat, targets, strict=False):
        _panel(axis, rows[rows["target"] == target])
        axis.set_title(target)
    for axis in axes.flat[len(targets) :]:
        axis.set_axis_off()
    handles: dict[str, Any] = {}
    for axis in axes.flat[: len(targets)]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    fig.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4 if across > 1 else 3)
    return fig


def _panel(axis: Axes, rows: pd.DataFrame) -> None:
    of_layers = rows[rows["kind"].isin(["features", "against"])]
    layers = list(dict.fromkeys(of_layers["layer"]))
    names = list(dict.fromkeys(of_layers["name"]))
    for number, name in enumerate(names):
        mine = of_layers[of_layers["name"] == name].set_index("layer").loc[layers]
        x = np.arange(len(layers)) + 0.08 * (number - (len(names) - 1) / 2)
        value = mine["r2"].to_numpy(float)
        spread = np.abs(mine[["low", "high"]].to_numpy(float).T - value)
        colour, untrained = PALETTE[number % len(PALETTE)], name.startswith("untrained ")
        axis.errorbar(
            x, value, yerr=spread, color=MUTED if untrained else colour, marker=MARKERS[number % len(MARKERS)],
            linestyle=":" if untrained else "-", elinewidth=0.8, capsize=0, label=name,
        )  # fmt: skip
        best = int(mine["selected"].to_numpy(float).argmax())
        axis.plot(x[best], value[best], "o", markersize=9, markerfacecolor="none", markeredgecolor=INK, linewidth=0)
    flat = {kind: rows[rows["kind"] == kind] for kind in ("pixels", "shuffled", "control", "mean")}
    for kind, style, colour, label in (("pixels", "--", PALETTE[4], "pixels"), ("control", "-.", INK, "control task")):
        if len(flat[kind]):
            axis.axhline(float(flat[kind]["r2"].iloc[0]), color=colour, linestyle=style, linewidth=1.0, label=label)
    if len(flat["shuffled"]):
        low, high = (float(flat["shuffled"][name].iloc[0]) for name in ("low", "high"))
        axis.axhspan(low, high, color=MUTED, alpha=0.25, linewidth=0, label="labels of other episodes")
    floor = float(flat["mean"]["r2"].iloc[0])
    axis.axhline(floor, color=MUTED, linewidth=0.7)
    drawn = [of_layers["r2"], of_layers["low"], flat["pixels"]["r2"], flat["shuffled"]["r2"], flat["control"]["r2"]]
    lowest = min(float(np.nanmin(part.to_numpy(float), initial=floor)) for part in drawn)
    axis.set_ylim(max(lowest, floor - 0.6) - 0.05, 1.03)
    step = -(-len(layers) // MANY)
    shown = [layer.replace("vision.", "v").replace("decoder.", "d") for layer in layers]
    axis.set_xticks(range(0, len(layers), step), shown[::step], fontsize=SMALL)
    axis.set_ylabel("R²" if bool(np.isclose(floor, 0)) else "accuracy")


@figure_style()
def maps_sheet(result: Probe, store: EpisodeStore) -> Figure:
    """Frames of held-out episodes, what their patches show, and what a dense readout of each patch's token says."""
    assert result.maps is not None
    rows, true, told = result.maps
    _, first = np.unique(store.episode_of[rows], return_index=True)
    picked = np.sort(first)[:SHOWN]
    fig, axes = new_figure(3, len(picked), width=TWO_COLUMN, height=5.4)
    frames = store.images(result.camera, rows[picked])
    classes = bool(result.readouts[result.layer].classes)
    low, high = float(true[picked].min()), float(true[picked].max())
    look = {"cmap": "tab20" if classes else None, "vmin": 0 if classes else low, "vmax": 19 if classes else high}
    for column, (place, frame) in enumerate(zip(picked, frames, strict=True)):
        row = rows[place]
        axes[0, column].imshow(frame)
        axes[0, column].set_title(f"episode {store.episode_of[row]}, step {store.step_of[row]}", fontsize=SMALL)
        for line, values in ((1, true), (2, told)):
            image = axes[line, column].imshow(values[place], interpolation="nearest", **look)
    for axis, label in zip(axes[:, 0], ("frame", "recorded", "read out"), strict=True):
        axis.set_ylabel(label)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
    if not classes:
        fig.colorbar(image, ax=axes[1:], shrink=0.7, pad=0.02).set_label("depth, m")
    fig.suptitle(
        f"{result.target} of every patch from {result.layer} of {result.label}", x=0.01, ha="left", fontsize=8.5
    )
    return fig
