"""What n models can show: critical |r|, power, the smallest correlation that would probably be seen, and what it takes.

    plan(models=9, episodes=96, rho=0.8, reference=reference("bridge"))      # all of `vlm4vla power`

All from the exact distribution of Pearson's r under a bivariate normal (Hotelling 1953, eq. 25), which at n = 9 is
visibly better than Fisher's z. Finite episodes make the true correlation rho look like rho * sqrt(reliability).
Trap: these are for one planned pair; looking at several costs power. And they are upper bounds: the capability score
is taken as free of error, models as independent draws, and a policy as one training without luck of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from probes.jsonable import jsonable
from vlm4vla_core.results import Interval

if TYPE_CHECKING:
    import pandas as pd


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
    reach = 10 / np.sqrt(n - 3) if n >= 30 else np.inf  # for many models the density is a needle: look only where it is
    window = np.arcsin(np.tanh([np.arctanh(rho) - reach, np.arctanh(rho) + reach]))
    total = 0.0
    for low, high in ((-np.pi / 2, -np.arcsin(edge)), (np.arcsin(edge), np.pi / 2)):
        low, high = max(low, window[0]), min(high, window[1])
        if low >= high:
            continue
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


# --- what it takes ------------------------------------------------------------------------------------------------


def expected_r(rho: float, n: int) -> float:
    """E[r] of n pairs: a little nearer to 0 than rho (Hotelling 1953, eq. 35; exact)."""
    from scipy.special import gammaln, hyp2f1

    factor = 2 / (n - 1) * np.exp(2 * (gammaln(n / 2) - gammaln((n - 1) / 2)))
    return float(factor * rho * hyp2f1(0.5, 0.5, (n + 1) / 2, rho**2))


@lru_cache(maxsize=256)
def models_for_power(rho: float, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """The smallest number of models that shows rho with this power; None when rho is 0 (or above a million)."""
    from scipy.stats import norm

    if abs(rho) < 1e-6:
        return None
    near = ((norm.ppf(1 - alpha / 2) + norm.ppf(power)) / np.arctanh(abs(rho))) ** 2 + 3
    if near > 1e6:
        return None
    low, high = 3, int(1.5 * near) + 10  # power(low) falls short or low is the least there is, power(high) suffices
    if power_of_r(rho, low, alpha) >= power:
        return low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of_r(rho, middle, alpha) >= power else (middle, high)
    return high


@dataclass(frozen=True)
class Reference:
    """A benchmark whose numbers stand in where a user has none of their own.

    spread: SD of the models' true scores, what is left of the observed SD after taking sampling of episodes off, with
    its 95 % interval over models (chi-square). episode_variance: of one episode's outcome (success 0 or 1; chains: 0
    to 5) at one model's own rate; within_task: the same within tasks, None where no result by task was published.
    """

    name: str
    models: int
    mean: float
    spread: float
    spread_interval: Interval
    episode_variance: float
    within_task: float | None
    tasks: int

    def noise(self, tasks: int) -> float:
        """Variance that one episode brings into a model's score when episodes are shared out over so many tasks."""
        return self.episode_variance if tasks == 1 or self.within_task is None else self.within_task


Like = Literal["bridge", "libero", "calvin"]
BENCHMARKS: dict[str, str] = {"bridge": "SimplerEnv-Bridge", "libero": "LIBERO-10", "calvin": "CALVIN ABC-D"}


