"""Questions about the scene with known answers, made from what a store records: the language objective's data.

Every store with a gripper state gives "where is the gripper" (in thirds of the store's own range) and "is it open";
a store with true object positions (`truth/objects`) also gives questions about objects.

Trap: answers come from the state, not from the picture. A gripper hidden from the camera still has an answer, and
thirds are of this store, so accuracies of two stores do not compare.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from vlm4vla_core.episodes.store import EpisodeStore

OBJECTS = "truth/objects"
CLEARLY = 0.03  # m; objects closer than this to the gripper's own x are neither left nor right of it
_ABSENT = -0.99  # coordinates below this mean that the slot is empty
_VIEW = "x to the right, y away from the camera, z up"  # a frame in which the axes are the viewer's
_WORDS = {
    "x": ("left", "middle", "right"),
    "y": ("near", "middle", "far"),
    "z": ("low", "middle", "high"),
}


class Question(NamedTuple):
    """One question about one row's picture, and its answer."""

    question: str
    answer: str


class _Facts(NamedTuple):
    """Per store, computed once: columns and thresholds. thirds: axis -> the two bounds (m)."""

    columns: dict[str, int]
    thirds: dict[str, np.ndarray]
    halfway: float | None  # gripper value between closed and open; None when it never changes
    viewer: bool
    objects: np.ndarray | None  # (N, slots, 3)
    names: list[list[str]]  # per episode


@lru_cache(maxsize=8)
def _facts(store: EpisodeStore) -> _Facts:
    columns = {name: index for index, name in enumerate(store.state_names)}
    missing = [axis for axis in (*_WORDS, "gripper") if axis not in columns]
    if missing:
        raise InputError(
            f"questions need the gripper's state, and this store does not name {', '.join(missing)}",
            where=store.path,
            fix=f"its state is named {', '.join(store.state_names)}",
        )
    state = store.state
    thirds = {axis: np.quantile(state[:, columns[axis]], [1 / 3, 2 / 3]) for axis in _WORDS}
    gripper = state[:, columns["gripper"]]
    low, high = float(gripper.min()), float(gripper.max())
    objects, names = None, []
    if OBJECTS in store.manifest["columns"] and "objects" in store.episodes:
        objects = store.column(OBJECTS).reshape(len(store), -1, 3)
        names = [[name for name in text.split(";") if name] for text in store.episodes["objects"]]
    halfway = (low + high) / 2 if high > low else None
    return _Facts(columns, thirds, halfway, _VIEW in store.convention.frame, objects, names)


def questions(store: EpisodeStore, row: int, rng: np.random.Generator) -> Question:
    """One question about the picture at `row`, drawn with `rng` evenly from the kinds that the row allows.

    Raises InputError when the store's state does not name x, y, z and gripper.
    """
    facts = _facts(store)
    state = store.state[row]
    gripper = np.array([state[facts.columns[axis]] for axis in "xyz"])
    made = [_where(axis, float(gripper[index]), facts) for index, axis in enumerate("xyz")]
    if facts.halfway is not None:
        # The state's gripper grows as it opens, in every store written here (1 open, 0 closed).
        is_open = state[facts.columns["gripper"]] > facts.halfway
        made.append(Question("Is the gripper open?", "yes" if is_open else "no"))
    kinds: list[list[Question]] = [[question] for question in made]
    if facts.objects is not None:
        kinds += [found for found in _about_objects(gripper, row, store, facts) if found]
    kind = kinds[rng.integers(len(kinds))]
    return kind[rng.integers(len(kind))]


def _where(axis: str, value: float, facts: _Facts) -> Question:
    third = int(np.searchsorted(facts.thirds[axis], value, side="right"))
    words = _WORDS[axis] if facts.viewer else _WORDS["z"]
    along = "" if facts.viewer else f" along {axis}"
    return Question(f"Is the gripper {words[0]}, {words[1]} or {words[2]}{along}?", words[third])


def _about_objects(gripper: np.ndarray, row: int, store: EpisodeStore, facts: _Facts) -> list[list[Question]]:
    assert facts.objects is not None
    names = facts.names[store.episode_of[row]]
    places = {name: place for name, place in zip(names, facts.objects[row], strict=False) if place.min() > _ABSENT}
    if not places:
        return []
    nearest = min(places, key=lambda name: float(np.linalg.norm(places[name] - gripper)))
    sides = []
    for name, place in places.items():
        if abs(place[0] - gripper[0]) > CLEARLY and facts.viewer:
            side = "left" if place[0] < gripper[0] else "right"
            sides.append(Question(f"Is the {name} left or right of the gripper?", side))
    return [[Question("Which object is nearest to the gripper?", nearest)], sides]
