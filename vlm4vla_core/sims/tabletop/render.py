"""Ray caster of the tabletop world: RGB, metric depth and segmentation of many worlds at once, on the CPU.

The front camera of a look is fixed, so table and floor are traced once (float64) and kept; the wrist camera moves with
the hand, so they are traced for every frame. Each frame then adds what moves: plates and blob shadows on the table, and
balls, boxes and cylinders with a depth buffer, each traced only inside the window of pixels that its bounding box
projects to.

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
from vlm4vla_core.sims.tabletop.looks import FLOOR, LOOKS, TABLE, TABLE_THICKNESS, Camera, Look, pattern
from vlm4vla_core.sims.tabletop.primitives import (
    BACKGROUND,
    FIELDS,
    GRIPPER,
    LAMP,
    OBJECTS,
    PLATE_0,
    SWITCH,
    TABLETOP,
    Decal,
    Solids,
    decals,
    solids,
)
from vlm4vla_core.sims.tabletop.shapes import HIT
from vlm4vla_core.sims.tabletop.world import State

if TYPE_CHECKING:
    import torch

__all__ = [
    "BACKGROUND", "CAMERAS", "GRIPPER", "LAMP", "OBJECTS", "PLATE_0", "SWITCH", "TABLETOP", "Picture", "cameras",
    "render", "trace",
]  # fmt: skip
CAMERAS = ("front", "wrist")
_PLATE_RIM = 0.82  # fraction of the plate's radius where its darker rim begins
_AMBIENT, _DIFFUSE = 0.56, 0.50
_RAYS = 1 << 18  # traced together: small enough for the cache, large enough to amortise the calls
# The wrist camera, in the hand's frame (x sideways, y ahead), m; it looks past the finger tips.
_WRIST_AT, _WRIST_TO, _WRIST_FOCAL = np.array([0.0, -0.095, 0.068]), np.array([0.0, 0.03, -0.03]), 0.55


@dataclass(frozen=True)
class Picture:
    """rgb: (n, H, W, 3) uint8. depth: (n, H, W) float32, m along the camera's axis; segmentation: (n, H, W) uint8.

    The last two only when asked for.
    """

    rgb: np.ndarray
    depth: np.ndarray | None = None
    segmentation: np.ndarray | None = None


def render(
    state: State,
    domains: Sequence[str],
    size: int,
    *,
    camera: str = "front",
    samples: int = 1,
    geometry: bool = False,
    hand: bool = True,
) -> Picture:
    """Pictures of n worlds by one camera of each world's domain.

    camera: "front" (fixed, one per domain) or "wrist". samples: rays per pixel along each side, averaged. geometry:
    also depth and segmentation (one ray through the pixel centre). hand: draw the gripper and its shadow. Raises
    InputError on an unknown domain or camera.
    """
    import torch

    for name in domains:
        if name not in LOOKS:
            raise InputError(f"the tabletop world has no domain '{name}'", fix=nearest(name, LOOKS))
    if camera not in CAMERAS:
        raise InputError(f"the tabletop world has no camera '{camera}'", fix=nearest(camera, CAMERAS))
    rgb = np.empty((len(state), size, size, 3), np.uint8)
    depth = np.empty((len(state), size, size), np.float32) if geometry else None
    segmentation = np.empty((len(state), size, size), np.uint8) if geometry else None
    # The pieces are too small to share: waiting for a second thread costs more than it brings, on a busy machine 9x.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        chunk = max(1, _RAYS // (size * samples) ** 2)
        for start in range(0, len(state), chunk):
            part = slice(start, start + chunk)
            colour, far, label = trace(state[part], domains[part], size * samples, camera=camera, hand=hand)
            fine = colour.view(-1, size, samples, size, samples, 3)
            mean = fine[:, :, 0, :, 0]
            for i, j in [(i, j) for i in range(samples) for j in range(samples)][1:]:
                mean = mean + fine[:, :, i, :, j]
            rgb[part] = (mean * (255 / samples**2) + 0.5).clamp(0, 255).to(torch.uint8).numpy()
            if depth is not None and segmentation is not None:
                if samples > 1:
                    _, far, label = trace(state[part], domains[part], size, camera=camera, hand=hand)
                depth[part], segmentation[part] = far.numpy(), label.numpy()
    finally:
        torch.set_num_threads(threads)
    return Picture(rgb, depth, segmentation)


def trace(
    state: State, domains: Sequence[str], size: int, *, camera: str = "front", hand: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One ray per pixel: colour (n, S, S, 3) float32 in [0, 1], depth (n, S, S) float32, label (n, S, S) uint8."""
    import torch

    views = cameras(state, domains, camera)
    if camera == "front":
        names = sorted(set(domains))
        backdrops = [_backdrop(name, size) for name in names]
        which = [names.index(name) for name in domains]
    else:
        backdrops = [_traced(view, LOOKS[name], size) for view, name in zip(views, domains, strict=True)]
        which = list(range(len(views)))
    picked = torch.tensor(which)  # (n,)
    scene = _Scene(
        size=size,
        lens=_Lens(
            np.array([view.position for view in views]),
            np.array([view.axes for view in views]),
            np.array([view.focal for view in views]),
        ),
        looks=[LOOKS[name] for name in domains],
        which=picked,
        rays=torch.cat([item.rays for item in backdrops]),
        ground=torch.cat([item.ground for item in backdrops]),
        light=torch.tensor(np.stack([LOOKS[name].towards_light() for name in domains]), dtype=torch.float32),
        colour=torch.stack([item.colour for item in backdrops])[picked].reshape(-1, 3),
        depth=torch.stack([item.depth for item in backdrops])[picked].reshape(-1),
        label=torch.stack([item.label for item in backdrops])[picked].reshape(-1),
    )
    for decal in decals(state, scene.looks, hand):
        _paint(decal, scene)
    for solid in solids(state, scene.looks, hand):
        for part in _of_one_size(solid, scene):
            _cast(part, scene)
    shape = (len(state), size, size)
    return scene.colour.view(*shape, 3), scene.depth.view(shape), scene.label.view(shape)


