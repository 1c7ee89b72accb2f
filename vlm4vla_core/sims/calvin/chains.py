"""CALVIN's 1000 chains of five tasks and their initial states, from our own code, checked against published hashes.

The chains are drawn by rejection: five different tasks of 34, until each can be asked where the one before leaves the
scene and no two are of one category (Mees et al. 2022, arXiv 2112.03227; the benchmark's published list). Drawing them
takes some seconds, so they are kept in the user's cache folder.

Trap: numpy's legacy generator and the *order* of tasks and of a state's keys decide what is drawn; a harmless
reordering here gives another benchmark, which the two hashes catch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CHAINS, LENGTH = 1000, 5
CHAINS_SHA256 = "13bc4fad80a302e6405e5f4f800cc028789a245409cd12df39b783099ad4860f"
STATES_SHA256 = "0789732599c9f93d6506018704c1717b42d9ce8921a430403964813f3c1ebd71"
COLOURS = ("red", "blue", "pink")
State = dict[str, Any]  # led, lightbulb: 0 or 1; slider: right/left; drawer; <colour>_block: place; grasped: 0 or 1

_CATEGORIES: dict[str, int] = {
    **{f"{verb}_{c}_block_{way}": 1 for verb in ("rotate", "push") for c in COLOURS for way in ("right", "left")},
    "move_slider_left": 2, "move_slider_right": 2, "open_drawer": 3, "close_drawer": 3,
    **{f"lift_{c}_block_{place}": 4 + k for c in COLOURS for k, place in enumerate(("table", "slider", "drawer"))},
    "place_in_slider": 7, "place_in_drawer": 7, "stack_block": 10, "unstack_block": 11,
    "turn_on_lightbulb": 8, "turn_off_lightbulb": 8, "turn_on_led": 8, "turn_off_led": 8, "push_into_drawer": 9,
}  # fmt: skip
TASKS = tuple(_CATEGORIES)  # in the order that the draw depends on


class Chain(NamedTuple):
    """A symbolic initial state and five tasks, to be asked one after the other."""

    state: State
    tasks: tuple[str, ...]


def fnv1_32(text: str) -> int:
    """The hash that seeds an initial state: 32 bit FNV-1 as pyhash has it, over UTF-16 bytes and starting from 0."""
    value = 0
    for byte in text.encode("utf-16-le"):
        value = ((value * 0x01000193) & 0xFFFFFFFF) ^ byte
    return value


def successors(state: State, task: str) -> list[State]:
    """Every state that `task` may lead to from `state`; none where it cannot be asked. A chain needs exactly one."""
    verb, place = task.split("_")[0], {c: state[f"{c}_block"] for c in COLOURS}
    held = [c for c in COLOURS if place[c] == "grasped"] if state["grasped"] else []
    if (verb in ("place", "stack")) != bool(state["grasped"]):
        return []
    if verb in ("rotate", "push") and task != "push_into_drawer":
        return [dict(state)] if place[task.split("_")[1]] == "table" else []
    if verb in ("turn", "move", "open", "close"):
        name, old, new = _switched(task)
        return [{**state, name: new}] if state[name] == old else []
    if verb == "lift":
        colour, where = task.split("_")[1], task.split("_")[3]
        other_side = {"right": "slider_left", "left": "slider_right"}[state["slider"]]  # the door leaves that one free
        if where == "slider":
            reached = place[colour] == other_side
        else:
            reached = place[colour] == where and (where == "table" or state["drawer"] == "open")
        return [{**state, f"{colour}_block": "grasped", "grasped": 1}] if reached else []
    if verb == "place":
        if task == "place_in_drawer" and state["drawer"] != "open":
            return []
        to = "drawer" if task == "place_in_drawer" else f"slider_{state['slider']}"
        return [{**state, f"{c}_block": to, "grasped": 0} for c in held]
    if verb == "stack":
        free = [(a, b) for a in held for b in COLOURS if place[b] == "table"]
        return [{**state, f"{a}_block": "stacked_top", f"{b}_block": "stacked_bottom", "grasped": 0} for a, b in free]
    if verb == "unstack":
        piles = [(a, b) for a in COLOURS for b in COLOURS if place[a] == "stacked_top" and place[b] == "stacked_bottom"]
        return [{**state, f"{a}_block": "table", f"{b}_block": "table"} for a, b in piles]
    alone = [
        c for c in COLOURS if place[c] == "table" and all(place[o].startswith("slider") for o in COLOURS if o != c)
    ]
    return [{**state, f"{c}_block": "drawer"} for c in alone if state["drawer"] == "open"]  # push_into_drawer


def _switched(task: str) -> tuple[str, Any, Any]:
    """What a task of doors and lights changes: key, value before, value after."""
    if task.startswith("turn_"):
        return task.rsplit("_", 1)[1], int("_off_" in task), int("_on_" in task)
    if task.startswith("move_"):
        return ("slider", "right", "left") if task.endswith("left") else ("slider", "left", "right")
    return ("drawer", "closed", "open") if task == "open_drawer" else ("drawer", "open", "closed")


def initial_states() -> list[State]:
    """The 192 symbolic states that chains start from, in the order that the draw depends on."""
    places = ("table", "slider_right", "slider_left")
    values = product((0, 1), (0, 1), ("right", "left"), ("closed", "open"), places, places, places, (0,))
    keys = ("led", "lightbulb", "slider", "drawer", "red_block", "blue_block", "pink_block", "grasped")
    once = (v for v in values if v.count("table") in (1, 2) and all(v.count(side) < 2 for side in places[1:]))
    return [dict(zip(keys, v, strict=True)) for v in once]


def draw_chains() -> list[Chain]:
    """The 1000 chains in the benchmark's order, without a look at the cache."""
    starts = initial_states()
    counts = [len(part) for part in np.array_split(np.arange(CHAINS), len(starts))]
    leads = _graph(starts)
    chains = [
        Chain(start, tasks)
        for number, (start, count) in enumerate(zip(starts, counts, strict=True))
        for tasks in _draw(leads, number, count)
    ]
    order = np.arange(CHAINS)
    np.random.RandomState(0).shuffle(order)
    return [chains[k] for k in order]


