"""How many directions a training moved a matrix in, and whether two trainings chose the same ones.

    spectral_divergence(base, vlm, vla).to_frame()       # per matrix: effective rank of both changes, their overlap

Randomised (Halko, Martinsson and Tropp 2011), rank 40, one power iteration; exact where the matrix is small. Trap: the
leading directions of a change hold only part of it. `explained` says how much, and a small overlap of subspaces that
explain a tenth of two changes says little about the changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from probes.weights import kind_of, network_order, open_three

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

RANK = 40
_EXTRA, _PROBES = 10, 20


class Spectrum(NamedTuple):
    """values (r,): leading singular values. effective_rank: participation ratio (sum s²)² / sum s⁴ of all of them, 0
    for a zero matrix. explained: share of sum s² in `values`. left (m, r): their left singular vectors."""

    values: Tensor
    effective_rank: float
    explained: float
    left: Tensor


def spectrum(matrix: Tensor, rank: int = RANK, seed: int = 0) -> Spectrum:
    """Leading singular values and effective rank of a matrix (m, n), in float32.

    The fourth powers beyond `rank` are estimated without bias from 20 random vectors (after Hutchinson).
    """
    import torch

    x = matrix.float()
    total = float(x.double().square().sum())
    if min(x.shape) <= 4 * rank:
        left, values, _ = torch.linalg.svd(x, full_matrices=False)
        fourth = float(values.double().pow(4).sum())
        left, values = left[:, :rank], values[:rank]
    else:
        drawn = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(x @ torch.randn(x.shape[1], rank + _EXTRA, generator=drawn)).Q
        basis = torch.linalg.qr(x @ (x.T @ basis)).Q  # (m, rank + extra)
        turned, values, _ = torch.linalg.svd(basis.T @ x, full_matrices=False)
        left, values = (basis @ turned)[:, :rank], values[:rank]
        rest = x @ torch.randn(x.shape[1], _PROBES, generator=drawn)
        rest = rest - left @ (left.T @ rest)
        fourth = float(values.double().pow(4).sum()) + float((x.T @ rest).double().square().sum()) / _PROBES
    share = float(values.double().square().sum()) / total if total else float("nan")
    return Spectrum(values, total**2 / fourth if fourth else 0.0, share, left)


def overlap(a: Spectrum, c: Spectrum, rank: int) -> float:
    """Shared part of two leading subspaces of `rank` left directions: 1 when equal, rank / m by chance."""
    return float((a.left[:, :rank].T @ c.left[:, :rank]).square().sum()) / rank


@dataclass(frozen=True)
class SpectralDivergence:
    """One row per matrix that was compared; values: parameter -> singular values of A - B and of C - B."""

    rows: tuple[dict[str, Any], ...]
    values: dict[str, tuple[list[float], list[float]]]

    def to_frame(self) -> pd.DataFrame:
        """parameter, group, kind, rows, columns, effective_rank_a, effective_rank_c, explained_a, explained_c, rank,
        overlap, overlap_null: by chance, for subspaces of that rank."""
        import pandas as pd

        return pd.DataFrame(self.rows)


def spectral_divergence(
    base: Path | str, a: Path | str, c: Path | str, *, rank: int = RANK, seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> SpectralDivergence:  # fmt: skip
    """Spectra of both changes, matrix by matrix (tensors of more dimensions: all but the first as columns).

    Two float32 copies of one matrix are held at a time. Raises InputError as `divergence.weight_divergence`.
    """
    rows, values = [], {}
    with open_three(base, a, c) as three:
        for name in sorted(three.names, key=lambda name: (network_order(three.sides[0].group_of(name)), name)):
            origin, one, two = three.tensors(name)
            if progress:
                progress(1)
            if origin.dim() < 2 or min(origin.flatten(1).shape) < 2:
                continue
            start = origin.flatten(1).float()
            found = [spectrum(side.flatten(1).float() - start, rank, seed) for side in (one, two)]
            shared = min(rank, min(start.shape) // 2)  # all directions overlap with all
            moved = all(side.effective_rank > 0 for side in found)
            values[name] = (found[0].values.tolist(), found[1].values.tolist())
            rows.append(
                {
                    "parameter": name, "group": three.sides[0].group_of(name), "kind": kind_of(name),
                    "rows": start.shape[0], "columns": start.shape[1],
                    "effective_rank_a": found[0].effective_rank, "effective_rank_c": found[1].effective_rank,
                    "explained_a": found[0].explained, "explained_c": found[1].explained, "rank": shared,
                    "overlap": overlap(found[0], found[1], shared) if moved else float("nan"),
                    "overlap_null": shared / start.shape[0],
                }
            )  # fmt: skip
    return SpectralDivergence(tuple(rows), values)
