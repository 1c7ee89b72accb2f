"""The difference of two policies: intervals, exact tests, and who cannot be told apart.

Paired (both ran the same initial states): `tango` for success, `bootstrap` for any outcome, `sign_flip` for p; on
successes the last is McNemar's exact test. Unpaired (counts only): `newcombe`, and Fisher's exact test.

Trap: an interval and a test are two methods and may disagree at the edge; what is called different here follows p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vlm4vla_core.results import Interval, wilson


def newcombe(k1: int, n1: int, k2: int, n2: int, level: float = 0.95) -> Interval:
    """Interval of k1/n1 - k2/n2 of independent samples (Newcombe 1998, Stat Med 17:873, method 10).

    For policies that ran the same initial states, which agree more often than by chance, it is on the wide side.
    """
    p1, p2 = k1 / n1, k2 / n2
    (low1, high1), (low2, high2) = wilson(k1, n1, level), wilson(k2, n2, level)
    below, above = np.hypot(p1 - low1, high2 - p2), np.hypot(high1 - p1, p2 - low2)
    return Interval(float(p1 - p2 - below), float(p1 - p2 + above))


def tango(a_only: int, b_only: int, n: int, level: float = 0.95) -> Interval:
    """Score interval of the paired difference (a_only - b_only) / n (Tango 1998, Stat Med 17:891, eq. 12-16).

    a_only, b_only: pairs in which one alone succeeded; n > 0: all pairs. Never of zero width, not even without a
    single difference. Raises ValueError for impossible counts.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    if n <= 0 or min(a_only, b_only) < 0 or a_only + b_only > n:
        raise ValueError(f"{a_only} and {b_only} of {n} are no pairs")
    z2, tiny = float(norm.ppf(0.5 + level / 2)) ** 2, 1e-12
    estimate = (a_only - b_only) / n

    def excess(delta: float) -> float:
        """Squared distance from the estimate less z^2 times its variance where the true difference is delta."""
        # q: the likeliest share of pairs that B alone wins, given delta; the larger root of a quadratic.
        half, last = a_only + b_only - (2 * n - a_only + b_only) * delta, b_only * delta * (1 - delta)
        q = (half + np.sqrt(max(half**2 + 8 * n * last, 0.0))) / (4 * n)
        return (a_only - b_only - n * delta) ** 2 - z2 * n * (2 * q + delta * (1 - delta))

    low = -1.0 if b_only == n else float(brentq(excess, -1.0, estimate - tiny, xtol=1e-12))
    high = 1.0 if a_only == n else float(brentq(excess, estimate + tiny, 1.0, xtol=1e-12))
    return Interval(low, high)


def sign_flip(differences: np.ndarray) -> tuple[float, float]:
    """(p, mid-p), two-sided and exact, of whole-number differences whose signs are a fair coin each under the null.

    On outcomes 1, 0, -1 this is McNemar's exact test and its mid-p; on differences of chain lengths Fisher's
    randomisation test. A sum of signs counts when |S*| >= |S|; the mid-p counts half of |S*| = |S|.
    """
    from scipy.stats import binom

    values, counts = np.unique(np.abs(np.asarray(differences, dtype=np.int64)), return_counts=True)
    total = abs(int(np.sum(differences)))
    mass = np.ones(1)  # of the sum of signed values; index 0 is minus the sum of all absolute values
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if value == 0:
            continue
        own = np.zeros(2 * value * count + 1)
        own[:: 2 * value] = binom.pmf(np.arange(count + 1), count, 0.5)
        mass = np.convolve(mass, own)
    sums = np.abs(np.arange(len(mass)) - len(mass) // 2)
    beyond, equal = float(mass[sums > total].sum()), float(mass[sums == total].sum())
    return min(1.0, beyond + equal), min(1.0, beyond + equal / 2)


def bootstrap(
    strata: Sequence[np.ndarray], level: float = 0.95, *, seed: int = 0, draws: int = 10_000
) -> Interval | None:
    """BCa interval (Efron 1987) of the mean over all values, resampled within each stratum (task).

    strata: one array per task: differences of paired episodes, or a policy's own outcomes. None when no stratum
    varies: resampling then says nothing, not that the value is certain.
    """
    from scipy.stats import norm

    n = sum(len(values) for values in strata)
    if not any(np.ptp(values) > 0 for values in strata if len(values)):
        return None
    rng, sums = np.random.default_rng(seed), np.zeros(draws)
    for values in strata:
        # Drawing len(values) with replacement is a multinomial draw over the distinct values.
        distinct, counts = np.unique(values, return_counts=True)
        sums += rng.multinomial(len(values), counts / len(values), size=draws) @ distinct
    means = sums / n
    observed = sum(float(values.sum()) for values in strata) / n
    slack = 1e-9 * max(1.0, abs(observed))
    below = ((means < observed - slack).mean() + (means <= observed + slack).mean()) / 2
    pull = np.concatenate([values - values.mean() for values in strata])  # each value's influence on the mean
    acceleration = (pull**3).sum() / (6 * (pull**2).sum() ** 1.5)
    bias, ends = norm.ppf(below), norm.ppf([(1 - level) / 2, 0.5 + level / 2])
    shifted = norm.cdf(bias + (bias + ends) / (1 - acceleration * (bias + ends)))
    low, high = np.quantile(means, shifted)
    return Interval(float(low), float(high))


def welch(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval | None:
    """t interval of mean(a) - mean(b) with unequal variances (Welch 1947); None below two values on either side."""
    from scipy.stats import t

    if min(len(a), len(b)) < 2:
        return None
    parts = [float(np.var(side, ddof=1)) / len(side) for side in (a, b)]
    if sum(parts) == 0:
        return None
    df = sum(parts) ** 2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, (a, b), strict=True))
    half = float(t.ppf(0.5 + level / 2, df)) * sum(parts) ** 0.5
    centre = float(np.mean(a) - np.mean(b))
    return Interval(centre - half, centre + half)


def letters(n: int, different: Callable[[int, int], bool]) -> list[str]:
    """Compact letter display of n policies in their order: two share a letter exactly when they are not different.

    Insert and absorb (Piepho 2004, J Comput Graph Stat 13:456). Sharing a letter is not being equal, and it is not
    transitive: a may share with b, b with c, and a be different from c.
    """
    groups = [frozenset(range(n))]
    for i in range(n):
        for j in range(i + 1, n):
            if not different(i, j):
                continue
            split = {part for group in groups for part in ((group - {i}, group - {j}) if {i, j} <= group else (group,))}
            groups = [group for group in split if not any(group < other for other in split)]
    groups.sort(key=sorted)
    return ["".join(_letter(place) for place, group in enumerate(groups) if i in group) for i in range(n)]


def _letter(place: int) -> str:
    """a … z, then a1 … z1 and so on."""
    return chr(ord("a") + place % 26) + (str(place // 26) if place >= 26 else "")
