"""The interface of a real simulator (LIBERO, SimplerEnv-Bridge, CALVIN): one world, stepped by one process.

A simulator's package `vlm4vla_core/sims/NAME/__init__.py` is light (no simulator import) and exports
`PROTOCOLS: dict[str, SimulatorBenchmark]`; its world is named by `factory` and imported in the worker process only.
`evaluation` steps many of them in worker processes and predicts for all of them together.

Trap: a row must not depend on which worker ran its episode nor on what that worker ran before, so `reset` starts from
nothing that an earlier episode left behind.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlm4vla_core import folders
from vlm4vla_core.actions import ActionConvention
from vlm4vla_core.errors import InputError, nearest


@dataclass(frozen=True)
class Observation:
    """One moment. Valid until the next step; pictures are rendered only when asked for.

    state: (S,) float64 proprioception, as the benchmark's `state_names` say. render: camera -> uint8 (H, W, 3),
    upright, as the benchmark's data sets show it.
    """

    state: np.ndarray
    render: Callable[[str], np.ndarray]


class Simulator(Protocol):
    """One world. instruction: what is asked now. renewed: the words have just changed (chains). running: the episode
    goes on; False from the step on that ended it (success where that ends it, or the step limit)."""

    instruction: str
    renewed: bool
    running: bool

    def reset(self, task: str, episode: int, *, practice: bool = False) -> tuple[Observation, str]:
        """Begin an episode, settled, from the fixed initial state `episode`; gives what is seen and the instruction.

        practice: for demonstrations; an initial state that is none of the fixed ones, drawn with `episode` as the seed.
        """
        ...

    def step(self, action: np.ndarray) -> Observation:
        """Carry out one action (A,) in the benchmark's convention."""
        ...

    def outcome(self) -> dict[str, Any]:
        """success (by the benchmark's rule), success_last, success_ever, partial (share of what was asked), steps,
        chain (parts done, None where there are none) and note (such as "stand-in assets", else "")."""
        ...

    def expert(self) -> np.ndarray:
        """The scripted expert's action (A,) now, which reads the simulator's state. InputError where there is none."""
        ...

    def snapshot(self) -> np.ndarray:
        """Everything that a picture of this moment needs, as numbers (k,)."""
        ...

    def recall(self, snapshot: np.ndarray) -> Observation:
        """A moment of the present episode again, for pictures and proprioception; nothing is stepped from here."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class SimulatorBenchmark:
    """One protocol of a real simulator; offers what the tabletop's `Benchmark` does, as far as evaluation needs it.

    success_rule: `any_step` or `last_step`. step_limits: task -> most steps. action_limit: largest useful magnitude of
    each action number. episodes: fixed initial states per task. execute: actions of a chunk carried out before
    replanning, None for the whole chunk. factory: "module:Class", called as (benchmark, **options). environment: the
    simulator's own, `.venv-NAME` beside the project. modules: what has to be importable there.
    options: name -> (default, *further choices); a default that is a number or a text takes any of its kind when it
    stands alone. Options change outcomes or pictures, so they are written into the manifest and told with the result.
    experts: tasks that the scripted expert can do.
    """

    name: str
    version: int
    title: str
    tasks: tuple[str, ...]
    convention: ActionConvention
    cameras: tuple[str, ...]
    state_names: tuple[str, ...]
    success_rule: str
    step_limits: Mapping[str, int]
    action_limit: tuple[float, ...]
    episodes: int
    factory: str
    environment: str
    modules: tuple[str, ...]
    execute: int | None = None
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    experts: tuple[str, ...] = ()

    @property
    def protocol(self) -> str:
        """Name with version, as rows carry it."""
        return f"{self.name}@{self.version}"

    @property
    def kept_for_test(self) -> set[str]:
        """Looks that no policy tested here may have been trained in: of a real simulator, none are told apart."""
        return set()

    @property
    def train_domains(self) -> tuple[str, ...]:
        return ()

    def env_seed(self, task: str, episode: int) -> int:
        """What rows carry as `env_seed`: the number of the fixed initial state."""
        return episode

    def portion(self, episodes: int) -> str:
        """How much of the protocol so many episodes per task are, in words; "" for nothing to say."""
        return f"{episodes} of {self.episodes} initial states" if episodes < self.episodes else ""

    def missing(self) -> list[str]:
        """Packages, assets and drivers that are not there, one clear line each; cheap, and imports no simulator.

        A simulator that needs more than packages adds to this.
        """
        gone = [module for module in self.modules if not where(module, self.environment)]
        what = f"{self.protocol} needs {', '.join(gone)}, installed neither here nor in .venv-{self.environment}"
        return [f"{what}: run `make venv-{self.environment}`"] if gone else []

    def describe(self) -> dict[str, Any]:
        """The whole protocol as JSON values."""
        return {
            "protocol": self.protocol, "title": self.title, "tasks": dict(self.step_limits),
            "success_rule": self.success_rule, "execute": self.execute or "whole chunk", "episodes": self.episodes,
            "cameras": list(self.cameras), "state": list(self.state_names), "convention": self.convention.to_dict(),
        }  # fmt: skip

    def chosen(self, words: tuple[str, ...]) -> dict[str, Any]:
        """Options given as NAME=VALUE, over the defaults. Raises InputError on unknown names and values."""
        found = {name: choices[0] for name, choices in self.options.items()}
        for word in words:
            name, _, text = word.partition("=")
            if name not in self.options:
                raise InputError(f"{self.protocol} has no option '{name}'", fix=nearest(name, self.options))
            default, *others = self.options[name]
            try:
                value = type(default)(text)
            except ValueError:
                value = None
            if value is None or (others and value not in (default, *others)):
                known = ", ".join(map(str, (default, *others))) if others else f"a value like {default}"
                raise InputError(f"option {name} of {self.protocol} cannot be '{text}'", fix=f"give {known}")
            found[name] = value
        return found

    def make(self, options: Mapping[str, Any]) -> Simulator:
        """The simulator itself, in this process."""
        module, _, name = self.factory.partition(":")
        return getattr(importlib.import_module(module), name)(self, **options)


def where(module: str, environment: str) -> str:
    """Where a package lies: "here", ".venv-NAME" for the simulator's own environment, "" when in neither."""
    try:
        if util.find_spec(module) is not None:
            return "here"
    except (ImportError, ValueError):
        pass
    return f".venv-{environment}" if any(packages(environment, module)) else ""


def packages(environment: str, module: str) -> list[Path]:
    """Folders of a package in the simulator's own environment: one, or none."""
    return list((folders.project_root() / f".venv-{environment}" / "lib").glob(f"python*/site-packages/{module}"))


def name_folders(assets: Path | None, calvin_root: Path | None) -> None:
    """Tell this process and its workers where the simulators' files are; what is None stays as the environment says."""
    for variable, folder in (("VLM4VLA_SIM_ASSETS", assets), ("CALVIN_ROOT", calvin_root)):
        if folder is not None:
            os.environ[variable] = str(folder.resolve())
