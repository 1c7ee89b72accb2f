"""What a picture of the tabletop world is made of: flat discs on the table (plates, shadows) and solids, with labels.

Trap: labels are written into recorded segmentations; they are never renumbered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm4vla_core.sims.tabletop import world
from vlm4vla_core.sims.tabletop.looks import Look
from vlm4vla_core.sims.tabletop.world import HALF_EXTENTS, PLATE_RADIUS, PLATES, State

# Segmentation labels; plate k is PLATE_0 + k, slot k is OBJECTS + k.
BACKGROUND, TABLETOP, GRIPPER, SWITCH, LAMP, PLATE_0 = 0, 1, 2, 3, 4, 5
OBJECTS = PLATE_0 + PLATES
_FINGER, _PALM, _WRIST = (0.96, 0.50, 0.10), (0.15, 0.15, 0.17), (0.88, 0.89, 0.93)
_RAIL, _KNOB, _LAMP_OFF, _LAMP_ON = (0.30, 0.30, 0.33), (0.93, 0.93, 0.95), (0.36, 0.34, 0.30), (1.0, 0.93, 0.55)
_LAMP_Y, _LAMP_RADIUS = 0.33, 0.035
_GLOW = 1.75  # the lit lamp's own light, as a factor on its paint: bright from every side, and still yellow


@dataclass(frozen=True)
class Decal:
    """Discs on the table: plates (colour, label) or soft shadows (strength). A world may have several."""

    rows: np.ndarray  # (r,) worlds
    centre: np.ndarray  # (r, 2)
    radius: np.ndarray  # (r,)
    colour: np.ndarray | None = None  # (r, 3)
    strength: np.ndarray | None = None  # (r,) darkness of a shadow's core
    label: np.ndarray | None = None  # (r,)


def decals(state: State, looks: Sequence[Look], hand: bool) -> Iterator[Decal]:
    palette = np.array([look.palette for look in looks])  # (n, colours, 3)
    rows, plate = np.nonzero(state.plate_colour >= 0)  # plates never overlap
    colour = palette[rows, state.plate_colour[rows, plate]]
    yield Decal(rows, state.plate[rows, plate], np.full(len(rows), PLATE_RADIUS), colour=colour, label=PLATE_0 + plate)
    light = np.stack([look.towards_light() for look in looks])
    slope = -light[:, :2] / light[:, 2:]  # shadows move by this per metre of height
    rows, slot = np.nonzero(state.kind >= 0)
    point, radius = state.objects[rows, slot], np.full(len(rows), 0.060)
    if hand:
        rows = np.concatenate([rows, np.arange(len(state))])
        point = np.concatenate([point, state.gripper + np.array([0.0, 0.0, 0.05])])
        radius = np.concatenate([radius, np.full(len(state), 0.065)])
    height = point[:, 2]
    centre = point[:, :2] + slope[rows] * height[:, None]
    yield Decal(rows, centre, radius * (1 + 0.5 * height), strength=0.55 / (1 + 2.0 * height))


@dataclass(frozen=True)
class Solids:
    """Solids of one kind and of similar size; a world may have several."""

    kind: int  # index into world.KINDS
    rows: np.ndarray  # (r,) worlds
    centre: np.ndarray  # (r, 3)
    half: np.ndarray  # (r, 3)
    yaw: np.ndarray  # (r,)
    colour: np.ndarray  # (r, 3)
    label: np.ndarray  # (r,)


FIELDS = ("rows", "centre", "half", "yaw", "colour", "label")


def _join(kind: int, parts: Sequence[Solids]) -> Solids:
    return Solids(kind, *(np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS))


def solids(state: State, looks: Sequence[Look], hand: bool) -> Iterator[Solids]:
    """Everything that stands or moves: objects with switch and lamp, then fingers, palm and wrist."""
    n, palette = len(state), np.array([look.palette for look in looks])  # (looks, colours, 3)
    rows = np.arange(n)

    def each(kind: int, centre: np.ndarray, half: Any, yaw: np.ndarray, paint: Any, label: int) -> Solids:
        shape = (n, 3)
        filled = np.broadcast_to(half, shape), yaw, np.broadcast_to(paint, shape), np.full(n, label)
        return Solids(kind, rows, centre, *filled)

    def at(x: np.ndarray, y: float, z: float) -> np.ndarray:
        return np.stack([x, np.full(n, y), np.full(n, z)], 1)

    still, half_knob = np.zeros(n), world.KNOB_HEIGHT / 2
    lit = np.where(world.switched_on(state)[:, None], np.array(_LAMP_ON) * _GLOW, _LAMP_OFF)
    knob = (0.8 * world.KNOB_RADIUS, 0.8 * world.KNOB_RADIUS, half_knob)
    fixture = {
        1: each(1, at(state.rail, _LAMP_Y, _LAMP_RADIUS), _LAMP_RADIUS, still, lit, LAMP),
        2: each(2, at(state.knob, world.SWITCH_Y, half_knob), knob, still, _KNOB, SWITCH),
    }
    for kind, extent in enumerate(HALF_EXTENTS):
        mine, slot = np.nonzero(state.kind == kind)
        half = np.broadcast_to(extent, (len(mine), 3))
        colour, yaw = palette[mine, state.colour[mine, slot]], state.object_yaw[mine, slot]
        found = Solids(kind, mine, state.objects[mine, slot], half, yaw, colour, OBJECTS + slot)
        if kind in fixture:
            found = _join(kind, [found, fixture[kind]])
        if len(found.rows):
            yield found
    reach = world.KNOB_TRAVEL + world.KNOB_RADIUS
    yield each(0, at(state.rail, world.SWITCH_Y, 0.006), (reach, 0.012, 0.006), still, _RAIL, SWITCH)
    if not hand:
        return
    sideways = np.stack([np.cos(state.yaw), np.sin(state.yaw), np.zeros(n)], 1)
    spread = np.where(state.open, 0.066, np.where(state.held >= 0, 0.053, 0.010))[:, None]
    up, finger = np.array([0.0, 0.0, 1.0]), (0.010, 0.016, 0.042)
    fingers = [
        each(0, state.gripper + 0.030 * up + side * spread * sideways, finger, state.yaw, _FINGER, GRIPPER)
        for side in (-1.0, 1.0)
    ]
    yield _join(0, [*fingers, each(0, state.gripper + 0.126 * up, (0.032, 0.032, 0.028), state.yaw, _WRIST, GRIPPER)])
    yield each(0, state.gripper + 0.085 * up, (0.084, 0.026, 0.013), state.yaw, _PALM, GRIPPER)
