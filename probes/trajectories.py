"""Recorded paths of several runs from one base, for asking when two kinds of training part.

    paths = read_trajectories([run, …])       # runs trained with --snapshots, at least four seeds per arm
    paths.modules()                           # module -> displacements from the base (runs, steps, k)
    path_shares(moved)                        # PCA of the joint path, beside a walk without any plan

A displacement is a sketch of the weights minus the sketch of the start (`vlm4vla_core.trajectory`), and inner products
of sketches estimate those of the weights. New parts (head and query) are left out: only one arm has them.
Trap: the textbook shares of a random walk (60.7 / 15.3 / 6.8 %) are those of one walk at equal steps. Log-spaced
snapshots of several runs from one base have others, so the null here has the recorded steps, sizes and runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from probes.glance import module_of
from probes.weights import NEW, network_order
from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Trajectories:
    """Displacements from one base. runs, arms, seeds: one entry per run. steps (T,): recorded by all, without 0.
    moved: module group -> (runs, T, k). left_out: what could not be compared, in words."""

    runs: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: np.ndarray
    moved: dict[str, np.ndarray]
    left_out: tuple[str, ...]

    def modules(self) -> dict[str, np.ndarray]:
        """Module (vision tower, projector, …, and "all") -> displacements (runs, T, k), groups side by side."""
        parts: dict[str, list[np.ndarray]] = {}
        for group in sorted(self.moved, key=network_order):
            parts.setdefault(module_of(group), []).append(self.moved[group])
        joined = {part: np.concatenate(values, axis=2) for part, values in parts.items()}
        return {**joined, "all": np.concatenate(list(joined.values()), axis=2)}

    def same_arm(self) -> pd.DataFrame:
        """Per module group (the index) same_a and same_c: mean cosine at the last step of the displacements of
        different seeds of one arm, the ceiling of what two arms can share. NaN with a single seed. A is language."""
        import pandas as pd

        first = "language" if "language" in self.arms else min(self.arms)
        rows = {}
        for group, value in self.moved.items():
            unit = value[:, -1] / np.maximum(np.linalg.norm(value[:, -1], axis=1, keepdims=True), np.finfo(float).tiny)
            alike = unit @ unit.T
            sides = ([i for i, arm in enumerate(self.arms) if (arm == first) == mine] for mine in (True, False))
            rows[group] = [
                float(np.mean([alike[i, j] for i in side for j in side if i < j])) if len(side) > 1 else np.nan
                for side in sides
            ]
        return pd.DataFrame.from_dict(rows, orient="index", columns=["same_a", "same_c"])

    def sizes(self) -> pd.DataFrame:
        """Tidy lengths of the displacements: group, run, arm, seed, step, moved (Euclidean, as the sketch sees it)."""
        import pandas as pd

        rows = [
            (group, run, arm, seed, int(step), float(length))
            for group in sorted(self.moved, key=network_order)
            for run, arm, seed, lengths in zip(
                self.runs, self.arms, self.seeds, np.linalg.norm(self.moved[group], axis=2), strict=True
            )
            for step, length in zip(self.steps, lengths, strict=True)
        ]
        return pd.DataFrame(rows, columns=["group", "run", "arm", "seed", "step", "moved"])


def read_trajectories(runs: Sequence[Path | str]) -> Trajectories:
    """The recorded paths of runs from one base; an arm is a run's objective ("language", "action", …).

    A run is a folder with run.json and trajectory/step-*/ as `vlm4vla train --snapshots sketch` writes them; its
    checkpoints are not needed. Raises InputError for runs without snapshots or without a common step, other than two
    arms, one seed twice in an arm, other projections, and runs that start from different weights.
    """
    read = [_run(Path(run)) for run in runs]
    arms = sorted({run.arm for run in read})
    if len(arms) != 2:
        what = f"{len(arms)} kind{'s' * (len(arms) != 1)} of training ({', '.join(arms)}), and two are compared"
        raise InputError(what, where=", ".join(map(str, runs)), fix="give runs of two objectives from one base")
    for number, run in enumerate(read):
        if any((run.arm, run.seed) == (other.arm, other.seed) for other in read[:number]):
            raise InputError(f"seed {run.seed} of {run.arm} twice", where=run.path, fix="give runs of other seeds")
    if len(kinds := {run.projection for run in read}) > 1:
        what = f"sketches by different projections ({', '.join(map(str, sorted(kinds)))})"
        raise InputError(what, where=read[0].path, fix="train the older runs again")
    everywhere = sorted(set.intersection(*(set(run.sketches) for run in read)))
    if len(everywhere) < 2 or everywhere[0] != 0:
        fix = "train them with the same --max-steps and --snapshots sketch"
        raise InputError("the runs have no recorded step in common beside the start", where=read[0].path, fix=fix)
    left_out = []
    if missing := sorted(set.union(*(set(run.sketches) for run in read)) - set(everywhere)):
        left_out.append(f"steps that not all runs recorded: {', '.join(map(str, missing))}")
    groups, starts = [], [run.sketches[0] for run in read]
    for group in sorted(set().union(*starts), key=network_order):
        if group.split(".")[0] in NEW:
            continue
        having = [run for run, start in zip(read, starts, strict=True) if group in start]
        if len(having) < len(read):
            left_out.append(f"{group}: trained only in {', '.join(run.path.name for run in having)}")
        elif any(not np.allclose(start[group], starts[0][group], rtol=1e-5, atol=1e-6) for start in starts):
            left_out.append(f"{group}: the runs do not start from the same weights")
        else:
            groups.append(group)
    if not groups:
        fix = "train both arms from one checkpoint"
        raise InputError("the runs share no base: no module group starts from the same weights", fix=fix,
                         where=", ".join(str(run.path) for run in read))  # fmt: skip
    moved = {
        group: np.stack(
            [np.stack([run.sketches[step][group] - run.sketches[0][group] for step in everywhere[1:]]) for run in read]
        )
        for group in groups
    }
    for group, value in moved.items():
        if not np.isfinite(value).all():
            raise InputError("the recorded path holds NaN or infinity", where=group, fix="leave that run out")
    return Trajectories(
        tuple(run.path.name for run in read), tuple(run.arm for run in read), tuple(run.seed for run in read),
        np.array(everywhere[1:]), moved, tuple(left_out),
    )  # fmt: skip


def trajectories_fingerprint(runs: Sequence[Path | str]) -> str:
    """Names the recorded paths of these runs: their snapshots' fingerprints. Raises InputError for a damaged one."""
    return folders.fingerprint(
        [
            [folder.name, folders.read_manifest(folder, "snapshot")["fingerprint"]]
            for run in runs
            for folder in sorted((Path(run) / "trajectory").glob("step-*"))
        ]
    )


