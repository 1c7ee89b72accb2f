"""Labels with nothing to know: those of other episodes, and random functions of a recurring type (a control task).

A readout of other episodes' labels says what the method finds where nothing is to be found. A control task (Hewitt and
Liang 2019) says how much a readout can learn by heart: every type of picture gets a random label, the same in all
parts. Its types are clusters of coarse pixels. Selectivity: score of the task minus score of the control task.
Trap: labels that are random per episode cannot be learnt by anything; the type must recur in fit and test episodes.
"""

from __future__ import annotations

import numpy as np

TYPES = 32  # clusters of pictures


def other_episodes(y: np.ndarray, episodes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Every episode gets the labels of another one, stretched to its length, so their course in time is kept."""
    rows = [np.flatnonzero(episodes == episode) for episode in np.unique(episodes)]
    ring = rng.permutation(len(rows))  # each gives to the next on a random ring: no episode keeps its own
    out = np.empty_like(y)
    for giver, taker in zip(ring, np.roll(ring, -1), strict=True):
        source, goal = rows[giver], rows[taker]
        out[goal] = y[source[np.linspace(0, len(source) - 1, len(goal)).round().astype(int)]]
    return out


def types_of(pixels: np.ndarray, fit: np.ndarray, *, seed: int = 0, types: int = TYPES) -> np.ndarray:
    """Cluster number (n,) of every row of pixels (n, p); the clusters are found on the fitted rows alone.

    k-means on the leading components of standardised pixels, at most one cluster per ten fitted rows.
    """
    from scipy.cluster.vq import kmeans2, vq

    mean, sd = pixels[fit].mean(0), pixels[fit].std(0).mean() or 1.0
    z = (pixels - mean) / sd
    _, _, turn = np.linalg.svd(z[fit][:: max(1, len(fit) // 2000)], full_matrices=False)
    z = z @ turn[:16].T
    count = int(np.clip(len(fit) // 10, 2, types))
    centres, _ = kmeans2(z[fit], count, minit="++", seed=np.random.default_rng(seed))
    return vq(z, centres)[0]


def control_labels(y: np.ndarray, types: np.ndarray, fit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels like y (n, …) that are a random function of the type: each type has those of one fitted row."""
    drawn = y[rng.choice(fit, types.max() + 1)]
    return drawn[types]
