"""Debiased CKA of many layers, or of more images than fit into memory.

    gram_cka(layers_a, layers_b)                     # every pair at once, exact up to float32 products
    minibatch_cka(read_a, read_b, n)                 # random batches of images, read when they are needed

gram_cka: Gram matrices go by in strips of rows, only their upper triangle, and all pairs of layers meet in one product
per strip; products are float32, sums over strips float64. minibatch_cka: the unbiased estimator (Song et al. 2012) on
random disjoint batches, numerators and denominators averaged apart (Nguyen et al. 2021), in float64.
Trap: batches of neighbouring frames come from the same episodes and are no sample of all pairs of images, so batches
are drawn at random from all rows; a loader in order would be biased however large the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from probes.similarity import MIN_IMAGES, centred
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

STRIP = 128  # rows of Gram matrices that are held at once, of every layer
BATCH = 64
# name of a layer and row numbers -> features (len(rows), d)
Reader = Callable[[str, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class LargeCka:
    """value (layers_a, layers_b): debiased CKA. error: standard error over batches of images, NaN for `gram_cka`."""

    layers_a: tuple[str, ...]
    layers_b: tuple[str, ...]
    n: int
    value: np.ndarray
    error: np.ndarray

    def to_frame(self) -> pd.DataFrame:
        """One row per pair: layer_a, layer_b, cka, error, n."""
        import pandas as pd

        rows = [
            (a, b, self.value[i, j], self.error[i, j], self.n)
            for i, a in enumerate(self.layers_a) for j, b in enumerate(self.layers_b)
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=["layer_a", "layer_b", "cka", "error", "n"])


def gram_cka(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray] | None = None) -> LargeCka:
    """Debiased linear CKA of every layer of `a` with every layer of `b` (of `a` itself when left out), (n, d) each.

    Costs n² d / 2 multiplications per layer and n² / 2 per pair; memory: float32 copies of the features and one strip,
    128 n entries per layer. Differs from the float64 value by some 1e-6. Raises InputError as `similarity.cka`.
    """
    same = b is None or b is a
    named = list(a.items()) + ([] if same else list((b or {}).items()))
    layers = [centred(value, name) for name, value in named]
    n, count = len(layers[0]), len(a)
    if any(len(layer) != n for layer in layers):
        raise InputError("the layers are not of the same images", fix="extract both from the same frames")
    scale = [float(np.sqrt(np.square(layer).sum() / n)) for layer in layers]
    diagonal = np.stack([np.square(layer / s).sum(1) for layer, s in zip(layers, scale, strict=True)])  # (L, n)
    single = [(layer / s).astype(np.float32) for layer, s in zip(layers, scale, strict=True)]
    del layers
    inner = np.zeros((len(single), len(single)))
    for start in range(0, n, STRIP):
        strip = np.empty((len(single), min(STRIP, n - start) * (n - start)), np.float32)
        for line, layer in zip(strip, single, strict=True):
            block = line.reshape(-1, n - start)
            np.matmul(layer[start : start + STRIP], layer[start:].T, out=block)
            block[:, len(block) :] *= np.float32(np.sqrt(2))  # what is right of it stands for its mirror image too
        rows, columns = (slice(None), slice(None)) if same else (slice(0, count), slice(count, None))
        inner[rows, columns] += strip[rows] @ strip[columns].T
        if not same:  # each layer with itself
            own = np.array([float(line @ line) for line in strip])
            inner[np.diag_indices(len(single))] += own
    total = diagonal.sum(1)
    hsic = inner - n / (n - 2) * diagonal @ diagonal.T + np.outer(total, total) / ((n - 1) * (n - 2))
    own = np.diag(hsic)
    if (own <= 1e-10 * np.diag(inner)).any():
        raise InputError("beyond each image itself nothing is shared between images: similarity is undefined")
    value = hsic / np.sqrt(np.outer(own, own))
    value = value if same else value[:count, count:]
    names = tuple(a)
    return LargeCka(names, names if same else tuple(b or ()), n, value, np.full(value.shape, np.nan))


def minibatch_cka(
    read_a: Reader, layers_a: Sequence[str], read_b: Reader, layers_b: Sequence[str], n: int, *, batch: int = BATCH,
    seed: int = 0,
) -> LargeCka:  # fmt: skip
    """Debiased CKA by random disjoint batches of `batch` of the n images; every image is read once per layer.

    Standard error: delete-one-batch jackknife; it takes images for independent. Raises InputError for fewer than two
    batches, NaN, and layers that do not vary.
    """
    if batch < MIN_IMAGES or n < 2 * batch:
        raise InputError(f"{n} images in batches of {batch}: two batches of {MIN_IMAGES} or more are needed")
    order = np.random.default_rng(seed).permutation(n)
    parts = [np.sort(order[start : start + batch]) for start in range(0, n - batch + 1, batch)]
    cross = np.empty((len(parts), len(layers_a), len(layers_b)))
    own_a, own_b = np.empty((len(parts), len(layers_a))), np.empty((len(parts), len(layers_b)))
    for number, rows in enumerate(parts):
        a, b = (np.stack([_u_centred(read(name, rows), name) for name in names])
                for read, names in ((read_a, layers_a), (read_b, layers_b)))  # fmt: skip
        cross[number], own_a[number], own_b[number] = a @ b.T, np.square(a).sum(1), np.square(b).sum(1)
    sums = [part.sum(0) for part in (cross, own_a, own_b)]
    value = _ratio(*sums)
    left = np.stack([_ratio(sums[0] - cross[i], sums[1] - own_a[i], sums[2] - own_b[i]) for i in range(len(parts))])
    count = len(parts)
    error = np.sqrt((count - 1) / count * np.square(left - left.mean(0)).sum(0))
    return LargeCka(tuple(layers_a), tuple(layers_b), count * batch, value, error)


def _ratio(cross: np.ndarray, own_a: np.ndarray, own_b: np.ndarray) -> np.ndarray:
    if (own_a <= 0).any() or (own_b <= 0).any():
        raise InputError("a layer's features are the same for all images, so similarity is undefined")
    return cross / np.sqrt(np.outer(own_a, own_b))


def _u_centred(x: np.ndarray, name: str) -> np.ndarray:
    """The U-centred Gram matrix (Székely and Rizzo 2014) of one batch (m, d), as one row (m²,)."""
    x = np.asarray(x, np.float64)
    if x.ndim != 2:
        raise InputError(f"features of shape {x.shape} are not (images, width)", where=name, fix="use --pool mean")
    if not np.isfinite(x).all():
        raise InputError("the features hold NaN or infinity", where=name)
    x, m = x - x.mean(0), len(x)
    gram = x @ x.T
    np.fill_diagonal(gram, 0.0)
    sums = gram.sum(0)
    gram -= (sums[:, None] + sums) / (m - 2) - sums.sum() / ((m - 1) * (m - 2))
    np.fill_diagonal(gram, 0.0)
    return gram.ravel()
