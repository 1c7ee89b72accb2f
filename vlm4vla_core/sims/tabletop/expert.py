"""Scripted expert: a stateless function from (state, goal) to a clean action, so any perturbed state can be labelled.

Every family approaches from above along a funnel, then acts; from wherever noise has put the world it goes on with
what is missing. All tasks also turn the wrist straight (yaw 0).

Trap: it reads the simulator's state (goal start poses included), which no policy sees; it is a source of labels
and an upper reference, not a baseline.
"""

from __future__ import annotations

import numpy as np

from vlm4vla_core.sims.tabletop import world
from vlm4vla_core.sims.tabletop.tasks import MOVE_ACROSS, TASKS, Goal, target_position
from vlm4vla_core.sims.tabletop.world import CONTACT, SLOTS, State, length

LOW = 0.04  # height of the gripper's point when it grasps or pushes
HOVER = 0.10  # how much higher it travels
BEHIND = CONTACT + 0.025  # distance from the object's centre at which a push starts
MOVE_SPEED = 0.04  # m per step in "move": unhurried, so that its demonstrations have four steps, not two
PUSH_GOAL = 0.14  # how far the expert means to push, a little more than success asks for
_ANGLES = np.arange(16) * (np.pi / 8)
_CANDIDATES = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1)  # (16, 2) ways to push, tried by alignment


def expert(state: State, goal: Goal) -> np.ndarray:
    """Clean actions (n, 7) float64 in the `TABLETOP` convention, within the world's step limits."""
    actions = np.zeros((len(state), 7))
    for index, task in enumerate(TASKS):
        rows = np.flatnonzero(goal.family == index)
        if len(rows):
            actions[rows] = _EXPERTS[task](state[rows], goal[rows])
    actions[:, 5] = np.clip(-state.yaw, -world.MAX_TURN, world.MAX_TURN)
    return actions


def _towards(delta: np.ndarray, is_open: np.ndarray) -> np.ndarray:
    """Actions that move by `delta` (n, 3), shortened to one step, with the fingers open or closed (n,) bool."""
    actions = np.zeros((len(delta), 7))
    actions[:, :3] = delta * (world.MAX_STEP / np.maximum(length(delta), world.MAX_STEP))[:, None]
    actions[:, 6] = is_open
    return actions


def _funnel(gripper: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Motion (n, 3) to the points `above` (n, 3): high while far away, down when nearly over the point."""
    delta = above - gripper
    far = length(delta[:, :2])
    delta[:, 2] += np.clip(1.5 * (far - 0.02), 0.0, HOVER)
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


def _lift(state: State, goal: Goal) -> np.ndarray:
    target = target_position(state.objects, goal)
    above = np.concatenate([target[:, :2], np.full((len(state), 1), LOW)], 1)
    holding = state.held == goal.slot
    near = (length(above[:, :2] - state.gripper[:, :2]) < 0.03) & (np.abs(above[:, 2] - state.gripper[:, 2]) < 0.03)
    up = np.array([0.0, 0.0, world.MAX_STEP])
    delta = np.where(holding[:, None], up, _funnel(state.gripper, above))
    # An empty closed hand or one with the wrong object opens first; the fingers close only around the target.
    return _towards(delta, ~(holding | (near & state.open)))


def _push(state: State, goal: Goal) -> np.ndarray:
    n = len(state)
    hand, target = state.gripper, target_position(state.objects, goal)[:, :2]
    wanted = target_position(goal.objects_start, goal)[:, :2] + PUSH_GOAL * goal.direction[:, :2]
    missing = wanted - target
    way = _push_way(state, goal, target, missing)  # (n, 2) unit
    left = np.stack([-way[:, 1], way[:, 0]], 1)
    offset = hand[:, :2] - target
    along, across = (offset * way).sum(1), (offset * left).sum(1)

    low_enough = hand[:, 2] < LOW + 0.03
    lined_up = (along < -(CONTACT - 0.015)) & (along > -(BEHIND + 0.05)) & (np.abs(across) < 0.025)
    pushing = lined_up & low_enough & ~state.open
    shove = way * world.MAX_STEP - left * across[:, None]
    level = np.full((n, 1), LOW) - hand[:, 2:]
    go = np.concatenate([target - way * BEHIND, np.full((n, 1), LOW)], 1)
    delta = np.where(pushing[:, None], np.concatenate([shove, level], 1), _funnel(hand, go))

    # Closing around an object would grasp it: stay open until clear of all of them, and let go of what is held.
    apart = length(state.objects[..., :2] - hand[:, None, :2])
    crowded = ((apart < 0.06) & (state.kind >= 0)).any(1) & (hand[:, 2] < 0.12)
    opens = (state.held >= 0) | (crowded & state.open)
    rise = np.array([0.0, 0.0, world.MAX_STEP])
    delta = np.where((crowded & state.open & (np.abs(along + BEHIND) > 0.03))[:, None], rise, delta)
    return _towards(delta, opens)


def _push_way(state: State, goal: Goal, target: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Unit push directions (n, 2): straight to the goal when the hand can get behind, else the best detour."""
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
    return options[np.arange(len(target)), best]


_EXPERTS = {"move": _move, "touch": _touch, "push": _push, "lift": _lift}
