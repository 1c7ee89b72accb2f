"""What can be read out of features: targets from the recorded states and actions, and from the tabletop world's truth.

    target_of(store, "object_xy")       # Target: values (N, k) or labels (N,), and the rows where it is defined

Quantities: gripper_xyz, gripper_xy, object_xy, object_xyz (of the object that the instruction is about), next_action,
next_chunk, task_progress, depth (in 4 x 4 cells). Classes: grasp, contact, lamp, task, instruction, colour, shape (of
the object that the instruction is about). Maps, for the dense readout: depth, segmentation.
Trap: a class that occurs in one episode cannot be learnt on others; instructions that do are left out, and counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlm4vla_core.errors import InputError, nearest

if TYPE_CHECKING:
    from vlm4vla_core.episodes.store import EpisodeStore

CHUNK = 5  # steps of next_chunk
FEW = 3  # episodes in which an instruction must occur
CELLS = 4  # per side of the depth target, as of the grid pooling
_RECORD = "record it with `vlm4vla record tabletop`"


@dataclass(frozen=True)
class Target:
    """values: (N, k) float of a quantity, or (N,) class numbers, one per row of the store. defined (N,): rows that have
    one. classes: names of the classes, none for a quantity. dims: names of the dimensions. unit: of the values."""

    name: str
    values: np.ndarray
    defined: np.ndarray
    dims: tuple[str, ...]
    classes: tuple[str, ...] = ()
    unit: str = ""

    @property
    def metres(self) -> bool:
        """Whether an error is a distance."""
        return self.unit == "m"


def target_of(store: EpisodeStore, name: str, *, camera: str = "", rows: np.ndarray | None = None) -> Target:
    """The target of that name. camera, rows: for those that are computed from pictures, and only there.

    Raises InputError for an unknown target, and for a store that does not record what it is made of.
    """
    if name not in TARGETS:
        raise InputError(f"unknown target '{name}'", fix=nearest(name, TARGETS))
    if name == "depth":
        return _depth(store, camera or store.cameras[0], np.arange(len(store)) if rows is None else rows)
    return TARGETS[name](store)


def _state(store: EpisodeStore, name: str, dims: tuple[str, ...]) -> Target:
    missing = [dim for dim in dims if dim not in store.state_names]
    if missing:
        raise InputError(
            f"target '{name}' needs the state{'s' * (len(missing) > 1)} {', '.join(missing)}",
            where=store.path,
            fix=f"this store records: {', '.join(store.state_names)}",
        )
    values = np.asarray(store.state)[:, [store.state_names.index(dim) for dim in dims]]
    return Target(name, values, np.ones(len(store), bool), dims, unit="m")


def _truth(store: EpisodeStore, name: str, column: str) -> np.ndarray:
    if column not in store.manifest["columns"]:
        held = ", ".join(store.manifest["columns"]) or "no further columns"
        raise InputError(f"target '{name}' needs {column}", where=store.path, fix=f"this store has {held}; {_RECORD}")
    return np.asarray(store.column(column))


def _facts(store: EpisodeStore, name: str, *keys: str) -> list[list[str]]:
    """Values per episode of what the reader knew of it."""
    for key in keys:
        if key not in store.episodes:
            what = f"target '{name}' needs what each episode's {key} was"
            raise InputError(what, where=store.path, fix=f"this store does not say; {_RECORD}")
    return [store.episodes[key].astype(str).tolist() for key in keys]


def _object(store: EpisodeStore, name: str, axes: str) -> Target:
    """Where the object is that the instruction is about."""
    truth = _truth(store, name, "truth/objects")
    wanted, present = _facts(store, name, "target", "objects")
    slots = [
        names.split(";").index(one) if one in names.split(";") else -1
        for one, names in zip(wanted, present, strict=True)
    ]
    slot = np.array(slots)[store.episode_of]
    places = truth.reshape(len(store), -1, 3)[np.arange(len(store)), slot.clip(0), : len(axes)]
    return Target(name, places, slot >= 0, tuple(axes), unit="m")


def _action(store: EpisodeStore, name: str, steps: int) -> Target:
    """The recorded actions of this step and the next ones; dimensions that never change are left out."""
    action = np.asarray(store.action)
    last = store.starts[store.episode_of] + store.lengths[store.episode_of] - 1
    rows = np.arange(len(store))[:, None] + np.arange(steps)
    moving = np.ptp(action, axis=0) > 0
    if not moving.any():
        raise InputError(f"target '{name}': the recorded actions never change", where=store.path)
    values = action[np.minimum(rows, len(store) - 1)][..., moving].reshape(len(store), -1)
    names = [dim for dim, moves in zip(store.convention.names, moving, strict=True) if moves]
    dims = tuple(names) if steps == 1 else tuple(f"{dim}+{step}" for step in range(steps) for dim in names)
    return Target(name, values, rows[:, -1] <= last, dims)


def _progress(store: EpisodeStore) -> Target:
    length = store.lengths[store.episode_of]
    share = store.step_of / np.maximum(length - 1, 1)
    return Target("task_progress", share[:, None], length > 1, ("progress",))


def _flag(
    store: EpisodeStore, name: str, column: str, test: Callable[[np.ndarray], np.ndarray], no: str, yes: str
) -> Target:
    values = test(_truth(store, name, column)).astype(np.int64)
    return Target(name, values, np.ones(len(store), bool), (name,), (no, yes))


def _labels(store: EpisodeStore, name: str, labels: list[str], least: int = 1) -> Target:
    """Classes per episode; empty labels, and those of fewer than `least` episodes, are undefined."""
    counts = {label: labels.count(label) for label in sorted(set(labels)) if label}
    classes = tuple(label for label, count in counts.items() if count >= least)
    if len(classes) < 2:
        few = f" with at least {least} episodes each" if least > 1 else ""
        raise InputError(f"target '{name}' has {len(classes)} classes{few}", where=store.path, fix="two are needed")
    number = {label: i for i, label in enumerate(classes)}
    values = np.array([number.get(label, -1) for label in labels])[store.episode_of]
    return Target(name, values.clip(0), values >= 0, (name,), classes)


def _word(store: EpisodeStore, name: str, place: int) -> Target:
    """First or last word of the object's name: "purple cylinder"."""
    return _labels(
        store, name, [text.split()[place] if " " in text else "" for text in _facts(store, name, "target")[0]]
    )


