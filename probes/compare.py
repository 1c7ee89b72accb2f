"""Policies on the same initial states: how far apart, with what interval, and who cannot be told apart.

    rows = read_rows([Path("runs/walk/eval/vla"), Path("runs/walk/eval/random")])
    result = compare(rows, ["vla", "random"])       # result.differences[0], result.to_frame(), result.to_dict()

Outcomes are paired on benchmark, task, episode and env_seed. A policy with several training seeds is one policy: its
outcome at a state is the mean over its seeds. That says how these trained checkpoints differ; only `training` (Welch's
interval over seeds) speaks of the training that made them.

Trap: rates of policies that ran different episodes are not comparable, so what cannot be paired is left out of rates,
tests and ranks alike, and listed in `unpaired`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from probes.differences import bootstrap, letters, newcombe, sign_flip, tango, welch
from probes.episode_rows import Outcomes, outcomes
from probes.jsonable import jsonable
from probes.permutation import holm
from vlm4vla_core.results import Interval, clopper_pearson, wilson

if TYPE_CHECKING:
    import pandas as pd

Metric = Literal["success", "chain"]
ALL = "all tasks"


@dataclass(frozen=True)
class Rate:
    """successes of episodes, with both intervals."""

    successes: int
    episodes: int
    rate: float
    wilson: Interval
    clopper_pearson: Interval


@dataclass(frozen=True)
class PolicyResult:
    """One policy on the episodes that all compared policies ran (unpaired: on all its own).

    success: a chain counts as a success when all its tasks were done. by_task: the same by task. mean, mean_interval:
    of the metric; the interval is `wilson` for success and a bootstrap over chains for chains (None if none varies).
    step_rates: for chains, the share with at least 1, 2, … 5 tasks done. by_seed: the metric for each training seed.
    group: letters; policies that share one could not be told apart (Holm over all pairs).
    """

    name: str
    mean: float
    mean_interval: Interval | None
    success: Rate
    by_task: dict[str, Rate]
    step_rates: tuple[Rate, ...]
    by_seed: dict[str, float]
    group: str = ""


@dataclass(frozen=True)
class Difference:
    """a minus b over one task, or all of them with every episode weighing the same.

    a_only, b_only, both, neither: paired successes (None for chains and for several training seeds). score: Tango's
    interval, for unpaired successes Newcombe's, for unpaired chains Welch's, None otherwise. bootstrap: BCa over
    initial states within tasks, None when nothing varies and where a single task has its score interval. p: exact
    McNemar test; for chains and several seeds the exact sign-flip test over initial states (`test` names it). p_mid:
    its mid-p, less conservative. p_holm: over all pairs of policies, by task over the tasks of a pair. training:
    Welch's interval over training seeds, None below two seeds on either side.
    """

    a: str
    b: str
    task: str
    n: int
    difference: float
    score: Interval | None
    bootstrap: Interval | None
    test: str
    p: float
    p_mid: float | None
    p_holm: float = float("nan")
    a_only: int | None = None
    b_only: int | None = None
    both: int | None = None
    neither: int | None = None
    training: Interval | None = None

    @property
    def interval(self) -> Interval | None:
        """The one to quote: the score interval where there is one."""
        return self.score or self.bootstrap

    def verdict(self, alpha: float = 0.05) -> str:
        """`higher`, `lower` (a against b) or `undetermined`, by the corrected p."""
        if self.p_holm >= alpha or self.difference == 0:
            return "undetermined"
        return "higher" if self.difference > 0 else "lower"


@dataclass(frozen=True)
class Comparison:
    """policies: best first. differences: every pair over all tasks, the better-ranked policy first (with two policies:
    in the order asked for). by_task: the same pairs task by task. unpaired: policy -> task -> episodes left out."""

    metric: Metric
    paired: bool
    protocol: str
    execute: str
    policies: tuple[PolicyResult, ...]
    differences: tuple[Difference, ...]
    by_task: tuple[Difference, ...]
    unpaired: dict[str, dict[str, int]]
    notes: tuple[str, ...]
    level: float
    seed: int

    def to_frame(self) -> pd.DataFrame:
        """One row per pair and task, `all tasks` first; intervals as low and high."""
        import pandas as pd

        rows = []
        for one in (*self.differences, *self.by_task):
            low, high = one.interval or (np.nan, np.nan)
            rows.append({**asdict(one), "low": low, "high": high, "verdict": one.verdict()})
        return pd.DataFrame(rows).drop(columns=["score", "bootstrap", "training"])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self)
        for kind in ("differences", "by_task"):
            for told, one in zip(values[kind], getattr(self, kind), strict=True):
                told["verdict"] = one.verdict()
        return dict(jsonable(values))


def compare(
    rows: pd.DataFrame,
    policies: Sequence[str] = (),
    *,
    metric: Metric | None = None,
    paired: bool = True,
    benchmark: str | None = None,
    any_execute: bool = False,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare policies of episode rows (`episode_rows.read_rows`); all of them when none is named.

    metric: `chain` compares the number of tasks done in a row; by default chains where every row has one.
    paired=False compares all episodes of each policy as independent samples. benchmark: which one (name or protocol),
    when the rows hold several. any_execute: allow different numbers of actions between two looks. seed: of resamples.
    Raises InputError for unknown names, fewer than two policies, differing protocols or execute lengths, episodes that
    stand twice, and when no initial state is common.
    """
    found = outcomes(rows, policies, metric=metric, paired=paired, benchmark=benchmark, any_execute=any_execute)
    described = [_describe(found, i, level, seed) for i in range(len(found.names))]
    order = list(range(len(described)))
    if len(order) > 2:
        order.sort(key=lambda i: -described[i].mean)
    pairs = [(i, j) for place, i in enumerate(order) for j in order[place + 1 :]]
    overall = _corrected([_difference(found, i, j, ALL, level, seed) for i, j in pairs])
    by_task: list[Difference] = []
    if len(found.tasks) > 1:
        for i, j in pairs:
            by_task += _corrected([_difference(found, i, j, task, level, seed) for task in found.tasks])
    judged = {frozenset((one.a, one.b)): one for one in overall}
    names = [described[i].name for i in order]
    groups = letters(len(names), lambda i, j: judged[frozenset((names[i], names[j]))].verdict() != "undetermined")
    return Comparison(
        metric=found.metric,
        paired=paired,
        protocol=found.protocol,
        execute=found.execute,
        policies=tuple(replace(described[i], group=group) for i, group in zip(order, groups, strict=True)),
        differences=tuple(overall),
        by_task=tuple(by_task),
        unpaired=found.unpaired,
        notes=found.notes,
        level=level,
        seed=seed,
    )


