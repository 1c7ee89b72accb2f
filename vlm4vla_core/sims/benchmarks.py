"""Named, versioned protocols (`tabletop-abc-d@0`) and the batched environment that runs their episodes.

A protocol fixes tasks, initial states, seeds, step limits, success rule, picture and action convention; `describe()`
is written into every result. Version 0 of the tabletop protocols is a first, simple one: single tasks in a small
world, not the chains of five that version 1 will have.

Trap: `BatchedEnv.success` says whether the goal holds *now*; the protocol's `success_rule` (any step, or only the
last) is applied by whoever runs the episode.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm4vla_core.actions import TABLETOP, ActionConvention
from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.sims.tabletop import tasks as families
from vlm4vla_core.sims.tabletop import world
from vlm4vla_core.sims.tabletop.expert import expert
from vlm4vla_core.sims.tabletop.looks import LOOKS
from vlm4vla_core.sims.tabletop.tasks import FAMILIES, TASKS

_BITS = 48  # drawn bits of a seed; bit 48 marks evaluation, and 49 bits are exact in every JSON reader
EVALUATION_BIT = 1 << _BITS
_EVALUATION, _RECORDING = 0xE7A1, 0xDE30  # first words of the two seed sequences
SEED_RULE = (
    "evaluation seeds: bit 48 set, low 48 bits from SeedSequence([0xE7A1, crc32(task), episode]); recording seeds: "
    "bit 48 clear, from SeedSequence([0xDE30, crc32(task), record seed, episode]); hence disjoint by construction"
)


def _seed(*words: int) -> int:
    drawn = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    return int(drawn) & (EVALUATION_BIT - 1)


def recording_seed(task: str, seed: int, episode: int) -> int:
    """Seed of the world of one demonstration; never an evaluation seed (bit 48 is clear)."""
    return _seed(_RECORDING, zlib.crc32(task.encode()), seed, episode)


def is_evaluation_seed(seed: int) -> bool:
    """Whether a world's seed belongs to evaluation, so that no training set may contain it."""
    return bool(seed & EVALUATION_BIT)


@dataclass(frozen=True)
class Benchmark:
    """One protocol. `execute`: actions of a predicted chunk carried out before replanning, None for the whole chunk.

    camera, image_size: the picture a policy gets. domains: looks that an episode's look is drawn from (by its seed).
    train_domains: looks that demonstrations for this protocol may use. success_rule: `any_step` or `last_step`.
    """

    name: str
    version: int
    title: str
    domains: tuple[str, ...]
    train_domains: tuple[str, ...]
    tasks: tuple[str, ...] = TASKS
    convention: ActionConvention = TABLETOP
    camera: str = "front"
    image_size: int = 112
    success_rule: str = "any_step"
    execute: int | None = None

    @property
    def protocol(self) -> str:
        """Name with version, as rows carry it."""
        return f"{self.name}@{self.version}"

    @property
    def step_limits(self) -> dict[str, int]:
        """Most steps of an episode, per task."""
        return {task: FAMILIES[task].step_limit for task in self.tasks}

    @property
    def action_limit(self) -> tuple[float, ...]:
        """Largest useful magnitude of each action number; a random policy draws within it."""
        return (world.MAX_STEP,) * 3 + (0.0, 0.0, world.MAX_TURN, 1.0)

    def env_seed(self, task: str, episode: int) -> int:
        """Seed of evaluation episode `episode` of `task`; the same scenes in every tabletop protocol."""
        return EVALUATION_BIT | _seed(_EVALUATION, zlib.crc32(task.encode()), episode)

    def domain(self, seed: int) -> str:
        """Look of the episode with this seed."""
        return self.domains[seed % len(self.domains)]

    def env(self, tasks: Sequence[str], seeds: Sequence[int]) -> BatchedEnv:
        """One world per entry. Raises InputError on a task that is not part of this protocol."""
        if len(tasks) != len(seeds) or not len(tasks):
            raise ValueError(f"{len(tasks)} tasks and {len(seeds)} seeds do not pair up")
        for task in tasks:
            if task not in self.tasks:
                raise InputError(f"{self.protocol} has no task '{task}'", fix=nearest(task, self.tasks))
        domains = [self.domain(seed) for seed in seeds]
        return BatchedEnv([families.start(task, seed) for task, seed in zip(tasks, seeds, strict=True)],
                          domains, self.image_size)  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """The whole protocol as JSON values."""
        return {
            "protocol": self.protocol,
            "title": self.title,
            "world_version": world.VERSION,
            "tasks": {
                task: {
                    "success": FAMILIES[task].rule,
                    "step_limit": FAMILIES[task].step_limit,
                    "templates": list(FAMILIES[task].templates),
                }
                for task in self.tasks
            },
            "success_rule": self.success_rule,
            "execute": self.execute or "whole chunk",
            "seeds": SEED_RULE,
            "domains": list(self.domains),
            "train_domains": list(self.train_domains),
            "cameras": {domain: {self.camera: LOOKS[domain].camera.to_dict()} for domain in self.domains},
            "image_size": self.image_size,
            "convention": self.convention.to_dict(),
            "limits": {
                "translation_m": world.MAX_STEP,
                "yaw_rad": world.MAX_TURN,
                "ignored": ["roll", "pitch"],
                "gripper_threshold": 0.5,
            },
            "workspace_m": [world.WORKSPACE_LOW.tolist(), world.WORKSPACE_HIGH.tolist()],
        }


