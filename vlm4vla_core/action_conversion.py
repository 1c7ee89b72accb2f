"""Actions of one convention as actions of another, exactly, or a refusal.

Gripper values, the rotation's representation and known scalings convert; a frame, a control rate or what a motion is
relative to do not.

Trap: a benchmark that clips, clips converted actions as well; conversion loses nothing, execution may.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

import numpy as np

from vlm4vla_core.actions import BRIDGE, CALVIN, LIBERO, ActionConvention
from vlm4vla_core.episodes.rotations import SIZES, convert_rotation
from vlm4vla_core.errors import InputError

# What one unit of an action stands for: metres, radians.
_UNITS = {BRIDGE.scaling: (1.0, 1.0), CALVIN.scaling: (0.02, 0.05), LIBERO.scaling: (0.05, 0.5)}
_KEPT = ("frame", "relative", "control_hz")


def refuse(differences: list[str], where: object) -> NoReturn:
    """Raise the InputError that names what differs."""
    raise InputError(
        f"the policy's actions do not mean what the benchmark expects: {'; '.join(differences)}",
        where=where,
        fix="train on data recorded in the benchmark's convention",
    )


def converter(
    source: ActionConvention, target: ActionConvention, *, where: object = ""
) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """A function from actions (..., A) in `source` to (..., B) in `target`, and what it does in words ("" for nothing).

    Raises InputError that lists the differences when they cannot be converted exactly.
    """
    differences = source.differences(target)
    if not differences:
        return lambda actions: actions, ""
    fixed = {field.partition(" ")[0] for field in differences} & set(_KEPT)
    scales = [_UNITS.get(one.scaling) for one in (source, target)]
    known = all(one.rotation in SIZES and one.size == 4 + SIZES[one.rotation] for one in (source, target))
    grips = [(one.gripper_open, one.gripper_closed) for one in (source, target)]
    if source.scaling == target.scaling:
        scales = [(1.0, 1.0)] * 2
    turned = source.rotation != target.rotation
    if turned and source.scaling == target.scaling:
        scales = [_UNITS.get(source.scaling)] * 2
    if fixed or None in scales or not known or np.isnan(grips).any() or (turned and not source.relative):
        refuse(differences, where)
    (from_m, from_rad), (to_m, to_rad) = (scale or (1.0, 1.0) for scale in scales)
    middle, opens_high = sum(grips[0]) / 2, grips[0][0] > grips[0][1]

    def convert(actions: np.ndarray) -> np.ndarray:
        actions = np.asarray(actions, np.float64)
        place = actions[..., :3] if from_m == to_m else actions[..., :3] * (from_m / to_m)
        turn = actions[..., 3:-1]
        if turned:
            turn = convert_rotation(turn * from_rad, source.rotation, target.rotation) / to_rad
        elif from_rad != to_rad:
            turn = turn * (from_rad / to_rad)
        opened = (actions[..., -1:] > middle) == opens_high
        return np.concatenate([place, turn, np.where(opened, *grips[1])], axis=-1)

    # Names and units follow from the rest.
    rest = replace(source, names=target.names, units=target.units) if source.size == target.size else source
    return convert, "; ".join(rest.differences(target)) or "names and units"