def _depth(store: EpisodeStore, camera: str, rows: np.ndarray) -> Target:
    """Mean depth of 4 x 4 cells, metres."""
    values = np.full((len(store), CELLS**2), np.nan)
    for start in range(0, len(rows), 256):
        part = rows[start : start + 256]
        values[part] = cells(depth_maps(store, camera, part), CELLS).reshape(len(part), -1)
    dims = tuple(f"cell{row}{column}" for row in range(CELLS) for column in range(CELLS))
    return Target("depth", values, np.isfinite(values).all(1), dims, unit="m of depth")


def depth_maps(store: EpisodeStore, camera: str, rows: np.ndarray) -> np.ndarray:
    """Depth (n, H, W) in metres. Raises InputError for a store without it."""
    known = store.manifest.get("depth", {})
    if camera not in known:
        fix = "record it with `vlm4vla record tabletop --geometry`"
        raise InputError(f"target 'depth' needs the depth of camera '{camera}'", where=store.path, fix=fix)
    return store.depth(camera, rows) * float(known[camera]["unit"])


def cells(maps: np.ndarray, side: int) -> np.ndarray:
    """Means over side x side cells of maps (n, H, W): (n, side, side). Uneven cells where it does not divide."""
    edges = [np.linspace(0, size, side + 1).round().astype(int) for size in maps.shape[1:]]
    sums = np.add.reduceat(np.add.reduceat(maps, edges[0][:-1], axis=1, dtype=np.float64), edges[1][:-1], axis=2)
    return sums / (np.diff(edges[0])[:, None] * np.diff(edges[1]))


TARGETS: dict[str, Callable[[EpisodeStore], Target]] = {
    "gripper_xyz": lambda store: _state(store, "gripper_xyz", ("x", "y", "z")),
    "gripper_xy": lambda store: _state(store, "gripper_xy", ("x", "y")),
    "object_xy": lambda store: _object(store, "object_xy", "xy"),
    "object_xyz": lambda store: _object(store, "object_xyz", "xyz"),
    "next_action": lambda store: _action(store, "next_action", 1),
    "next_chunk": lambda store: _action(store, "next_chunk", CHUNK),
    "task_progress": _progress,
    "depth": lambda store: _depth(store, store.cameras[0], np.arange(len(store))),
    "grasp": lambda store: _flag(store, "grasp", "truth/held", lambda v: v[:, 0] >= 0, "empty hand", "holding"),
    "contact": lambda store: _flag(store, "contact", "truth/contact", lambda v: v.max(1) > 0, "free", "touching"),
    "lamp": lambda store: _flag(store, "lamp", "truth/switch", lambda v: v[:, 1] > 0, "off", "on"),
    "task": lambda store: _labels(store, "task", _facts(store, "task", "task")[0]),
    "instruction": lambda store: _labels(store, "instruction", list(store.instructions), FEW),
    "colour": lambda store: _word(store, "colour", 0),
    "shape": lambda store: _word(store, "shape", -1),
}
DENSE = ("depth", "segmentation")
