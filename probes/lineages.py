"""Models of one lineage are no independent draws: what that does to a correlation, and two tests that allow for it.

Both exchange models within their lineages only. `p_within_lineage` keeps the overall |r| as its statistic; once
lineages lie far apart it can hardly change, and its p is close to one-sided. The centred one takes r of the deviations
from each lineage's mean: what is left when every contrast between lineages is taken away.

Trap: neither finds anything where hardly two models share a lineage; the number of arrangements says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from probes.intervals import pearson
from probes.permutation import permutation_test
from probes.power import critical_r

SHARED = (0.5, 0.7, 0.9)  # shares of a score's variance that lie between lineages


@dataclass(frozen=True)
class Within:
    """r of the deviations from the lineages' means, its permutation p, and how many arrangements there are."""

    r: float
    p: float
    arrangements: int


def blocks(lineages: Sequence[str]) -> list[list[int]]:
    """Rows of one lineage together; a model without a stated lineage stays where it is."""
    groups: dict[Any, list[int]] = {}
    for row, lineage in enumerate(lineages):
        groups.setdefault(lineage or row, []).append(row)
    return list(groups.values())


def centred_test(x: np.ndarray, y: np.ndarray, lineages: Sequence[str], *, seed: int = 0) -> Within | None:
    """x, y: (models,). None when no lineage has two models that differ in x and two that differ in y."""
    groups = blocks(lineages)
    x, y = _centred(x, groups), _centred(y, groups)
    if not (np.ptp(x) > 0 and np.ptp(y) > 0):
        return None
    test = permutation_test(x[:, None], y[:, None], blocks=groups, seed=seed)
    return Within(float(pearson(x, y)), float(test.p[0, 0]), test.arrangements)


def _centred(values: np.ndarray, groups: list[list[int]]) -> np.ndarray:
    out = np.zeros(len(values))
    for group in groups:
        mean = values[group].mean()
        out[group] = np.where(np.abs(values[group] - mean) > 1e-12 * np.abs(values).max(), values[group] - mean, 0.0)
    return out


def false_alarms(lineages: Sequence[str]) -> dict[str, float] | None:
    """How often a 5 % test over all models would find a correlation where only lineages differ, by simulation.

    Keys: the share of each score's variance that lies between lineages (the same for capability and performance, which
    are independent of each other). The null of the permutation test at n models is taken as the t test of r, which it
    equals for normal scores to within a percentage point. None below four models or when no two share a lineage.
    """
    sizes = tuple(sorted(map(len, blocks(lineages))))
    return None if sum(sizes) < 4 or max(sizes) < 2 else dict(_false_alarms(sizes))


@lru_cache(maxsize=64)
def _false_alarms(sizes: tuple[int, ...], draws: int = 20_000) -> tuple[tuple[str, float], ...]:
    rng, n = np.random.default_rng(0), sum(sizes)
    member = np.repeat(np.arange(len(sizes)), sizes)
    rates = []
    for share in SHARED:
        between, own = rng.normal(size=(2, draws, len(sizes))), rng.normal(size=(2, draws, n))
        x, y = np.sqrt(share) * between[..., member] + np.sqrt(1 - share) * own
        rates.append((f"{share:g}", float((np.abs(pearson(x, y)) > critical_r(n)).mean())))
    return tuple(rates)
