"""Names beside points that run into nothing: a small deterministic search, no dependency.

Every name may stand in rings of places around its point; names are moved one at a time to the cheapest place until
nothing moves. Trap: places are in points of the drawn page, so the layout must be final: draw once, switch the layout
engine off, then call this last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ANGLES = np.deg2rad(np.arange(0, 360, 15))
_RADII = (4.0, 8.0, 13.0, 19.0, 26.0, 34.0)  # points between a point and the nearest edge of its name
_LEADER = 7.0  # beyond this a thin line leads back to the point
# What a square point of overlap costs, against a point of distance: other points, spans and lines, other names.
_POINT, _LINE, _NAME, _EDGE, _FAR, _CROSSED = 8.0, 3.5, 30.0, 40.0, 0.9, 60.0


def place_labels(
    ax: Axes,
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    colours: Sequence[str],
    spans: Sequence[tuple[float, float] | None] = (),
    lines: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    *,
    size: float = 6.2,
) -> None:
    """Write each name beside its (x, y), in data units, clear of points, vertical spans (low, high), lines and edges.

    size: font size in points. Adds annotations to the axes.
    """
    from matplotlib.patheffects import withStroke

    unit = ax.figure.dpi / 72  # pixels per point
    where = ax.transData.transform(np.asarray(points, dtype=float)) / unit  # (n, 2)
    blocked, weights = _obstacles(ax, where, points, spans, lines, unit)
    left, bottom, width, height = np.array(ax.get_window_extent().bounds) / unit
    frame = np.array([left, bottom, left + width, bottom + height])
    boxes = [_ring(point, _extent(ax, name, size, unit)) for point, name in zip(where, names, strict=True)]
    for i, chosen in enumerate(_choose(where, boxes, blocked, weights, frame)):
        box = boxes[i][chosen]
        centre = (box[:2] + box[2:]) / 2
        far = chosen // len(_ANGLES) >= np.searchsorted(_RADII, _LEADER)
        label = ax.annotate(
            names[i], points[i], xytext=tuple(centre - where[i]), textcoords="offset points", ha="center", va="center",
            fontsize=size, color=colours[i], zorder=6, annotation_clip=False,
            path_effects=[withStroke(linewidth=1.6, foreground="white", alpha=0.85)],
            arrowprops=dict(arrowstyle="-", color=colours[i], lw=0.5, shrinkA=1, shrinkB=2.5) if far else None,  # noqa: C408
        )  # fmt: skip
        label.set_in_layout(False)


def _choose(
    where: np.ndarray, boxes: list[np.ndarray], blocked: np.ndarray, weights: np.ndarray, frame: np.ndarray
) -> list[int]:
    """The place of each name: start at what is cheapest alone, then improve in turns, the crowded ones first."""
    reach = np.repeat(_RADII, len(_ANGLES))
    alone = [_overlap(box, blocked) @ weights + _EDGE * _outside(box, frame) + _FAR * reach for box in boxes]
    for i, box in enumerate(boxes):  # a leader through another point would name that one
        alone[i] = alone[i] + _CROSSED * (_distance(where[i], _middle(box), np.delete(where, i, axis=0)) < 4).sum(
            axis=1
        )
    gaps = np.sort(np.linalg.norm(where[:, None] - where[None], axis=-1), axis=1)
    order = np.argsort(gaps[:, 1:4].sum(axis=1), kind="stable")
    chosen = [int(np.argmin(cost)) for cost in alone]
    for _ in range(20):
        before = list(chosen)
        for i in order:
            rest = [j for j in range(len(boxes)) if j != i]
            theirs = np.array([boxes[j][chosen[j]] for j in rest]).reshape(-1, 4)
            cost = alone[i] + _NAME * _overlap(boxes[i], theirs).sum(axis=1)
            # Leaders: theirs through this name, this one's through their names, and the two through each other.
            mine, ends = _middle(boxes[i]), _middle(theirs)
            start = np.broadcast_to(where[i], mine.shape)
            cost = cost + _CROSSED * _crossings(start, mine, where[rest], ends).sum(axis=1)
            for low, high in ((0, 2), (2, 0)):  # a line meets a box when it meets one of the box's diagonals
                corner, opposite = theirs[:, [low, 1]], theirs[:, [high, 3]]
                cost = cost + _CROSSED * _crossings(start, mine, corner, opposite).sum(axis=1)
                corner, opposite = boxes[i][:, [low, 1]], boxes[i][:, [high, 3]]
                cost = cost + _CROSSED * _crossings(corner, opposite, where[rest], ends).sum(axis=1)
            chosen[i] = int(np.argmin(cost))
        if chosen == before:
            break
    return chosen


def _obstacles(
    ax: Axes,
    where: np.ndarray,
    points: Sequence[tuple[float, float]],
    spans: Sequence[tuple[float, float] | None],
    lines: Sequence[tuple[np.ndarray, np.ndarray]],
    unit: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (k, 4) that names keep off, and what a square point of each costs (k,)."""
    markers = np.column_stack([where - 2.8, where + 2.8])
    thin = [np.empty((0, 4))]
    for (x, _), span in zip(points, spans, strict=False):
        if span is not None:
            low, high = ax.transData.transform([(x, span[0]), (x, span[1])]) / unit
            thin.append(np.array([[low[0] - 0.8, low[1], high[0] + 0.8, high[1]]]))
    for xs, ys in lines:
        path = ax.transData.transform(np.column_stack([xs, ys])) / unit
        thin.append(np.column_stack([path - 0.8, path + 0.8]))  # a row of small boxes
    rest = np.concatenate(thin)
    return np.concatenate([markers, rest]), np.concatenate([np.full(len(markers), _POINT), np.full(len(rest), _LINE)])


