"""Scripted expert: a stateless function from (state, goal) to a clean action, so any perturbed state can be labelled.

Every family approaches from above along a funnel, then acts; from wherever noise has put the world it goes on with
what is missing. All tasks also turn the wrist straight (yaw 0).

Trap: it reads the simulator's state (goal start poses included), which no policy sees; it is a source of labels
and an upper reference, not a baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vlm4vla_core.sims.tabletop import world
from vlm4vla_core.sims.tabletop.rules import (
    MOVE_ACROSS,
    ON_PLATE,
    SWITCH_REACH,
    SWITCH_ROOM,
    Goal,
    plate_position,
    target_position,
)
from vlm4vla_core.sims.tabletop.tasks import TASKS, success
from vlm4vla_core.sims.tabletop.world import CONTACT, SLOTS, State, length

LOW = 0.04  # height of the gripper's point when it grasps or pushes something on the table
HOVER = 0.10  # how much higher it travels, at least
CLEAR = 0.03  # room under what is carried over other objects
BEHIND = CONTACT + 0.025  # distance from the object's centre at which a push starts
KNOB_BEHIND = world.FINGER + world.KNOB_RADIUS + 0.025
MOVE_SPEED = 0.035  # m per step in "move": unhurried, so that its demonstrations have four steps, not two
PUSH_GOAL = 0.14  # how far the expert means to push, a little more than success asks for
_UP = np.array([0.0, 0.0, world.MAX_STEP])
_GRID = np.stack(np.meshgrid(np.linspace(-0.22, 0.22, 6), np.linspace(-0.22, 0.1, 5)), -1).reshape(-1, 2)
_ANGLES = np.arange(16) * (np.pi / 8)
_CANDIDATES = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1)  # (16, 2) ways to push, tried by alignment


def expert(state: State, goals: Goal | Sequence[Goal]) -> np.ndarray:
    """Clean actions (n, 7) float64 in the `TABLETOP` convention, within the world's step limits.

    goals: one, or several in order; each world then works on its first that does not hold.
    """
    parts = [goals] if isinstance(goals, Goal) else list(goals)
    actions, waiting = np.zeros((len(state), 7)), np.ones(len(state), bool)
    for number, goal in enumerate(parts):
        mine = waiting if number == len(parts) - 1 else waiting & ~success(state, goal)
        for index, task in enumerate(TASKS):
            rows = np.flatnonzero(mine & (goal.family == index))
            if len(rows):
                actions[rows] = _solve(task, state[rows], goal[rows])
        waiting = waiting & ~mine
    actions[(state.held >= 0) & (actions[:, 6] > 0.5), :3] = 0.0  # what is let go falls where it is, not on the way
    actions[:, 5] = np.clip(-state.yaw, -world.MAX_TURN, world.MAX_TURN)
    return actions


def _solve(task: str, state: State, goal: Goal) -> np.ndarray:
    """The family's own actions; first of all, though, what is in the way is put aside."""
    actions = _EXPERTS[task](state, goal)
    if task in ("move", "touch"):
        return actions
    blocker = _blocker(task, state, goal)
    rows = np.flatnonzero(blocker >= 0)
    if len(rows):
        here, aside = state[rows], replace(goal[rows], slot=blocker[rows])
        actions[rows] = _carry(here, aside, _spare(here, aside), np.full(len(rows), 0.004), 0.03)
    return actions


