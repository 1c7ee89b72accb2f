"""Does an ask fit a scene? A rule per family, of a batch of one world.

Trap: rules are about a hand that is free; `tasks.fits` asks first whether what it holds can be let go.
"""

from __future__ import annotations

import numpy as np

from vlm4vla_core.sims.tabletop import world
from vlm4vla_core.sims.tabletop.rules import (
    DIRECTIONS,
    ON_PLATE,
    SWITCH_REACH,
    SWITCH_ROOM,
    TOUCH_DISTANCE,
    Ask,
    along_across,
)
from vlm4vla_core.sims.tabletop.world import SLOTS, State

ROOM = 0.17  # m that a commanded motion has at least before the edge of the workspace


def inside(point: np.ndarray) -> bool:
    """Whether a gripper's point (3,) lies in the workspace."""
    return bool((point >= world.WORKSPACE_LOW).all() and (point <= world.WORKSPACE_HIGH).all())


def distances(state: State, point: np.ndarray, but: int = -1) -> np.ndarray:
    """(SLOTS,) horizontal distances of the present objects from a point; infinite for absent ones and `but`."""
    apart = world.length(state.objects[0, :, :2] - point[:2])
    return np.where((state.kind[0] >= 0) & (np.arange(SLOTS) != but), apart, np.inf)


def _free(state: State, slot: int) -> bool:
    """Nothing stands on the object."""
    return bool((state.on[0] != slot).all())


def fits_move(state: State, ask: Ask) -> bool:
    return inside(state.gripper[0] + ROOM * np.array(DIRECTIONS[ask.direction]))


def fits_touch(state: State, ask: Ask) -> bool:
    far = world.length(state.gripper[0] - state.objects[0, ask.slot]) > 2 * TOUCH_DISTANCE
    return bool(far and state.held[0] != ask.slot)


def fits_push(state: State, ask: Ask) -> bool:
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
    return fits_touch(state, ask)


def fits_pick(state: State, ask: Ask) -> bool:
    return bool(state.held[0] != ask.slot) and _free(state, ask.slot) and _roomy(state, ask.slot)


def fits_put(state: State, ask: Ask) -> bool:
    plate = state.plate[0, ask.other]
    if state.plate_colour[0, ask.other] < 0 or not _free(state, ask.slot) or not _roomy(state, ask.slot):
        return False
    taken = distances(state, plate, but=ask.slot).min() < world.PLATE_RADIUS + world.FOOTPRINT + 0.01
    there = world.length(state.objects[0, ask.slot, :2] - plate) < 2 * ON_PLATE
    return not taken and not bool(there)


def fits_stack(state: State, ask: Ask) -> bool:
    base = ask.other
    flat = bool(world.FLAT_TOP[state.kind[0, base]]) and state.on[0, base] < 0 and state.held[0] != base
    return flat and _free(state, ask.slot) and _free(state, base) and _roomy(state, ask.slot)


def _roomy(state: State, slot: int) -> bool:
    """The open hand can go round the object without its grasp being nearer to another one."""
    return bool(distances(state, state.objects[0, slot], but=slot).min() > 0.09 or state.on[0, slot] >= 0)


def fits_switch(state: State, ask: Ask) -> bool:
    """Not set already, and nothing stands where the hand goes."""
    wanted = DIRECTIONS[ask.direction][0]
    if (state.knob[0] - state.rail[0]) * wanted > 0:
        return False
    beside = np.clip(state.objects[0, :, 0], state.rail[0] - SWITCH_REACH, state.rail[0] + SWITCH_REACH)
    nearest = np.stack([beside, np.full(SLOTS, world.SWITCH_Y)], 1)  # (SLOTS, 2) of the hand's way, to each object
    apart = world.length(state.objects[0, :, :2] - nearest)
    return bool((apart > SWITCH_ROOM)[state.kind[0] >= 0].all())
