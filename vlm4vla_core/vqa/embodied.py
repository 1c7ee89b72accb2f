"""Questions about the scene with known answers, made from what a store records: the language objective's data.

Every store with a gripper state gives "where is the gripper" (in thirds of the store's own range), "is it open", how it
has moved since an earlier picture, and the next action in words or as a choice; with a FAST tokenizer also the next
chunk as action tokens. A store with true object positions (`truth/objects`) gives questions about objects; where the
camera's projection is known (the tabletop world), also points, the gripper's way in the picture, and the questions of
`general`. `MIXES` names what belongs together: general, embodied, and parts of it after the paper's auxiliary tasks.

Trap: answers come from the state, not from the picture. A gripper hidden from the camera still has an answer, and
thirds are of this store, so accuracies of two stores do not compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.vqa.general import GENERAL, Groups, Sight

if TYPE_CHECKING:
    from vlm4vla_core.episodes.store import EpisodeStore
    from vlm4vla_core.fast import FastTokenizer
    from vlm4vla_core.sims.tabletop.looks import Camera

OBJECTS, PLATES, HELD = "truth/objects", "truth/plates", "truth/held"
CLEARLY = 0.03  # m; objects closer than this along an axis are on neither side of one another
AHEAD = 4  # steps whose motion is "what the robot does next", and between the points of a way
EARLIER, POINTS = 6, 4  # steps back to the earlier of two pictures; most points of a way
_ABSENT = -0.99  # coordinates below this mean that the slot is empty
_VIEW = "x to the right, y away from the camera, z up"  # a frame in which the axes are the viewer's
_WORDS = {
    "x": ("left", "middle", "right"),
    "y": ("near", "middle", "far"),
    "z": ("low", "middle", "high"),
}
_SIDES = ((0, "left or right of", ("left", "right")), (1, "in front of or behind", ("in front", "behind")))
_STEPS, _FAR = (0.03, 0.08, 0.16), ("", "slightly ", "", "far ")  # m, and the words from each on
_WAYS = {"x": ("left", "right"), "y": ("back", "forward"), "z": ("down", "up")}


class Question(NamedTuple):
    """One question about one row's picture, its answer, and which of `KINDS` it is.

    earlier: the row whose picture stands left of the row's own (see `pictures`); -1 for the row's own alone.
    """

    question: str
    answer: str
    kind: str
    earlier: int = -1


class NothingToAsk(InputError):
    """These kinds can be asked about the store, but not about this row."""


class _Facts(NamedTuple):
    """Per store, computed once: columns and thresholds. thirds: axis -> the two bounds (m)."""

    columns: dict[str, int]
    missing: str  # why nothing can be asked about the gripper; empty when something can
    thirds: dict[str, np.ndarray]
    halfway: float | None  # gripper value between closed and open; None when it never changes
    stride: float  # usual largest translation of one step
    viewer: bool
    objects: np.ndarray | None  # (N, slots, 3)
    plates: np.ndarray | None  # (N, plates, 2)
    names: list[list[str]]  # per episode
    info: dict[str, list[str]]  # what the table of episodes says, per episode


@lru_cache(maxsize=8)
def _facts(store: EpisodeStore) -> _Facts:
    columns = {name: index for index, name in enumerate(store.state_names)}
    missing, state = [axis for axis in (*_WORDS, "gripper") if axis not in columns], store.state
    reason = f"the store does not name {', '.join(missing)}; its state is named {', '.join(columns)}" if missing else ""
    if "task" in store.episodes and (store.episodes["task"] == "scene").any():
        reason = "its pictures show no gripper"
    thirds = {axis: np.quantile(state[:, columns[axis]], [1 / 3, 2 / 3]) for axis in _WORDS if not missing}
    gripper = state[:, columns["gripper"]] if not missing else np.zeros(1)
    low, high = float(gripper.min()), float(gripper.max())
    objects, plates, names = None, None, []
    if PLATES in store.manifest["columns"]:
        plates = store.column(PLATES).reshape(len(store), -1, 2)
    if OBJECTS in store.manifest["columns"] and "objects" in store.episodes:
        objects = store.column(OBJECTS).reshape(len(store), -1, 3)
        names = [[name for name in text.split(";") if name] for text in store.episodes["objects"]]
    halfway = (low + high) / 2 if high > low else None
    stride = float(np.median(np.abs(store.action[:, :3]).max(1)))
    told = ("domain", "plates", "family", "target", "task")
    info = {name: store.episodes[name].astype(str).to_list() for name in told if name in store.episodes}
    viewer = _VIEW in store.convention.frame
    return _Facts(columns, reason, thirds, halfway, stride, viewer, objects, plates, names, info)


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
        return f'The task is "{self.store.instructions[self.episode]}".'

    @property
    def episode(self) -> int:
        return int(self.store.episode_of[self.row])

    def info(self, name: str) -> str:
        """What the store's table of episodes says, "" where it says nothing."""
        return self.facts.info[name][self.episode] if name in self.facts.info else ""

    def places(self) -> dict[str, np.ndarray]:
        """Name and position (3,) of every object that is present."""
        assert self.facts.objects is not None
        listed = zip(self.facts.names[self.episode], self.facts.objects[self.row], strict=False)
        return {name: place for name, place in listed if place.min() > _ABSENT}

    @cached_property
    def sight(self) -> Sight:
        """What lies where, for questions of `general`."""
        assert self.view is not None
        places, plates = self.places(), tuple(name for name in self.info("plates").split(";") if name)
        spots = self.facts.plates[self.row] if self.facts.plates is not None else np.zeros((0, 2))
        return Sight(tuple(places), np.array(list(places.values())), plates, spots[: len(plates)], self.view)


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

    kinds: of `KINDS`, or names of `MIXES`; by default position, gripper, nearest and side, of a store of scenes the
    general mix. What the store does not allow is passed over (`availability` says why). camera: that of pointing
    (default: the first). fast: the tokenizer of action tokens. The picture to show is that of `pictures`.
    Raises InputError with the reasons when nothing can be asked, NothingToAsk when only of this row, and on unknown
    kinds.
    """
    return several(store, row, rng, 1, kinds=kinds, camera=camera, fast=fast)[0]


def several(
    store: EpisodeStore,
    row: int,
    rng: np.random.Generator,
    count: int,
    *,
    kinds: Sequence[str] = (),
    camera: str = "",
    fast: FastTokenizer | None = None,
) -> list[Question]:
    """At most `count` questions about the picture at `row`, no two with the same words; the rest as `questions`.

    Where there is a choice, several are about the row's own picture alone.
    """
    reasons = availability(store, camera=camera, fast=fast)
    plain = all(reasons[kind] for kind in DEFAULT_KINDS) and not any(reasons[kind] for kind in GENERAL)
    kinds = expand(kinds) or (tuple(GENERAL) if plain else DEFAULT_KINDS)
    if all(reasons[kind] for kind in kinds):
        what = f"no questions of kind {', '.join(kinds)}: {'; '.join(dict.fromkeys(reasons[kind] for kind in kinds))}"
        raise InputError(what, where=store.path, fix="ask other kinds")
    scene = _Scene(store, int(row), _facts(store), _view(store, int(row), camera), fast)
    made = [(kind, group) for kind in kinds if not reasons[kind] for group in KINDS[kind](scene) if group]
    if not made:
        raise NothingToAsk(
            f"row {row} has no question of kind {', '.join(kinds)}", where=store.path, fix="ask more kinds"
        )
    if count > 1:
        made = [one for one in made if one[0] != "moved"] or made[:1]
    drawn: list[Question] = []
    while made and len(drawn) < count:
        number = rng.integers(len(made))
        kind, group = made[number]
        words, answer = group[rng.integers(len(group))]
        drawn.append(Question(words, answer, kind, _earlier(scene) if kind == "moved" else -1))
        if len(drawn) < count:
            left = [(kind, [one for one in group if one[0] != words]) for kind, group in made]
            made = [(kind, group) for kind, group in left if group]
    return drawn


def expand(kinds: Sequence[str]) -> tuple[str, ...]:
    """Kinds and names of `MIXES` as kinds, each once. Raises InputError on a name that is neither."""
    for name in kinds:
        if name not in KINDS and name not in MIXES:
            raise InputError(f"no questions of kind '{name}'", fix=nearest(name, (*KINDS, *MIXES)))
    return tuple(dict.fromkeys(kind for name in kinds for kind in MIXES.get(name, (name,))))


def beside(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Two pictures uint8 (H, W, 3) side by side in one of the same size: neighbouring columns are averaged."""
    both = np.concatenate([before, now], 1).reshape(*now.shape[:2], 2, 3)
    return both.mean(2).round().astype(np.uint8)


