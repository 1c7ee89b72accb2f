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
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

MIN_IMAGES = 4  # the unbiased estimator divides by n (n - 3)
MIN_UNITS = 20  # simulated, the bootstrap's 95 % cover 50-69 % with 5 episodes, 72-92 % with 10, 84-94 % with 20
GRAM_IMAGES = 8192  # up to here a whole Gram matrix (float64, 512 MiB) is held where that is the faster way
_ROWS, _FEW_ROWS = 512, 64  # rows of Gram matrices that are worked on at once; few stay in the processor's cache


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
    resamples, and with fewer than MIN_UNITS images or clusters). floor: 95 % quantile of the same estimate with
    the images of B permuted. biased: the textbook estimate, only for comparison with papers that report it.
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
    The floor takes images for exchangeable: frames of one episode are not, so it is a low bar.
    Cost per pair of layers: n² d for the bootstrap, and resamples u² for its u units. Raises InputError as `cka`.
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
    for j, y in enumerate(ys.values()):
        shuffled = _permuted_hsic(list(xs.values()), y, orders)  # (La, permutations)
        for i, x in enumerate(xs.values()):
            plain, scale = _inner(x, y), np.sqrt(own_x[i].hsic * own_y[j].hsic)
            value[i, j] = _hsic(x, y, plain) / scale
            biased[i, j] = plain / np.sqrt(own_x[i].inner * own_y[j].inner)
            if orders:
                floor[i, j] = np.quantile(shuffled[i] / scale, 0.95)
    low, high = np.full(value.shape, np.nan), np.full(value.shape, np.nan)
    units = np.arange(n) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    if resamples and units.max() + 1 >= MIN_UNITS:
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


def _permuted_hsic(xs: list[np.ndarray], y: np.ndarray, orders: list[np.ndarray]) -> np.ndarray:
    """Unbiased HSIC of every x with the images of y in other orders, (len(xs), len(orders)).

    Through the d x d products, or by putting y's Gram matrix in order, which beats them where the features are wide.
    """
    n, width = len(y), max(x.shape[1] for x in xs)
    inner = np.zeros((len(xs), len(orders)))
    if n < max(width, y.shape[1]) or (n <= GRAM_IMAGES and 20 * n < width * y.shape[1]):
        gram = y @ y.T if orders else np.empty(0)
        for start in range(0, n if orders else 0, _FEW_ROWS):
            rows, right = slice(start, start + _FEW_ROWS), slice(start, None)
            blocks = [_twice_right(x[rows] @ x[right].T) for x in xs]
            for p, order in enumerate(orders):
                shuffled = gram[order[rows]].take(order[right], axis=1)
                inner[:, p] += [np.vdot(block, shuffled) for block in blocks]
    else:
        for p, order in enumerate(orders):
            inner[:, p] = [np.square(x.T @ y[order]).sum() for x in xs]
    found = [[_hsic(x, y[order], inner[i, p]) for p, order in enumerate(orders)] for i, x in enumerate(xs)]
    return np.array(found).reshape(inner.shape)


def _bootstrap(
    xs: list[np.ndarray], ys: list[np.ndarray], units: np.ndarray, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """CKA of `resamples` draws of units with replacement -> (resamples, len(xs), len(ys)).

    units (n,): 0..U-1, the unit of every image. Sums of products of U-centred Gram entries over pairs of different
    images. A pair from two units counts as often as both were drawn, w v; a pair within one unit w times, not w².
    The centring stays that of all images: its effect on the estimate is of second order. Weights belong to units,
    so the products are added up by unit first and only then weighted.
    """
    order = np.argsort(units, kind="stable")  # images of a unit side by side
    xs, ys, units = [x[order] for x in xs], [y[order] for y in ys], units[order]
    n, count = len(units), int(units[-1]) + 1
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)  # (R, U)
    repeats = drawn**2 - drawn
    cross = np.zeros((resamples, len(xs), len(ys)))
    own_x, own_y = np.zeros((resamples, len(xs))), np.zeros((resamples, len(ys)))
    for start in range(0, n, _ROWS):
        rows = slice(start, min(start + _ROWS, n))
        row_starts = np.flatnonzero(np.diff(units[rows], prepend=-1))  # where the next unit begins
        starts = np.flatnonzero(np.diff(units[start:], prepend=-1))
        mine, theirs = slice(units[start], units[rows.stop - 1] + 1), slice(units[start], None)
        gram_x, gram_y = [_u_centred(x, rows) for x in xs], [_u_centred(y, rows) for y in ys]

        def pairs(
            entries: np.ndarray,
            by: tuple[np.ndarray, np.ndarray] = (starts, row_starts),
            mine: slice = mine,
            theirs: slice = theirs,
        ) -> np.ndarray:
            sums = np.add.reduceat(np.add.reduceat(_twice_right(entries), by[0], axis=1), by[1], axis=0)
            return ((drawn[:, mine] @ sums) * drawn[:, theirs]).sum(1) - repeats[:, mine] @ np.diagonal(sums)  # (R,)

        for i, gx in enumerate(gram_x):
            own_x[:, i] += pairs(gx * gx)
            for j, gy in enumerate(gram_y):
                cross[:, i, j] += pairs(gx * gy)
        for j, gy in enumerate(gram_y):
            own_y[:, j] += pairs(gy * gy)
    return cross / np.sqrt(own_x[:, :, None] * own_y[:, None, :])


def _u_centred(x: np.ndarray, rows: slice) -> np.ndarray:
    """Rows of the U-centred Gram matrix (Székely and Rizzo 2014) from their diagonal, zero, to the right."""
    n, k = len(x), np.square(x).sum(1)
    block = x[rows] @ x[rows.start :].T
    block += (k[rows, None] + k[rows.start :]) / (n - 2) - k.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(block, 0.0)
    return block


def _twice_right(block: np.ndarray) -> np.ndarray:
    """Rows of a symmetric matrix from the diagonal on; what is right of it stands for its mirror image too."""
    block[:, len(block) :] *= 2
    return block
