"""What a readout of frozen features knows: fitted, selected and tested on different episodes, with intervals over them.

    parts = split(episodes, seed=0)
    readout = read_out("vision.3", features, target, episodes, parts)     # R² or accuracy, its interval, error in mm
    compare_probes(readout, other)                                        # paired over the same test episodes

linear: ridge in closed form, or logistic regression. mlp and attentive: `probes.learned`.
Trap: frames of one episode are nearly copies of each other. Split by frame, any features look good; with an
interval over frames, any difference looks certain. Here both the split and the intervals go by episode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from probes.control import other_episodes
from probes.grid import ALPHAS, LOGISTIC, Fitted, Parts, logistic_grid, ridge_grid
from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.results import Interval

KINDS = ("linear", "mlp", "attentive")
SHUFFLES = {"linear": 20, "mlp": 2, "attentive": 2}  # those that are trained by steps cost more
CLASS_SHUFFLES = 5
POWER = 0.8  # of the minimum detectable difference


class Difference(NamedTuple):
    """Score of A minus score of B on the same test episodes, its interval over episodes (None with one episode), and
    the smallest difference that so many episodes show with 80 % power at that level."""

    value: float
    interval: Interval | None
    detectable: float | None = None


@dataclass(frozen=True)
class Readout:
    """One readout, tested once.

    r2 (k,): 1 - squared error / squared error of the mean of the fitted frames, per target dimension, so the mean
    predictor scores 0; of classes (1,): the accuracy. mean: their average. interval: of the average, over test episodes
    (None with one). error_mm: mean Euclidean distance, NaN where the target is no place. alpha: the ridge strength (or
    other setting) chosen on the selection episodes, selected: the mean R² (or log-likelihood) it had there. shuffled
    (c,): scores of c readouts of labels that belong to other episodes. episodes: how many to fit, select, test.
    test_episodes (E,), sse and sst (E, k): for comparisons; of classes errors and frames. control: score of the control
    task. predicted (m, k) or (m,): for the test frames.
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
    control: float | None = None
    classes: tuple[str, ...] = ()
    predicted: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False)

    @property
    def selectivity(self) -> float | None:
        """Score of the task minus score of the control task (Hewitt and Liang 2019)."""
        return None if self.control is None else self.mean - self.control


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
    kind: str = "linear",
    dims: tuple[str, ...] = (),
    classes: tuple[str, ...] = (),
    metres: bool = True,
    control: np.ndarray | None = None,
    shuffles: int | None = None,
    patches: int = 1,
    resamples: int = 2000,
    seed: int = 0,
) -> Readout:
    """Fit on the fit episodes, choose the regularisation on the select episodes, test once.

    features (n, d), or (n, tokens, d) for the attentive kind; values (n, k), or class numbers (n,) with the names of
    the `classes`; episodes (n,). Linear readouts are fitted again on both, with what was chosen. control: labels of a
    control task, shaped as values. patches: rows that belong to one frame. Raises InputError for NaN, features of
    another shape, an episode on two sides, a target that does not vary, and classes of which fewer than two are there.
    """
    if kind not in KINDS:
        raise InputError(f"unknown readout '{kind}'", fix=nearest(kind, [*KINDS, "dense"]))
    x, y, dims = _checked(name, features, values, episodes, parts, dims, classes, kind)
    rng = np.random.default_rng(seed)
    count = (min(SHUFFLES[kind], CLASS_SHUFFLES) if classes else SHUFFLES[kind]) if shuffles is None else shuffles
    whole, frame = y.reshape(-1, patches * y[0].size), np.asarray(episodes)[::patches]
    sets = [y, *([] if control is None else [control.astype(y.dtype)])]
    sets += [other_episodes(whole, frame, rng).reshape(y.shape) for _ in range(count)]
    fitted, settings = _fit(kind, x, np.stack(sets, axis=1), parts, classes, seed)
    error, spread = _errors(fitted.predicted, sets, parts, bool(classes), np.concatenate(parts[:2]))

    tested, unit = np.unique(np.asarray(episodes)[parts.test], return_inverse=True)
    sse, sst = np.zeros((len(tested), error.shape[2])), np.zeros((len(tested), error.shape[2]))
    np.add.at(sse, unit, error[:, 0])
    np.add.at(sst, unit, spread[:, 0])
    r2 = 1 - sse.sum(0) / sst.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        others = (1 - error.sum(0) / spread.sum(0)).mean(-1)[1:]
    shuffled = others[0 if control is None else 1 :]
    far = np.sqrt(error[:, 0].sum(-1)).mean() * 1000 if metres and not classes else np.nan
    return Readout(
        name=name,
        dims=dims,
        r2=r2,
        mean=float(r2.mean()),
        interval=_accuracy_interval(sse, sst) if classes else _interval(sse, sst, resamples, seed),
        error_mm=float(far),
        alpha=float(settings[fitted.best[0]]),
        selected=float(fitted.scores[fitted.best[0], 0]),
        shuffled=shuffled[np.isfinite(shuffled)],
        episodes=tuple(len(np.unique(np.asarray(episodes)[part])) for part in parts),  # type: ignore[arg-type]
        frames=tuple(map(len, parts)),  # type: ignore[arg-type]
        test_episodes=tested,
        sse=sse,
        sst=sst,
        control=None if control is None else float(others[0]),
        classes=classes,
        predicted=fitted.predicted[:, 0],
    )


