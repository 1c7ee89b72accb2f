"""Losses along straight lines between base, A and C, and on the plane that the two changes span.

    found = losses_between(parameters, ends, losses)      # B→A, B→C, A→C: curves, barriers with intervals
    null = losses_between(parameters, random_ends(ends), losses)         # the same to random changes as long
    grid = task_arithmetic(parameters, ends, losses)      # B + a (A - B) + c (C - B)

ends: three mappings name -> tensor for the parameters that move. All points of a line see the same batches, so
differences along it are paired. Trap: only the shared backbone moves. The action loss goes through one query and head
for all points (the caller's), so far from the checkpoint these were trained with it may be large for that reason alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from probes.losses import Loss
from vlm4vla_core.errors import InputError
from vlm4vla_core.results import Interval

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from torch import Tensor

LINES = {"B→A": ((0.0, 0.0), (1.0, 0.0)), "B→C": ((0.0, 0.0), (0.0, 1.0)), "A→C": ((1.0, 0.0), (0.0, 1.0))}
GRID = (-0.5, 0.0, 0.5, 1.0, 1.5)


class Barrier(NamedTuple):
    """Greatest height of a loss above the straight line between its two ends, at least 0; at: where, 0 to 1."""

    height: float
    interval: Interval
    at: float


@dataclass(frozen=True)
class Plane:
    """values: loss -> (points, K) loss at B + a (A - B) + c (C - B) on K batches; points: (a, c); lines: name of the
    line -> (its points' places, their share of the way). Lines are empty for a grid."""

    points: tuple[tuple[float, float], ...]
    values: dict[str, np.ndarray]
    lines: dict[str, tuple[np.ndarray, np.ndarray]]

    def to_frame(self) -> pd.DataFrame:
        """loss, line, share, a, c, value, stderr, batches: one row per loss and point (of each line)."""
        import pandas as pd

        rows = []
        for loss, values in self.values.items():
            error = values.std(1, ddof=1) / np.sqrt(values.shape[1])
            lines = self.lines or {"": (np.arange(len(values)), np.full(len(values), np.nan))}
            for line, (places, shares) in lines.items():
                for place, share in zip(places, shares, strict=True):
                    a, c = self.points[place]
                    rows.append((loss, line, share, a, c, values[place].mean(), error[place], values.shape[1]))
        return pd.DataFrame(rows, columns=["loss", "line", "share", "a", "c", "value", "stderr", "batches"])

    def barriers(self, seed: int = 0) -> pd.DataFrame:
        """loss, line, barrier, low, high, at: of every line (see `barrier`)."""
        import pandas as pd

        rows = []
        for loss, values in self.values.items():
            for line, (places, shares) in self.lines.items():
                found = barrier(values[places], shares, seed=seed)
                rows.append((loss, line, found.height, *found.interval, found.at))
        return pd.DataFrame(rows, columns=["loss", "line", "barrier", "low", "high", "at"])


def barrier(values: np.ndarray, shares: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> Barrier:
    """Barrier of a curve (points, K batches) at the given shares of the way, ends included (Frankle et al. 2020).

    Interval: bootstrap over batches, which all points share.
    """
    above = values - ((1 - shares)[:, None] * values[0] + shares[:, None] * values[-1])  # (points, K)
    mean, count = above.mean(1), values.shape[1]
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples) / count
    low, high = np.quantile((drawn @ above.T).max(1), [0.025, 0.975])
    place = int(mean.argmax())
    return Barrier(max(float(mean[place]), 0.0), Interval(max(float(low), 0.0), max(float(high), 0.0)),
                   float(shares[place]))  # fmt: skip


def losses_between(
    parameters: Mapping[str, Any], ends: Sequence[Mapping[str, Tensor]], losses: Mapping[str, Loss], *,
    points: int = 9, batches: int = 8, lines: Mapping[str, tuple[tuple[float, float], tuple[float, float]]] = LINES,
    progress: Callable[[int], Any] | None = None,
) -> Plane:  # fmt: skip
    """Both losses at `points` equally spaced points of lines, ends included. lines: name -> (a, c) of both ends, by
    default B→A, B→C and A→C."""
    if points < 3:
        raise InputError(f"{points} points on a line show no barrier", fix="use --interpolate 3 or more")
    shares, places, found = np.linspace(0, 1, points), dict[tuple[float, float], int](), {}
    for name, (start, end) in lines.items():
        way = [tuple(round(float((1 - s) * x + s * y), 12) for x, y in zip(start, end, strict=True)) for s in shares]
        found[name] = (np.array([places.setdefault(point, len(places)) for point in way]), shares)  # type: ignore[arg-type]
    return Plane(tuple(places), _measure(parameters, ends, losses, list(places), batches, progress), found)


def task_arithmetic(
    parameters: Mapping[str, Any], ends: Sequence[Mapping[str, Tensor]], losses: Mapping[str, Loss], *,
    shares: Sequence[float] = GRID, batches: int = 4, progress: Callable[[int], Any] | None = None,
) -> Plane:  # fmt: skip
    """Both losses at B + a (A - B) + c (C - B) for all a, c of `shares` (Ilharco et al. 2023)."""
    points = [(float(a), float(c)) for a, c in product(shares, shares)]
    return Plane(tuple(points), _measure(parameters, ends, losses, points, batches, progress), {})


def _measure(
    parameters: Mapping[str, Any], ends: Sequence[Mapping[str, Tensor]], losses: Mapping[str, Loss],
    points: Sequence[tuple[float, float]], batches: int, progress: Callable[[int], Any] | None,
) -> dict[str, np.ndarray]:  # fmt: skip
    import torch

    if batches < 2:
        raise InputError(f"{batches} batch cannot give an interval over batches", fix="use --batches 2 or more")
    values = {name: np.empty((len(points), batches)) for name in losses}
    with _moving({name: parameters[name] for name in ends[0]}) as weights, torch.no_grad():
        for number, (a, c) in enumerate(points):
            for name, weight in weights.items():
                base, one, two = (end[name].to(weight.device, torch.float32) for end in ends)
                weight.copy_(base + a * (one - base) + c * (two - base))
            for name, loss in losses.items():
                values[name][number] = [float(loss(k, 0)) for k in range(batches)]
            if progress:
                progress(1)
    return values


@dataclass(frozen=True)
class _Drawn(Mapping[str, "Tensor"]):
    """Base plus a random change of every tensor, as long as the one to `end`; drawn when asked for."""

    base: Mapping[str, Tensor]
    end: Mapping[str, Tensor]
    seed: Sequence[int]

    def __getitem__(self, name: str) -> Tensor:
        import torch

        start = self.base[name].float()
        own = np.random.SeedSequence([*self.seed, *name.encode()]).generate_state(1, np.uint64)[0]
        noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(int(own)))
        length = (self.end[name].float() - start).norm()
        return start + noise * (length / noise.norm().clamp_min(torch.finfo(torch.float32).tiny))

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


