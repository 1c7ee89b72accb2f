"""Does VLM capability go with policy performance? The honest answer for a handful of models.

    result = correlate(paper.capability(), paper.performance())
    result.to_frame()            # a row per pair; result.pairs holds everything, result.to_dict() is the JSON

Every pair gets an exact permutation p, a Fisher interval, its influence by model and by lineage, and one verdict. Only
`positive`, `negative` and `practically none` are conclusions; anything a wide interval leaves open is `undetermined`.

Trap: models of one lineage are no independent draws. r over all models may be a contrast between lineages; then
permuting within lineages does not find it, and the verdict says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from probes import intervals
from probes.jsonable import jsonable
from probes.permutation import PermutationTest, permutation_test
from probes.power import detectable_rho
from probes.reliability import Homogeneity, Reliability, noise
from probes.scores import Scores, gather
from probes.verdict import judge
from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.results import Interval

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Estimate:
    """One coefficient: r, permutation p (|r*| >= |r|), 95 % Fisher interval (Bonett-Wright for ranks), and BCa."""

    r: float
    p_exact: float
    ci_fisher: Interval
    ci_bca: Interval | None


@dataclass(frozen=True)
class Point:
    """One model of a pair: its score, its value, and the value's 95 % interval where its episodes are known."""

    model: str
    lineage: str
    x: float
    y: float
    interval: Interval | None


@dataclass(frozen=True)
class Pair:
    """One capability score against one benchmark.

    p_method: "exact" (all n! arrangements) or "monte-carlo"; p_stderr is the latter's own error, for Pearson's p.
    p_holm, p_max_r: corrected over all pairs. p_within_lineage: only models of one lineage change places; None when no
    two share one or none is stated. within_lineage: r inside every lineage of at least three models.
    leave_one_out, leave_one_lineage_out: r without that model or lineage, None where it is undefined.
    role: "primary", "exploratory", or empty when no primary pair was declared.
    """

    capability: str
    benchmark: str
    metric: str
    role: str
    points: tuple[Point, ...]
    pearson: Estimate
    spearman: Estimate
    p_method: str
    p_stderr: float
    p_within_lineage: float | None
    within_lineage: dict[str, dict[str, Any]]
    leave_one_out: dict[str, float | None]
    leave_one_lineage_out: dict[str, dict[str, Any]]
    min_detectable_rho: float
    p_holm: float
    p_max_r: float
    reliability: Reliability | None
    homogeneity: Homogeneity | None
    verdict: str = ""
    why: str = ""

    @property
    def n(self) -> int:
        return len(self.points)

    @property
    def lineages(self) -> tuple[str, ...]:
        """The stated lineages, in order of first appearance."""
        return tuple(dict.fromkeys(point.lineage for point in self.points if point.lineage))

    def leave_one_out_range(self) -> tuple[tuple[str, float], tuple[str, float]] | None:
        """((model, lowest r), (model, highest r)): whose absence moves r most either way."""
        known = [(model, r) for model, r in self.leave_one_out.items() if r is not None]
        return (min(known, key=lambda it: it[1]), max(known, key=lambda it: it[1])) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not known for this pair is null."""
        values = asdict(self)
        values["n"] = self.n
        best = self.reliability
        values["ceiling"] = None
        if best is not None:
            values["ceiling"] = {
                "pooled": best.pooled**0.5,
                "stratified": None if best.stratified is None else best.stratified**0.5,
            }
        return values


@dataclass(frozen=True)
class Correlation:
    """All pairs, with the design they stand on. `unmatched`: models left out of some pair, and what they lack."""

    pairs: tuple[Pair, ...]
    models: tuple[str, ...]
    lineages: dict[str, int]
    benchmarks: dict[str, dict[str, Any]]
    units: dict[str, str]
    unmatched: dict[str, str]
    not_stated: tuple[str, ...]
    primary: str | None
    seed: int

    def to_frame(self) -> pd.DataFrame:
        """One row per pair: r with its p values and intervals, extremes under leave-one-out, verdict, why."""
        import pandas as pd

        rows = []
        for pair in self.pairs:
            ends = pair.leave_one_out_range() or (("", np.nan), ("", np.nan))
            rows.append(
                {
                    "capability": pair.capability,
                    "benchmark": pair.benchmark,
                    "n": pair.n,
                    "pearson_r": pair.pearson.r,
                    "low": pair.pearson.ci_fisher.low,
                    "high": pair.pearson.ci_fisher.high,
                    "p_exact": pair.pearson.p_exact,
                    "p_max_r": pair.p_max_r,
                    "p_holm": pair.p_holm,
                    "p_within_lineage": np.nan if pair.p_within_lineage is None else pair.p_within_lineage,
                    "spearman_r": pair.spearman.r,
                    "spearman_p": pair.spearman.p_exact,
                    "lowest_without": ends[0][0],
                    "lowest_r": ends[0][1],
                    "highest_without": ends[1][0],
                    "highest_r": ends[1][1],
                    "reliability": np.nan if pair.reliability is None else pair.reliability.best,
                    "min_detectable_rho": pair.min_detectable_rho,
                    "role": pair.role,
                    "verdict": pair.verdict,
                    "why": pair.why,
                }
            )
        return pd.DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON: design, unmatched models, and `pairs` with the fields of Pair."""
        design = {
            "models": list(self.models),
            "lineages": self.lineages,
            "benchmarks": self.benchmarks,
            "units": self.units,
            "not_stated": list(self.not_stated),
        }
        return jsonable(
            {
                "design": design,
                "unmatched": self.unmatched,
                "primary": self.primary,
                "seed": self.seed,
                "pairs": [pair.to_dict() for pair in self.pairs],
            }
        )


