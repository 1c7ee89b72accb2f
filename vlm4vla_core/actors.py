"""Who acts in a rollout: a trained policy, one of the baselines, or the scripted expert.

A policy's actions are converted to the benchmark's convention exactly, or it is refused before the first step. The
shortcut checks blind a policy: `image` shows it the mean picture of its training data at every step, `language` asks it
a full stop instead of the instruction.

Trap: `execute` (actions of a predicted chunk that are carried out before the policy looks again) changes success rates,
so it is part of the result and never chosen on the test episodes here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vlm4vla_core import folders
from vlm4vla_core.action_conversion import converter, refuse
from vlm4vla_core.actions import ActionConvention
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from vlm4vla_core.remote import Remote
    from vlm4vla_core.sims.benchmarks import BatchedEnv

BASELINES = ("random", "zero", "mean-action", "scripted")
BLIND = ("none", "image", "language")
SAMPLING = ("flow",)  # heads that draw their answer from noise
SILENCE = "."  # what a policy is asked that gets no words; an empty text is no instruction
_PICTURES = 200  # frames that a mean picture is made of


@dataclass(frozen=True)
class Driver:
    """What a worker process needs to run an episode: how chunks are played out, which camera a policy looks through,
    and the baseline that acts there, if it is one."""

    convention: ActionConvention
    execute: int
    ensemble: str
    camera: str
    baseline: BaselineActor | None = None


class Actor(Protocol):
    """What the rollout loops need: chunks of actions in the benchmark's convention."""

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

    def driver(self, benchmark: Any, ensemble: str) -> Driver:
        """What a worker process needs of it."""
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

    def one(self, expert: Callable[[], np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """The next action (A,) of one episode."""
        if self.name == "scripted":
            return expert()
        if self.mean is not None:
            return self.mean
        action = np.zeros(self.convention.size)
        action[-1] = self.convention.gripper_open
        if self.name == "random":
            action = rng.uniform(-self.limit, self.limit)
            action[-1] = rng.choice([self.convention.gripper_open, self.convention.gripper_closed])
        return action

    def act(self, env: BatchedEnv, rows: np.ndarray, rngs: Sequence[np.random.Generator]) -> np.ndarray:
        every = env.expert() if self.name == "scripted" else np.empty(0)
        return np.stack([self.one(lambda row=row: every[row], rngs[row])[None] for row in rows])  # type: ignore[misc]

    def driver(self, benchmark: Any, ensemble: str) -> Driver:
        return Driver(self.convention, self.execute, ensemble, benchmark.cameras[0], self)


@dataclass(frozen=True)
class PolicyActor:
    """A trained policy: sees the camera picture and the instruction.

    convert: its actions into the benchmark's. blank: the picture (H, W, 3) it is shown instead of the camera's.
    silent: it is asked `SILENCE`. draw: every look of an episode gets noise of its own for a sampling head, which
    follows from this number and the episode's generator; None gives all looks the noise of seed 0.
    """

    policy: Any  # VLAPolicy; typed loosely so that importing this module needs no torch
    execute: int
    labels: dict[str, Any]
    batch_size: int = 64
    convert: Callable[[np.ndarray], np.ndarray] | None = None
    blank: np.ndarray | None = None
    silent: bool = False
    draw: int | None = None

    def act(self, env: BatchedEnv, rows: np.ndarray, rngs: Sequence[np.random.Generator]) -> np.ndarray:
        pictures, words = list(env.observe(rows, self.policy.config.camera)), [env.instructions[row] for row in rows]
        return self.plan(pictures, words, None if self.draw is None else [self._noise(rngs[row]) for row in rows])

    def plan(
        self, pictures: Sequence[np.ndarray], instructions: Sequence[str], seeds: Sequence[int] | None = None
    ) -> np.ndarray:  # fmt: skip
        """Chunks (B, chunk, A) for B pictures (H, W, 3) and B instructions, predicted `batch_size` at a time.

        seeds: of a sampling head's noise, one for each picture."""
        shown = np.stack(pictures if self.blank is None else [self.blank] * len(pictures))
        words = [SILENCE] * len(instructions) if self.silent else list(instructions)
        parts = [slice(i, i + self.batch_size) for i in range(0, len(words), self.batch_size)]
        chunks = np.concatenate([
            self.policy.predict(shown[part], words[part], **({} if seeds is None else {"seed": seeds[part]})).actions
            for part in parts
        ])  # fmt: skip
        return self.convert(chunks) if self.convert else chunks

    def _noise(self, rng: np.random.Generator) -> int:
        """Seed of the noise of an episode's next look."""
        assert self.draw is not None
        return int(np.random.SeedSequence([self.draw, int(rng.integers(1 << 62))]).generate_state(1, np.uint64)[0] >> 1)

    def driver(self, benchmark: Any, ensemble: str) -> Driver:
        return Driver(benchmark.convention, self.execute, ensemble, self.policy.config.camera)


def check_finite(actions: np.ndarray, model: object) -> None:
    """Raise InputError on NaN or infinite actions."""
    if not np.isfinite(actions).all():
        what = "the policy returned NaN or infinite actions"
        raise InputError(what, where=model, fix="use an earlier checkpoint")


def check_conventions(policy: ActionConvention, benchmark: ActionConvention, *, where: object) -> None:
    """Raise InputError that lists every difference between a policy's and a benchmark's action convention."""
    if differences := policy.differences(benchmark):
        refuse(differences, where)


def check_seen(domains: Sequence[str], benchmark: Any, *, where: object) -> None:
    """Raise InputError when a policy was trained in a look (`domains`) that the benchmark keeps for the test."""
    if seen := sorted(benchmark.kept_for_test & set(domains)):
        raise InputError(
            f"the policy was trained in look {', '.join(seen)}, which {benchmark.protocol} keeps for the test",
            where=where,
            fix=f"train on demonstrations in {', '.join(benchmark.train_domains)} (`vlm4vla record --domains`)",
        )


def identify(policy: str | Path | Remote, data: Path | None, blind: str = "none") -> tuple[str, dict[str, str]]:
    """What kind of policy this is, and the fingerprints that its rows are tied to."""
    if str(policy) in BASELINES:
        if str(policy) != "mean-action":
            return str(policy), {}
        if data is None:
            raise InputError("mean-action needs demonstrations to average", fix="add --data STORE")
        return "mean-action", {"data": _store_fingerprint(Path(data))}
    from vlm4vla_core import checkpoint

    shown = {}
    if blind == "image":
        if data is None:
            raise InputError("a policy without sight is shown the mean picture of a store", fix="add --data STORE")
        shown = {"data": _store_fingerprint(Path(data))}
    if not isinstance(policy, str | Path):
        return "checkpoint", {"checkpoint": policy.fingerprint, **shown}
    try:
        folder = checkpoint.resolve(Path(policy))
    except InputError:
        if not Path(policy).exists():
            fix = f"give a checkpoint or run folder, or one of {', '.join(BASELINES)}"
            raise InputError("no such checkpoint", where=policy, fix=fix) from None
        raise
    return "checkpoint", {"checkpoint": folders.read_manifest(folder, "checkpoint")["fingerprint"], **shown}


def _store_fingerprint(store: Path) -> str:
    from vlm4vla_core.episodes.store import REMAKE

    return str(folders.read_manifest(store, "episodes", name=folders.STORE_MANIFEST, fix=REMAKE)["fingerprint"])


def make_actor(
    policy: str | Path | Remote,
    bench: Any,
    execute: int | None = None,
    data: Path | None = None,
    *,
    deterministic: bool = False,
    blind: str = "none",
    device: str = "cpu",
    draw: int | None = None,
) -> Actor:
    """The actor for a policy in a benchmark. Raises InputError where the two do not go together."""
    if str(policy) in BASELINES:
        mean = _mean_action(Path(data), bench) if str(policy) == "mean-action" and data is not None else None
        return BaselineActor(str(policy), bench.convention, np.asarray(bench.action_limit), mean)
    model: Any
    where: str | Path
    if isinstance(policy, str | Path):
        from vlm4vla_core import checkpoint
        from vlm4vla_core.policy import VLAPolicy

        where = checkpoint.resolve(Path(policy))
        model = VLAPolicy.load(where, device)
        domains, labels = model.backbone.lineage.get("domains", ()), checkpoint.row_labels(where)
    else:
        model, where, domains, labels = policy, policy.url, policy.domains, policy.labels
    if draw is not None and getattr(model.config, "head", None) not in SAMPLING:
        head = getattr(model.config, "head", None)
        what = f"the policy's head '{head}' draws nothing" if head else "a policy on a server draws its own noise"
        raise InputError(f"{what}, so --draw would change nothing", where=where, fix="leave --draw out")
    convert, told = converter(model.config.convention, bench.convention, where=where)
    check_seen(domains, bench, where=where)
    camera, chunk = model.config.camera, model.config.chunk
    if camera not in bench.cameras:
        what = f"the policy looks through camera '{camera}', and {bench.protocol} has none of that name"
        raise InputError(what, where=where, fix=f"train with --camera {' or '.join(bench.cameras)}")
    carried_out = next(length for length in (execute, bench.execute, chunk) if length is not None)
    if not 1 <= carried_out <= chunk:
        fix = f"give --execute between 1 and {chunk}"
        raise InputError(f"--execute {carried_out} does not fit the policy's chunk of {chunk}", where=where, fix=fix)
    notes = [labels.get("note"), told and f"actions converted: {told}", blind != "none" and f"without {blind}"]
    labels = {**labels, "note": "; ".join(note for note in notes if note) or None}
    labels |= {} if draw is None else {"draw": draw}
    blank = _mean_picture(Path(data), camera) if blind == "image" and data is not None else None
    return PolicyActor(
        model, carried_out, labels, batch_size=1 if deterministic else 64, convert=convert if told else None,
        blank=blank, silent=blind == "language", draw=draw,
    )  # fmt: skip


def _mean_action(data: Path, bench: Any) -> np.ndarray:
    """The store's mean action (A,) in the benchmark's convention, the gripper as it mostly is."""
    from vlm4vla_core.episodes.store import EpisodeStore

    store = EpisodeStore.open(data)
    convert, _ = converter(store.convention, bench.convention, where=data)
    mean = np.asarray(store.stats["action"]["mean"], np.float64)
    convention = store.convention
    opens = abs(mean[-1] - convention.gripper_open) < abs(mean[-1] - convention.gripper_closed)
    mean[-1] = convention.gripper_open if opens else convention.gripper_closed
    return convert(mean)


def _mean_picture(data: Path, camera: str) -> np.ndarray:
    """The mean (H, W, 3) of some frames of a store, evenly spread."""
    from vlm4vla_core.episodes.store import EpisodeStore

    store = EpisodeStore.open(data)
    if camera not in store.cameras:
        raise InputError(f"the store has no camera '{camera}'", where=data, fix=f"it has {', '.join(store.cameras)}")
    total = int(np.sum(store.lengths))
    frames = store.images(camera, np.unique(np.linspace(0, total - 1, min(_PICTURES, total)).astype(int)))
    return np.rint(frames.mean(0, dtype=np.float64)).astype(np.uint8)
