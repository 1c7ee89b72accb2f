"""How the domains look: camera, table pattern, floor and light of A, B, C (training) and D (kept for tests).

Trap: a look is fixed, camera included, so that table and floor are traced only once; a new look is a new entry,
never a changed one, since stores and results name their looks by letter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

TABLE = np.array([0.38, 0.37])  # half extents of the table top, which lies at z = 0
TABLE_THICKNESS, FLOOR = 0.04, -0.45  # m
Colours = tuple[tuple[float, float, float], ...]
PALETTE: Colours = (
    (0.86, 0.13, 0.12), (0.13, 0.66, 0.22), (0.14, 0.30, 0.90), (0.96, 0.83, 0.12), (0.60, 0.20, 0.76), (0.12, 0.80, 0.85),
)  # as world.COLOURS
PASTEL: Colours = (
    (0.93, 0.45, 0.42), (0.55, 0.80, 0.50), (0.45, 0.58, 0.95), (0.98, 0.92, 0.55), (0.76, 0.55, 0.88), (0.60, 0.92, 0.92),
)
DEEP: Colours = (
    (0.60, 0.05, 0.10), (0.05, 0.42, 0.18), (0.06, 0.14, 0.58), (0.80, 0.62, 0.05), (0.38, 0.08, 0.50), (0.02, 0.52, 0.58),
)


@dataclass(frozen=True)
class Camera:
    """Pinhole camera, square picture. position, target: m; focal: focal length in picture widths."""

    position: tuple[float, float, float]
    target: tuple[float, float, float]
    focal: float

    @cached_property
    def axes(self) -> np.ndarray:
        """(3, 3) unit vectors right, down, forward."""
        forward = np.subtract(self.target, self.position)
        forward = forward / np.sqrt((forward**2).sum())
        right = np.array([forward[1], -forward[0], 0.0])
        right = right / np.sqrt((right**2).sum())
        return np.stack([right, np.cross(forward, right), forward])

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Picture coordinates (..., 2) in [0, 1] (right, down) and depth (...) along the axis, of points (..., 3)."""
        local = (points - np.array(self.position)) @ self.axes.T
        return 0.5 + self.focal * local[..., :2] / local[..., 2:], local[..., 2]

    def rays(self, size: int) -> np.ndarray:
        """(size * size, 3) directions through the pixel centres, scaled so that their length counts depth."""
        centres = ((np.arange(size) + 0.5) / size - 0.5) / self.focal
        right, down, forward = self.axes
        return (forward + centres[:, None, None] * down + centres[None, :, None] * right).reshape(-1, 3)

    def to_dict(self) -> dict[str, Any]:
        return {"position_m": list(self.position), "target_m": list(self.target), "focal_in_widths": self.focal}


@dataclass(frozen=True)
class Look:
    """Appearance of one domain: camera, table pattern with its two colours, floor colour, direction to the light, and
    what red, green… look like."""

    camera: Camera
    pattern: str
    table: tuple[tuple[float, float, float], tuple[float, float, float]]
    floor: tuple[float, float, float]
    light: tuple[float, float, float]
    palette: Colours = PALETTE

    def towards_light(self) -> np.ndarray:
        """(3,) unit vector."""
        light = np.array(self.light)
        return light / np.sqrt((light**2).sum())


LOOKS = {
    "A": Look(
        Camera((0.0, -1.26, 1.22), (0.0, 0.137, 0.06), 1.74),
        "planks", ((0.76, 0.56, 0.38), (0.68, 0.48, 0.31)), (0.27, 0.28, 0.33), (-0.35, -0.30, 1.0),
    ),
    "B": Look(
        Camera((-0.16, -1.15, 1.24), (0.049, 0.095, 0.06), 1.68),
        "tiles", ((0.62, 0.66, 0.70), (0.55, 0.59, 0.64)), (0.38, 0.29, 0.25), (0.40, -0.25, 1.0),
    ),
    "C": Look(
        Camera((0.17, -1.35, 1.18), (-0.047, 0.126, 0.06), 1.84),
        "diamonds", ((0.86, 0.82, 0.72), (0.77, 0.72, 0.62)), (0.20, 0.27, 0.34), (-0.10, -0.45, 1.0),
    ),
    "D": Look(
        Camera((0.24, -1.04, 1.32), (-0.054, 0.069, 0.06), 1.63),
        "stripes", ((0.50, 0.62, 0.56), (0.40, 0.52, 0.47)), (0.46, 0.43, 0.38), (0.30, 0.20, 1.0),
    ),
}  # fmt: skip


def pattern(look: Look, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Table colour (..., 3) at points (x, y) m of the table top."""
    light, dark = np.array(look.table[0]), np.array(look.table[1])
    if look.pattern == "planks":
        plank = np.floor(x / 0.094 + 0.5)
        mix = np.mod(plank * 0.618, 1.0)  # neighbouring planks differ
        mix = mix + 0.15 * np.sin(60 * x + 3 * np.sin(5 * y + plank))
        seam = np.abs(x / 0.094 + 0.5 - plank - 0.5) > 0.48
        mix = np.where(seam, 2.2, mix)
    elif look.pattern == "tiles":
        mix = np.mod(np.floor(x / 0.12) + np.floor(y / 0.12), 2.0)
        u, v = np.mod(x / 0.12, 1.0), np.mod(y / 0.12, 1.0)
        mix = np.where((np.minimum(u, v) < 0.03) | (np.maximum(u, v) > 0.97), 1.9, mix)
    elif look.pattern == "diamonds":
        mix = np.mod(np.floor((x + y) / 0.17) + np.floor((x - y) / 0.17), 2.0)
    else:  # stripes
        mix = np.mod(np.floor((0.8 * x + 0.6 * y) / 0.09), 2.0)
    return light + np.asarray(mix)[..., None] * (dark - light)
