"""Which rows a training step sees, and what its action targets are: pure functions, no state to save.

The data order is a function of (seed, step) alone, so a resumed run needs no sampler state.
Trap: statistics must be those of the *transformed* actions, and the gripper (last) is never normalised.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vlm4vla_core.episodes.store import EpisodeStore


def batch_rows(candidates: np.ndarray, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The rows of training step `step` (from 0): every candidate once per epoch, in a new order each epoch.

    candidates: (n,) row numbers. Returns (batch_size,) of them. A batch at the end of an epoch is filled from
    the next one, so a batch larger than `candidates` spans several epochs. Raises ValueError on no candidates.
    """
    n = len(candidates)
    if n == 0 or batch_size < 1 or step < 0:
        raise ValueError(f"no batch of {batch_size} out of {n} candidates at step {step}")
    position = step * batch_size + np.arange(batch_size)  # (B,) place in the endless sequence of epochs
    epoch, place = np.divmod(position, n)
    order = np.empty(batch_size, np.int64)
    for value in np.unique(epoch):
        here = epoch == value
        order[here] = _permutation(n, seed, int(value))[place[here]]
    return np.asarray(candidates)[order]


@lru_cache(maxsize=4)  # steps of one epoch share a permutation; two epochs meet in one batch
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def split_episodes(store: EpisodeStore, fraction: float = 0.1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to validate on, split by episode: (n_train,), (n_val,), both ascending.

    Declared splits are kept when the store has both; a validation episode whose content also occurs in training
    is left out of both then. Otherwise `fraction` of the distinct episodes (at least one, never all) is held
    out, copies of an episode staying together. A store with one distinct episode yields no validation rows.
    """
    content = np.asarray(store.content)  # (E,) equal for episodes with the same actions, states and first images
    declared = np.asarray(store.splits) == "val"
    if declared.any() and not declared.all():
        val = declared & ~np.isin(content, content[~declared])
        if val.any():
            return _rows(store, ~declared), _rows(store, val)
    groups = np.unique(content)
    held_out = min(max(1, round(fraction * len(groups))), len(groups) - 1) if fraction > 0 else 0
    chosen = np.random.default_rng(seed).permutation(groups)[:held_out]
    val = np.isin(content, chosen)
    return _rows(store, ~val), _rows(store, val)


def _rows(store: EpisodeStore, episodes: np.ndarray) -> np.ndarray:
    return np.flatnonzero(episodes[store.episode_of])


def action_chunks(
    action: np.ndarray, episode_of: np.ndarray, rows: np.ndarray, chunk: int
) -> tuple[np.ndarray, np.ndarray]:
    """The next `chunk` actions from each row on, never crossing into another episode.

    action: (N, A), episode_of: (N,) with each episode's rows together, rows: (B,).
    Returns chunks (B, chunk, A) float32 and mask (B, chunk), True where the action is real; past the end of
    the episode its last action is repeated and the mask is False.
    """
    rows = np.asarray(rows)
    index = rows[:, None] + np.arange(chunk)  # (B, chunk)
    inside = np.minimum(index, len(action) - 1)
    mask = (index < len(action)) & (episode_of[inside] == episode_of[rows][:, None])
    last = rows + mask.sum(axis=1) - 1  # rows of an episode are together, so the mask is a prefix
    return action[np.minimum(index, last[:, None])].astype(np.float32, copy=False), mask


def quantile_normalise(action: np.ndarray, q01: np.ndarray, q99: np.ndarray) -> np.ndarray:
    """OpenVLA's rule: 2 (a - q01) / (q99 - q01 + 1e-8) - 1, clipped to [-1, 1]; the last dimension is left alone.

    action: (..., A) physical units; q01, q99: (A,). Returns float32 (..., A). A dimension with q01 = q99 becomes 0.
    """
    low, high, constant = _bounds(q01, q99)
    out = np.array(action, dtype=np.float32)
    scaled = np.clip(2 * (out - low) / (high - low + np.float32(1e-8)) - 1, -1, 1)
    out[..., :-1] = np.where(constant, np.float32(0), scaled)[..., :-1]
    return out


def quantile_denormalise(action: np.ndarray, q01: np.ndarray, q99: np.ndarray) -> np.ndarray:
    """The way back of `quantile_normalise` (what was clipped stays clipped); shapes as there.

    A dimension with q01 = q99 becomes q01 whatever was predicted.
    """
    low, high, constant = _bounds(q01, q99)
    out = np.array(action, dtype=np.float32)
    physical = (out + 1) / 2 * (high - low + np.float32(1e-8)) + low
    out[..., :-1] = np.where(constant, low, physical)[..., :-1]
    return out


def _bounds(q01: np.ndarray, q99: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    low, high = np.asarray(q01, np.float32), np.asarray(q99, np.float32)
    return low, high, low == high
