"""Figures of divergences: weights, gradients, representations, paths and lines, each from its result's tidy table.

    save_figure(parting_figure(frame, verdicts), folder / "trajectory")

Every panel shows its null and its ceiling, or says that it has none. Trap: log-spaced steps are drawn as they were
recorded, side by side; distances on the axis are not times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from probes.figures_probe import MANY, thinned
from probes.style import GRID, INK, MUTED, PALETTE, SMALL, TWO_COLUMN, figure_style, new_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


A_COLOUR, C_COLOUR = PALETTE[0], PALETTE[1]
LOSSES = {"A": "language", "C": "action", "F": "FAST"}


@figure_style()
def divergence_figure(
    weights: pd.DataFrame,
    gradients: pd.DataFrame | None = None,
    *,
    label_a: str = "VLM-trained",
    label_c: str = "VLA-trained",
) -> Figure:
    """Per module group, in network order: size of both weight changes, their cosine, and the gradients' cosine.

    weights: `WeightDivergence.to_frame()`, perhaps with ceiling_a and ceiling_c, the cosines of two seeds of one arm
    (dashes). gradients: `GradientDivergence.to_frame()`. Shaded: where the cosine of two random changes lies (±2 sd);
    error bars: bootstrap over batches; crosses: gradients below noise.
    """
    groups = list(weights["group"])
    panels = 2 if gradients is None else 3
    fig, axes = new_figure(panels, 1, width=TWO_COLUMN, height=0.75 + 1.45 * panels, sharex=True)
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
    tops = []
    for column, label, colour in (("ceiling_a", label_a, A_COLOUR), ("ceiling_c", label_c, C_COLOUR)):
        values = [_number(value) for value in weights[column]] if column in weights else []
        if np.isfinite(values).any():
            cosines.plot(place, values, "_", color=colour, markersize=7, label=f"two seeds, {label}")
            tops += values
    cosines.plot(
        place, [_number(value) for value in weights["cosine"]], "D", color=PALETTE[2], label="cosine of the changes"
    )
    _cosine_axis(cosines, [_number(value) for value in weights["cosine"]] + [-float(np.nanmax(null))] + tops)
    if not tops:
        cosines.plot([], [], " ", label="no ceiling: one seed per arm")
    cosines.set_title("In the same direction?")
    _legend(cosines)
    if gradients is not None:
        _gradient_panel(axes[2, 0], groups, gradients)
    axes[-1, 0].set_xticks(place, thinned(groups), rotation=60, ha="right", rotation_mode="anchor")
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
    axis.legend(loc="upper left", ncols=4, handletextpad=0.2, handlelength=1.2, columnspacing=1.0, borderaxespad=0.1)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


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
        drawn = own[["cosine", "norm_matched", "floor"]].to_numpy(float)
        axis.set_ylim(max(-1.4, min(-0.3, float(np.nanmin(drawn, initial=0.0)) - 0.15)), 1.25)
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

    rows: at, pair, form, group, corrected, low, high. Bands: 95 % over batches; crosses: too noisy to say. Null: 0.
    """
    panels = list(dict.fromkeys(zip(rows["pair"], rows["form"], strict=True)))
    fig, axes = new_figure(len(panels), 1, width=TWO_COLUMN, height=0.9 + 1.5 * len(panels), sharex=True)
    groups = [group for group in dict.fromkeys(rows["group"]) if group != "all"]
    place = np.arange(len(groups))
    for axis, (pair, form) in zip(axes[:, 0], panels, strict=True):
        part = rows[(rows["pair"] == pair) & (rows["form"] == form)]
        for number, (at, own) in enumerate(part.groupby("at", sort=False)):
            own, colour = own.set_index("group").reindex(groups), PALETTE[number % len(PALETTE)]
            noisy = own["low"].isna().to_numpy()
            axis.plot(place[noisy], np.zeros(noisy.sum()), "x", color=colour, markersize=4)
            axis.fill_between(place, own["low"].clip(-1.5, 1.5), own["high"].clip(-1.5, 1.5), color=colour, alpha=0.2,
                              linewidth=0)  # fmt: skip
            axis.plot(place, own["corrected"].where(own["low"].notna()), "o-", color=colour, markersize=3, label=at)
        axis.axhline(0, color=MUTED, linewidth=0.8)
        axis.axhline(1, color=PALETTE[2], linewidth=0.8, linestyle="--", label="one loss with itself")
        axis.plot([], [], "x", color=MUTED, markersize=4, label="too noisy to say")
        axis.set_ylabel("cosine")
        one, other = (LOSSES[side] for side in pair.split("-"))
        axis.set_title(f"{one} and {other} loss, {'plain gradients' if form == 'raw' else 'AdamW steps'}")
        axis.set_ylim(-1.1, 1.3)
    axes[0, 0].legend(fontsize=SMALL, ncols=4)
    axes[-1, 0].set_xticks(place, groups, rotation=60, ha="right", rotation_mode="anchor")
    return fig


