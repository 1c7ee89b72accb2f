"""Does VLM capability go with policy performance? The honest answer for a handful of models.

    result = correlate(paper.capability(), paper.performance())
    result.to_frame()            # a row per pair; result.pairs holds everything, result.to_dict() is the JSON

Every pair gets an exact permutation p, a Fisher interval, its influence by model and by lineage, and one verdict. Only
`positive`, `negative` and `practically none` are conclusions; anything a wide interval leaves open is `undetermined`.

Trap: models of one lineage are no independent draws. r over all models may be a contrast between lineages; then
permuting within lineages does not find it, and the verdict says so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from probes import intervals, lineages
from probes.attenuation import corrected
from probes.mixed import opinion
from probes.outlook import outlook
from probes.pairs import Correlation, Equivalence, Estimate, Pair, Point
from probes.permutation import PermutationTest, holm, permutation_test
from probes.power import detectable_rho, equivalence_floor, equivalence_n
from probes.reliability import noise
from probes.scores import Scores, gather
from probes.verdict import NEGLIGIBLE, judge
from vlm4vla_core.errors import InputError, nearest

if TYPE_CHECKING:
    import pandas as pd


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
            arrangements_within_lineage=within[key][0].arrangements,
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
    stated = [name for name in scores.lineages if name]
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
    kin = np.array([scores.lineages[i] for i in picked], dtype=object)
    n = len(x)
    known = noise(scores, b, picked, seed)
    sure = known.reliability
    r = float(intervals.pearson(x, y))
    rank_r = float(intervals.pearson(rankdata(x), rankdata(y)))
    stated = [name for name in dict.fromkeys(kin) if name]
    own = lineages.centred_test(x, y, kin.tolist(), seed=seed) if stated else None
    return Pair(
        capability=scores.capabilities[c],
        benchmark=scores.benchmarks[b],
        metric=scores.metrics[scores.benchmarks[b]],
        role="",
        points=tuple(
            Point(name, str(lineage), float(one), float(other), span)
            for name, lineage, one, other, span in zip(names, kin, x, y, known.intervals, strict=True)
        ),
        pearson=Estimate(r, np.nan, intervals.fisher(r, n), intervals.bca(x, y, seed=seed)),
        spearman=Estimate(
            rank_r, np.nan, intervals.fisher(rank_r, n, ranks=True), intervals.bca(x, y, ranks=True, seed=seed)
        ),
        p_method="",
        p_stderr=np.nan,
        p_within_lineage=None,
        arrangements_within_lineage=1,
        within_lineage={
            name: {"r": _r(x[kin == name], y[kin == name]), "n": int((kin == name).sum())}
            for name in stated
            if (kin == name).sum() >= 3
        },
        leave_one_out={name: _r(np.delete(x, i), np.delete(y, i)) for i, name in enumerate(names)},
        leave_one_lineage_out={
            name: {"r": _r(x[kin != name], y[kin != name]), "n": int((kin != name).sum())} for name in stated
        },
        min_detectable_rho=detectable_rho(n),
        p_holm=np.nan,
        p_max_r=np.nan,
        within_lineage_centred=own,
        false_alarms=lineages.false_alarms(kin.tolist()) if stated else None,
        reliability=sure,
        homogeneity=known.homogeneity,
        attenuated=corrected(
            r,
            n,
            None if sure is None else sure.best,
            _capability_reliability(x, scores.stderr[picked, c]),
            source="" if sure is None else "pooled" if sure.stratified is None else "stratified",
            seed=seed,
        ),
        mixed=opinion(scores, b, picked, x),
        equivalence=Equivalence(
            margin=NEGLIGIBLE,
            p=intervals.equivalence_p(r, n, NEGLIGIBLE),
            n_for_80_power=equivalence_n(NEGLIGIBLE),
            cannot_succeed_below=equivalence_floor(NEGLIGIBLE),
        ),
        power=outlook(n, None if sure is None else sure.best, _mean(known.episodes)),
    )


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if np.isfinite(values).all() else None


def _capability_reliability(x: np.ndarray, stderr: np.ndarray) -> float | None:
    """1 - mean sampling variance / variance of the scores, when every model's standard error is stated."""
    if not np.isfinite(stderr).all():
        return None
    return max(0.0, float(1 - (stderr**2).mean() / x.var(ddof=1)))


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
        blocks = lineages.blocks([scores.lineages[i] for i in picked]) if within else None
        test = permutation_test(x, y, blocks=blocks, seed=seed)
        for c, b in keys:
            located[c, b] = (test, (cs.index(c), bs.index(b)))
    return located


def _within_p(located: Located) -> float | None:
    test, at = located
    return float(test.p[at]) if test.arrangements > 1 else None


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
        episodes = np.where(np.isfinite(episodes), episodes, counts.episodes.sum(axis=1))
        for column, task in enumerate(counts.tasks):
            tasks[task] = sorted({int(n) for n in counts.episodes[:, column] if np.isfinite(n)})
    return {
        "metric": scores.metrics[name],
        "episodes": sorted({int(n) for n in episodes if np.isfinite(n)}),
        "tasks": tasks,
        "selection": scores.selection[name],
    }
