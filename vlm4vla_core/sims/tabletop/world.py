"""Physics of the tabletop world: many independent worlds in one batch of NumPy arrays (float64, metres, radians).

A two-finger gripper with four degrees of freedom (x, y, z, yaw) over a table with up to four objects, which are
upright discs to the physics, two flat plates, and a switch: a knob on a rail at the back, right is on. The hand can
grasp, carry, place and stack; with its fingers closed it pushes objects and the knob. Objects push each other; what is
let go, or loses its support, falls onto the flat top below it or onto the table. Left out: velocities, tipping, roll
and pitch (these two action numbers are ignored), and collisions of an open hand.

Trap: every operation is elementwise over worlds, written without reductions over the batch, so that a world's
future depends only on its own state and actions, never on the batch that it is stepped in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from vlm4vla_core.errors import InputError

VERSION = 2  # raise it with every change to scenes, physics, expert or looks: stores recorded before become stale
SLOTS = 4  # object slots per world; an absent object has kind -1
PLATES = 2
KINDS = ("cube", "ball", "cylinder")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
HALF_EXTENTS = np.array([[0.043, 0.043, 0.043], [0.046, 0.046, 0.046], [0.042, 0.042, 0.046]])  # (kind, xyz)
FLAT_TOP = np.array([True, False, True])  # (kind,) something can stand on it
FOOTPRINT = 0.05  # radius of every object's disc; a cube's true outline is a little wider at its corners
STACK_REACH = 0.04  # an object stands on another while their centres are this near
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

SWITCH_Y = 0.25  # the knob's rail runs along x here
KNOB_RADIUS, KNOB_HEIGHT, KNOB_TRAVEL = 0.03, 0.06, 0.05  # the knob moves by TRAVEL to either side of the rail's middle
TOLERANCE = 1e-6


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
    on: np.ndarray  # (n, SLOTS) slot of the object that it stands on, -1 for the table or the hand
    plate: np.ndarray  # (n, PLATES, 2) centres of flat plates, which nothing collides with
    plate_colour: np.ndarray  # (n, PLATES) index into COLOURS, -1 where there is no plate
    rail: np.ndarray  # (n,) x of the middle of the switch's rail
    knob: np.ndarray  # (n,) x of the knob

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


def switched_on(state: State) -> np.ndarray:
    """(n,) bool: the knob is right of its rail's middle, and the lamp is lit."""
    return state.knob > state.rail


def contacts(state: State) -> np.ndarray:
    """(n, SLOTS) bool: the hand holds the object, or its closed fingers touch it (within 2 mm)."""
    held = np.arange(SLOTS) == state.held[:, None]
    apart = length(state.objects[..., :2] - state.gripper[:, None, :2])
    level = state.gripper[:, None, 2] - TIP < state.objects[..., 2] + rest_height(state.kind) + 0.002
    return held | ((apart < CONTACT + 0.002) & level & (state.kind >= 0) & ~state.open[:, None])


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
    from vlm4vla_core.sims.tabletop.contacts import Scene

    actions = np.asarray(actions, np.float64)
    if actions.shape != (len(state), 7):
        raise InputError(f"actions have shape {actions.shape}, expected {(len(state), 7)}")
    if not np.isfinite(actions).all():
        row, index = np.argwhere(~np.isfinite(actions))[0]
        raise InputError(f"action number {index} is {actions[row, index]}", where=f"world {row} of the batch")
    wanted = actions[:, :3]
    wanted = wanted * (MAX_STEP / np.maximum(length(wanted), MAX_STEP))[:, None]
    turn = np.clip(actions[:, 5], -MAX_TURN, MAX_TURN)
    yaw = np.clip(state.yaw + turn, -YAW_LIMIT, YAW_LIMIT)
    carried = np.arange(SLOTS) == state.held[:, None]  # (n, SLOTS)
    object_yaw = state.object_yaw + np.where(carried, (yaw - state.yaw)[:, None], 0.0)
    want_open = actions[:, 6] > 0.5
    moved = replace(_moved_freely(state, wanted), yaw=yaw, object_yaw=object_yaw)
    rows = np.flatnonzero((want_open != state.open) | _near_contact(state))
    if not len(rows):
        return moved
    scene = Scene(state[rows])
    for _ in range(SUBSTEPS):
        scene.move(wanted[rows] / SUBSTEPS)
    scene.fingers(want_open[rows])
    merged = {}
    for name in ("gripper", "objects", "open", "held", "on", "knob"):
        merged[name] = getattr(moved, name).copy()
        merged[name][rows] = getattr(scene, name)
    return replace(moved, **merged)


def _moved_freely(state: State, delta: np.ndarray) -> State:
    """Hands moved by `delta` (n, 3), with what they hold, where nothing is in the way but table and workspace."""
    carried = np.arange(SLOTS) == state.held[:, None]  # (n, SLOTS)
    under = state.objects[..., 2] - rest_height(state.kind)
    low = np.where(carried, state.gripper[:, None, 2] - under, 0.0).max(1)
    new = np.clip(state.gripper + delta, WORKSPACE_LOW, WORKSPACE_HIGH)
    new[:, 2] = np.maximum(new[:, 2], low)  # what is held stays above the table
    objects = np.where(carried[..., None], state.objects + (new - state.gripper)[:, None], state.objects)
    return replace(state, gripper=new, objects=objects)


def _near_contact(state: State) -> np.ndarray:
    """(n,) bool: a closed hand, with what it holds, that may touch something within one step."""
    carried = np.arange(SLOTS) == state.held[:, None]
    reach = np.where(state.held >= 0, FOOTPRINT, FINGER) + MAX_STEP + TOLERANCE  # (n,)
    apart = length(state.objects[..., :2] - state.gripper[:, None, :2])
    near = ((apart < reach[:, None] + FOOTPRINT) & (state.kind >= 0) & ~carried).any(1)
    spot = np.stack([state.knob, np.full(len(state), SWITCH_Y)], 1)
    near |= length(spot - state.gripper[:, :2]) < reach + KNOB_RADIUS
    return ~state.open & near
