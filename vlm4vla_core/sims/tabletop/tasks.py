"""Task families of the tabletop world: what can be asked, in which words, and when it is done.

A family is one `Family` entry: templates and held-out paraphrases, a step limit, when it fits a scene, and a vectorised
success test. An `Ask` is one request in one scene ("push object 2 left"); `goals` turns asks into the arrays that
success test and expert read.

Trap: directions are the camera's: left and right as the viewer sees them, forward is away from the viewer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.sims.tabletop import world
from vlm4vla_core.sims.tabletop.world import COLOURS, KINDS, PLATES, SLOTS, State

DIRECTIONS: dict[str, tuple[float, float, float]] = {
    "left": (-1.0, 0.0, 0.0),
    "right": (1.0, 0.0, 0.0),
    "forward": (0.0, 1.0, 0.0),
    "back": (0.0, -1.0, 0.0),
    "up": (0.0, 0.0, 1.0),
    "on": (1.0, 0.0, 0.0),  # of the switch's knob
    "off": (-1.0, 0.0, 0.0),
}
# Words in the templates, and others that no demonstration uses.
PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("to the left", "left"),
    "right": ("to the right", "right"),
    "forward": ("forward", "away from the camera"),
    "back": ("back", "towards the camera"),
    "up": ("up", "upwards"),
    "on": ("on",),
    "off": ("off",),
}
HELD_OUT_PHRASES: dict[str, tuple[str, ...]] = PHRASES | {
    "left": ("to the left side",),
    "right": ("to the right side",),
    "forward": ("to the far side",),
    "back": ("to the near side",),
    "up": ("higher",),
}
MOVE_ALONG, MOVE_ACROSS = 0.12, 0.08  # m, from where the gripper started
PUSH_ALONG, PUSH_ACROSS = 0.10, 0.07  # m, from where the object started
TOUCH_DISTANCE = 0.06  # m, from the gripper's point to the object's centre
PICK_HEIGHT = 0.10  # m, of the held object above the table, measured from where it would rest
ON_PLATE = 0.065  # m, from the object's centre to the plate's
SWITCHED = 0.03  # m, of the knob from its rail's middle
SWITCH_REACH = world.KNOB_TRAVEL + 0.08  # m to either side of its rail's middle: where a hand goes to shove the knob
SWITCH_ROOM = world.CONTACT + 0.015  # m from there to the centre of an object that is not in the way
_DROP_ROOM = 2 * world.FOOTPRINT + 0.005  # m
ROOM = 0.17  # m that a commanded motion has at least before the edge of the workspace


@dataclass(frozen=True)
class Ask:
    """One request. slot: the object, -1 for none. other: plate number or slot of the base, -1 for none."""

    family: str
    slot: int = -1
    other: int = -1
    direction: str = ""


@dataclass(frozen=True)
class Goal:
    """What n worlds are asked to do; rows match those of a `State`. A family of -1 asks for nothing and is done."""

    family: np.ndarray  # (n,) index into FAMILIES
    slot: np.ndarray  # (n,)
    other: np.ndarray  # (n,)
    direction: np.ndarray  # (n, 3) unit vector, 0 where the task has none
    gripper_start: np.ndarray  # (n, 3)
    objects_start: np.ndarray  # (n, SLOTS, 3)

    def __getitem__(self, rows: np.ndarray | slice | Sequence[int]) -> Goal:
        return Goal(*(getattr(self, field.name)[rows] for field in fields(self)))


def stack_goals(batches: Sequence[Goal]) -> Goal:
    """Batches side by side, as one batch."""
    return Goal(*(np.concatenate([getattr(goal, field.name) for goal in batches]) for field in fields(Goal)))


def goals(state: State, asks: Sequence[Ask | None]) -> Goal:
    """One ask per world, begun in these states; None asks for nothing."""
    asked = [ask or Ask("") for ask in asks]
    return Goal(
        np.array([TASKS.index(ask.family) if ask.family else -1 for ask in asked]),
        np.array([ask.slot for ask in asked]),
        np.array([ask.other for ask in asked]),
        np.array([DIRECTIONS.get(ask.direction, (0.0, 0.0, 0.0)) for ask in asked]),
        state.gripper.copy(),
        state.objects.copy(),
    )


@dataclass(frozen=True)
class Family:
    """One kind of task. In a template `{o}` is the object, `{p}` the plate or base, `{d}` a phrase for the direction.

    held_out: paraphrases that no demonstration uses. needs: what an ask names: "nothing", "object", "plate" (object and
    plate) or "base" (object and the one below). directions: those that can be asked for. fits: see `fits`, apart from
    what the hand holds. reached: (n,) bool success of worlds that all belong to this family.
    """

    templates: tuple[str, ...]
    held_out: tuple[str, ...]
    step_limit: int
    rule: str
    needs: str
    directions: tuple[str, ...]
    fits: Callable[[State, Ask], bool]
    reached: Callable[[State, Goal], np.ndarray]


# --- names and words ------------------------------------------------------------------------------------------


def describe_object(state: State, row: int, slot: int) -> str:
    """Name of an object, such as "red cube"."""
    return f"{COLOURS[state.colour[row, slot]]} {KINDS[state.kind[row, slot]]}"


def object_names(state: State, row: int) -> list[str]:
    """Names of the objects that are present, in slot order (present objects fill the first slots)."""
    return [describe_object(state, row, slot) for slot in range(SLOTS) if state.kind[row, slot] >= 0]


def plate_names(state: State, row: int) -> list[str]:
    """Names of the plates, such as "blue plate"; empty where there is none."""
    return [f"{COLOURS[colour]} plate" if colour >= 0 else "" for colour in state.plate_colour[row]]


def instruction(state: State, row: int, ask: Ask, rng: np.random.Generator, *, held_out: bool = False) -> str:
    """Words for an ask, drawn with `rng` from the family's templates, or from its held-out paraphrases."""
    family = FAMILIES[ask.family]
    template = str(rng.choice(family.held_out if held_out else family.templates))
    phrases = HELD_OUT_PHRASES if held_out else PHRASES
    return template.format(
        o=describe_object(state, row, ask.slot) if ask.slot >= 0 else "",
        p=_other_name(state, row, ask),
        d=str(rng.choice(phrases[ask.direction])) if ask.direction else "",
    )


