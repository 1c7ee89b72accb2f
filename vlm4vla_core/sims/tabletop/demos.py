"""Scripted demonstrations of the tabletop world: noisy execution, clean labels (as in DAgger, Ross et al. 2011).

The action carried out is the expert's plus noise (correlated and white, and now and then a wrong finger command);
the action written down is the expert's own, so pictures show how things go wrong and labels how to mend them.

Trap: the written action is therefore not the motion between two written states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlm4vla_core.episodes.store import Episode
from vlm4vla_core.sims.benchmarks import recording_seed
from vlm4vla_core.sims.tabletop import tasks as families
from vlm4vla_core.sims.tabletop import world
from vlm4vla_core.sims.tabletop.expert import expert
from vlm4vla_core.sims.tabletop.render import render

CAMERA = "front"
STATE_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
COLUMN_NAMES = {
    "truth/objects": tuple(f"object{slot}.{axis}" for slot in range(world.SLOTS) for axis in "xyz"),  # m; -1 if absent
    "truth/held": ("slot",),  # -1 for none
}
_MEMORY = 0.8  # correlation of the slow noise from one step to the next
_FLIP = 0.03  # probability of a wrong finger command, per unit of noise
_TOGETHER = 64  # episodes stepped and rendered together


@dataclass(frozen=True)
class Plan:
    """One demonstration before it is made; `index` is its number in the store."""

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


def demonstrations(plans: Sequence[Plan], *, size: int, noise: float) -> Iterator[Episode]:
    """Make the planned demonstrations, each until its goal is reached or its step limit.

    noise: standard deviation of each motion's noise as a fraction of the largest step. size: picture size.
    An episode depends on its plan, `size` and `noise` only. Labels are float32 in the `TABLETOP` convention.
    """
    for first in range(0, len(plans), _TOGETHER):
        yield from _together(plans[first : first + _TOGETHER], size, noise)


def _together(plans: Sequence[Plan], size: int, noise: float) -> Iterator[Episode]:
    starts = [families.start(item.task, item.seed) for item in plans]
    state, goal = world.stack([s.state for s in starts]), families.stack_goals([s.goal for s in starts])
    limits = np.array([families.FAMILIES[item.task].step_limit for item in plans])
    disturbance = np.zeros((len(plans), limits.max(), 7))  # (n, T, 7)
    for i, item in enumerate(plans):
        disturbance[i, : limits[i]] = _noise(item.seed, int(limits[i]), noise)
    states, labels = [], []
    lengths, reached = limits.copy(), np.zeros(len(plans), bool)
    for t in range(limits.max()):
        running = ~reached & (t < limits)
        if not running.any():
            break
        label = expert(state, goal)
        action = label + disturbance[:, t]
        action[:, 6] = np.abs(label[:, 6] - disturbance[:, t, 6])  # 1 flips the command
        states.append(state)
        labels.append(label)
        state = world.step(state, action)
        newly = families.success(state, goal) & running
        lengths[newly], reached = t + 1, reached | newly
    frames = [states[t][[i]] for i in range(len(plans)) for t in range(lengths[i])]
    domains = [item.domain for i, item in enumerate(plans) for _ in range(lengths[i])]
    every = world.stack(frames)
    pictures = render(every, domains, size).rgb  # (F, size, size, 3)
    proprioception = world.proprioception(every)
    end = 0
    for i, item in enumerate(plans):
        begin, end = end, end + int(lengths[i])
        yield Episode(
            instruction=starts[i].instruction,
            images={CAMERA: pictures[begin:end]},
            state=proprioception[begin:end],
            action=np.stack([label[i] for label in labels[: lengths[i]]]).astype(np.float32),
            columns={
                "truth/objects": every.objects[begin:end].reshape(-1, 3 * world.SLOTS).astype(np.float32),
                "truth/held": every.held[begin:end, None].astype(np.float32),
            },
            source=f"tabletop, episode {item.index}",
            info={
                "task": item.task,
                "domain": item.domain,
                "seed": str(item.seed),
                "objects": ";".join(families.object_names(starts[i].state, 0)),
                "success": str(bool(reached[i])).lower(),
            },
        )


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
