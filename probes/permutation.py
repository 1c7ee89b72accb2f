"""Exact permutation p-values of correlations: every arrangement where that is possible, seeded draws where not.

Two-sided rule, fixed here and used everywhere: an arrangement counts when |r*| >= |r| - 1e-12. (scipy's
`permutation_test` doubles the smaller tail instead, which is another number for skewed nulls.)

Trap: scores may be missing for some models; then an arrangement changes which models a pair has in common, and r*
is computed over those.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import factorial, prod

import numpy as np

TOLERANCE = 1e-12
ENUMERATE_UP_TO = factorial(10)  # arrangements; 3.6 million take about two seconds
_CHUNK = factorial(8)


@dataclass(frozen=True)
class PermutationTest:
    """r, p, p_max, p_stderr: (score, benchmark) arrays. p_max: p of each |r| against the largest |r*| of all pairs.

    Where pairs differ in their number of models, |r| is first put on the scale |z| sqrt(n - 3) of Fisher's z: otherwise
    pairs of few models, whose |r*| is large by chance, would decide the maximum for everybody.

    exact: every arrangement was counted. Otherwise p has the Monte-Carlo standard error p_stderr (zero when exact).
    """

    r: np.ndarray
    p: np.ndarray
    p_max: np.ndarray
    p_stderr: np.ndarray
    arrangements: int
    exact: bool


def permutation_test(
    x: np.ndarray,
    y: np.ndarray,
    *,
    blocks: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
    draws: int = 200_000,
    enumerate_up_to: int = ENUMERATE_UP_TO,
) -> PermutationTest:
    """Pearson r of every column of x with every column of y, and their p when rows of x change places.

    x: (n, scores); y: (n, benchmarks); NaN marks a missing value. All columns of x move together, so the dependence
    among scores and among benchmarks stays as it is: that is what makes p_max sharper than Bonferroni.
    blocks: rows that may change places with each other (default: all of them, one block). Spearman: pass ranks.
    Above `enumerate_up_to` arrangements, `draws` random ones: p = (1 + count) / (1 + draws).
    """
    n = len(x)
    groups = [np.asarray(block, dtype=np.int64) for block in (blocks if blocks is not None else [range(n)])]
    total = prod(factorial(len(group)) for group in groups)
    exact = total <= enumerate_up_to
    known, values, squares = _moments(x)
    other = _moments(y)
    identity = np.arange(n)[None]
    signed = _correlations(identity, known, values, squares, other)[0][0]
    threshold = np.abs(signed) - TOLERANCE  # (scores, benchmarks)
    goal = _comparable(*_correlations(identity, known, values, squares, other))[0] - TOLERANCE
    above, above_max = np.zeros(signed.shape, np.int64), np.zeros(signed.shape, np.int64)
    source = _every(n, groups, total) if exact else _drawn(n, groups, draws, np.random.default_rng(seed))
    for arrangements in source:
        r, count = _correlations(arrangements, known, values, squares, other)  # (chunk, scores, benchmarks)
        above += (np.abs(r) >= threshold).sum(axis=0)
        above_max += (_comparable(r, count).max(axis=(1, 2))[:, None, None] >= goal).sum(axis=0)
    tried = total if exact else draws
    p, p_max = ((hits + (not exact)) / (tried + (not exact)) for hits in (above, above_max))
    stderr = np.zeros_like(p) if exact else np.sqrt(p * (1 - p) / draws)
    return PermutationTest(signed, p, p_max, stderr, tried, exact)


def _moments(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Known mask, standardised values (0 where unknown) and their squares, each (n, columns)."""
    columns = np.asarray(columns, dtype=np.float64)
    known = np.isfinite(columns)
    centred = columns - np.nanmean(columns, axis=0)
    scale = np.sqrt(np.nanmean(centred**2, axis=0))
    values = np.where(known, centred / np.where(scale > 0, scale, 1.0), 0.0)
    return known.astype(np.float64), values, values**2


def _comparable(r: np.ndarray, count: np.ndarray | None) -> np.ndarray:
    """|r|, or |z| sqrt(n - 3) when the pairs' n differ; (chunk, scores, benchmarks)."""
    if count is None:
        return np.abs(r)
    return np.arctanh(np.minimum(np.abs(r), 1 - 1e-9)) * np.sqrt(np.maximum(count - 3, 0.0))


def _correlations(
    arrangements: np.ndarray, known: np.ndarray, values: np.ndarray, squares: np.ndarray, other: tuple
) -> tuple[np.ndarray, np.ndarray | None]:
    """r of each arrangement of x's rows over the rows known on both sides, and their number where it varies.

    Both (chunk, scores, benchmarks).
    """
    y_known, y, y_squares = other
    if known.all() and y_known.all() and squares.any(axis=0).all() and y_squares.any(axis=0).all():
        # Nothing missing, nothing constant: the moments are those of the standardised columns, 0 and 1.
        return np.stack([values[arrangements, score] @ y for score in range(values.shape[1])], axis=1) / len(y), None
    out = np.empty((len(arrangements), values.shape[1], y.shape[1]))
    counts = np.empty_like(out)
    for score in range(values.shape[1]):
        m, x, x2 = known[arrangements, score], values[arrangements, score], squares[arrangements, score]  # (chunk, n)
        count = np.maximum(m @ y_known, 1.0)  # (chunk, benchmarks)
        sum_x, sum_y = x @ y_known, m @ y
        covariance = x @ y - sum_x * sum_y / count
        spread = (x2 @ y_known - sum_x**2 / count) * (m @ y_squares - sum_y**2 / count)
        # Fewer than three common rows, or a constant column among them: no correlation, so it counts as zero.
        defined = (count > 2.5) & (spread > 1e-18)
        out[:, score] = np.where(defined, covariance / np.sqrt(np.where(defined, spread, 1.0)), 0.0)
        counts[:, score] = count
    return out, counts


def _every(n: int, groups: list[np.ndarray], total: int) -> Iterator[np.ndarray]:
    """Chunks of all arrangements, (chunk, n): the arrangement's number is written in mixed radix, a digit per group."""
    tables = [permutation_table(len(group)) for group in groups]
    for start in range(0, total, _CHUNK):
        number = np.arange(start, min(start + _CHUNK, total))
        arrangements = np.tile(np.arange(n), (len(number), 1))
        for group, table in zip(groups, tables, strict=True):
            number, digit = np.divmod(number, len(table))
            arrangements[:, group] = group[table[digit]]
        yield arrangements


def _drawn(n: int, groups: list[np.ndarray], draws: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    for start in range(0, draws, _CHUNK):
        arrangements = np.tile(np.arange(n), (min(_CHUNK, draws - start), 1))
        for group in groups:
            arrangements[:, group] = rng.permuted(arrangements[:, group], axis=1)
        yield arrangements


def permutation_table(n: int) -> np.ndarray:
    """All n! permutations of 0…n-1, (n!, n) int8; built by putting each next number at every place."""
    table = np.zeros((1, 0), dtype=np.int8)
    for number in range(n):
        table = np.concatenate([np.insert(table, place, number, axis=1) for place in range(number + 1)])
    return table


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979), in the order given."""
    values = np.asarray(p, dtype=float)
    order = np.argsort(values, kind="stable")
    adjusted = np.minimum(1.0, np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)))
    out = np.empty_like(values)
    out[order] = adjusted
    return out.tolist()