def correlate(
    capability: pd.DataFrame,
    performance: pd.DataFrame,
    episodes: pd.DataFrame | None = None,
    *,
    primary: str | None = None,
    seed: int = 0,
    names: tuple[str, str, str] = ("the capability table", "the performance table", "the episode rows"),
) -> Correlation:
    """Every capability score against every benchmark.

    capability: columns model, score (and benchmark, lineage, stderr, evaluator, unit…). performance: model, benchmark,
    value (and task, metric, lineage, successes, episodes, selection…; rows with a task tell about noise only).
    episodes: episode rows, whose counts by task then replace those of `performance`. primary: "CAPABILITY:BENCHMARK",
    the pair that was planned; the others are labelled exploratory. seed: for Monte-Carlo p above ten models,
    the bootstrap and the stratified homogeneity test. names: where the tables came from, for messages.

    Raises InputError for what `probes.scores.gather` refuses, for a benchmark with fewer than three models in common
    with a capability score or with a constant column, and for an unknown primary pair.
    """
    scores = gather(capability, performance, episodes, names)
    chosen = _primary(scores, primary)
    members = {
        (c, b): tuple(np.flatnonzero(np.isfinite(scores.x[:, c]) & np.isfinite(scores.y[:, b])).tolist())
        for c in range(len(scores.capabilities))
        for b in range(len(scores.benchmarks))
    }
    _check(scores, members)
    plain = _tests(scores, members, seed=seed)
    ranked = _tests(scores, members, seed=seed, ranks=True)
    within = _tests(scores, members, seed=seed, within=True)
    # One family over all pairs, all moved by the same arrangements: the test itself when every pair has every model.
    same = len(set(members.values())) == 1
    together = next(iter(plain.values()))[0] if same else permutation_test(scores.x, scores.y, seed=seed)
    holm_p = dict(zip(members, holm([plain[key][0].p[plain[key][1]] for key in members]), strict=True))

    pairs = []
    for key, rows in members.items():
        (test, at), (rank_test, rank_at) = plain[key], ranked[key]
        pair = _describe(scores, key, rows, seed)
        label = f"{pair.capability}:{pair.benchmark}"
        pair = replace(
            pair,
            role="" if chosen is None else "primary" if label == chosen else "exploratory",
            pearson=replace(pair.pearson, p_exact=float(test.p[at])),
            spearman=replace(pair.spearman, p_exact=float(rank_test.p[rank_at])),
            p_method="exact" if test.exact else "monte-carlo",
            p_stderr=float(test.p_stderr[at]),
            p_within_lineage=_within_p(within[key]),
            p_holm=holm_p[key],
            p_max_r=float(together.p_max[key]),
        )
        verdict, why = judge(pair, len(members))
        pairs.append(replace(pair, verdict=verdict, why=why))
    stated = [lineage for lineage in scores.lineages if lineage]
    return Correlation(
        pairs=tuple(pairs),
        models=scores.models,
        lineages={name: stated.count(name) for name in dict.fromkeys(stated)},
        benchmarks={name: _design(scores, b) for b, name in enumerate(scores.benchmarks)},
        units=scores.units,
        unmatched=scores.unmatched,
        not_stated=scores.not_stated,
        primary=chosen,
        seed=seed,
    )


# --- one pair ---------------------------------------------------------------------------------------------


def _describe(scores: Scores, key: tuple[int, int], rows: tuple[int, ...], seed: int) -> Pair:
    """Everything about a pair that needs no permutation; p values are filled in by the caller."""
    from scipy.stats import rankdata

    c, b = key
    picked = list(rows)
    x, y = scores.x[picked, c], scores.y[picked, b]
    names = [scores.models[i] for i in picked]
    lineages = np.array([scores.lineages[i] for i in picked], dtype=object)
    n = len(x)
    known = noise(scores, b, picked, seed)
    r = float(intervals.pearson(x, y))
    rank_r = float(intervals.pearson(rankdata(x), rankdata(y)))
    stated = [name for name in dict.fromkeys(lineages) if name]
    return Pair(
        capability=scores.capabilities[c],
        benchmark=scores.benchmarks[b],
        metric=scores.metrics[scores.benchmarks[b]],
        role="",
        points=tuple(
            Point(name, str(lineage), float(one), float(other), span)
            for name, lineage, one, other, span in zip(names, lineages, x, y, known.intervals, strict=True)
        ),
        pearson=Estimate(r, np.nan, intervals.fisher(r, n), intervals.bca(x, y, seed=seed)),
        spearman=Estimate(
            rank_r, np.nan, intervals.fisher(rank_r, n, ranks=True), intervals.bca(x, y, ranks=True, seed=seed)
        ),
        p_method="",
        p_stderr=np.nan,
        p_within_lineage=None,
        within_lineage={
            name: {"r": _r(x[lineages == name], y[lineages == name]), "n": int((lineages == name).sum())}
            for name in stated
            if (lineages == name).sum() >= 3
        },
        leave_one_out={name: _r(np.delete(x, i), np.delete(y, i)) for i, name in enumerate(names)},
        leave_one_lineage_out={
            name: {"r": _r(x[lineages != name], y[lineages != name]), "n": int((lineages != name).sum())}
            for name in stated
        },
        min_detectable_rho=detectable_rho(n),
        p_holm=np.nan,
        p_max_r=np.nan,
        reliability=known.reliability,
        homogeneity=known.homogeneity,
    )


