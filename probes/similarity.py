"""How alike two sets of features of the same images are: centred kernel alignment (CKA), debiased.

    cka(X, Y).value                       # one number, (n, d) arrays with rows in the same order
    cka_matrix(layers_a, layers_b)        # layer x layer, with intervals over images and a permuted floor

Trap: the textbook (biased) estimator is near 1 for *unrelated* random features as soon as the width is not small
against the number of images (0.95 at n = 64, d = 1152); the debiased one is near 0 there, and may be slightly
negative. Rows must be the same images in the same order; nothing here can check that, the verb does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

MIN_IMAGES = 4  # the unbiased estimator divides by n (n - 3)


class Cka(NamedTuple):
    """CKA of two feature sets: `value`, from `n` images, widths `d_x` and `d_y`."""

    value: float
    n: int
    d_x: int
    d_y: int
    debiased: bool


@dataclass(frozen=True)
class CkaMatrix:
    """Debiased CKA of every layer of A against every layer of B, on the same n images.

    value, low, high (layers_a, layers_b): the estimate and its bootstrap interval over images (NaN without
    resamples). floor: 95 % quantile of the same estimate with the images of B permuted. biased: the textbook
    estimate, only for comparison with papers that report it.
    """

    layers_a: tuple[str, ...]
    layers_b: tuple[str, ...]
    n: int
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    floor: np.ndarray
    biased: np.ndarray
    level: float

    def to_frame(self) -> pd.DataFrame:
        """One row per pair: layer_a, layer_b, cka, low, high, floor, biased, n."""
        import pandas as pd

        rows = [
            (a, b, self.value[i, j], self.low[i, j], self.high[i, j], self.floor[i, j], self.biased[i, j], self.n)
            for i, a in enumerate(self.layers_a)
            for j, b in enumerate(self.layers_b)
        ]
        return pd.DataFrame(rows, columns=["layer_a", "layer_b", "cka", "low", "high", "floor", "biased", "n"])


def cka(x: np.ndarray, y: np.ndarray, *, debiased: bool = True) -> Cka:
    """Linear CKA of features x (n, d_x) and y (n, d_y) of the same n images, computed in float64.

    debiased: HSIC by the unbiased estimator of Song et al. 2012 (eq. 5), normalised as in Nguyen et al. 2021;
    otherwise the estimator of Kornblith et al. 2019. Raises InputError for unequal n, n < 4, NaN or infinity,
    and features that do not vary.
    """
    x, y = centred(x, "the first features"), centred(y, "the second features")
    _same_images(x, y)
    own_x, own_y, inner = _own(x), _own(y), _inner(x, y)
    if debiased:
        value = _hsic(x, y, inner) / float(np.sqrt(own_x.hsic * own_y.hsic))
    else:
        value = inner / float(np.sqrt(own_x.inner * own_y.inner))
    return Cka(value, len(x), x.shape[1], y.shape[1], debiased)


def cka_matrix(
    a: Mapping[str, np.ndarray],
    b: Mapping[str, np.ndarray],
    *,
    resamples: int = 200,
    permutations: int = 50,
    clusters: np.ndarray | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> CkaMatrix:
    """Debiased CKA of every layer of `a` with every layer of `b` (name -> (n, d) on the same images).

    resamples: bootstrap over images, or over `clusters` (n,) of them: frames of one episode resemble each other,
    and drawn one by one they make the interval too narrow. A pair that repeats an image is left out of the
    resampled sums, since it would bring the bias back. permutations: shuffled images for the floor.
    Cost of the bootstrap: resamples n² per pair of layers, in blocks of rows. Raises InputError as `cka`.
    """
    xs = {name: centred(value, name) for name, value in a.items()}
    ys = {name: centred(value, name) for name, value in b.items()}
    n = len(next(iter(xs.values())))
    for group in (xs, ys):
        for value in group.values():
            _same_images(next(iter(xs.values())), value)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(n) for _ in range(permutations)]
    own_x, own_y = ([_own(value) for value in group.values()] for group in (xs, ys))
    value, biased, floor = (np.full((len(xs), len(ys)), np.nan) for _ in range(3))
    for (i, x), (j, y) in product(enumerate(xs.values()), enumerate(ys.values())):
        plain, permuted = _inner(x, y), _permuted_hsic(x, y, orders)
        scale = np.sqrt(own_x[i].hsic * own_y[j].hsic)
        value[i, j] = _hsic(x, y, plain) / scale
        biased[i, j] = plain / np.sqrt(own_x[i].inner * own_y[j].inner)
        if orders:
            floor[i, j] = np.quantile(permuted / scale, 0.95)
    low, high = np.full(value.shape, np.nan), np.full(value.shape, np.nan)
    if resamples:
        units = np.arange(n) if clusters is None else np.unique(clusters, return_inverse=True)[1]
        draws = _bootstrap(list(xs.values()), list(ys.values()), units, resamples, rng)  # (R, La, Lb)
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return CkaMatrix(tuple(xs), tuple(ys), n, value, low, high, floor, biased, level)


def centred(features: np.ndarray, name: str) -> np.ndarray:
    """Features (n, d) in float64 with every column's mean removed. Raises InputError for what CKA cannot take."""
    x = np.asarray(features)
    if x.ndim != 2:
        raise InputError(
            f"features of shape {x.shape} are not (images, width)", where=name, fix="extract them with --pool mean"
        )
    if len(x) < MIN_IMAGES:
        raise InputError(f"{len(x)} images are too few, the estimator needs {MIN_IMAGES}", where=name)
    x = x.astype(np.float64)
    if not np.isfinite(x).all():
        raise InputError(f"{int((~np.isfinite(x)).any(1).sum())} of {len(x)} rows hold NaN or infinity", where=name)
    largest = np.abs(x).max()
    x = x - x.mean(0)
    if np.abs(x).max() <= 1e-9 * largest:  # rounding of the mean alone
        raise InputError(f"the features are the same for all {len(x)} images, so similarity is undefined", where=name)
    return x


