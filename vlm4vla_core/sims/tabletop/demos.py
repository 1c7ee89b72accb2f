"""Scripted demonstrations of the tabletop world: noisy execution, clean labels (as in DAgger, Ross et al. 2011).

The action carried out is the expert's plus noise (correlated and white, and now and then a wrong finger command);
the action written down is the expert's own, so pictures show how things go wrong and labels how to mend them.

Trap: the written action is therefore not the motion between two written states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core.actions import TABLETOP, ActionConvention
from vlm4vla_core.episodes.source import Unit
from vlm4vla_core.episodes.writer import Episode
from vlm4vla_core.sims.benchmarks import recording_seed
from vlm4vla_core.sims.tabletop import scenes, world
from vlm4vla_core.sims.tabletop import tasks as families
from vlm4vla_core.sims.tabletop.env import CHAIN_TASK, BatchedEnv, shoot, step_limit

if TYPE_CHECKING:
    from vlm4vla_core.sims.tabletop.render import Picture

STATE_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
_OBJECTS = [f"object{slot}" for slot in range(world.SLOTS)]
COLUMN_NAMES = {
    "truth/objects": tuple(f"{name}.{axis}" for name in _OBJECTS for axis in "xyz"),  # m; -1 if absent
    "truth/object_yaw": tuple(_OBJECTS),  # rad
    "truth/on": tuple(_OBJECTS),  # slot that each stands on, -1 for table or hand
    "truth/contact": tuple(_OBJECTS),  # 1 where the hand touches or holds it
    "truth/held": ("slot",),  # -1 for none
    "truth/plates": tuple(f"plate{k}.{axis}" for k in range(world.PLATES) for axis in "xy"),  # m
    "truth/switch": ("knob", "on"),  # m of the knob from its rail's middle; 1 where the lamp is lit
}
SCENE = "scene"  # the task of a still picture without the hand, for questions
_MEMORY = 0.8  # correlation of the slow noise from one step to the next
_FLIP = 0.03  # probability of a wrong finger command, per unit of noise
_TOGETHER = 64  # demonstrations stepped and rendered together


@dataclass(frozen=True)
class Plan:
    """One demonstration before it is made; `index` is its number in the recording."""

    index: int
    task: str
    domain: str
    seed: int


def plan(episodes: int, tasks: Sequence[str], domains: Sequence[str], seed: int) -> list[Plan]:
    """Tasks in turn, each of them through all domains in turn; a pure function of its arguments."""
    plans = []
    for index in range(episodes):
        task, domain = tasks[index % len(tasks)], domains[index // len(tasks) % len(domains)]
        plans.append(Plan(index, task, domain, recording_seed(task, seed, index)))
    return plans


@dataclass(frozen=True)
class Demos:
    """A recording as a source of episodes (see `episodes.source.Source`): made by many processes, resumable.

    Units are runs of `_TOGETHER` demonstrations; nothing is read from files.
    """

    episodes_: int
    tasks: tuple[str, ...]
    domains: tuple[str, ...]
    seed: int
    size: int
    noise: float
    geometry: bool = False
    cameras: tuple[str, ...] = ("front",)
    format: str = "tabletop"
    name: str = "tabletop"
    folder: Path = Path()
    convention: ActionConvention = TABLETOP
    state_names: tuple[str, ...] = STATE_NAMES
    splits: tuple[str, ...] = ("train",)
    transforms: tuple[str, ...] = ("expert label, executed with noise",)
    rendered: bool = True

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        return dict.fromkeys(self.cameras, (self.size, self.size))

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        return COLUMN_NAMES

    def units(self, splits: tuple[str, ...]) -> list[Unit]:
        """Demonstrations first…last-1 of the recording, run by run."""
        bounds = [*range(0, self.episodes_, _TOGETHER), self.episodes_]
        return [Unit(f"{a:06d}", "train", (), (a, b)) for a, b in pairwise(bounds)]

    def episodes(self, unit: Unit, cameras: tuple[str, ...], transform: str) -> Iterator[Episode]:
        """The unit's demonstrations."""
        first, last = (int(value) for value in unit.key)
        plans = plan(self.episodes_, self.tasks, self.domains, self.seed)[first:last]
        yield from demonstrations(plans, size=self.size, noise=self.noise, cameras=cameras, geometry=self.geometry)


