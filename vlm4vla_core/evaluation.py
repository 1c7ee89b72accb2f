"""Roll a policy out in a benchmark: one row per episode, closed loop, many episodes at a time.

The policy's declared action convention is compared with the benchmark's before the first step, and a
difference refuses the evaluation. Re-issuing runs only the (task, episode) cells that are not there yet.

Trap: `execute` (how many actions of a predicted chunk are carried out before the policy looks again) changes
success rates, so it is part of the result and never chosen on the test episodes here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vlm4vla_core import folders
from vlm4vla_core.actions import ActionConvention
from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.progress import progress
from vlm4vla_core.results import EPISODE_COLUMNS

if TYPE_CHECKING:
    import pandas as pd

    from vlm4vla_core.remote import Remote
    from vlm4vla_core.sims.benchmarks import BatchedEnv, Benchmark

BASELINES = ("random", "zero", "mean-action", "scripted")


class Actor(Protocol):
    """What the rollout loop needs: a chunk of actions in the benchmark's convention for every episode."""

    @property
    def execute(self) -> int:
        """Actions of a chunk carried out before the policy looks again."""
        ...

    @property
    def labels(self) -> dict[str, Any]:
        """What the policy contributes to every row (`EPISODE_COLUMNS`)."""
        ...

    def act(self, env: BatchedEnv, rows: np.ndarray, rngs: Sequence[np.random.Generator]) -> np.ndarray:
        """Actions (len(rows), chunk, A) for the episodes `rows` of `env`."""
        ...


@dataclass(frozen=True)
class BaselineActor:
    """A policy that never looks: uniform random, no motion, the mean demonstrated action; or the scripted expert."""

    name: str
    convention: ActionConvention
    limit: np.ndarray  # (A,) largest magnitude of a random action
    mean: np.ndarray | None = None  # (A,)
    execute: int = 1

    @property
    def labels(self) -> dict[str, Any]:
        note = "privileged: reads the simulator's state" if self.name == "scripted" else "baseline without sight"
        return {"run_id": self.name, "model": self.name, "note": note}

    def act(self, env: BatchedEnv, rows: np.ndarray, rngs: Sequence[np.random.Generator]) -> np.ndarray:
        if self.name == "scripted":
            return env.expert()[rows][:, None]  # (R, 1, A)
        actions = np.zeros((len(rows), 1, self.convention.size))
        if self.name == "random":
            for i, row in enumerate(rows):
                actions[i, 0] = rngs[row].uniform(-self.limit, self.limit)
                actions[i, 0, -1] = rngs[row].choice([self.convention.gripper_open, self.convention.gripper_closed])
        elif self.name == "zero":
            actions[..., -1] = self.convention.gripper_open
        else:
            actions[:] = self.mean
        return actions


@dataclass(frozen=True)
class PolicyActor:
    """A trained policy: sees the camera picture and the instruction."""

    policy: Any  # VLAPolicy; typed loosely so that importing this module needs no torch
    execute: int
    labels: dict[str, Any]
    batch_size: int = 64

    def act(self, env: BatchedEnv, rows: np.ndarray, rngs: Sequence[np.random.Generator]) -> np.ndarray:
        images = env.observe(rows, self.policy.config.camera)
        instructions = [env.instructions[row] for row in rows]
        chunks = [
            self.policy.predict(images[i : i + self.batch_size], instructions[i : i + self.batch_size]).actions
            for i in range(0, len(rows), self.batch_size)
        ]
        return np.concatenate(chunks)


def check_conventions(policy: ActionConvention, benchmark: ActionConvention, *, where: object) -> None:
    """Raise InputError that lists every difference between a policy's and a benchmark's action convention."""
    if differences := policy.differences(benchmark):
        raise InputError(
            f"the policy's actions do not mean what the benchmark expects: {'; '.join(differences)}",
            where=where,
            fix="train on data recorded in the benchmark's convention",
        )


