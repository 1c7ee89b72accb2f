"""What touches what: motion with contact, grasp and release, falling; the inside of `world.step`.

A motion that would leave things inside each other, because all are jammed, is not carried out.

Trap: pushes are resolved by a bounded number of relaxations, so where fingers close or something falls among things
jammed in a corner, they may overlap by a few millimetres; tests hold it below 5 mm under random actions.
"""

from __future__ import annotations

import numpy as np

from vlm4vla_core.sims.tabletop import world as w
from vlm4vla_core.sims.tabletop.world import SLOTS, State, length, rest_height

_RELAXATIONS = 24
_JAMMED, _SQUEEZED = 5e-4, 4e-3  # m of overlap that a motion, and closing fingers, may leave
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
        self.unsure = np.ones(len(state), bool)  # whether objects may overlap or hang in the air

    def move(self, delta: np.ndarray) -> None:
        """Move the hands by `delta` (n, 3) as far as they can go, with what they hold; push what is in the way."""
        before = self._moving()
        carried = self.held[:, None] == _SLOTS  # (n, SLOTS)
        below = np.where(carried, self.gripper[:, None, 2] - self.objects[..., 2] + self.half, 0.0).max(1)
        new = np.clip(self.gripper + delta, w.WORKSPACE_LOW, w.WORKSPACE_HIGH)
        new[:, 2] = np.maximum(new[:, 2], below)  # what is held stays above the table
        # A closed hand above an object or the knob comes to rest on it; it does not sink into it.
        bottom, radius = self._pusher(slice(None))
        top = self.objects[..., 2] + self.half  # (n, SLOTS)
        apart = length(self.objects[..., :2] - new[:, None, :2])
        over = (apart < (radius + w.FOOTPRINT)[:, None]) & (bottom[:, None] >= top - w.TOLERANCE)
        floor = np.where(over & self.present & ~carried, top, -np.inf).max(1)
        over = (length(_at_switch(self.knob) - new[:, :2]) < radius + w.KNOB_RADIUS) & (
            bottom >= w.KNOB_HEIGHT - w.TOLERANCE
        )
        floor = np.maximum(floor, np.where(over, w.KNOB_HEIGHT, -np.inf)) + (self.gripper[:, 2] - bottom)
        new[:, 2] = np.maximum(new[:, 2], np.where(self.open, -np.inf, floor))
        self.objects = np.where(carried[..., None], self.objects + (new - self.gripper)[:, None], self.objects)
        self.gripper = new
        self._undo(self._settle_contacts(), before, _JAMMED)

    def fingers(self, want_open: np.ndarray) -> None:
        """Open or close: what is let go falls, the nearest object in reach is centred and held."""
        before, held = self._moving(), np.where(want_open, -1, self.held)
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
        self.unsure = want_open != self.open
        self.objects, self.open, self.held = objects, want_open.copy(), held
        self.on = np.where(taken, -1, self.on)
        jammed = self._settle_contacts()
        self._undo(jammed[~want_open[jammed]], before, _SQUEEZED)

    # --- contact

    def _pusher(self, rows: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """Lowest point (r,) of the closed hand with what it holds, and its radius (r,); far below 0 for an open
        hand."""
        held, hand = self.held[rows], self.gripper[rows]
        under = (self.objects[rows, :, 2] - self.half[rows])[np.arange(len(held)), np.maximum(held, 0)]
        bottom = np.where(held >= 0, under, hand[:, 2] - w.TIP)
        return bottom, np.where(self.open[rows], -9.0, np.where(held >= 0, w.FOOTPRINT, w.FINGER))

    def _settle_contacts(self) -> np.ndarray:
        """Push apart what overlaps and let fall what nothing carries, by turns; a fall may make new overlaps.

        Returns the worlds in which something may still be jammed.
        """
        pressed = self._hand_depth(slice(None)) > w.TOLERANCE
        rows = np.flatnonzero(pressed | self.unsure)
        deep = pressed[rows]  # what the hand presses on needs no second look
        self.unsure = np.zeros(len(pressed), bool)
        for _ in range(4):
            if not len(rows):
                return rows
            deep[~deep] = self._depth(rows[~deep]) > w.TOLERANCE
            jammed = self._separate(rows[deep])
            rows = np.union1d(jammed, self._fall(rows))
            deep = np.zeros(len(rows), bool)
        return rows

    def _moving(self) -> tuple[np.ndarray, ...]:
        return self.gripper, self.objects, self.knob, self.on, self.open, self.held

    def _undo(self, rows: np.ndarray, before: tuple[np.ndarray, ...], limit: float) -> None:
        """Take those of the worlds `rows` back to `before` that are left deeper than `limit` (m) in each other, and
        deeper than they were."""
        if not len(rows):
            return
        after, deep = self._moving(), self._depth(rows)
        self.gripper, self.objects, self.knob, self.on, self.open, self.held = before
        rows = rows[(deep > limit) & (deep > self._depth(rows) + w.TOLERANCE)]
        merged = [now.copy() for now in after]
        for value, then in zip(merged, before, strict=True):
            value[rows] = then[rows]
        self.gripper, self.objects, self.knob, self.on, self.open, self.held = merged

    def _separate(self, rows: np.ndarray) -> np.ndarray:
        """Push discs apart: the hand moves objects and the knob, objects move each other, the rail stops them, and the
        hand yields last. What stands on a pushed object goes with it. Returns those of `rows` where that did not do."""
        if not len(rows):
            return rows
        hand, discs, knob = self.gripper[rows], self.objects[rows], self.knob[rows]
        half, on = self.half[rows], self.on[rows]
        (bottom, radius), carried = self._pusher(rows), self.held[rows, None] == _SLOTS
        lying = self.present[rows] & ~carried  # (r, SLOTS)
        pushed = lying & (bottom[:, None] < discs[..., 2] + half - w.TOLERANCE) & (radius > 0)[:, None]
        turns = (bottom < w.KNOB_HEIGHT - w.TOLERANCE) & (radius > 0)
        upper = on >= 0
        carry = _carried_along(on) if upper.any() else None  # (r, SLOTS, SLOTS)
        levels = (pushed & ~upper, pushed & upper) if upper.any() else (pushed,)
        both = self._beside(rows) & lying[:, _I] & lying[:, _J]  # (r, pairs)
        low = lying & (discs[..., 2] - half < w.KNOB_HEIGHT - w.TOLERANCE)
        reach, xy, held = radius[:, None] + w.FOOTPRINT, discs[..., :2], (self.rail[rows], turns, radius)

        for _ in range(_RELAXATIONS):  # a settled row is left exactly as it is, however long the others take
            knob = _turn(hand, knob, *held)
            loose = np.zeros(len(rows), bool)
            for level in levels:  # what stands on a pushed object has gone with it
                away, short = _contact(hand[:, None, :2], xy, reach, level)
                if short.any():
                    xy, loose = _shifted(xy, away, carry, lying), loose | short.any(1)
            away, short = _contact(_at_switch(knob)[:, None], xy, w.KNOB_RADIUS + w.FOOTPRINT, low)
            if short.any():  # after the hand: of the two, the hand can give way
                xy, loose = _shifted(xy, away, carry, lying), loose | short.any(1)
            away, short = _contact(xy[:, _I], xy[:, _J], 2 * w.FOOTPRINT, both)  # (r, pairs, 2), (r, pairs)
            if short.any():
                shift, loose = np.zeros_like(xy), loose | short.any(1)
                for pair, (i, j) in enumerate(zip(_I, _J, strict=True)):
                    shift[:, i] -= away[:, pair] / 2
                    shift[:, j] += away[:, pair] / 2
                xy = _shifted(xy, shift, carry, lying)
            if not loose.any():
                break
        if loose.any():
            for k in _SLOTS:  # what an object at the rail could not give, the hand gives
                hand = _yielded(hand, xy[:, k], reach[:, 0], pushed[:, k] & loose)
            knob = np.where(loose, _give_way(xy, knob, self.rail[rows], low), knob)
        hand = _yielded(hand, _at_switch(knob), radius + w.KNOB_RADIUS, turns)
        given = hand - self.gripper[rows]
        discs[..., :2] = np.where(self.present[rows][..., None], xy, discs[..., :2])  # the rail holds what is there
        discs = np.where(carried[..., None], discs + given[:, None], discs)
        self.gripper, self.objects, self.knob = self.gripper.copy(), self.objects.copy(), self.knob.copy()
        self.gripper[rows], self.objects[rows], self.knob[rows] = hand, discs, knob
        return rows[loose | (given != 0).any(1)]

    def _beside(self, rows: np.ndarray) -> np.ndarray:
        """(r, pairs) bool: two objects are at one height, so that they cannot be at one place."""
        half, z = self.half[rows], self.objects[rows, :, 2]
        return np.asarray(np.abs(z[:, _I] - z[:, _J]) < half[:, _I] + half[:, _J] - w.TOLERANCE)

    def _hand_depth(self, rows: np.ndarray | slice) -> np.ndarray:
        """(r,) how deep the closed hand, with what it holds, is in anything (m)."""
        (bottom, radius), hand = self._pusher(rows), self.gripper[rows]
        pushed = bottom[:, None] < self.objects[rows, :, 2] + self.half[rows] - w.TOLERANCE
        pushed &= self.present[rows] & (self.held[rows, None] != _SLOTS)
        inside = (radius + w.FOOTPRINT)[:, None] - length(self.objects[rows, :, :2] - hand[:, None, :2])
        turns = bottom < w.KNOB_HEIGHT - w.TOLERANCE
        in_knob = radius + w.KNOB_RADIUS - length(_at_switch(self.knob[rows]) - hand[:, :2])
        return np.maximum(np.where(pushed, inside, 0.0).max(1), np.where(turns, in_knob, 0.0))

    def _depth(self, rows: np.ndarray) -> np.ndarray:
        """(r,) the deepest overlap of all (m)."""
        xy, lying = self.objects[rows, :, :2], self.present[rows] & (self.held[rows, None] != _SLOTS)
        low = self.objects[rows, :, 2] - self.half[rows] < w.KNOB_HEIGHT - w.TOLERANCE
        in_knob = w.KNOB_RADIUS + w.FOOTPRINT - length(xy - _at_switch(self.knob[rows])[:, None])
        pairs = 2 * w.FOOTPRINT - length(xy[:, _I] - xy[:, _J])  # (r, pairs)
        pairs = np.where(self._beside(rows) & lying[:, _I] & lying[:, _J], pairs, 0.0)
        return np.maximum(self._hand_depth(rows), np.maximum(np.where(low & lying, in_knob, 0.0).max(1), pairs.max(1)))

    # --- falling

    def _fall(self, rows: np.ndarray) -> np.ndarray:
        """Let fall what nothing carries, onto the flat top below it or onto the table; those of `rows` where it did.

        On a ball, on an edge or on an object that carries another one already, it slides off to the side.
        """
        on, place = self.on[rows], self.objects[rows]
        base = np.take_along_axis(place[..., :2], np.maximum(on, 0)[..., None], 1)
        on = np.where((on >= 0) & (length(place[..., :2] - base) > w.STACK_REACH), -1, on)  # slipped
        falling = self.present[rows] & (self.held[rows, None] != _SLOTS) & (on < 0)
        falling &= place[..., 2] > self.half[rows] + w.TOLERANCE
        some = falling.any(1)
        if not some.any():
            return rows[:0]
        self.on = self.on.copy()
        self.on[rows] = on
        rows, falling = rows[some], falling[some]
        objects, on = self.objects[rows], self.on[rows]
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
                away = _unit(objects[:, k, :2] - objects[row, j, :2])
                aside = np.clip(objects[row, j, :2] + away * 2 * w.FOOTPRINT, _LOW, _HIGH)
                objects[:, k, :2] = np.where(slides[:, None], aside, objects[:, k, :2])
                falling[:, k] &= slides
        for _ in range(SLOTS - 1):  # what stands on something that fell goes down with it
            base = np.take_along_axis(objects[..., 2] + half, np.maximum(on, 0), 1)
            objects[..., 2] = np.where(on >= 0, base + half, objects[..., 2])
        self.objects = self.objects.copy()
        self.objects[rows], self.on[rows] = objects, on
        return rows


def _at_switch(knob: np.ndarray) -> np.ndarray:
    """(r, 2) where the knobs are, from their x (r,)."""
    spot = np.full((len(knob), 2), w.SWITCH_Y)
    spot[:, 0] = knob
    return spot


def _turn(hand: np.ndarray, knob: np.ndarray, rail: np.ndarray, turns: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """The knob (r,) after the hand has shoved it along its rail, where it is low enough to (turns)."""
    across, along = w.SWITCH_Y - hand[:, 1], knob - hand[:, 0]
    need = np.sqrt(np.maximum((radius + w.KNOB_RADIUS) ** 2 - across**2, 0.0))
    side = np.where(along < 0, -1.0, 1.0)
    shoved = np.where(turns & (np.abs(along) < need - w.TOLERANCE), hand[:, 0] + side * need, knob)
    return np.clip(shoved, rail - w.KNOB_TRAVEL, rail + w.KNOB_TRAVEL)


def _give_way(xy: np.ndarray, knob: np.ndarray, rail: np.ndarray, low: np.ndarray) -> np.ndarray:
    """The knob (r,) where an object that is jammed at the rail stops it."""
    for k in _SLOTS:
        across, along = w.SWITCH_Y - xy[:, k, 1], knob - xy[:, k, 0]
        need = np.sqrt(np.maximum((w.FOOTPRINT + w.KNOB_RADIUS) ** 2 - across**2, 0.0))
        jammed = low[:, k] & (np.abs(along) < need - w.TOLERANCE)
        knob = np.where(jammed, xy[:, k, 0] + np.where(along < 0, -1.0, 1.0) * need, knob)
    return np.clip(knob, rail - w.KNOB_TRAVEL, rail + w.KNOB_TRAVEL)


def _yielded(hand: np.ndarray, spot: np.ndarray, reach: np.ndarray, active: np.ndarray) -> np.ndarray:
    """Hands (r, 3) out of what is at `spot` (r, 2): straight away from it, and sideways where the workspace ends."""
    away, short = _contact(hand[:, :2], spot, reach, active)
    if not short.any():
        return hand
    out = hand.copy()
    out[:, :2] = np.clip(hand[:, :2] - away, w.WORKSPACE_LOW[:2], w.WORKSPACE_HIGH[:2])
    short = active & (length(spot - out[:, :2]) < reach - w.TOLERANCE)
    side = np.where(out[:, 0] < spot[:, 0], -1.0, 1.0)
    aside = spot[:, 0] + side * np.sqrt(np.maximum(reach**2 - (out[:, 1] - spot[:, 1]) ** 2, 0.0))
    out[:, 0] = np.where(short, np.clip(aside, w.WORKSPACE_LOW[0], w.WORKSPACE_HIGH[0]), out[:, 0])
    return out


def _shifted(xy: np.ndarray, shift: np.ndarray, carry: np.ndarray | None, lying: np.ndarray) -> np.ndarray:
    """Discs (r, SLOTS, 2) moved by `shift` (r, SLOTS, 2), with what stands on them, as far as the rail lets them."""
    if carry is None:
        moved = xy + shift
    else:
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
    """Shifts (..., 2) straight away from a that bring b to `distance`, 0 where it is not nearer or not `active`; and
    where (...) bool they are not 0."""
    apart = b - a
    missing = distance - length(apart)
    short = active & (missing > w.TOLERANCE)
    if not short.any():
        return np.zeros_like(apart), short
    return _unit(apart) * np.where(short, missing, 0.0)[..., None], short


def _unit(vector: np.ndarray) -> np.ndarray:
    """The directions of vectors (..., 2); to the right where there is none."""
    size = length(vector)
    nowhere = size < 1e-9
    return np.where(nowhere[..., None], np.array([1.0, 0.0]), vector / np.where(nowhere, 1.0, size)[..., None])
