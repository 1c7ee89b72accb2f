"""Scripted demonstrations in a real simulator, as a source of episodes: states first, pictures afterwards.

The expert plays an episode from an initial state that is none of the benchmark's; when it has succeeded, its moments
are gone through once more and drawn. What fails is left out and tried again from the next initial state. With noise,
what is carried out is the expert's action plus noise, what is written is the expert's own.

Trap: a simulator lives in its own environment, so the recording runs in that Python (`elsewhere`), not in this one.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core.episodes.source import Skipped, Unit
from vlm4vla_core.episodes.writer import Episode
from vlm4vla_core.errors import InputError, nearest

if TYPE_CHECKING:
    from vlm4vla_core.actions import ActionConvention
    from vlm4vla_core.sims.simulator import Simulator, SimulatorBenchmark

_TOGETHER = 2  # demonstrations in a unit: what a kill costs
_TRIES = 8  # initial states for one demonstration
_SEEDS = 1 << 20  # initial states of one recording seed


@lru_cache(maxsize=1)  # one process records one protocol, unit after unit
def _simulator(protocol: str, options: tuple[tuple[str, Any], ...]) -> Simulator:
    from vlm4vla_core.sims import benchmark

    return benchmark(protocol).make(dict(options))


@dataclass(frozen=True)
class ScriptedDemos:
    """A recording in a simulator; see `episodes.source.Source`. noise: standard deviation on the executed motion, as a
    fraction of the largest. tasks take turns."""

    bench: SimulatorBenchmark
    episodes_: int
    tasks: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]
    cameras: tuple[str, ...]
    seed: int = 0
    noise: float = 0.0
    folder: Path = Path()
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    splits: tuple[str, ...] = ("train",)
    transforms: tuple[str, ...] = ("expert label",)
    rendered: bool = True
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def format(self) -> str:
        return self.bench.environment or "simulator"

    @property
    def name(self) -> str:
        return f"{self.bench.protocol}, scripted expert"

    @property
    def convention(self) -> ActionConvention:
        return self.bench.convention

    @property
    def state_names(self) -> tuple[str, ...]:
        return self.bench.state_names

    def units(self, splits: tuple[str, ...]) -> list[Unit]:
        """Demonstrations first…last-1, all of one task, so that a process loads a scene once; tasks one after the
        other."""
        units = []
        for number, task in enumerate(self.tasks):
            count = len(range(number, self.episodes_, len(self.tasks)))
            for first, last in pairwise([*range(0, count, _TOGETHER), count]):
                units.append(Unit(f"{task}-{first:06d}", "train", (), (task, first, last)))
        return units

    def episodes(self, unit: Unit, cameras: tuple[str, ...], transform: str) -> Iterator[Episode | Skipped]:
        """The unit's demonstrations: for each, the first of its initial states from which the expert succeeds."""
        task, first, last = str(unit.key[0]), int(unit.key[1]), int(unit.key[2])
        sim = _simulator(self.bench.protocol, self.options)
        for number in range(first, last):
            for attempt in range(_TRIES):
                start = (self.seed * _SEEDS + number) * _TRIES + attempt
                made = demonstration(sim, self.bench, task, start, cameras, self.noise)
                if made is not None:
                    yield made
                    break
                yield Skipped("that did not succeed", f"task {task}, initial state {start}")


def demonstration(
    sim: Simulator, bench: SimulatorBenchmark, task: str, start: int, cameras: Sequence[str], noise: float = 0.0
) -> Episode | None:
    """One scripted episode from practice state `start`, drawn when it succeeded; None when it did not."""
    seen, words = sim.reset(task, start, practice=True)
    rng = np.random.default_rng([start, 2])
    limit = np.asarray(bench.action_limit)
    moments, states, labels = [], [], []
    while sim.running:
        label = sim.expert()
        moments.append(sim.snapshot())
        states.append(seen.state)
        labels.append(label)
        shaken = label + noise * limit * rng.standard_normal(len(label)) * _shaken(len(label))
        seen = sim.step(shaken)
    outcome = sim.outcome()
    if not outcome["success"]:
        return None
    shown: dict[str, list[np.ndarray]] = {camera: [] for camera in cameras}
    for moment in moments:
        there = sim.recall(moment)
        for camera in cameras:
            shown[camera].append(there.render(camera))
    domain, note = getattr(sim, "domain", ""), outcome["note"]
    info = {"task": task, "seed": str(start), "success": "true", "made_by": "; ".join(filter(None, ("scripted", note)))}
    return Episode(
        instruction=words,
        images={camera: np.stack(frames) for camera, frames in shown.items()},
        state=np.stack(states),
        action=np.stack(labels).astype(np.float32),
        source=f"{bench.protocol}, task {task}, practice state {start}, {info['made_by']}",
        info=info | ({"domain": domain} if domain else {}),
    )


def _shaken(size: int) -> np.ndarray:
    """Where noise goes: the hand's position, neither its turn nor its fingers."""
    mask = np.zeros(size)
    mask[:3] = 1
    return mask


def source(
    bench: SimulatorBenchmark, episodes: int, tasks: tuple[str, ...], options: dict[str, Any], cameras: tuple[str, ...],
    seed: int, noise: float,
) -> ScriptedDemos:  # fmt: skip
    """The recording that is asked for. Raises InputError on unknown tasks and cameras, and where there is no expert."""
    if not bench.experts:
        raise InputError(f"{bench.protocol} has no scripted expert, so nothing can be recorded in it")
    for task in tasks:
        if task not in bench.experts:
            raise InputError(f"no scripted expert for task '{task}'", fix=nearest(task, bench.experts))
    for camera in cameras:
        if camera not in bench.cameras:
            raise InputError(f"{bench.protocol} has no camera '{camera}'", fix=nearest(camera, bench.cameras))
    if missing := bench.missing():
        raise InputError("; ".join(missing))
    chosen = tuple(dict.fromkeys(tasks)) or bench.experts
    return ScriptedDemos(bench, episodes, chosen, tuple(options.items()), cameras or bench.cameras[:1], seed, noise)


def elsewhere(bench: SimulatorBenchmark, run: Callable[[Any], int], args: Any) -> int | None:
    """Call `run(args)` in the simulator's own Python and give its exit code; None when this is that Python."""
    from vlm4vla_core.sims.pool import interpreter

    python = interpreter(bench)
    if python == sys.executable:
        return None
    code = "import sys; from vlm4vla_core.sims.recording import arrive; sys.exit(arrive())"
    done = subprocess.run([python, "-c", code], input=pickle.dumps((run, args)), env=dict(os.environ))
    return done.returncode


def arrive() -> int:
    """The other end of `elsewhere`."""
    run, args = pickle.load(sys.stdin.buffer)  # from our own process, never from a file
    try:
        return int(run(args) or 0)
    except InputError as error:
        print(f"vlm4vla record: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # the process that waits for this one tells it
        return 130
