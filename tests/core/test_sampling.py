"""Sampling: pure in (seed, step), whole epochs, chunks within episodes, normalisation by OpenVLA's rule."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm4vla_core.episodes.normalise import quantile_denormalise, quantile_normalise
from vlm4vla_core.episodes.sampling import (
    action_chunks,
    batch_rows,
    mixed_batch,
    split_episodes,
)
from vlm4vla_core.errors import InputError

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


def test_the_order_of_existing_runs_stays():
    """Stored from the first version: a run that is resumed must meet the rows it would have met."""
    assert batch_rows(np.arange(12), 8, 3, 1).tolist() == [9, 5, 3, 8, 0, 4, 11, 1]


@HYPOTHESIS
@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 5), st.integers(0, 9))
def test_slices_of_all_processes_are_the_batch(n: int, each: int, world: int, step: int):
    size = each * world
    parts = [batch_rows(np.arange(n), size, 5, step, rank=rank, world=world) for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate(parts), batch_rows(np.arange(n), size, 5, step))
    sets = [np.arange(n), 100 + np.arange(3)]
    mixed = [mixed_batch(sets, (1, 2), size, 5, step, rank=rank, world=world) for rank in range(world)]
    for part, whole in zip(zip(*mixed, strict=True), mixed_batch(sets, (1, 2), size, 5, step), strict=True):
        np.testing.assert_array_equal(np.concatenate(part), whole)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match=r"batch of 10 does not divide among 4 processes.*such as 12"):
        batch_rows(np.arange(5), 10, 0, 0, rank=0, world=4)
    with pytest.raises(InputError, match="does not divide"):
        batch_rows(np.arange(5), 8, 0, 0, rank=4, world=4)


# --- mixtures


@HYPOTHESIS
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 97), st.integers(0, 3), st.data())
def test_a_mixture_gives_every_row_of_a_set_once_per_epoch_of_that_set(sizes, batch, seed, data):
    weights = data.draw(st.lists(st.floats(0.01, 1), min_size=len(sizes), max_size=len(sizes)))
    sets = [1000 * k + np.arange(size) for k, size in enumerate(sizes)]
    seen: list[list[int]] = [[] for _ in sets]
    for step in range(12):
        for which, row in zip(*mixed_batch(sets, weights, batch, seed, step), strict=True):
            assert row // 1000 == which
            seen[which].append(int(row))
    for rows, seen_rows in zip(sets, seen, strict=True):
        for start in range(0, len(seen_rows) - len(rows) + 1, len(rows)):
            assert sorted(seen_rows[start : start + len(rows)]) == rows.tolist()


def test_epochs_of_a_mixture_go_on_from_block_to_block():
    """Five blocks of 4,096 samples: the epochs of both sets reach across their borders."""
    sets = [np.arange(700), 1000 + np.arange(3001)]
    rows = np.concatenate([mixed_batch(sets, (1, 2), 512, 3, step)[1] for step in range(40)])
    for part in sets:
        mine = rows[np.isin(rows, part)]
        assert len(mine) > 4 * len(part)
        for start in range(0, len(mine) - len(part) + 1, len(part)):
            assert sorted(mine[start : start + len(part)]) == part.tolist()


def test_the_shares_of_a_mixture_are_its_weights():
    sets = [np.arange(7), np.arange(1000), np.arange(50)]
    weights = np.array([0.1, 3.0, 0.7])
    which = np.concatenate([mixed_batch(sets, weights, 512, 0, step)[0] for step in range(80)])  # ten blocks of 4096
    exact = weights / weights.sum() * len(which)
    np.testing.assert_allclose(np.bincount(which), exact, atol=10)
    for start in range(0, len(which), 512):  # and each batch is near to them: a draw without replacement
        share = np.bincount(which[start : start + 512], minlength=3)
        assert (np.abs(share - 512 * weights / weights.sum()) < 5 * np.sqrt(512 * 0.25)).all()
    assert (which[:512] != np.sort(which[:512])).any()
    again, _ = mixed_batch(sets, weights, 512, 0, 0)
    np.testing.assert_array_equal(again, which[:512])
    assert (mixed_batch(sets, weights, 512, 1, 0)[0] != which[:512]).any()


def test_weights_that_make_no_mixture_are_refused():
    for weights in ([], [1, 0], [1, -1], [-1, -1], [1, float("nan")], [1, 1e-5], [1, float("inf")]):
        with pytest.raises(InputError, match="make no mixture"):
            mixed_batch([np.arange(2)] * len(weights), weights, 4, 0, 0)
    with pytest.raises(ValueError, match="1 weights for 2 sets"):
        mixed_batch([np.arange(2)] * 2, [1], 4, 0, 0)


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