def _same_images(x: np.ndarray, y: np.ndarray) -> None:
    if len(x) != len(y):
        raise InputError(
            f"{len(x)} images on one side and {len(y)} on the other", fix="extract both from the same frames"
        )


# --- the estimators; x and y are column-centred throughout -------------------------------------------------


class _Own(NamedTuple):
    """A layer with itself: <K, K> and its unbiased HSIC."""

    inner: float
    hsic: float


def _own(x: np.ndarray) -> _Own:
    inner, n = _inner(x, x), len(x)
    hsic = _hsic(x, x, inner)
    if hsic * n * (n - 3) <= 1e-10 * inner:
        raise InputError("beyond each image itself nothing is shared between images: similarity is undefined")
    return _Own(inner, hsic)


def _inner(x: np.ndarray, y: np.ndarray) -> float:
    """<K, L> of the Gram matrices K = x x', L = y y': ||x'y||² where that is the smaller product."""
    if len(x) < max(x.shape[1], y.shape[1]):
        return float(np.vdot(x @ x.T, y @ y.T))
    return float(np.square(x.T @ y).sum())


def _hsic(x: np.ndarray, y: np.ndarray, inner: float) -> float:
    """Unbiased HSIC (Song et al. 2012, eq. 5) of column-centred features with <K, L> = inner.

    With K1 = 0 its three terms collapse to <K, L>, the diagonals and the traces, so no n x n matrix is needed.
    """
    n = len(x)
    k, m = np.square(x).sum(1), np.square(y).sum(1)  # diagonals of K and L, (n,)
    total = inner - n / (n - 2) * float(k @ m) + float(k.sum() * m.sum()) / ((n - 1) * (n - 2))
    return total / (n * (n - 3))


def _permuted_hsic(x: np.ndarray, y: np.ndarray, orders: list[np.ndarray]) -> np.ndarray:
    """Unbiased HSIC of x with the images of y in other orders, (len(orders),)."""
    if not orders:
        return np.empty(0)
    if len(x) >= max(x.shape[1], y.shape[1]):
        return np.array([_hsic(x, y[order], _inner(x, y[order])) for order in orders])
    gram_x, gram_y = x @ x.T, y @ y.T
    return np.array([_hsic(x, y[order], float(np.vdot(gram_x, gram_y[np.ix_(order, order)]))) for order in orders])


def _bootstrap(
    xs: list[np.ndarray], ys: list[np.ndarray], units: np.ndarray, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """CKA of `resamples` draws of units with replacement -> (resamples, len(xs), len(ys)).

    units (n,): 0..U-1, the unit of every image. Sums of products of U-centred Gram entries over pairs of different
    images. A pair from two units counts as often as both were drawn, w v; a pair within one unit w times, not w².
    The centring stays that of all images: its effect on the estimate is of second order.
    """
    n, count = len(xs[0]), int(units.max()) + 1
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)  # (R, U)
    weights, repeats = drawn[:, units], drawn**2 - drawn  # (R, n), (R, U)
    cross = np.zeros((resamples, len(xs), len(ys)))
    own_x, own_y = np.zeros((resamples, len(xs))), np.zeros((resamples, len(ys)))
    for start in range(0, n, 512):
        rows = slice(start, min(start + 512, n))
        same = units[rows, None] == units if count < n else None
        gram_x, gram_y = [_u_centred(x, rows) for x in xs], [_u_centred(y, rows) for y in ys]

        def pairs(entries: np.ndarray, rows: slice = rows, same: np.ndarray | None = same) -> np.ndarray:
            total = ((weights[:, rows] @ entries) * weights).sum(1)  # (R,)
            if same is None:  # a unit is one image, and the diagonal is zero already
                return total
            return total - repeats @ np.bincount(units[rows], (entries * same).sum(1), minlength=count)

        for i, gx in enumerate(gram_x):
            own_x[:, i] += pairs(gx * gx)
            for j, gy in enumerate(gram_y):
                cross[:, i, j] += pairs(gx * gy)
        for j, gy in enumerate(gram_y):
            own_y[:, j] += pairs(gy * gy)
    return cross / np.sqrt(own_x[:, :, None] * own_y[:, None, :])


def _u_centred(x: np.ndarray, rows: slice) -> np.ndarray:
    """Rows of the U-centred Gram matrix (Székely and Rizzo 2014), zero on its diagonal, (rows, n)."""
    n, k = len(x), np.square(x).sum(1)
    block = x[rows] @ x.T + (k[rows, None] + k) / (n - 2) - k.sum() / ((n - 1) * (n - 2))
    block[np.arange(len(block)), np.arange(n)[rows]] = 0.0
    return block
