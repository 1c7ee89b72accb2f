"""Figures of what models and episodes can show: power curves and reliability.

Trap: a curve that flattens below 80 % is no lack of episodes but of models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from probes.power import Plan, power_of_r, reliability_of
from probes.style import INK, MARKERS, MUTED, ONE_COLUMN, PALETTE, SMALL, figure_style, new_figure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_EPISODES = np.geomspace(10, 10_000, 61)


def power_figure(found: Plan, *, width: float = ONE_COLUMN) -> Figure:
    """Power over episodes for several numbers of models, and reliability over episodes; the plan is marked.

    width: inches; the panels stand side by side from 5 inches on, above each other below that.
    """
    with figure_style():
        rows, columns = (1, 2) if width >= 5 else (2, 1)
        fig, axes = new_figure(rows, columns, width=width, height=rows * 2.15)
        power_curves(axes.flat[0], found)
        reliability_curve(axes.flat[1], found)
    return fig


def power_curves(ax: Axes, found: Plan, models: Sequence[int] = (6, 9, 20, 50)) -> None:
    """One curve per number of models, named at its end; the plan's own is thick."""
    sizes = sorted({found.models, *models})
    for i, size in enumerate(sizes):
        own = size == found.models
        colour, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
        curve = [power_of_r(_seen(found, n), size, found.alpha) for n in _EPISODES]
        ax.plot(_EPISODES, curve, color=colour, linewidth=2 if own else 1.1, marker=marker, markevery=(5 + 2 * i, 18),
                markersize=3.5, label=f"{size}")  # fmt: skip
    ax.axhline(found.target, color=MUTED, linewidth=0.8, linestyle=":")
    ax.plot(found.episodes, found.power, "o", markersize=7, markerfacecolor="none", markeredgecolor=INK, zorder=5)
    ax.set_ylim(0, 1.03)
    ax.set_ylabel("power")
    _episodes_axis(ax)
    ax.legend(title="models", loc="lower right", ncols=2, fontsize=SMALL, title_fontsize=SMALL, handlelength=2.2,
              frameon=True, framealpha=0.85, edgecolor="none", borderpad=0.2)  # fmt: skip
    ax.set_title(f"To show a true correlation of {found.rho:+g}".replace("-", "−"))


def reliability_curve(ax: Axes, found: Plan) -> None:
    """Reliability over episodes, and the |r| that it allows."""
    share = np.array([reliability_of(found.spread, found.episode_variance, n) for n in _EPISODES])
    ax.plot(_EPISODES, share**0.5, color=PALETTE[1], linestyle="--", label="|r| expected at most")
    ax.plot(_EPISODES, share, color=PALETTE[0], label="reliability")
    for value in (found.reliability, found.ceiling):
        ax.plot(found.episodes, value, "o", markersize=6, markerfacecolor="none", markeredgecolor=INK, zorder=5)
    ax.annotate(f"{found.reliability:.2f}", (found.episodes, found.reliability), xytext=(6, -8),
                textcoords="offset points", fontsize=SMALL)  # fmt: skip
    ax.annotate(f"{found.ceiling:.2f}", (found.episodes, found.ceiling), xytext=(-6, 4), ha="right",
                textcoords="offset points", fontsize=SMALL)  # fmt: skip
    ax.set_ylim(0, 1.03)
    ax.set_ylabel("reliability, |r|")
    _episodes_axis(ax)
    ax.legend(loc="lower right", fontsize=SMALL, frameon=True, framealpha=0.85, edgecolor="none")
    ax.set_title(f"With a true spread of SD {found.spread:.3f}")


def reliability_figure(names: Sequence[str], values: Sequence[float], spans: Sequence[tuple[float, float]],
                       *, width: float = ONE_COLUMN) -> Figure:  # fmt: skip
    """Benchmarks one below the other: reliability with its interval over models, and the |r| it allows (diamond)."""
    with figure_style():
        fig, axes = new_figure(width=width, height=0.75 + 0.3 * len(names))
        ax = axes[0, 0]
        for y, (value, span) in enumerate(zip(values, spans, strict=True)):
            ax.plot(span, [y, y], color=PALETTE[0], linewidth=1.6, solid_capstyle="butt")
            ax.plot(value, y, "o", color=PALETTE[0], label="reliability, 95 %" if y == 0 else None)
            ax.plot(value**0.5, y, "D", markersize=4, color=PALETTE[1], markerfacecolor="white", zorder=5,
                    label="|r| expected at most" if y == 0 else None)  # fmt: skip
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_xlim(0, 1.02)
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
        fig.legend(loc="outside upper left", ncols=2, fontsize=SMALL)
    return fig


def _seen(found: Plan, episodes: float) -> float:
    """The correlation that is left of rho when scores carry the noise of so many episodes."""
    return found.rho * reliability_of(found.spread, found.episode_variance, episodes) ** 0.5


def _episodes_axis(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.set_xlim(_EPISODES[0], _EPISODES[-1])
    ax.set_xticks([10, 100, 1000, 10_000], ["10", "100", "1,000", "10,000"])
    ax.minorticks_off()
    ax.set_xlabel("episodes of each model")
