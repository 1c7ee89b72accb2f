"""Per-dataset transforms of actions: what turns raw robot logs into the actions a policy is trained on.

A transform takes one episode's raw actions (T, A) and states (T, S) and returns the transformed actions together
with the source steps they belong to, so that images and states can be cut alike.
Trap: `bridge_orig` replaces the commanded motion by the motion that followed, which is another quantity
(correlation 0.7 to 0.9 per dimension on real episodes), and it drops the first and the last step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from vlm4vla_core.actions import ActionConvention
from vlm4vla_core.episodes.rotations import SIZES, convert_rotation
from vlm4vla_core.errors import InputError

NO_MOTION = 1e-4  # LIBERO: norm of an action's six motion numbers below which it does nothing
CALVIN_M, CALVIN_RAD = 0.02, 0.05  # CALVIN: what one unit of a relative action stands for

Transform = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def none(action: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Actions as they are: (T, A) float32 and the steps 0…T-1."""
    return np.asarray(action, np.float32), np.arange(len(action))


def bridge_orig(action: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """OpenVLA's `bridge_orig`: settled gripper, and the motion replaced by the difference of the states.

    action: (T, 7) with the gripper last (1 open, 0 closed), state: (T, S), S >= 6: position and Euler angles first.
    Returns (max(T - 2, 0), 7) float32 and the source steps 1…T-2: step 0 goes because its logged action is zero,
    the last because no state follows. Angles are subtracted plainly, without wrapping, as in the original.
    Source: openvla/openvla, prismatic/vla/datasets/rlds/oxe (`bridge_orig_dataset_transform`).
    """
    action, state = np.asarray(action, np.float32)[1:], np.asarray(state, np.float32)[1:]
    if len(action) < 2:
        return np.zeros((0, action.shape[1]), np.float32), np.zeros(0, np.int64)
    motion = state[1:, :6] - state[:-1, :6]  # (T - 2, 6)
    gripper = settled_gripper(action[:, -1])[:-1, None]  # (T - 2, 1)
    return np.concatenate([motion, gripper], axis=1), np.arange(1, len(action))


def settled_gripper(gripper: np.ndarray) -> np.ndarray:
    """Gripper commands as 1 (above 0.95) or 0 (below 0.05); a value between takes the next settled one.

    gripper: (T,). Values at the end with no settled one after them take the last command, which may lie between.
    """
    settled = np.empty(len(gripper), np.float32)
    carry = gripper[-1]
    for step in range(len(gripper) - 1, -1, -1):
        if gripper[step] > 0.95:
            carry = np.float32(1)
        elif gripper[step] < 0.05:
            carry = np.float32(0)
        settled[step] = carry
    return settled


def no_ops(action: np.ndarray) -> np.ndarray:
    """Which steps of one LIBERO episode do nothing and are dropped: no motion, and the gripper as before.

    action: (T, 7) with the gripper last. Returns (T,) bool: the norm of the first six is below 1e-4 and the gripper
    equals that of the last step kept; before any step is kept, standing still suffices.
    Source: openvla/openvla, experiments/robot/libero/regenerate_libero_dataset.py.
    """
    action = np.asarray(action)
    still = np.linalg.norm(action[:, :6], axis=1) < NO_MOTION
    same = np.ones(len(action), bool)
    # Dropped steps have the gripper of the last kept one, so the step before stands for it.
    same[1:] = action[1:, -1] == action[:-1, -1]
    return still & (same | np.logical_and.accumulate(still))


def calvin_relative(actions: np.ndarray, robot_obs: np.ndarray) -> np.ndarray:
    """CALVIN's `rel_actions` from its absolute `actions` (T, 7) and `robot_obs` (T, 15), in float64.

    Motion from the present to the target pose, in units of 0.02 m and 0.05 rad, clipped to [-1, 1]; Euler angles
    differ by the shorter way round; the gripper (-1 closed, 1 open) stays. Returns (T, 7).
    Source: mees/calvin_env (`to_relative_action`); reproduced on original frames.
    """
    actions, robot_obs = np.asarray(actions, np.float64), np.asarray(robot_obs, np.float64)
    away = actions[:, :3] - robot_obs[:, :3]
    turn = (actions[:, 3:6] - robot_obs[:, 3:6] + np.pi) % (2 * np.pi) - np.pi
    motion = [np.clip(away, -CALVIN_M, CALVIN_M) / CALVIN_M, np.clip(turn, -CALVIN_RAD, CALVIN_RAD) / CALVIN_RAD]
    return np.concatenate([*motion, actions[:, 6:]], axis=1)


# --- between conventions


def convert(actions: np.ndarray, source: ActionConvention, target: ActionConvention) -> np.ndarray:
    """Actions (..., A) of one convention in another one, (..., B) float64, exactly.

    What converts: the gripper's two values (linearly between them), and the representation of a rotation given in rad,
    which stands between three numbers of motion and the gripper. Names and units of the rotation follow it.
    Raises InputError naming everything else that differs: frame, rate, relative or absolute, scaling, units, names.
    """
    actions = np.asarray(actions, np.float64)
    if actions.shape[-1] != source.size:
        raise ValueError(f"{source.size} numbers per action are declared, got shape {actions.shape}")
    turned = source.rotation != target.rotation
    wrong = _around(source, turned).differences(_around(target, turned))
    for side in (source, target):
        if turned and not (side.rotation in SIZES and side.size == SIZES[side.rotation] + 4 and _plain(side)):
            wrong.append(f"rotation {side.rotation} in {', '.join(side.units[3:-1]) or 'no numbers'}")
        if side.gripper_open == side.gripper_closed:
            wrong.append(f"a gripper that is {side.gripper_open:g} both open and closed")
    if wrong:
        raise InputError(f"these actions cannot be converted: {'; '.join(wrong)}", fix="only gripper and rotation can")
    motion, gripper = actions[..., :-1], actions[..., -1:]
    if turned:
        rotation = convert_rotation(motion[..., 3:], source.rotation, target.rotation)
        motion = np.concatenate([motion[..., :3], rotation], -1)
    if (source.gripper_open, source.gripper_closed) != (target.gripper_open, target.gripper_closed):
        openness = (gripper - source.gripper_closed) / (source.gripper_open - source.gripper_closed)
        gripper = target.gripper_closed + openness * (target.gripper_open - target.gripper_closed)
    return np.concatenate([motion, gripper], -1)


def _plain(convention: ActionConvention) -> bool:
    return set(convention.units[3:-1]) == ({"rad"} if convention.rotation in ("euler_xyz", "axis_angle") else {"1"})


def _around(convention: ActionConvention, turned: bool) -> ActionConvention:
    """The convention without what `convert` takes care of."""
    rest = replace(convention, gripper_open=1.0, gripper_closed=0.0)
    if not turned:
        return rest
    names, units = (values[:3] + values[-1:] for values in (rest.names, rest.units))
    return replace(rest, rotation="none", names=names, units=units)
