"""Other measures of how alike two sets of features of the same images are: neighbours, and a rotation.

    mutual_knn(X, Y, k=10); cknna(X, Y, k=10)     # which images are neighbours of which (Huh et al. 2024)
    procrustes(X, Y)                              # what is left after the best rotation (Kabsch; Williams et al. 2021)

Trap: neighbours say nothing of distances beyond them, and a rotation forgives no scale of single directions; none of
them alone is "the" similarity. Frames of one episode are each other's neighbours in any features: see `groups`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from probes.similarity import centred
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

NEIGHBOURS = 10
MEASURES = ("mutual_knn", "cknna", "procrustes")


def mutual_knn(x: np.ndarray, y: np.ndarray, k: int = NEIGHBOURS, *, groups: np.ndarray | None = None) -> float:
    """Mean share of common neighbours among the k nearest (by cosine of centred features) in x (n, d_x) and y (n, d_y).

    0 to 1; about k / n for unrelated features. groups (n,): images of one group are no neighbours, such as frames of
    one episode. Raises InputError for unequal n, k not below n, and what `centred` refuses.
    """
    a, b = _cosines(x, y)
    near_a, near_b = (_nearest(one, k, groups) for one in (a, b))
    return float((near_a & near_b).sum() / (k * len(a)))


def cknna(x: np.ndarray, y: np.ndarray, k: int = NEIGHBOURS) -> float:
    """CKNNA (Huh et al. 2024, appendix A): CKA whose sum runs over pairs that are neighbours in both.

    HSIC(K, L) and HSIC(K, K), HSIC(L, L) with their centred entries restricted to i, j that are among each other's k
    nearest in both kernels (of K with itself: in K). k = n - 1 gives the biased CKA without its diagonal. Features are
    scaled to unit length after centring, as there. Raises InputError as `mutual_knn`.
    """
    a, b = _cosines(x, y)
    near_a, near_b = (_nearest(one, k, None) for one in (a, b))
    a, b = (one - one.mean(0) - one.mean(1)[:, None] + one.mean() for one in (a, b))

    def inner(left: np.ndarray, right: np.ndarray, near: np.ndarray) -> float:
        return float((left * right)[near].sum())

    scale = inner(a, a, near_a) * inner(b, b, near_b)
    return inner(a, b, near_a & near_b) / float(np.sqrt(scale))


def procrustes(x: np.ndarray, y: np.ndarray) -> float:
    """1 - half the squared Procrustes distance of centred features of unit norm: the nuclear norm of x'y.

    1 where one is the other turned, mirrored and scaled (of another width: padded with zeros), near 0 where unrelated
    and n is much larger than the widths; with few images it is high for anything. Schönemann 1966; as a shape metric
    Williams et al. 2021. Raises InputError for unequal n and what `centred` refuses.
    """
    a, b = centred(x, "the first features"), centred(y, "the second features")
    _paired(a, b)
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    if len(a) < max(a.shape[1], b.shape[1]):  # the same singular values from n x n products
        a, b = (_root(one) for one in (a, b))
    return float(np.linalg.svd(a.T @ b, compute_uv=False).sum())


def alignments(
    a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], *, k: int = NEIGHBOURS, groups: np.ndarray | None = None
) -> pd.DataFrame:
    """Every measure for every pair of layers: layer_a, layer_b, mutual_knn, cknna, procrustes."""
    import pandas as pd

    rows = [
        {"layer_a": one, "layer_b": other, "mutual_knn": mutual_knn(x, y, k, groups=groups), "cknna": cknna(x, y, k),
         "procrustes": procrustes(x, y)}
        for one, x in a.items() for other, y in b.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _paired(x: np.ndarray, y: np.ndarray) -> None:
    if len(x) != len(y):
        fix = "extract both from the same frames"
        raise InputError(f"{len(x)} images on one side and {len(y)} on the other", fix=fix)


def _cosines(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines (n, n) of centred features."""
    a, b = centred(x, "the first features"), centred(y, "the second features")
    _paired(a, b)
    a, b = (one / np.maximum(np.linalg.norm(one, axis=1, keepdims=True), 1e-300) for one in (a, b))
    return a @ a.T, b @ b.T


def _nearest(cosine: np.ndarray, k: int, groups: np.ndarray | None) -> np.ndarray:
    """(n, n) bool: whether j is among the k nearest of i, itself and its group left out."""
    n = len(cosine)
    cosine = cosine.copy()
    other = np.ones((n, n), bool) if groups is None else np.asarray(groups)[:, None] != np.asarray(groups)
    np.fill_diagonal(other, False)
    if k < 1 or (least := int(other.sum(1).min())) < k:
        raise InputError(f"{k} neighbours of each image, and {least if k >= 1 else 'none'} can be", fix="use fewer")
    cosine[~other] = -np.inf
    near = np.zeros((n, n), bool)
    np.put_along_axis(near, np.argpartition(-cosine, k - 1, axis=1)[:, :k], True, axis=1)
    return near


def _root(x: np.ndarray) -> np.ndarray:
    """A square root (n, r) of x x', which has x's rows up to a rotation."""
    values, vectors = np.linalg.eigh(x @ x.T)
    return vectors * np.sqrt(values.clip(0))
