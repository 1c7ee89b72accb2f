"""Task families of the tabletop world: initial states, instructions, success, step limits.

A family is one `Family` entry: templates, a step limit, a sampler of one start, and a vectorised success test.
`start(task, seed)` is a pure function, so an episode is fixed by its task and its seed alone.

Trap: directions are the camera's: left and right as the viewer sees them, forward is away from the viewer.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.sims.tabletop import world
from vlm4vla_core.sims.tabletop.world import COLOURS, KINDS, SLOTS, State

DIRECTIONS: dict[str, tuple[np.ndarray, tuple[str, ...]]] = {
    "left": (np.array([-1.0, 0.0, 0.0]), ("to the left", "left")),
    "right": (np.array([1.0, 0.0, 0.0]), ("to the right", "right")),
    "forward": (np.array([0.0, 1.0, 0.0]), ("forward", "away from the camera")),
    "back": (np.array([0.0, -1.0, 0.0]), ("back", "towards the camera")),
    "up": (np.array([0.0, 0.0, 1.0]), ("up", "upwards")),
}
MOVE_ALONG, MOVE_ACROSS = 0.12, 0.08  # m, from where the gripper started
PUSH_ALONG, PUSH_ACROSS = 0.10, 0.07  # m, from where the object started
TOUCH_DISTANCE = 0.06  # m, from the gripper's point to the object's centre
LIFT_HEIGHT = 0.10  # m, of the held object above where it rests
ROOM = 0.17  # m that a commanded motion has at least before the edge of the workspace
_SPACING = 0.16  # m between the centres of objects at the start


@dataclass(frozen=True)
class Goal:
    """What n worlds are asked to do; rows match those of a `State`."""

    family: np.ndarray  # (n,) index into FAMILIES
    slot: np.ndarray  # (n,) target object, -1 where the task has none
    direction: np.ndarray  # (n, 3) unit vector, 0 where the task has none
    gripper_start: np.ndarray  # (n, 3)
    objects_start: np.ndarray  # (n, SLOTS, 3)

    def __getitem__(self, rows: np.ndarray | slice | Sequence[int]) -> Goal:
        return Goal(*(getattr(self, field.name)[rows] for field in fields(self)))


def stack_goals(goals: Sequence[Goal]) -> Goal:
    """Batches side by side, as one batch."""
    return Goal(*(np.concatenate([getattr(goal, field.name) for goal in goals]) for field in fields(Goal)))


@dataclass(frozen=True)
class Start:
    """One episode before its first step: a batch of one world, its goal, and the instruction."""

    state: State
    goal: Goal
    instruction: str


@dataclass(frozen=True)
class Family:
    """One kind of task. `{o}` in a template becomes the object's name, `{d}` a phrase for the direction.

    directions: those that can be asked for. needs_object: whether a target object is drawn.
    fits: whether a drawn (state, slot, direction) gives the task room and does not solve it already.
    reached: (n,) bool success of worlds that all belong to this family.
    """

    templates: tuple[str, ...]
    step_limit: int
    rule: str
    directions: tuple[str, ...]
    needs_object: bool
    fits: Callable[[State, int, np.ndarray], bool]
    reached: Callable[[State, Goal], np.ndarray]


def describe_object(state: State, row: int, slot: int) -> str:
    """Name of an object, such as "red cube"."""
    return f"{COLOURS[state.colour[row, slot]]} {KINDS[state.kind[row, slot]]}"


def object_names(state: State, row: int) -> list[str]:
    """Names of the objects that are present, in slot order (present objects fill the first slots)."""
    return [describe_object(state, row, slot) for slot in range(SLOTS) if state.kind[row, slot] >= 0]


# --- success and fit of each family -----------------------------------------------------------------------


def _split(moved: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parts of `moved` (n, 3) along and across `direction` (n, 3): two (n,) lengths, the first signed."""
    product = moved * direction
    along = product[:, 0] + product[:, 1] + product[:, 2]
    return along, world.length(moved - along[:, None] * direction)


def target_position(objects: np.ndarray, goal: Goal) -> np.ndarray:
    """(n, 3) of the target object, from (n, SLOTS, 3); slot 0 stands in where there is no target."""
    return objects[np.arange(len(objects)), np.maximum(goal.slot, 0)]


def _moved(state: State, goal: Goal) -> np.ndarray:
    along, across = _split(state.gripper - goal.gripper_start, goal.direction)
    return (along > MOVE_ALONG) & (across < MOVE_ACROSS)


def _touched(state: State, goal: Goal) -> np.ndarray:
    return world.length(state.gripper - target_position(state.objects, goal)) < TOUCH_DISTANCE


def _pushed(state: State, goal: Goal) -> np.ndarray:
    shift = target_position(state.objects, goal) - target_position(goal.objects_start, goal)
    along, across = _split(shift, goal.direction)
    return (along > PUSH_ALONG) & (across < PUSH_ACROSS) & (state.held != goal.slot)


def _lifted(state: State, goal: Goal) -> np.ndarray:
    kind = state.kind[np.arange(len(state)), np.maximum(goal.slot, 0)]
    height = target_position(state.objects, goal)[:, 2] - world.rest_height(kind)
    return (state.held == goal.slot) & (height > LIFT_HEIGHT)


def _inside(point: np.ndarray) -> bool:
    return bool((point >= world.WORKSPACE_LOW).all() and (point <= world.WORKSPACE_HIGH).all())


def _fits_move(state: State, slot: int, direction: np.ndarray) -> bool:
    return _inside(state.gripper[0] + ROOM * direction)


def _fits_object(state: State, slot: int, direction: np.ndarray) -> bool:
    return bool(world.length(state.gripper[0] - state.objects[0, slot]) > 2 * TOUCH_DISTANCE)