def pictures(
    store: EpisodeStore,
    camera: str,
    rows: Sequence[int] | np.ndarray,
    asked: Sequence[Question],
    size: int | None = None,
) -> np.ndarray:
    """The pictures that questions about `rows` are asked of: uint8 (n, size, size, 3), or as they are stored.

    Of two moments, the earlier picture is the left half and the row's own the right half, each narrowed by half.
    """
    shown = store.images(camera, rows, size)
    for i, question in enumerate(asked):
        if question.earlier >= 0:
            before = store.images(camera, [question.earlier], size)[0]
            shown[i] = beside(before, shown[i])
    return shown


@lru_cache(maxsize=8)
def availability(store: EpisodeStore, *, camera: str = "", fast: FastTokenizer | None = None) -> dict[str, str]:
    """Why a kind cannot be asked about this store at all, for each kind; empty where it can."""
    facts = _facts(store)
    placed = "" if facts.objects is not None else "the store does not record where objects are"
    objects = facts.missing or placed
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
        "offset": objects or viewer,
        "pointing": objects or known,
        "moved": facts.missing or motion,
        "next action": facts.missing or motion,
        "choice": facts.missing or motion,
        "plan": facts.missing
        or ("" if HELD in store.manifest["columns"] else "the store does not record what is held"),
        "trajectory": facts.missing or known,
        "action tokens": tokens,
        **dict.fromkeys(GENERAL, placed or known),
    }


