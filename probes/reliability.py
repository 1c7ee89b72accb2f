"""Can a benchmark tell these models apart at all? Homogeneity, reliability, and what noise does to a correlation.

Reliability is the share of the variance among model scores that is not sampling of episodes. It is an upper bound:
published scores carry no training-seed variance and are often the best of several checkpoints. sqrt(reliability)
bounds the r that is *expected* of a perfect capability score, not the r of one sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from probes.scores import Scores, TaskCounts
from vlm4vla_core.results import Interval, wilson


@dataclass(frozen=True)
class Homogeneity:
    """Are all models equally good? chi2, df, p: pooled over tasks (for chains: Cochran's Q of the mean lengths).

    p_stratified: permutation p of the variance among totals when outcomes change models within each task. per_task:
    chi-square p of each task by itself, uncorrected; None where a task is all success or all failure.
    """

    chi2: float
    df: int
    p: float
    p_stratified: float | None = None
    per_task: dict[str, float | None] | None = None


@dataclass(frozen=True)
class Reliability:
    """pooled: episodes as draws at one rate per model (for chains: the chains' own variance); stratified: by task.

    ci: 95 % interval of the better one (stratified where known), from the chi-square interval of the variance among
    normally distributed scores.
    """

    pooled: float
    stratified: float | None
    ci: Interval

    @property
    def best(self) -> float:
        return self.pooled if self.stratified is None else self.stratified


def homogeneity(
    successes: np.ndarray,
    episodes: np.ndarray,
    counts: TaskCounts | None = None,
    rows: Sequence[int] | None = None,
    *,
    seed: int = 0,
    draws: int = 100_000,
) -> Homogeneity:
    """successes, episodes: (models,). counts: the same by task; rows: which of its models these are (default: all)."""
    chi2, df, p = _chi_square(successes, episodes)
    if counts is None:
        return Homogeneity(chi2, df, p)
    picked = slice(None) if rows is None else list(rows)
    k, n = counts.successes[picked], counts.episodes[picked]  # (models, tasks)
    alone = [_chi_square(k[:, task], n[:, task])[2] for task in range(len(counts.tasks))]
    per_task = {name: None if np.isnan(value) else value for name, value in zip(counts.tasks, alone, strict=True)}
    return Homogeneity(chi2, df, p, _stratified_p(k, n, seed, draws), per_task)


def _chi_square(successes: np.ndarray, episodes: np.ndarray) -> tuple[float, int, float]:
    """Pearson's chi-square of models x (success, failure); NaN where every episode ended alike."""
    from scipy.stats import chi2

    rate, df = successes.sum() / episodes.sum(), len(successes) - 1
    if rate in (0.0, 1.0):
        return float("nan"), df, float("nan")
    value = float((((successes - episodes * rate) ** 2) / (episodes * rate * (1 - rate))).sum())
    return value, df, float(chi2.sf(value, df))


def _stratified_p(successes: np.ndarray, episodes: np.ndarray, seed: int, draws: int) -> float:
    """Shuffling outcomes over models within a task is a multivariate hypergeometric draw of each model's successes."""
    rng = np.random.default_rng(seed)
    rates = np.zeros((draws, len(successes)))  # mean over tasks of each model's success
    for k, n in zip(successes.T.astype(np.int64), episodes.T.astype(np.int64), strict=True):
        rates += rng.multivariate_hypergeometric(n, int(k.sum()), size=draws) / n
    observed = (successes / episodes).sum(axis=1).var()
    return float((1 + (rates.var(axis=1) >= observed - 1e-12).sum()) / (1 + draws))


# --- sampling variance of a model's score ----------------------------------------------------------------


def pooled_variance(successes: np.ndarray, episodes: np.ndarray) -> np.ndarray:
    """(models,) p(1-p)/n of a success rate (0 to 1)."""
    rate = successes / episodes
    return rate * (1 - rate) / episodes


def stratified_variance(successes: np.ndarray, episodes: np.ndarray) -> np.ndarray:
    """(models,) of the mean over tasks, from (models, tasks): sum of p(1-p)/(n-1) over tasks^2, unbiased per task."""
    rate = successes / episodes
    return (rate * (1 - rate) / (episodes - 1)).sum(axis=1) / successes.shape[1] ** 2


def chain_variance(step_rates: np.ndarray, chains: np.ndarray) -> np.ndarray:
    """(models,) of the mean chain length from step rates (models, K): P(length >= k) for k = 1…K.

    E[L^2] = sum (2k-1) P(L >= k), so the variance of L needs nothing but the step rates.
    """
    k = np.arange(1, step_rates.shape[1] + 1)
    return ((step_rates * (2 * k - 1)).sum(axis=1) - step_rates.sum(axis=1) ** 2) / chains


def reliability(scores: np.ndarray, pooled: np.ndarray, stratified: np.ndarray | None = None) -> Reliability:
    """1 - mean sampling variance / variance of the scores (ddof 1), clipped at 0.

    scores, pooled, stratified: (models,), in one unit (variances in its square).
    """
    from scipy.stats import chi2

    spread, df = scores.var(ddof=1), len(scores) - 1
    share = (pooled if stratified is None else stratified).mean() / spread
    low, high = (1 - share * chi2.ppf(level, df) / df for level in (0.975, 0.025))
    return Reliability(
        pooled=max(0.0, float(1 - pooled.mean() / spread)),
        stratified=None if stratified is None else max(0.0, float(1 - stratified.mean() / spread)),
        ci=Interval(max(0.0, float(low)), max(0.0, float(high))),
    )


# --- all of it for one benchmark ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """What sampling of episodes does to one benchmark. intervals: 95 %, one per model (Wilson; normal for chains)."""

    reliability: Reliability | None
    homogeneity: Homogeneity | None
    intervals: tuple[Interval | None, ...]


def noise(scores: Scores, b: int, rows: Sequence[int], seed: int = 0) -> Noise:
    """The noise of benchmark number b among these models; all empty when their episodes are not known."""
    name, picked = scores.benchmarks[b], list(rows)
    values, successes, episodes = scores.y[picked, b], scores.successes[picked, b], scores.episodes[picked, b]
    steps = scores.step_rates.get(name)
    if steps is not None and np.isfinite(steps[picked]).all() and np.isfinite(episodes).all():
        return _chains(values, chain_variance(steps[picked], episodes))
    counts = scores.task_counts.get(name)
    by_task = None
    if counts is not None and np.isfinite(counts.successes[picked]).all():
        by_task = (counts.successes[picked], counts.episodes[picked])
        if not (np.isfinite(successes).all() and np.isfinite(episodes).all()):
            successes, episodes = by_task[0].sum(axis=1), by_task[1].sum(axis=1)
    if not (np.isfinite(successes).all() and np.isfinite(episodes).all()):
        return Noise(None, None, (None,) * len(picked))
    rate = successes / episodes
    scale = 100.0 if np.abs(values - 100 * rate).mean() < np.abs(values - rate).mean() else 1.0  # per cent or not
    spans = (wilson(int(k), int(n)) for k, n in zip(successes, episodes, strict=True))
    if np.ptp(rate) == 0:  # no variance to explain
        return Noise(None, None, tuple(Interval(scale * span.low, scale * span.high) for span in spans))
    stratified = None if by_task is None or (by_task[1] < 2).any() else stratified_variance(*by_task)
    return Noise(
        reliability(rate, pooled_variance(successes, episodes), stratified),
        homogeneity(successes, episodes, None if by_task is None else counts, picked, seed=seed),
        tuple(Interval(scale * span.low, scale * span.high) for span in spans),
    )


def _chains(values: np.ndarray, variance: np.ndarray) -> Noise:
    from scipy.stats import chi2, norm

    half = norm.ppf(0.975) * np.sqrt(variance)
    weight = 1 / np.maximum(variance, 1e-12)
    q, df = float((weight * (values - np.average(values, weights=weight)) ** 2).sum()), len(values) - 1
    return Noise(
        reliability(values, variance),
        Homogeneity(q, df, float(chi2.sf(q, df))),
        tuple(Interval(float(v - h), float(v + h)) for v, h in zip(values, half, strict=True)),
    )
