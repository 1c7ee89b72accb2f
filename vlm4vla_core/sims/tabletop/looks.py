"""How the domains look: camera, table pattern, floor, light and colours.

A, B, C are for training and D is kept for tests. R, S, T are "real": other textures and colours, seen through a worse
camera. U, V, W are for questions about scenes: other tables, colours and viewpoints than any policy sees.

Trap: a look is fixed, camera included, so that table and floor are traced only once; a new look is a new entry,
never a changed one, since stores and results name their looks by letter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vlm4vla_core.sims.tabletop.sensor import REAL_LIKE, Sensor

TABLE = np.array([0.38, 0.37])  # half extents of the table top, which lies at z = 0
TABLE_THICKNESS, FLOOR = 0.04, -0.45  # m
Colours = tuple[tuple[float, float, float], ...]
PALETTE: Colours = (
    (0.86, 0.13, 0.12),
    (0.13, 0.66, 0.22),
    (0.14, 0.30, 0.90),
    (0.96, 0.83, 0.12),
    (0.60, 0.20, 0.76),
    (0.12, 0.80, 0.85),
)  # as world.COLOURS
PASTEL: Colours = (
    (0.93, 0.45, 0.42),
    (0.55, 0.80, 0.50),
    (0.45, 0.58, 0.95),
    (0.98, 0.92, 0.55),
    (0.76, 0.55, 0.88),
    (0.60, 0.92, 0.92),
)
DEEP: Colours = (
    (0.60, 0.05, 0.10),
    (0.05, 0.42, 0.18),
    (0.06, 0.14, 0.58),
    (0.80, 0.62, 0.05),
    (0.38, 0.08, 0.50),
    (0.02, 0.52, 0.58),
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
    """Appearance of one domain: camera, table pattern with its two colours, floor colour, direction to the light, what
    red, green… look like, and the sensor, None for a clean picture."""

    camera: Camera
    pattern: str
    table: tuple[tuple[float, float, float], tuple[float, float, float]]
    floor: tuple[float, float, float]
    light: tuple[float, float, float]
    palette: Colours = PALETTE
    sensor: Sensor | None = None

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
    "R": Look(
        Camera((0.05, -1.22, 1.20), (0.0, 0.125, 0.06), 1.72),
        "speckle", ((0.58, 0.54, 0.50), (0.46, 0.42, 0.39)), (0.33, 0.31, 0.30), (-0.20, -0.35, 1.0), DEEP, REAL_LIKE,
    ),
    "S": Look(
        Camera((-0.10, -1.28, 1.24), (0.024, 0.120, 0.06), 1.78),
        "weave", ((0.80, 0.78, 0.74), (0.66, 0.64, 0.60)), (0.42, 0.38, 0.34), (0.30, -0.40, 1.0), DEEP, REAL_LIKE,
    ),
    "T": Look(
        Camera((0.12, -1.18, 1.26), (-0.030, 0.110, 0.06), 1.70),
        "speckle", ((0.40, 0.33, 0.27), (0.31, 0.25, 0.20)), (0.24, 0.24, 0.26), (0.05, -0.20, 1.0), DEEP, REAL_LIKE,
    ),
    "U": Look(
        Camera((0.45, -1.00, 1.30), (0.0, 0.06, 0.04), 1.60),
        "weave", ((0.92, 0.90, 0.93), (0.80, 0.78, 0.84)), (0.62, 0.58, 0.55), (-0.30, 0.10, 1.0), PASTEL,
    ),
    "V": Look(
        Camera((-0.50, -0.92, 1.36), (0.0, 0.05, 0.04), 1.58),
        "speckle", ((0.36, 0.42, 0.50), (0.28, 0.33, 0.41)), (0.15, 0.16, 0.18), (0.20, -0.50, 1.0), PASTEL,
    ),
    "W": Look(
        Camera((0.0, -0.85, 1.50), (0.0, 0.04, 0.04), 1.62),
        "checks", ((0.90, 0.80, 0.66), (0.72, 0.34, 0.30)), (0.30, 0.22, 0.20), (0.35, -0.10, 1.0), DEEP,
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
    elif look.pattern == "stripes":
        mix = np.mod(np.floor((0.8 * x + 0.6 * y) / 0.09), 2.0)
    elif look.pattern == "checks":
        mix = np.mod(np.floor(x / 0.19), 2.0) * 0.5 + np.mod(np.floor(y / 0.19), 2.0) * 0.5
    elif look.pattern == "weave":
        mix = 0.5 + 0.5 * np.sin(x / 0.006) * np.sin(y / 0.006)
    else:  # speckle: grains of 8 mm, each of its own grey
        grain = np.sin(np.floor(x / 0.008) * 12.9898 + np.floor(y / 0.008) * 78.233) * 43758.5453
        mix = grain - np.floor(grain)
    return light + np.asarray(mix)[..., None] * (dark - light)
