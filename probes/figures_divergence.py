"""Figures of paths, gradients and lines between checkpoints, each from the tidy table that its result writes.

    save_figure(parting_figure(frame, verdicts), folder / "trajectory")

Every panel shows its null and its ceiling, or says that it has none. Trap: log-spaced steps are drawn as they were
recorded, side by side; distances on the axis are not times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from probes.style import GRID, INK, MUTED, PALETTE, SMALL, TWO_COLUMN, figure_style, new_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@figure_style()
def parting_figure(rows: pd.DataFrame, verdicts: pd.DataFrame) -> Figure:
    """Corrected cosine of the arms over steps per module, and the excess distance as a map of modules and steps.

    rows: `Parting.to_frame()`; verdicts: `Parting.verdicts()`. Band round the curve: 95 % over runs; green band: range
    between halves of one arm's seeds (the ceiling); dashed: floor of permuted labels; dotted: unrelated directions.
    """
    modules = list(dict.fromkeys(rows["module"]))
    columns = min(3, len(modules))
    down = -(-len(modules) // columns)
    fig, axes = new_figure(down + 1, columns, width=TWO_COLUMN, height=1.0 + 1.7 * (down + 1))
    steps = [str(step) for step in dict.fromkeys(rows["step"])]
    place = np.arange(len(steps))
    for axis, module in zip(axes[:-1].flat, modules, strict=False):
        own = rows[rows["module"] == module]
        axis.fill_between(place, own["ceiling_low"], own["ceiling_high"], color=PALETTE[2], alpha=0.25, linewidth=0,
                          label="same arm, halves of its seeds")  # fmt: skip
        axis.fill_between(place, own["cosine_low"], own["cosine_high"], color=PALETTE[0], alpha=0.25, linewidth=0)
        axis.plot(place, own["cosine"], "o-", color=PALETTE[0], label="between the arms")
        axis.plot(place, own["floor"], "--", color=INK, linewidth=1, label="permuted arms, 5 %")
        axis.plot(place, own["random"], ":", color=MUTED, label="unrelated directions, 95 %")
        axis.plot(place, own["norm_matched"], "x", color=PALETTE[1], label="at equal length")
        known = verdicts[verdicts["module"] == module].iloc[0]
        if known["parted_after"] == known["parted_after"] and known["p_all"] <= 0.05:
            axis.axvline(_place(steps, known["parted_after"]) + 0.5, color=PALETTE[3], linewidth=1.2, label="they part")
        axis.set_title(module if known["p_all"] == known["p_all"] else f"{module} (seeds too few)")
        axis.set_ylim(min(-0.3, 1.2 * own["cosine"].min()), 1.25)
        axis.set_xticks(place, steps, rotation=60)
    for axis in list(axes[:-1].flat)[len(modules) :]:
        axis.set_axis_off()
    axes[0, 0].set_ylabel("corrected cosine")
    handles: dict[str, Any] = {}
    for axis in axes[:-1].flat:
        handles |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, fontsize=SMALL)
    for axis in axes[-1, 1:]:
        axis.remove()
    _heat(fig, fig.add_subplot(axes[-1, 0].get_gridspec()[-1, :]), rows, modules, steps)
    axes[-1, 0].remove()
    return fig


def _place(steps: list[str], step: float) -> float:
    return steps.index(str(int(step))) if str(int(step)) in steps else -1.0


def _heat(fig: Figure, axis: Any, rows: pd.DataFrame, modules: list[str], steps: list[str]) -> None:
    values = rows["excess"].to_numpy(float).reshape(len(modules), len(steps))
    reach = max(1e-9, float(np.nanmax(np.abs(np.where(np.isfinite(values), values, np.nan)), initial=0.0)))
    image = axis.imshow(values, aspect="auto", cmap="PuOr_r", vmin=-reach, vmax=reach)
    axis.set_yticks(range(len(modules)), modules)
    axis.set_xticks(range(len(steps)), steps, rotation=60)
    axis.set_xlabel("recorded step")
    axis.grid(visible=False)
    axis.tick_params(length=0)
    axis.set_title("Between-arm distance above both within-arm ones (null: 0)")
    fig.colorbar(image, ax=axis, pad=0.01).set_label("excess")


@figure_style()
def path_figure(points: np.ndarray, shares: pd.DataFrame, arms: tuple[str, ...]) -> Figure:
    """The joint path on its first two principal components, and their shares beside walks without a plan.

    points (runs, T + 1, 2), the base first; shares: component, share, low, high (of the null). arms: one per run.
    """
    fig, axes = new_figure(1, 2, width=TWO_COLUMN, height=2.9, width_ratios=[2, 1])
    plane, bars = axes[0]
    names = list(dict.fromkeys(arms))
    for path, arm in zip(points, arms, strict=True):
        colour = PALETTE[names.index(arm)]
        first = arm not in plane.get_legend_handles_labels()[1]
        plane.plot(*path.T, "-o", markersize=2.5, linewidth=0.9, color=colour, label=arm if first else None)
    plane.plot(*points[0, 0], "*", markersize=9, color=INK, label="base")
    plane.set_xlabel("first component")
    plane.set_ylabel("second component")
    plane.set_aspect("equal", adjustable="datalim")
    plane.legend()
    place = np.arange(len(shares))
    bars.bar(place, shares["high"] - shares["low"], bottom=shares["low"], width=0.8, color=GRID, edgecolor=MUTED,
             linewidth=0.5, label="walks without a plan, 95 %")  # fmt: skip
    bars.plot(place, shares["share"], "D", color=PALETTE[0], label="recorded")
    bars.set_xticks(place, [f"PC{n}" for n in shares["component"]])
    bars.set_ylabel("share of the variance")
    bars.set_ylim(0, 1.05)
    bars.legend(fontsize=SMALL)
    return fig


@figure_style()
def gradients_figure(rows: pd.DataFrame) -> Figure:
    """Corrected cosine per module group, one panel per pair of losses and form, one line per checkpoint.

    rows: at, pair, form, group, corrected, low, high. Bands: 95 % over batches; gaps: below noise. Null: 0.
    """
    panels = list(dict.fromkeys(zip(rows["pair"], rows["form"], strict=True)))
    fig, axes = new_figure(len(panels), 1, width=TWO_COLUMN, height=0.9 + 1.5 * len(panels), sharex=True)
    groups = [group for group in dict.fromkeys(rows["group"]) if group != "all"]
    place = np.arange(len(groups))
    for axis, (pair, form) in zip(axes[:, 0], panels, strict=True):
        part = rows[(rows["pair"] == pair) & (rows["form"] == form)]
        for number, (at, own) in enumerate(part.groupby("at", sort=False)):
            own, colour = own.set_index("group").reindex(groups), PALETTE[number % len(PALETTE)]
            axis.fill_between(place, own["low"].clip(-1.5, 1.5), own["high"].clip(-1.5, 1.5), color=colour, alpha=0.2,
                              linewidth=0)  # fmt: skip
            axis.plot(place, own["corrected"].where(own["low"].notna()), "o-", color=colour, markersize=3, label=at)
        axis.axhline(0, color=MUTED, linewidth=0.8)
        axis.axhline(1, color=PALETTE[2], linewidth=0.8, linestyle="--")  # one loss with itself
        axis.set_ylabel("cosine")
        axis.set_title(f"{pair}, {'plain gradients' if form == 'raw' else 'AdamW steps'}")
        axis.set_ylim(-1.1, 1.3)
    axes[0, 0].legend(fontsize=SMALL, ncols=4)
    axes[-1, 0].set_xticks(place, groups, rotation=60, ha="right", rotation_mode="anchor")
    return fig


@figure_style()
def lines_figure(rows: pd.DataFrame, barriers: pd.DataFrame) -> Figure:
    """Each loss (down) along each line (across) with standard errors; dashed: no barrier.

    rows: `Plane.to_frame()` of lines; barriers: `Plane.barriers()`.
    """
    losses, lines = list(dict.fromkeys(rows["loss"])), list(dict.fromkeys(rows["line"]))
    size = {"width": TWO_COLUMN, "height": 0.5 + 1.6 * len(losses)}
    fig, axes = new_figure(len(losses), len(lines), **size, sharex=True, sharey="row")
    for i, loss in enumerate(losses):
        for j, line in enumerate(lines):
            own = rows[(rows["loss"] == loss) & (rows["line"] == line)]
            axes[i, j].errorbar(own["share"], own["value"], own["stderr"], fmt="o-", color=PALETTE[i], markersize=3)
            axes[i, j].plot([0, 1], own["value"].iloc[[0, -1]], "--", color=MUTED, linewidth=0.9)
            known = barriers[(barriers["loss"] == loss) & (barriers["line"] == line)].iloc[0]
            told = f"barrier {known['barrier']:.3g}\n({known['low']:.3g} to {known['high']:.3g})"
            axes[i, j].annotate(told, (0.04, 0.96), xycoords="axes fraction", va="top", fontsize=SMALL)
            axes[i, j].set_title(line if i == 0 else "")
        axes[i, 0].set_ylabel(f"{loss} loss")
    return fig
