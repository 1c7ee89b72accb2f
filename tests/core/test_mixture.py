"""Mixtures of stores: what is drawn, what is refused, no training episode among validation ones, two real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import OBJECTS, STATE, toy_store

from vlm4vla_core.actions import BRIDGE, TABLETOP
from vlm4vla_core.episodes.mixture import Mixture, mix
from vlm4vla_core.episodes.store import Episode, EpisodeStore, statistics, write_store
from vlm4vla_core.errors import InputError


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    folder = tmp_path_factory.mktemp("stores")
    small = toy_store(folder / "small", episodes=4, steps=5, seed=1)
    return mix([toy_store(folder / "big", episodes=12), small], [3, 1])


def test_samples_are_those_of_the_stores_in_batch_order(mixture: Mixture):
    which, rows = mixture.batch(16, seed=0, step=3)
    found = mixture.samples(which, rows, cameras=("front", "front"), size=20, chunk=4)
    assert set(which) == {0, 1}
    for b, (part, row) in enumerate(zip(which, rows, strict=True)):
        store = mixture.stores[part]
        assert row in mixture.train[part]
        np.testing.assert_array_equal(found.images[b], store.images("front", [row], 20)[0])
        episode = store.episode_of[row]
        end = store.starts[episode] + store.lengths[episode] - 1
        assert found.instructions[b] == store.instructions[episode]
        np.testing.assert_array_equal(found.actions[b], store.action[np.minimum(row + np.arange(4), end)])
        np.testing.assert_array_equal(found.mask[b], row + np.arange(4) <= end)


def test_weights_default_to_the_training_rows_and_statistics_pool_all_steps(mixture: Mixture):
    plain = mix(mixture.stores)
    assert plain.weights == tuple(len(rows) for rows in plain.train)
    everything = [store.action for store in mixture.stores]
    assert plain.action_statistics() == statistics(np.concatenate(everything))
    assert plain.action_statistics()["count"] == 12 * 6 + 4 * 5


def store_of(path: Path, episodes: list[tuple[int, str]], convention=TABLETOP) -> EpisodeStore:
    """A store of three-step episodes; equal numbers are copies of one another."""
    made = [
        Episode(
            instruction="go", split=split,
            images={"front": np.full((3, 16, 16, 3), number, np.uint8)},
            state=np.full((3, 7), number, np.float32), action=np.full((3, 7), number, np.float32),
            columns={"truth/objects": np.zeros((3, 6), np.float32)},
        )
        for number, split in episodes
    ]  # fmt: skip
    return write_store(
        path, made, source="m", convention=convention, state_names=STATE, column_names={"truth/objects": OBJECTS},
        config={}, inputs={},
    )  # fmt: skip


def test_what_one_store_trains_on_is_not_validated_on_in_another(tmp_path: Path):
    first = store_of(tmp_path / "a", [(1, "train"), (2, "train"), (3, "val"), (2, "val")])
    second = store_of(tmp_path / "b", [(3, "train"), (4, "train"), (1, "val"), (5, "val")])
    found = mix([first, second])
    assert [rows.tolist() for rows in found.train] == [[0, 1, 2, 3, 4, 5]] * 2
    # 3 and 1 are trained on in the other store, the second 2 in its own: three episodes go, only 5 stays.
    assert [rows.tolist() for rows in found.val] == [[], [9, 10, 11]]
    assert found.dropped == 3
    assert mix([first]).dropped == 1
    assert mix([second]).dropped == 0


def test_mixed_conventions_are_refused(tmp_path: Path):
    first = store_of(tmp_path / "a", [(1, "train")])
    other = store_of(tmp_path / "b", [(2, "train")], replace(BRIDGE, control_hz=3.0))
    with pytest.raises(InputError, match=r"frame .*; control_hz 5.0 against 3.0 \[.*b\]"):
        mix([first, other])


_CHILD = """
import json, sys, zlib
from vlm4vla_core.episodes.augment import BRIDGE, augment
from vlm4vla_core.episodes.mixture import mix
from vlm4vla_core.episodes.sampling import rank_slice
from vlm4vla_core.episodes.store import EpisodeStore

def seen(mixture, rank, world):
    out = []
    for step in (7, 2, 8):  # in any order, from any step: nothing is remembered
        which, rows = mixture.batch(12, 5, step, rank=rank, world=world)
        found = mixture.samples(which, rows, cameras=("front", "front"), size=24, chunk=3)
        pictures = augment(found.images, BRIDGE, 5, step, first=rank_slice(12, rank, world).start)
        out.append([which.tolist(), rows.tolist(), found.actions.tolist(), [zlib.crc32(p) for p in pictures]])
    return out

if __name__ == "__main__":
    stores = [EpisodeStore.open(path) for path in sys.argv[2:]]
    print(json.dumps(seen(mix(stores, [3, 1]), int(sys.argv[1]), 2)))
"""


def test_two_processes_see_the_slices_of_the_single_process_batch(mixture: Mixture):
    def start(rank: int) -> subprocess.Popen[str]:
        words = [str(rank), *(str(store.path) for store in mixture.stores)]
        return subprocess.Popen([sys.executable, "-c", _CHILD, *words], stdout=subprocess.PIPE, text=True)

    processes = [start(0), start(1)]
    here: dict[str, Any] = {}
    exec(_CHILD, here)
    whole = json.loads(json.dumps(here["seen"](mixture, 0, 1)))
    slices = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert len(whole) == 3
    for step, expected in enumerate(whole):
        for field, value in enumerate(expected):
            assert slices[0][step][field] + slices[1][step][field] == value
