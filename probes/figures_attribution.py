"""Figures of attributions and of features: contact sheets over an episode, faithfulness curves, the weights check.

Scores are drawn over the grey frame in orange (raised the target) and purple (lowered it), apart for all colour
vision. Trap: one scale for the whole sheet, or a frame where nothing matters looks like one where much does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from probes.style import MUTED, PALETTE, SMALL, TWO_COLUMN, figure_style, new_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probes.attribution import Faithfulness

CMAP = "PuOr_r"
ACROSS = 4  # pictures of a sheet side by side


def overlay(frame: np.ndarray, scores: np.ndarray, reach: float) -> np.ndarray:
    """uint8 (H, W, 3): the frame in grey under scores (h, w); |score| = reach has the full colour."""
    import matplotlib as mpl

    size = frame.shape[:2]
    rows, columns = (np.minimum(np.arange(n) * m // n, m - 1) for n, m in zip(size, scores.shape, strict=True))
    level = np.clip(scores[np.ix_(rows, columns)] / (reach or 1.0), -1, 1)
    colour = mpl.colormaps[CMAP](0.5 + level / 2)[..., :3]
    grey = np.repeat((frame @ np.array([0.299, 0.587, 0.114]) / 255)[..., None], 3, axis=-1)
    strength = 0.8 * np.sqrt(np.abs(level))[..., None]
    return np.round(255 * ((1 - strength) * grey + strength * colour)).astype(np.uint8)


def reach_of(maps: Sequence[np.ndarray]) -> float:
    """The score that is drawn in full colour: the 99th percentile of all |scores|."""
    return float(np.quantile(np.abs(np.concatenate([value.ravel() for value in maps])), 0.99))


@figure_style()
def contact_sheet(
    frames: np.ndarray, maps: Sequence[np.ndarray], captions: Sequence[str], *, title: str, unit: str
) -> Figure:
    """Frames uint8 (n, H, W, 3) above the same frames under their scores, four side by side, with one colour scale."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    reach = reach_of(maps)
    below = [overlay(frame, scores, reach) for frame, scores in zip(frames, maps, strict=True)]
    fig = pair_sheet(frames, below, captions, title=title)
    bar = fig.colorbar(
        ScalarMappable(Normalize(-reach, reach), CMAP), ax=fig.axes, orientation="horizontal", shrink=0.5, aspect=40,
        pad=0.02, ticks=MaxNLocator(5),
    )  # fmt: skip
    bar.set_label(f"score of a place ({unit}); orange raised it, purple lowered it")
    bar.outline.set_visible(False)
    return fig


