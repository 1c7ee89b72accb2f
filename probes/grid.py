"""A grid of linear readouts in one pass: every ridge strength and every set of labels from one Gram matrix.

    fitted = ridge_grid(x, labels, parts, ALPHAS)        # quantities, closed form
    fitted = logistic_grid(x, labels, 6, parts)          # classes, L-BFGS

One eigendecomposition of the fitted frames' Gram matrix serves all strengths and labels; what they score on the
selection frames follows from those frames' Gram matrix; the chosen strengths are solved again on both together, whose
Gram matrix is the sum. Products are float64, or above _LARGE multiplications float32 in blocks that are added up in
float64 (R² then differs by some 1e-5).
Trap: columns are scaled by the fitted frames alone; anything else would let the others in.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vlm4vla_core.errors import InputError

# Ridge strengths per fitted frame, for columns of unit variance: from hardly any to the mean predictor.
ALPHAS = 10.0 ** np.linspace(-5, 4, 19)
LOGISTIC = 10.0 ** np.linspace(1, -4, 6)  # strengths of the logistic readout, from strong to weak
_LARGE = 4e10  # multiplications above which products are float32
_ROWS = 2048
_FLOOR = 0.1
_SIDE = 16_384  # of the largest matrix that is decomposed
_STEPS = 100  # of L-BFGS for each strength


class Parts(NamedTuple):
    """Positions of the frames to fit on, to select the regularisation on, and to test on once."""

    fit: np.ndarray
    select: np.ndarray
    test: np.ndarray


class Fitted(NamedTuple):
    """predicted (m, C, …): for the test frames, each set of labels by its own best strength. best (C,): its number.
    scores (A, C): on the selection frames, mean R², or mean log-likelihood of the classes."""

    predicted: np.ndarray
    best: np.ndarray
    scores: np.ndarray


def ridge_grid(x: np.ndarray, labels: np.ndarray, parts: Parts, alphas: np.ndarray = ALPHAS) -> Fitted:
    """Ridge readouts of labels (n, C, k) from x (n, d), predicted (m, C, k).

    Minimises |y - xw|² + alpha n |w|² on columns scaled by `scaling` over the fitted frames, intercept free. Raises
    InputError where both frames and columns are more than can be decomposed.
    """
    n, d = len(parts.fit) + len(parts.select), x.shape[1]
    if min(n, d) > _SIDE:
        raise InputError(f"{n} frames of width {d} are too many to decompose", fix="use --pool mean, or fewer frames")
    y = labels.reshape(len(labels), -1).astype(np.float64)  # (n, q)
    flat, best, scores = (_primal if n >= d else _dual)(x, y, parts, np.asarray(alphas), labels.shape[1:])
    return Fitted(flat.reshape(-1, *labels.shape[1:]), best, scores)


def scaling(x: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale of each column over some rows, in float64: its standard deviation, infinite where it is constant.

    No scale is below `_FLOOR` of the columns' root mean square: a pixel that hardly varied over the fitted frames and
    then shows an object would otherwise be hundreds of deviations away, and the readout with it.
    """
    total, squares, largest = np.zeros(x.shape[1]), np.zeros(x.shape[1]), 0.0
    for part in _blocks(rows):
        total += x[part].sum(0, dtype=np.float64)
        largest = max(largest, float(np.abs(x[part]).max(initial=0.0)))
    mean = total / len(rows)
    for part in _blocks(rows):
        squares += np.square(x[part] - mean).sum(0)
    sd = np.sqrt(squares / len(rows))
    constant = sd <= 1e-9 * largest  # says nothing
    floor = _FLOOR * np.sqrt(np.square(sd).sum() / max(1, np.count_nonzero(~constant)))
    return mean, np.where(constant, np.inf, np.maximum(sd, floor))


def _blocks(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS)]


