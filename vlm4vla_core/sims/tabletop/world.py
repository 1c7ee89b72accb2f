"""Physics of the tabletop world: many independent worlds in one batch of NumPy arrays (float64, metres, radians).

A two-finger gripper with four degrees of freedom (x, y, z, yaw) over a table with two or three objects, which are
upright discs to the physics. It can grasp and carry, and it pushes when its fingers are closed; objects push each
other; nothing passes through the table, through a closed gripper or out of the workspace. Left out in version 0:
velocities, tipping, roll and pitch (these two action numbers are ignored), stacking (a released object drops to the
table), and collisions of an open gripper.

Trap: every operation is elementwise over worlds, written without reductions over the batch, so that a world's
future depends only on its own state and actions, never on the batch that it is stepped in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from vlm4vla_core.errors import InputError

VERSION = 0  # raise it with every change to scenes, physics, expert or looks: stores recorded before become stale
SLOTS = 3  # object slots per world; an absent object has kind -1
KINDS = ("cube", "ball", "cylinder")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
HALF_EXTENTS = np.array([[0.043, 0.043, 0.043], [0.046, 0.046, 0.046], [0.042, 0.042, 0.046]])  # (kind, xyz)
FOOTPRINT = 0.05  # radius of every object's disc; a cube's true outline is a little wider at its corners
PLATE_RADIUS = 0.085

WORKSPACE_LOW = np.array([-0.27, -0.27, 0.03])  # of the gripper's point, between its finger tips
WORKSPACE_HIGH = np.array([0.27, 0.27, 0.32])
RAIL = 0.03  # objects stay this close to the workspace, hence always within reach of a grasp
YAW_LIMIT = 1.2
MAX_STEP = 0.06  # longest translation of one action; a longer one is shortened, keeping its direction
MAX_TURN = 0.3  # largest yaw change of one action
SUBSTEPS = 4  # keeps a substep (15 mm) well below the contact distance, so that nothing is jumped over

GRASP_XY, GRASP_Z = 0.045, 0.056  # an object this near to the gripper's point when it closes is held
TIP = 0.01  # finger tips reach this far below the gripper's point
FINGER = 0.02  # radius of the closed fingers
CONTACT = FINGER + FOOTPRINT  # distance at which closed fingers touch an object
_TOLERANCE = 1e-6
_RELAXATIONS = 24


@dataclass(frozen=True)
class State:
    """n worlds. Arrays are replaced by `step`, never changed in place."""

    gripper: np.ndarray  # (n, 3) position of the point between the finger tips
    yaw: np.ndarray  # (n,)
    open: np.ndarray  # (n,) bool
    objects: np.ndarray  # (n, SLOTS, 3) centres
    object_yaw: np.ndarray  # (n, SLOTS)
    kind: np.ndarray  # (n, SLOTS) index into KINDS, -1 where absent
    colour: np.ndarray  # (n, SLOTS) index into COLOURS
    held: np.ndarray  # (n,) slot of the held object, -1 for none
    plate: np.ndarray  # (n, 2) centre of a flat plate, which nothing collides with
    plate_colour: np.ndarray  # (n,) index into COLOURS, -1 where there is no plate

    def __len__(self) -> int:
        return len(self.gripper)

    def __getitem__(self, rows: np.ndarray | slice | Sequence[int]) -> State:
        """The worlds `rows`, as a smaller batch."""
        return State(*(getattr(self, field.name)[rows] for field in fields(self)))


def stack(states: Sequence[State]) -> State:
    """Batches side by side, as one batch."""
    return State(*(np.concatenate([getattr(state, field.name) for state in states]) for field in fields(State)))


def proprioception(state: State) -> np.ndarray:
    """(n, 7) float32: x, y, z, roll (0), pitch (0), yaw, gripper (1 open, 0 closed)."""
    zero = np.zeros(len(state))
    columns = [*state.gripper.T, zero, zero, state.yaw, state.open.astype(float)]
    return np.stack(columns, 1).astype(np.float32)


def rest_height(kind: np.ndarray) -> np.ndarray:
    """Height of an object's centre when it stands on the table; same shape as `kind`."""
    return HALF_EXTENTS[kind, 2]


def length(vector: np.ndarray) -> np.ndarray:
    """Euclidean length over the last axis (2 or 3), in a fixed order of summation."""
    total = vector[..., 0] ** 2 + vector[..., 1] ** 2
    return np.sqrt(total + vector[..., 2] ** 2 if vector.shape[-1] == 3 else total)


