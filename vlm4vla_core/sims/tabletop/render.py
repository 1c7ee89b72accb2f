"""Ray caster of the tabletop world: RGB, metric depth and segmentation of many worlds at once, on the CPU.

Table and floor are seen by a fixed camera per look, so they are traced once (float64) and kept; every frame then only
adds what moves: plate and blob shadows on the table, and balls, boxes and cylinders with a depth buffer, each traced
only inside the window of pixels that its bounding box projects to.

Trap: a pixel's value must not depend on the batch. Hence elementwise arithmetic only (no matrix products, no
transcendental functions) on whatever pixels happen to be grouped together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.sims.tabletop.looks import FLOOR, LOOKS, TABLE, TABLE_THICKNESS, pattern
from vlm4vla_core.sims.tabletop.world import HALF_EXTENTS, PLATE_RADIUS, SLOTS, State

if TYPE_CHECKING:
    import torch

    Axes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

BACKGROUND, TABLETOP, PLATE, GRIPPER, OBJECTS = 0, 1, 2, 3, 4  # segmentation; slot k is OBJECTS + k
PALETTE = np.array(
    [
        [0.86, 0.13, 0.12],
        [0.13, 0.66, 0.22],
        [0.14, 0.30, 0.90],
        [0.96, 0.83, 0.12],
        [0.60, 0.20, 0.76],
        [0.12, 0.80, 0.85],
    ]
)  # as world.COLOURS
_PLATE_RIM = 0.82  # fraction of the plate's radius where its darker rim begins
_AMBIENT, _DIFFUSE = 0.56, 0.50
_CHUNK = 16  # frames traced together: small enough for the processor's cache
_FINGER, _PALM, _WRIST = (0.96, 0.50, 0.10), (0.15, 0.15, 0.17), (0.88, 0.89, 0.93)


@dataclass(frozen=True)
class Picture:
    """rgb: (n, H, W, 3) uint8. depth: (n, H, W) float32, m along the camera's axis; segmentation: (n, H, W) uint8.

    The last two only when asked for.
    """

    rgb: np.ndarray
    depth: np.ndarray | None = None
    segmentation: np.ndarray | None = None


def render(state: State, domains: Sequence[str], size: int, *, samples: int = 2, geometry: bool = False) -> Picture:
    """Pictures of n worlds by the fixed camera of each world's domain.

    samples: rays per pixel along each side, averaged. geometry: also depth and segmentation (one ray through the
    pixel centre). Raises InputError on an unknown domain.
    """
    import torch

    for name in domains:
        if name not in LOOKS:
            raise InputError(f"the tabletop world has no domain '{name}'", fix=nearest(name, LOOKS))
    rgb = np.empty((len(state), size, size, 3), np.uint8)
    depth = np.empty((len(state), size, size), np.float32) if geometry else None
    segmentation = np.empty((len(state), size, size), np.uint8) if geometry else None
    # The pieces are too small to share: waiting for a second thread costs more than it brings, on a busy machine 9x.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for start in range(0, len(state), _CHUNK):
            part = slice(start, start + _CHUNK)
            colour, _, _ = trace(state[part], domains[part], size * samples)
            fine = colour.view(-1, size, samples, size, samples, 3)
            mean = fine[:, :, 0, :, 0]
            for i, j in [(i, j) for i in range(samples) for j in range(samples)][1:]:
                mean = mean + fine[:, :, i, :, j]
            rgb[part] = (mean * (255 / samples**2) + 0.5).clamp(0, 255).to(torch.uint8).numpy()
            if depth is not None and segmentation is not None:
                _, far, label = trace(state[part], domains[part], size)
                depth[part], segmentation[part] = far.numpy(), label.numpy()
    finally:
        torch.set_num_threads(threads)
    return Picture(rgb, depth, segmentation)


def trace(state: State, domains: Sequence[str], size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One ray per pixel: colour (n, S, S, 3) float32 in [0, 1], depth (n, S, S) float32, label (n, S, S) uint8."""
    import torch

    names = sorted(set(domains))
    backdrops = [_backdrop(name, size) for name in names]
    which = torch.tensor([names.index(name) for name in domains])  # (n,)
    rays = torch.cat([item.rays for item in backdrops])  # (looks * P, 3)
    colour = torch.stack([item.colour for item in backdrops])[which].reshape(-1, 3)  # (n * P, 3)
    depth = torch.stack([item.depth for item in backdrops])[which].reshape(-1)
    label = torch.stack([item.label for item in backdrops])[which].reshape(-1)
    light = torch.tensor(np.stack([LOOKS[name].towards_light() for name in domains]), dtype=torch.float32)
    ground = torch.cat([item.ground for item in backdrops])  # (looks * P, 2)

    for decal in _decals(state, domains):
        _paint(decal, domains, size, which, ground, colour, label)
    for solid in _solids(state):
        _cast(solid, domains, size, which, rays, light, colour, depth, label)
    shape = (len(state), size, size)
    return colour.view(*shape, 3), depth.view(shape), label.view(shape)


