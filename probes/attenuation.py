"""What the correlation might be without the noise of few episodes: Spearman's correction (1904), with its uncertainty.

r / sqrt(reliability) divides by something that is itself estimated from the same models. Its interval therefore comes
from the joint distribution of r and the variances behind the reliabilities, not from stretching the interval of r.

Trap: the correction adds no information. It widens with what it corrects, is refused below a reliability of 0.5, and a
value beyond 1 is no large correlation but a sign that reliability was underestimated or r lucky.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlm4vla_core.results import Interval

FLOOR = 0.5
_DRAWS = 20_000


@dataclass(frozen=True)
class Attenuated:
    """r corrected for noise, with a 95 % interval; both None when `refused` says why.

    reliability_performance: the one divided by, `source` "stratified" or "pooled". reliability_capability: None when
    the capability score's own error is not known, so that only the performance's noise is corrected for.
    inadmissible: the corrected value lies beyond 1.
    """

    r: float | None
    ci: Interval | None
    reliability_performance: float | None
    reliability_capability: float | None
    source: str
    refused: str | None
    inadmissible: bool


def corrected(
    r: float, n: int, performance: float | None, capability: float | None = None, *, source: str = "", seed: int = 0
) -> Attenuated:
    """performance, capability: reliabilities (0 to 1, None where unknown) of the two sides of r over n models."""
    reason = None
    if performance is None:
        reason = "the reliability of the benchmark is not known"
    for name, value in (("performance", performance), ("capability", capability)):
        if value is not None and value < FLOOR:
            reason = f"the reliability of the {name} is {value:.2f}, below {FLOOR:g}"
    if n < 4:
        reason = f"{n} models are too few"
    if reason is not None or performance is None:
        return Attenuated(None, None, performance, capability, source, reason, False)
    value = r / np.sqrt(performance * (1.0 if capability is None else capability))
    ci = interval(r, n, performance, capability, seed=seed)
    return Attenuated(float(value), ci, performance, capability, source, None, bool(abs(value) > 1))


def interval(
    r: float, n: int, performance: float, capability: float | None = None, level: float = 0.95, *, seed: int = 0
) -> Interval:
    """Interval of the correlation of the noise-free scores, cut to -1…1.

    Scores are taken as bivariate normal over models, each with a known sampling variance of (1 - reliability) times
    the sample variance. The covariance matrix is drawn from its generalised pivot (Wishart scatter = L T T' L' with
    Bartlett's T, solved for L: exact for rho and for the performance's variance alone), the sampling variances are
    taken off its diagonal. A draw that leaves nothing there counts as an infinite correlation of its sign.
    """
    rng = np.random.default_rng(seed)
    t11, t22 = np.sqrt(rng.chisquare(n - 1, _DRAWS)), np.sqrt(rng.chisquare(n - 2, _DRAWS))
    t21 = rng.normal(size=_DRAWS)
    # Cholesky factor of the scatter of standardised scores, performance first, then L = K inverse(T).
    k11, k21, k22 = np.sqrt(n - 1), np.sqrt(n - 1) * r, np.sqrt(n - 1) * np.sqrt(max(0.0, 1 - r * r))
    l11, l21, l22 = k11 / t11, k21 / t11 - k22 * t21 / (t11 * t22), k22 / t22
    left = l11**2 - (1 - performance)
    right = l21**2 + l22**2 - (0.0 if capability is None else 1 - capability)
    product = np.where((left > 0) & (right > 0), left * right, 0.0)
    with np.errstate(divide="ignore"):
        draws = np.clip(l11 * l21 / np.sqrt(product), -2, 2)  # infinite ends are cut to 1 below
    low, high = np.clip(np.quantile(draws, [(1 - level) / 2, 0.5 + level / 2]), -1, 1)
    return Interval(float(low), float(high))