BESIDE = {"B→A": ("B→random A",), "B→C": ("B→random C",), "A→C": ("A→A'", "C→C'")}  # null or ceiling of each line


@figure_style()
def lines_figure(rows: pd.DataFrame, barriers: pd.DataFrame) -> Figure:
    """Each loss (down) along each line (across) with standard errors, beside its null (a random change as long) or its
    ceiling (two seeds of one arm). Dashed: no barrier.

    rows: `Plane.to_frame()` of lines; barriers: `Plane.barriers()`.
    """
    losses, lines = list(dict.fromkeys(rows["loss"])), [line for line in BESIDE if (rows["line"] == line).any()]
    size = {"width": TWO_COLUMN, "height": 0.8 + 1.6 * len(losses)}
    fig, axes = new_figure(len(losses), len(lines), **size, sharex=True, sharey="row")
    handles: dict[str, Any] = {}
    for i, loss in enumerate(losses):
        mine = rows[rows["loss"] == loss]
        for j, line in enumerate(lines):
            axis = axes[i, j]
            for number, other in enumerate(BESIDE[line]):
                if len(null := mine[mine["line"] == other]):
                    label = "random change, as long" if "random" in other else f"{other}: another seed"
                    colour = MUTED if "random" in other else PALETTE[2 + number]
                    axis.plot(null["share"], null["value"], "x:", color=colour, markersize=3, linewidth=1, label=label)
            own = mine[mine["line"] == line]
            axis.errorbar(own["share"], own["value"], own["stderr"], fmt="o-", color=PALETTE[i], markersize=3)
            axis.plot([0, 1], own["value"].iloc[[0, -1]], "--", color=MUTED, linewidth=0.9, label="no barrier")
            known = barriers[(barriers["loss"] == loss) & (barriers["line"] == line)].iloc[0]
            if i == 0:
                axis.set_title(line, pad=12)
            told = f"barrier {known['barrier']:.3g} ({known['low']:.3g} to {known['high']:.3g})"
            axis.annotate(told, (0.03, 1.0), xycoords="axes fraction", va="bottom", fontsize=SMALL)
            handles |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        if "A→C" in lines and not any((rows["line"] == other).any() for other in BESIDE["A→C"]):
            axes[i, lines.index("A→C")].annotate(
                "ceiling missing: one seed per arm", (0.97, 0.02), xycoords="axes fraction", ha="right", fontsize=SMALL
            )
        axes[i, 0].set_ylabel(f"{loss} loss")
    for axis in axes[-1]:
        axis.set_xlabel("share of the way")
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=SMALL)
    return fig


@figure_style()
def plane_figure(rows: pd.DataFrame) -> Figure:
    """Both losses at B + a (A - B) + c (C - B). rows: `Plane.to_frame()` of a grid."""
    losses = list(dict.fromkeys(rows["loss"]))
    fig, axes = new_figure(1, len(losses), width=TWO_COLUMN, height=2.7)
    for axis, loss in zip(axes[0], losses, strict=True):
        grid = rows[rows["loss"] == loss].pivot(index="c", columns="a", values="value")
        image = axis.imshow(np.log10(grid.clip(lower=1e-12)), origin="lower", aspect="auto")
        middle = float(np.log10(grid.clip(lower=1e-12)).stack().mean())
        for (y, x), value in np.ndenumerate(grid.to_numpy()):
            colour = INK if np.log10(max(value, 1e-12)) > middle else "white"
            axis.text(x, y, f"{value:.3g}", ha="center", va="center", fontsize=SMALL, color=colour)
        for name, a, c in (("B", 0, 0), ("A", 1, 0), ("C", 0, 1)):
            if a in grid.columns and c in grid.index:
                x, y = grid.columns.get_loc(a), grid.index.get_loc(c)
                axis.text(x - 0.42, y + 0.3, name, fontsize=SMALL, weight="bold", color=PALETTE[1])
        axis.set_xticks(range(grid.shape[1]), [f"{a:g}" for a in grid.columns])
        axis.set_yticks(range(grid.shape[0]), [f"{c:g}" for c in grid.index])
        axis.set_xlabel("a, share of A's change")
        axis.set_ylabel("c, share of C's change")
        axis.set_title(f"{loss} loss")
        axis.grid(visible=False)
        fig.colorbar(image, ax=axis, pad=0.02).set_label("log₁₀")
    return fig


