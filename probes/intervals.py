"""Intervals of a correlation: Fisher's first, BCa beside it, never the percentile bootstrap (it covers 90 % at n = 9).

Trap: at n = 3 Fisher's standard error is infinite, so the interval is everything; no bootstrap mends that.
"""

from __future__ import annotations

import numpy as np

from vlm4vla_core.results import Interval


def fisher(r: float, n: int, level: float = 0.95, *, ranks: bool = False) -> Interval:
    """Fisher-z interval of r over n pairs, standard error 1/sqrt(n-3).

    ranks=True: for Spearman's r, with the factor sqrt(1 + r^2/2) of Bonett and Wright (2000, eq. 4).
    """
    from scipy.stats import norm

    if n <= 3:
        return Interval(-1.0, 1.0)
    if abs(r) >= 1:
        return Interval(float(np.sign(r)), float(np.sign(r)))
    half = norm.ppf(0.5 + level / 2) * np.sqrt((1 + r * r / 2 if ranks else 1.0) / (n - 3))
    return Interval(float(np.tanh(np.arctanh(r) - half)), float(np.tanh(np.arctanh(r) + half)))


def equivalence_p(r: float, n: int, margin: float) -> float:
    """p of two one-sided tests of |rho| >= margin on Fisher's z (Schuirmann 1987); below 0.05 exactly when the 90 %
    Fisher interval lies within +-margin."""
    from scipy.stats import norm

    if n <= 3 or abs(r) >= 1:
        return 1.0
    return float(norm.sf((np.arctanh(margin) - abs(np.arctanh(r))) * np.sqrt(n - 3)))


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """r along the last axis; NaN where a side is constant. ddof cancels, so there is no convention to choose."""
    x, y = x - x.mean(axis=-1, keepdims=True), y - y.mean(axis=-1, keepdims=True)
    spread = (x * x).sum(axis=-1) * (y * y).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (x * y).sum(axis=-1) / np.sqrt(spread)
    return np.where(spread > 0, np.clip(r, -1, 1), np.nan)


def bca(
    x: np.ndarray, y: np.ndarray, level: float = 0.95, *, ranks: bool = False, seed: int = 0, draws: int = 40_000
) -> Interval | None:
    """Bias-corrected and accelerated bootstrap interval of r (Efron 1987) over resampled models.

    x, y: (n,). ranks=True ranks again within each resample (Spearman). Resamples in which a side is constant have no r
    and are left out. None when the jackknife or the bias correction is undefined (|r| = 1, or hardly any spread).
    """
    from scipy.stats import norm, rankdata

    def statistic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return pearson(rankdata(a, axis=-1), rankdata(b, axis=-1)) if ranks else pearson(a, b)

    n, order = len(x), np.lexsort((y, x))  # the order of the models must not decide which are drawn
    x, y = np.asarray(x)[order], np.asarray(y)[order]
    r = float(statistic(x, y))
    rows = np.random.default_rng(seed).integers(0, n, size=(draws, n))
    boot = statistic(x[rows], y[rows])
    boot = boot[np.isfinite(boot)]
    keep = ~np.eye(n, dtype=bool)
    each = np.array([float(statistic(x[mask], y[mask])) for mask in keep])  # jackknife
    ties = 1e-12  # a resample that is the sample in another order has the same r up to rounding
    below = (np.count_nonzero(boot < r - ties) + np.count_nonzero(boot <= r + ties)) / (2 * max(len(boot), 1))
    deviation = each.mean() - each
    if not np.isfinite(each).all() or not 0 < below < 1 or not (deviation**2).sum() > 0:
        return None
    bias = norm.ppf(below)
    acceleration = (deviation**3).sum() / (6 * (deviation**2).sum() ** 1.5)
    ends = norm.ppf([(1 - level) / 2, 0.5 + level / 2])
    shifted = norm.cdf(bias + (bias + ends) / (1 - acceleration * (bias + ends)))
    low, high = np.quantile(boot, shifted)
    return Interval(float(low), float(high))
