"""Tabletop worlds that fail once, for the tests of the pool: the worker dies, hangs, cannot draw, or refuses."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm4vla_core.errors import InputError
from vlm4vla_core.sims.benchmarks import PROTOCOLS, Benchmark, Tabletop
from vlm4vla_core.sims.simulator import Observation


class Flaky(Tabletop):
    def __init__(self, bench: FlakyBenchmark) -> None:
        super().__init__(bench.inner)
        self._flaky, self._fault, self._step = bench, "", 0

    def reset(self, task: str, episode: int, *, practice: bool = False) -> tuple[Observation, str]:
        self._step, mark = 0, self._flaky.marks / f"{task}-{episode}"
        self._fault = "" if mark.exists() and not self._flaky.always else self._flaky.faults.get(episode, "")
        mark.touch()
        with (self._flaky.marks / "log").open("a") as log:
            log.write(f"{os.getpid()} {task} {episode}\n")
        return super().reset(task, episode)

    def step(self, action: np.ndarray) -> Observation:
        self._step += 1
        if self._step == 3:
            if self._fault == "die":
                os.kill(os.getpid(), 9)
            elif self._fault == "hang":
                time.sleep(1000)
            elif self._fault == "refuse":
                raise InputError("this world is closed", fix="come back later")
        seen = super().step(action)

        def draw(camera: str) -> np.ndarray:
            if self._fault == "blind" and self._step >= 3:
                raise RuntimeError("no OpenGL context")
            return seen.render(camera)

        return Observation(seen.state, draw)


@dataclass(frozen=True)
class FlakyBenchmark:
    """faults: episode -> what happens in it, the first time or always."""

    marks: Path
    faults: dict[int, str]
    always: bool = False
    environment: str = ""

    @property
    def inner(self) -> Benchmark:
        return PROTOCOLS["tabletop-tasks@1"]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(PROTOCOLS["tabletop-tasks@1"], name)

    def make(self, options: dict[str, Any]) -> Flaky:
        return Flaky(self)
