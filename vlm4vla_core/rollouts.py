"""Short rollouts while a policy is trained, on episodes that no test uses.

The tasks are a benchmark's; looks and words are those of its training, and seeds are of a family of their own (bit 49
set, bit 48 clear), so they are never those of the test (bit 48 set) nor of demonstrations (both clear).

Trap: these are validation episodes. Choosing a checkpoint by them is allowed, reporting them as the benchmark's result
is not: looks, words and scenes are others.
"""

from __future__ import annotations

import zlib
from dataclasses import fields
from typing import Any

import numpy as np

from vlm4vla_core.actors import PolicyActor, check_conventions
from vlm4vla_core.errors import InputError
from vlm4vla_core.evaluation import chain_summary, rollout
from vlm4vla_core.presets import TrainConfig
from vlm4vla_core.results import wilson
from vlm4vla_core.sims import Benchmark, benchmark
from vlm4vla_core.sims.benchmarks import EVALUATION_BIT

VALIDATION_BIT = EVALUATION_BIT << 1  # 50 bits are exact in every JSON reader, too
_VALIDATION = 0x7A11


class Validation(Benchmark):
    """A benchmark's tasks on validation episodes."""

    @property
    def protocol(self) -> str:
        """Told apart from the benchmark's own."""
        return f"{self.name}@{self.version} validation"

    def env_seed(self, task: str, episode: int) -> int:
        """Seed of validation episode `episode` of `task`."""
        drawn = np.random.SeedSequence([_VALIDATION, zlib.crc32(task.encode()), episode]).generate_state(1, np.uint64)
        return VALIDATION_BIT | int(drawn[0]) & (EVALUATION_BIT - 1)


def validation_of(protocol: str) -> Validation:
    """The validation episodes of a benchmark. Raises InputError on one that has none."""
    bench = benchmark(protocol)
    if type(bench) is not Benchmark:
        raise InputError(f"{protocol} declares no validation episodes", fix="give a tabletop benchmark")
    own = {field.name: getattr(bench, field.name) for field in fields(bench)}
    return Validation(**{**own, "domains": bench.train_domains, "held_out": False})


class Rollouts:
    """The rollouts that a run's settings ask for. Raises InputError when the policy does not fit the benchmark."""

    def __init__(self, config: TrainConfig, policy: Any) -> None:
        self.bench = bench = validation_of(config.rollout_benchmark)
        where = f"rollout_benchmark {config.rollout_benchmark}"
        check_conventions(policy.config.convention, bench.convention, where=where)
        if policy.config.camera not in bench.cameras:
            what = f"the policy looks through camera '{policy.config.camera}', which the benchmark has not"
            raise InputError(what, where=where, fix=f"train with --camera {' or '.join(bench.cameras)}")
        tasks = tuple(dict.fromkeys(config.rollout_tasks)) or bench.tasks
        self.cells = [(task, episode) for task in tasks for episode in range(config.rollout_episodes)]
        bench.env(tasks, [bench.env_seed(task, 0) for task in tasks])  # unknown tasks are told before training
        execute = min(bench.execute or policy.config.chunk, policy.config.chunk)
        self.actor = PolicyActor(policy, execute, {"model": "policy in training"})

    def run(self) -> dict[str, Any]:
        """Success over all episodes and by task, with n and Wilson's 95 % interval; chains: mean number done in a row.

        Draws nothing from torch's or numpy's global state and leaves the policy as it was.
        """
        import torch

        with torch.compiler.set_stance("force_eager"):  # batches shrink as episodes end: every size would be a graph
            rows = list(rollout(self.bench, self.actor, self.cells))
        tasks = dict.fromkeys(row["task"] for row in rows)
        found = {"benchmark": self.bench.protocol, "execute": self.actor.execute, **_rate(rows)}
        if len(tasks) > 1:
            found["tasks"] = {task: _rate([row for row in rows if row["task"] == task]) for task in tasks}
        if lengths := [row["chain"] for row in rows if row["chain"] is not None]:
            chains = chain_summary(np.array(lengths))
            found["chain"] = {"mean": chains.mean, "low": chains.interval[0], "high": chains.interval[1]}
        return found


def _rate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    successes = sum(bool(row["success"]) for row in rows)
    interval = wilson(successes, len(rows))
    return {"n": len(rows), "successes": successes, "rate": successes / len(rows), **interval._asdict()}
