"""What a linear readout of frozen features knows: closed-form ridge, split by episode, beside its baselines.

    parts = split(episodes, seed=0)
    readout = read_out("vision.3", features, target, episodes, parts)     # R², its interval, error in mm
    compare(readout, other)                                               # paired over the same test episodes

Trap: frames of one episode are nearly copies of each other. Split by frame, any features look good; with an
interval over frames, any difference looks certain. Here both the split and the intervals go by episode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.results import Interval

if TYPE_CHECKING:
    from vlm4vla_core.episodes.store import EpisodeStore

# Ridge strengths per fitted frame, for columns of unit variance: from hardly any to the mean predictor.
ALPHAS = 10.0 ** np.linspace(-5, 4, 19)
TARGETS: dict[str, tuple[str, ...]] = {"gripper_xyz": ("x", "y", "z"), "gripper_xy": ("x", "y")}  # metres


class Parts(NamedTuple):
    """Positions of the frames to fit on, to select the regularisation on, and to test on once."""

    fit: np.ndarray
    select: np.ndarray
    test: np.ndarray


class Difference(NamedTuple):
    """R² of A minus R² of B on the same test episodes, and its interval over episodes (None with one episode)."""

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Readout:
    """One ridge readout, tested once.

    r2 (k,): 1 - squared error / squared error of the mean of the fitted frames, per target dimension, so the mean
    predictor scores 0. mean: their average. interval: of the average, over test episodes (None with one). error_mm:
    mean Euclidean distance. alpha: the ridge strength chosen on the selection episodes, selected: the mean R²
    it had there. shuffled (c,): mean R² of c readouts of labels that belong to other episodes.
    episodes: how many to fit, select, test. test_episodes (E,), sse and sst (E, k): for comparisons.
    """

    name: str
    dims: tuple[str, ...]
    r2: np.ndarray
    mean: float
    interval: Interval | None
    error_mm: float
    alpha: float
    selected: float
    shuffled: np.ndarray
    episodes: tuple[int, int, int]
    frames: tuple[int, int, int]
    test_episodes: np.ndarray
    sse: np.ndarray
    sst: np.ndarray


def target(store: EpisodeStore, name: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and values (N, k) float32 of a target that is read from the recorded states, in metres.

    Raises InputError for an unknown target and for a store whose states do not have it.
    """
    if name not in TARGETS:
        raise InputError(f"unknown target '{name}'", fix=nearest(name, TARGETS))
    dims = TARGETS[name]
    missing = [dim for dim in dims if dim not in store.state_names]
    if missing:
        raise InputError(
            f"target '{name}' needs the state{'s' * (len(missing) > 1)} {', '.join(missing)}",
            where=store.path,
            fix=f"this store records: {', '.join(store.state_names)}",
        )
    return dims, np.asarray(store.state)[:, [store.state_names.index(dim) for dim in dims]]


def split(episodes: np.ndarray, *, content: np.ndarray | None = None, seed: int = 0) -> Parts:
    """Frames (n,) by episode number -> about 60 % of the episodes to fit, 20 % to select, 20 % to test.

    content (n,): equal for episodes that are copies of each other, which then stay together. The policy whose
    features these are may have been trained on any of them; what is held out is held out from the readout.
    Raises InputError for fewer than three distinct episodes.
    """
    keys = np.asarray(episodes if content is None else content)
    if keys.shape != np.shape(episodes):
        raise ValueError(f"{np.shape(episodes)} episode numbers but {keys.shape} content keys")
    groups = np.random.default_rng(seed).permutation(np.unique(keys))
    if len(groups) < 3:
        raise InputError(
            f"{len(groups)} distinct episode{'s' * (len(groups) != 1)} cannot be split into fit, select and test",
            fix="extract features of at least 3 episodes",
        )
    held = max(1, round(0.2 * len(groups)))
    test, select = np.isin(keys, groups[:held]), np.isin(keys, groups[held : 2 * held])
    return Parts(np.flatnonzero(~test & ~select), np.flatnonzero(select), np.flatnonzero(test))