# --- what is always there -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Backdrop:
    rays: torch.Tensor  # (P, 3)
    colour: torch.Tensor  # (P, 3)
    depth: torch.Tensor  # (P,)
    label: torch.Tensor  # (P,) uint8
    ground: torch.Tensor  # (P, 2) where the ray meets the table top, far away where it does not


@lru_cache(maxsize=64)
def _backdrop(name: str, size: int) -> _Backdrop:
    """Table and floor of one look, traced in float64."""
    import torch

    look = LOOKS[name]
    origin, rays, light = np.array(look.camera.position), look.camera.rays(size), look.towards_light()
    middle = np.array([0.0, 0.0, -TABLE_THICKNESS / 2])
    half = np.array([*TABLE, TABLE_THICKNESS / 2])
    with np.errstate(divide="ignore", invalid="ignore"):
        near, far = ((s * half - (origin - middle)) / rays for s in (-1.0, 1.0))
        entry = np.minimum(near, far)
        t_table, t_exit = entry.max(1), np.maximum(near, far).min(1)
        t_floor = np.where(rays[:, 2] < 0, (FLOOR - origin[2]) / rays[:, 2], np.inf)
    axis = entry.argmax(1)
    hit = t_table < t_exit
    point = origin + t_table[:, None] * rays
    on_top = hit & (axis == 2)
    normal = -np.sign(rays[np.arange(len(rays)), axis]) * light[axis]  # the cosine to the light
    shade = _AMBIENT + _DIFFUSE * np.maximum(normal, 0.0)
    wood = np.where(on_top[:, None], pattern(look, point[:, 0], point[:, 1]), np.array(look.table[1]) * 0.8)
    haze = 1.0 / (1.0 + 0.08 * np.minimum(t_floor, 50.0) ** 2)
    colour = np.where(hit[:, None], wood * shade[:, None], np.array(look.floor) * (0.6 + 0.6 * haze)[:, None])
    depth = np.where(hit, t_table, np.minimum(t_floor, 50.0))
    ground = np.where(on_top[:, None], point[:, :2], 1e3)
    return _Backdrop(
        rays=torch.tensor(rays, dtype=torch.float32),
        colour=torch.tensor(np.minimum(colour, 1.0), dtype=torch.float32),
        depth=torch.tensor(depth, dtype=torch.float32),
        label=torch.tensor(np.where(hit, TABLETOP, BACKGROUND), dtype=torch.uint8),
        ground=torch.tensor(ground, dtype=torch.float32),
    )


# --- plate and shadows ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Decal:
    """One disc on the table per row: a plate (colour) or a soft shadow (colour None)."""

    rows: np.ndarray  # (r,) worlds
    centre: np.ndarray  # (r, 2)
    radius: np.ndarray  # (r,)
    colour: np.ndarray | None = None  # (r, 3)
    strength: np.ndarray | None = None  # (r,) darkness of a shadow's core