@figure_style()
def pair_sheet(
    frames: np.ndarray, below: Sequence[np.ndarray] | np.ndarray, captions: Sequence[str], *, title: str
) -> Figure:
    """Frames (n, H, W, 3), each above a second picture of any size, four side by side."""
    across = min(ACROSS, len(frames))
    fig, axes = _sheet(2 * -(-len(frames) // across), across, title)
    for place, (frame, second, caption) in enumerate(zip(frames, below, captions, strict=True)):
        row, column = divmod(place, across)
        axes[2 * row, column].imshow(frame)
        axes[2 * row, column].set_title(caption, fontsize=SMALL, fontweight="normal")
        axes[2 * row + 1, column].imshow(second, interpolation="nearest")
    return fig


@figure_style()
def neighbour_sheet(
    frames: np.ndarray, near: np.ndarray, captions: Sequence[str], near_captions: Sequence[str], *, title: str
) -> Figure:
    """Each frame (q, H, W, 3) at the left of its neighbours (q, k, H, W, 3), the most alike first."""
    fig, axes = _sheet(len(frames), 1 + near.shape[1], title)
    labels = iter(near_captions)
    for line, frame, row, caption in zip(axes, frames, near, captions, strict=True):
        for axis, picture in zip(line, [frame, *row], strict=True):
            axis.imshow(picture)
            first = axis is line[0]
            axis.set_title(caption if first else next(labels), fontsize=SMALL, fontweight="bold" if first else "normal")
    return fig


@figure_style()
def points_sheet(
    frames: np.ndarray, true: np.ndarray, told: np.ndarray, captions: Sequence[str], *, title: str
) -> Figure:
    """Frames (n, H, W, 3) with two points each, (n, 2) in [0, 1] right and down, joined by a line."""
    across, size = min(ACROSS, len(frames)), np.array(frames.shape[2:0:-1])
    fig, axes = _sheet(-(-len(frames) // across), across, title)
    for axis, frame, a, b, caption in zip(
        axes.flat, frames, true * size - 0.5, told * size - 0.5, captions, strict=False
    ):
        axis.imshow(frame)
        axis.plot(*np.stack([a, b], axis=1), color="white", linewidth=1)
        axis.plot(*a, "o", color=PALETTE[5], markeredgecolor="white", label="recorded")
        axis.plot(*b, "X", color=PALETTE[1], markeredgecolor="white", label="read out of the features")
        axis.set(xlim=(-0.5, size[0] - 0.5), ylim=(size[1] - 0.5, -0.5))
        axis.set_title(caption, fontsize=SMALL, fontweight="normal")
    fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


def _sheet(rows: int, columns: int, title: str) -> tuple[Figure, np.ndarray]:
    cell = TWO_COLUMN / max(columns, ACROSS)
    fig, axes = new_figure(rows, columns, width=TWO_COLUMN, height=rows * (cell + 0.08) + 0.9)
    for axis in axes.flat:
        axis.set_axis_off()
    fig.suptitle(title, x=0.01, ha="left", fontsize=8.5, fontweight="bold")
    return fig, axes


@figure_style()
def faithfulness_figure(curves: Sequence[Faithfulness], *, unit: str) -> Figure:
    """Deletion and insertion, means over pictures, over the 95 % range of random orders."""
    fig, axes = new_figure(1, 2, width=TWO_COLUMN, height=2.4, sharey=True)
    hidden = curves[0].hidden
    random = np.mean([curve.random for curve in curves], axis=0)  # (r, k)
    low, high = np.quantile(random, [0.025, 0.975], axis=0)
    sides = (("deletion", "share of places hidden", hidden), ("insertion", "share of places shown", 1 - hidden))
    for axis, (name, label, share) in zip(axes[0], sides, strict=True):
        axis.fill_between(share, low, high, color=MUTED, alpha=0.25, linewidth=0, label="random orders, 95 %")
        axis.plot(share, random.mean(0), color=MUTED, linestyle="--", label="random orders, mean")
        mean = np.mean([getattr(curve, name) for curve in curves], axis=0)
        axis.plot(share, mean, color=PALETTE[0], marker="o", label=name)
        axis.set_title(name.capitalize())
        axis.set_xlabel(label)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, [*labels[:2], "best-scored first"], loc="outside upper right", ncols=3)
    axes[0, 0].set_ylabel(f"distance from baseline\n({unit})")
    return fig


@figure_style()
def sanity_figure(rows: pd.DataFrame) -> Figure:
    """Rank correlation of maps before and after weights were drawn anew, from the head down to the vision tower."""
    fig, axes = new_figure(height=2.3)
    axis, place = axes[0, 0], np.arange(len(rows))
    noise = 2 / np.sqrt(max(1, rows["places"].iloc[0] - 1))  # as of one picture: frames of an episode are much alike
    axis.axhspan(-noise, noise, color=MUTED, alpha=0.2, linewidth=0, label="±2 sd of unrelated maps")
    for column, colour, marker in (("signed", PALETTE[0], "o"), ("absolute", PALETTE[1], "s")):
        axis.plot(place, rows[column], marker=marker, color=colour, label=column)
    axis.set_xticks(place, [("" if i == 0 else "+ ") + name for i, name in enumerate(rows["randomised"])])
    axis.set_ylim(-1.05, 1.4)
    axis.set_ylabel("rank correlation with\nthe trained policy's maps")
    axis.set_xlabel("weights drawn anew")
    axis.legend(ncols=2, loc="upper left")
    return fig
