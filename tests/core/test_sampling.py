"""Sampling: pure in (seed, step), whole epochs, chunks within episodes, normalisation by OpenVLA's rule."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm4vla_core.episodes.sampling import (
    action_chunks,
    batch_rows,
    quantile_denormalise,
    quantile_normalise,
    split_episodes,
)

HYPOTHESIS = settings(deadline=None, derandomize=True, max_examples=80)


@HYPOTHESIS
@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 5))
def test_every_row_once_per_epoch_whatever_the_batch_size(n: int, batch: int, seed: int):
    candidates = np.arange(n) * 3 + 7
    steps = -(-3 * n // batch)  # three epochs and a bit
    rows = np.concatenate([batch_rows(candidates, batch, seed, step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(rows[epoch * n : (epoch + 1) * n]) == candidates.tolist()


@HYPOTHESIS
@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 5), st.integers(0, 30))
def test_a_batch_depends_on_seed_and_step_alone(n: int, batch: int, seed: int, step: int):
    alone = batch_rows(np.arange(n), batch, seed, step)
    np.random.seed(step)  # noqa: NPY002  (global state must not matter)
    for before in (step + 3, 0, step):
        batch_rows(np.arange(n), batch, seed + 1, before)
    np.testing.assert_array_equal(batch_rows(np.arange(n), batch, seed, step), alone)


def test_orders_differ_between_epochs_and_seeds():
    first, second = (batch_rows(np.arange(100), 100, 0, step) for step in (0, 1))
    assert (first != second).any()
    assert (first != batch_rows(np.arange(100), 100, 1, 0)).any()


def test_no_candidates_is_an_error():
    with pytest.raises(ValueError, match="0 candidates"):
        batch_rows(np.arange(0), 4, 0, 0)


@HYPOTHESIS
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 9), st.integers(0, 2**31))
def test_chunks_never_cross_an_episode(lengths: list[int], chunk: int, seed: int):
    episode_of = np.repeat(np.arange(len(lengths)), lengths)
    action = np.random.default_rng(seed).normal(size=(len(episode_of), 3)).astype(np.float32)
    rows = np.random.default_rng(seed).integers(0, len(action), 5)
    chunks, mask = action_chunks(action, episode_of, rows, chunk)
    assert chunks.shape == (5, chunk, 3)
    assert chunks.dtype == np.float32
    for b, row in enumerate(rows):
        episode = action[episode_of == episode_of[row]]
        place = row - np.flatnonzero(episode_of == episode_of[row])[0]
        for k in range(chunk):
            np.testing.assert_array_equal(chunks[b, k], episode[min(place + k, len(episode) - 1)])
            assert mask[b, k] == (place + k < len(episode))


def fake_store(lengths: list[int], splits: list[str], content: list[str]) -> SimpleNamespace:
    episode_of = np.repeat(np.arange(len(lengths)), lengths)
    return SimpleNamespace(episode_of=episode_of, splits=splits, content=content)


@HYPOTHESIS
@given(
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["train", "val"]), st.sampled_from("abcd")), min_size=1),
    st.floats(0, 1),
    st.integers(0, 3),
)
def test_copies_are_never_on_both_sides(episodes: list, fraction: float, seed: int):
    lengths, splits, content = map(list, zip(*episodes, strict=True))
    store = fake_store(lengths, splits, content)
    train, val = split_episodes(store, fraction, seed)
    of_row = np.array(content)[store.episode_of]
    assert len(train) > 0
    assert set(of_row[train]).isdisjoint(of_row[val])
    assert set(store.episode_of[train]).isdisjoint(store.episode_of[val])
    assert (np.diff(train) > 0).all()
    np.testing.assert_array_equal(val, split_episodes(store, fraction, seed)[1])
    if len(set(content)) > 1 and fraction > 0:
        assert len(val) > 0


def test_declared_splits_are_kept_unless_they_repeat_training():
    train, val = split_episodes(fake_store([2, 2, 2], ["train", "val", "val"], ["a", "b", "a"]))
    assert (train.tolist(), val.tolist()) == ([0, 1], [2, 3])  # the copy of a in val is on neither side
    train, val = split_episodes(fake_store([1] * 6, ["train", "val"] * 3, ["a", "a", "b", "b", "c", "c"]))
    assert len(train) == 4  # val repeats train entirely, so one of three distinct episodes is held out with its copy
    assert len(val) == 2


def test_a_tenth_of_the_episodes_is_held_out():
    train, val = split_episodes(fake_store([3] * 40, ["train"] * 40, [str(n) for n in range(40)]))
    assert (len(train), len(val)) == (108, 12)
    other = split_episodes(fake_store([3] * 40, ["train"] * 40, [str(n) for n in range(40)]), seed=1)[1]
    assert other.tolist() != val.tolist()


def test_normalisation_by_hand_and_back():
    q01, q99 = [-1.0, 0.0, 2.0, 0.0], [1.0, 4.0, 2.0, 1.0]
    action = np.array([[-1, 1, 9, 1], [0.5, 4, 2, 0], [3, -7, 2, 0.25]], np.float32)
    expected = [[-1, -0.5, 0, 1], [0.5, 1, 0, 0], [1, -1, 0, 0.25]]  # third constant, gripper as it is
    found = quantile_normalise(action, q01, q99)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    back = [[-1, 1, 2, 1], [0.5, 4, 2, 0], [1, 0, 2, 0.25]]  # clipped stays clipped, constant is its value
    np.testing.assert_allclose(quantile_denormalise(found, q01, q99), back, atol=1e-6)
    assert quantile_denormalise(np.full((2, 3, 4), 0.3), q01, q99).shape == (2, 3, 4)


@HYPOTHESIS
@given(st.integers(0, 2**31))
def test_within_the_quantiles_normalisation_is_undone(seed: int):
    rng = np.random.default_rng(seed)
    q01 = rng.normal(size=7)
    q99 = q01 + rng.uniform(0.01, 2, 7)
    action = (q01 + rng.uniform(0, 1, (20, 7)) * (q99 - q01)).astype(np.float32)
    normalised = quantile_normalise(action, q01, q99)
    assert np.abs(normalised[:, :6]).max() <= 1
    np.testing.assert_allclose(quantile_denormalise(normalised, q01, q99), action, atol=2e-6)