def _decals(state: State, domains: Sequence[str]) -> Iterator[_Decal]:
    rows = np.flatnonzero(state.plate_colour >= 0)
    if len(rows):
        colour = PALETTE[state.plate_colour[rows]]
        yield _Decal(rows, state.plate[rows], np.full(len(rows), PLATE_RADIUS), colour=colour)
    light = np.stack([LOOKS[name].towards_light() for name in domains])
    slope = -light[:, :2] / light[:, 2:]  # shadows move by this per metre of height
    everyone = np.arange(len(state))
    casters = [(everyone, state.gripper + np.array([0.0, 0.0, 0.05]), 0.065)]
    for slot in range(SLOTS):
        rows = np.flatnonzero(state.kind[:, slot] >= 0)
        casters.append((rows, state.objects[rows, slot], 0.060))
    for rows, point, radius in casters:
        if len(rows):
            height = point[:, 2]
            centre = point[:, :2] + slope[rows] * height[:, None]
            yield _Decal(rows, centre, radius * (1 + 0.5 * height), strength=0.55 / (1 + 2.0 * height))


def _paint(
    decal: _Decal,
    domains: Sequence[str],
    size: int,
    which: torch.Tensor,
    ground: torch.Tensor,
    colour: torch.Tensor,
    label: torch.Tensor,
) -> None:
    import torch

    half = np.stack([decal.radius, decal.radius, np.zeros(len(decal.rows))], 1)
    corners = np.concatenate([decal.centre, np.zeros((len(decal.rows), 1))], 1)[:, None] + _CORNERS * half[:, None]
    item, pixel = _windows(corners, decal.rows, domains, size)  # (r, w), (r, w)
    rows = torch.from_numpy(decal.rows)[:, None]
    x, y = ground[which[rows] * size**2 + pixel].unbind(-1)
    middle = torch.tensor(decal.centre, dtype=torch.float32)
    radius = torch.tensor(decal.radius, dtype=torch.float32)[:, None]
    dx, dy = x - middle[:, :1], y - middle[:, 1:]
    inside = 1.0 - (dx * dx + dy * dy) / (radius * radius)  # 1 in the middle, 0 at the edge
    hit = inside > 0
    where = (rows * size**2 + pixel)[hit]
    if decal.colour is not None:
        rim = torch.where(inside[hit] < 1 - _PLATE_RIM**2, 0.68, 0.95)
        colour[where] = torch.tensor(decal.colour, dtype=torch.float32)[item[hit]] * rim[:, None]
        label[where] = PLATE
    else:
        strength = torch.tensor(decal.strength, dtype=torch.float32)[item[hit]]
        colour[where] *= (1.0 - strength * (1.7 * inside[hit]).clamp(max=1.0))[:, None]


# --- solids -----------------------------------------------------------------------------------------------------

_CORNERS = np.array([[i, j, k] for i in (-1.0, 1.0) for j in (-1.0, 1.0) for k in (-1.0, 1.0)])  # (8, 3)


@dataclass(frozen=True)
class _Solids:
    """Solids of one kind, at most one per world, so that no two of them write the same pixel."""

    kind: int  # index into world.KINDS
    rows: np.ndarray  # (r,) worlds
    centre: np.ndarray  # (r, 3)
    half: np.ndarray  # (r, 3)
    yaw: np.ndarray  # (r,)
    colour: np.ndarray  # (r, 3)
    label: int


