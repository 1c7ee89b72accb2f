"""Can a benchmark tell these models apart at all? Homogeneity, reliability, and what noise does to a correlation.

Reliability is the share of the variance among model scores that is not sampling of episodes. It is an upper bound:
published scores carry no training-seed variance and are often the best of several checkpoints. sqrt(reliability)
bounds the r that is *expected* of a perfect capability score, not the r of one sample.

Trap: where every outcome of every model (in every task) was the same, p(1-p)/n is 0 however few the episodes, and
reliability would look perfect. There, and only there, the rate is taken as (k + 1/2) / (n + 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from probes.homogeneity import Homogeneity, homogeneity
from probes.scores import Scores
from vlm4vla_core.results import Interval, wilson


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


# --- sampling variance of a model's score ----------------------------------------------------------------


def pooled_variance(successes: np.ndarray, episodes: np.ndarray) -> np.ndarray:
    """(models,) p(1-p)/n of a success rate (0 to 1)."""
    rate = _inner_rate(successes, episodes)
    return rate * (1 - rate) / episodes


def stratified_variance(successes: np.ndarray, episodes: np.ndarray) -> np.ndarray:
    """(models,) of the mean over tasks, from (models, tasks): sum of p(1-p)/(n-1) over tasks^2, unbiased per task."""
    rate = _inner_rate(successes, episodes)
    return (rate * (1 - rate) / (episodes - 1)).sum(axis=1) / successes.shape[1] ** 2


def _inner_rate(successes: np.ndarray, episodes: np.ndarray) -> np.ndarray:
    """k/n; where all are 0 or 1, Jeffreys' (k + 1/2) / (n + 1): a variance of 0 there is ignorance."""
    rate = successes / episodes
    return (successes + 0.5) / (episodes + 1) if (rate * (1 - rate) == 0).all() else rate


def chain_variance(step_rates: np.ndarray, chains: np.ndarray) -> np.ndarray:
    """(models,) of the mean chain length from step rates (models, K): P(length >= k) for k = 1…K.

    E[L^2] = sum (2k-1) P(L >= k), so the variance of L needs nothing but the step rates.
    """
    k = np.arange(1, step_rates.shape[1] + 1)
    return ((step_rates * (2 * k - 1)).sum(axis=1) - step_rates.sum(axis=1) ** 2) / chains


def reliability(
    scores: np.ndarray, pooled: np.ndarray, stratified: np.ndarray | None = None, by_task: np.ndarray | None = None
) -> Reliability:
    """1 - mean sampling variance / variance of the scores (ddof 1), clipped at 0.

    scores, pooled, stratified: (models,), in one unit (variances in its square). by_task: (models,) the means over
    tasks, whose variance `stratified` is (default: scores; they differ when tasks have unequal numbers of episodes).
    """
    from scipy.stats import chi2

    df = len(scores) - 1
    shares = [pooled.mean() / scores.var(ddof=1)]
    if stratified is not None:
        spread = (scores if by_task is None else by_task).var(ddof=1)
        shares.append(stratified.mean() / spread if spread > 0 else np.inf)
    low, high = (max(0.0, float(1 - shares[-1] * chi2.ppf(level, df) / df)) for level in (0.975, 0.025))
    values = [max(0.0, float(1 - share)) for share in shares]
    return Reliability(values[0], values[1] if len(values) > 1 else None, Interval(low, high))


# --- all of it for one benchmark ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """What sampling of episodes does to one benchmark.

    intervals: 95 %, one per model (Wilson; normal for chains); episodes: (models,), NaN where unknown.
    """

    reliability: Reliability | None
    homogeneity: Homogeneity | None
    intervals: tuple[Interval | None, ...]
    episodes: np.ndarray


def noise(scores: Scores, b: int, rows: Sequence[int], seed: int = 0) -> Noise:
    """The noise of benchmark number b among these models; all empty when their episodes are not known."""
    name, picked = scores.benchmarks[b], list(rows)
    values, successes, episodes = scores.y[picked, b], scores.successes[picked, b], scores.episodes[picked, b]
    steps = scores.step_rates.get(name)
    if steps is not None and np.isfinite(steps[picked]).all() and np.isfinite(episodes).all():
        return _chains(values, chain_variance(steps[picked], episodes), episodes)
    counts = scores.task_counts.get(name)
    by_task = None
    if counts is not None and np.isfinite(counts.successes[picked]).all():
        by_task = (counts.successes[picked], counts.episodes[picked])
        if not (np.isfinite(successes).all() and np.isfinite(episodes).all()):
            successes, episodes = by_task[0].sum(axis=1), by_task[1].sum(axis=1)
    if not (np.isfinite(successes).all() and np.isfinite(episodes).all()):
        return Noise(None, None, (None,) * len(picked), episodes)
    rate = successes / episodes
    scale = 100.0 if np.abs(values - 100 * rate).mean() < np.abs(values - rate).mean() else 1.0  # per cent or not
    ends = (wilson(int(k), int(n)) for k, n in zip(successes, episodes, strict=True))
    spans = tuple(Interval(scale * span.low, scale * span.high) for span in ends)
    if np.ptp(rate) == 0:  # no variance to explain
        return Noise(None, None, spans, episodes)
    if by_task is None or (by_task[1] < 2).any():
        known = reliability(rate, pooled_variance(successes, episodes))
    else:
        pooled, means = pooled_variance(successes, episodes), (by_task[0] / by_task[1]).mean(axis=1)
        known = reliability(rate, pooled, stratified_variance(*by_task), means)
    return Noise(
        known,
        homogeneity(successes, episodes, None if by_task is None else counts, picked, seed=seed),
        spans,
        episodes,
    )


def _chains(values: np.ndarray, variance: np.ndarray, episodes: np.ndarray) -> Noise:
    from scipy.stats import chi2, norm

    half = norm.ppf(0.975) * np.sqrt(variance)
    spans = tuple(Interval(float(v - h), float(v + h)) for v, h in zip(values, half, strict=True))
    if not variance.mean() > 0:  # every chain of every model ended where all of its model's did
        return Noise(None, None, spans, episodes)
    weight = 1 / np.where(variance > 0, variance, variance.mean())
    q, df = float((weight * (values - np.average(values, weights=weight)) ** 2).sum()), len(values) - 1
    return Noise(
        reliability(values, variance),
        Homogeneity(q, df, float(chi2.sf(q, df))),
        spans,
        episodes,
    )
