"""Initial scenes, and which asks follow each other: single tasks, chains and long tasks.

Everything here is a pure function of (task, seed) and, within a chain, of the world's own state: an episode is fixed by
its task, its seed and the actions taken.

Trap: the next ask of a chain is drawn from the state that the last one ended in, so two policies may be asked different
things from the second ask on. What is asked first, and every long task, is the same for all.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlm4vla_core.sims.tabletop import world
from vlm4vla_core.sims.tabletop.rules import ON_PLATE, SWITCH_REACH, SWITCH_ROOM, Ask
from vlm4vla_core.sims.tabletop.tasks import (
    FAMILIES,
    all_asks,
    check_task,
    fits,
    instruction,
    object_names,
    plate_names,
)
from vlm4vla_core.sims.tabletop.world import COLOURS, KINDS, PLATES, SLOTS, State

CHAIN = ("touch", "push", "pick", "put", "stack", "switch")  # families that a chain draws from
CHAIN_LENGTH = 5
_SPACING = 0.16  # m between the centres of objects at the start
_TRIES = 64  # scenes drawn together until one fits
_MARGIN = 0.04  # m between an object and the edge of the workspace at the start


@dataclass(frozen=True)
class Start:
    """One episode before its first step: a batch of one world, what is asked (all of it has to hold), and the words."""

    state: State
    asks: tuple[Ask, ...]
    instruction: str


def _rng(*words: int | str) -> np.random.Generator:
    return np.random.default_rng(
        np.random.SeedSequence([zlib.crc32(word.encode()) if isinstance(word, str) else word for word in words])
    )


def start(task: str, seed: int, *, held_out: bool = False) -> Start:
    """The initial state, ask and instruction of a single task; a pure function of (task, seed, held_out).

    The ask is drawn first and the scene is redrawn until it fits, so directions are equally frequent and start poses
    cover all of the workspace that leaves the task room. Raises InputError on an unknown task.
    """
    check_task(task)
    rng = _rng(task, seed)
    count = int(rng.integers(2, SLOTS + 1))
    asks = list(all_asks(task, count, PLATES))
    ask = asks[rng.integers(len(asks))]
    drawn = _fitting(rng, count, (ask,))
    return Start(drawn, (ask,), instruction(drawn, 0, ask, rng, held_out=held_out))


def _fitting(rng: np.random.Generator, count: int, asks: Sequence[Ask], flat: Sequence[int] = ()) -> State:
    """A scene of `count` objects in which every ask fits. flat: further slots whose objects must have a flat top."""
    colours = rng.permutation(len(COLOURS))
    plates = rng.permutation(len(COLOURS))
    kind = np.full((1, SLOTS), -1)
    kind[0, :count] = rng.integers(len(KINDS), size=count)
    for slot in [ask.other for ask in asks if FAMILIES[ask.family].needs == "base"] + list(flat):
        kind[0, slot] = 2 * rng.integers(2)  # cube or cylinder
    while True:
        for drawn in _draw(rng, kind, colours, plates):
            if all(fits(drawn, ask) for ask in asks):
                return drawn


def _draw(rng: np.random.Generator, kind: np.ndarray, colours: np.ndarray, plates: np.ndarray) -> Iterator[State]:
    """Worlds with random poses in which nothing stands too close together, out of `_TRIES` draws.

    kind: (1, SLOTS). colours: at least SLOTS colour numbers. plates: at least PLATES colour numbers.
    """
    low, high, n = world.WORKSPACE_LOW, world.WORKSPACE_HIGH, _TRIES
    present = np.flatnonzero(kind[0] >= 0)  # the first slots
    xy = rng.uniform(low[:2] + _MARGIN, high[:2] - _MARGIN, size=(n, len(present), 2))
    rail = rng.uniform(-0.12, 0.12, size=n)
    knob = rail + world.KNOB_TRAVEL * rng.choice([-1.0, 1.0], size=n)
    plate = rng.uniform(low[:2] + 0.06, high[:2] - 0.06, size=(n, PLATES, 2))
    gripper = rng.uniform([low[0], low[1], 0.08], high, size=(n, 3))
    yaw, object_yaw = rng.uniform(-0.6, 0.6, size=n), rng.uniform(-np.pi / 4, np.pi / 4, size=(n, SLOTS))

    def from_switch(points: np.ndarray) -> np.ndarray:
        """(n, k) distances of points (n, k, 2) from where a hand goes to shove the knob."""
        x = np.clip(points[..., 0], rail[:, None] - SWITCH_REACH, rail[:, None] + SWITCH_REACH)
        return world.length(points - np.stack([x, np.full_like(x, world.SWITCH_Y)], -1))

    apart = world.length(xy[:, :, None] - xy[:, None]) + np.eye(len(present))
    valid = (apart.min((1, 2)) > _SPACING) & (from_switch(xy).min(1) > SWITCH_ROOM)
    valid &= world.length(plate[:, 0] - plate[:, 1]) > 2 * world.PLATE_RADIUS + 0.02
    valid &= from_switch(plate).min(1) > SWITCH_ROOM + ON_PLATE
    for i in np.flatnonzero(valid):
        objects = np.full((1, SLOTS, 3), -1.0)
        objects[0, present, :2], objects[0, present, 2] = xy[i], world.rest_height(kind[0, present])
        yield State(
            gripper=gripper[[i]],
            yaw=yaw[[i]],
            open=np.ones(1, bool),
            objects=objects,
            object_yaw=object_yaw[[i]],
            kind=kind.copy(),
            colour=colours[None, :SLOTS].copy(),
            held=np.array([-1]),
            on=np.full((1, SLOTS), -1),
            plate=plate[[i]],
            plate_colour=plates[None, :PLATES].copy(),
            rail=rail[[i]],
            knob=knob[[i]],
        )


def scene(seed: int) -> State:
    """A scene to ask questions about, a pure function of the seed: two to four objects, two plates and the switch."""
    rng = _rng("scene", seed)
    return _fitting(rng, int(rng.integers(2, SLOTS + 1)), ())


# --- chains ---------------------------------------------------------------------------------------------------


def chain_start(seed: int) -> State:
    """The scene in which a chain of five begins: three or four objects."""
    rng = _rng("chain", seed)
    return _fitting(rng, int(rng.integers(3, SLOTS + 1)), (), flat=(0,))


def chain_ask(state: State, seed: int, place: int, *, held_out: bool = False) -> tuple[Ask, str]:
    """What is asked at `place` (0…4) of a chain in a world (a batch of one), and the words.

    A family is drawn among those of which some ask fits, then an ask of it.
    """
    rng = _rng("ask", seed, place)
    count = int((state.kind[0] >= 0).sum())
    options = {family: [ask for ask in all_asks(family, count, PLATES) if fits(state, ask)] for family in CHAIN}
    families = [family for family, asks in options.items() if asks]
    asks = options[families[rng.integers(len(families))]] if families else list(all_asks("touch", count, PLATES))
    ask = asks[rng.integers(len(asks))]
    return ask, instruction(state, 0, ask, rng, held_out=held_out)


# --- long tasks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LongTask:
    """Several asks in one sentence, all of which have to hold at once. Objects are slots 0, 1, 2; {a}, {b}, {c} their
    names, {p}, {q} those of the plates. first: asks that must fit at the start (later ones may need earlier ones).
    held_out: paraphrases that no demonstration uses."""

    templates: tuple[str, ...]
    held_out: tuple[str, ...]
    asks: tuple[Ask, ...]
    first: int
    step_limit: int
    flat: tuple[int, ...] = ()


_ON, _OFF = Ask("switch", direction="on"), Ask("switch", direction="off")
LONG: dict[str, LongTask] = {
    "two-plates": LongTask(
        ("put the {a} on the {p} and the {b} on the {q}", "move the {a} to the {p} and the {b} to the {q}"),
        ("bring the {a} to the {p} and the {b} to the {q}", "set the {b} down on the {q} and the {a} on the {p}"),
        (Ask("put", 0, 0), Ask("put", 1, 1)), 2, 90,
    ),
    "tower": LongTask(
        ("stack the {b} on the {a} and the {c} on the {b}",
         "put the {b} on top of the {a} and the {c} on top of the {b}"),
        ("set the {b} on the {a} and the {c} on the {b}", "stack the {c} on the {b} on the {a}"),
        (Ask("stack", 1, 0), Ask("stack", 2, 1)), 1, 100, (0, 1),
    ),
    "plate-and-light": LongTask(
        ("put the {a} on the {p} and turn on the light", "turn the light on and place the {a} on the {p}"),
        ("bring the {a} to the {p} and switch on the lamp", "turn the lamp on and set the {a} down on the {p}"),
        (Ask("put", 0, 0), _ON), 2, 90,
    ),
    "dark-plate": LongTask(
        ("turn off the light and put the {a} on the {q}", "move the {a} to the {q} and switch the light off"),
        ("switch off the lamp and bring the {a} to the {q}", "set the {a} down on the {q} and turn the lamp off"),
        (_OFF, Ask("put", 0, 1)), 2, 90,
    ),
    "stack-and-light": LongTask(
        ("stack the {b} on the {a} and turn on the light", "turn the light on and put the {b} on top of the {a}"),
        ("set the {b} on the {a} and switch on the lamp", "turn the lamp on and put the {b} onto the {a}"),
        (Ask("stack", 1, 0), _ON), 2, 90,
    ),
    "dark-stack": LongTask(
        ("turn off the light and stack the {b} on the {a}", "put the {b} on top of the {a} and switch the light off"),
        ("switch off the lamp and set the {b} on the {a}", "put the {b} onto the {a} and turn the lamp off"),
        (_OFF, Ask("stack", 1, 0)), 2, 90,
    ),
    "served-stack": LongTask(
        ("put the {a} on the {p} and stack the {b} on it", "place the {a} on the {p} and the {b} on top of it"),
        ("bring the {a} to the {p} and put the {b} onto it", "set the {b} on the {a} and the {a} on the {p}"),
        (Ask("put", 0, 0), Ask("stack", 1, 0)), 1, 100, (0,),
    ),
    "plate-and-stack": LongTask(
        ("put the {c} on the {p} and stack the {b} on the {a}", "stack the {b} on the {a} and move the {c} to the {p}"),
        ("bring the {c} to the {p} and put the {b} onto the {a}", "set the {b} on the {a} and the {c} on the {p}"),
        (Ask("put", 2, 0), Ask("stack", 1, 0)), 2, 100,
    ),
    "light-and-pick": LongTask(
        ("turn on the light and pick up the {a}", "switch the light on and lift the {a}"),
        ("switch on the lamp and take the {a}", "raise the {a} and turn the lamp on"),
        (_ON, Ask("pick", 0)), 2, 80,
    ),
    "plate-and-pick": LongTask(
        ("put the {a} on the {p} and pick up the {b}", "move the {a} to the {p} and lift the {b}"),
        ("bring the {a} to the {p} and take the {b}", "set the {a} down on the {p} and raise the {b}"),
        (Ask("put", 0, 0), Ask("pick", 1)), 2, 80,
    ),
}  # fmt: skip


def long_start(task: str, seed: int, *, held_out: bool = False) -> Start:
    """The initial state, asks and instruction of a long task; a pure function of (task, seed, held_out)."""
    entry, rng = LONG[task], _rng(task, seed)
    drawn = _fitting(rng, 3, entry.asks[: entry.first], flat=entry.flat)
    a, b, c = object_names(drawn, 0)
    p, q = plate_names(drawn, 0)
    template = str(
        rng.choice(entry.held_out if held_out else entry.templates)
    )  # after the scene, which stays as it was
    return Start(drawn, entry.asks, template.format(a=a, b=b, c=c, p=p, q=q))
