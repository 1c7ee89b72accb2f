"""A binomial mixed model as second opinion: does capability move the odds of success, beyond what models differ by?

    fit(successes, episodes, x)      # (models, tasks) counts; x: (models,) capability in SD

    successes ~ Binomial(episodes, logit^-1(a_task + slope x + u_model [+ w_model,task]))

u and w are normal, so models may differ for reasons that have nothing to do with capability, and with several tasks
each model may be good at some of them only. One task: integrated by adaptive Gauss-Hermite quadrature (Laplace with one
node); several: Laplace. Both agree with R's lme4::glmer (tests/oracles/mixed.R).

Trap: maximum likelihood divides the variance between models by their number, not by their degrees of freedom. With nine
models a plain Wald z would reject too often; interval and p here use t on n - 2 and a standard error widened by
sqrt(n / (n - 2)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from probes.scores import Scores
from vlm4vla_core.results import Interval

NODES = 9
_LIMIT = 15.0  # |slope| per SD on the logit scale beyond which the data separate: there is no finite estimate


@dataclass(frozen=True)
class Slope:
    """Log-odds of success per SD of capability, its 95 % interval and p; stderr is the plain one, as glmer gives it.

    sd_model, sd_model_task: of u and w (None without several tasks). log_likelihood: with the binomial coefficients.
    """

    slope: float
    stderr: float
    ci: Interval
    p: float
    sd_model: float
    sd_model_task: float | None
    log_likelihood: float
    models: int
    tasks: int


def fit(successes: np.ndarray, episodes: np.ndarray, x: np.ndarray, nodes: int = NODES) -> Slope | str:
    """successes, episodes: (models, tasks); x: (models,). Returns the reason where no slope can be estimated."""
    from scipy.optimize import minimize
    from scipy.stats import t

    k, n = np.atleast_2d(successes.astype(float)), np.atleast_2d(episodes.astype(float))
    varying = (k.sum(axis=0) > 0) & (k.sum(axis=0) < n.sum(axis=0))
    k, n = k[:, varying], n[:, varying]  # a task that always ends alike has no finite intercept
    models, tasks = k.shape
    if models < 4:
        return f"{models} models are too few"
    if tasks == 0:
        return "every episode ended alike"
    problem = _Marginal(k, n, x, nodes)
    rate = k.sum(axis=0) / n.sum(axis=0)
    start = np.concatenate([np.log(rate / (1 - rate)), [0.0], [0.5] * problem.components])
    bounds = [(None, None)] * (tasks + 1) + [(0.0, None)] * problem.components
    done = minimize(problem, start, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-12, "gtol": 1e-6})
    slope = float(done.x[tasks])
    free = np.r_[
        : tasks + 1, tasks + 1 + np.flatnonzero(done.x[tasks + 1 :] > 1e-3)
    ]  # a variance of 0 has no curvature
    try:
        variance = float(np.linalg.inv(_hessian(problem, done.x, free))[tasks, tasks])
    except np.linalg.LinAlgError:
        variance = np.nan
    if not variance > 0 or abs(slope) > _LIMIT:
        return "success and failure are separated by capability, the slope has no finite estimate"
    stderr = variance**0.5
    wide = stderr * (models / (models - 2)) ** 0.5
    half = float(t.ppf(0.975, models - 2)) * wide
    spread = np.where(done.x[tasks + 1 :] > 1e-3, done.x[tasks + 1 :], 0.0)
    return Slope(
        slope=slope,
        stderr=stderr,
        ci=Interval(slope - half, slope + half),
        p=float(2 * t.sf(abs(slope) / wide, models - 2)),
        sd_model=float(spread[0]),
        sd_model_task=float(spread[1]) if tasks > 1 else None,
        log_likelihood=-float(done.fun),
        models=models,
        tasks=tasks,
    )


class _Marginal:
    """Minus the log-likelihood with the models' effects integrated out; remembers their modes from call to call."""

    def __init__(self, k: np.ndarray, n: np.ndarray, x: np.ndarray, nodes: int) -> None:
        from scipy.special import gammaln

        self.k, self.n, self.x = k, n, x
        self.tasks = k.shape[1]
        self.components = 1 if self.tasks == 1 else 2
        self.nodes, self.weights = np.polynomial.hermite.hermgauss(nodes if self.tasks == 1 else 1)
        self.constant = float((gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)).sum())
        self.modes = np.zeros((len(k), 1 if self.tasks == 1 else 1 + self.tasks))  # (models, effects), standard normal

    def __call__(self, theta: np.ndarray) -> float:
        fixed = theta[: self.tasks] + theta[self.tasks] * self.x[:, None]  # (models, tasks)
        spread = theta[self.tasks + 1 :]
        loading = np.full((self.tasks, 1), spread[0])  # (tasks, effects): u, then one w per task
        if self.tasks > 1:
            loading = np.hstack([loading, spread[1] * np.eye(self.tasks)])
        modes, curve = self._modes(fixed, loading)
        log_det = np.linalg.slogdet(curve)[1]
        at = modes[None]  # (nodes, models, effects)
        if self.tasks == 1:
            scale = np.sqrt(2 / curve[:, 0, 0])
            at = modes[None] + self.nodes[:, None, None] * scale[:, None]
        heights = self._log_joint(fixed, loading, at) + (self.nodes**2 + np.log(self.weights / np.pi**0.5))[:, None]
        top = heights.max(axis=0)
        return -float((top + np.log(np.exp(heights - top).sum(axis=0)) - log_det / 2).sum() + self.constant)

    def _log_joint(self, fixed: np.ndarray, loading: np.ndarray, effects: np.ndarray) -> np.ndarray:
        """(…, models): log of binomials times standard normals, without their constants."""
        eta = fixed + effects @ loading.T
        return (self.k * eta - self.n * np.logaddexp(0, eta)).sum(axis=-1) - (effects**2).sum(axis=-1) / 2

    def _modes(self, fixed: np.ndarray, loading: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Newton to the mode of each model's effects, and the curvature there, (models, effects, effects)."""
        from scipy.special import expit

        effects, unit = self.modes, np.eye(loading.shape[1])
        for _ in range(100):
            p = expit(fixed + effects @ loading.T)
            weight = self.n * p * (1 - p)  # (models, tasks)
            curve = unit + (loading.T * weight[:, None]) @ loading
            move = np.linalg.solve(curve, ((self.k - self.n * p) @ loading - effects)[..., None])[..., 0]
            if np.abs(move).max() < 1e-10:
                break
            effects = effects + np.clip(move, -2, 2)
        self.modes = effects
        return effects, curve


def _hessian(function: _Marginal, at: np.ndarray, free: np.ndarray, step: float = 1e-3) -> np.ndarray:
    """Central second differences over the coordinates `free`."""
    size = len(free)
    moves = np.zeros((size, len(at)))
    moves[np.arange(size), free] = step
    out = np.empty((size, size))
    for i in range(size):
        for j in range(i + 1):
            corners = [function(at + a * moves[i] + b * moves[j]) * a * b for a in (1, -1) for b in (1, -1)]
            out[i, j] = out[j, i] = sum(corners) / (4 * step**2)
    return out


# --- for one pair of a capability score and a benchmark ----------------------------------------------------


@dataclass(frozen=True)
class Opinion:
    """Slopes task by task and pooled over tasks; `refused` holds a reason for each that could not be estimated.

    counts: what a task is here. For chains of tasks it is the position in the chain: how many of the chains that got
    there went on, which makes the positions of one chain independent binomials.
    """

    per_task: dict[str, Slope | None]
    pooled: Slope | None
    refused: dict[str, str]
    counts: str
    unit: str = "log-odds of success per standard deviation of capability"


def opinion(scores: Scores, b: int, rows: Sequence[int], x: np.ndarray) -> Opinion:
    """The mixed models of benchmark number b among these models; x: (models,) their capability, in any unit."""
    tables, meaning = _counts(scores, b, list(rows))
    if not tables:
        return Opinion({}, None, {"pooled": "no counts of successes and episodes are stated for every model"}, meaning)
    standard = (x - x.mean()) / x.std(ddof=1)
    k, n = (np.column_stack([table[side] for table in tables.values()]) for side in (0, 1))  # (models, tasks)
    fits: dict[str, Slope | str] = {"pooled": fit(k, n, standard)}
    if len(tables) > 1:
        fits |= {task: fit(table[0][:, None], table[1][:, None], standard) for task, table in tables.items()}
    slopes = {name: one if isinstance(one, Slope) else None for name, one in fits.items()}
    refused = {name: one for name, one in fits.items() if isinstance(one, str)}
    pooled = slopes.pop("pooled")
    return Opinion(slopes, pooled, refused, meaning)


def _counts(scores: Scores, b: int, rows: list[int]) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], str]:
    """Task -> (successes, episodes), each (models,); empty where some model's are unknown."""
    name = scores.benchmarks[b]
    steps, totals = scores.step_rates.get(name), scores.episodes[rows, b]
    if steps is not None and np.isfinite(steps[rows]).all() and np.isfinite(totals).all():
        reached = np.column_stack([totals, np.round(steps[rows] * totals[:, None])])  # (models, positions + 1)
        table = {f"{k} in a row": (reached[:, k], reached[:, k - 1]) for k in range(1, reached.shape[1])}
        return {task: pair for task, pair in table.items() if (pair[1] > 0).all()}, "positions in the chain"
    counts = scores.task_counts.get(name)
    if counts is not None and np.isfinite(counts.successes[rows]).all():
        columns = zip(counts.tasks, counts.successes[rows].T, counts.episodes[rows].T, strict=True)
        return {task: (k, n) for task, k, n in columns}, "tasks"
    successes = scores.successes[rows, b]
    if np.isfinite(successes).all() and np.isfinite(totals).all():
        return {"": (successes, totals)}, "totals"
    return {}, ""