def _other_name(state: State, row: int, ask: Ask) -> str:
    if ask.other < 0:
        return ""
    if FAMILIES[ask.family].needs == "plate":
        return plate_names(state, row)[ask.other]
    return describe_object(state, row, ask.other)


def all_asks(family: str, count: int, plates: int) -> Iterator[Ask]:
    """Every ask of a family that can be named with `count` objects and `plates` plates; whether it fits is open."""
    entry = FAMILIES[family]
    for direction in entry.directions or ("",):
        if entry.needs == "nothing":
            yield Ask(family, direction=direction)
            continue
        for slot in range(count):
            others = {"object": [-1], "plate": list(range(plates)), "base": [k for k in range(count) if k != slot]}
            for other in others[entry.needs]:
                yield Ask(family, slot, other, direction)


# --- success --------------------------------------------------------------------------------------------------


def along_across(moved: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parts of `moved` (n, 3) along and across `direction` (n, 3): two (n,) lengths, the first signed."""
    product = moved * direction
    along = product[:, 0] + product[:, 1] + product[:, 2]
    return along, world.length(moved - along[:, None] * direction)


def target_position(objects: np.ndarray, goal: Goal) -> np.ndarray:
    """(n, 3) of the target object, from (n, SLOTS, 3); slot 0 stands in where there is no target."""
    return objects[np.arange(len(objects)), np.maximum(goal.slot, 0)]


def plate_position(state: State, goal: Goal) -> np.ndarray:
    """(n, 2) of the plate asked for; plate 0 stands in where there is none."""
    return state.plate[np.arange(len(state)), np.clip(goal.other, 0, PLATES - 1)]


def _moved(state: State, goal: Goal) -> np.ndarray:
    along, across = along_across(state.gripper - goal.gripper_start, goal.direction)
    return (along > MOVE_ALONG) & (across < MOVE_ACROSS)


def _touched(state: State, goal: Goal) -> np.ndarray:
    return world.length(state.gripper - target_position(state.objects, goal)) < TOUCH_DISTANCE


def _pushed(state: State, goal: Goal) -> np.ndarray:
    shift = target_position(state.objects, goal) - target_position(goal.objects_start, goal)
    along, across = along_across(shift, goal.direction)
    return (along > PUSH_ALONG) & (across < PUSH_ACROSS) & (state.held != goal.slot)


def _picked(state: State, goal: Goal) -> np.ndarray:
    kind = state.kind[np.arange(len(state)), np.maximum(goal.slot, 0)]
    height = target_position(state.objects, goal)[:, 2] - world.rest_height(kind)
    return (state.held == goal.slot) & (height > PICK_HEIGHT)


def _placed(state: State, goal: Goal) -> np.ndarray:
    target = target_position(state.objects, goal)
    rows, slot = np.arange(len(state)), np.maximum(goal.slot, 0)
    lies = (state.held != goal.slot) & (state.on[rows, slot] < 0)
    return lies & (world.length(target[:, :2] - plate_position(state, goal)) < ON_PLATE)


def _stacked(state: State, goal: Goal) -> np.ndarray:
    on = state.on[np.arange(len(state)), np.maximum(goal.slot, 0)]
    return (on == goal.other) & (state.held != goal.slot)


def _switched(state: State, goal: Goal) -> np.ndarray:
    return (state.knob - state.rail) * goal.direction[:, 0] > SWITCHED


# --- does an ask fit a scene? ---------------------------------------------------------------------------------


def inside(point: np.ndarray) -> bool:
    """Whether a gripper's point (3,) lies in the workspace."""
    return bool((point >= world.WORKSPACE_LOW).all() and (point <= world.WORKSPACE_HIGH).all())


def _distances(state: State, point: np.ndarray, but: int = -1) -> np.ndarray:
    """(SLOTS,) horizontal distances of the present objects from a point; infinite for absent ones and `but`."""
    apart = world.length(state.objects[0, :, :2] - point[:2])
    return np.where((state.kind[0] >= 0) & (np.arange(SLOTS) != but), apart, np.inf)


def _free(state: State, slot: int) -> bool:
    """Nothing stands on the object."""
    return bool((state.on[0] != slot).all())


def fits(state: State, ask: Ask) -> bool:
    """Whether an ask can be carried out in a world (row 0 of a batch of one), and is not done already.

    A hand that holds something else will let it go first: there must be nothing where it falls.
    """
    held = int(state.held[0])
    if held >= 0 and held != ask.slot and _distances(state, state.objects[0, held], but=held).min() < _DROP_ROOM:
        return False
    return FAMILIES[ask.family].fits(state, ask)


def _fits_move(state: State, ask: Ask) -> bool:
    return inside(state.gripper[0] + ROOM * np.array(DIRECTIONS[ask.direction]))


def _fits_touch(state: State, ask: Ask) -> bool:
    far = world.length(state.gripper[0] - state.objects[0, ask.slot]) > 2 * TOUCH_DISTANCE
    return bool(far and state.held[0] != ask.slot)


def _fits_push(state: State, ask: Ask) -> bool:
    """On the table with nothing on top; the hand fits behind it, the way ahead is inside and nothing is in it."""
    target, direction = state.objects[0, ask.slot], np.array(DIRECTIONS[ask.direction])
    if state.on[0, ask.slot] >= 0 or state.held[0] == ask.slot or not _free(state, ask.slot):
        return False
    if not (inside(target - (world.CONTACT + 0.04) * direction) and inside(target + ROOM * direction)):
        return False
    knob = np.array([state.rail[0], world.SWITCH_Y, 0.0])
    others = [state.objects[0, k] for k in range(SLOTS) if k != ask.slot and state.kind[0, k] >= 0]
    for other, room in [*((other, 0.11) for other in others), (knob, 0.11 + world.KNOB_TRAVEL)]:
        along, across = along_across((other - target)[None], direction[None])
        if -0.20 < along[0] < 0.26 and across[0] < room:
            return False
    return _fits_touch(state, ask)


def _fits_pick(state: State, ask: Ask) -> bool:
    return bool(state.held[0] != ask.slot) and _free(state, ask.slot) and _roomy(state, ask.slot)


def _fits_put(state: State, ask: Ask) -> bool:
    plate = state.plate[0, ask.other]
    if state.plate_colour[0, ask.other] < 0 or not _free(state, ask.slot) or not _roomy(state, ask.slot):
        return False
    taken = _distances(state, plate, but=ask.slot).min() < world.PLATE_RADIUS + world.FOOTPRINT + 0.01
    there = world.length(state.objects[0, ask.slot, :2] - plate) < 2 * ON_PLATE
    return not taken and not bool(there)


def _fits_stack(state: State, ask: Ask) -> bool:
    base = ask.other
    flat = bool(world.FLAT_TOP[state.kind[0, base]]) and state.on[0, base] < 0 and state.held[0] != base
    return flat and _free(state, ask.slot) and _free(state, base) and _roomy(state, ask.slot)


def _roomy(state: State, slot: int) -> bool:
    """The open hand can go round the object without its grasp being nearer to another one."""
    return bool(_distances(state, state.objects[0, slot], but=slot).min() > 0.09 or state.on[0, slot] >= 0)


def _fits_switch(state: State, ask: Ask) -> bool:
    """Not set already, and nothing stands where the hand goes."""
    wanted = DIRECTIONS[ask.direction][0]
    if (state.knob[0] - state.rail[0]) * wanted > 0:
        return False
    beside = np.clip(state.objects[0, :, 0], state.rail[0] - SWITCH_REACH, state.rail[0] + SWITCH_REACH)
    nearest = np.stack([beside, np.full(SLOTS, world.SWITCH_Y)], 1)  # (SLOTS, 2) of the hand's way, to each object
    apart = world.length(state.objects[0, :, :2] - nearest)
    return bool((apart > SWITCH_ROOM)[state.kind[0] >= 0].all())


FAMILIES: dict[str, Family] = {
    "move": Family(
        ("move the gripper {d}", "shift the gripper {d}", "move the robot hand {d}"),
        ("slide the robot gripper {d}",),
        12,
        f"gripper displaced more than {MOVE_ALONG} m along and less than {MOVE_ACROSS} m across, from the start",
        "nothing",
        ("left", "right", "forward", "back", "up"),
        _fits_move,
        _moved,
    ),
    "touch": Family(
        ("touch the {o}", "reach for the {o}", "move the gripper to the {o}"),
        ("tap the {o}", "go to the {o}"),
        20,
        f"gripper's point less than {TOUCH_DISTANCE} m from the object's centre",
        "object",
        (),
        _fits_touch,
        _touched,
    ),
    "push": Family(
        ("push the {o} {d}", "slide the {o} {d}", "shove the {o} {d}"),
        ("sweep the {o} {d}", "shift the {o} {d}"),
        40,
        f"object displaced more than {PUSH_ALONG} m along and less than {PUSH_ACROSS} m across, from the start, "
        "and not held",
        "object",
        ("left", "right", "forward", "back"),
        _fits_push,
        _pushed,
    ),
    "pick": Family(
        ("pick up the {o}", "lift the {o}", "grasp the {o} and raise it"),
        ("take the {o}", "raise the {o}"),
        26,
        f"object held more than {PICK_HEIGHT} m above where it rests on the table",
        "object",
        (),
        _fits_pick,
        _picked,
    ),
    "put": Family(
        ("put the {o} on the {p}", "place the {o} on the {p}", "move the {o} to the {p}"),
        ("set the {o} down on the {p}", "bring the {o} to the {p}"),
        40,
        f"object let go on the table less than {ON_PLATE} m from the plate's centre",
        "plate",
        (),
        _fits_put,
        _placed,
    ),
    "stack": Family(
        ("stack the {o} on the {p}", "put the {o} on top of the {p}", "place the {o} on top of the {p}"),
        ("set the {o} on the {p}", "put the {o} onto the {p}"),
        50,
        "object let go and standing on the other one",
        "base",
        (),
        _fits_stack,
        _stacked,
    ),
    "switch": Family(
        ("turn {d} the light", "switch the light {d}", "turn the light {d}"),
        ("switch {d} the lamp", "turn the lamp {d}"),
        36,
        f"knob more than {SWITCHED} m from its rail's middle on the side asked for (right is on)",
        "nothing",
        ("on", "off"),
        _fits_switch,
        _switched,
    ),
}
TASKS = tuple(FAMILIES)


def check_task(task: str) -> None:
    """Raise InputError unless `task` is a known family."""
    if task not in FAMILIES:
        raise InputError(f"the tabletop world has no task '{task}'", fix=nearest(task, FAMILIES))


def success(state: State, goal: Goal) -> np.ndarray:
    """(n,) bool: the goal holds now. What counts over an episode is the benchmark's success rule."""
    done = goal.family < 0
    for index, family in enumerate(FAMILIES.values()):
        rows = np.flatnonzero(goal.family == index)
        if len(rows):
            done[rows] = family.reached(state[rows], goal[rows])
    return done