def _blocker(task: str, state: State, goal: Goal) -> np.ndarray:
    """(n,) slot of an object that has to go first, -1 for none: one on top of the target or of what it is to stand on,
    one on the plate, one beside the switch, or one in the hand that would fall onto another."""
    slots, n = np.arange(SLOTS), len(state)
    other = (state.kind >= 0) & (slots != goal.slot[:, None])  # (n, SLOTS)
    rows = np.arange(n)
    bad = other & (state.on == goal.slot[:, None]) & (goal.slot >= 0)[:, None]
    if task == "stack":
        bad |= other & (state.on == goal.other[:, None]) & (slots != goal.other[:, None])
    if task == "put":
        taken = length(state.objects[..., :2] - plate_position(state, goal)[:, None]) < 2 * world.FOOTPRINT
        bad |= other & taken & (state.on < 0)
    if task == "switch":
        bad |= other & (_from_switch(state, state.objects[..., :2]) < SWITCH_ROOM - 0.01)
    held = np.maximum(state.held, 0)
    apart = length(state.objects[..., :2] - state.objects[rows, held, None, :2])
    crowded = ((apart < 2 * world.FOOTPRINT) & (state.kind >= 0) & (slots != held[:, None])).any(1)
    falls = (state.held >= 0) & (state.held != goal.slot) & (crowded | bad[rows, held])
    if not bad.any():
        return np.where(falls, state.held, -1)
    # The topmost first: what carries something cannot be taken.
    free = ~(state.on[:, None, :] == slots[:, None]).any(2)
    first = np.where((bad & free).any(1), (bad & free).argmax(1), np.where(bad.any(1), _top(state, bad.argmax(1)), -1))
    return np.where(falls, state.held, first)


def _top(state: State, slot: np.ndarray) -> np.ndarray:
    """(n,) what stands, perhaps through others, on the objects `slot` (n,), uppermost."""
    for _ in range(SLOTS - 1):
        above = state.on == slot[:, None]
        slot = np.where(above.any(1), above.argmax(1), slot)
    return slot


def _spare(state: State, goal: Goal) -> np.ndarray:
    """(n, 2) the emptiest of the grid's points, where what is in the way can be put."""
    others = (state.kind >= 0) & (np.arange(SLOTS) != goal.slot[:, None])
    spot = np.broadcast_to(_GRID, (len(state), *_GRID.shape))  # (n, g, 2)
    room = np.full(spot.shape[:2], np.inf)
    for k in range(SLOTS):
        apart = length(spot - state.objects[:, None, k, :2])
        room = np.minimum(room, np.where(others[:, k, None], apart, np.inf))
    for k in range(world.PLATES):
        room = np.minimum(room, length(spot - state.plate[:, None, k]))
    room = np.minimum(room, _from_switch(state, spot))
    return _GRID[room.argmax(1)]


def _from_switch(state: State, points: np.ndarray) -> np.ndarray:
    """(n, k) distances of points (n, k, 2) from where a hand goes to shove the knob."""
    x = np.clip(points[..., 0], state.rail[:, None] - SWITCH_REACH, state.rail[:, None] + SWITCH_REACH)
    return length(points - np.stack([x, np.full_like(x, world.SWITCH_Y)], -1))


def _towards(delta: np.ndarray, is_open: np.ndarray) -> np.ndarray:
    """Actions that move by `delta` (n, 3), shortened to one step, with the fingers open or closed (n,) bool."""
    actions = np.zeros((len(delta), 7))
    actions[:, :3] = delta * (world.MAX_STEP / np.maximum(length(delta), world.MAX_STEP))[:, None]
    actions[:, 6] = is_open
    return actions


def _funnel(gripper: np.ndarray, above: np.ndarray, hover: np.ndarray | float = HOVER) -> np.ndarray:
    """Motion (n, 3) to the points `above` (n, 3): `hover` higher while far away, down when nearly over the point."""
    delta = above - gripper
    far = length(delta[:, :2])
    delta[:, 2] += np.clip(15.0 * (far - 0.02), 0.0, 1.0) * hover
    # Rise before travelling, or low fingers would shove things aside on the way.
    hurry = np.clip(1.0 - np.maximum(delta[:, 2] - 0.02, 0.0) / 0.05, 0.0, 1.0)
    delta[:, :2] *= hurry[:, None]
    return delta


def _move(state: State, goal: Goal) -> np.ndarray:
    moved = state.gripper - goal.gripper_start
    along = (moved * goal.direction).sum(1, keepdims=True)
    across = moved - along * goal.direction
    # The sideways error is mended only when success is in danger: the start is nothing that a policy can see.
    mend = (length(across) > MOVE_ACROSS / 2)[:, None]
    return _towards(goal.direction * MOVE_SPEED - np.where(mend, across, 0.0), state.open)


