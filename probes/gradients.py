"""The angle between the gradients of two losses, corrected for the noise of mini-batches.

    gradient_cosines(parameters, groups, loss_a, loss_c).to_frame()      # one row per module group, and "all"

Each loss gives K batches of two independent halves. Products of gradients of different draws estimate <g, g'> of the
expected gradients without bias, since the noise of two draws is independent; so

    corrected = mean <g_A, g_C> / sqrt(mean <g_A, g_A'> mean <g_C, g_C'>)        (g, g' different half-batches)

Trap: the naive cosine of two mini-batch gradients is small whatever the objectives want. At a signal-to-noise ratio s
= |g|² / E|noise|² of one half it reads 2s / (1 + 2s) of the truth: "nearly orthogonal" is then the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from probes.weights import network_order
from vlm4vla_core.errors import InputError
from vlm4vla_core.results import Interval

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor


FLOOR = 1e-4  # of the mean second moment of a module group


class GradientCosine(NamedTuple):
    """Gradients of loss A and loss C with respect to one module group, from K batches of two halves each.

    naive: cosine as one batch shows it. corrected: split-half corrected, None below noise. interval: of the
    corrected one, by bootstrap over batches, None when too many resamples are below noise. snr_a, snr_c: |g|² /
    E|noise|² of one half-batch (may be negative when nothing but noise was seen). norm_a, norm_c: estimated |g|
    of the expected gradient, None below noise. verdict: a word for `corrected is None`.
    """

    group: str
    n_params: int
    naive: float | None
    corrected: float | None
    interval: Interval | None
    snr_a: float
    snr_c: float
    norm_a: float | None
    norm_c: float | None
    verdict: str


@dataclass(frozen=True)
class GradientDivergence:
    """One `GradientCosine` per module group and one over all ("all"), from `batches` batches per loss.

    rows: of losses A and C as they are. others: (pair, form) -> the same for another pair of losses ("A-F", "C-F") or
    for AdamW's steps ("adamw") instead of plain gradients ("raw").
    """

    rows: tuple[GradientCosine, ...]
    batches: int
    all_pairs: bool
    others: dict[tuple[str, str], tuple[GradientCosine, ...]] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """group, n_params, naive, corrected, low, high, snr_a, snr_c, norm_a, norm_c, share_a, share_c, verdict.

        share: the group's part of |g|² of the expected gradient. None -> NaN.
        """
        return _frame(self.rows)

    def long_frame(self) -> pd.DataFrame:
        """As `to_frame` for every pair of losses and both forms: pair, form, group, …"""
        import pandas as pd

        every = {("A-C", "raw"): self.rows, **self.others}
        parts = []
        for (pair, form), rows in every.items():
            frame = _frame(rows)
            frame.insert(0, "form", form)
            frame.insert(0, "pair", pair)
            parts.append(frame)
        return pd.concat(parts, ignore_index=True)


def _frame(rows: tuple[GradientCosine, ...]) -> pd.DataFrame:
    import pandas as pd

    flat, whole = [], rows[-1]
    for row in rows:
        values = row._asdict()
        low, high = values.pop("interval") or (None, None)
        for side in "ac":
            part, total = values[f"norm_{side}"], getattr(whole, f"norm_{side}")
            values[f"share_{side}"] = None if part is None or total is None else (part / total) ** 2
        flat.append(values | {"low": low, "high": high})
    columns = ["group", "n_params", "naive", "corrected", "low", "high", "snr_a", "snr_c", "norm_a", "norm_c"]
    columns += ["share_a", "share_c"]
    return pd.DataFrame(flat)[[*columns, "verdict"]].astype(dict.fromkeys(columns[2:], float))


def gradient_cosines(
    parameters: Mapping[str, Any],
    groups: Mapping[str, str],
    loss_a: Callable[[int, int], Tensor],
    loss_c: Callable[[int, int], Tensor],
    loss_f: Callable[[int, int], Tensor] | None = None,
    *,
    batches: int = 16,
    pilots: int = 0,
    memory_gb: float = 2.0,
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> GradientDivergence:
    """Cosine of the gradients of two losses (or three) at the parameters as they stand, per module group.

    parameters: name -> torch Parameter; groups: name -> module group (a parameter in no group is left out).
    loss_a, loss_c, loss_f: (batch k, half 0 or 1) -> scalar loss of an independent draw of data. pilots: batches
    beyond the others, each loss's own, from which AdamW's second moments v are taken (0: plain gradients alone); its
    step is g / (sqrt(v) + 1e-8), and 0 where no pilot saw a gradient; v counts as at least a ten-thousandth of its mean
    over the group, or the rows of rare words, of which the pilots saw next to nothing, would be all of the step.
    All half-batch gradients (float32) are kept for all-pairs products when they fit `memory_gb`, else only those of the
    current batch, which costs precision, not correctness. The weights and their `.grad` are left as they are.
    Raises InputError for fewer than 2 batches and for a loss that is not finite.
    """
    if batches < 2:
        raise InputError(f"{batches} batch cannot give an interval over batches", fix="use --batches 2 or more")
    names = [name for name in parameters if name in groups]
    members: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        members.setdefault(groups[name], []).append(place)
    members = {group: members[group] for group in sorted(members, key=network_order)}
    weights = [parameters[name] for name in names]
    size = sum(weight.numel() for weight in weights)
    losses = {"A": loss_a, "C": loss_c, **({"F": loss_f} if loss_f else {})}
    forms = ("raw", "adamw") if pilots else ("raw",)
    rows = 2 * batches * len(losses)
    all_pairs = 4 * rows * size * len(forms) <= memory_gb * 1e9
    grams = {(form, group): np.full((rows, rows), np.nan) for form in forms for group in members}
    kept: list[tuple[int, dict[tuple[str, str], Tensor]]] = []
    with requiring_gradients(weights):
        moments = {side: _moments(loss, weights, members, side, batches, pilots) for side, loss in losses.items()}
        for k in range(batches):
            if not all_pairs:
                kept = []
            for number, (side, loss) in enumerate(losses.items()):
                for half in (0, 1):
                    place = 2 * (number * batches + k) + half
                    found = _gradient(loss(k, half), weights, members, side)
                    vectors = {("raw", group): vector for group, vector in found.items()}
                    for group, scale in moments[side].items():
                        vectors["adamw", group] = found[group] * scale
                    kept.append((place, vectors))
                    for other, theirs in kept:
                        for key, vector in vectors.items():
                            product = float(vector.double().dot(theirs[key].double()))
                            grams[key][place, other] = grams[key][other, place] = product
                    if progress:
                        progress(1)
    counts = {group: sum(weights[place].numel() for place in places) for group, places in members.items()}
    results: dict[tuple[str, str], tuple[GradientCosine, ...]] = {}
    for form in forms:
        of_form = {group: grams[form, group] for group in members}
        of_form["all"] = np.sum(list(of_form.values()), axis=0)
        for (i, one), (j, two) in combinations(enumerate(losses), 2):
            rows_of = np.concatenate([np.arange(2 * batches) + 2 * batches * side for side in (i, j)])
            results[f"{one}-{two}", form] = tuple(
                cosine_from_gram(gram[np.ix_(rows_of, rows_of)], group, counts.get(group, size), resamples, seed)
                for group, gram in of_form.items()
            )
    return GradientDivergence(results.pop(("A-C", "raw")), batches, all_pairs, results)


def _moments(
    loss: Callable[[int, int], Tensor], weights: list[Any], members: Mapping[str, list[int]], side: str,
    batches: int, pilots: int,
) -> dict[str, Tensor]:  # fmt: skip
    """Per module group what AdamW multiplies a gradient by, from pilot batches that are used for nothing else."""
    import torch

    squares: dict[str, Tensor] = {}
    for k in range(batches, batches + pilots):
        for half in (0, 1):
            for group, vector in _gradient(loss(k, half), weights, members, side).items():
                squares[group] = squares.get(group, torch.zeros(())) + vector.square() / (2 * pilots)
    return {
        group: torch.where(v > 0, 1 / (v.clamp(min=FLOOR * float(v.mean())).sqrt() + 1e-8), 0.0)
        for group, v in squares.items()
    }


def cosine_from_gram(gram: np.ndarray, group: str = "", n_params: int = 0, resamples: int = 1000, seed: int = 0,
                     level: float = 0.95) -> GradientCosine:  # fmt: skip
    """The estimates from all known inner products of half-batch gradients.

    gram (4K, 4K): rows A half 0 and 1 of batch 0, of batch 1, …, then C alike; NaN where not known. Products of
    different half-batches estimate <g, g'> without noise, since the noise of two draws is independent.
    """
    pairs = _Pairs(gram)
    ones = np.ones((1, pairs.batches))
    cross, own_a, own_c, full_a, full_c, half_a, half_c = (float(value[0]) for value in pairs.estimates(ones))
    naive = cross / np.sqrt(full_a * full_c) if full_a > 0 and full_c > 0 else None
    corrected = interval = None
    if not (half_a > 0 and half_c > 0):
        verdict = "no gradient"
    elif not (own_a > 0 and own_c > 0):
        verdict = "below noise"
    else:
        corrected, verdict = cross / np.sqrt(own_a * own_c), ""
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(pairs.batches, np.full(pairs.batches, 1 / pairs.batches), size=resamples)
        cross_r, a_r, c_r, *_ = pairs.estimates(drawn.astype(np.float64))
        good = (a_r > 0) & (c_r > 0)
        if good.mean() < level + (1 - level) / 2:
            verdict = "too noisy for an interval"
        else:
            draws = cross_r[good] / np.sqrt(a_r[good] * c_r[good])
            interval = _expanded(corrected, draws, pairs.batches, level)
    return GradientCosine(
        group=group,
        n_params=n_params,
        naive=naive,
        corrected=corrected,
        interval=interval,
        snr_a=own_a / (half_a - own_a) if half_a != own_a else float("inf"),
        snr_c=own_c / (half_c - own_c) if half_c != own_c else float("inf"),
        norm_a=float(np.sqrt(own_a)) if own_a > 0 else None,
        norm_c=float(np.sqrt(own_c)) if own_c > 0 else None,
        verdict=verdict,
    )


def _expanded(value: float, draws: np.ndarray, units: int, level: float) -> Interval:
    """Percentile interval, widened about the estimate for few units (Hesterberg 2015, "expanded percentile").

    Simulated at a true cosine of 0.6: 8 batches cover 85-96 % without the widening, 90-98 % with it.
    """
    from scipy.stats import norm, t

    tail = (1 + level) / 2
    wider = t.ppf(tail, units - 1) / norm.ppf(tail) * np.sqrt(units / (units - 1))
    low, high = np.quantile(draws, [1 - tail, tail])
    return Interval(float(value - wider * max(value - low, 0.0)), float(value + wider * max(high - value, 0.0)))


class _Pairs:
    """Sums of inner products by pair of batches, so that batches can be drawn again with weights."""

    def __init__(self, gram: np.ndarray) -> None:
        self.batches = k = len(gram) // 4
        known = ~np.isnan(gram)
        halves = np.where(known, gram, 0.0).reshape(2, k, 2, 2, k, 2)  # side, batch, half, side, batch, half
        count = known.astype(float).reshape(2, k, 2, 2, k, 2)
        self.energy = np.einsum("skhskh->sk", halves) / 2  # (2, K) mean |g|² of a half
        self.full = (np.einsum("skhskg->sk", halves)) / 4  # (2, K) |mean of both halves|²
        for array in (halves, count):
            np.einsum("skhskh->skh", array)[...] = 0.0  # a half with itself carries its noise
        self.sums = halves.sum((2, 5))  # (side, K, side, K)
        self.counts = count.sum((2, 5))

    def estimates(self, weights: np.ndarray) -> tuple[np.ndarray, ...]:
        """weights (R, K) -> <g_A, g_C>, |g_A|², |g_C|² without noise, and with it of a batch A, C, of a half A, C."""

        def mean(side: int, other: int) -> np.ndarray:
            return self._weighted(weights, self.sums[side, :, other]) / self._weighted(
                weights, self.counts[side, :, other]
            )

        plain = [weights @ values[side] / weights.sum(1) for values in (self.full, self.energy) for side in (0, 1)]
        return mean(0, 1), mean(0, 0), mean(1, 1), *plain

    @staticmethod
    def _weighted(weights: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """Sum with weight w v for a pair of batches and w, not w², within a batch: a repeated batch is one draw."""
        own = np.diag(matrix)
        return ((weights @ matrix) * weights).sum(1) - (weights**2 - weights) @ own


def _gradient(loss: Tensor, weights: list[Any], members: Mapping[str, list[int]], side: str) -> dict[str, Tensor]:
    """Gradient per module group, flat, float32, on the CPU; zero where the loss does not reach."""
    import torch

    if not torch.isfinite(loss):
        raise InputError(f"loss {side} is {loss.item()}, its gradient says nothing", fix="check the checkpoint")
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)

    def flat(place: int) -> Tensor:
        found, weight = gradients[place], weights[place]
        return torch.zeros(weight.numel()) if found is None else found.detach().reshape(-1).float().cpu()

    return {group: torch.cat([flat(place) for place in places]) for group, places in members.items()}


@contextmanager
def requiring_gradients(weights: list[Any]) -> Iterator[None]:
    """Let frozen parameters have gradients for the time of the measurement."""
    frozen = [weight for weight in weights if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
