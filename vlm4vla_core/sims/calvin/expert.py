"""Scripted experts for CALVIN's drawer, LED, slider and table blocks: way-points from the scene's own geometry.

They act through the same relative actions as a policy, at no more than half of full speed, and know all four scenes
because handles and buttons are found from the bodies' bounding boxes.

Trap: increments add to the pose that was last *commanded*, not to the measured one, so way-points are compared with
that; a blocked arm would else be driven further and further.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

SPEED = 0.5  # largest share of a full action, 1 being 0.02 m or 0.05 rad per step
METRES, RADIANS = 0.02, 0.05  # of one unit of action
YAW = 1.5  # rad, of the neutral pose
SAFE_Z = 0.56  # m, clear of blocks and buttons; the table top is at 0.46
_PATIENCE = 15  # steps after which a way-point that the arm cannot reach counts as reached
TASKS = (
    "open_drawer", "close_drawer", "turn_on_led", "turn_off_led", "move_slider_left", "move_slider_right",
    "lift_red_block_table", "lift_blue_block_table", "lift_pink_block_table",
)  # fmt: skip


class Waypoint(NamedTuple):
    """Where the tool goes (m), fingers open or closed, at which yaw, and how many steps it stays there."""

    at: tuple[float, float, float]
    is_open: bool = False
    yaw: float = YAW
    stay: int = 0


@dataclass(frozen=True)
class Layout:
    """What the expert reads of a scene. tool: (3,) m. button, drawer, slider: (2, 3) least and largest corner of each
    body's box. blocks: colour -> x, y, z, yaw."""

    tool: np.ndarray
    button: np.ndarray
    drawer: np.ndarray
    slider: np.ndarray
    blocks: dict[str, np.ndarray]


def waypoints(task: str, layout: Layout) -> list[Waypoint]:
    """The way-points of one task from wherever the tool is; raises KeyError on a task without an expert."""
    if task not in TASKS:
        raise KeyError(task)
    if task.endswith("_drawer"):
        x = float(layout.drawer[:, 0].mean())
        front = float(layout.drawer[0, 1])  # y of the handle's outer side
        # Behind the handle to pull it, before it to push it.
        begin, end, high = (
            (front + 0.043, front - 0.20, 0.48) if task == "open_drawer" else (front - 0.035, front + 0.24, 0.48)
        )
        way = [Waypoint((x, begin, high)), Waypoint((x, begin, 0.365)), Waypoint((x, end, 0.365))]
    elif task.endswith("_led"):
        x, y = (float(value) for value in layout.button[:, :2].mean(0))
        way = [Waypoint((x, y, 0.52)), Waypoint((x, y, 0.44)), Waypoint((x, y, 0.53))]
    elif task.startswith("move_slider"):
        x, side = float(layout.slider[:, 0].mean()), 1.0 if task.endswith("left") else -1.0
        begin, end = x + 0.08 * side, x - 0.28 * side
        way = [Waypoint((begin, -0.17, 0.50)), Waypoint((begin, -0.02, 0.50)), Waypoint((end, -0.02, 0.50))]
    else:
        x, y, _, turned = (float(value) for value in layout.blocks[task.split("_")[1]])
        yaw = YAW + (turned - YAW + np.pi / 2) % np.pi - np.pi / 2  # the nearest of the two equal grasps
        over, low = (x, y, 0.53), (x, y, 0.455)
        way = [
            Waypoint(over, True, yaw),
            Waypoint(low, True, yaw),
            Waypoint(low, False, yaw, 10),
            Waypoint((x, y, 0.62), False, yaw),
        ]
    return [*_clear(layout.tool, way[0]), *way]


def _clear(tool: np.ndarray, first: Waypoint) -> list[Waypoint]:
    """Out of the cabinet, up, and over the first way-point, as far as that is needed."""
    x, y, z = (float(value) for value in tool)
    out, goal = [], first.at
    if y > -0.08 and z < SAFE_Z:  # under the cabinet's edge
        y = -0.15
        out.append(Waypoint((x, y, z), first.is_open))
    if z < SAFE_Z - 0.02 and np.hypot(x - goal[0], y - goal[1]) > 0.03:
        z = SAFE_Z
        out.append(Waypoint((x, y, z), first.is_open))
    if np.hypot(x - goal[0], y - goal[1]) > 0.03:
        out.append(Waypoint((goal[0], goal[1], max(goal[2], SAFE_Z)), first.is_open, first.yaw))
    return out


@dataclass
class Expert:
    """Follows way-points. finished: it stood at the last one for a while."""

    way: list[Waypoint]
    _waited: int = field(default=0, init=False)

    @property
    def finished(self) -> bool:
        return len(self.way) == 1 and self._waited > _PATIENCE

    def act(self, commanded: np.ndarray, tool: np.ndarray) -> np.ndarray:
        """Action (7,) from the commanded pose (6,), in m and rad (Euler), and the measured place of the tool (3,)."""
        while len(self.way) > 1 and self._reached(commanded, tool):
            self.way, self._waited = self.way[1:], 0
        goal = self.way[0]
        self._waited += bool(np.abs(np.array(goal.at) - commanded[:3]).max() < 1e-3)
        move = (np.array(goal.at) - commanded[:3]) / METRES
        turn = ((goal.yaw - commanded[5] + np.pi) % (2 * np.pi) - np.pi) / RADIANS
        action = np.zeros(7)
        action[:3] = move / max(1.0, np.abs(move).max() / SPEED)
        action[5] = np.clip(turn, -SPEED, SPEED)
        action[6] = 1.0 if goal.is_open else -1.0
        return action

    def _reached(self, commanded: np.ndarray, tool: np.ndarray) -> bool:
        goal = self.way[0]
        turned = abs((goal.yaw - commanded[5] + np.pi) % (2 * np.pi) - np.pi)
        there = np.abs(np.array(goal.at) - commanded[:3]).max() < 1e-3 and turned < 0.02
        close = np.abs(np.array(goal.at) - tool).max() < 0.01
        return bool(there and self._waited >= goal.stay and (close or self._waited >= _PATIENCE))