def step(state: State, actions: np.ndarray) -> State:
    """One control step of every world.

    actions: (n, 7) in the `TABLETOP` convention: relative x, y, z (m), roll, pitch, yaw (rad), gripper (above 0.5
    means open). Translation is shortened to MAX_STEP and yaw clipped to MAX_TURN; roll and pitch are ignored. The
    motion happens with the fingers as they were; then the fingers open or close.
    Raises InputError on a wrong shape or a number that is not finite.
    """
    actions = np.asarray(actions, np.float64)
    if actions.shape != (len(state), 7):
        raise InputError(f"actions have shape {actions.shape}, expected {(len(state), 7)}")
    if not np.isfinite(actions).all():
        row, index = np.argwhere(~np.isfinite(actions))[0]
        raise InputError(f"action number {index} is {actions[row, index]}", where=f"world {row} of the batch")
    wanted = actions[:, :3]
    size = length(wanted)
    wanted = wanted * (MAX_STEP / np.maximum(size, MAX_STEP))[:, None]
    gripper, objects = state.gripper, state.objects
    for _ in range(SUBSTEPS):
        gripper, objects = _move(state, gripper, objects, wanted / SUBSTEPS)
    turn = np.clip(actions[:, 5], -MAX_TURN, MAX_TURN)
    yaw = np.clip(state.yaw + turn, -YAW_LIMIT, YAW_LIMIT)
    carried = np.arange(SLOTS) == state.held[:, None]  # (n, SLOTS)
    object_yaw = state.object_yaw + np.where(carried, (yaw - state.yaw)[:, None], 0.0)
    is_open, held, objects = _fingers(state, gripper, objects, actions[:, 6] > 0.5)
    gripper, objects = _separate(gripper, objects, state.kind, is_open, held)
    return State(
        gripper, yaw, is_open, objects, object_yaw, state.kind, state.colour, held, state.plate, state.plate_colour
    )


