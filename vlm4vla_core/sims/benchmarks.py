"""Named, versioned protocols (`tabletop-abc-d@1`) and the batched environment that runs their episodes.

A protocol fixes tasks, initial states, seeds, step limits, success rule, picture and action convention; `describe()`
is written into every result. Three rehearse benchmarks of the field: `tabletop-abc-d@1` CALVIN ABC-D (chains of five in
an unseen look), `tabletop-shift@1` SimplerEnv (trained on "real" pictures, tested on rendered ones), `tabletop-long@1`
LIBERO-Long (ten long tasks).

Trap: they are rehearsals in a built-in world; a number from them never bears the other benchmarks' names.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm4vla_core.actions import TABLETOP, ActionConvention
from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.sims.simulator import Observation, SimulatorBenchmark
from vlm4vla_core.sims.tabletop import world
from vlm4vla_core.sims.tabletop.env import CHAIN_TASK, BatchedEnv, step_limit
from vlm4vla_core.sims.tabletop.looks import LOOKS
from vlm4vla_core.sims.tabletop.render import CAMERAS
from vlm4vla_core.sims.tabletop.scenes import CHAIN, LONG
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

    image_size: pixels of the picture a policy gets. domains: looks that an episode's look is drawn from (by its seed).
    train_domains: looks that demonstrations for this protocol may use. success_rule: `any_step` or `last_step`.
    held_out: instructions in words that no demonstration uses.
    """

    name: str
    version: int
    title: str
    domains: tuple[str, ...]
    train_domains: tuple[str, ...]
    tasks: tuple[str, ...] = TASKS
    convention: ActionConvention = TABLETOP
    image_size: int = 112
    success_rule: str = "any_step"
    execute: int | None = None
    held_out: bool = False

    @property
    def cameras(self) -> tuple[str, ...]:
        """Cameras that a policy may have learnt from."""
        return CAMERAS

    @property
    def kept_for_test(self) -> set[str]:
        """Looks that no policy tested here may have been trained in."""
        return set(self.domains) - set(self.train_domains)

    @property
    def protocol(self) -> str:
        """Name with version, as rows carry it."""
        return f"{self.name}@{self.version}"

    @property
    def step_limits(self) -> dict[str, int]:
        """Most steps of an episode, per task."""
        return {task: step_limit(task) for task in self.tasks}

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
        last_step = self.success_rule == "last_step"
        return BatchedEnv(tasks, seeds, domains, self.image_size, last_step=last_step, held_out=self.held_out)

    def make(self, options: Mapping[str, Any]) -> Tabletop:
        """One world as a `Simulator`, for a worker process."""
        return Tabletop(self)

    def chosen(self, words: tuple[str, ...]) -> dict[str, Any]:
        """The built-in protocols have no options. Raises InputError when one is given."""
        if words:
            raise InputError(f"{self.protocol} has no options", fix=f"leave {' '.join(words)} out")
        return {}

    def missing(self) -> list[str]:
        """Nothing: it is built in."""
        return []

    def describe(self) -> dict[str, Any]:
        """The whole protocol as JSON values."""
        return {
            "protocol": self.protocol,
            "title": self.title,
            "world_version": world.VERSION,
            "tasks": {task: _describe(task, held_out=self.held_out) for task in self.tasks},
            "success_rule": self.success_rule,
            "execute": self.execute or "whole chunk",
            "seeds": SEED_RULE,
            "domains": list(self.domains),
            "train_domains": list(self.train_domains),
            "cameras": {domain: {"front": LOOKS[domain].camera.to_dict()} for domain in self.domains},
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


class Tabletop:
    """One tabletop world behind the interface of `Simulator`."""

    def __init__(self, bench: Benchmark) -> None:
        self._bench = bench
        self._env: Any = None

    @property
    def instruction(self) -> str:
        return self._env.instructions[0]

    @property
    def renewed(self) -> bool:
        return bool(self._env.renewed[0])

    @property
    def running(self) -> bool:
        return bool(self._env.running[0])

    def reset(self, task: str, episode: int, *, practice: bool = False) -> tuple[Observation, str]:
        seed = recording_seed(task, 0, episode) if practice else self._bench.env_seed(task, episode)
        self._env = self._bench.env([task], [seed])
        return self._observation(), self.instruction

    def _observation(self) -> Observation:
        env = self._env
        return Observation(world.proprioception(env.state)[0], lambda camera: env.observe([0], camera)[0])

    def step(self, action: np.ndarray) -> Observation:
        self._env.step(np.asarray(action)[None])
        return self._observation()

    def outcome(self) -> dict[str, Any]:
        return self._env.outcome(0)

    def expert(self) -> np.ndarray:
        return self._env.expert()[0]

    def snapshot(self) -> np.ndarray:
        raise NotImplementedError("the tabletop world is recorded in batches (`sims.tabletop.demos`)")

    def recall(self, snapshot: np.ndarray) -> Observation:
        raise NotImplementedError("the tabletop world is recorded in batches (`sims.tabletop.demos`)")

    def close(self) -> None:
        self._env = None


def _describe(task: str, *, held_out: bool) -> dict[str, Any]:
    """One task of a protocol as JSON values."""
    limit = {"step_limit": step_limit(task)}
    if task == CHAIN_TASK:
        parts = {family: _describe(family, held_out=held_out) for family in CHAIN}
        return {"success": "five asks done one after the other, each within its family's step limit", "parts": parts}
    if task in LONG:
        asks = [f"{ask.family}({ask.slot}, {ask.other}, {ask.direction})" for ask in LONG[task].asks]
        rule, words = f"all hold at once: {'; '.join(asks)}", LONG[task].held_out if held_out else LONG[task].templates
    else:
        family = FAMILIES[task]
        rule, words = family.rule, family.held_out if held_out else family.templates
    return {"success": rule, **limit, "templates": list(words)}


_SEEN, _UNSEEN = ("A", "B", "C"), ("D",)
PROTOCOLS: dict[str, Benchmark] = {
    bench.protocol: bench
    for bench in (
        Benchmark("tabletop-abc-d", 1, "chains of five instructions; looks A, B, C for training, unseen D for the test",
                  tasks=(CHAIN_TASK,), domains=_UNSEEN, train_domains=_SEEN),
        Benchmark("tabletop-abc", 1, "chains of five instructions, training and test in the looks A, B, C",
                  tasks=(CHAIN_TASK,), domains=_SEEN, train_domains=_SEEN),
        Benchmark("tabletop-shift", 1, "training on degraded pictures with other textures, test on clean ones",
                  tasks=CHAIN, domains=_SEEN, train_domains=("R", "S", "T")),
        Benchmark("tabletop-long", 1, "ten long tasks: several goals in one sentence, all of which have to hold",
                  tasks=tuple(LONG), domains=_SEEN, train_domains=_SEEN),
        Benchmark("tabletop-tasks", 1, "single tasks; looks A, B, C for training, unseen D for the test",
                  tasks=TASKS, domains=_UNSEEN, train_domains=_SEEN),
        Benchmark("tabletop-tasks-abc", 1, "single tasks, training and test in the looks A, B, C",
                  tasks=TASKS, domains=_SEEN, train_domains=_SEEN),
        Benchmark("tabletop-words", 1, "single tasks in words that no demonstration uses, in the looks A, B, C",
                  tasks=TASKS, held_out=True, domains=_SEEN, train_domains=_SEEN),
        Benchmark("tabletop-long-words", 1, "ten long tasks in words that no demonstration uses",
                  tasks=tuple(LONG), held_out=True, domains=_SEEN, train_domains=_SEEN),
    )
}  # fmt: skip


SIMULATORS = ("libero", "simpler", "calvin")  # packages beside this file; none of them imports its simulator


def simulators() -> dict[str, SimulatorBenchmark]:
    """The protocols of the real simulators, by name with version."""
    found: dict[str, SimulatorBenchmark] = {}
    for name in SIMULATORS:
        found |= importlib.import_module(f"vlm4vla_core.sims.{name}").PROTOCOLS
    return found


def benchmark(protocol: str) -> Any:
    """The protocol of this name with version, such as "tabletop-abc-d@1": a `Benchmark` or a `SimulatorBenchmark`.
    Raises InputError naming the known ones."""
    if protocol in PROTOCOLS:
        return PROTOCOLS[protocol]
    others = simulators()
    if protocol == "simpler-bridge@1":
        from vlm4vla_core.sims.simpler import ORIGINAL

        raise InputError("simpler-bridge@1 is not run here", fix=ORIGINAL)
    if protocol not in others:
        known = (*PROTOCOLS, "tabletop-vqa@1", *others)
        raise InputError(f"unknown benchmark '{protocol}'", fix=nearest(protocol, known))
    return others[protocol]


def coverage(protocol: str, tasks: Iterable[str], episodes: int | None = None) -> str:
    """How much of a protocol these tasks are, in words: "all 4 tasks", or "2 of its 4 tasks: move, touch".

    episodes: different ones per task, for protocols with a fixed number of initial states. A result on a part of a
    protocol must not bear the protocol's name alone. For a protocol that is not known here, the tasks are listed.
    """
    ran = list(dict.fromkeys(tasks))
    bench = PROTOCOLS.get(protocol) or simulators().get(protocol)
    if bench is None:
        return f"tasks {', '.join(ran)}"
    part = bench.portion(episodes) if episodes is not None and isinstance(bench, SimulatorBenchmark) else ""
    if set(ran) != set(bench.tasks):
        return f"{len(ran)} of its {len(bench.tasks)} tasks: {', '.join(ran)}" + (f"; {part}" if part else "")
    whole = "all of it" if len(bench.tasks) == 1 else f"all {len(bench.tasks)} tasks"
    return (part if len(bench.tasks) == 1 else f"{whole}; {part}") if part else whole
