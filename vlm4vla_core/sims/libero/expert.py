"""The scripted expert for LIBERO's pick-and-place goals: reads the simulator's bodies, moves the hand, never its wrist.

For each goal `On(object, plate)` or `In(object, basket)` in turn: above the object, down, close, lift, above the
target, lower, open. A bowl is held by its rim. An object that did not rise is grasped again a little lower or higher.

Trap: it looks at the state at every step, so it also mends what noise or a policy has done; but its phase is its own,
so it must be asked at every step of an episode from the first on.
"""

from __future__ import annotations

from typing import Any

import numpy as np

STEP, TURN = 0.05, 0.5  # metres and radians in one unit of an action
_ABOVE, _OVER_BASKET, _OVER_PLATE = 0.12, 0.15, 0.02  # metres above the object's or target's origin
_CLOSE, _OPEN = 12, 8  # control steps
_TRIES = (0.0, -0.012, 0.012, -0.02)  # metres added to the height of the grasp, try after try


class Expert:
    """Drives one episode of an environment of LIBERO's problem classes."""

    def __init__(self, env: Any) -> None:
        self.env, self._sim = env, env.sim
        self._asks = [ask for ask in env.parsed_problem["goal_state"] if ask[0] in ("on", "in")]
        self._upright = self._rotation()
        self._begin(0)

    def _begin(self, ask: int) -> None:
        self._ask, self._try = ask, 0
        self._next("above")

    def _next(self, phase: str) -> None:
        self._phase, self._clock = phase, 0

    # --- what is where ----------------------------------------------------------------------------------------

    def _hand(self) -> np.ndarray:
        return np.array(self._sim.data.site_xpos[self._sim.model.site_name2id("gripper0_grip_site")])

    def _rotation(self) -> np.ndarray:
        return np.array(self._sim.data.get_body_xmat("robot0_right_hand")).reshape(3, 3)

    def _body(self, name: str) -> np.ndarray:
        return np.array(self._sim.data.body_xpos[self.env.obj_body_id[name]])

    def _target(self) -> tuple[np.ndarray, bool]:
        """Where the object goes, and whether that is a basket."""
        name = self._asks[self._ask][2]
        while name not in self.env.obj_body_id:
            name = name.rpartition("_")[0]  # a region of it
        return self._body(name), "basket" in name

    def _grasp(self) -> np.ndarray:
        """Where the hand closes."""
        name = self._asks[self._ask][1]
        place = self._body(name)
        if "bowl" in name:
            # By the rim, on the side that lies nearer to the middle of the table, where the arm reaches well.
            place += np.array([0, -0.05 if place[1] > 0 else 0.05, 0.03])
        place[2] += _TRIES[min(self._try, len(_TRIES) - 1)]
        return place

    # --- what to do -------------------------------------------------------------------------------------------

    def act(self) -> np.ndarray:
        """The action (7,) now."""
        hand, grip = self._hand(), -1.0
        self._clock += 1
        goal = hand
        if self._phase == "above":
            goal = self._grasp() + np.array([0, 0, _ABOVE])
            if hand[2] < goal[2] - 0.04:
                goal = np.array([*hand[:2], goal[2]])  # first up, then across
            if np.linalg.norm(hand[:2] - self._grasp()[:2]) < 0.008 and abs(hand[2] - goal[2]) < 0.03:
                self._next("down")
        elif self._phase == "down":
            goal = self._grasp()
            if np.linalg.norm(hand - goal) < 0.010 or self._clock > 40:
                self._next("close")
        elif self._phase == "close":
            grip = 1.0
            if self._clock >= _CLOSE:
                self._rest = self._body(self._asks[self._ask][1])
                self._next("lift")
        elif self._phase == "lift":
            goal, grip = self._lifted(hand)
        elif self._phase in ("across", "lower"):
            goal, grip = self._carry(hand)
        elif self._phase == "open":
            if self._clock >= _OPEN:
                self._next("away")
        elif self._phase == "away":
            goal = np.array([*hand[:2], self._high()])
            if self._clock >= 8 or hand[2] > self._high() - 0.02:
                self._begin((self._ask + 1) % len(self._asks))
        motion = np.clip((goal - hand) / STEP, -1, 1)
        return np.concatenate([motion, self._level(), [grip]])

    def _high(self) -> float:
        place, basket = self._target()
        return float(place[2] + (0.30 if basket else 0.20))

    def _lifted(self, hand: np.ndarray) -> tuple[np.ndarray, float]:
        goal = np.array([*hand[:2], max(self._high(), self._rest[2] + 0.15)])
        if hand[2] > goal[2] - 0.03 or self._clock > 30:
            rose = self._body(self._asks[self._ask][1])[2] > self._rest[2] + 0.03
            self._try += not rose
            self._next("across" if rose else "above")
        return goal, 1.0

    def _carry(self, hand: np.ndarray) -> tuple[np.ndarray, float]:
        held, (place, basket) = self._body(self._asks[self._ask][1]), self._target()
        if np.linalg.norm(held - hand) > 0.15:  # it was lost on the way
            self._try += 1
            self._next("above")
            return hand, -1.0
        offset = hand - held  # the hand over what it holds
        goal = place + offset
        if self._phase == "across":
            goal[2] = max(self._high(), hand[2] if abs(hand[2] - self._high()) < 0.05 else 0.0)
            if np.linalg.norm(goal[:2] - hand[:2]) < 0.012:
                self._next("lower")
        else:
            goal[2] = place[2] + (_OVER_BASKET if basket else _OVER_PLATE) + offset[2]
            if hand[2] - goal[2] < 0.012 or self._clock > 40:
                self._next("open")
        return goal, 1.0

    def _level(self) -> np.ndarray:
        """(3,) turn back to the hand's first orientation, small angles, in units of an action."""
        turn = self._upright @ self._rotation().T
        axis = np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]) / 2
        return np.clip(axis / TURN, -1, 1)