class BatchedEnv:
    """n worlds stepped together; an episode's outcome depends only on its task, its seed and its actions."""

    def __init__(self, starts: Sequence[families.Start], domains: Sequence[str], image_size: int) -> None:
        self.state = world.stack([start.state for start in starts])
        self.goal = families.stack_goals([start.goal for start in starts])
        self.instructions = [start.instruction for start in starts]
        self.domains = list(domains)
        self.image_size = image_size
        self.n = len(self.instructions)

    def observe(self, rows: np.ndarray | Sequence[int] | None = None) -> np.ndarray:
        """Camera pictures (len(rows), H, W, 3) uint8; all worlds when `rows` is None."""
        from vlm4vla_core.sims.tabletop.render import render

        chosen = np.arange(self.n) if rows is None else np.asarray(rows)
        return render(self.state[chosen], [self.domains[row] for row in chosen], self.image_size).rgb

    def step(self, actions: np.ndarray) -> None:
        """Carry out one action (n, A) per world. Raises InputError on a wrong shape, NaN or infinity."""
        self.state = world.step(self.state, actions)

    def success(self) -> np.ndarray:
        """(n,) bool: the goal holds now."""
        return families.success(self.state, self.goal)

    def expert(self) -> np.ndarray:
        """(n, A) clean actions of the scripted expert, which reads the simulator's state."""
        return expert(self.state, self.goal)


PROTOCOLS: dict[str, Benchmark] = {
    bench.protocol: bench
    for bench in (
        Benchmark("tabletop-abc-d", 0, "tabletop, looks A, B, C for training, unseen look D for the test",
                  domains=("D",), train_domains=("A", "B", "C")),
        Benchmark("tabletop-abc", 0, "tabletop, training and test in the looks A, B, C",
                  domains=("A", "B", "C"), train_domains=("A", "B", "C")),
    )
}  # fmt: skip


def benchmark(protocol: str) -> Benchmark:
    """The protocol of this name with version, such as "tabletop-abc-d@0". Raises InputError naming the known ones."""
    if protocol not in PROTOCOLS:
        raise InputError(f"unknown benchmark '{protocol}'", fix=nearest(protocol, PROTOCOLS))
    return PROTOCOLS[protocol]


def coverage(protocol: str, tasks: Iterable[str]) -> str:
    """How much of a protocol these tasks are, in words: "all 4 tasks", or "2 of its 4 tasks: move, touch".

    A result on a part of a protocol must not bear the protocol's name alone. For a protocol that is not known here,
    the tasks are listed.
    """
    ran = list(dict.fromkeys(tasks))
    known = PROTOCOLS[protocol].tasks if protocol in PROTOCOLS else None
    if known is None:
        return f"tasks {', '.join(ran)}"
    return (
        f"all {len(known)} tasks"
        if set(ran) == set(known)
        else f"{len(ran)} of its {len(known)} tasks: {', '.join(ran)}"
    )
