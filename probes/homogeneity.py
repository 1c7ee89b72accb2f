"""Is one success rate behind all models? Pooled, task by task, and in how the models differ between tasks.

    found = homogeneity(successes, episodes, counts)    # counts: the same by task, for everything below the first line

An average can hide what tasks show: two models that are good at different things have the same total. So beside the
pooled chi-square stand every task by itself, the model x task interaction, and a permutation test of the totals that
keeps each task's difficulty (and each initial state's, where every model ran every one) as it is.

Trap: with a handful of successes a chi-square p is rough; tasks and interaction also get one that needs no large
numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from probes.permutation import holm
from probes.scores import TaskCounts

_BY_STATE = 10_000  # draws, when outcomes are shuffled one initial state at a time
_BATCH = 2_000_000  # shuffled outcomes in memory at once


@dataclass(frozen=True)
class Interaction:
    """Do models differ in which tasks they are good at? Deviance of the additive logistic model (models + tasks).

    p: parametric bootstrap under that model, valid with cells of no success; p_chi2: the usual likelihood-ratio test.
    """

    deviance: float
    df: int
    p: float
    p_chi2: float


@dataclass(frozen=True)
class Homogeneity:
    """Are all models equally good? chi2, df, p: pooled over tasks (for chains: Cochran's Q of the mean lengths).

    p_stratified: permutation p of the variance among totals, with its Monte-Carlo error p_stratified_stderr; `null`
    says what was shuffled over the models: outcomes "within task", or "within task and initial state".
    per_task: chi-square p of each task by itself; per_task_holm: corrected over the tasks; per_task_permutation: p of
    the same chi-square when outcomes are shuffled. None where a task is all success or all failure.
    """

    chi2: float
    df: int
    p: float
    p_stratified: float | None = None
    p_stratified_stderr: float | None = None
    null: str = ""
    per_task: dict[str, float | None] | None = None
    per_task_holm: dict[str, float | None] | None = None
    per_task_permutation: dict[str, float | None] | None = None
    interaction: Interaction | None = None


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
    picked = list(range(len(counts.successes))) if rows is None else list(rows)
    k, n = counts.successes[picked], counts.episodes[picked]  # (models, tasks)
    alone = np.array([_chi_square(k[:, task], n[:, task])[2] for task in range(k.shape[1])])
    known = np.isfinite(alone)
    corrected = np.full_like(alone, np.nan)
    corrected[known] = holm(alone[known].tolist())
    p_within, per_task, tried = _shuffled_within_tasks(k, n, seed, draws)
    null = "within task"
    outcomes = _outcomes_by_state(counts, picked)
    if outcomes is not None:
        p_within, tried, null = _shuffled_within_states(outcomes, seed), _BY_STATE, "within task and initial state"

    def named(values: np.ndarray) -> dict[str, float | None]:
        return {name: float(value) if ok else None for name, value, ok in zip(counts.tasks, values, known, strict=True)}

    return Homogeneity(
        chi2,
        df,
        p,
        p_stratified=p_within,
        p_stratified_stderr=float(np.sqrt(p_within * (1 - p_within) / tried)),
        null=null,
        per_task=named(alone),
        per_task_holm=named(corrected),
        per_task_permutation=named(per_task),
        interaction=interaction(k, n, seed=seed),
    )


def _chi_square(successes: np.ndarray, episodes: np.ndarray) -> tuple[float, int, float]:
    """Pearson's chi-square of models x (success, failure); NaN where every episode ended alike."""
    from scipy.stats import chi2

    rate, df = successes.sum() / episodes.sum(), len(successes) - 1
    if rate in (0.0, 1.0):
        return float("nan"), df, float("nan")
    value = float((((successes - episodes * rate) ** 2) / (episodes * rate * (1 - rate))).sum())
    return value, df, float(chi2.sf(value, df))


# --- shuffling outcomes over models ------------------------------------------------------------------------


def _shuffled_within_tasks(
    successes: np.ndarray, episodes: np.ndarray, seed: int, draws: int
) -> tuple[float, np.ndarray, int]:
    """(p of the variance among totals, (tasks,) p of each task's chi-square, draws).

    Shuffling outcomes over models within a task is a multivariate hypergeometric draw of each model's successes.
    """
    rng = np.random.default_rng(seed)
    totals = np.zeros((draws, len(successes)))  # sum over tasks of each model's success rate
    per_task = []
    for k, n in zip(successes.T.astype(np.int64), episodes.T.astype(np.int64), strict=True):
        drawn = rng.multivariate_hypergeometric(n, int(k.sum()), size=draws)
        totals += drawn / n
        expected = n * (k.sum() / n.sum())
        reach = ((drawn - expected) ** 2 / n).sum(axis=1) >= ((k - expected) ** 2 / n).sum() - 1e-9
        per_task.append((1 + reach.sum()) / (1 + draws))
    observed = (successes / episodes).sum(axis=1).var()
    return float((1 + (totals.var(axis=1) >= observed - 1e-12).sum()) / (1 + draws)), np.array(per_task), draws


def _outcomes_by_state(counts: TaskCounts, picked: list[int]) -> list[np.ndarray] | None:
    """(models, states, repeats) outcomes of each task, if every one of these models ran every initial state alike."""
    if counts.states is None:
        return None
    outcomes = [table[picked] for table in counts.states]
    return outcomes if all(np.isfinite(table).all() for table in outcomes) else None


def _shuffled_within_states(outcomes: list[np.ndarray], seed: int) -> float:
    """p of the variance among totals when outcomes change models within each initial state only."""
    rng = np.random.default_rng(seed)
    models = len(outcomes[0])
    totals, observed = np.zeros((_BY_STATE, models)), np.zeros(models)
    for table in outcomes:
        _, states, repeats = table.shape
        observed += table.mean(axis=(1, 2))
        flat = table.transpose(1, 0, 2).reshape(states, models * repeats).astype(np.int8)
        mixed = flat[np.ptp(flat, axis=1) > 0]  # states where all ended alike cannot move
        fixed = table[:, np.ptp(flat, axis=1) == 0].sum(axis=(1, 2))
        step = max(1, _BATCH // max(mixed.size, 1))
        for start in range(0, _BY_STATE, step):
            block = slice(start, min(start + step, _BY_STATE))
            copies = np.broadcast_to(mixed, (block.stop - block.start, *mixed.shape))
            drawn = rng.permuted(copies, axis=-1).reshape(len(copies), -1, models, repeats).sum(axis=(1, 3))
            totals[block] += (drawn + fixed) / (states * repeats)
    return float((1 + (totals.var(axis=1) >= observed.var() - 1e-12).sum()) / (1 + _BY_STATE))


# --- models x tasks ----------------------------------------------------------------------------------------


def interaction(
    successes: np.ndarray, episodes: np.ndarray, *, seed: int = 0, draws: int = 2_000
) -> Interaction | None:
    """Likelihood-ratio test of the additive model on the logit scale against one rate per cell; (models, tasks) counts.

    Tasks and models that always end alike tell nothing about it and carry no degrees of freedom. None when fewer than
    two of either are left.
    """
    from scipy.stats import chi2

    def varying(axis: int) -> np.ndarray:
        return (k.sum(axis=axis) > 0) & (k.sum(axis=axis) < n.sum(axis=axis))

    k, n = successes, episodes
    while not (varying(0).all() and varying(1).all()):  # without a task, a model may always end alike in the rest
        inside = np.ix_(varying(1), varying(0))
        k, n = k[inside], n[inside]
    if min(k.shape) < 2:
        return None
    fitted, deviance = _additive(k[None], n)
    rng = np.random.default_rng(seed)
    again = rng.binomial(n.astype(np.int64), fitted[0], size=(draws, *n.shape)).astype(float)
    reach = _additive(again, n)[1] >= deviance[0] - 1e-9
    df = (n.shape[0] - 1) * (n.shape[1] - 1)
    return Interaction(float(deviance[0]), df, float((1 + reach.sum()) / (1 + draws)), float(chi2.sf(deviance[0], df)))


def _additive(k: np.ndarray, n: np.ndarray, steps: int = 25) -> tuple[np.ndarray, np.ndarray]:
    """Newton fits of logit p = model + task to every table in k (tables, models, tasks): (fitted p, deviance)."""
    from scipy.special import expit, xlogy

    models, tasks = n.shape
    design = np.zeros((models, tasks, models + tasks - 1))
    for model in range(models):
        design[model, :, model] = 1
    for task in range(1, tasks):
        design[:, task, models + task - 1] = 1
    design, trials = design.reshape(models * tasks, -1), n.reshape(-1)  # (cells, coefficients), (cells,)
    y = k.reshape(len(k), -1)
    # Half a success and half a failure spread over the cells: a start that is finite with any margins.
    rate = (y.sum(axis=1) + 0.5) / (trials.sum() + 1)
    eta = np.repeat(np.log(rate / (1 - rate))[:, None], len(trials), axis=1)
    beta = np.zeros((len(k), design.shape[1]))
    beta[:, :models] = eta[:, :1]
    for _ in range(steps):
        p = expit(beta @ design.T)
        weight = trials * p * (1 - p)
        slope = (y - trials * p) @ design
        curve = (design.T * weight[:, None]) @ design + 1e-7 * np.eye(design.shape[1])  # finite when a margin is empty
        move = np.linalg.solve(curve, slope[..., None])[..., 0]
        beta += np.clip(move, -3, 3)
        if np.abs(move).max() < 1e-9:
            break
    p = np.clip(expit(beta @ design.T), 1e-15, 1 - 1e-15)
    missed = trials - y
    deviance = 2 * (xlogy(y, y / trials) + xlogy(missed, missed / trials) - xlogy(y, p) - xlogy(missed, 1 - p)).sum(
        axis=1
    )
    return p.reshape(k.shape), deviance