def cameras(state: State, domains: Sequence[str], camera: str) -> list[Camera]:
    """The camera of each of n worlds: the look's own, or the one at the wrist."""
    if camera == "front":
        return [LOOKS[name].camera for name in domains]
    views = []
    for place, yaw in zip(state.gripper, state.yaw, strict=True):
        turn = np.array([[np.cos(yaw), -np.sin(yaw), 0.0], [np.sin(yaw), np.cos(yaw), 0.0], [0.0, 0.0, 1.0]])
        at, to = (tuple((place + (turn * local).sum(1)).tolist()) for local in (_WRIST_AT, _WRIST_TO))
        views.append(Camera(at, to, _WRIST_FOCAL))
    return views


@dataclass(frozen=True)
class _Lens:
    """Where n pictures are taken from, as arrays. origin: (n, 3). axes: (n, 3, 3) right, down, forward. focal: (n,)."""

    origin: np.ndarray
    axes: np.ndarray
    focal: np.ndarray

    def project(self, points: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `Camera.project`, for points (r, k, 3) of the worlds `rows` (r,), in a fixed order of summation."""
        x, y, z = np.moveaxis(points - self.origin[rows, None], -1, 0)  # (r, k) each
        axes = self.axes[rows, None]  # (r, 1, 3, 3)
        u, v, depth = (x * axes[..., i, 0] + y * axes[..., i, 1] + z * axes[..., i, 2] for i in range(3))
        scale = self.focal[rows, None] / np.where(depth > 0, depth, 1.0)
        return 0.5 + np.stack([u * scale, v * scale], -1), depth


@dataclass(frozen=True)
class _Scene:
    """What is being drawn: n worlds, P pixels each. rays and ground are shared by worlds of one camera (`which`)."""

    size: int
    lens: _Lens
    looks: list[Look]
    which: torch.Tensor  # (n,)
    rays: torch.Tensor  # (cameras * P, 3)
    ground: torch.Tensor  # (cameras * P, 2)
    light: torch.Tensor  # (n, 3)
    colour: torch.Tensor  # (n * P, 3), painted over
    depth: torch.Tensor  # (n * P,)
    label: torch.Tensor  # (n * P,) uint8


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
    return _traced(LOOKS[name].camera, LOOKS[name], size)


def _traced(camera: Camera, look: Look, size: int) -> _Backdrop:
    """Table and floor of one look as a camera sees them, traced in float64."""
    import torch

    origin, rays, light = np.array(camera.position), camera.rays(size), look.towards_light()
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


def _paint(decal: Decal, scene: _Scene) -> None:
    import torch

    size, colour = scene.size, scene.colour

    half = np.stack([decal.radius, decal.radius, np.zeros(len(decal.rows))], 1)
    corners = np.concatenate([decal.centre, np.zeros((len(decal.rows), 1))], 1)[:, None] + _CORNERS * half[:, None]
    item, pixel = _windows(corners, decal.rows, scene)  # (r, w), (r, w)
    rows = torch.from_numpy(decal.rows)[:, None]
    x, y = scene.ground[scene.which[rows] * size**2 + pixel].unbind(-1)
    middle = torch.tensor(decal.centre, dtype=torch.float32)
    radius = torch.tensor(decal.radius, dtype=torch.float32)[:, None]
    dx, dy = x - middle[:, :1], y - middle[:, 1:]
    inside = 1.0 - (dx * dx + dy * dy) / (radius * radius)  # 1 in the middle, 0 at the edge
    hit = inside > 0
    where = (rows * size**2 + pixel)[hit]
    if decal.colour is not None:
        rim = torch.where(inside[hit] < 1 - _PLATE_RIM**2, 0.68, 0.95)
        colour[where] = torch.tensor(decal.colour, dtype=torch.float32)[item[hit]] * rim[:, None]
        scene.label[where] = torch.tensor(decal.label, dtype=torch.uint8)[item[hit]]
    else:
        strength = torch.tensor(decal.strength, dtype=torch.float32)[item[hit]]
        shade = 1.0 - strength * (1.7 * inside[hit]).clamp(max=1.0)
        # Shadows that overlap darken each other, in the order of the slots.
        light = torch.ones(len(colour)).scatter_reduce_(0, where, shade, "prod")
        colour *= light[:, None]


# --- solids -----------------------------------------------------------------------------------------------------

_CORNERS = np.array([[i, j, k] for i in (-1.0, 1.0) for j in (-1.0, 1.0) for k in (-1.0, 1.0)])  # (8, 3)


def _corners(solid: Solids) -> np.ndarray:
    """(r, 8, 3) corners of the bounding boxes."""
    cos, sin = np.cos(solid.yaw)[:, None], np.sin(solid.yaw)[:, None]
    x, y, z = np.moveaxis(_CORNERS * solid.half[:, None], -1, 0)
    return solid.centre[:, None] + np.stack([x * cos - y * sin, x * sin + y * cos, z], -1)


def _of_one_size(solid: Solids, scene: _Scene) -> Iterator[Solids]:
    """Solids whose windows differ much apart from each other: what is close to the camera must not make all wide."""
    first, last = _bounds(_corners(solid), solid.rows, scene)
    area = np.prod(last - first + 1, axis=1)
    wide = area > 4 * np.median(area)
    for mine in (~wide, wide):
        if mine.all():
            yield solid
        elif mine.any():
            rest = (getattr(solid, name)[mine] for name in FIELDS)
            yield Solids(solid.kind, *rest)


def _cast(solid: Solids, scene: _Scene) -> None:
    """Trace each solid within its window and write the pixels where it is the nearest so far."""
    import torch

    size, depth = scene.size, scene.depth
    turn = np.stack([np.cos(solid.yaw), np.sin(solid.yaw)], 1)  # (r, 2)
    item, pixel = _windows(_corners(solid), solid.rows, scene)
    rows = torch.from_numpy(solid.rows)[:, None]
    dx, dy, dz = scene.rays[scene.which[rows] * size**2 + pixel].unbind(-1)  # (r, w) each
    origin = scene.lens.origin[solid.rows] - solid.centre
    ox, oy, oz = (torch.tensor(value, dtype=torch.float32)[:, None] for value in origin.T)
    hx, hy, hz = (torch.tensor(value, dtype=torch.float32)[:, None] for value in solid.half.T)
    cos, sin = (torch.tensor(value, dtype=torch.float32)[:, None] for value in turn.T)
    where = rows * size**2 + pixel
    if solid.kind != 1:  # into the solid's own frame
        ox, oy = ox * cos + oy * sin, oy * cos - ox * sin
        dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
    t, hit = HIT[solid.kind]((ox, oy, oz), (dx, dy, dz), (hx, hy, hz))
    hit &= (t > 0) & (t < depth[where])
    item, t, where = item[hit], t[hit], where[hit]
    if not len(item):
        return
    depth.scatter_reduce_(0, where, t, "amin")
    nearest_of_all = t == depth[where]  # two solids of this call may cover one pixel
    hit[hit.clone()] = nearest_of_all
    item, t, where = item[nearest_of_all], t[nearest_of_all], where[nearest_of_all]
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
    lx, ly, lz = scene.light[rows[item, 0]].unbind(-1)
    shade = _AMBIENT + _DIFFUSE * (nx * lx + ny * ly + nz * lz).clamp(min=0.0)
    paint = torch.tensor(solid.colour, dtype=torch.float32)[item]
    scene.colour[where] = (paint * shade[:, None]).clamp(max=1.0)
    scene.label[where] = torch.tensor(solid.label, dtype=torch.uint8)[item]


def _bounds(corners: np.ndarray, rows: np.ndarray, scene: _Scene) -> tuple[np.ndarray, np.ndarray]:
    """First and last pixel (r, 2), right and down, that a shape with these corners (r, 8, 3) can cover."""
    size = scene.size
    spot, depth = scene.lens.project(corners, rows)
    # A shape that reaches behind the camera's plane may cover anything.
    near = np.asarray((depth < 0.01).any(1))[:, None]
    low, high = np.where(near, 0.0, spot.min(1) * size), np.where(near, size, spot.max(1) * size)
    first = np.clip(np.floor(low - 0.5), 0, size - 1).astype(int)
    return first, np.clip(np.ceil(high - 0.5), 0, size - 1).astype(int)


def _windows(corners: np.ndarray, rows: np.ndarray, scene: _Scene) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels that a shape with these corners (r, 8, 3) can cover: item (r, w) = 0..r-1 and pixel (r, w) indices.

    All windows of a call have one size, the largest needed; extra pixels are traced and missed.
    """
    import torch

    size, (first, last) = scene.size, _bounds(corners, rows, scene)
    width, height = (last - first).max(0) + 1
    first = np.minimum(first, size - np.array([width, height]))
    u = first[:, :1] + np.arange(width)  # (r, width)
    v = first[:, 1:] + np.arange(height)
    pixel = (v[:, :, None] * size + u[:, None, :]).reshape(len(rows), -1)
    item = np.broadcast_to(np.arange(len(rows))[:, None], pixel.shape)
    return torch.from_numpy(item.copy()), torch.from_numpy(pixel)
