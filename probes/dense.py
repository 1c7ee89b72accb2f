"""Dense readouts: depth or segmentation of every patch from its own token, as maps that one can look at.

    view = dense_view(store, "depth", camera, rows, side)      # what every patch shows, and what its pixels say

A readout of one patch may know where the patch is, and depth is mostly a matter of place: so depth counts from the
mean map of the fitted frames (R² 0), and beside segmentation stands what the place alone tells.
Trap: patches of one frame are no independent samples; split and intervals still go by episode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from probes.targets import cells, depth_maps
from vlm4vla_core.errors import InputError, nearest

if TYPE_CHECKING:
    from vlm4vla_core.episodes.store import EpisodeStore

NAMES = ("depth", "segmentation")
PIXELS = 8  # per side of a patch that the pixel baseline reads


@dataclass(frozen=True)
class View:
    """values: (n, side²) metres, or class numbers. classes: their names. pixels: (n, side², p): the patch's own pixels,
    its place, and the place's squares."""

    name: str
    side: int
    values: np.ndarray
    classes: tuple[str, ...]
    pixels: np.ndarray


def dense_view(store: EpisodeStore, name: str, camera: str, rows: np.ndarray, side: int) -> View:
    """What every patch of a side x side grid shows in some rows of a store.

    Raises InputError for another target and for a store without depth or segmentation of that camera.
    """
    if name not in NAMES:
        raise InputError(f"no dense target '{name}'", fix=nearest(name, NAMES))
    values: np.ndarray = np.empty((len(rows), side**2))
    classes: tuple[str, ...] = ()
    pixels = np.empty((len(rows), side**2, PIXELS**2 * 3 + 5), np.float32)
    place = (np.arange(side) + 0.5) / side - 0.5
    row, column = (grid.ravel() for grid in np.meshgrid(place, place, indexing="ij"))
    pixels[:, :, -5:] = np.stack([row, column, row**2, column**2, row * column], axis=1)
    if name == "segmentation" and camera not in store.manifest.get("segmentation", {}):
        fix = "record it with `vlm4vla record tabletop --geometry`"
        raise InputError(f"target 'segmentation' needs that of camera '{camera}'", where=store.path, fix=fix)
    for start in range(0, len(rows), 256):
        part = slice(start, start + 256)
        if name == "depth":
            values[part] = cells(depth_maps(store, camera, rows[part]), side).reshape(-1, side**2)
        else:
            values[part] = most_common(store.segmentation(camera, rows[part]), side).reshape(-1, side**2)
        images = store.images(camera, rows[part], side * PIXELS)
        patch = images.reshape(-1, side, PIXELS, side, PIXELS, 3).swapaxes(2, 3)
        pixels[part, :, :-5] = patch.reshape(len(images), side**2, -1) / 255
    if name == "segmentation":
        labels, numbers = np.unique(values.astype(np.int64), return_inverse=True)
        values, classes = numbers.reshape(values.shape), tuple(f"label {label}" for label in labels)
    return View(name, side, values, classes, pixels)


def most_common(maps: np.ndarray, side: int) -> np.ndarray:
    """The most frequent label (n, side, side) in each cell of uint8 maps (n, H, W); of equals the smallest."""
    best, count = np.zeros((len(maps), side, side), np.int64), np.full((len(maps), side, side), -1.0)
    for label in np.unique(maps):
        share = cells((maps == label).astype(np.float64), side)
        best, count = np.where(share > count + 1e-9, label, best), np.maximum(share, count)
    return best