def _touch(state: State, goal: Goal) -> np.ndarray:
    target = target_position(state.objects, goal)
    return _towards(_funnel(state.gripper, target), np.ones(len(state), bool))


def _grasp(state: State, target: np.ndarray) -> np.ndarray:
    """Actions (n, 7) that go to the objects at `target` (n, 3) with open fingers and close them there."""
    above = np.concatenate([_reachable(target[:, :2]), np.maximum(target[:, 2:] - 0.004, LOW)], 1)
    delta = above - state.gripper
    near = (length(delta[:, :2]) < 0.03) & (np.abs(delta[:, 2]) < 0.03)
    near &= length(target[:, :2] - state.gripper[:, :2]) < world.GRASP_XY - 0.001
    # A closed hand, empty or with the wrong object, opens first; the fingers close only around the target.
    return _towards(_funnel(state.gripper, above), ~(near & state.open))


def _reachable(point: np.ndarray) -> np.ndarray:
    """The points of the workspace nearest to (n, 2): objects may lie a little outside."""
    return np.clip(point, world.WORKSPACE_LOW[:2], world.WORKSPACE_HIGH[:2])


def _pick(state: State, goal: Goal) -> np.ndarray:
    raise_it = _towards(np.broadcast_to(_UP, (len(state), 3)), np.zeros(len(state), bool))
    get_it = _grasp(state, target_position(state.objects, goal))
    return np.where((state.held == goal.slot)[:, None], raise_it, get_it)


def _highest(state: State, but: np.ndarray | int = -1) -> np.ndarray:
    """(n,) top of the highest thing on the table, the slots `but` (n,) aside."""
    others = (state.kind >= 0) & (np.arange(SLOTS) != np.reshape(but, (-1, 1)))
    return np.where(others, state.objects[..., 2] + world.rest_height(state.kind), world.KNOB_HEIGHT).max(1)


def _carry(state: State, goal: Goal, place: np.ndarray, height: np.ndarray, near: float) -> np.ndarray:
    """Grasp the target, bring it over the points `place` (n, 2), lower its underside to `height` (n,), and let go when
    it is `near` (m) enough."""
    target, rows = target_position(state.objects, goal), np.arange(len(state))
    slot = np.maximum(goal.slot, 0)
    hang = state.gripper[:, 2] - target[:, 2] + world.rest_height(state.kind[rows, slot])  # hand above the underside
    goes = np.concatenate([_reachable(place), (height + hang)[:, None]], 1)
    delta = _funnel(state.gripper, goes, np.maximum(_highest(state, goal.slot) + CLEAR - height, 0.02))
    there = (length(goes[:, :2] - state.gripper[:, :2]) < near) & (np.abs(goes[:, 2] - state.gripper[:, 2]) < 0.025)
    return np.where((state.held == goal.slot)[:, None], _towards(delta, there), _grasp(state, target))


def _put(state: State, goal: Goal) -> np.ndarray:
    return _carry(state, goal, plate_position(state, goal), np.full(len(state), 0.004), 0.7 * ON_PLATE)


def _stack(state: State, goal: Goal) -> np.ndarray:
    rows, base = np.arange(len(state)), np.maximum(goal.other, 0)
    under = state.objects[rows, base]
    top = under[:, 2] + world.rest_height(state.kind[rows, base])
    return _carry(state, goal, under[:, :2], top + 0.006, 0.7 * world.STACK_REACH)


