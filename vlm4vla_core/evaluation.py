"""Roll a policy out in a benchmark: one row per episode, closed loop, many episodes at a time.

The tabletop world is stepped in this process, a batch of episodes together; simulators of one world each are stepped by
worker processes (`sims.pool`). Both give the same kind of rows, kept one by one in a `Journal`, so re-issuing runs only
the (task, episode) cells that are not there yet.

Trap: `execute` and ensembling change success rates, so they are part of the result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core import journal
from vlm4vla_core.actors import (
    BASELINES,
    BLIND,
    Actor,
    PolicyActor,
    check_conventions,
    check_finite,
    identify,
    make_actor,
)
from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.playback import ENSEMBLES, Playback
from vlm4vla_core.progress import progress
from vlm4vla_core.results import episode_row

if TYPE_CHECKING:
    import pandas as pd

    from vlm4vla_core.remote import Remote
    from vlm4vla_core.sims.benchmarks import BatchedEnv, Benchmark

__all__ = [
    "BASELINES", "BLIND", "ENSEMBLES", "Plan", "PolicyActor", "chain_summary", "check_conventions", "evaluate", "film",
    "make_actor", "merge", "rollout",
]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is evaluated: everything that decides the rows.

    policy: a checkpoint or run folder, one of BASELINES (`mean-action` needs `data`, a store), or a policy on a server.
    tasks: a subset of the benchmark's, all when empty. episodes: per task, numbered from 0. execute: actions of a chunk
    carried out before replanning; None means the protocol's own number, else the chunk. deterministic: predict one
    picture at a time, so that rounding does not depend on the others. options: NAME=VALUE of a simulator's protocol.
    ensemble: "temporal" averages chunks that overlap. blind: "image" (needs `data`) or "language", the shortcut checks.
    device: where a checkpoint predicts; not part of what rows are tied to. draw: number of the noise of a policy with a
    sampling head: the same episodes with another one; None gives every look the noise of seed 0.
    """

    policy: str | Path | Remote
    protocol: str
    tasks: tuple[str, ...] = ()
    episodes: int = 20
    execute: int | None = None
    data: Path | None = None
    deterministic: bool = False
    options: tuple[str, ...] = ()
    ensemble: str = "none"
    blind: str = "none"
    device: str = "cpu"
    draw: int | None = None

    def checked(self) -> Checked:
        """The plan against its benchmark. Raises InputError on unknown names, impossible combinations, and anything
        that the simulator needs and that is not there."""
        from vlm4vla_core.sims import benchmark as find_benchmark

        bench = find_benchmark(self.protocol)
        chosen = _chosen(bench, self.tasks)
        if self.episodes < 1:
            raise InputError(f"--episodes must be at least 1, got {self.episodes}")
        most = getattr(bench, "episodes", None)
        if most is not None and self.episodes > most:
            raise InputError(f"{bench.protocol} has {most} initial states per task, not {self.episodes}")
        for name, value, known in (("ensemble", self.ensemble, ENSEMBLES), ("blind", self.blind, BLIND)):
            if value not in known:
                raise InputError(f"--{name} cannot be '{value}'", fix=nearest(value, known))
        if str(self.policy) in BASELINES:
            if self.execute is not None or self.ensemble != "none":
                what = f"{self.policy} predicts one action at a time"
                raise InputError(what, fix="leave --execute and --ensemble out")
            if self.blind != "none":
                raise InputError(f"{self.policy} looks at nothing", fix="leave --blind out")
            if self.draw is not None:
                raise InputError(f"{self.policy} has no head that draws noise", fix="leave --draw out")
        if self.draw is not None and self.draw < 0:
            raise InputError(f"--draw must be at least 0, got {self.draw}")
        name, inputs = identify(self.policy, self.data, self.blind)
        config: dict[str, Any] = {"policy": name, "benchmark": bench.describe(), "execute": self.execute}
        options = bench.chosen(self.options)
        # Left out where they say nothing, so that folders of earlier versions go on.
        extras = {"deterministic": self.deterministic, "options": options}
        config |= {key: value for key, value in extras.items() if value}
        config |= {} if self.draw is None else {"draw": self.draw}
        config |= {key: getattr(self, key) for key in ("ensemble", "blind") if getattr(self, key) != "none"}
        if missing := bench.missing():
            raise InputError("; ".join(missing))
        cells = [(task, episode) for task in chosen for episode in range(self.episodes)]
        return Checked(self, bench, cells, options, config, inputs)

    def actor(self, bench: Any) -> Actor:
        """Who acts. Raises InputError where policy and benchmark do not go together."""
        return make_actor(
            self.policy, bench, self.execute, self.data, deterministic=self.deterministic, blind=self.blind,
            device=self.device, draw=self.draw,
        )  # fmt: skip