@figure_style()
def representations_figure(scores: pd.DataFrame, alike: pd.DataFrame) -> Figure:
    """Left: debiased CKA by layer, of every model with the base and of A with C, above the floor of shuffled frames and
    below other seeds. Right: the base's readout on each model (filled) and each model's own (open), with intervals.

    scores: `Transfer.to_frame()` with a target column; alike: `Transfer.similarity_frame()`.
    """
    layers = list(dict.fromkeys(alike["layer"]))
    models = [name for name in dict.fromkeys(scores["model"]) if name != "base"]
    colours = {name: MUTED if name == "untrained" else PALETTE[i % 6] for i, name in enumerate(models)}
    fig, axes = new_figure(1, 2, width=TWO_COLUMN, height=3.4)
    left, right = axes[0]
    place = np.arange(len(layers))
    pairs = list(dict.fromkeys(zip(alike["a"], alike["b"], strict=True)))
    for number, (a, b) in enumerate(pairs):
        own = alike[(alike["a"] == a) & (alike["b"] == b)].set_index("layer").reindex(layers)
        twin, x = b.endswith("other seed"), place + 0.06 * (number - (len(pairs) - 1) / 2)
        look: dict[str, Any] = {
            "color": colours[b],
            "marker": "o",
            "linestyle": ":" if b == "untrained" or twin else "-",
        }
        label = f"{b} with the base"
        if a != "base":
            look = {"color": colours[b], "marker": "s", "linestyle": "--"} if twin else {"color": INK, "marker": "D"}
            label = f"{a} with its other seed (ceiling)" if twin else f"{a} with {b}"
        left.fill_between(x, own["low"], own["high"], color=look["color"], alpha=0.15, linewidth=0)
        left.plot(x, own["cka"], label=label, markersize=3, linewidth=1, **look)
    if not any(b.endswith("other seed") for _, b in pairs):
        left.plot([], [], " ", label="no ceiling: one seed per arm")
    floor = alike.groupby("layer", sort=False)["floor"].max().reindex(layers)
    left.fill_between(place, -0.05, floor, color=GRID, label="shuffled frames, 95 %", linewidth=0)
    left.set_ylim(-0.05, 1.05)
    left.set_ylabel("debiased CKA")
    left.set_title("Are they alike?")
    shuffled = float(np.nanmax(scores["shuffled"], initial=0.0))
    low = max(-0.5, 1.1 * min(0.0, float(np.nanmin(scores["score"])))) - 0.05
    for number, name in enumerate(["base", *models]):
        own = scores[scores["model"] == name]
        for kind, aside in (("transferred", -0.04), ("own", 0.04)):
            rows = own[own["readout"] == kind].set_index("layer").reindex(layers)
            if rows["score"].isna().all():
                continue
            x, colour, filled = place + aside + 0.1 * (number - len(models) / 2), colours.get(name, INK), kind != "own"
            value, below = rows["score"].clip(lower=low + 0.02), (rows["score"] < low + 0.02).to_numpy()
            own_label = "base, its own readout" if name == "base" else f"{name}, the base's readout"
            right.vlines(x, rows["low"].clip(lower=low), rows["high"].clip(lower=low), color=colour, linewidth=0.7)
            if filled:
                right.plot(x, value, color=colour, linewidth=0.8, alpha=0.6)
            face = colour if filled else "white"
            right.plot(x[~below], value[~below], "o", color=colour, markersize=3.5, markerfacecolor=face)
            right.plot(x[below], value[below], "v", color=colour, markersize=3.5, markerfacecolor=face)
            if filled:
                right.plot([], [], "o-", color=colour, markersize=3.5, label=own_label)
    right.plot(
        [], [], "o", color=MUTED, markerfacecolor="white", markersize=3.5, label="open: own readout; triangle: below"
    )
    right.axhline(shuffled, color=MUTED, linestyle="--", linewidth=0.8, label="labels of other episodes, 95 %")
    right.axhline(0, color=MUTED, linewidth=0.7)
    right.set_ylim(low, 1.05)
    right.set_ylabel("score on held-out episodes")
    right.set_title(f"Does the base's readout of {scores['target'].iloc[0]} hold?")
    for axis in (left, right):
        axis.set_xticks(place, thinned(layers), rotation=60, ha="right", rotation_mode="anchor")
        axis.legend(fontsize=SMALL, loc="upper center", bbox_to_anchor=(0.5, -0.32), ncols=2)
    return fig