def _shove(state: State, target: np.ndarray, way: np.ndarray, behind: float) -> tuple[np.ndarray, np.ndarray]:
    """Motion (n, 3) that pushes what lies at `target` (n, 2) along the unit vectors `way` (n, 2), and whether the hand
    should be open (n,): closing around an object would grasp it, so the hand rises clear of all of them first."""
    hand = state.gripper
    contact = behind - 0.025
    left = np.stack([-way[:, 1], way[:, 0]], 1)
    offset = hand[:, :2] - target
    along, across = (offset * way).sum(1), (offset * left).sum(1)
    low_enough = hand[:, 2] < LOW + 0.03
    lined_up = (along < -(contact - 0.015)) & (along > -(behind + 0.05)) & (np.abs(across) < 0.025)
    pushing = lined_up & low_enough & ~state.open
    level = np.full((len(state), 1), LOW)
    shove = np.concatenate([way * world.MAX_STEP - left * across[:, None], level - hand[:, 2:]], 1)
    go = np.concatenate([target - way * behind, level], 1)
    over = np.maximum(_highest(state, state.held) + CLEAR + world.TIP - LOW, HOVER)  # a closed hand knocks stacks over
    delta = np.where(pushing[:, None], shove, _funnel(hand, go, over))
    apart = length(state.objects[..., :2] - hand[:, None, :2])
    reach = state.objects[..., 2] + 0.08  # an object is in the way of closing while the hand is not above it
    crowded = ((apart < 0.06) & (state.kind >= 0) & (hand[:, 2:] < reach)).any(1) & state.open
    delta = np.where((crowded & (np.abs(along + behind) > 0.03))[:, None], _UP, delta)
    return delta, (state.held >= 0) | crowded


def _push(state: State, goal: Goal) -> np.ndarray:
    target = target_position(state.objects, goal)
    started = target_position(goal.objects_start, goal)
    missing = (started + PUSH_GOAL * goal.direction - target)[:, :2]
    way, direct = _push_way(state, goal, target[:, :2], missing)  # (n, 2) unit, (n,) bool
    actions = _towards(*_shove(state, target[:, :2], way, BEHIND))

    # An object at the rail, which no push can bring back, is carried to where it started; and so is one that has
    # come to stand on another.
    n, rows = len(state), np.arange(len(state))
    edge = (np.abs(target[:, :2]) > world.WORKSPACE_HIGH[:2] + 0.5 * world.RAIL).any(1) & ~direct
    edge |= state.on[rows, np.maximum(goal.slot, 0)] >= 0
    holding = state.held == goal.slot
    carry = holding & (length((target - started)[:, :2]) > 0.03)
    home = np.concatenate([started[:, :2], np.full((n, 1), LOW)], 1)
    actions = np.where((edge & ~holding)[:, None], _grasp(state, target), actions)
    return np.where(carry[:, None], _towards(_funnel(state.gripper, home), np.zeros(n, bool)), actions)


def _push_way(state: State, goal: Goal, target: np.ndarray, missing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit push directions (n, 2): straight to the goal if the hand can get behind, else a detour; which (n,)."""
    size = np.maximum(length(missing), 1e-9)
    straight = missing / size[:, None]
    options = np.concatenate([straight[:, None], np.broadcast_to(_CANDIDATES, (len(target), *_CANDIDATES.shape))], 1)
    behind = target[:, None] - options * BEHIND  # (n, 17, 2)
    low, high = world.WORKSPACE_LOW[:2], world.WORKSPACE_HIGH[:2]
    possible = ((behind >= low) & (behind <= high)).all(2)
    for slot in range(SLOTS):
        other = (state.kind[:, slot] >= 0) & (goal.slot != slot)
        clear = length(state.objects[:, None, slot, :2] - behind) > CONTACT + 0.005
        possible &= clear | ~other[:, None]
    score = (options * straight[:, None]).sum(2) + 0.05 * (np.arange(options.shape[1]) == 0)
    best = np.where(possible, score, -9.0).argmax(1)
    return options[np.arange(len(target)), best], best == 0


def _switch(state: State, goal: Goal) -> np.ndarray:
    spot = np.stack([state.knob, np.full(len(state), world.SWITCH_Y)], 1)
    return _towards(*_shove(state, spot, goal.direction[:, :2], KNOB_BEHIND))


_EXPERTS = {
    "move": _move, "touch": _touch, "push": _push, "pick": _pick, "put": _put, "stack": _stack, "switch": _switch,
}  # fmt: skip
