"""What `correlate` returns: pairs of a capability score and a benchmark, and the design they stand on.

Trap: a pair's numbers are over its own models; pairs of one result may differ in n.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probes.attenuation import Attenuated
from probes.homogeneity import Homogeneity
from probes.jsonable import jsonable
from probes.lineages import Within
from probes.mixed import Opinion
from probes.outlook import Outlook
from probes.reliability import Reliability
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
class Equivalence:
    """Is |rho| below margin? p of two one-sided tests, the n of 80 % power at rho 0, the n below which it must fail."""

    margin: float
    p: float
    n_for_80_power: int
    cannot_succeed_below: int


@dataclass(frozen=True)
class Pair:
    """One capability score against one benchmark.

    p_method: "exact" (all n! arrangements) or "monte-carlo"; p_stderr is the latter's own error, for Pearson's p.
    p_holm, p_max_r: corrected over all pairs. p_within_lineage: only models of one lineage change places, which gives
    so many arrangements; None when no two share one or none is stated. within_lineage_centred: the same for r of the
    deviations from the lineages' means. within_lineage: r inside every lineage of at least three models.
    false_alarms: share of variance between lineages -> how often p_exact < 0.05 without any correlation.
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
    arrangements_within_lineage: int
    within_lineage_centred: Within | None
    false_alarms: dict[str, float] | None
    within_lineage: dict[str, dict[str, Any]]
    leave_one_out: dict[str, float | None]
    leave_one_lineage_out: dict[str, dict[str, Any]]
    min_detectable_rho: float
    p_holm: float
    p_max_r: float
    reliability: Reliability | None
    homogeneity: Homogeneity | None
    attenuated: Attenuated
    mixed: Opinion
    equivalence: Equivalence
    power: Outlook
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