def _solids(state: State) -> Iterator[_Solids]:
    """Everything that moves: objects, then fingers, palm and wrist."""
    for slot in range(SLOTS):
        for kind in range(len(HALF_EXTENTS)):
            rows = np.flatnonzero(state.kind[:, slot] == kind)
            if len(rows):
                half = np.broadcast_to(HALF_EXTENTS[kind], (len(rows), 3))
                colour = PALETTE[state.colour[rows, slot]]
                yaw = state.object_yaw[rows, slot]
                yield _Solids(kind, rows, state.objects[rows, slot], half, yaw, colour, OBJECTS + slot)
    rows = np.arange(len(state))
    sideways = np.stack([np.cos(state.yaw), np.sin(state.yaw), np.zeros(len(rows))], 1)
    spread = np.where(state.open, 0.066, np.where(state.held >= 0, 0.053, 0.010))[:, None]
    up = np.array([0.0, 0.0, 1.0])
    parts = [
        (state.gripper + 0.030 * up - spread * sideways, (0.010, 0.016, 0.042), _FINGER),
        (state.gripper + 0.030 * up + spread * sideways, (0.010, 0.016, 0.042), _FINGER),
        (state.gripper + 0.085 * up, (0.084, 0.026, 0.013), _PALM),
        (state.gripper + 0.126 * up, (0.032, 0.032, 0.028), _WRIST),
    ]
    for centre, size, paint in parts:
        half, colour = np.broadcast_to(size, (len(rows), 3)), np.broadcast_to(paint, (len(rows), 3))
        yield _Solids(0, rows, centre, half, state.yaw, colour, GRIPPER)


def _cast(
    solid: _Solids,
    domains: Sequence[str],
    size: int,
    which: torch.Tensor,
    rays: torch.Tensor,
    light: torch.Tensor,
    colour: torch.Tensor,
    depth: torch.Tensor,
    label: torch.Tensor,
) -> None:
    """Trace one solid per world within its window and write the pixels where it is the nearest so far."""
    import torch

    turn = np.stack([np.cos(solid.yaw), np.sin(solid.yaw)], 1)  # (r, 2)
    local = _CORNERS * solid.half[:, None]
    turned = np.stack(
        [
            local[..., 0] * turn[:, :1] - local[..., 1] * turn[:, 1:],
            local[..., 0] * turn[:, 1:] + local[..., 1] * turn[:, :1],
            local[..., 2],
        ],
        -1,
    )
    item, pixel = _windows(solid.centre[:, None] + turned, solid.rows, domains, size)
    rows = torch.from_numpy(solid.rows)[:, None]
    dx, dy, dz = rays[which[rows] * size**2 + pixel].unbind(-1)  # (r, w) each
    origin = np.stack([LOOKS[domains[row]].camera.position for row in solid.rows]) - solid.centre
    ox, oy, oz = (torch.tensor(value, dtype=torch.float32)[:, None] for value in origin.T)
    hx, hy, hz = (torch.tensor(value, dtype=torch.float32)[:, None] for value in solid.half.T)
    cos, sin = (torch.tensor(value, dtype=torch.float32)[:, None] for value in turn.T)
    where = rows * size**2 + pixel
    if solid.kind != 1:  # into the solid's own frame
        ox, oy = ox * cos + oy * sin, oy * cos - ox * sin
        dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
    t, hit = _HIT[solid.kind]((ox, oy, oz), (dx, dy, dz), (hx, hy, hz))
    hit &= t < depth[where]
    item, t, where = item[hit], t[hit], where[hit]
    if not len(item):
        return
    # The normal, from the point on the surface in the solid's own frame.
    px, py, pz = (o[item, 0] + t * d[hit] for o, d in ((ox, dx), (oy, dy), (oz, dz)))
    hx, hy, hz = hx[item, 0], hy[item, 0], hz[item, 0]
    if solid.kind == 1:
        nx, ny, nz = px / hx, py / hx, pz / hx
    else:
        if solid.kind == 0:
            ax, ay, az = px.abs() / hx, py.abs() / hy, pz.abs() / hz
            top, side = (az >= ax) & (az >= ay), ax >= ay
            nx, ny = px.sign() * side, py.sign() * ~side
        else:
            top = pz.abs() / hz >= (px * px + py * py) / (hx * hx)
            nx, ny = px / hx, py / hx
        nx, ny, nz = nx * ~top, ny * ~top, pz.sign() * top
        cos, sin = cos[item, 0], sin[item, 0]
        nx, ny = nx * cos - ny * sin, nx * sin + ny * cos
    lx, ly, lz = light[rows[item, 0]].unbind(-1)
    shade = _AMBIENT + _DIFFUSE * (nx * lx + ny * ly + nz * lz).clamp(min=0.0)
    paint = torch.tensor(solid.colour, dtype=torch.float32)[item]
    colour[where] = (paint * shade[:, None]).clamp(max=1.0)
    depth[where] = t
    label[where] = solid.label