class _Sums(NamedTuple):
    """Of some frames: z'z, z'y, sums of z and of y, of y², and how many."""

    zz: np.ndarray
    zy: np.ndarray
    z: np.ndarray
    y: np.ndarray
    yy: np.ndarray
    n: int

    def plus(self, other: _Sums) -> _Sums:
        sums = (getattr(self, name) + getattr(other, name) for name in self._fields)
        return _Sums(*sums)


def _sums(x: np.ndarray, y: np.ndarray, rows: np.ndarray, mean: np.ndarray, sd: np.ndarray, dtype: type) -> _Sums:
    from scipy.linalg import blas

    d = x.shape[1]
    square = blas.ssyrk if dtype is np.float32 else blas.dsyrk
    zz, zy, total = np.zeros((d, d), order="F"), np.zeros((d, y.shape[1])), np.zeros(d)
    for part in _blocks(rows):
        z = ((x[part] - mean) / sd).astype(dtype)
        zz += square(1.0, z.T)  # the upper triangle
        zy += z.T @ y[part].astype(dtype)
        total += z.sum(0, dtype=np.float64)
    zz += np.triu(zz, 1).T
    return _Sums(zz, zy, total, y[rows].sum(0), np.square(y[rows]).sum(0), len(rows))


def _primal(
    x: np.ndarray, y: np.ndarray, parts: Parts, alphas: np.ndarray, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean, sd = scaling(x, parts.fit)
    dtype: type = np.float32 if (len(x) * float(x.shape[1]) ** 2) > _LARGE else np.float64
    fit, select = (_sums(x, y, rows, mean, sd, dtype) for rows in parts[:2])
    values, vectors, right = _decomposed(fit)
    centre = fit.y / fit.n
    spread = select.yy - 2 * select.y * centre + select.n * centre**2  # from the fitted frames' mean
    scores = np.empty((len(alphas), *shape))
    for i, alpha in enumerate(alphas):
        w = vectors @ (right / (values + alpha * fit.n)[:, None])  # (d, q)
        b = centre - fit.z @ w / fit.n
        error = (
            select.yy - 2 * (w * select.zy).sum(0) - 2 * b * select.y + (w * (select.zz @ w)).sum(0)
            + 2 * b * (select.z @ w) + select.n * b**2
        )  # fmt: skip
        scores[i] = _share(error, spread).reshape(shape)
    best = scores.mean(-1).argmax(0)
    both = fit.plus(select)
    predicted = np.empty((len(parts.test), y.shape[1]))
    weights = np.empty((x.shape[1], y.shape[1]))
    column = np.repeat(best, shape[1])  # (q,)
    for i in np.unique(best):
        weights[:, column == i] = _solved(both, alphas[i], column == i)
    b = (both.y - both.z @ weights) / both.n
    for start in range(0, len(parts.test), _ROWS):
        z = ((x[parts.test[start : start + _ROWS]] - mean) / sd).astype(dtype)
        predicted[start : start + _ROWS] = z @ weights.astype(dtype) + b
    return predicted, best, scores.mean(-1)


def _centred(sums: _Sums) -> tuple[np.ndarray, np.ndarray]:
    """z'z and z'y about the frames' own means."""
    return sums.zz - np.outer(sums.z, sums.z) / sums.n, sums.zy - np.outer(sums.z, sums.y) / sums.n


def _decomposed(sums: _Sums) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    zz, zy = _centred(sums)
    values, vectors = np.linalg.eigh(zz)
    return values.clip(0), vectors, vectors.T @ zy


def _solved(sums: _Sums, alpha: float, columns: np.ndarray) -> np.ndarray:
    from scipy.linalg import LinAlgError, solve

    zz, zy = _centred(sums)
    try:
        return solve(zz + alpha * sums.n * np.eye(len(zz)), zy[:, columns], assume_a="pos")
    except LinAlgError:  # rounding of float32 products may leave a slightly negative eigenvalue
        values, vectors, right = _decomposed(sums)
        return vectors @ (right[:, columns] / (values + alpha * sums.n)[:, None])


def _share(error: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """R²; minus infinity where the labels do not vary, as shuffled ones of few episodes may not."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(1 - error / spread, nan=-np.inf, neginf=-np.inf)


def _dual(
    x: np.ndarray, y: np.ndarray, parts: Parts, alphas: np.ndarray, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `_primal`, through the frames' products with each other: n x n instead of d x d."""
    from scipy.linalg import solve

    mean, sd = scaling(x, parts.fit)
    rows = np.concatenate(parts)
    gram = _products(x, rows, mean, sd)
    n, m = len(parts.fit), len(parts.fit) + len(parts.select)
    values, vectors = np.linalg.eigh(gram[:n, :n])
    centre = y[parts.fit].mean(0)
    left, right = gram[n:m, :n] @ vectors, vectors.T @ (y[parts.fit] - centre)
    spread, scores = np.square(y[parts.select] - centre).sum(0), np.empty((len(alphas), *shape))
    for i, alpha in enumerate(alphas):
        told = left @ (right / (values.clip(0) + alpha * n)[:, None]) + centre
        scores[i] = _share(np.square(told - y[parts.select]).sum(0), spread).reshape(shape)
    best = scores.mean(-1).argmax(0)
    column, both = np.repeat(best, shape[1]), y[rows[:m]]
    shift = gram[:m, :m].mean(0)
    own = gram[:m, :m] - shift - shift[:, None] + shift.mean()
    new = gram[m:, :m] - gram[m:, :m].mean(1, keepdims=True) - shift + shift.mean()
    predicted = np.empty((len(parts.test), y.shape[1]))
    for i in np.unique(best):
        one = column == i
        centred = both[:, one] - both[:, one].mean(0)
        predicted[:, one] = new @ solve(own + alphas[i] * m * np.eye(m), centred, assume_a="pos") + both[:, one].mean(0)
    return predicted, best, scores.mean(-1)


def _products(x: np.ndarray, rows: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """z z' of some rows (r, r), added up over blocks of columns in float64."""
    out, step = np.zeros((len(rows), len(rows))), max(1, 50_000_000 // len(rows))
    for start in range(0, x.shape[1], step):
        part = slice(start, start + step)
        z = (x[rows, part] - mean[part]) / sd[part]
        out += z @ z.T
    return out


def logistic_grid(
    x: np.ndarray, labels: np.ndarray, classes: int, parts: Parts, strengths: np.ndarray = LOGISTIC
) -> Fitted:
    """Multinomial logistic readouts of labels (n, C), numbers below `classes`, from x (n, d); predicted (m, C).

    Minimises mean cross-entropy + strength |w|² / 2 with L-BFGS, each strength from where the stronger one ended; all
    sets of labels side by side.
    """
    mean, sd = scaling(x, parts.fit)
    fit, select, test = (((x[rows] - mean) / sd).astype(np.float64) for rows in parts)
    sets = labels.shape[1]
    start, basis = np.zeros((x.shape[1] + 1, sets, classes)), _basis(fit)
    scores, w = np.empty((len(strengths), sets)), start
    for i, strength in enumerate(strengths):
        w = _fit_logistic(basis, labels[parts.fit], w, strength)
        told = _log_chances(select, w)
        scores[i] = np.take_along_axis(told, labels[parts.select][..., None], 2)[..., 0].mean(0)
    best = scores.argmax(0)
    both, known = np.concatenate([fit, select]), np.concatenate([labels[parts.fit], labels[parts.select]])
    basis, w = _basis(both), start
    predicted = np.empty((len(test), sets), np.int64)
    for i in np.unique(best):
        w = _fit_logistic(basis, known, w, strengths[i])
        predicted[:, best == i] = _log_chances(test, w).argmax(2)[:, best == i]
    return Fitted(predicted, best, scores)


class _Basis(NamedTuple):
    """Rows along the principal axes: z = scores @ axes.T. values (r,): z'z's eigenvalues per row."""

    scores: np.ndarray
    axes: np.ndarray
    values: np.ndarray


def _basis(z: np.ndarray) -> _Basis:
    """The best w of a penalised readout lies in the rows' span, so axes beyond it are left out."""
    if len(z) < z.shape[1]:
        values, left = np.linalg.eigh(z @ z.T)
        keep = values > 1e-12 * values.max(initial=1e-300)
        axes = z.T @ (left[:, keep] / np.sqrt(values[keep]))
    else:
        values, axes = np.linalg.eigh(z.T @ z)
        keep = values > 1e-12 * values.max(initial=1e-300)
        axes = axes[:, keep]
    return _Basis(z @ axes, axes, values[keep] / len(z))


def _log_chances(z: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Log-probabilities (n, C, K) under weights (d + 1, C, K), the last row the intercepts."""
    logits = (z @ w[:-1].reshape(z.shape[1], -1)).reshape(len(z), *w.shape[1:]) + w[-1]
    logits -= logits.max(2, keepdims=True)
    logits -= np.log(np.exp(logits).sum(2, keepdims=True))
    return logits


def _fit_logistic(basis: _Basis, labels: np.ndarray, start: np.ndarray, strength: float) -> np.ndarray:
    """Weights (d + 1, C, K). Steps are taken in coordinates in which the curvature is at most 1 (Böhning's bound,
    1992: half of z'z / n), so a few tens suffice."""
    from scipy.optimize import minimize

    truth = labels[..., None] == np.arange(start.shape[2])  # (n, C, K)
    scale = np.append(1 / np.sqrt(0.5 * basis.values + strength), np.sqrt(2.0))[:, None, None]
    z = np.concatenate([basis.scores * scale[:-1, 0, 0], np.full((len(labels), 1), scale[-1, 0, 0])], axis=1)
    penalty = strength * scale**2 * (np.arange(len(scale)) < len(scale) - 1)[:, None, None]
    begin = np.concatenate([np.tensordot(basis.axes.T, start[:-1], 1), start[-1:]]) / scale

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        u = flat.reshape(begin.shape)
        told = (z @ u.reshape(len(u), -1)).reshape(truth.shape)
        told -= told.max(2, keepdims=True)
        chances = np.exp(told)
        total = chances.sum(2, keepdims=True)
        value = (np.log(total).sum() - told[truth].sum()) / len(z)
        chances /= total
        chances[truth] -= 1
        grad = (z.T @ chances.reshape(len(z), -1)).reshape(u.shape) / len(z) + penalty * u
        return float(value + 0.5 * (penalty * u**2).sum()), grad.ravel()

    options = {"maxiter": _STEPS, "maxcor": 20, "gtol": 1e-5, "ftol": 1e-9}
    found = minimize(loss, begin.ravel(), jac=True, method="L-BFGS-B", options=options).x.reshape(begin.shape) * scale
    return np.concatenate([np.tensordot(basis.axes, found[:-1], 1), found[-1:]])


def ridge_path(x: np.ndarray, y: np.ndarray, x_new: np.ndarray, alphas: np.ndarray) -> np.ndarray:
    """Ridge predictions for every strength from one eigendecomposition: (len(alphas), m, …) for y (n, …).

    As `ridge_grid` minimises, on all of x, in the d x d space or, where n < d, in the n x n one, with the same result.
    """
    centre, scale = scaling(x, np.arange(len(x)))
    x, x_new = (x - centre) / scale, (x_new - centre) / scale
    flat = y.reshape(len(y), -1)
    intercept = flat.mean(0)
    if len(x) < x.shape[1]:
        eigenvalues, vectors = np.linalg.eigh(x @ x.T)
        left, right = (x_new @ x.T) @ vectors, vectors.T @ (flat - intercept)
    else:
        eigenvalues, vectors = np.linalg.eigh(x.T @ x)
        left, right = x_new @ vectors, vectors.T @ (x.T @ (flat - intercept))
    eigenvalues = eigenvalues.clip(0)
    fitted = [left @ (right / (eigenvalues + alpha * len(x))[:, None]) + intercept for alpha in alphas]
    return np.stack(fitted).reshape(len(alphas), len(x_new), *y.shape[1:])