def random_ends(ends: Sequence[Mapping[str, Tensor]], seed: int = 0) -> list[Mapping[str, Tensor]]:
    """The null of lines: base, and in place of A and C random changes that are as long in every tensor."""
    return [ends[0], *(_Drawn(ends[0], end, (seed, side)) for side, end in enumerate(ends[1:]))]


@contextmanager
def _moving(weights: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Parameters that may be overwritten, put back to the bit."""
    import torch

    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        yield weights
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(kept[name])


@contextmanager
def shared_weights(backbone: Any, base: Path, a: Path, c: Path) -> Iterator[list[dict[str, Tensor]]]:
    """The parameters of a backbone that are in all three checkpoints, under the backbone's names, mapped from files.

    Raises InputError where they do not fit the backbone.
    """
    from probes.weights import open_three, readable_name

    with open_three(base, a, c) as three:
        known = set(three.names)
        found: list[dict[str, Tensor]] = [{}, {}, {}]
        for name, parameter in backbone.named_parameters():
            readable = readable_name(f"backbone.{name}", backbone.spec)
            if readable not in known:
                continue
            for end, tensor in zip(found, three.tensors(readable), strict=True):
                turned = tensor.dim() == 3 and tensor.shape != parameter.shape
                value = tensor.transpose(-1, -2) if turned else tensor
                if value.shape != parameter.shape:
                    what = f"{tuple(value.shape)} in the checkpoints, {tuple(parameter.shape)} in the model"
                    raise InputError(what, where=name, fix="compare one model family")
                end[name] = value
        yield found
