"""What a store records about its scenes, as values for every image token: the targets of the dense objective.

True positions where the camera's projection is known (the tabletop world's front camera), the gripper from the state,
depth and segmentation where they were recorded.

Trap: a picture shows the hand even where no target names it. With `hand` false its pixels are left out of the
segmentation, so that a model can be trained that was never told of the gripper.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core.episodes.store import EpisodeStore
from vlm4vla_core.sims.tabletop.world import COLOURS, KINDS

if TYPE_CHECKING:
    from vlm4vla_core.families import Geometry

SAMPLED = 256  # frames that speak for a store, where each must be read
COLOURED = tuple(f"{colour} {what}" for what in ("object", "plate") for colour in COLOURS)  # of "offset"
_ABSENT = -0.99  # coordinates below this mean that the slot is empty
Found = tuple[np.ndarray, np.ndarray]  # values (B, n, k) float32 and mask (B, n) bool


@dataclass(frozen=True)
class DenseTargets:
    """What one store's camera gives to learn from. geometry: of the picture's image tokens."""

    store: EpisodeStore
    camera: str
    geometry: Geometry

    @property
    def side(self) -> int:
        """Image tokens per side."""
        return self.geometry.grid // self.geometry.merge

    @property
    def cells(self) -> int:
        """Image tokens of a picture."""
        return self.side**2

    @cached_property
    def missing(self) -> dict[str, str]:
        """Why a target cannot be had, for each; empty where it can."""
        from vlm4vla_core.vqa.embodied import availability
        from vlm4vla_core.vqa.general import GENERAL

        manifest, store = self.store.manifest, self.store
        placed = availability(store, camera=self.camera)[next(iter(GENERAL))]
        lacking = [name for name in ("x", "y", "z", "gripper") if name not in store.state_names]
        gripper = f"the store's state does not name {', '.join(lacking)}" if lacking else ""
        if "task" in store.episodes and (store.episodes["task"] == "scene").all():
            gripper = "its pictures show no gripper"
        if self.camera != store.cameras[0]:
            gripper = gripper or "only the first camera's pictures are taken to show the gripper"
        told = {
            layer: "" if self.camera in manifest.get(layer, {}) else f"the store has no {layer}"
            for layer in ("depth", "segmentation")
        }
        return {"presence": placed, "position": placed, "offset": placed, "gripper": gripper, **told}

    @property
    def classes(self) -> tuple[str, ...]:
        """Of presence: every colour of every kind, and of plates."""
        return tuple(f"{colour} {kind}" for kind in (*KINDS, "plate") for colour in COLOURS)

    @cached_property
    def segments(self) -> tuple[str, ...]:
        """Of segmentation: the tabletop world's, with slots as kinds; elsewhere the labels of sampled frames."""
        if self._world:
            return ("background", "table", "gripper", "switch", "lamp", "plate", *KINDS)
        rows = np.unique(np.linspace(0, len(self.store) - 1, SAMPLED).astype(int))
        highest = int(self.store.segmentation(self.camera, rows).max())
        return tuple(f"label {label}" for label in range(highest + 1))

    def get(self, name: str, rows: np.ndarray, settings: dict[str, Any], *, hand: bool = True) -> Found:
        """One target of B rows: values (B, n, k), standardised where they are numbers, and mask (B, n)."""
        if name == "presence":
            return self._presence(rows)
        if name == "offset":
            return self._offset(rows)
        if name == "segmentation":
            return self._shares(rows, len(settings["classes"]), hand)
        values, mask = {"position": self._position, "gripper": self._gripper, "depth": self._depth}[name](rows)
        mean, std = np.array(settings["mean"], np.float32), np.array(settings["std"], np.float32)
        values[..., : len(mean)] = (values[..., : len(mean)] - mean) / std
        return values * mask[..., None], mask

    def numbers(self, name: str, rows: np.ndarray) -> np.ndarray:
        """All values (m, k) in metres of a target that is made of numbers."""
        if name == "gripper":
            return self._hand[rows][:, :3]
        values, mask = self._position(rows) if name == "position" else self._depth(rows)
        return values[mask]

    # --- where objects are

    @property
    def _world(self) -> bool:
        return self.store.manifest["source"] == "tabletop"

    @cached_property
    def _objects(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of objects and plates: cell (N, M), -1 outside; class (E, M), -1 for none; x and y (N, M, 2) m; offset from
        the cell's centre (N, M, 2) cell sides."""
        from vlm4vla_core.sims.tabletop.looks import LOOKS
        from vlm4vla_core.vqa.embodied import OBJECTS, PLATES

        store, number = self.store, {name: index for index, name in enumerate(self.classes)}
        places = store.column(OBJECTS).reshape(len(store), -1, 3)
        flat = store.column(PLATES).reshape(len(store), -1, 2)
        points = np.concatenate([places, np.pad(flat, [(0, 0), (0, 0), (0, 1)])], 1)  # (N, M, 3), plates at z = 0
        kinds = np.full((len(store.lengths), points.shape[1]), -1)
        for column, first in (("objects", 0), ("plates", places.shape[1])):
            for episode, text in enumerate(store.episodes[column]):
                for slot, name in enumerate(text.split(";")):
                    kinds[episode, first + slot] = number[name] if name else -1
        spots = np.empty((*points.shape[:2], 2))
        domains = store.episodes["domain"].to_numpy()[store.episode_of]
        for domain in np.unique(domains):
            spots[domains == domain] = LOOKS[domain].camera.project(points[domains == domain])[0]
        cell = self._cell(spots[..., 0]) + self.side * self._cell(spots[..., 1])
        seen = ((spots >= 0) & (spots < self.side * self._step)).all(-1) & (points.min(-1) > _ABSENT)
        offset = np.mod(spots / self._step, 1.0) - 0.5
        return np.where(seen & (kinds[store.episode_of] >= 0), cell, -1), kinds, points[..., :2], offset

    @property
    def _step(self) -> float:
        """Side of a cell in picture widths."""
        return self.geometry.patch * self.geometry.merge / self.geometry.size

    def _cell(self, fraction: np.ndarray) -> np.ndarray:
        return np.floor(fraction / self._step).astype(np.int64)

    def _presence(self, rows: np.ndarray) -> Found:
        cell, kinds, _, _ = self._objects
        values = np.zeros((len(rows), self.cells, len(self.classes)), np.float32)
        picture, slot = np.nonzero(cell[rows] >= 0)
        values[picture, cell[rows][picture, slot], kinds[self.store.episode_of[rows]][picture, slot]] = 1
        return values, np.ones(values.shape[:2], bool)

    def _offset(self, rows: np.ndarray) -> Found:
        cell, kinds, _, offset = self._objects
        values = np.full((len(rows), self.cells, len(COLOURED), 2), np.nan, np.float32)
        picture, slot = np.nonzero(cell[rows] >= 0)
        which = kinds[self.store.episode_of[rows]][picture, slot]
        colour = which % len(COLOURS) + len(COLOURS) * (which >= len(self.classes) - len(COLOURS))  # plates come last
        values[picture, cell[rows][picture, slot], colour] = offset[rows][picture, slot]
        known = ~np.isnan(values[..., 0]).all(-1)  # (B, n)
        return values.reshape(len(rows), self.cells, -1), np.asarray(known)

    def _position(self, rows: np.ndarray) -> Found:
        cell, _, xy, _ = self._objects
        picture, slot = np.nonzero(cell[rows] >= 0)
        place = picture * self.cells + cell[rows][picture, slot]
        count = np.bincount(place, minlength=len(rows) * self.cells)
        total = [np.bincount(place, xy[rows][picture, slot, axis], len(count)) for axis in range(2)]
        values = (np.stack(total, -1) / np.maximum(count, 1)[:, None]).astype(np.float32)
        return values.reshape(len(rows), self.cells, 2), (count > 0).reshape(len(rows), self.cells)

    # --- the hand

    @cached_property
    def _hand(self) -> np.ndarray:
        """(N, 5): x, y, z (m), 1 where the gripper is open, and 1 where the picture shows it."""
        state, columns = self.store.state, [self.store.state_names.index(name) for name in ("x", "y", "z", "gripper")]
        values = np.array(state[:, columns])
        low, high = values[:, 3].min(), values[:, 3].max()
        values[:, 3] = values[:, 3] > (low + high) / 2 if high > low else high > 0
        tasks = self.store.episodes.get("task")
        shown = np.ones(len(values)) if tasks is None else (tasks != "scene").to_numpy()[self.store.episode_of]
        return np.column_stack([values, shown]).astype(np.float32)

    def _gripper(self, rows: np.ndarray) -> Found:
        values = self._hand[rows][:, None].repeat(self.cells, 1)  # (B, n, 5)
        return values[..., :4], values[..., 4] > 0

    # --- depth and segmentation

    def _pixels(self, shape: tuple[int, ...]) -> np.ndarray:
        """(H, W) the cell of every pixel of a frame; n for those beyond the last whole cell."""
        across, down = (self._cell((np.arange(length) + 0.5) / length) for length in (shape[1], shape[0]))
        inside = (across < self.side)[None] & (down < self.side)[:, None]
        return np.where(inside, across[None] + self.side * down[:, None], self.cells)

    def _depth(self, rows: np.ndarray) -> Found:
        frames = self.store.depth(self.camera, rows)  # (B, H, W)
        unit = self.store.manifest["depth"][self.camera]["unit"]
        place = self._pixels(frames.shape[1:]) + (self.cells + 1) * np.arange(len(rows))[:, None, None]
        known, size = frames > 0, (self.cells + 1) * len(rows)
        count = np.bincount(place[known], minlength=size)
        total = np.bincount(place[known], frames[known], size) * unit
        values, count = (one.reshape(len(rows), -1)[:, :-1] for one in (total / np.maximum(count, 1), count))
        return values[..., None].astype(np.float32), count > 0

    @cached_property
    def _kinds(self) -> np.ndarray:
        """(E, 256) class of each label, by episode."""
        table = np.tile(np.arange(256), (len(self.store.lengths), 1))
        if self._world:
            from vlm4vla_core.sims.tabletop.render import OBJECTS, PLATE_0

            table[:, PLATE_0:OBJECTS] = self.segments.index("plate")
            for episode, text in enumerate(self.store.episodes["objects"]):
                for slot, name in enumerate(name for name in text.split(";") if name):
                    table[episode, OBJECTS + slot] = self.segments.index("plate") + 1 + KINDS.index(name.split()[-1])
        return table

    def _shares(self, rows: np.ndarray, classes: int, hand: bool) -> Found:
        frames = self.store.segmentation(self.camera, rows)
        kind = self._kinds[self.store.episode_of[rows][:, None, None], frames]  # (B, H, W)
        place = self._pixels(frames.shape[1:]) + (self.cells + 1) * np.arange(len(rows))[:, None, None]
        known = kind < classes
        if self._world and not hand:
            known &= kind != self.segments.index("gripper")
        counts = np.bincount(place[known] * classes + kind[known], minlength=(self.cells + 1) * len(rows) * classes)
        values = counts.reshape(len(rows), self.cells + 1, classes)[:, :-1].astype(np.float32)
        total = values.sum(-1)
        return values / np.maximum(total, 1)[..., None], total > 0
