"""A policy's Bridge action as the ManiSkill 3 port reads it; pure NumPy, so it is checked without the simulator.

Bridge means roll, pitch, yaw about the fixed axes of the robot's base (R = Rz Ry Rx). The port reads the same three
places as intrinsic Euler XYZ (R = Rx Ry Rz; measured, mani-skill 3.0.1), and its gripper is +1 open, -1 closed. The
original SimplerEnv reads a rotation vector there: its wrapper's numbers are not this port's.

Trap: for the small turns of Bridge the three readings agree to first order, so a wrong one shows in no quick look.
"""

from __future__ import annotations

import numpy as np

from vlm4vla_core.episodes.rotations import from_matrix, to_matrix

GRIPPER_RULES = ("plain", "late-open")


def intrinsic_xyz(rotation: np.ndarray) -> np.ndarray:
    """Fixed-axes roll, pitch, yaw (..., 3) as intrinsic Euler XYZ angles (..., 3) of the same rotation, in rad.

    The transpose of Rx(a) Ry(b) Rz(c) is Rz(-c) Ry(-b) Rx(-a): fixed-axes angles (-a, -b, -c).
    """
    return -from_matrix(np.swapaxes(to_matrix(rotation, "euler_xyz"), -1, -2), "euler_xyz")


class Commander:
    """Actions (7,) of one episode, in order, as commands (7,) float32 of the port.

    rule: "plain" opens whenever the policy's gripper number is above 0.5; "late-open" opens from the second such
    prediction in a row on and closes otherwise, so its first command is always to close (VLM4VLA's evaluation).
    """

    def __init__(self, rule: str = "plain") -> None:
        if rule not in GRIPPER_RULES:
            raise ValueError(f"gripper rule '{rule}' is none of {', '.join(GRIPPER_RULES)}")
        self._needed = 1 if rule == "plain" else 2
        self._row = 0  # predictions to open in a row

    def __call__(self, action: np.ndarray) -> np.ndarray:
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"an action is seven finite numbers, got shape {action.shape}")
        self._row = self._row + 1 if action[6] > 0.5 else 0
        gripper = 1.0 if self._row >= self._needed else -1.0
        return np.concatenate([action[:3], intrinsic_xyz(action[3:6]), [gripper]]).astype(np.float32)