def _extent(ax: Axes, name: str, size: float, unit: float) -> tuple[float, float]:
    probe = ax.text(0, 0, name, fontsize=size)
    bounds = probe.get_window_extent()
    probe.remove()
    return bounds.width / unit, bounds.height / unit


def _ring(point: np.ndarray, extent: tuple[float, float]) -> np.ndarray:
    """Boxes (radii x angles, 4) around a point; the direction is stretched so that the box clears the circle."""
    width, height = extent
    radius, angle = (grid.ravel() for grid in np.meshgrid(_RADII, _ANGLES, indexing="ij"))
    x = point[0] + np.cos(angle) * (radius + width / 2)
    y = point[1] + np.sin(angle) * (radius + height / 2)
    return np.column_stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2])


def _middle(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Shared area of every box with every other, (m, k), in square points."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.clip(high - low, 0, None).prod(axis=-1)


def _outside(boxes: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """How far each box reaches over the frame, in points, (m,)."""
    return np.clip(frame[:2] - boxes[:, :2], 0, None).sum(1) + np.clip(boxes[:, 2:] - frame[2:], 0, None).sum(1)


def _distance(start: np.ndarray, ends: np.ndarray, points: np.ndarray) -> np.ndarray:
    """How far points (k, 2) are from the segments between `start` (2,) and `ends` (m, 2): (m, k)."""
    along = ends - start  # (m, 2)
    share = np.clip(((points[None] - start) * along[:, None]).sum(-1) / (along**2).sum(-1)[:, None], 0, 1)
    return np.linalg.norm(start + share[..., None] * along[:, None] - points[None], axis=-1)


def _crossings(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Whether segment a-b (m, 2) properly crosses segment c-d (k, 2), (m, k)."""

    def side(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> np.ndarray:
        return np.sign(
            (q[..., 0] - p[..., 0]) * (r[..., 1] - p[..., 1]) - (q[..., 1] - p[..., 1]) * (r[..., 0] - p[..., 0])
        )

    a, b, c, d = a[:, None], b[:, None], c[None], d[None]
    return (side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0)