def check_seen(domains: Sequence[str], benchmark: Benchmark, *, where: object) -> None:
    """Raise InputError when a policy was trained in a look (`domains`) that the benchmark keeps for the test."""
    if seen := sorted(benchmark.kept_for_test & set(domains)):
        raise InputError(
            f"the policy was trained in look {', '.join(seen)}, which {benchmark.protocol} keeps for the test",
            where=where,
            fix=f"train on demonstrations in {', '.join(benchmark.train_domains)} (`vlm4vla record --domains`)",
        )


def rollout(
    benchmark: Benchmark,
    actor: Actor,
    cells: Sequence[tuple[str, int]],
    *,
    parallel: int = 64,
    watch: Callable[[BatchedEnv], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Run the episodes `cells` = [(task, episode), …] and yield one row (a dict of EPISODE_COLUMNS) for each, in order.

    parallel: episodes stepped together; the outcome of an episode does not depend on it. watch: called with the worlds
    before every step and at the end.
    wall_s: the group's time shared out evenly, since its episodes run together.
    """
    with progress(total=len(cells), what=f"evaluate {actor.labels['model']}", unit="episode") as bar:
        for start in range(0, len(cells), parallel):
            yield from _rollout_group(benchmark, actor, cells[start : start + parallel], bar.update, watch)


def _rollout_group(
    benchmark: Benchmark,
    actor: Actor,
    cells: Sequence[tuple[str, int]],
    finished: Callable[[int], Any],
    watch: Callable[[BatchedEnv], None] | None,
) -> Iterator[dict[str, Any]]:
    began = time.perf_counter()
    tasks = [task for task, _ in cells]
    seeds = [benchmark.env_seed(task, episode) for task, episode in cells]
    env = benchmark.env(tasks, seeds)
    rngs = [np.random.default_rng([seed, 1]) for seed in seeds]  # a baseline's own stream, apart from the world's
    chunk, phase = np.zeros((len(cells), actor.execute, benchmark.convention.size)), np.full(len(cells), actor.execute)
    while env.running.any():
        if watch:
            watch(env)
        phase[env.renewed] = actor.execute  # new words: look again
        fresh = np.flatnonzero(env.running & (phase == actor.execute))
        if len(fresh):
            planned = actor.act(env, fresh, rngs)[:, : actor.execute]  # (R, execute, A)
            if not np.isfinite(planned).all():
                what = "the policy returned NaN or infinite actions"
                raise InputError(what, where=actor.labels["model"], fix="use an earlier checkpoint")
            chunk[fresh], phase[fresh] = planned, 0
        rows = np.flatnonzero(env.running)
        actions = np.zeros((len(cells), benchmark.convention.size))
        actions[rows] = chunk[rows, phase[rows]]
        phase[rows] += 1
        env.step(actions)
        finished(len(rows) - int(env.running.sum()))
    if watch:
        watch(env)
    seconds = (time.perf_counter() - began) / len(cells)
    for i, (task, episode) in enumerate(cells):
        row = dict.fromkeys(EPISODE_COLUMNS)
        row.update(actor.labels)
        row.update(
            benchmark=benchmark.name, protocol=benchmark.protocol, task=task, episode=episode, env_seed=seeds[i],
            execute=actor.execute, success_rule=benchmark.success_rule, wall_s=round(seconds, 4), **env.outcome(i),
        )  # fmt: skip
        yield row


def evaluate(
    policy: str | Path | Remote,
    protocol: str,
    out: Path,
    *,
    tasks: Sequence[str] = (),
    episodes: int = 20,
    execute: int | None = None,
    parallel: int = 64,
    data: Path | None = None,
    deterministic: bool = False,
) -> pd.DataFrame:
    """Evaluate a checkpoint (or a baseline by name) and keep one row per episode in `out`/rows.parquet.

    policy: a checkpoint or run folder, one of BASELINES (`mean-action` needs `data`, a store), or a policy on a server.
    tasks: a subset of the benchmark's tasks, all when empty. episodes: per task, numbered from 0.
    execute: actions of a chunk carried out before replanning; None means the protocol's own number, else the chunk.
    deterministic: predict one picture at a time, so that rounding does not depend on the others.
    Returns all rows of `out`, old and new. Raises InputError on unknown names, mismatched conventions,
    or when `out` holds rows of another policy or protocol, or no rows at all.
    """
    from vlm4vla_core.sims import benchmark as find_benchmark

    bench = find_benchmark(protocol)
    chosen = _chosen(bench, tasks)
    if episodes < 1:
        raise InputError(f"--episodes must be at least 1, got {episodes}")
    cells = [(task, episode) for task in chosen for episode in range(episodes)]
    if str(policy) in BASELINES and execute is not None:
        raise InputError(f"{policy} predicts one action at a time", fix="leave --execute out")
    name, inputs = _identify(policy, data)
    config = {"policy": name, "benchmark": bench.describe(), "execute": execute}
    if deterministic:
        config["deterministic"] = True
    rows = _finished(out, config, inputs)
    done = set() if rows is None else set(zip(rows["task"], rows["episode"], strict=True))
    missing = [cell for cell in cells if cell not in done]
    if rows is not None and not missing:
        return rows
    actor = _make_actor(policy, bench, execute, data, deterministic)
    fresh = rollout(bench, actor, missing, parallel=parallel)
    # One write per group keeps a killed evaluation's finished episodes.
    while group := list(islice(fresh, parallel)):
        rows = _save(out, rows, group, config, inputs)
    assert rows is not None
    return rows


def _chosen(bench: Benchmark, tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks to run, each once; all when none is named. Raises InputError on an unknown one."""
    for task in tasks:
        if task not in bench.tasks:
            raise InputError(f"{bench.protocol} has no task '{task}'", fix=nearest(task, bench.tasks))
    return tuple(dict.fromkeys(tasks)) or bench.tasks


def film(
    policy: str | Path | Remote,
    protocol: str,
    path: Path,
    *,
    tasks: Sequence[str] = (),
    episodes: Sequence[int] = (0,),
    execute: int | None = None,
    data: Path | None = None,
) -> list[dict[str, Any]]:
    """Run the numbered episodes of each task once more, one at a time, and write what the policy's camera saw as .mp4
    or .gif, under the instruction, with the outcome at the end. Returns their rows. Raises InputError as `evaluate`."""
    from vlm4vla_core.film import captioned, check_ending, write_video
    from vlm4vla_core.sims import benchmark as find_benchmark

    check_ending(path)
    bench = find_benchmark(protocol)
    actor = _make_actor(policy, bench, execute, data)
    camera = actor.policy.config.camera if isinstance(actor, PolicyActor) else bench.cameras[0]
    frames: list[np.ndarray] = []
    rows: list[dict[str, Any]] = []
    for cell in [(task, episode) for task in _chosen(bench, tasks) for episode in episodes]:
        seen: list[tuple[np.ndarray, str]] = []

        def watch(env: BatchedEnv, seen: list[tuple[np.ndarray, str]] = seen) -> None:
            seen.append((env.observe([0], camera)[0], env.instructions[0]))

        rows += rollout(bench, actor, [cell], watch=watch)
        frames += [captioned(picture, words) for picture, words in seen]
        frames += [captioned(*seen[-1], outcome=_told(rows[-1]))] * round(bench.convention.control_hz)
    write_video(path, frames, fps=float(bench.convention.control_hz))
    return rows


def _told(row: dict[str, Any]) -> str:
    """An episode's outcome in words."""
    if row["chain"] is not None:
        return f"{row['chain']} of 5 done in {row['steps']} steps"
    return f"{'reached' if row['success'] else 'not reached'} in {row['steps']} steps"


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


def _identify(policy: str | Path | Remote, data: Path | None) -> tuple[str, dict[str, str]]:
    """What kind of policy this is, and the fingerprints that its rows are tied to."""
    if str(policy) in BASELINES:
        if str(policy) != "mean-action":
            return str(policy), {}
        if data is None:
            raise InputError("mean-action needs demonstrations to average", fix="add --data STORE")
        return "mean-action", {"data": _store_fingerprint(Path(data))}
    from vlm4vla_core import checkpoint

    if not isinstance(policy, str | Path):
        return "checkpoint", {"checkpoint": policy.fingerprint}
    try:
        folder = checkpoint.resolve(Path(policy))
    except InputError:
        if not Path(policy).exists():
            fix = f"give a checkpoint or run folder, or one of {', '.join(BASELINES)}"
            raise InputError("no such checkpoint", where=policy, fix=fix) from None
        raise
    return "checkpoint", {"checkpoint": folders.read_manifest(folder, "checkpoint")["fingerprint"]}


def _store_fingerprint(store: Path) -> str:
    from vlm4vla_core.episodes.store import REMAKE

    return str(folders.read_manifest(store, "episodes", name=folders.STORE_MANIFEST, fix=REMAKE)["fingerprint"])


def _make_actor(
    policy: str | Path | Remote, bench: Benchmark, execute: int | None, data: Path | None, deterministic: bool = False
) -> Actor:
    if str(policy) in BASELINES:
        mean = None
        if str(policy) == "mean-action":
            from vlm4vla_core.episodes.store import EpisodeStore

            assert data is not None
            store = EpisodeStore.open(data)
            check_conventions(store.convention, bench.convention, where=data)
            mean = np.asarray(store.stats["action"]["mean"])
            halfway = (bench.convention.gripper_open + bench.convention.gripper_closed) / 2
            opens = (mean[-1] > halfway) == (bench.convention.gripper_open > halfway)
            mean[-1] = bench.convention.gripper_open if opens else bench.convention.gripper_closed
        return BaselineActor(str(policy), bench.convention, np.asarray(bench.action_limit), mean)
    model: Any
    where: str | Path
    if isinstance(policy, str | Path):
        from vlm4vla_core import checkpoint
        from vlm4vla_core.policy import VLAPolicy

        where = checkpoint.resolve(Path(policy))
        model = VLAPolicy.load(where)
        domains, labels = model.backbone.lineage.get("domains", ()), checkpoint.row_labels(where)
    else:
        model, where, domains, labels = policy, policy.url, policy.domains, policy.labels
    check_conventions(model.config.convention, bench.convention, where=where)
    check_seen(domains, bench, where=where)
    if model.config.camera not in bench.cameras:
        what = f"the policy looks through camera '{model.config.camera}', and {bench.protocol} has none of that name"
        raise InputError(what, where=where, fix=f"train with --camera {' or '.join(bench.cameras)}")
    chunk = model.config.chunk
    carried_out = next(length for length in (execute, bench.execute, chunk) if length is not None)
    if not 1 <= carried_out <= chunk:
        fix = f"give --execute between 1 and {chunk}"
        raise InputError(f"--execute {carried_out} does not fit the policy's chunk of {chunk}", where=where, fix=fix)
    return PolicyActor(model, carried_out, labels, batch_size=1 if deterministic else 64)


def _finished(out: Path, config: dict[str, Any], inputs: dict[str, str]) -> pd.DataFrame | None:
    """Rows already in `out`, None when there are none; refuses a folder of another evaluation, or of anything else."""
    import pandas as pd

    if not (out / folders.MANIFEST).exists():
        folders.check_replaceable(out, "rollouts")
        return None
    manifest = folders.read_manifest(out, "rollouts")
    if manifest["config"] != config or manifest["inputs"] != inputs:
        raise InputError(
            "this folder holds rollouts of another policy, protocol or execute length",
            where=out,
            fix="give another --out, or remove it",
        )
    return pd.read_parquet(out / "rows.parquet")


def _save(
    out: Path,
    old: pd.DataFrame | None,
    fresh: list[dict[str, Any]],
    config: dict[str, Any],
    inputs: dict[str, str],
) -> pd.DataFrame:
    """Write old and fresh rows as the new content of `out`; returns them."""
    import pandas as pd

    added = pd.DataFrame(fresh, columns=list(EPISODE_COLUMNS), dtype=object)
    parts = [added] if old is None else [old.astype(object), added]
    rows = pd.concat(parts, ignore_index=True).convert_dtypes()
    with folders.new_folder(out, "rollouts") as folder:
        rows.to_parquet(folder / "rows.parquet", index=False)
        folders.write_manifest(folder, "rollouts", config=config, inputs=inputs, episodes=len(rows))
    return rows