@dataclass(frozen=True)
class Checked:
    """A plan that can be run: its benchmark, its episodes, the protocol's options, and what its rows are tied to."""

    plan: Plan
    bench: Any
    cells: list[tuple[str, int]]
    options: dict[str, Any]
    config: dict[str, Any]
    inputs: dict[str, str]

    def rows(
        self,
        cells: Sequence[tuple[str, int]],
        *,
        workers: int | None,
        parallel: int = 64,
        timeout: float | None = None,
        films: Mapping[tuple[str, int], Path] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Run these episodes: in worker processes, or the tabletop world in this one when `workers` is None."""
        from vlm4vla_core.sims import SimulatorBenchmark, pool

        actor = self.plan.actor(self.bench)
        if workers is None and not isinstance(self.bench, SimulatorBenchmark):
            yield from rollout(self.bench, actor, cells, parallel=parallel, ensemble=self.plan.ensemble)
            return
        from vlm4vla_core.episodes.conversion import cores

        if self.plan.draw is not None:
            raise InputError("--draw is for the tabletop world, stepped here", fix="leave --draw or --workers out")
        yield from pool.rollout(
            self.bench, actor, cells, workers=workers or cores(), options=self.options, ensemble=self.plan.ensemble,
            films=films, timeout=timeout or pool.TIMEOUT,
        )  # fmt: skip


def evaluate(
    plan: Plan,
    out: Path,
    *,
    workers: int | None = None,
    shard: tuple[int, int] = (1, 1),
    films: Mapping[tuple[str, int], Path] | None = None,
    parallel: int = 64,
    timeout: float | None = None,
) -> pd.DataFrame:
    """Evaluate, and keep one row per episode in `out`/rows.parquet; runs only what is not there.

    workers: processes; one per core for a simulator when None, none for the tabletop world. shard: (i, n) runs every
    n-th episode from the i-th on, into `OUT-shards/i-of-n`; `merge` puts the shards together. films: cell -> file, for
    simulators. timeout: seconds without a sign of life until a worker is replaced. Returns all rows there are, old and
    new. Raises InputError as `Plan.checked` and `make_actor`, and when `out` holds rows of something else.
    """
    found = plan.checked()
    cells = found.cells[shard[0] - 1 :: shard[1]]
    if shard != (1, 1):
        out = journal.shards_folder(out) / f"{shard[0]}-of-{shard[1]}"
    wanted = {cell: path for cell, path in (films or {}).items() if cell in cells and not path.exists()}
    with journal.Journal(out, found.config, found.inputs, found.bench.tasks) as kept:
        done = kept.done
        # A finished episode whose film is wanted runs once more, for the film alone.
        todo = [cell for cell in cells if cell not in done or cell in wanted]
        if todo:
            for row in found.rows(todo, workers=workers, parallel=parallel, timeout=timeout, films=wanted):
                if (row["task"], row["episode"]) not in done:
                    kept.add(row)
    assert kept.rows is not None
    return kept.rows


def merge(plan: Plan, out: Path) -> pd.DataFrame:
    """Put the shards of an evaluation together; refuses gaps and doubles."""
    found = plan.checked()
    return journal.merge(out, found.config, found.inputs, found.bench.tasks, set(found.cells))


def rollout(
    benchmark: Benchmark,
    actor: Actor,
    cells: Sequence[tuple[str, int]],
    *,
    parallel: int = 64,
    ensemble: str = "none",
    watch: Callable[[BatchedEnv, np.ndarray | None], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Run the episodes `cells` = [(task, episode), …] and yield one row (a dict of EPISODE_COLUMNS) for each, in order.

    parallel: episodes stepped together; the outcome of an episode does not depend on it. watch: called with the worlds
    and their actions (n, A) before every step, and with None for the actions at the end.
    wall_s: the group's time shared out evenly, since its episodes run together.
    """
    with progress(total=len(cells), what=f"evaluate {actor.labels['model']}", unit="episode") as bar:
        for start in range(0, len(cells), parallel):
            yield from _rollout_group(benchmark, actor, cells[start : start + parallel], ensemble, bar.update, watch)


def _rollout_group(
    benchmark: Benchmark,
    actor: Actor,
    cells: Sequence[tuple[str, int]],
    ensemble: str,
    finished: Callable[[int], Any],
    watch: Callable[[BatchedEnv, np.ndarray | None], None] | None,
) -> Iterator[dict[str, Any]]:
    began = time.perf_counter()
    seeds = [benchmark.env_seed(*cell) for cell in cells]
    env = benchmark.env([task for task, _ in cells], seeds)
    rngs = [np.random.default_rng([seed, 1]) for seed in seeds]  # a baseline's own stream, apart from the world's
    playbacks = [Playback(benchmark.convention, actor.execute, ensemble) for _ in cells]
    while env.running.any():
        running = np.flatnonzero(env.running)
        fresh = np.array([row for row in running if playbacks[row].wants(bool(env.renewed[row]))], int)
        if len(fresh):
            chunks = actor.act(env, fresh, rngs)  # (R, chunk, A)
            check_finite(chunks, actor.labels["model"])
            for row, chunk in zip(fresh, chunks, strict=True):
                playbacks[row].add(chunk)
        actions = np.zeros((len(cells), benchmark.convention.size))
        actions[running] = [playbacks[row].next() for row in running]
        if watch:
            watch(env, actions)
        env.step(actions)
        finished(len(running) - int(env.running.sum()))
    if watch:
        watch(env, None)
    seconds = (time.perf_counter() - began) / len(cells)
    for i, cell in enumerate(cells):
        yield episode_row(
            benchmark, actor.labels, actor.execute, cell, env_seed=seeds[i], wall_s=seconds, outcome=env.outcome(i)
        )


def _chosen(bench: Any, tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks to run, each once; all when none is named. Raises InputError on an unknown one."""
    for task in tasks:
        if task not in bench.tasks:
            raise InputError(f"{bench.protocol} has no task '{task}'", fix=nearest(task, bench.tasks))
    return tuple(dict.fromkeys(tasks)) or bench.tasks


def film(plan: Plan, path: Path, *, episodes: Sequence[int] = (0,)) -> list[dict[str, Any]]:
    """Run the numbered episodes of each task of the tabletop world once more, one at a time, and write what the camera
    saw as .mp4 or .gif, under the instruction, over the action, with the outcome at the end.

    Returns their rows. Raises InputError as `evaluate`, and for a simulator, which is filmed while it is evaluated.
    """
    from vlm4vla_core.film import captioned, check_ending, numbers, told, write_video
    from vlm4vla_core.sims import SimulatorBenchmark
    from vlm4vla_core.sims import benchmark as find_benchmark

    check_ending(path)
    bench = find_benchmark(plan.protocol)
    if isinstance(bench, SimulatorBenchmark):
        raise InputError(f"{bench.protocol} is filmed while it runs", fix="give --video a number of episodes per task")
    actor = plan.actor(bench)
    camera = actor.driver(bench, plan.ensemble).camera
    frames: list[np.ndarray] = []
    rows: list[dict[str, Any]] = []
    for cell in [(task, episode) for task in _chosen(bench, plan.tasks) for episode in episodes]:
        seen: list[tuple[np.ndarray, str, str]] = []

        def watch(env: BatchedEnv, actions: np.ndarray | None, seen: list[tuple[np.ndarray, str, str]] = seen) -> None:
            below = "" if actions is None else numbers(actions[0])
            seen.append((env.observe([0], camera)[0], env.instructions[0], below))

        rows += rollout(bench, actor, [cell], ensemble=plan.ensemble, watch=watch)
        frames += [captioned(picture, words, outcome=below) for picture, words, below in seen]
        frames += [captioned(*seen[-1][:2], outcome=told(rows[-1]))] * round(bench.convention.control_hz)
    write_video(path, frames, fps=float(bench.convention.control_hz))
    return rows


@dataclass(frozen=True)
class Chains:
    """Chains of instructions: mean number done in a row with its 95 % interval over chains, and per number k the share
    of chains with at least k done (`rates`: at_least, rate, low, high; Wilson)."""

    n: int
    mean: float
    interval: tuple[float, float]
    rates: tuple[dict[str, float], ...]


def chain_summary(lengths: np.ndarray, longest: int = 5) -> Chains:
    """Summary of chain lengths (n,), each 0…longest."""
    from vlm4vla_core.results import wilson

    lengths, n = np.asarray(lengths, float), len(lengths)
    rates = []
    for k in range(1, longest + 1):
        count = int((lengths >= k).sum())
        rates.append({"at_least": k, "rate": count / n, **wilson(count, n)._asdict()})
    return Chains(n, float(lengths.mean()), bounded_mean(lengths, float(longest)), tuple(rates))


def bounded_mean(values: np.ndarray, high: float) -> tuple[float, float]:
    """95 % interval of the mean of values in [0, high]: the normal one after adding two values of 0 and two of `high`,
    so that equal values do not give a width of nothing (for 0 and 1 it is that of Agresti and Coull 1998)."""
    more = np.concatenate([values, [0.0, 0.0, high, high]])
    half = 1.959964 * more.std() / np.sqrt(len(more))
    return max(0.0, float(more.mean() - half)), min(high, float(more.mean() + half))
