"""Several stores as one training set: a weighted mixture whose batches are a function of (seed, step) alone.

Trap: numbers of equal shape may mean different things, so stores of different action conventions are refused
(`transforms.convert` says whether one can be brought into the other), and an episode that one store trains on is never
validated on in another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlm4vla_core.episodes.sampling import action_chunks, mixed_batch, split_episodes
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from vlm4vla_core.episodes.store import EpisodeStore


class Samples(NamedTuple):
    """images: uint8 (B, size, size, 3); instructions: B texts; actions: (B, chunk, A) float32; mask: (B, chunk)
    bool."""

    images: np.ndarray
    instructions: list[str]
    actions: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Mixture:
    """Stores with their weights and, for each of them, the rows to train and to validate on (ascending).

    dropped: validation episodes left out because the same content is trained on in one of the stores.
    """

    stores: tuple[EpisodeStore, ...]
    weights: tuple[float, ...]
    train: tuple[np.ndarray, ...]
    val: tuple[np.ndarray, ...]
    dropped: int

    def batch(
        self, batch_size: int, seed: int, step: int, *, rank: int = 0, world: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which store (B,) and which of its rows (B,) training step `step` sees; see `sampling.mixed_batch`."""
        return mixed_batch(self.train, self.weights, batch_size, seed, step, rank=rank, world=world)

    def samples(self, which: np.ndarray, rows: np.ndarray, *, cameras: Sequence[str], size: int, chunk: int) -> Samples:
        """What is stored for a batch, in its order; cameras: one name per store. Images are at `size`."""
        width = self.stores[0].convention.size
        found = Samples(
            np.empty((len(rows), size, size, 3), np.uint8),
            [
                self.stores[part].instructions[self.stores[part].episode_of[row]]
                for part, row in zip(which, rows, strict=True)
            ],
            np.empty((len(rows), chunk, width), np.float32),
            np.empty((len(rows), chunk), bool),
        )
        for part in np.unique(which):
            store, mine = self.stores[part], which == part
            found.images[mine] = store.images(cameras[part], rows[mine], size)
            found.actions[mine], found.mask[mine] = action_chunks(store.action, store.episode_of, rows[mine], chunk)
        return found

    def action_statistics(self) -> dict[str, Any]:
        """Statistics of all stores' actions together, every step once whatever the weights; as a store's own."""
        from vlm4vla_core.episodes.store import statistics

        return statistics(np.concatenate([store.action for store in self.stores]))


def mix(
    stores: Sequence[EpisodeStore], weights: Sequence[float] | None = None, *, fraction: float = 0.1, seed: int = 0
) -> Mixture:
    """A mixture of stores, each split by episode (`sampling.split_episodes`); weights default to their training rows.

    Raises InputError when a store's action convention differs from the first one's, naming how.
    """
    for store in stores[1:]:
        if wrong := stores[0].convention.differences(store.convention):
            what = f"its actions mean something else than those of {stores[0].path}: {'; '.join(wrong)}"
            raise InputError(what, where=store.path, fix="mix stores of one action convention")
    splits = [split_episodes(store, fraction, seed) for store in stores]
    contents = [np.asarray(store.content) for store in stores]
    trained = {
        text for store, content, (train, _) in zip(stores, contents, splits, strict=True)
        for text in content[np.unique(store.episode_of[train])]
    }  # fmt: skip
    val, dropped = [], 0
    for store, content, (train, held_out) in zip(stores, contents, splits, strict=True):
        fresh = ~np.isin(content, list(trained))  # (E,)
        val.append(held_out[fresh[store.episode_of[held_out]]])
        dropped += len(content) - len(np.unique(store.episode_of[train])) - len(np.unique(store.episode_of[val[-1]]))
    given = tuple(float(weight) for weight in ([len(train) for train, _ in splits] if weights is None else weights))
    return Mixture(tuple(stores), given, tuple(train for train, _ in splits), tuple(val), dropped)
