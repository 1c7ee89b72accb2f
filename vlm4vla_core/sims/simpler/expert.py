"""The scripted expert of the Bridge tasks: above the object, turned across its narrow side, down, close, up, over the
target, down, open, up. It reads the simulator's state and works by real physics: nothing is attached or moved by hand.

It steers the commanded pose (the port adds every action to that, not to the reached one), so it does not overshoot,
and goes on to the next phase by what was reached. An object that slipped out of the hand is fetched again.

Trap: it is an upper reference and a source of demonstrations, never a baseline: no policy sees what it reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlm4vla_core.episodes.rotations import to_matrix

_STEP, _TURN = 0.03, 0.25  # largest motion per action, m and rad
_HOVER = 0.10  # m over the object's middle before going down, and the same for what is carried over the target
_LEAVE = 6  # steps up and away
_OPEN = 0.033  # m, a finger that counts as open


@dataclass(frozen=True)
class Seen:
    """The simulator's state in the robot's base: m, and quaternions with w last."""

    tool: np.ndarray  # (3,) the point between the fingers
    tool_rotation: np.ndarray  # (4,)
    commanded: np.ndarray  # (3,) where the tool was last sent
    commanded_rotation: np.ndarray  # (4,)
    source: np.ndarray  # (3,)
    source_rotation: np.ndarray  # (4,)
    source_box: np.ndarray  # (3,) sides in the object's own axes
    target: np.ndarray  # (3,)
    target_box: np.ndarray  # (3,)
    finger: float  # position of a finger, 0.014 closed to 0.038 open
    grasped: bool


@dataclass(frozen=True)
class Manner:
    """What differs between tasks: m."""

    grasp: float = 0.0  # height of the tool over the object's middle when it closes
    release: float = 0.01  # room under the object when the hand opens
    carry: float = _HOVER


MANNERS = {
    "widowx_spoon_on_towel": Manner(),
    "widowx_carrot_on_plate": Manner(),
    "widowx_stack_cube": Manner(),
    "widowx_put_eggplant_in_basket": Manner(),
}


class Expert:
    """Actions (7,) in the Bridge convention for one episode of `task`, called once per step."""

    def __init__(self, task: str) -> None:
        self._manner, self._phase, self._since = MANNERS[task], "over", 0

    @property
    def finished(self) -> bool:
        """Whether the hand has left what it put down."""
        return self._phase == "leave" and self._since >= _LEAVE

    def __call__(self, seen: Seen) -> np.ndarray:
        for _ in range(3):  # a phase that is done already is passed at once
            goal, turn, gripper, done = self._plan(seen)
            if not done:
                break
            self._phase, self._since = done, 0
        self._since += 1
        motion = goal - seen.commanded
        far = np.linalg.norm(motion)
        motion *= min(1.0, _STEP / far) if far else 0.0
        return np.concatenate([motion, [0.0, 0.0, np.clip(turn, -_TURN, _TURN)], [gripper]])

    def _plan(self, seen: Seen) -> tuple[np.ndarray, float, float, str]:
        """Where to, how far to turn about the vertical, gripper (1 open), and the next phase once this one is done."""
        manner, source, target = self._manner, seen.source, seen.target
        up = np.array([0.0, 0.0, 1.0])
        held = seen.tool - source  # what is in the hand moves with the tool
        if self._phase in ("lift", "carry", "lower") and np.linalg.norm(held) > 0.05:
            self._phase = "over"
        if self._phase == "over":
            goal, turn = source + _HOVER * up, across(seen)
            there = (
                np.linalg.norm((seen.tool - goal)[:2]) < 0.008 and seen.tool[2] < goal[2] + 0.03 and abs(turn) < 0.02
            )
            return goal, turn, 1.0, "down" if there and self._turned(seen) else ""
        if self._phase == "down":
            goal = source + manner.grasp * up
            return goal, 0.0, 1.0, "close" if abs(seen.tool[2] - goal[2]) < 0.006 or self._since > 8 else ""
        if self._phase == "close":
            return seen.commanded, 0.0, 0.0, "lift" if self._since >= 3 else ""
        height = target[2] + (_bottom(seen.target_box) + _bottom(seen.source_box))  # of the object, when it lies there
        if self._phase == "lift":
            goal = np.array([*seen.commanded[:2], height + manner.carry + held[2]])
            return goal, 0.0, 0.0, "carry" if seen.tool[2] > goal[2] - 0.02 else ""
        if self._phase == "carry":
            goal = np.array([*target[:2], height + manner.carry]) + held
            return goal, 0.0, 0.0, "lower" if np.linalg.norm((seen.tool - goal)[:2]) < 0.006 else ""
        if self._phase == "lower":
            goal = np.array([*target[:2], height + manner.release]) + held
            return goal, 0.0, 0.0, "open" if seen.tool[2] < goal[2] + 0.004 or self._since > 10 else ""
        if self._phase == "open":
            return seen.commanded, 0.0, 1.0, "leave" if seen.finger > _OPEN or self._since > 4 else ""
        return np.array([*seen.commanded[:2], max(seen.commanded[2], height + _HOVER)]), 0.0, 1.0, ""

    @staticmethod
    def _turned(seen: Seen) -> bool:
        """Whether the tool has reached the commanded turn."""
        return bool(abs(np.dot(seen.tool_rotation, seen.commanded_rotation)) > np.cos(0.05 / 2))


def across(seen: Seen) -> float:
    """Turn about the vertical (rad) after which the fingers close across the object's narrow horizontal side."""
    axes = to_matrix(seen.source_rotation, "quaternion")
    flat = np.argsort(np.abs(axes[2]))[:2]  # the two axes that lie
    narrow, wide = sorted(flat, key=lambda axis: seen.source_box[axis])
    square = seen.source_box[wide] - seen.source_box[narrow] < 0.005
    fingers = to_matrix(seen.commanded_rotation, "quaternion")[:, 1]
    angle = np.arctan2(axes[1, narrow], axes[0, narrow]) - np.arctan2(fingers[1], fingers[0])
    period = np.pi / 2 if square else np.pi
    return float((angle + period / 2) % period - period / 2)


def _bottom(box: np.ndarray) -> float:
    """Half the height of a box that lies on its largest side."""
    return float(box.min()) / 2