def reference(like: Like = "bridge") -> Reference:
    """The paper's nine models on one benchmark: scores from 0 to 1 (CALVIN: mean chain length, 0 to 5)."""
    from scipy.stats import chi2

    from probes import paper
    from probes.reliability import chain_variance, pooled_variance, stratified_variance

    rows = paper.performance()
    rows = rows[rows["benchmark"] == BENCHMARKS[like]]
    total = rows[rows["task"] == ""].set_index("model")
    below = rows[rows["task"] != ""]
    n = total["episodes"].to_numpy(dtype=float)
    within, tasks = None, 1
    if like == "calvin":
        steps = below.pivot(index="model", columns="task", values="value").to_numpy(dtype=float)
        scores = total["value"].to_numpy(dtype=float)
        noise = whole = chain_variance(steps, n)
    else:
        successes = total["successes"].to_numpy(dtype=float)
        scores, noise = successes / n, pooled_variance(successes, n)
        whole = noise
        if len(below):
            k, m = (below.pivot(index="model", columns="task", values=c).to_numpy(dtype=float)
                    for c in ("successes", "episodes"))  # fmt: skip
            noise, tasks = stratified_variance(k, m), k.shape[1]
            within = float(noise.mean() * n.mean())
    observed, df = float(scores.var(ddof=1)), len(scores) - 1
    ends = [max(0.0, observed * df / float(chi2.ppf(level, df)) - noise.mean()) ** 0.5 for level in (0.975, 0.025)]
    return Reference(
        BENCHMARKS[like], len(scores), float(scores.mean()), max(0.0, observed - float(noise.mean())) ** 0.5,
        Interval(*map(float, ends)), float(whole.mean() * n.mean()), within, tasks,
    )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a design can show. Names ending in `_true` are those of endless episodes; the others carry their noise.

    rho: true correlation of capability with the models' true scores. ceiling: sqrt(reliability), the largest |r| to be
    expected. detectable: the smallest |rho| seen with `target` power; None when even 1 is not. models_needed,
    episodes_needed: for that power, the other one as planned; None when none suffices. equivalence: models below which
    |rho| < 0.3 cannot be shown, and those for 80 % power. grid: power for each (models, episodes).
    """

    models: int
    episodes: int
    tasks: int
    rho: float
    spread: float
    episode_variance: float
    alpha: float
    target: float
    reliability: float
    ceiling: float
    critical: float
    expected_true: float
    expected: float
    power_true: float
    power: float
    detectable_true: float
    detectable: float | None
    models_needed_true: int | None
    models_needed: int | None
    episodes_for_reliability: int | None
    episodes_needed: int | None
    equivalence: tuple[int, int]
    grid: tuple[tuple[int, int, float], ...]

    def to_frame(self) -> pd.DataFrame:
        """The grid: one row per number of models, one column per number of episodes."""
        import pandas as pd

        frame = pd.DataFrame(self.grid, columns=["models", "episodes", "power"])
        return frame.pivot(index="models", columns="episodes", values="power")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self) | {
            "grid": [dict(zip(("models", "episodes", "power"), cell, strict=True)) for cell in self.grid],
            "equivalence": {"floor": self.equivalence[0], "models_for_80_percent": self.equivalence[1]},
        }
        return dict(jsonable(values))


def reliability_of(spread: float, episode_variance: float, episodes: float) -> float:
    """Share of the variance of scores over `episodes` episodes that is the models' own: spread^2 over the total."""
    total = spread**2 + episode_variance / episodes
    return spread**2 / total if total > 0 else 0.0


def plan(
    models: int,
    episodes: int,
    *,
    rho: float = 0.8,
    tasks: int | None = None,
    spread: float | None = None,
    reference: Reference,
    target: float = 0.8,
    wanted: float = 0.8,
    alpha: float = 0.05,
    grid: tuple[Sequence[int], Sequence[int]] = ((6, 9, 12, 20, 30, 50), (24, 96, 250, 500, 1000, 4000)),
) -> Plan:
    """models >= 4, episodes: of each model over all tasks. spread, tasks: of `reference` where None.

    target: the power aimed at; wanted: the reliability aimed at. grid: further numbers of models and of episodes.
    """
    tasks = reference.tasks if tasks is None else tasks
    spread = reference.spread if spread is None else spread
    noise = reference.noise(tasks)

    def seen(count: float) -> float:
        return rho * reliability_of(spread, noise, count) ** 0.5

    share = reliability_of(spread, noise, episodes)
    alone = detectable_rho(models, target, alpha)
    enough = _episodes_for((alone / rho) ** 2, spread, noise) if alone < abs(rho) else None
    sizes = sorted({models, *grid[0]}), sorted({episodes, *grid[1]})
    return Plan(
        models=models,
        episodes=episodes,
        tasks=tasks,
        rho=rho,
        spread=spread,
        episode_variance=noise,
        alpha=alpha,
        target=target,
        reliability=share,
        ceiling=share**0.5,
        critical=float(critical_r(models, alpha)),
        expected_true=expected_r(rho, models),
        expected=expected_r(seen(episodes), models),
        power_true=power_of_r(rho, models, alpha),
        power=power_of_r(seen(episodes), models, alpha),
        detectable_true=alone,
        detectable=alone / share**0.5 if alone < share**0.5 else None,
        models_needed_true=models_for_power(rho, target, alpha),
        models_needed=models_for_power(seen(episodes), target, alpha),
        episodes_for_reliability=_episodes_for(wanted, spread, noise),
        episodes_needed=enough,
        equivalence=(equivalence_floor(alpha=alpha), equivalence_n(alpha=alpha)),
        grid=tuple((m, n, power_of_r(seen(n), m, alpha)) for m in sizes[0] for n in sizes[1]),
    )


def _episodes_for(share: float, spread: float, noise: float) -> int | None:
    """Episodes of a model that lift the reliability to `share`; None without any spread."""
    return None if spread == 0 else int(np.ceil(noise * share / (spread**2 * (1 - share)) - 1e-9))