def _view(store: EpisodeStore, row: int, camera: str) -> Camera | None:
    """The camera whose projection is known: that of the tabletop world."""
    from vlm4vla_core.sims.tabletop.looks import LOOKS

    if store.manifest["source"] != "tabletop" or (camera or store.cameras[0]) != "front":
        return None
    look = LOOKS.get(_facts(store).info["domain"][store.episode_of[row]])
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


def _offset(scene: _Scene) -> Groups:
    made = []
    for name, place in scene.places().items():
        apart = list(zip("xyz", place - scene.gripper, strict=True))
        told = [(int(np.searchsorted(_STEPS, abs(value))), _WAYS[axis][int(value > 0)]) for axis, value in apart]
        words = [f"{_FAR[far]}{way}" if far else "near" for far, way in told]
        made.append((f"Which way is the {name} from the gripper?", ", ".join(words)))
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


def _earlier(scene: _Scene) -> int:
    return max(int(scene.store.starts[scene.episode]), scene.row - EARLIER)


def _moved(scene: _Scene) -> Groups:
    """Of two pictures, the left one earlier: which way the gripper went, and whether an object was moved."""
    store, before = scene.store, _earlier(scene)
    columns = [scene.facts.columns[axis] for axis in "xyz"]
    offset = store.state[scene.row][columns] - store.state[before][columns]
    axis = int(np.abs(offset).argmax())
    first = "The left picture is earlier. "
    way, still = [], []
    if abs(offset[axis]) > CLEARLY:
        way.append((f"{first}Which way did the gripper move?", _way(scene, axis, offset[axis])))
    if scene.facts.objects is not None and before < scene.row:
        shift = np.linalg.norm(scene.facts.objects[scene.row] - scene.facts.objects[before], axis=1)
        for name, moved in zip(scene.places(), shift, strict=False):
            if moved < 0.001 or moved > CLEARLY:
                still.append((f"{first}Did the {name} move, yes or no?", "yes" if moved > CLEARLY else "no"))
    return [way, [one for one in still if one[1] == "yes"] or still]


def _way(scene: _Scene, axis: int, value: float) -> str:
    way = int(value > 0)
    return _WAYS["xyz"[axis]][way] if scene.facts.viewer else "along " + "-+"[way] + "xyz"[axis]