def read_out(
    name: str,
    features: np.ndarray,
    values: np.ndarray,
    episodes: np.ndarray,
    parts: Parts,
    *,
    dims: tuple[str, ...] = (),
    shuffles: int = 20,
    resamples: int = 2000,
    seed: int = 0,
) -> Readout:
    """Fit on the fit episodes, choose the ridge strength on the select episodes, refit on both, test once.

    features (n, d), values (n, k) metres, episodes (n,). Raises InputError for NaN, features that are not (n, d),
    an episode on two sides, and a target that does not vary.
    """
    x, y, dims = _checked(name, features, values, episodes, parts, dims)
    rng = np.random.default_rng(seed)
    labels = np.stack([y, *(_other_episodes(y, episodes, rng) for _ in range(shuffles))], axis=1)  # (n, 1 + c, k)

    fit, select, test = parts
    trial = ridge_path(x[fit], labels[fit], x[select], ALPHAS)  # (A, m, 1 + c, k)
    centre = labels[fit].mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):  # shuffled labels of few episodes may happen not to vary
        scores = 1 - np.square(trial - labels[select]).sum(1) / np.square(labels[select] - centre).sum(0)
    scores = np.nan_to_num(scores, nan=-np.inf, neginf=-np.inf)  # (A, 1 + c, k)
    best = scores.mean(-1).argmax(0)  # (1 + c,) the strength is chosen for real and shuffled labels alike
    both = np.concatenate([fit, select])
    strengths, which = np.unique(best, return_inverse=True)
    path = ridge_path(x[both], labels[both], x[test], ALPHAS[strengths])
    predicted = np.stack([path[strength, :, copy] for copy, strength in enumerate(which)], axis=1)  # (m, 1 + c, k)
    error, spread = predicted - labels[test], labels[test] - labels[both].mean(0)

    tested, unit = np.unique(episodes[test], return_inverse=True)
    sse, sst = np.zeros((len(tested), y.shape[1])), np.zeros((len(tested), y.shape[1]))
    np.add.at(sse, unit, np.square(error[:, 0]))
    np.add.at(sst, unit, np.square(spread[:, 0]))
    r2 = 1 - sse.sum(0) / sst.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        shuffled = (1 - np.square(error).sum(0) / np.square(spread).sum(0)).mean(-1)[1:]
    return Readout(
        name=name,
        dims=dims,
        r2=r2,
        mean=float(r2.mean()),
        interval=_interval(sse, sst, resamples, seed),
        error_mm=float(np.linalg.norm(error[:, 0], axis=-1).mean() * 1000),
        alpha=float(ALPHAS[best[0]]),
        selected=float(scores[best[0], 0].mean()),
        shuffled=shuffled[np.isfinite(shuffled)],
        episodes=tuple(len(np.unique(episodes[part])) for part in parts),  # type: ignore[arg-type]
        frames=tuple(map(len, parts)),  # type: ignore[arg-type]
        test_episodes=tested,
        sse=sse,
        sst=sst,
    )


def best_layer(readouts: Mapping[str, Readout]) -> str:
    """The layer whose readout scored highest on the selection episodes; never chosen by its test score."""
    return max(readouts, key=lambda layer: readouts[layer].selected)


def compare(a: Readout, b: Readout, *, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Difference:
    """R² of A minus R² of B, paired: every resample draws the same test episodes for both.

    Interval: difference -+ t quantile (episodes - 1) x bootstrap standard error. Raises InputError when the two were
    not tested on the same episodes.
    """
    if not np.array_equal(a.test_episodes, b.test_episodes) or not np.allclose(a.sst, b.sst):
        raise InputError(
            f"{a.name} and {b.name} were not tested on the same frames of the same episodes",
            fix="extract both from one store with the same --max-frames and --seed",
        )
    weights = _draws(len(a.sse), resamples, seed)
    draws = _mean_r2(weights, a.sse, a.sst) - _mean_r2(weights, b.sse, b.sst)
    half = _t_half(draws, len(a.sse), level)
    value = a.mean - b.mean
    return Difference(value, None if half is None else Interval(value - half, value + half))


def ridge_path(x: np.ndarray, y: np.ndarray, x_new: np.ndarray, alphas: np.ndarray) -> np.ndarray:
    """Ridge predictions for every strength from one eigendecomposition: (len(alphas), m, …) for y (n, …).

    Minimises |y - xw|² + alpha n |w|² on columns scaled to unit variance, intercept free. Works in the d x d
    space or, where n < d, in the n x n one, with the same result.
    """
    centre, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 1e-9 * np.abs(x).max(initial=0.0), scale, np.inf)  # a constant column says nothing
    x, x_new = (x - centre) / scale, (x_new - centre) / scale
    flat = y.reshape(len(y), -1)
    intercept = flat.mean(0)
    if len(x) < x.shape[1]:
        eigenvalues, vectors = np.linalg.eigh(x @ x.T)
        left, right = (x_new @ x.T) @ vectors, vectors.T @ (flat - intercept)
    else:
        eigenvalues, vectors = np.linalg.eigh(x.T @ x)
        left, right = x_new @ vectors, vectors.T @ (x.T @ (flat - intercept))
    eigenvalues = eigenvalues.clip(0)
    fitted = [left @ (right / (eigenvalues + alpha * len(x))[:, None]) + intercept for alpha in alphas]
    return np.stack(fitted).reshape(len(alphas), len(x_new), *y.shape[1:])


