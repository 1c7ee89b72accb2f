"""When two kinds of training part: how long they share a direction, and from which step on they lie apart.

    found = parting(paths.modules(), paths.arms, paths.seeds, paths.steps)
    found.modules["vision tower"].verdict          # "the arms part after step 64 (p 0.029)"

Everything rests on inner products of displacements of *different* runs, in which the noise of a seed cancels:
    corrected cosine(t) = mean <a_i, c_j> / sqrt(mean <a_i, a_j> mean <c_i, c_j>)
    excess(t) = mean |a_i - c_j|² / max(mean |a_i - a_j|², mean |c_i - c_j|²) - 1         (i, j of different seeds)
Trap: two runs of one arm lie apart too. Without seeds, any two trainings "diverge"; four seeds per arm allow no p below
2 / 70, and three none below 0.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

MIN_SEEDS = 4
LABELLINGS = 2000  # all of them up to here, else as many at random
LEVEL = 0.05


class When(NamedTuple):
    """A recorded step, None when it was not reached, between low and high (None: open on that side)."""

    step: int | None
    low: int | None
    high: int | None


@dataclass(frozen=True)
class ModuleParting:
    """One module over T recorded steps; None for what fewer than four seeds per arm do not allow.

    cosine, cosine_low, cosine_high (T,): corrected cosine of the arms' displacements, with a 95 % jackknife interval
    over runs; NaN below noise. naive (T,): mean cosine of single runs of different arms. same_a, same_c (T,): of
    different seeds of one arm. ceiling_low, ceiling_high (T,): range of the corrected cosine between halves of the
    seeds of one arm.
    floor (T,): 5 % quantile of the corrected cosine under permuted arm labels; arms that do not differ stay above.
    random (T,): 95 % quantile for directions that have nothing to do with each other. norm_matched (T,): corrected
    cosine with arm C taken where it has moved as far as A has at that step, NaN where it never has.
    excess (T,): see above, positive where the arms lie further apart than the seeds of either. critical: what its
    maximum over steps and modules exceeds once in twenty labellings. p: share of labellings whose maximum over steps is
    as large; p_all: over steps and modules. shared: last step of the shared phase. parted: divergence point.
    """

    name: str
    seeds: tuple[int, int]
    steps: np.ndarray
    cosine: np.ndarray
    cosine_low: np.ndarray
    cosine_high: np.ndarray
    naive: np.ndarray
    same_a: np.ndarray
    same_c: np.ndarray
    ceiling_low: np.ndarray
    ceiling_high: np.ndarray
    floor: np.ndarray
    random: np.ndarray
    norm_matched: np.ndarray
    excess: np.ndarray
    critical: float | None
    p: float | None
    p_all: float | None
    shared: When
    parted: When

    @property
    def estimable(self) -> bool:
        """Whether there are four seeds per arm."""
        return min(self.seeds) >= MIN_SEEDS

    @property
    def verdict(self) -> str:
        """One glance."""
        if not self.estimable:
            missing = " (no ceiling: a single seed)" if min(self.seeds) < 2 else ""
            return (
                f"not estimable with {self.seeds[0]} and {self.seeds[1]} seeds, {MIN_SEEDS} per arm are needed{missing}"
            )
        p = f"p {self.p_all:.3f} over all steps and modules"
        if self.p_all is None or self.p_all > LEVEL:
            return f"not distinguishable from seeds ({p})"
        if self.parted.step is None:
            return f"apart for a while and not at the last step: divergence point not reached ({p})"
        between = f"between step {self.parted.low} and {self.parted.high}"
        return f"the arms part after step {self.parted.step} ({between}; {p})"


@dataclass(frozen=True)
class Parting:
    """`ModuleParting` per module; arms: the names of A and C."""

    arms: tuple[str, str]
    modules: dict[str, ModuleParting]

    def to_frame(self) -> pd.DataFrame:
        """One row per module and step: module, step, cosine, cosine_low, …, excess."""
        import pandas as pd

        columns = [name for name, kind in ModuleParting.__annotations__.items() if kind == "np.ndarray"]
        parts = [
            pd.DataFrame({"module": name, **{column: getattr(found, column) for column in columns}})
            for name, found in self.modules.items()
        ]
        return pd.concat(parts, ignore_index=True).rename(columns={"steps": "step"})

    def verdicts(self) -> pd.DataFrame:
        """One row per module: module, seeds_a, seeds_c, p, p_all, shared_until, …, parted_after, …, verdict."""
        import pandas as pd

        rows = [
            {
                "module": name, "seeds_a": found.seeds[0], "seeds_c": found.seeds[1],
                "p": found.p, "p_all": found.p_all,
                "shared_until": found.shared.step, "shared_low": found.shared.low, "shared_high": found.shared.high,
                "parted_after": found.parted.step, "parted_low": found.parted.low, "parted_high": found.parted.high,
                "verdict": found.verdict,
            }
            for name, found in self.modules.items()
        ]  # fmt: skip
        frame = pd.DataFrame(rows)
        return frame.astype({name: float for name in frame if name not in ("module", "verdict")})


def parting(
    moved: Mapping[str, np.ndarray], arms: Sequence[str], seeds: Sequence[int], steps: Sequence[int] | np.ndarray,
    *, first: str | None = None, seed: int = 0,
) -> Parting:  # fmt: skip
    """Shared phase and divergence point per module.

    moved: module -> displacements (runs, T, k) from one base. arms, seeds: per run. steps (T,): their recorded steps.
    first: the arm called A ("language" when there is one, else the first by name). Pairs of one seed are left out of
    all means, since the same data order makes them alike. seed: of the labellings, where there are more than 2,000.
    Raises InputError for other than two arms and for displacements that are not (runs, T, k).
    """
    names = sorted(set(arms))
    if len(names) != 2:
        raise InputError(f"{len(names)} arms, and two are compared", fix="give runs of two kinds of training")
    first = first or ("language" if "language" in names else names[0])
    side = np.array([arm == first for arm in arms])
    steps, drawn = np.asarray(steps), np.asarray(seeds)
    for name, value in moved.items():
        if value.ndim != 3 or value.shape[:2] != (len(side), len(steps)):
            raise InputError(f"displacements {value.shape} are not ({len(side)}, {len(steps)}, k)", where=name)
    apart = (drawn[:, None] != drawn).astype(float)  # pairs that count
    grams = np.stack([np.einsum("itk,jtk->tij", value, value) for value in moved.values()])  # (U, T, n, n)
    enough = min(side.sum(), (~side).sum()) >= MIN_SEEDS
    labels = labellings(side, seed) if enough else side[None]
    maxima = np.nan_to_num(excess(grams, labels, apart), nan=-np.inf, posinf=np.inf).max(2)  # (L, U)
    whole = maxima.max(1)
    found = {}
    for number, (name, value) in enumerate(moved.items()):
        found[name] = _module(
            name, grams[number], value, side, apart, steps, labels, maxima[:, number] if enough else None, whole
        )
    return Parting((first, next(name for name in names if name != first)), found)


def labellings(side: np.ndarray, seed: int = 0) -> np.ndarray:
    """Ways to call as many runs A as there are, (L, n) bool, the given one first; at random beyond LABELLINGS."""
    from math import comb

    n, k = len(side), int(side.sum())
    if comb(n, k) <= LABELLINGS:
        every = np.zeros((comb(n, k), n), bool)
        for row, chosen in enumerate(combinations(range(n), k)):
            every[row, chosen] = True
        every = every[(every != side).any(1)]
    else:
        every = np.random.default_rng(seed).permuted(np.tile(side, (LABELLINGS - 1, 1)), axis=1)
    return np.concatenate([side[None], every])


def _means(values: np.ndarray, labels: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means over counted pairs within A, within C and between, of (…, n, n): each (L, …); NaN where there is none."""
    a, c = labels.astype(float), 1.0 - labels

    def mean(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        weights = left[:, :, None] * right[:, None, :] * pairs  # (L, n, n)
        count = weights.sum((1, 2))
        sums = np.tensordot(weights, values, axes=([1, 2], [values.ndim - 2, values.ndim - 1]))
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums / count.reshape(-1, *[1] * (values.ndim - 2))

    return mean(a, a), mean(c, c), mean(a, c)


def excess(grams: np.ndarray, labels: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Between-arm over the larger within-arm mean squared distance, minus 1: (L, …) from Gram matrices (…, n, n)."""
    own = np.diagonal(grams, axis1=-2, axis2=-1)
    squared = own[..., :, None] + own[..., None, :] - 2 * grams
    within_a, within_c, between = _means(squared, labels, pairs)
    with np.errstate(invalid="ignore", divide="ignore"):
        return between / np.fmax(within_a, within_c) - 1


def corrected(grams: np.ndarray, labels: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Corrected cosine (L, …) from Gram matrices (…, n, n), NaN below noise."""
    own_a, own_c, cross = _means(grams, labels, pairs)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((own_a > 0) & (own_c > 0), cross / np.sqrt(own_a * own_c), np.nan)


def _module(
    name: str, gram: np.ndarray, moved: np.ndarray, side: np.ndarray, apart: np.ndarray, steps: np.ndarray,
    labels: np.ndarray, null: np.ndarray | None, whole: np.ndarray,
) -> ModuleParting:  # fmt: skip
    estimate = corrected(gram, side[None], apart)[0]
    rest = [np.delete(np.arange(len(side)), run) for run in range(len(side))]
    without = np.stack([corrected(_of(gram, keep), side[None, keep], _of(apart, keep))[0] for keep in rest])
    half = _jackknife(without, side)
    cosines = corrected(gram, labels, apart)[1:] if null is not None else np.empty((0, len(steps)))
    floor = _quantile(cosines, LEVEL)
    norms = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
    with np.errstate(invalid="ignore", divide="ignore"):
        same_a, same_c, naive = (x[0] for x in _means(gram / norms[:, :, None] / norms[:, None, :], side[None], apart))
    halves = _halves(gram, side, apart)
    over = excess(gram, side[None], apart)[0]
    critical = p = p_all = None
    shared = parted = When(None, None, None)
    random = _random(moved, side, gram, apart)
    if null is not None:
        p, p_all = (float(np.mean(every >= null[0] - 1e-12)) for every in (null, whole))
        critical = float(np.quantile(whole[1:], 1 - LEVEL, method="higher"))
        parted = _parted(gram, side, apart, steps, over, critical)
        shared = _shared(steps, estimate, half, floor, random, cosines)
    return ModuleParting(
        name=name, seeds=(int(side.sum()), int((~side).sum())), steps=steps,
        cosine=estimate, cosine_low=estimate - half, cosine_high=estimate + half,
        naive=naive, same_a=same_a, same_c=same_c,
        ceiling_low=np.fmin.reduce(halves), ceiling_high=np.fmax.reduce(halves), floor=floor, random=random,
        norm_matched=_norm_matched(moved, side, apart),
        excess=over, critical=critical, p=p, p_all=p_all, shared=shared, parted=parted,
    )  # fmt: skip


def _of(matrix: np.ndarray, keep: np.ndarray) -> np.ndarray:
    return matrix[..., keep[:, None], keep]


def _quantile(values: np.ndarray, level: float) -> np.ndarray:
    """Quantile over the first axis of what is known; NaN where nothing is."""
    ordered = np.sort(values, axis=0)  # NaN last
    known = np.isfinite(values).sum(0)
    place = np.minimum((level * known).astype(int), np.maximum(known - 1, 0))
    if not len(ordered):
        return np.full(values.shape[1:], np.nan)
    return np.take_along_axis(ordered, place[None], 0)[0]


def _jackknife(without: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Half width (T,) of a 95 % interval from the estimates without one run each, by arm; NaN with a single seed."""
    from scipy.stats import t

    variance = np.zeros(without.shape[1])
    for arm in (side, ~side):
        n, values = int(arm.sum()), without[arm]
        variance += (n - 1) / n * np.square(values - values.mean(0)).sum(0) if n > 1 else np.nan
    return t.ppf(0.975, max(len(side) - 2, 1)) * np.sqrt(variance)


def _halves(gram: np.ndarray, side: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """Corrected cosine (splits, T) between halves of one arm's seeds, NaN where an arm has fewer than four."""
    found = [np.full((1, len(gram)), np.nan)]
    for arm in (side, ~side):
        runs = np.flatnonzero(arm)
        if len(runs) < MIN_SEEDS:
            continue
        split = np.zeros(len(runs), bool)
        split[: len(runs) // 2] = True
        found.append(corrected(_of(gram, runs), labellings(split), _of(apart, runs)))
    return np.concatenate(found)


def _random(moved: np.ndarray, side: np.ndarray, gram: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """95 % quantile (T,) of the corrected cosine when arm A's directions are turned at random."""
    own_a, own_c, _ = (value[0] for value in _means(gram, side[None], apart))
    length = np.linalg.norm(moved[side].mean(0), axis=1) * np.linalg.norm(moved[~side].mean(0), axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((own_a > 0) & (own_c > 0), 1.645 * length / np.sqrt(own_a * own_c * moved.shape[2]), np.nan)


def _norm_matched(moved: np.ndarray, side: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """Corrected cosine (T,) of A at each step with C on the straight line between its recorded points where it has
    moved as far (root mean square over runs); NaN beyond C's last point."""
    c = np.concatenate([np.zeros_like(moved[~side, :1]), moved[~side]], axis=1)
    lengths = np.sqrt(np.square(c).sum(2).mean(0))  # (T + 1,)
    found = np.full(moved.shape[1], np.nan)
    for t, wanted in enumerate(np.sqrt(np.square(moved[side]).sum(2).mean(0))):
        beyond = np.flatnonzero(lengths >= wanted)
        if wanted <= 0 or not len(beyond):
            continue
        u = max(int(beyond[0]), 1)
        span = lengths[u] - lengths[u - 1]
        share = (wanted - lengths[u - 1]) / span if span > 0 else 1.0
        both = np.zeros((len(side), moved.shape[2]))
        both[side], both[~side] = moved[side, t], c[:, u - 1] + share * (c[:, u] - c[:, u - 1])
        found[t] = corrected(both @ both.T, side[None], apart)[0]
    return found


def _from_then_on(holds: np.ndarray) -> int | None:
    """First place from which on a condition holds at every later one, None when it does not hold at the last."""
    failing = np.flatnonzero(~holds)
    first = int(failing[-1]) + 1 if len(failing) else 0
    return first if first < len(holds) else None


def _parted(
    gram: np.ndarray, side: np.ndarray, apart: np.ndarray, steps: np.ndarray, over: np.ndarray, critical: float
) -> When:
    """The step after which the excess stays positive: the one before its first. Low: the least that leaving out one
    seed of each arm gives. High: the step before the excess stays above what labels at random reach."""

    def before(place: int | None) -> int | None:
        return None if place is None else 0 if place == 0 else int(steps[place - 1])

    point, high = before(_from_then_on(over > 0)), before(_from_then_on(over > critical))
    if point is None or high is None:
        return When(None, None, None)
    fewer = []
    for a in np.flatnonzero(side):
        for c in np.flatnonzero(~side):
            keep = np.delete(np.arange(len(side)), [a, c])
            fewer.append(before(_from_then_on(excess(_of(gram, keep), side[None, keep], _of(apart, keep))[0] > 0)))
    low = min([point, *(found for found in fewer if found is not None)])
    return When(point, low, high)


def _shared(
    steps: np.ndarray, cosine: np.ndarray, half: np.ndarray, floor: np.ndarray, random: np.ndarray, null: np.ndarray
) -> When:
    """Last step of the phase in which both arms move one way: more alike than by chance from the first step on, and
    not below the floor for good. None when the first step is not. Low: before the jackknife interval leaves the ceiling
    of 1 for good; high: where the cosine lies below everything that permuted labels give, open when it never does."""
    alike = cosine > random
    if not alike[0]:
        return When(None, None, None)
    last = len(steps)
    ends = [last, *np.flatnonzero(~alike)[:1]]
    below = _from_then_on(cosine < floor)
    end = min([*ends, last if below is None else below]) - 1
    if end < 0:
        return When(None, None, None)
    early = _from_then_on(cosine + half < 1)
    late = _from_then_on(cosine <= np.fmin.reduce(null) + 1e-12)  # exchanged names give the same cosine
    low = max(min(end, last - 1 if early is None else early - 1), 0)
    high = None if late is None else max(int(late), end)
    return When(int(steps[end]), int(steps[low]), None if high is None else int(steps[min(high, last - 1)]))