def _plan(scene: _Scene) -> Groups:
    """The steps that are left of picking up, putting or stacking, from what the hand holds."""
    family, target, names = scene.info("family"), scene.info("target"), scene.facts.names[scene.episode]
    last = {"pick": "lift it", "put": "carry it, let it go", "stack": "carry it, let it go"}
    if family not in last or scene.info("task") not in (family, "chain") or target not in names:
        return []
    held = int(scene.store.column(HELD)[scene.row, 0])
    steps = [] if held < 0 or names[held] == target else [f"let the {names[held]} go"]
    steps += [] if held >= 0 and names[held] == target else [f"grasp the {target}"]
    return [[(f"{scene.task} What are the next steps?", ", ".join([*steps, last[family]]))]]


def _trajectory(scene: _Scene) -> Groups:
    assert scene.view is not None
    end = int(scene.store.starts[scene.episode] + scene.store.lengths[scene.episode])
    rows = np.arange(scene.row + AHEAD, min(end, scene.row + POINTS * AHEAD + 1), AHEAD)
    spots, _ = scene.view.project(scene.store.state[rows][:, [scene.facts.columns[axis] for axis in "xyz"]])
    if not len(rows) or not ((spots >= 0) & (spots <= 1)).all():
        return []
    listed = ", ".join(f"({x:.3f}, {y:.3f})" for x, y in spots)
    return [
        [(f"{scene.task} Through which points does the gripper go, as fractions of width and height?", f"[{listed}]")]
    ]


def _choice(scene: _Scene) -> Groups:
    """The next action among four, by letter; the right one stands at each letter in turn."""
    ((question, right),) = _next_action(scene)[0]
    ways = [f"move {_way(scene, axis, sign)}" for axis in range(3) for sign in (-1.0, 1.0)]
    others = [one for one in (*ways, "stay", "open the gripper", "close the gripper") if one != right]
    picked = np.random.default_rng([scene.row, 4]).permutation(others)[:3].tolist()
    made = []
    for place, letter in enumerate("ABCD"):
        options = [*picked[:place], right, *picked[place:]]
        listing = "\n".join(f"{mark}. {option}" for mark, option in zip("ABCD", options, strict=True))
        made.append((f"{question}\n{listing}\nAnswer with a letter.", letter))
    return [made]


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
        answer = f"move {_way(scene, axis, motion[axis])}"
    return [[(f"{scene.task} What does the robot do next?", answer)]]


def _action_tokens(scene: _Scene) -> Groups:
    from vlm4vla_core.episodes.sampling import action_chunks
    from vlm4vla_core.fast import as_text

    assert scene.fast is not None
    store, rows = scene.store, np.array([scene.row])
    chunk, _ = action_chunks(store.action, store.episode_of, rows, scene.fast.horizon)
    return [[(f"{scene.task} Which action tokens carry it out?", as_text(scene.fast.encode(chunk)[0]))]]


def _seen(ask: Callable[[Sight], Groups]) -> Callable[[_Scene], Groups]:
    return lambda scene: ask(scene.sight)


KINDS: dict[str, Callable[[_Scene], Groups]] = {
    "position": _position,
    "gripper": _gripper,
    "nearest": _nearest,
    "side": _side,
    "relative": _relative,
    "offset": _offset,
    "pointing": _pointing,
    "moved": _moved,
    "next action": _next_action,
    "choice": _choice,
    "plan": _plan,
    "trajectory": _trajectory,
    "action tokens": _action_tokens,
    **{kind: _seen(ask) for kind, ask in GENERAL.items()},
}
DEFAULT_KINDS = ("position", "gripper", "nearest", "side")  # what training has asked from the first version on
_EMBODIED = tuple(kind for kind in KINDS if kind not in GENERAL and kind != "action tokens")
MIXES: dict[str, tuple[str, ...]] = {
    "general": tuple(GENERAL),
    "embodied": _EMBODIED,
    "all": (*GENERAL, *_EMBODIED),
    "spatial": ("position", "nearest", "side", "relative", "offset", "moved"),
    "planning": ("pointing", "plan", "trajectory"),
}