def _checked(
    name: str, features: np.ndarray, values: np.ndarray, episodes: np.ndarray, parts: Parts, dims: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    x, y = np.asarray(features), np.asarray(values, np.float64)
    if x.ndim != 2:
        raise InputError(f"features of shape {x.shape} are not (frames, width)", where=name, fix="use --pool mean")
    if not len(x) == len(y) == len(episodes):
        raise InputError(f"{len(x)} features, {len(y)} targets and {len(episodes)} episode numbers", where=name)
    x = x.astype(np.float64)
    for what, array in (("features", x), ("target", y)):
        if not np.isfinite(array).all():
            bad = int((~np.isfinite(array)).any(1).sum())
            raise InputError(f"the {what} hold NaN or infinity in {bad} of {len(array)} frames", where=name)
    sides = [set(np.unique(episodes[part]).tolist()) for part in parts]
    shared = (sides[0] & sides[1]) | (sides[0] & sides[2]) | (sides[1] & sides[2])
    if shared:
        raise InputError(f"episode {min(shared)} is on two sides of the split", where=name, fix="split by episode")
    dims = dims or tuple(f"dimension {i}" for i in range(y.shape[1]))
    for part, frames in zip(Parts._fields, parts, strict=True):
        flat = np.ptp(y[frames], axis=0) == 0 if len(frames) else np.ones(len(dims), bool)
        if flat.any():
            constant = ", ".join(dim for dim, still in zip(dims, flat, strict=True) if still)
            raise InputError(f"target {constant} does not vary in the {part} episodes, R² is undefined", where=name)
    return x, y, dims


def _other_episodes(y: np.ndarray, episodes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Every episode gets the labels of another one, stretched to its length, so their course in time is kept."""
    rows = [np.flatnonzero(episodes == episode) for episode in np.unique(episodes)]
    ring = rng.permutation(len(rows))  # each gives to the next on a random ring: no episode keeps its own
    out = np.empty_like(y)
    for giver, taker in zip(ring, np.roll(ring, -1), strict=True):
        source, goal = rows[giver], rows[taker]
        out[goal] = y[source[np.linspace(0, len(source) - 1, len(goal)).round().astype(int)]]
    return out


# --- intervals over test episodes -------------------------------------------------------------------------
# Percentile and BCa bootstraps of R² cover 79-91 % with 5-20 episodes (simulated); a t quantile on the bootstrap's
# standard error, for R² on the scale of log(1 - R²), covers 93-95 %.


def _draws(episodes: int, resamples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.multinomial(episodes, np.full(episodes, 1 / episodes), size=resamples).astype(np.float64)


def _mean_r2(weights: np.ndarray, sse: np.ndarray, sst: np.ndarray) -> np.ndarray:
    return (1 - (weights @ sse) / (weights @ sst)).mean(-1)  # (R,)


def _t_half(draws: np.ndarray, episodes: int, level: float) -> float | None:
    from scipy.stats import t

    if episodes < 2:
        return None
    error = draws.std() * np.sqrt(episodes / (episodes - 1))
    return float(t.ppf((1 + level) / 2, episodes - 1) * error)


def _interval(sse: np.ndarray, sst: np.ndarray, resamples: int, seed: int, level: float = 0.95) -> Interval | None:
    """Interval of the mean R² over the test episodes that might have been drawn; the fit is taken as it is."""
    lost = 1 - float((1 - sse.sum(0) / sst.sum(0)).mean())
    unexplained = 1 - _mean_r2(_draws(len(sse), resamples, seed), sse, sst)
    half = _t_half(np.log(unexplained.clip(1e-300)), len(sse), level)
    return None if half is None else Interval(float(1 - lost * np.exp(half)), float(1 - lost * np.exp(-half)))
