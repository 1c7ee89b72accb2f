"""Which rows a training step sees, and what its action targets are: pure functions, no state to save.

The *global* batch is a function of (seed, step) alone, so a resumed run needs no sampler state. Each of several
processes takes its slice of it, so the data do not depend on how many there are, nor on how many workers decode.
Trap: `batch_size` is that of all processes together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from vlm4vla_core.episodes.store import EpisodeStore

_BLOCK = 4096  # samples of a mixture in which every part has its exact share


def rank_slice(batch_size: int, rank: int, world: int) -> slice:
    """The places of a global batch that process `rank` of `world` handles: equal, in order, and all of them together.

    Raises InputError when the batch does not divide evenly, which would weigh samples unequally.
    """
    if batch_size % world or not 0 <= rank < world:
        what = f"a global batch of {batch_size} does not divide among {world} processes"
        raise InputError(what, fix=f"use a multiple of {world}, such as {-(-batch_size // world) * world}")
    each = batch_size // world
    return slice(rank * each, (rank + 1) * each)


def batch_rows(
    candidates: np.ndarray, batch_size: int, seed: int, step: int, *, rank: int = 0, world: int = 1
) -> np.ndarray:
    """The rows of training step `step` (from 0): every candidate once per epoch, in a new order each epoch.

    candidates: (n,) row numbers. Returns (batch_size / world,) of them, process `rank`'s slice. A batch at the end of
    an epoch is filled from the next one, so a batch larger than `candidates` spans several epochs.
    Raises ValueError on no candidates, InputError as `rank_slice`.
    """
    position = _positions(batch_size, step, rank, world)
    return _at(np.asarray(candidates), position, seed)


def mixed_batch(
    candidates: Sequence[np.ndarray],
    weights: Sequence[float],
    batch_size: int,
    seed: int,
    step: int,
    *,
    rank: int = 0,
    world: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """A batch out of several sets of candidates: which set (B,) and which row of it (B,), the slice of process `rank`.

    Each set is drawn in proportion to its weight and gives all its rows once per epoch of its own. In every
    4,096 samples a set appears exactly its share (to 1/4096 of the total), in random order, which is what lets a
    sample's row be computed from its place alone. Raises InputError on weights that are not positive or below 1/4096
    of their sum.
    """
    position = _positions(batch_size, step, rank, world)
    weights = tuple(float(weight) for weight in weights)
    if len(weights) != len(candidates):
        raise ValueError(f"{len(weights)} weights for {len(candidates)} sets")
    block, inside = np.divmod(position, _BLOCK)
    which, row = np.empty(len(position), np.int64), np.empty(len(position), np.int64)
    for value in np.unique(block):
        here = block == value
        sets, places = _block(weights, seed, int(value))
        which[here], row[here] = sets[inside[here]], places[inside[here]]
    for number, rows in enumerate(candidates):
        mine = which == number
        row[mine] = _at(np.asarray(rows), row[mine], seed, number)
    return which, row


@lru_cache(maxsize=8)
def _block(weights: tuple[float, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """For the samples of one block: the set (_BLOCK,) and how many samples that set has given before (_BLOCK,)."""
    shares = _shares(weights)
    which = np.repeat(np.arange(len(shares)), shares)[_permutation(_BLOCK, seed, block, _MIX)]
    place = np.empty(_BLOCK, np.int64)
    for number, share in enumerate(shares):
        place[which == number] = block * share + np.arange(share)
    return which, place


_MIX = 1 << 31  # keeps the choice of sets apart from the orders within sets


def _positions(batch_size: int, step: int, rank: int, world: int) -> np.ndarray:
    """The places of a step's samples, this process's slice of them, in the endless sequence of all samples."""
    if batch_size < 1 or step < 0:
        raise ValueError(f"no batch of {batch_size} at step {step}")
    return step * batch_size + np.arange(batch_size)[rank_slice(batch_size, rank, world)]


def _shares(weights: tuple[float, ...]) -> np.ndarray:
    """(k,) integers in proportion to the weights, of the sum _BLOCK (largest remainders)."""
    sound = bool(weights) and all(0 < weight < np.inf for weight in weights)
    exact = np.array(weights) / sum(weights) * _BLOCK if sound else np.zeros(1)
    if exact.min() < 1:
        what = f"weights {', '.join(f'{weight:g}' for weight in weights) or 'none'} make no mixture"
        raise InputError(what, fix=f"give positive weights, each at least 1/{_BLOCK} of their sum")
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: _BLOCK - shares.sum()]] += 1
    return shares


def _at(candidates: np.ndarray, position: np.ndarray, seed: int, *key: int) -> np.ndarray:
    """Candidates at places of the endless sequence of their epochs; the order of each epoch is drawn anew."""
    n = len(candidates)
    if n == 0:
        raise ValueError("no batch out of 0 candidates")
    epoch, place = np.divmod(position, n)
    order = np.empty(len(position), np.int64)
    for value in np.unique(epoch):
        here = epoch == value
        order[here] = _permutation(n, seed, int(value), *key)[place[here]]
    return candidates[order]


@lru_cache(maxsize=16)  # steps of one epoch share a permutation; two epochs of each set meet in one batch
def _permutation(n: int, *key: int) -> np.ndarray:
    return np.random.default_rng(key).permutation(n)


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

    action: (N, A), episode_of: (N,) ascending, rows: (B,).
    Returns chunks (B, chunk, A) and mask (B, chunk), True where the action is real; past the end of
    the episode its last action is repeated and the mask is False.
    """
    last = episode_of.searchsorted(episode_of.take(rows), "right")[:, None] - 1  # (B, 1) row that ends the episode
    index = np.asarray(rows)[:, None] + np.arange(chunk)  # (B, chunk)
    mask = index <= last
    return action.take(np.minimum(index, last, out=index), axis=0), mask