def _fits_push(state: State, slot: int, direction: np.ndarray) -> bool:
    """The hand fits behind the object, the way ahead is inside the workspace, and no other object stands there."""
    target = state.objects[0, slot]
    behind, ahead = target - (world.CONTACT + 0.04) * direction, target + ROOM * direction
    if not (_inside(behind) and _inside(ahead)):
        return False
    for other in range(SLOTS):
        if other != slot and state.kind[0, other] >= 0:
            along, across = _split((state.objects[0, other] - target)[None], direction[None])
            if -0.20 < along[0] < 0.26 and across[0] < 0.11:
                return False
    return _fits_object(state, slot, direction)


FAMILIES: dict[str, Family] = {
    "move": Family(
        ("move the gripper {d}", "shift the gripper {d}", "move the robot hand {d}"),
        12,
        f"gripper displaced more than {MOVE_ALONG} m along and less than {MOVE_ACROSS} m across, from the start",
        ("left", "right", "forward", "back", "up"),
        False,
        _fits_move,
        _moved,
    ),
    "touch": Family(
        ("touch the {o}", "reach for the {o}", "move the gripper to the {o}"),
        20,
        f"gripper's point less than {TOUCH_DISTANCE} m from the object's centre",
        (),
        True,
        _fits_object,
        _touched,
    ),
    "push": Family(
        ("push the {o} {d}", "slide the {o} {d}", "shove the {o} {d}"),
        36,
        f"object displaced more than {PUSH_ALONG} m along and less than {PUSH_ACROSS} m across, from the start, "
        "and not held",
        ("left", "right", "forward", "back"),
        True,
        _fits_push,
        _pushed,
    ),
    "lift": Family(
        ("pick up the {o}", "lift the {o}", "grasp the {o} and raise it"),
        26,
        f"object held more than {LIFT_HEIGHT} m above where it rests",
        (),
        True,
        _fits_object,
        _lifted,
    ),
}
TASKS = tuple(FAMILIES)


def check_task(task: str) -> None:
    """Raise InputError unless `task` is a known family."""
    if task not in FAMILIES:
        raise InputError(f"the tabletop world has no task '{task}'", fix=nearest(task, FAMILIES))


def success(state: State, goal: Goal) -> np.ndarray:
    """(n,) bool: the goal holds now. What counts over an episode is the benchmark's success rule."""
    done = np.zeros(len(state), bool)
    for index, family in enumerate(FAMILIES.values()):
        rows = np.flatnonzero(goal.family == index)
        if len(rows):
            done[rows] = family.reached(state[rows], goal[rows])
    return done


# --- initial states -----------------------------------------------------------------------------------------


def start(task: str, seed: int) -> Start:
    """The initial state, goal and instruction of one episode; a pure function of (task, seed).

    The direction and the objects are drawn first and the poses are redrawn until the task fits, so directions
    are equally frequent and start poses cover all of the workspace that leaves the task room.
    Raises InputError on an unknown task.
    """
    check_task(task)
    family = FAMILIES[task]
    rng = np.random.default_rng(np.random.SeedSequence([zlib.crc32(task.encode()), seed]))
    name = rng.choice(family.directions) if family.directions else ""
    direction = DIRECTIONS[name][0] if name else np.zeros(3)
    count = int(rng.integers(2, SLOTS + 1))
    slot = int(rng.integers(count)) if family.needs_object else -1
    colours = rng.permutation(len(COLOURS))
    kind = np.full((1, SLOTS), -1)
    kind[0, :count] = rng.integers(len(KINDS), size=count)
    has_plate = bool(rng.random() < 0.5)
    while True:
        state = _draw(rng, kind, colours, has_plate)
        if state is not None and family.fits(state, slot, direction):
            break
    goal = Goal(np.array([TASKS.index(task)]), np.array([slot]), direction[None].copy(), state.gripper, state.objects)
    template = str(rng.choice(family.templates))
    phrase = str(rng.choice(DIRECTIONS[name][1])) if name else ""
    words = template.format(o=describe_object(state, 0, slot) if slot >= 0 else "", d=phrase)
    return Start(state, goal, words)


def _draw(rng: np.random.Generator, kind: np.ndarray, colours: np.ndarray, has_plate: bool) -> State | None:
    """One world with random poses; None when objects stand too close together."""
    low, high = world.WORKSPACE_LOW, world.WORKSPACE_HIGH
    present = kind >= 0
    objects = np.full((1, SLOTS, 3), -1.0)
    xy = rng.uniform(low[:2] + 0.04, high[:2] - 0.04, size=(SLOTS, 2))
    objects[0, :, :2] = np.where(present[0][:, None], xy, -1.0)
    objects[..., 2] = np.where(present, world.rest_height(kind), -1.0)
    gripper = rng.uniform([low[0], low[1], 0.08], high)[None]
    yaw, object_yaw = rng.uniform(-0.6, 0.6, size=1), rng.uniform(-np.pi / 4, np.pi / 4, size=(1, SLOTS))
    plate = rng.uniform(low[:2] + 0.06, high[:2] - 0.06)[None]
    for i in range(SLOTS):
        for j in range(i + 1, SLOTS):
            if present[0, i] and present[0, j] and world.length(objects[0, i] - objects[0, j]) < _SPACING:
                return None
    return State(
        gripper=gripper,
        yaw=yaw,
        open=np.ones(1, bool),
        objects=objects,
        object_yaw=object_yaw,
        kind=kind.copy(),
        colour=colours[None, :SLOTS].copy(),
        held=np.array([-1]),
        plate=plate,
        plate_colour=np.array([colours[SLOTS] if has_plate else -1]),
    )
