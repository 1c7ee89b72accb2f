"""Questions about the scene with known answers, made from what a store records: the language objective's data.

Every store with a gripper state gives "where is the gripper" (in thirds of the store's own range), "is it open" and the
next action in words; with a FAST tokenizer also the next chunk as action tokens. A store with true object positions
(`truth/objects`) gives questions about objects, and points at them where the camera's projection is known.

Trap: answers come from the state, not from the picture. A gripper hidden from the camera still has an answer, and
thirds are of this store, so accuracies of two stores do not compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vlm4vla_core.errors import InputError, nearest

if TYPE_CHECKING:
    from vlm4vla_core.episodes.store import EpisodeStore
    from vlm4vla_core.fast import FastTokenizer
    from vlm4vla_core.sims.tabletop.looks import Camera

OBJECTS = "truth/objects"
CLEARLY = 0.03  # m; objects closer than this along an axis are on neither side of one another
AHEAD = 4  # steps whose motion is "what the robot does next"
_ABSENT = -0.99  # coordinates below this mean that the slot is empty
_VIEW = "x to the right, y away from the camera, z up"  # a frame in which the axes are the viewer's
_WORDS = {
    "x": ("left", "middle", "right"),
    "y": ("near", "middle", "far"),
    "z": ("low", "middle", "high"),
}
_SIDES = ((0, "left or right of", ("left", "right")), (1, "in front of or behind", ("in front", "behind")))
_WAYS = {"x": ("left", "right"), "y": ("back", "forward"), "z": ("down", "up")}


class Question(NamedTuple):
    """One question about one row's picture, its answer, and which of `KINDS` it is."""

    question: str
    answer: str
    kind: str


class NothingToAsk(InputError):
    """These kinds can be asked about the store, but not about this row."""


class _Facts(NamedTuple):
    """Per store, computed once: columns and thresholds. thirds: axis -> the two bounds (m)."""

    columns: dict[str, int]
    missing: str  # why the state does not say where the gripper is; empty when it does
    thirds: dict[str, np.ndarray]
    halfway: float | None  # gripper value between closed and open; None when it never changes
    stride: float  # usual largest translation of one step
    viewer: bool
    objects: np.ndarray | None  # (N, slots, 3)
    names: list[list[str]]  # per episode


@lru_cache(maxsize=8)
def _facts(store: EpisodeStore) -> _Facts:
    columns = {name: index for index, name in enumerate(store.state_names)}
    missing, state = [axis for axis in (*_WORDS, "gripper") if axis not in columns], store.state
    reason = f"the store does not name {', '.join(missing)}; its state is named {', '.join(columns)}" if missing else ""
    thirds = {axis: np.quantile(state[:, columns[axis]], [1 / 3, 2 / 3]) for axis in _WORDS if not missing}
    gripper = state[:, columns["gripper"]] if not missing else np.zeros(1)
    low, high = float(gripper.min()), float(gripper.max())
    objects, names = None, []
    if OBJECTS in store.manifest["columns"] and "objects" in store.episodes:
        objects = store.column(OBJECTS).reshape(len(store), -1, 3)
        names = [[name for name in text.split(";") if name] for text in store.episodes["objects"]]
    halfway = (low + high) / 2 if high > low else None
    stride = float(np.median(np.abs(store.action[:, :3]).max(1)))
    return _Facts(columns, reason, thirds, halfway, stride, _VIEW in store.convention.frame, objects, names)


@dataclass(frozen=True)
class _Scene:
    """One row of a store, and what is known of it."""

    store: EpisodeStore
    row: int
    facts: _Facts
    view: Camera | None
    fast: FastTokenizer | None

    @property
    def gripper(self) -> np.ndarray:
        """(3,) m."""
        return np.array([self.store.state[self.row][self.facts.columns[axis]] for axis in "xyz"])

    @property
    def is_open(self) -> bool:
        # The state's gripper grows as it opens, in every store written here (1 open, 0 closed).
        return bool(self.store.state[self.row][self.facts.columns["gripper"]] > self.facts.halfway)

    @property
    def task(self) -> str:
        return f'The task is "{self.store.instructions[self.store.episode_of[self.row]]}".'

    def places(self) -> dict[str, np.ndarray]:
        """Name and position (3,) of every object that is present."""
        assert self.facts.objects is not None
        names = self.facts.names[self.store.episode_of[self.row]]
        listed = zip(names, self.facts.objects[self.row], strict=False)
        return {name: place for name, place in listed if place.min() > _ABSENT}


