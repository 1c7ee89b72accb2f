"""When a task is done: what was asked (`Ask`), the same as arrays for many worlds (`Goal`), and a rule per family.

A rule takes worlds that all belong to its family and gives (n,) bool: the goal holds now.

Trap: "moved" and "pushed" are measured from where things stood when the task was asked, which a `Goal` remembers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from vlm4vla_core.sims.tabletop import world
from vlm4vla_core.sims.tabletop.world import PLATES, State

DIRECTIONS: dict[str, tuple[float, float, float]] = {
    "left": (-1.0, 0.0, 0.0),
    "right": (1.0, 0.0, 0.0),
    "forward": (0.0, 1.0, 0.0),
    "back": (0.0, -1.0, 0.0),
    "up": (0.0, 0.0, 1.0),
    "on": (1.0, 0.0, 0.0),  # of the switch's knob
    "off": (-1.0, 0.0, 0.0),
}
MOVE_ALONG, MOVE_ACROSS = 0.12, 0.08  # m, from where the gripper started
PUSH_ALONG, PUSH_ACROSS = 0.10, 0.07  # m, from where the object started
TOUCH_DISTANCE = 0.06  # m, from the gripper's point to the object's centre
PICK_HEIGHT = 0.10  # m, of the held object above the table, measured from where it would rest
ON_PLATE = 0.065  # m, from the object's centre to the plate's
SWITCHED = 0.03  # m, of the knob from its rail's middle
SWITCH_REACH = world.KNOB_TRAVEL + 0.08  # m to either side of its rail's middle: where a hand goes to shove the knob
SWITCH_ROOM = world.CONTACT + 0.015  # m from there to the centre of an object that is not in the way


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


def moved(state: State, goal: Goal) -> np.ndarray:
    along, across = along_across(state.gripper - goal.gripper_start, goal.direction)
    return (along > MOVE_ALONG) & (across < MOVE_ACROSS)


def touched(state: State, goal: Goal) -> np.ndarray:
    return world.length(state.gripper - target_position(state.objects, goal)) < TOUCH_DISTANCE


def pushed(state: State, goal: Goal) -> np.ndarray:
    shift = target_position(state.objects, goal) - target_position(goal.objects_start, goal)
    along, across = along_across(shift, goal.direction)
    return (along > PUSH_ALONG) & (across < PUSH_ACROSS) & (state.held != goal.slot)


def picked(state: State, goal: Goal) -> np.ndarray:
    kind = state.kind[np.arange(len(state)), np.maximum(goal.slot, 0)]
    height = target_position(state.objects, goal)[:, 2] - world.rest_height(kind)
    return (state.held == goal.slot) & (height > PICK_HEIGHT)


def placed(state: State, goal: Goal) -> np.ndarray:
    target = target_position(state.objects, goal)
    rows, slot = np.arange(len(state)), np.maximum(goal.slot, 0)
    lies = (state.held != goal.slot) & (state.on[rows, slot] < 0)
    return lies & (world.length(target[:, :2] - plate_position(state, goal)) < ON_PLATE)


def stacked(state: State, goal: Goal) -> np.ndarray:
    on = state.on[np.arange(len(state)), np.maximum(goal.slot, 0)]
    return (on == goal.other) & (state.held != goal.slot)


def switched(state: State, goal: Goal) -> np.ndarray:
    return (state.knob - state.rail) * goal.direction[:, 0] > SWITCHED