class _Run(NamedTuple):
    path: Path
    arm: str
    seed: int
    projection: Any
    sketches: dict[int, dict[str, np.ndarray]]


def _run(path: Path) -> _Run:
    from safetensors.numpy import load_file

    fix = "give a run of `vlm4vla train … --snapshots sketch`"
    identity = folders.read_json(path / "run.json", fix=fix)["identity"]
    steps = sorted((path / "trajectory").glob("step-*"))
    if not steps:
        raise InputError("this run recorded no snapshots", where=path, fix=fix)
    sketches, projections = {}, set()
    for folder in steps:
        config = folders.read_manifest(folder, "snapshot", fix=fix)["config"]
        projections.add((config.get("projection", 1), config["size"], config["seed"]))
        found = load_file(folder / "sketch.safetensors")
        sketches[int(folder.name.removeprefix("step-"))] = {name: x.astype(np.float64) for name, x in found.items()}
    if len(projections) > 1:
        raise InputError("snapshots by different projections in one run", where=path, fix="train it again")
    return _Run(path, str(identity["objective"]), int(identity["seed"]), projections.pop(), sketches)


# --- PCA of the joint path --------------------------------------------------------------------------------


class PathShares(NamedTuple):
    """PCA of all recorded points of all runs, the base among them. shares (3,): of the variance. low, high (3,): where
    95 % of walks without any plan lie. points (runs, T + 1, 2): the first two coordinates, the base first."""

    shares: np.ndarray
    low: np.ndarray
    high: np.ndarray
    points: np.ndarray


def path_shares(moved: np.ndarray, *, draws: int = 100, seed: int = 0) -> PathShares:
    """Explained variance of the joint path (runs, T, k) from one base, beside its null.

    Null: between two recorded steps every run moves as far as it did, and has in common with the others what it had
    (the Gram matrix of the increments is the recorded one), but in directions drawn anew for every step, so that no
    direction lasts. After Antognini and Sohl-Dickstein 2018, arXiv 1806.08805, for one walk.
    """
    runs, steps, width = moved.shape
    path = np.concatenate([np.zeros((runs, 1, width)), moved], axis=1)
    values, vectors = _principal(path.reshape(-1, width))
    points = (vectors[:, :2] * np.sqrt(values[:2])).reshape(runs, steps + 1, 2)
    increments, rng = np.diff(path, axis=1), np.random.default_rng(seed)
    roots = []
    for u in range(steps):
        eigen, basis = np.linalg.eigh(increments[:, u] @ increments[:, u].T)
        roots.append(basis * np.sqrt(eigen.clip(0)))  # (runs, runs), a root of the increments' Gram matrix
    null = np.empty((draws, 3))
    for draw in range(draws):
        fresh = rng.standard_normal((steps, runs, width)) / np.sqrt(width)
        walk = np.cumsum(np.stack(roots) @ fresh, axis=0).transpose(1, 0, 2)  # (runs, T, k)
        walk = np.concatenate([np.zeros((runs, 1, width)), walk], axis=1).reshape(-1, width)
        null[draw] = _shares(_principal(walk, vectors=False)[0])
    low, high = np.quantile(null, [0.025, 0.975], axis=0) if draws else np.full((2, 3), np.nan)
    return PathShares(_shares(values), low, high, points)


def _principal(points: np.ndarray, *, vectors: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues of the centred Gram matrix, largest first, with their vectors."""
    centred = points - points.mean(0)
    gram = centred @ centred.T
    if not vectors:
        return np.linalg.eigvalsh(gram)[::-1].clip(0), np.empty(0)
    values, basis = np.linalg.eigh(gram)
    return values[::-1].clip(0), basis[:, ::-1]


def _shares(values: np.ndarray) -> np.ndarray:
    padded = np.concatenate([values, np.zeros(3)])
    return padded[:3] / max(values.sum(), np.finfo(float).tiny)