def _r(x: np.ndarray, y: np.ndarray) -> float | None:
    """r, or None where it is undefined or means nothing (fewer than three models)."""
    if len(x) < 3:
        return None
    r = float(intervals.pearson(x, y))
    return None if np.isnan(r) else r


# --- tests over pairs -------------------------------------------------------------------------------------

Located = tuple[PermutationTest, tuple[int, int]]  # a test, and where a pair stands in its arrays


def _tests(
    scores: Scores,
    members: dict[tuple[int, int], tuple[int, ...]],
    *,
    seed: int,
    ranks: bool = False,
    within: bool = False,
) -> dict[tuple[int, int], Located]:
    """Permutation test of every pair over exactly its own models; pairs with the same models share one pass."""
    from scipy.stats import rankdata

    located: dict[tuple[int, int], Located] = {}
    for rows in dict.fromkeys(members.values()):
        keys = [key for key, own in members.items() if own == rows]
        cs, bs = sorted({c for c, _ in keys}), sorted({b for _, b in keys})
        picked = list(rows)
        x, y = scores.x[np.ix_(picked, cs)], scores.y[np.ix_(picked, bs)]
        if ranks:
            x, y = rankdata(x, axis=0, nan_policy="omit"), rankdata(y, axis=0, nan_policy="omit")
        blocks = _blocks([scores.lineages[i] for i in picked]) if within else None
        test = permutation_test(x, y, blocks=blocks, seed=seed)
        for c, b in keys:
            located[c, b] = (test, (cs.index(c), bs.index(b)))
    return located


def _blocks(lineages: Sequence[str]) -> list[list[int]]:
    """Rows of one lineage together; a model without a stated lineage stays where it is."""
    groups: dict[Any, list[int]] = {}
    for row, lineage in enumerate(lineages):
        groups.setdefault(lineage or row, []).append(row)
    return list(groups.values())


def _within_p(located: Located) -> float | None:
    test, at = located
    return float(test.p[at]) if test.arrangements > 1 else None


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979), in the order given."""
    values = np.asarray(p, dtype=float)
    order = np.argsort(values, kind="stable")
    adjusted = np.minimum(1.0, np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)))
    out = np.empty_like(values)
    out[order] = adjusted
    return out.tolist()


# --- checks and plain values ------------------------------------------------------------------------------


def _primary(scores: Scores, primary: str | None) -> str | None:
    """The declared pair's full label; a benchmark's name alone will do when there is one capability score."""
    if primary is None:
        return None
    labels = [f"{c}:{b}" for c in scores.capabilities for b in scores.benchmarks]
    short = scores.benchmarks if len(scores.capabilities) == 1 else ()
    for label, name in zip(labels, [*short, *labels][: len(labels)], strict=True):
        if primary in (label, name):
            return label
    raise InputError(f"there is no pair '{primary}'", where="primary", fix=nearest(primary, labels))


def _check(scores: Scores, members: dict[tuple[int, int], tuple[int, ...]]) -> None:
    for (c, b), rows in members.items():
        pair = f"{scores.capabilities[c]} and {scores.benchmarks[b]}"
        if len(rows) < 3:
            raise InputError(
                f"{len(rows)} model{'s' * (len(rows) != 1)} with both, a correlation needs at least 3",
                where=pair,
                fix="add models, or leave that benchmark or score out",
            )
        for name, values in (
            (scores.capabilities[c], scores.x[list(rows), c]),
            (scores.benchmarks[b], scores.y[list(rows), b]),
        ):
            if np.ptp(values) == 0:
                raise InputError(
                    f"all {len(rows)} models have the same value {values[0]:g}, which correlates with nothing",
                    where=name,
                    fix="leave it out",
                )


def _design(scores: Scores, b: int) -> dict[str, Any]:
    name = scores.benchmarks[b]
    counts = scores.task_counts.get(name)
    episodes = scores.episodes[:, b]
    tasks = {}
    if counts is not None:
        for column, task in enumerate(counts.tasks):
            tasks[task] = sorted({int(n) for n in counts.episodes[:, column] if np.isfinite(n)})
    return {
        "metric": scores.metrics[name],
        "episodes": sorted({int(n) for n in episodes if np.isfinite(n)}),
        "tasks": tasks,
        "selection": scores.selection[name],
    }
