"""What touches what: motion with contact, grasp and release, falling; the inside of `world.step`.

Trap: pushes are resolved by a bounded number of relaxations, so discs jammed in a corner may overlap by a fraction of a
millimetre; tests hold it below 5 mm under random actions.
"""

from __future__ import annotations

import numpy as np

from vlm4vla_core.sims.tabletop import world as w
from vlm4vla_core.sims.tabletop.world import SLOTS, State, length, rest_height

_RELAXATIONS = 24
_SLOTS = np.arange(SLOTS)
_I, _J = np.triu_indices(SLOTS, 1)  # pairs of slots
_LOW, _HIGH = w.WORKSPACE_LOW[:2] - w.RAIL, w.WORKSPACE_HIGH[:2] + w.RAIL


class Scene:
    """The changing part of n worlds during one control step; starts as copies, so a `State` is never changed."""

    def __init__(self, state: State) -> None:
        self.kind, self.rail = state.kind, state.rail
        self.gripper, self.objects, self.knob = state.gripper, state.objects, state.knob
        self.open, self.held, self.on = state.open, state.held, state.on
        self.half = rest_height(self.kind)  # (n, SLOTS)
        self.present = self.kind >= 0

    def move(self, delta: np.ndarray) -> None:
        """Move the hands by `delta` (n, 3) as far as they can go, with what they hold; push what is in the way."""
        carried = self.held[:, None] == _SLOTS  # (n, SLOTS)
        below = np.where(carried, self.gripper[:, None, 2] - self.objects[..., 2] + self.half, 0.0).max(1)
        new = np.clip(self.gripper + delta, w.WORKSPACE_LOW, w.WORKSPACE_HIGH)
        new[:, 2] = np.maximum(new[:, 2], below)  # what is held stays above the table
        # A closed hand above an object or the knob comes to rest on it; it does not sink into it.
        bottom, radius = self._pusher(self.gripper)
        top = self.objects[..., 2] + self.half  # (n, SLOTS)
        apart = length(self.objects[..., :2] - new[:, None, :2])
        over = (apart < (radius + w.FOOTPRINT)[:, None]) & (bottom[:, None] >= top - w.TOLERANCE)
        floor = np.where(over & self.present & ~carried, top, -np.inf).max(1)
        over = (length(self._knob_xy() - new[:, :2]) < radius + w.KNOB_RADIUS) & (bottom >= w.KNOB_HEIGHT - w.TOLERANCE)
        floor = np.maximum(floor, np.where(over, w.KNOB_HEIGHT, -np.inf)) + (self.gripper[:, 2] - bottom)
        new[:, 2] = np.maximum(new[:, 2], np.where(self.open, -np.inf, floor))
        self.objects = np.where(carried[..., None], self.objects + (new - self.gripper)[:, None], self.objects)
        self.gripper = new
        self._settle_contacts()

    def fingers(self, want_open: np.ndarray) -> None:
        """Open or close: what is let go falls, the nearest object in reach is centred and held."""
        held = np.where(want_open, -1, self.held)
        offset = self.objects - self.gripper[:, None]
        apart = length(offset[..., :2])
        loaded = (self.on[:, None, :] == _SLOTS[:, None]).any(2)  # (n, SLOTS): something stands on it
        reachable = self.present & ~loaded & (apart < w.GRASP_XY) & (np.abs(offset[..., 2]) < w.GRASP_Z)
        # The nearest in space: of a stack, the hand takes what it is at the height of.
        apart = np.where(reachable, length(offset), np.inf)
        closing = self.open & ~want_open & reachable.any(1)
        held = np.where(closing, apart.argmin(1), held)
        taken = (held[:, None] == _SLOTS) & closing[:, None]
        objects = self.objects.copy()
        objects[..., :2] = np.where(taken[..., None], self.gripper[:, None, :2], objects[..., :2])
        self.objects, self.open, self.held = objects, want_open.copy(), held
        self.on = np.where(taken, -1, self.on)
        self._settle_contacts()

    # --- contact

    def _knob_xy(self) -> np.ndarray:
        return np.stack([self.knob, np.full(len(self.knob), w.SWITCH_Y)], 1)  # (n, 2)

    def _pusher(self, gripper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lowest point (n,) of the closed hand with what it holds, and its radius (n,); far below 0 for an open
        hand."""
        slot, rows = np.maximum(self.held, 0), np.arange(len(gripper))
        under = self.objects[rows, slot, 2] - self.half[rows, slot]
        bottom = np.where(self.held >= 0, under, gripper[:, 2] - w.TIP)
        return bottom, np.where(self.open, -9.0, np.where(self.held >= 0, w.FOOTPRINT, w.FINGER))

    def _settle_contacts(self) -> None:
        """Push apart what overlaps and let fall what nothing carries; a fall may make new overlaps, once or twice."""
        for _ in range(3):
            self._separate()
            if not self._fall():
                return
        self._separate()

    def _separate(self) -> None:
        """Push discs apart: the hand moves objects and the knob, objects move each other, the rail stops them, and the
        hand yields last. What stands on a pushed object goes with it."""
        bottom, radius = self._pusher(self.gripper)
        lying = self.present & (self.held[:, None] != _SLOTS)  # (n, SLOTS)
        top = self.objects[..., 2] + self.half
        pushed = lying & (bottom[:, None] < top - w.TOLERANCE) & (radius > 0)[:, None]
        turns = (bottom < w.KNOB_HEIGHT - w.TOLERANCE) & (radius > 0)
        rows = np.flatnonzero(self._overlap(lying, pushed, turns, radius))
        if not len(rows):
            return
        hand, discs, knob = self.gripper[rows].copy(), self.objects[rows].copy(), self.knob[rows].copy()
        lying, pushed, turns, radius = lying[rows], pushed[rows], turns[rows], radius[rows]
        carry, upper = _carried_along(self.on[rows]), self.on[rows] >= 0  # (r, SLOTS, SLOTS), (r, SLOTS)
        level = np.abs(discs[:, :, None, 2] - discs[:, None, :, 2])
        beside = level < self.half[rows][:, :, None] + self.half[rows][:, None] - w.TOLERANCE  # (r, SLOTS, SLOTS)
        both = (lying[:, _I] & lying[:, _J]) & beside[:, _I, _J]  # (r, pairs)
        low = discs[..., 2] - self.half[rows] < w.KNOB_HEIGHT - w.TOLERANCE

        for _ in range(_RELAXATIONS):  # a settled row is left exactly as it is, however long the others take
            knob = self._turn(hand, knob, turns, radius, rows)
            spot = np.stack([knob, np.full(len(knob), w.SWITCH_Y)], 1)
            xy = discs[..., :2]  # (r, SLOTS, 2)
            moved = False
            for level in (pushed & ~upper, pushed & upper):  # what stands on a pushed object has gone with it
                away, missing = _contact(hand[:, None, :2], xy, radius[:, None] + w.FOOTPRINT, level)
                if missing.any():
                    xy, moved = _shifted(xy, away * missing, carry, lying), True
            away, missing = _contact(spot[:, None], xy, w.KNOB_RADIUS + w.FOOTPRINT, lying & low)
            if missing.any():  # after the hand: of the two, the hand can give way
                xy, moved = _shifted(xy, away * missing, carry, lying), True
            discs[..., :2] = xy
            away, missing = _contact(xy[:, _I], xy[:, _J], 2 * w.FOOTPRINT, both)  # (r, pairs, …)
            if not (moved | missing.any()):
                break
            shift = np.zeros_like(xy)
            for pair, (i, j) in enumerate(zip(_I, _J, strict=True)):
                shift[:, i] -= away[:, pair] * missing[:, pair] / 2
                shift[:, j] += away[:, pair] * missing[:, pair] / 2
            discs[..., :2] = _shifted(xy, shift, carry, lying)
        for k in _SLOTS:  # what an object at the rail could not give, the hand gives
            away, missing = _contact(hand[:, :2], discs[:, k, :2], radius + w.FOOTPRINT, pushed[:, k])
            if missing.any():
                hand[:, :2] = np.clip(hand[:, :2] - away * missing, w.WORKSPACE_LOW[:2], w.WORKSPACE_HIGH[:2])
        knob = self._give_way(discs, knob, lying & low, rows)
        spot = np.stack([knob, np.full(len(knob), w.SWITCH_Y)], 1)
        away, missing = _contact(hand[:, :2], spot, radius + w.KNOB_RADIUS, turns)
        hand[:, :2] = np.clip(hand[:, :2] - away * missing, w.WORKSPACE_LOW[:2], w.WORKSPACE_HIGH[:2])
        yielded = hand - self.gripper[rows]
        carried = self.held[rows, None] == _SLOTS
        discs = np.where(carried[..., None], discs + yielded[:, None], discs)
        discs = np.where(self.present[rows][..., None], discs, self.objects[rows])  # the rail holds only what is there
        self.gripper, self.objects, self.knob = self.gripper.copy(), self.objects.copy(), self.knob.copy()
        self.gripper[rows], self.objects[rows], self.knob[rows] = hand, discs, knob

    def _turn(
        self, hand: np.ndarray, knob: np.ndarray, turns: np.ndarray, radius: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        """The knob (r,) after the hand has shoved it along its rail."""
        across, along = w.SWITCH_Y - hand[:, 1], knob - hand[:, 0]
        need = np.sqrt(np.maximum((radius + w.KNOB_RADIUS) ** 2 - across**2, 0.0))
        side = np.where(along < 0, -1.0, 1.0)
        shoved = np.where(turns & (np.abs(along) < need - w.TOLERANCE), hand[:, 0] + side * need, knob)
        return np.clip(shoved, self.rail[rows] - w.KNOB_TRAVEL, self.rail[rows] + w.KNOB_TRAVEL)

    def _give_way(self, discs: np.ndarray, knob: np.ndarray, lying: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The knob (r,) where an object that is jammed at the rail stops it."""
        for k in _SLOTS:
            across, along = w.SWITCH_Y - discs[:, k, 1], knob - discs[:, k, 0]
            need = np.sqrt(np.maximum((w.FOOTPRINT + w.KNOB_RADIUS) ** 2 - across**2, 0.0))
            jammed = lying[:, k] & (np.abs(along) < need - w.TOLERANCE)
            knob = np.where(jammed, discs[:, k, 0] + np.where(along < 0, -1.0, 1.0) * need, knob)
        return np.clip(knob, self.rail[rows] - w.KNOB_TRAVEL, self.rail[rows] + w.KNOB_TRAVEL)

    def _overlap(self, lying: np.ndarray, pushed: np.ndarray, turns: np.ndarray, radius: np.ndarray) -> np.ndarray:
        """(n,) bool: something overlaps."""
        xy = self.objects[..., :2]
        near_hand = length(xy - self.gripper[:, None, :2]) < (radius + w.FOOTPRINT)[:, None] - w.TOLERANCE
        found = np.asarray((pushed & near_hand).any(1))
        spot = self._knob_xy()
        found |= turns & (length(spot - self.gripper[:, :2]) < radius + w.KNOB_RADIUS - w.TOLERANCE)
        low = self.objects[..., 2] - self.half < w.KNOB_HEIGHT - w.TOLERANCE
        near_knob = length(xy - spot[:, None]) < w.KNOB_RADIUS + w.FOOTPRINT - w.TOLERANCE
        found |= (near_knob & lying & low).any(1)
        near = length(xy[:, _I] - xy[:, _J]) < 2 * w.FOOTPRINT - w.TOLERANCE  # (n, pairs)
        near &= (
            np.abs(self.objects[:, _I, 2] - self.objects[:, _J, 2]) < self.half[:, _I] + self.half[:, _J] - w.TOLERANCE
        )
        return found | (near & lying[:, _I] & lying[:, _J]).any(1)

    # --- falling

    def _fall(self) -> bool:
        """Let fall what nothing carries, onto the flat top below it or onto the table; whether anything fell.

        On a ball, on an edge or on an object that carries another one already, it slides off to the side.
        """
        slots = np.maximum(self.on, 0)
        base = np.take_along_axis(self.objects[..., :2], slots[..., None], 1)
        slipped = (self.on >= 0) & (length(self.objects[..., :2] - base) > w.STACK_REACH)
        self.on = np.where(slipped, -1, self.on)
        high = self.objects[..., 2] > self.half + w.TOLERANCE
        falling = self.present & (self.held[:, None] != _SLOTS) & (self.on < 0) & high
        rows = np.flatnonzero(falling.any(1))
        if not len(rows):
            return False
        objects, on, falling = self.objects[rows].copy(), self.on[rows].copy(), falling[rows]
        half, kind, solid = self.half[rows], self.kind[rows], self.present[rows] & (self.held[rows, None] != _SLOTS)
        for attempt in range(SLOTS + 1):
            for k in _SLOTS:
                active = falling[:, k]
                if not active.any():
                    continue
                top = objects[..., 2] + half  # (r, SLOTS)
                under = objects[:, k, 2] - half[:, k]
                beneath = solid & ~falling & (k != _SLOTS) & (top <= under[:, None] + w.TOLERANCE)
                apart = length(objects[..., :2] - objects[:, None, k, :2])
                beneath &= apart < 2 * w.FOOTPRINT - w.TOLERANCE
                top = np.where(beneath, top, -1.0)
                j = top.argmax(1)
                row = np.arange(len(rows))
                met = beneath[row, j]
                free = ~(on == j[:, None]).any(1)
                stands = met & free & w.FLAT_TOP[kind[row, j]] & (apart[row, j] < w.STACK_REACH)
                lands = active & (~met | (attempt == SLOTS))
                slides = active & ~stands & ~lands
                stands &= active & ~lands
                height = np.where(stands, top[row, j], 0.0) + half[:, k]
                objects[:, k, 2] = np.where(lands | stands, height, objects[:, k, 2])
                on[:, k] = np.where(stands, j, on[:, k])
                away, _ = _contact(objects[row, j, :2], objects[:, k, :2], 0.0, active)
                aside = np.clip(objects[row, j, :2] + away * 2 * w.FOOTPRINT, _LOW, _HIGH)
                objects[:, k, :2] = np.where(slides[:, None], aside, objects[:, k, :2])
                falling[:, k] &= slides
        for _ in range(SLOTS - 1):  # what stands on something that fell goes down with it
            base = np.take_along_axis(objects[..., 2] + half, np.maximum(on, 0), 1)
            objects[..., 2] = np.where(on >= 0, base + half, objects[..., 2])
        self.objects, self.on = self.objects.copy(), self.on.copy()
        self.objects[rows], self.on[rows] = objects, on
        return True


def _shifted(xy: np.ndarray, shift: np.ndarray, carry: np.ndarray, lying: np.ndarray) -> np.ndarray:
    """Discs (r, SLOTS, 2) moved by `shift` (r, SLOTS, 2), with what stands on them, as far as the rail lets them."""
    moved = xy
    for k in _SLOTS:
        moved = moved + carry[:, k, :, None] * shift[:, None, k]
    return np.where(lying[..., None], np.clip(moved, _LOW, _HIGH), xy)


def _carried_along(on: np.ndarray) -> np.ndarray:
    """(r, SLOTS, SLOTS) from (r, SLOTS): entry k, j says that j is k or stands, perhaps through others, on k."""
    carry = (on[:, None, :] == _SLOTS[:, None]) | (_SLOTS[:, None] == _SLOTS)
    for _ in range(2):  # chains of up to four
        carry = (carry[:, :, :, None] & carry[:, None]).any(2)
    return np.asarray(carry)


def _contact(
    a: np.ndarray, b: np.ndarray, distance: np.ndarray | float, active: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors (..., 2) from a to b, and how far (..., 1) they are short of `distance`; 0 where not `active`."""
    apart = b - a
    size = length(apart)
    coincide = size < 1e-9
    unit = np.where(coincide[..., None], np.array([1.0, 0.0]), apart / np.where(coincide, 1.0, size)[..., None])
    missing = distance - size
    return unit, np.where(active & (missing > w.TOLERANCE), missing, 0.0)[..., None]