def _windows(
    corners: np.ndarray, rows: np.ndarray, domains: Sequence[str], size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels that a shape with these corners (r, 8, 3) can cover: item (r, w) = 0..r-1 and pixel (r, w) indices.

    All windows of a call have one size, the largest needed; extra pixels are traced and missed.
    """
    import torch

    low, high = np.empty((len(rows), 2)), np.empty((len(rows), 2))
    for name in set(domains):
        mine = np.array([domains[row] == name for row in rows])
        if mine.any():
            spot, _ = LOOKS[name].camera.project(corners[mine])
            low[mine], high[mine] = spot.min(1) * size, spot.max(1) * size
    first = np.clip(np.floor(low - 0.5), 0, size - 1).astype(int)
    last = np.clip(np.ceil(high - 0.5), 0, size - 1).astype(int)
    width, height = (last - first).max(0) + 1
    first = np.minimum(first, size - np.array([width, height]))
    u = first[:, :1] + np.arange(width)  # (r, width)
    v = first[:, 1:] + np.arange(height)
    pixel = (v[:, :, None] * size + u[:, None, :]).reshape(len(rows), -1)
    item = np.broadcast_to(np.arange(len(rows))[:, None], pixel.shape)
    return torch.from_numpy(item.copy()), torch.from_numpy(pixel)


# Where rays with origins o and directions d (r, w) enter a solid around the origin: (t, whether they do).


def _ball(o: Axes, d: Axes, half: Axes) -> tuple[torch.Tensor, torch.Tensor]:
    # From the foot of the perpendicular: far more exact in float32 than the textbook quadratic.
    (ox, oy, oz), (dx, dy, dz), r = o, d, half[0]
    dd = dx * dx + dy * dy + dz * dz
    foot = -(ox * dx + oy * dy + oz * dz) / dd
    x, y, z = ox + foot * dx, oy + foot * dy, oz + foot * dz
    inside = (r * r - (x * x + y * y + z * z)) / dd
    return foot - inside.clamp(min=0.0).sqrt(), inside > 0


def _box(o: Axes, d: Axes, half: Axes) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    enters, leaves = [], []
    for origin, step, h in zip(o, d, half, strict=True):
        step = torch.where(step.abs() < 1e-9, 1e-9, step)
        a, b = (-h - origin) / step, (h - origin) / step
        enters.append(torch.minimum(a, b))
        leaves.append(torch.maximum(a, b))
    near = torch.maximum(torch.maximum(enters[0], enters[1]), enters[2])
    far = torch.minimum(torch.minimum(leaves[0], leaves[1]), leaves[2])
    return near, near < far


def _cylinder(o: Axes, d: Axes, half: Axes) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    (ox, oy, oz), (dx, dy, dz), (r, _, h) = o, d, half
    dd = (dx * dx + dy * dy).clamp(min=1e-12)
    foot = -(ox * dx + oy * dy) / dd
    x, y = ox + foot * dx, oy + foot * dy
    inside = (r * r - (x * x + y * y)) / dd
    side = foot - inside.clamp(min=0.0).sqrt()
    on_side = (inside > 0) & ((oz + side * dz).abs() <= h)
    steep = torch.where(dz.abs() < 1e-9, -1e-9, dz)
    cap = (-steep.sign() * h - oz) / steep
    x, y = ox + cap * dx, oy + cap * dy
    on_cap = x * x + y * y <= r * r
    return torch.where(on_cap, cap, side), on_side | on_cap


_HIT = (_box, _ball, _cylinder)  # as world.KINDS