def demonstrations(
    plans: Sequence[Plan], *, size: int, noise: float, cameras: Sequence[str] = ("front",), geometry: bool = False
) -> Iterator[Episode]:
    """Make the planned demonstrations, each until its goal is reached or its step limit; a chain gives one episode for
    every part of it that was begun.

    A scene gives one frame, on which nothing is done. noise: standard deviation of each motion's noise as a fraction of
    the largest step. size: picture size. geometry: also depth (mm) and segmentation. An episode depends on its plan and
    these arguments only. Labels are float32 in the `TABLETOP` convention.
    """
    for first in range(0, len(plans), _TOGETHER):
        part = plans[first : first + _TOGETHER]
        if part[0].task == SCENE:
            yield from _stills(part, size, geometry)
        else:
            yield from _together(part, size, noise, cameras, geometry)


def _stills(plans: Sequence[Plan], size: int, geometry: bool) -> Iterator[Episode]:
    """One frame of each planned scene, by the front camera, without the hand."""
    state, domains = world.stack([scenes.scene(item.seed) for item in plans]), [item.domain for item in plans]
    seeds, still = [item.seed for item in plans], [0] * len(plans)
    shown = {"front": shoot(state, domains, size, seeds, still, "front", hand=False, geometry=geometry)}
    depth, segmentation = _geometry(shown) if geometry else ({}, {})
    columns, proprioception = _truth(state), world.proprioception(state)
    for i, item in enumerate(plans):
        part = slice(i, i + 1)
        yield Episode(
            instruction="look at the table",
            images={"front": shown["front"].rgb[part]},
            state=proprioception[part],
            action=np.zeros((1, 7), np.float32),
            columns={name: values[part] for name, values in columns.items()},
            depth={camera: values[part] for camera, values in depth.items()},
            segmentation={camera: values[part] for camera, values in segmentation.items()},
            source=f"tabletop, scene {item.index}",
            info={
                "task": SCENE,
                "family": "",
                "domain": item.domain,
                "seed": str(item.seed),
                "objects": ";".join(families.object_names(state, i)),
                "plates": ";".join(families.plate_names(state, i)),
                "target": "",
                "success": "true",
            },
        )