Groups = list[list[tuple[str, str]]]  # (question, answer); one group is drawn first, then one of it


def questions(
    store: EpisodeStore,
    row: int,
    rng: np.random.Generator,
    *,
    kinds: Sequence[str] = (),
    camera: str = "",
    fast: FastTokenizer | None = None,
) -> Question:
    """One question about the picture at `row`, drawn with `rng` evenly from the kinds that the row allows.

    kinds: of `KINDS`; by default position, gripper, nearest and side. What the store does not allow is passed over
    (`availability` says why). camera: that of pointing (default: the first). fast: the tokenizer of action tokens.
    Raises InputError with the reasons when nothing can be asked, NothingToAsk when only of this row, and on unknown
    kinds.
    """
    kinds, reasons = kinds or DEFAULT_KINDS, availability(store, camera=camera, fast=fast)
    if unknown := [kind for kind in kinds if kind not in reasons]:
        raise InputError(f"no questions of kind '{unknown[0]}'", fix=nearest(unknown[0], reasons))
    if all(reasons[kind] for kind in kinds):
        what = f"no questions of kind {', '.join(kinds)}: {'; '.join(dict.fromkeys(reasons[kind] for kind in kinds))}"
        raise InputError(what, where=store.path, fix="ask other kinds")
    view = _view(store, int(row), camera) if "pointing" in kinds else None
    scene = _Scene(store, int(row), _facts(store), view, fast)
    made = [(kind, group) for kind in kinds if not reasons[kind] for group in KINDS[kind](scene) if group]
    if not made:
        raise NothingToAsk(
            f"row {row} has no question of kind {', '.join(kinds)}", where=store.path, fix="ask more kinds"
        )
    kind, group = made[rng.integers(len(made))]
    return Question(*group[rng.integers(len(group))], kind)


@lru_cache(maxsize=8)
def availability(store: EpisodeStore, *, camera: str = "", fast: FastTokenizer | None = None) -> dict[str, str]:
    """Why a kind cannot be asked about this store at all, for each kind; empty where it can."""
    facts = _facts(store)
    objects = facts.missing or ("" if facts.objects is not None else "the store does not record where objects are")
    viewer = "" if facts.viewer else "the axes of its frame are not the viewer's"
    known = "" if _view(store, 0, camera) else "the camera's projection is not known"
    motion = "" if store.convention.relative else "its actions are not relative motion"
    tokens = "no FAST tokenizer is given" if fast is None else ""
    if fast is not None and fast.width != store.convention.size:
        tokens = f"the FAST tokenizer is for {fast.width} numbers, an action has {store.convention.size}"
    return {
        "position": facts.missing,
        "gripper": facts.missing,
        "nearest": objects,
        "side": objects or viewer,
        "relative": objects or viewer,
        "pointing": objects or known,
        "next action": facts.missing or motion,
        "action tokens": tokens,
    }


def _view(store: EpisodeStore, row: int, camera: str) -> Camera | None:
    """The camera whose projection is known: that of the tabletop world."""
    from vlm4vla_core.sims.tabletop.looks import LOOKS

    if store.manifest["source"] != "tabletop" or (camera or store.cameras[0]) != "front":
        return None
    look = LOOKS.get(store.episodes["domain"].iloc[store.episode_of[row]])
    return look.camera if look else None


