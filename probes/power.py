"""What n models can show: critical |r|, power and the smallest correlation that would probably be seen.

All from the exact distribution of Pearson's r under a bivariate normal (Hotelling 1953, eq. 25), which at n = 9 is
visibly better than Fisher's z. Trap: these are for one planned pair; looking at several costs power.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def critical_r(n: int, alpha: float = 0.05) -> float:
    """The |r| that is significant two-sided at alpha with n >= 3 models (t test of r; exact for a normal null)."""
    from scipy.stats import t

    quantile = float(t.ppf(1 - alpha / 2, n - 2))
    return quantile / np.sqrt(n - 2 + quantile**2)


def density_of_r(r: np.ndarray, rho: float, n: int) -> np.ndarray:
    """Density of the sample correlation at r for true correlation rho, |rho| < 1, and n >= 3 pairs."""
    from scipy.special import gammaln, hyp2f1

    log_front = (
        np.log(n - 2) + gammaln(n - 1) - gammaln(n - 0.5) - 0.5 * np.log(2 * np.pi) + (n - 1) / 2 * np.log1p(-(rho**2))
    )
    shape = (n - 4) / 2 * np.log1p(-(r**2)) - (n - 1.5) * np.log1p(-rho * r)
    return np.exp(log_front + shape) * hyp2f1(0.5, 0.5, n - 0.5, (1 + rho * r) / 2)


def power_of_r(rho: float, n: int, alpha: float = 0.05) -> float:
    """Probability that |r| of n models is significant two-sided at alpha when the true correlation is rho."""
    edge = critical_r(n, alpha)
    # With r = sin(angle) the density times dr/dangle is smooth up to both ends, so Gauss-Legendre is exact enough.
    node, weight = _gauss_legendre()
    total = 0.0
    for low, high in ((-np.pi / 2, -np.arcsin(edge)), (np.arcsin(edge), np.pi / 2)):
        angle = (high + low) / 2 + (high - low) / 2 * node
        heights = density_of_r(np.sin(angle), rho, n) * np.cos(angle)
        total += float((high - low) / 2 * (weight * heights).sum())
    return min(total, 1.0)


@lru_cache(maxsize=1)
def _gauss_legendre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(200)


@lru_cache(maxsize=256)
def detectable_rho(n: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest |rho| that n >= 4 models would show with this power; 1.0 below four."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    if n < 4:
        return 1.0
    # Fisher's z gives the neighbourhood; far beyond it the density is a needle that no fixed grid meets.
    near = (norm.ppf(1 - alpha / 2) + norm.ppf(power)) / np.sqrt(n - 3)
    low, high = np.tanh(0.5 * near), np.tanh(near + 1.5 / np.sqrt(n - 3))
    return float(brentq(lambda rho: power_of_r(rho, n, alpha) - power, low, high, xtol=1e-6))


# --- equivalence: showing that there is practically no correlation ------------------------------------------------


def equivalence_power(n: int, margin: float = 0.3, alpha: float = 0.05) -> float:
    """Probability that n models show |rho| < margin when rho is 0.

    The test succeeds when the 1 - 2 alpha Fisher interval lies within +-margin (two one-sided tests, Schuirmann 1987);
    r under rho = 0 has its exact distribution (t with n - 2 degrees of freedom). 0 below `equivalence_floor`.
    """
    from scipy.stats import norm, t

    if n < 4:
        return 0.0
    room = np.arctanh(margin) - norm.ppf(1 - alpha) / np.sqrt(n - 3)
    if room <= 0:
        return 0.0
    edge = np.tanh(room)
    return float(1 - 2 * t.sf(edge * np.sqrt((n - 2) / (1 - edge**2)), n - 2))


def equivalence_n(margin: float = 0.3, power: float = 0.8, alpha: float = 0.05) -> int:
    """The smallest number of models with which an equivalence test against |rho| < margin has this power at rho = 0."""
    n = equivalence_floor(margin, alpha)
    while equivalence_power(n, margin, alpha) < power:
        n += 1
    return n


def equivalence_floor(margin: float = 0.3, alpha: float = 0.05) -> int:
    """The smallest number of models with which that test can succeed at all, namely at r = 0 exactly."""
    from scipy.stats import norm

    return int(np.floor(3 + (norm.ppf(1 - alpha) / np.arctanh(margin)) ** 2)) + 1
