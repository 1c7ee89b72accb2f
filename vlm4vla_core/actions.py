"""What the seven numbers of an action mean, as data.

A dataset, a policy and a benchmark each declare one `ActionConvention`; evaluation refuses when they differ.
Silent mismatches (gripper sign, rotation layout, control rate) are the commonest cause of "0 %" results.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from vlm4vla_core.errors import InputError


@dataclass(frozen=True)
class ActionConvention:
    """The meaning of one action vector of `len(names)` numbers.

    names: one per dimension, in order. units: one per dimension (`m`, `rad`, `1`, ...).
    frame: what the motion is expressed in. rotation: `euler_xyz`, `axis_angle`, `rot6d` or `none`.
    relative: motion since the current pose (True), a target pose (False), or not known (None).
    gripper_open, gripper_closed: the value of the last dimension for each state; NaN (null in JSON) when it is no
    gripper or not known. control_hz: actions per second. scaling: what one unit of the numbers stands for, in words.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    frame: str
    rotation: str
    relative: bool | None
    gripper_open: float
    gripper_closed: float
    control_hz: float
    scaling: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "units", tuple(self.units))
        if len(self.names) != len(self.units):
            raise InputError(f"an action convention names {len(self.names)} dimensions but {len(self.units)} units")

    @property
    def size(self) -> int:
        """Numbers in one action."""
        return len(self.names)

    def to_dict(self) -> dict[str, Any]:
        out = {**asdict(self), "names": list(self.names), "units": list(self.units)}
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in out.items()}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> ActionConvention:
        """The way back of `to_dict`. Raises InputError on wrong or missing fields and on values of another kind."""
        known, given = {field.name for field in fields(cls)}, value if isinstance(value, dict) else {}
        if set(given) != known:
            wrong = ", ".join(sorted(map(str, set(given) ^ known)))
            raise InputError(f"an action convention with wrong or missing fields: {wrong}")
        for key, one in given.items():
            if key in ("names", "units"):
                right = isinstance(one, list | tuple) and all(isinstance(text, str) for text in one)
            elif key == "relative":
                right = one is None or isinstance(one, bool)
            elif key in ("frame", "rotation", "scaling"):
                right = isinstance(one, str)
            else:  # numbers; of the gripper's they may be unknown
                number = isinstance(one, int | float) and not isinstance(one, bool)
                right = (number and one > 0) if key == "control_hz" else (number or one is None)
            if not right:
                raise InputError(f"an action convention whose {key} cannot be {one!r}")
        gripper = {key: math.nan for key in ("gripper_open", "gripper_closed") if value[key] is None}
        return cls(**value | gripper)

    @classmethod
    def unknown(cls, names: tuple[str, ...], control_hz: float) -> ActionConvention:
        """What is known of data that declare nothing but names and rate: LeRobot's."""
        some = "unknown"
        return cls(names, (some,) * len(names), some, some, None, math.nan, math.nan, control_hz, some)

    def differences(self, other: ActionConvention) -> list[str]:
        """Readable list of the fields in which two conventions differ; empty when they agree."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [f"{key} {mine[key]} against {theirs[key]}" for key in mine if mine[key] != theirs[key]]


_POSE = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")

BRIDGE = ActionConvention(
    names=_POSE,
    units=("m", "m", "m", "rad", "rad", "rad", "1"),
    frame="robot base, WidowX",
    rotation="euler_xyz",
    relative=True,
    gripper_open=1.0,
    gripper_closed=0.0,
    control_hz=5.0,
    scaling="physical units per step",
)

TABLETOP = replace(BRIDGE, frame="table, x to the right, y away from the camera, z up")

CALVIN = ActionConvention(
    names=_POSE,
    units=("1",) * 7,
    frame="world, Franka Panda of calvin_env",
    rotation="euler_xyz",
    relative=True,
    gripper_open=1.0,
    gripper_closed=-1.0,
    control_hz=30.0,
    scaling="1 is 0.02 m or 0.05 rad per step, clipped to [-1, 1]",
)

LIBERO = ActionConvention(
    names=("x", "y", "z", "rx", "ry", "rz", "gripper"),
    units=("1",) * 7,
    frame="robot base, Franka Panda of robosuite (OSC_POSE)",
    rotation="axis_angle",
    relative=True,
    gripper_open=-1.0,
    gripper_closed=1.0,
    control_hz=20.0,
    scaling="1 is 0.05 m or 0.5 rad per step, clipped to [-1, 1]",
)

FRACTAL = replace(BRIDGE, frame="robot base, Google robot", control_hz=3.0)