def _fit(
    kind: str, x: np.ndarray, labels: np.ndarray, parts: Parts, classes: tuple[str, ...], seed: int
) -> tuple[Fitted, np.ndarray]:
    """What is predicted for every set of labels (n, C, …), and the value of each setting of the grid."""
    if kind == "linear":
        if classes:
            return logistic_grid(x, labels, len(classes), parts), LOGISTIC
        return ridge_grid(x, labels, parts), ALPHAS
    from probes.learned import GRID, train

    return train(kind, x, labels, parts, classes=len(classes), seed=seed), np.arange(len(GRID))


def _errors(
    predicted: np.ndarray, sets: list[np.ndarray], parts: Parts, classes: bool, both: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Per test frame and set of labels, (m, C, k): squared error and spread; of classes errors and ones."""
    labels = np.stack(sets, axis=1)
    if classes:
        wrong = (predicted != labels[parts.test])[..., None].astype(np.float64)
        return wrong, np.ones_like(wrong)
    return np.square(predicted - labels[parts.test]), np.square(labels[parts.test] - labels[both].mean(0))


def best_layer(readouts: Mapping[str, Readout]) -> str:
    """The layer whose readout scored highest on the selection episodes; never chosen by its test score."""
    return max(readouts, key=lambda layer: readouts[layer].selected)


def compare_probes(a: Readout, b: Readout, *, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Difference:
    """Score of A minus score of B, paired: every resample draws the same test episodes for both.

    Interval: difference -+ t quantile (episodes - 1) x bootstrap standard error. Raises InputError when the two were
    not tested on the same episodes.
    """
    from scipy.stats import t

    if not np.array_equal(a.test_episodes, b.test_episodes) or not np.allclose(a.sst, b.sst):
        raise InputError(
            f"{a.name} and {b.name} were not tested on the same frames of the same episodes",
            fix="extract both from one store with the same --max-frames and --seed",
        )
    count = len(a.sse)
    weights = _draws(count, resamples, seed)
    draws = _mean_r2(weights, a.sse, a.sst) - _mean_r2(weights, b.sse, b.sst)
    half = _t_half(draws, count, level)
    value = a.mean - b.mean
    if half is None:
        return Difference(value, None, None)
    if a.classes and half == 0:  # no episode told them apart: what could still have been missed
        half = 1 - (1 - level) ** (1 / count)
    quantile = t.ppf((1 + level) / 2, count - 1)
    detectable = half / quantile * (quantile + t.ppf(POWER, count - 1))
    return Difference(value, Interval(value - half, value + half), float(detectable))


def _checked(
    name: str, features: np.ndarray, values: np.ndarray, episodes: np.ndarray, parts: Parts, dims: tuple[str, ...],
    classes: tuple[str, ...], kind: str,
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:  # fmt: skip
    x, y = np.asarray(features), np.asarray(values, np.int64 if classes else np.float64)
    wanted, fix = (3, "use --pool none") if kind == "attentive" else (2, "use --pool mean")
    if x.ndim != wanted:
        shape = "(frames, tokens, width)" if wanted == 3 else "(frames, width)"
        raise InputError(f"features of shape {x.shape} are not {shape}", where=name, fix=fix)
    if not len(x) == len(y) == len(episodes):
        raise InputError(f"{len(x)} features, {len(y)} targets and {len(episodes)} episode numbers", where=name)
    for what, array in (("features", x), ("target", y)):
        bad = sum(int((~np.isfinite(array[i : i + 4096])).reshape(-1, array[0].size).any(1).sum())
                  for i in range(0, len(array), 4096))  # fmt: skip
        if bad:
            raise InputError(f"the {what} hold NaN or infinity in {bad} of {len(array)} frames", where=name)
    sides = [set(np.unique(np.asarray(episodes)[part]).tolist()) for part in parts]
    shared = (sides[0] & sides[1]) | (sides[0] & sides[2]) | (sides[1] & sides[2])
    if shared:
        raise InputError(f"episode {min(shared)} is on two sides of the split", where=name, fix="split by episode")
    if classes:
        if len(there := np.unique(y[parts.fit])) < 2:
            only = classes[there[0]] if len(there) else "nothing"
            fix = "use more episodes, or another --seed"
            raise InputError(f"of the classes the fit episodes hold only '{only}'", where=name, fix=fix)
        return x, y, dims or ("class",)
    dims = dims or tuple(f"dimension {i}" for i in range(y.shape[1]))
    for part, frames in zip(Parts._fields, parts, strict=True):
        flat = np.ptp(y[frames], axis=0) == 0 if len(frames) else np.ones(len(dims), bool)
        if flat.any():
            constant = ", ".join(dim for dim, still in zip(dims, flat, strict=True) if still)
            raise InputError(f"target {constant} does not vary in the {part} episodes, R² is undefined", where=name)
    return x, y, dims


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


def _accuracy_interval(errors: np.ndarray, frames: np.ndarray, level: float = 0.95) -> Interval | None:
    """Wilson's interval of an accuracy, at the number of independent frames that would vary as the episodes do, with a
    t quantile; as many as episodes where nothing varies (Korn and Graubard 1998 do so with Clopper and Pearson's)."""
    from scipy.stats import t

    e, f = errors[:, 0], frames[:, 0]
    if len(e) < 2:
        return None
    p = float(e.sum() / f.sum())
    variance = float(np.square(e - p * f).sum()) / f.sum() ** 2 * len(e) / (len(e) - 1)
    n = min(p * (1 - p) / variance, float(f.sum())) if variance > 0 else float(len(e))
    q = float(t.ppf((1 + level) / 2, len(e) - 1)) ** 2
    centre, half = (1 - p + q / (2 * n)) / (1 + q / n), np.sqrt(p * (1 - p) * q / n + (q / (2 * n)) ** 2) / (1 + q / n)
    return Interval(float(max(0.0, centre - half)), float(min(1.0, centre + half)))