def _graph(starts: list[State]) -> np.ndarray:
    """(states + 1, tasks) the number of the state that a task leads to, -1 where it cannot be asked or not in one way
    only; the last row is all -1. The states that chains start from come first."""
    states, leads = list(starts), list[list[int]]()
    numbers = {str(state): number for number, state in enumerate(states)}
    for state in states:  # grows while it is walked
        row = []
        for task in TASKS:
            after = successors(state, task)
            if len(after) == 1 and str(after[0]) not in numbers:
                numbers[str(after[0])] = len(states)
                states.append(after[0])
            row.append(numbers[str(after[0])] if len(after) == 1 else -1)
        leads.append(row)
    return np.array([*leads, [-1] * len(TASKS)])


def _draw(leads: np.ndarray, start: int, count: int) -> Iterator[tuple[str, ...]]:
    """The first `count` draws of five tasks that can be asked in order from state `start`, which is also the seed."""
    rng, categories = np.random.RandomState(start), np.array(list(_CATEGORIES.values()))
    while count:
        block = np.tile(np.arange(len(TASKS)), (2000, 1))  # the last block's rest goes unused
        for row in block:
            rng.shuffle(row)
        drawn = block[:, :LENGTH]
        state = np.full(len(drawn), start)
        for k in range(LENGTH):
            state = leads[state, drawn[:, k]]
        different = (np.diff(np.sort(categories[drawn], axis=1), axis=1) > 0).all(1)
        for tasks in drawn[different & (state >= 0)][:count]:
            yield tuple(TASKS[k] for k in tasks)
            count -= 1


def chains_sha256(chains: list[Chain]) -> str:
    """Fingerprint of a list of chains."""
    text = json.dumps([[chain.state, list(chain.tasks)] for chain in chains], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def cache_file() -> Path:
    """Where the drawn chains are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "vlm4vla" / f"calvin-chains-{CHAINS_SHA256[:12]}.json"


@cache
def official_chains() -> tuple[Chain, ...]:
    """The 1000 chains, from the cache where it holds them, else drawn and kept. Raises RuntimeError if they are not
    the benchmark's, as on a numpy whose legacy generator draws something else."""
    path = cache_file()
    try:
        chains = [Chain(state, tuple(tasks)) for state, tasks in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        chains = []
    if chains_sha256(chains) != CHAINS_SHA256:
        chains = draw_chains()
        if (found := chains_sha256(chains)) != CHAINS_SHA256:
            raise RuntimeError(f"the chains drawn here ({found}) are not CALVIN's ({CHAINS_SHA256})")
        keep = json.dumps([[chain.state, list(chain.tasks)] for chain in chains])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            part.write_text(keep)
            part.replace(path)
        except OSError:  # a cache that cannot be written only costs time
            pass
    return tuple(chains)


ROBOT_START = (
    0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963,
    -1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928, 1.0,
)  # fmt: skip
_IN_SLIDER = {
    "left": (-2.40851662e-01, 9.24044687e-02, 4.60990009e-01),
    "right": (7.03416330e-02, 9.24044687e-02, 4.60990009e-01),
}
_ON_TABLE = ((5.00000896e-02, -1.20000177e-01, 4.59990009e-01), (2.29995412e-01, -1.19995140e-01, 4.59990010e-01))
SLIDER_OPEN, DRAWER_OPEN, SWITCH_ON = 0.28, 0.22, 0.088  # m, m, rad


def reset_state(state: State) -> tuple[np.ndarray, np.ndarray]:
    """robot_obs (15,) and scene_obs (24,) that a symbolic initial state stands for; blocks in the order red, blue,
    pink, positions in m, angles in rad. The two spots on the table and the blocks' yaw are drawn, seeded by the state.
    """
    rng = np.random.RandomState(fnv1_32(str(state.values())))
    spots = [np.array(spot) for spot in _ON_TABLE]
    rng.shuffle(spots)
    scene = np.zeros(24)
    scene[0] = SLIDER_OPEN if state["slider"] == "left" else 0.0
    scene[1] = DRAWER_OPEN if state["drawer"] == "open" else 0.0
    scene[3] = SWITCH_ON if state["lightbulb"] else 0.0
    scene[4], scene[5] = state["lightbulb"], state["led"]
    for k, colour in enumerate(COLOURS):
        place = state[f"{colour}_block"]
        # Of two blocks on the table the first stands on the first spot; a pink one always on the second.
        second = colour == "pink" or (colour == "blue" and state["red_block"] == "table")
        at = spots[int(second)] if place == "table" else _IN_SLIDER[place.removeprefix("slider_")]
        scene[6 + 6 * k : 9 + 6 * k] = at
        scene[11 + 6 * k] = rng.uniform(np.pi / 2 - np.pi / 8, np.pi / 2 + np.pi / 8)
    return np.array(ROBOT_START), scene


def states_sha256(chains: tuple[Chain, ...]) -> str:
    """Fingerprint of the initial states (N, 39) of chains."""
    states = np.stack([np.concatenate(reset_state(chain.state)) for chain in chains])
    return hashlib.sha256(states.tobytes()).hexdigest()
