"""Task families of the tabletop world: what can be asked, in which words, and when it is done.

A family is one `Family` entry: templates and held-out paraphrases, a step limit, when it fits a scene (`fitting`) and
a vectorised success test (`rules`). An `Ask` is one request in one scene ("push object 2 left"); `goals` turns asks
into the arrays that success test and expert read.

Trap: directions are the camera's: left and right as the viewer sees them, forward is away from the viewer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.sims.tabletop import world
from vlm4vla_core.sims.tabletop.fitting import (
    distances,
    fits_move,
    fits_pick,
    fits_push,
    fits_put,
    fits_stack,
    fits_switch,
    fits_touch,
)
from vlm4vla_core.sims.tabletop.rules import (
    DIRECTIONS,
    MOVE_ACROSS,
    MOVE_ALONG,
    ON_PLATE,
    PICK_HEIGHT,
    PUSH_ACROSS,
    PUSH_ALONG,
    SWITCHED,
    TOUCH_DISTANCE,
    Ask,
    Goal,
    moved,
    picked,
    placed,
    pushed,
    stacked,
    switched,
    touched,
)
from vlm4vla_core.sims.tabletop.world import COLOURS, KINDS, SLOTS, State

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
_DROP_ROOM = 2 * world.FOOTPRINT + 0.005  # m


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


# --- does an ask fit a scene? ---------------------------------------------------------------------------------


def fits(state: State, ask: Ask) -> bool:
    """Whether an ask can be carried out in a world (row 0 of a batch of one), and is not done already.

    A hand that holds something else will let it go first: there must be nothing where it falls.
    """
    held = int(state.held[0])
    if held >= 0 and held != ask.slot and distances(state, state.objects[0, held], but=held).min() < _DROP_ROOM:
        return False
    return FAMILIES[ask.family].fits(state, ask)


FAMILIES: dict[str, Family] = {
    "move": Family(
        ("move the gripper {d}", "shift the gripper {d}", "move the robot hand {d}"),
        ("slide the robot gripper {d}",),
        12,
        f"gripper displaced more than {MOVE_ALONG} m along and less than {MOVE_ACROSS} m across, from the start",
        "nothing",
        ("left", "right", "forward", "back", "up"),
        fits_move,
        moved,
    ),
    "touch": Family(
        ("touch the {o}", "reach for the {o}", "move the gripper to the {o}"),
        ("tap the {o}", "go to the {o}"),
        20,
        f"gripper's point less than {TOUCH_DISTANCE} m from the object's centre",
        "object",
        (),
        fits_touch,
        touched,
    ),
    "push": Family(
        ("push the {o} {d}", "slide the {o} {d}", "shove the {o} {d}"),
        ("sweep the {o} {d}", "shift the {o} {d}"),
        40,
        f"object displaced more than {PUSH_ALONG} m along and less than {PUSH_ACROSS} m across, from the start, "
        "and not held",
        "object",
        ("left", "right", "forward", "back"),
        fits_push,
        pushed,
    ),
    "pick": Family(
        ("pick up the {o}", "lift the {o}", "grasp the {o} and raise it"),
        ("take the {o}", "raise the {o}"),
        26,
        f"object held more than {PICK_HEIGHT} m above where it rests on the table",
        "object",
        (),
        fits_pick,
        picked,
    ),
    "put": Family(
        ("put the {o} on the {p}", "place the {o} on the {p}", "move the {o} to the {p}"),
        ("set the {o} down on the {p}", "bring the {o} to the {p}"),
        40,
        f"object let go on the table less than {ON_PLATE} m from the plate's centre",
        "plate",
        (),
        fits_put,
        placed,
    ),
    "stack": Family(
        ("stack the {o} on the {p}", "put the {o} on top of the {p}", "place the {o} on top of the {p}"),
        ("set the {o} on the {p}", "put the {o} onto the {p}"),
        50,
        "object let go and standing on the other one",
        "base",
        (),
        fits_stack,
        stacked,
    ),
    "switch": Family(
        ("turn {d} the light", "switch the light {d}", "turn the light {d}"),
        ("switch {d} the lamp", "turn the lamp {d}"),
        36,
        f"knob more than {SWITCHED} m from its rail's middle on the side asked for (right is on)",
        "nothing",
        ("on", "off"),
        fits_switch,
        switched,
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