def _position(scene: _Scene) -> Groups:
    made: Groups = []
    for axis, value in zip("xyz", scene.gripper, strict=True):
        third = int(np.searchsorted(scene.facts.thirds[axis], value, side="right"))
        words = _WORDS[axis] if scene.facts.viewer else _WORDS["z"]
        along = "" if scene.facts.viewer else f" along {axis}"
        made.append([(f"Is the gripper {words[0]}, {words[1]} or {words[2]}{along}?", words[third])])
    return made


def _gripper(scene: _Scene) -> Groups:
    return [] if scene.facts.halfway is None else [[("Is the gripper open?", "yes" if scene.is_open else "no")]]


def _nearest(scene: _Scene) -> Groups:
    places = scene.places()
    answer = min(places, key=lambda name: float(np.linalg.norm(places[name] - scene.gripper)), default="")
    return [[("Which object is nearest to the gripper?", answer)]] if answer else []


def _side(scene: _Scene) -> Groups:
    offsets = {name: place[0] - scene.gripper[0] for name, place in scene.places().items()}
    return [
        [
            (f"Is the {name} left or right of the gripper?", "left" if offset < 0 else "right")
            for name, offset in offsets.items()
            if abs(offset) > CLEARLY
        ]
    ]


def _relative(scene: _Scene) -> Groups:
    made = []
    for name, place in scene.places().items():
        for other, reference in scene.places().items():
            for axis, ask, words in _SIDES:
                offset = place[axis] - reference[axis]
                if abs(offset) > CLEARLY:
                    made.append((f"Is the {name} {ask} the {other}?", words[int(offset > 0)]))
    return [made]


def _pointing(scene: _Scene) -> Groups:
    assert scene.view is not None
    places = {"gripper": scene.gripper, **scene.places()}
    spots, _ = scene.view.project(np.array(list(places.values())))  # (n, 2)
    inside = np.all((spots >= 0) & (spots <= 1), axis=1).tolist()
    named = [(name, x, y) for name, (x, y), seen in zip(places, spots, inside, strict=True) if seen]
    return [
        [(f"Point to the {name}, as fractions of width and height.", f"[({x:.3f}, {y:.3f})]") for name, x, y in named]
    ]


def _next_action(scene: _Scene) -> Groups:
    from vlm4vla_core.episodes.sampling import action_chunks

    (chunk,), (mask,) = action_chunks(scene.store.action, scene.store.episode_of, np.array([scene.row]), AHEAD)
    convention, motion = scene.store.convention, chunk[mask][:, :3].mean(0)
    to_open = abs(chunk[0, -1] - convention.gripper_open) < abs(chunk[0, -1] - convention.gripper_closed)
    axis = int(np.abs(motion).argmax())
    if scene.facts.halfway is not None and to_open != scene.is_open:
        answer = f"{'open' if to_open else 'close'} the gripper"
    elif abs(motion[axis]) < scene.facts.stride / (2 * AHEAD):  # less than half a usual step in all of them
        answer = "stay"
    else:
        way = int(motion[axis] > 0)
        answer = f"move {_WAYS['xyz'[axis]][way] if scene.facts.viewer else 'along ' + '-+'[way] + 'xyz'[axis]}"
    return [[(f"{scene.task} What does the robot do next?", answer)]]


def _action_tokens(scene: _Scene) -> Groups:
    from vlm4vla_core.episodes.sampling import action_chunks
    from vlm4vla_core.fast import as_text

    assert scene.fast is not None
    store, rows = scene.store, np.array([scene.row])
    chunk, _ = action_chunks(store.action, store.episode_of, rows, scene.fast.horizon)
    return [[(f"{scene.task} Which action tokens carry it out?", as_text(scene.fast.encode(chunk)[0]))]]


KINDS: dict[str, Callable[[_Scene], Groups]] = {
    "position": _position,
    "gripper": _gripper,
    "nearest": _nearest,
    "side": _side,
    "relative": _relative,
    "pointing": _pointing,
    "next action": _next_action,
    "action tokens": _action_tokens,
}
DEFAULT_KINDS = ("position", "gripper", "nearest", "side")  # what training has asked from the first version on