def rate(successes: int, episodes: int, level: float = 0.95) -> Rate:
    """A success rate with both of its intervals."""
    return Rate(
        successes, episodes, successes / episodes, wilson(successes, episodes, level),
        clopper_pearson(successes, episodes, level),
    )  # fmt: skip


def count_difference(a: str, b: str, k1: int, n1: int, k2: int, n2: int, level: float = 0.95) -> Difference:
    """Two policies of which only the counts are known: Newcombe's interval and Fisher's exact test."""
    from scipy.stats import fisher_exact

    p = float(fisher_exact([[k1, n1 - k1], [k2, n2 - k2]]).pvalue)
    span = newcombe(k1, n1, k2, n2, level)
    return Difference(a, b, ALL, n1 + n2, k1 / n1 - k2 / n2, span, None, "Fisher exact", p, None, p)


# --- one policy, one pair -----------------------------------------------------------------------------------


def _describe(found: Outcomes, i: int, level: float, seed: int) -> PolicyResult:
    tasks = found.task[i]
    whole = found.values[i]  # (states, seeds)
    full = whole >= found.steps if found.metric == "chain" else whole > 0
    means = whole.mean(axis=1)
    success = rate(int(full.sum()), full.size, level)
    steps: tuple[Rate, ...] = ()
    if found.metric == "chain":
        steps = tuple(rate(int((whole >= k).sum()), whole.size, level) for k in range(1, found.steps + 1))
        span = bootstrap([means[tasks == task] for task in found.tasks], level, seed=seed)
    else:
        span = success.wilson
    return PolicyResult(
        name=found.names[i],
        mean=float(means.mean()),
        mean_interval=span,
        success=success,
        by_task={
            task: rate(int(full[tasks == task].sum()), full[tasks == task].size, level)
            for task in found.tasks
            if (tasks == task).any()
        },
        step_rates=steps,
        by_seed={name: float(column.mean()) for name, column in zip(found.seeds[i], whole.T, strict=True)},
    )


def _difference(found: Outcomes, i: int, j: int, task: str, level: float, seed: int) -> Difference:
    picked = [np.ones(len(found.task[k]), bool) if task == ALL else found.task[k] == task for k in (i, j)]
    a, b = found.values[i][picked[0]], found.values[j][picked[1]]
    names = (found.names[i], found.names[j])
    if not found.paired:
        return (_independent_chains if found.metric == "chain" else _independent)(names, task, a, b, level)
    tasks = found.task[i][picked[0]]
    each = a.mean(axis=1) - b.mean(axis=1)
    strata = [each[tasks == name] for name in found.tasks if (tasks == name).any()]
    scale = np.lcm(a.shape[1], b.shape[1])  # differences in whole numbers, so that equal ones are equal
    p, p_mid = sign_flip(np.rint(each * scale))
    told = Difference(
        *names, task, len(each), float(each.mean()), None,
        None, "sign flips over initial states, exact", p, p_mid,
        training=welch(a.mean(axis=0).tolist(), b.mean(axis=0).tolist(), level),
    )  # fmt: skip
    plain = found.metric == "success" and a.shape[1] == b.shape[1] == 1
    if task == ALL or not plain:
        told = replace(told, bootstrap=bootstrap(strata, level, seed=seed))
    if not plain:
        return told
    won, lost = int((each > 0).sum()), int((each < 0).sum())
    both = int(((a > 0) & (b > 0)).sum())
    return replace(
        told, test="McNemar exact", score=tango(won, lost, len(each), level),
        a_only=won, b_only=lost, both=both, neither=len(each) - won - lost - both,
    )  # fmt: skip


def _independent(names: tuple[str, str], task: str, a: np.ndarray, b: np.ndarray, level: float) -> Difference:
    """All successes of each as counts of independent samples."""
    told = count_difference(*names, int(a.sum()), a.size, int(b.sum()), b.size, level)
    return replace(told, task=task, p_holm=float("nan"))


def _independent_chains(names: tuple[str, str], task: str, a: np.ndarray, b: np.ndarray, level: float) -> Difference:
    """Mean chain lengths of independent samples: Welch's interval and t test."""
    from scipy.stats import ttest_ind

    left, right = a.ravel(), b.ravel()
    span = welch(left.tolist(), right.tolist(), level)
    difference = float(left.mean() - right.mean())
    p = float(difference == 0)  # without any spread: certainly equal or certainly not
    if span is not None:
        p = float(ttest_ind(left, right, equal_var=False).pvalue)
    return Difference(*names, task, left.size + right.size, difference, span, None, "Welch t", p, None)


def _corrected(differences: list[Difference]) -> list[Difference]:
    return [replace(one, p_holm=p) for one, p in zip(differences, holm([one.p for one in differences]), strict=True)]