def _move(state: State, gripper: np.ndarray, objects: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Move the grippers by `delta` (n, 3) as far as they can go, with what they hold; push what is in the way."""
    carried = np.arange(SLOTS) == state.held[:, None]  # (n, SLOTS)
    below = np.where(carried, gripper[:, None, 2] - objects[..., 2] + rest_height(state.kind), 0.0).max(1)
    new = np.clip(gripper + delta, WORKSPACE_LOW, WORKSPACE_HIGH)
    new[:, 2] = np.maximum(new[:, 2], below)  # what is held stays above the table
    # A closed hand above an object comes to rest on it; it does not sink into it.
    bottom, reach = _pusher(gripper, objects, state.kind, state.open, state.held)
    top = 2 * rest_height(state.kind)  # (n, SLOTS)
    apart = length(objects[..., :2] - new[:, None, :2])
    over = (apart < reach[:, None]) & (bottom[:, None] >= top - _TOLERANCE) & (state.kind >= 0) & ~carried
    floor = np.where(over, top, -np.inf).max(1) + (gripper[:, 2] - bottom)
    new[:, 2] = np.maximum(new[:, 2], np.where(state.open, -np.inf, floor))
    objects = np.where(carried[..., None], objects + (new - gripper)[:, None], objects)
    return _separate(new, objects, state.kind, state.open, state.held)


def _pusher(
    gripper: np.ndarray, objects: np.ndarray, kind: np.ndarray, is_open: np.ndarray, held: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lowest point (n,) of the closed hand with what it holds, and its contact distance (n,); 0 for an open hand."""
    slot = np.maximum(held, 0)
    rows = np.arange(len(gripper))
    under = objects[rows, slot, 2] - rest_height(kind[rows, slot])
    bottom = np.where(held >= 0, under, gripper[:, 2] - TIP)
    reach = np.where(held >= 0, 2 * FOOTPRINT, CONTACT)
    return bottom, np.where(is_open, 0.0, reach)


def _fingers(
    state: State, gripper: np.ndarray, objects: np.ndarray, want_open: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Open or close: a released object drops to the table, the nearest one in reach is centred and held."""
    slots = np.arange(SLOTS)
    released = (slots == state.held[:, None]) & want_open[:, None]
    objects = objects.copy()
    objects[..., 2] = np.where(released, rest_height(state.kind), objects[..., 2])
    held = np.where(want_open, -1, state.held)
    offset = objects - gripper[:, None]
    apart = length(offset[..., :2])
    reachable = (state.kind >= 0) & (apart < GRASP_XY) & (np.abs(offset[..., 2]) < GRASP_Z)
    apart = np.where(reachable, apart, np.inf)
    closing = state.open & ~want_open & reachable.any(1)
    held = np.where(closing, apart.argmin(1), held)
    taken = (slots == held[:, None]) & closing[:, None]
    objects[..., :2] = np.where(taken[..., None], gripper[:, None, :2], objects[..., :2])
    return want_open.copy(), held, objects


def _separate(
    gripper: np.ndarray, objects: np.ndarray, kind: np.ndarray, is_open: np.ndarray, held: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Push discs apart: the hand moves objects, objects move each other, the rail stops them, the hand yields last."""
    bottom, reach = _pusher(gripper, objects, kind, is_open, held)
    slots = np.arange(SLOTS)
    lying = (kind >= 0) & (slots != held[:, None])  # (n, SLOTS)
    pushed = lying & (bottom[:, None] < 2 * rest_height(kind) - _TOLERANCE) & (reach > 0)[:, None]
    rows = np.flatnonzero(_overlap(gripper, objects, lying, pushed, reach))
    if not len(rows):
        return gripper, objects
    hand, discs = gripper[rows].copy(), objects[rows].copy()  # (r, 3), (r, SLOTS, 3)
    low, high = WORKSPACE_LOW[:2] - RAIL, WORKSPACE_HIGH[:2] + RAIL
    for _ in range(_RELAXATIONS):
        moved = False  # a settled row is left exactly as it is, so going on for the others' sake changes nothing
        for k in slots:
            away, missing = _contact(hand[:, :2], discs[:, k, :2], reach[rows], pushed[rows, k])
            discs[:, k, :2] = np.clip(discs[:, k, :2] + away * missing, low, high)
            moved |= bool(missing.any())
        for i in slots:
            for j in slots[i + 1 :]:
                both = lying[rows, i] & lying[rows, j]
                away, missing = _contact(discs[:, i, :2], discs[:, j, :2], 2 * FOOTPRINT, both)
                discs[:, i, :2] = np.clip(discs[:, i, :2] - away * missing / 2, low, high)
                discs[:, j, :2] = np.clip(discs[:, j, :2] + away * missing / 2, low, high)
                moved |= bool(missing.any())
        if not moved:
            break
    for k in slots:  # what an object at the rail could not give, the hand gives
        away, missing = _contact(hand[:, :2], discs[:, k, :2], reach[rows], pushed[rows, k])
        hand[:, :2] = np.clip(hand[:, :2] - away * missing, WORKSPACE_LOW[:2], WORKSPACE_HIGH[:2])
    yielded = hand - gripper[rows]
    carried = slots == held[rows, None]
    discs = np.where(carried[..., None], discs + yielded[:, None], discs)
    discs = np.where(kind[rows][..., None] >= 0, discs, objects[rows])  # the rail does not hold what is not there
    gripper, objects = gripper.copy(), objects.copy()
    gripper[rows], objects[rows] = hand, discs
    return gripper, objects


def _overlap(
    gripper: np.ndarray, objects: np.ndarray, lying: np.ndarray, pushed: np.ndarray, reach: np.ndarray
) -> np.ndarray:
    """(n,) bool: some discs overlap."""
    near_hand = length(objects[..., :2] - gripper[:, None, :2]) < reach[:, None] - _TOLERANCE  # (n, SLOTS)
    found = np.asarray((pushed & near_hand).any(1))
    for i in range(SLOTS):
        for j in range(i + 1, SLOTS):
            near = length(objects[:, i, :2] - objects[:, j, :2]) < 2 * FOOTPRINT - _TOLERANCE
            found |= near & lying[:, i] & lying[:, j]
    return found


def _contact(
    a: np.ndarray, b: np.ndarray, distance: np.ndarray | float, active: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors (r, 2) from a to b, and how far (r, 1) they are short of `distance`; 0 where not `active`."""
    apart = b - a
    size = length(apart)
    coincide = size < 1e-9
    unit = np.where(coincide[:, None], np.array([1.0, 0.0]), apart / np.where(coincide, 1.0, size)[:, None])
    missing = distance - size
    return unit, np.where(active & (missing > _TOLERANCE), missing, 0.0)[:, None]
