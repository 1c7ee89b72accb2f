"""Figures of probes over many layers and checkpoints: what appears, moves or is lost, and maps of dense readouts.

    save_figure(layers_figure(rows, changes), folder / "layers")   # one panel per target, one colour per checkpoint

Every panel shows what a point must be above: pixels, labels of other episodes, the control task. Trap: the points are
of the test episodes, the ringed layers were chosen on others; a checkpoint's highest point is not the chosen one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from probes.style import GRID, INK, MARKERS, MUTED, PALETTE, SMALL, TWO_COLUMN, figure_style, new_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from probes.probe import Probe
    from vlm4vla_core.episodes.store import EpisodeStore

MANY, SHOWN = 12, 4  # layers that are named and stand on bands of their own; frames of a sheet
_COLOURS = (PALETTE[1], PALETTE[0], PALETTE[2], PALETTE[3], PALETTE[5])  # the reference is INK, pixels PALETTE[4]
_BELOW = 0.4  # how far below the floor a panel reaches; worse than nothing is no more worth telling apart
_LINE, _ROOM = 0.35, 0.78  # opacity of what joins the points of a checkpoint; width of a layer's points, of 1


@figure_style()
def layers_figure(rows: pd.DataFrame, changes: pd.DataFrame | None = None) -> Figure:
    """Scores of every checkpoint over its layers, with intervals over test episodes; one panel per target.

    rows: `Probe.to_frame()` of one kind of readout, several targets one below the other. changes: `probe.changes` of
    the same, all from one reference, which is drawn first; a point that does not differ from the reference's is hollow.
    """
    of_layers = rows[rows["kind"].isin(["features", "against"])]
    targets, layers, names = (list(dict.fromkeys(of_layers[column])) for column in ("target", "layer", "name"))
    if changes is not None and len(changes):
        reference = changes["reference"].iloc[0]
        names.sort(key=lambda name: name != reference)
    across = 1 if len(layers) * len(names) > 20 or len(targets) == 1 else 2
    down = -(-len(targets) // across)
    tall = 1.45 if across == 1 and len(targets) > 1 else 2.1
    fig, axes = new_figure(down, across, width=TWO_COLUMN, height=0.9 + tall * down, sharex=True)
    for axis, target in zip(axes.flat, targets, strict=False):
        told = None if changes is None else changes[changes["target"] == target]
        _panel(axis, rows[rows["target"] == target], names, layers, told)
        axis.set_title(target.replace("_", " "))
    for column in range(len(targets) - across * (down - 1), across):  # empty panels of the last row
        axes[-1, column].set_axis_off()
        axes[-2, column].tick_params(labelbottom=True)
    handles: dict[str, Any] = {}
    for axis in axes.flat[: len(targets)]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    fig.legend(
        handles.values(), handles.keys(), loc="outside upper left", ncols=min(len(handles), 6), columnspacing=1.2
    )
    notes = ["lines: 95 % over held-out episodes", "ring: layer chosen on selection episodes"]
    if changes is not None and len(changes):
        notes.insert(1, f"filled: the paired difference from {changes['reference'].iloc[0]} excludes 0")
    fig.supxlabel("; ".join(notes), fontsize=SMALL, color=MUTED, x=0.01, ha="left")
    return fig


def _panel(axis: Axes, rows: pd.DataFrame, names: list[str], layers: list[str], changes: pd.DataFrame | None) -> None:
    of_layers = rows[rows["kind"].isin(["features", "against"])]
    crowded = len(layers) > MANY
    step = (0.0 if crowded else _ROOM) / max(1, len(names))
    colours = iter(_COLOURS * (1 + len(names) // len(_COLOURS)))
    for number, name in enumerate(names):
        mine = of_layers[of_layers["name"] == name].set_index("layer").reindex(layers)
        x = np.arange(len(layers)) + step * (number - (len(names) - 1) / 2)
        value = mine["r2"].to_numpy(float)
        untrained = name.startswith("untrained ")
        colour = INK if number == 0 else MUTED if untrained else next(colours)
        style: dict[str, Any] = {"color": colour, "marker": MARKERS[number % len(MARKERS)]}
        axis.plot(x, value, ":" if untrained else "-", color=colour, linewidth=0.8, alpha=1 if crowded else _LINE)
        axis.vlines(x, mine["low"].to_numpy(float), mine["high"].to_numpy(float), color=colour, linewidth=0.9)
        axis.plot([], [], linestyle="none", label=name, **style)
        same = _same(changes, name, layers)
        axis.plot(x[~same], value[~same], linestyle="none", **style)
        axis.plot(x[same], value[same], linestyle="none", markerfacecolor="white", markeredgewidth=0.9, **style)
        if np.isfinite(selected := mine["selected"].to_numpy(float)).any():
            best = int(np.nanargmax(selected))
            axis.plot(x[best], value[best], "o", markersize=8.5, markerfacecolor="none", markeredgecolor=INK,
                      markeredgewidth=0.7)  # fmt: skip
    flat = {kind: rows[rows["kind"] == kind] for kind in ("pixels", "shuffled", "control", "mean")}
    for kind, dashes, colour, label in (("pixels", "--", PALETTE[4], "pixels"), ("control", "-.", INK, "control task")):
        if len(flat[kind]):
            axis.axhline(float(flat[kind]["r2"].iloc[0]), color=colour, linestyle=dashes, linewidth=1.0, label=label)
    if len(flat["shuffled"]):
        low, high = (float(flat["shuffled"][name].iloc[0]) for name in ("low", "high"))
        axis.axhspan(low, high, color=MUTED, alpha=0.2, linewidth=0, label="labels of other episodes")
    floor = float(flat["mean"]["r2"].iloc[0])
    axis.axhline(floor, color=MUTED, linewidth=0.7)
    drawn = [of_layers[name] for name in ("r2", "low", "high")]
    drawn += [flat[kind]["r2"] for kind in ("pixels", "control")] + [flat["shuffled"][name] for name in ("low", "high")]
    low, high = (
        float(end([end(part.to_numpy(float), initial=floor) for part in drawn])) for end in (np.nanmin, np.nanmax)
    )
    room = max(0.3, high - max(low, floor - _BELOW))
    axis.set_ylim(max(low, floor - _BELOW) - 0.05 * room, min(high, 1.0) + 0.05 * room)
    every = -(-len(layers) // MANY)
    axis.set_xticks(range(0, len(layers), every), layers[::every], fontsize=SMALL)
    axis.set_xlim(-0.5, len(layers) - 0.5)
    axis.tick_params(axis="x", length=0)
    axis.grid(axis="x", visible=False)
    for place in range(1, 0 if crowded else len(layers), 2):
        axis.axvspan(place - 0.5, place + 0.5, color=GRID, alpha=0.45, linewidth=0, zorder=0)
    axis.set_ylabel("R²" if bool(np.isclose(floor, 0)) else "accuracy")


def _same(changes: pd.DataFrame | None, name: str, layers: list[str]) -> np.ndarray:
    """Per layer, whether the difference from the reference is known and its interval holds 0."""
    if changes is None:
        return np.zeros(len(layers), bool)
    mine = changes[(changes["name"] == name) & ~changes["best"]].set_index("layer").reindex(layers)
    low, high = mine["low"].to_numpy(float), mine["high"].to_numpy(float)
    return np.asarray((low <= 0) & (high >= 0))


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