def _together(
    plans: Sequence[Plan], size: int, noise: float, cameras: Sequence[str], geometry: bool
) -> Iterator[Episode]:
    env = BatchedEnv([item.task for item in plans], [p.seed for p in plans], [p.domain for p in plans], size)
    disturbance = np.zeros((env.n, 1 + max(step_limit(item.task) for item in plans), 7))
    for i, item in enumerate(plans):
        disturbance[i, : step_limit(item.task)] = _noise(item.seed, step_limit(item.task), noise)
    taken: list[tuple[np.ndarray, world.State, np.ndarray]] = []  # per step: the worlds that ran, states, labels
    asked = [(env.instructions[i], _ask(env, i)) for i in range(env.n)]
    cuts: list[list[tuple[int, str, families.Ask, bool]]] = [[] for _ in plans]  # per part: end, words, ask, reached
    while env.running.any():
        label, done, ran = env.expert(), env.done.copy(), np.flatnonzero(env.running)
        action = label + disturbance[np.arange(env.n), env.steps]
        action[:, 6] = np.abs(label[:, 6] - (action - label)[:, 6])  # 1 flips the command
        taken.append((ran, env.state[ran], label[ran]))
        env.step(action)
        for i in ran[(env.done > done)[ran] | ~env.running[ran]].tolist():
            reached = bool(env.done[i] > done[i]) if env.tasks[i] == CHAIN_TASK else bool(env.outcome(i)["success"])
            cuts[i].append((int(env.steps[i]), *asked[i], reached))
            asked[i] = env.instructions[i], _ask(env, i)
    which = np.concatenate([ran for ran, _, _ in taken])
    order = np.argsort(which, kind="stable")  # world after world, each in the order of its steps
    every = world.stack([state for _, state, _ in taken])[order]
    actions = np.concatenate([label for _, _, label in taken])[order].astype(np.float32)
    lengths = np.bincount(which, minlength=env.n).tolist()
    domains = [item.domain for item, length in zip(plans, lengths, strict=True) for _ in range(length)]
    seeds = [item.seed for item, length in zip(plans, lengths, strict=True) for _ in range(length)]
    moments = [t for length in lengths for t in range(length)]
    shown = {name: shoot(every, domains, size, seeds, moments, name, geometry=geometry) for name in cameras}
    depth, segmentation = _geometry(shown) if geometry else ({}, {})
    columns, proprioception = _truth(every), world.proprioception(every)
    start = 0
    for i, item in enumerate(plans):
        begin = 0
        for number, (end, words, ask, reached) in enumerate(cuts[i]):
            part = slice(start + begin, start + end)
            here = every[[start + begin]]
            yield Episode(
                instruction=words,
                images={camera: picture.rgb[part] for camera, picture in shown.items()},
                state=proprioception[part],
                action=actions[part],
                columns={name: values[part] for name, values in columns.items()},
                depth={camera: values[part] for camera, values in depth.items()},
                segmentation={camera: values[part] for camera, values in segmentation.items()},
                source=f"tabletop, demonstration {item.index}" + (f", part {number}" if len(cuts[i]) > 1 else ""),
                info={
                    "task": item.task,
                    "family": ask.family,
                    "domain": item.domain,
                    "seed": str(item.seed),
                    "objects": ";".join(families.object_names(here, 0)),
                    "plates": ";".join(families.plate_names(here, 0)),
                    "target": families.describe_object(here, 0, ask.slot) if ask.slot >= 0 else "",
                    "success": str(reached).lower(),
                },
            )
            begin = end
        start += lengths[i]


def _ask(env: BatchedEnv, row: int) -> families.Ask:
    """What is asked first in a world, by family and slot."""
    goal = env.goals[0]
    return families.Ask(families.TASKS[goal.family[row]], int(goal.slot[row]), int(goal.other[row]))


def _geometry(shown: dict[str, Picture]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Depth (F, size, size) uint16 in mm, and segmentation uint8, per camera."""
    depth, segmentation = {}, {}
    for camera, picture in shown.items():
        assert picture.depth is not None and picture.segmentation is not None
        depth[camera] = np.clip(np.rint(picture.depth * 1000), 0, 65535).astype(np.uint16)
        segmentation[camera] = picture.segmentation
    return depth, segmentation


def _truth(state: world.State) -> dict[str, np.ndarray]:
    """The further columns, each (F, k) float32."""
    n = len(state)
    values: dict[str, Any] = {
        "truth/objects": state.objects.reshape(n, -1),
        "truth/object_yaw": state.object_yaw,
        "truth/on": state.on,
        "truth/contact": world.contacts(state),
        "truth/held": state.held[:, None],
        "truth/plates": state.plate.reshape(n, -1),
        "truth/switch": np.stack([state.knob - state.rail, world.switched_on(state)], 1),
    }
    return {name: np.asarray(value, np.float32) for name, value in values.items()}


def _noise(seed: int, steps: int, scale: float) -> np.ndarray:
    """(steps, 7) disturbance of one episode: metres, radians, and 1 where the finger command is flipped."""
    rng = np.random.default_rng([seed, 2])  # the episode's own stream, apart from the one that drew its world
    white, fresh = rng.standard_normal((2, steps, 4))
    slow = np.empty_like(fresh)
    for t in range(steps):
        slow[t] = fresh[t] if t == 0 else _MEMORY * slow[t - 1] + np.sqrt(1 - _MEMORY**2) * fresh[t]
    noise = np.zeros((steps, 7))
    noise[:, [0, 1, 2, 5]] = scale * np.sqrt(0.5) * (white + slow) * ([world.MAX_STEP] * 3 + [world.MAX_TURN])
    noise[:, 6] = rng.random(steps) < _FLIP * scale
    return noise
