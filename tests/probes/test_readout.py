"""Ridge against a literal least-squares solve, splits by episode, planted signals of known R², interval coverage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.control import other_episodes
from probes.grid import ALPHAS, Parts, ridge_path
from probes.readout import Readout, _interval, best_layer, compare_probes, read_out, split
from probes.targets import target_of
from vlm4vla_core.errors import InputError


def episodes_of(count: int, length: int) -> np.ndarray:
    return np.repeat(np.arange(count), length)


# --- ridge ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(30, 8), (12, 40)])  # both routes
@pytest.mark.parametrize("alpha", [1e-4, 0.3, 50.0])
def test_ridge_equals_least_squares_with_added_rows(n: int, d: int, alpha: float) -> None:
    rng = np.random.default_rng(n)
    x, x_new, y = 5 + rng.normal(size=(n, d)) * np.arange(1, d + 1), rng.normal(size=(7, d)), rng.normal(size=(n, 2))
    scale = np.maximum(x.std(0), 0.1 * np.sqrt(x.var(0).mean()))  # the smallest scales have a floor
    z, z_new = (x - x.mean(0)) / scale, (x_new - x.mean(0)) / scale
    stacked = np.vstack([z, np.sqrt(alpha * n) * np.eye(d)])
    weights = np.linalg.lstsq(stacked, np.vstack([y - y.mean(0), np.zeros((d, 2))]), rcond=None)[0]
    got = ridge_path(x, y, x_new, np.array([9.0, alpha]))
    assert got.shape == (2, 7, 2)
    np.testing.assert_allclose(got[1], z_new @ weights + y.mean(0), rtol=1e-7, atol=1e-9)


def test_ridge_in_either_space_is_the_same() -> None:
    rng = np.random.default_rng(0)
    x, x_new, y = rng.normal(size=(20, 6)), rng.normal(size=(5, 6)), rng.normal(size=(20, 3))
    tall = ridge_path(x, y, x_new, ALPHAS)
    wide = ridge_path(np.hstack([x, np.ones((20, 30))]), y, np.hstack([x_new, np.full((5, 30), 9.0)]), ALPHAS)
    np.testing.assert_allclose(wide, tall, rtol=1e-6, atol=1e-9)  # constant columns change the route, nothing else


# --- splitting --------------------------------------------------------------------------------------------


@given(st.integers(3, 40), st.integers(1, 5), st.integers(0, 99))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_no_episode_nor_copy_of_one_is_on_two_sides(count: int, length: int, seed: int) -> None:
    episodes = episodes_of(2 * count, length)
    content = np.array([f"hash {episode % count}" for episode in episodes])  # every episode has a copy
    parts = split(episodes, content=content, seed=seed)
    assert sorted(np.concatenate(parts)) == list(range(len(episodes)))
    sides = [set(content[part]) for part in parts]
    assert all(sides) and not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    again = split(episodes, content=content, seed=seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_split_counts_and_too_few_episodes() -> None:
    parts = split(episodes_of(50, 4), seed=1)
    assert [len(part) // 4 for part in parts] == [30, 10, 10]
    with pytest.raises(InputError, match="2 distinct episodes cannot be split"):
        split(episodes_of(2, 10))
    with pytest.raises(InputError, match="1 distinct episode cannot"):
        split(episodes_of(4, 10), content=np.full(40, "same"))


# --- readouts ---------------------------------------------------------------------------------------------


def planted(seed: int = 0, count: int = 60, length: int = 20, noise: float = 0.5) -> tuple[np.ndarray, ...]:
    """Features (n, 10), a linear target (n, 3) of unit signal variance with noise, episodes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count * length, 10))
    weights = np.linalg.qr(rng.normal(size=(10, 3)))[0]
    return x, x @ weights + noise * rng.normal(size=(len(x), 3)), episodes_of(count, length)


def test_planted_signal_is_recovered_with_its_known_r2_and_error() -> None:
    x, y, episodes = planted(noise=0.5)  # population R² = 1 / (1 + 0.25) = 0.8
    readout = read_out("planted", x, y, episodes, split(episodes), dims=("x", "y", "z"))
    assert readout.mean == pytest.approx(0.8, abs=0.03)
    assert readout.mean == pytest.approx(readout.r2.mean()) and readout.r2.shape == (3,)
    assert readout.interval is not None and readout.interval.low < 0.8 < readout.interval.high
    # mean length of a 3-vector of independent normal errors with sd 0.5: 0.5 sqrt(8 / pi), in mm
    assert readout.error_mm == pytest.approx(500 * np.sqrt(8 / np.pi), rel=0.05)
    assert readout.episodes == (36, 12, 12) and readout.frames == (720, 240, 240)
    assert abs(readout.shuffled.mean()) < 0.05 and len(readout.shuffled) == 20
    assert readout.selected == pytest.approx(0.8, abs=0.04)


def test_mean_predictor_scores_exactly_zero() -> None:
    _, y, episodes = planted()
    readout = read_out("constant", np.full((len(y), 4), 0.1), y, episodes, split(episodes))
    np.testing.assert_allclose(readout.r2, 0, atol=1e-12)


def test_features_that_only_name_the_episode_say_nothing_of_new_episodes() -> None:
    """The trap: split by frame, a random code per episode would explain everything that is constant in it."""
    rng = np.random.default_rng(1)
    episodes = episodes_of(40, 15)
    x, y = rng.normal(size=(40, 12))[episodes], rng.normal(size=(40, 3))[episodes]
    y = y + 0.01 * rng.normal(size=y.shape)
    assert read_out("code", x, y, episodes, split(episodes)).mean < 0.2
    frames = rng.permutation(600)
    with pytest.raises(InputError, match=r"episode \d+ is on two sides of the split"):
        read_out("code", x, y, episodes, Parts(frames[:400], frames[400:500], frames[500:]))


def test_strength_is_chosen_on_the_selection_episodes_alone() -> None:
    """Test targets changed to nonsense leave strength and selection score as they were; selection ones do not."""
    x, y, episodes = planted(count=20, length=3, noise=2.0)
    parts = split(episodes)
    before = read_out("a", x, y, episodes, parts)
    swapped = y.copy()
    swapped[parts.test] = swapped[parts.test][::-1] * 5
    after = read_out("a", x, swapped, episodes, parts)
    assert (after.alpha, after.selected) == (before.alpha, before.selected) and after.mean != before.mean
    swapped = y.copy()
    swapped[parts.select] *= -1
    flipped = read_out("a", x, swapped, episodes, parts)
    assert flipped.alpha > before.alpha and flipped.selected < before.selected


def test_shuffled_labels_come_from_other_episodes_and_keep_their_order() -> None:
    episodes = np.repeat([3, 5, 9], [4, 6, 2])
    y = np.stack([episodes * 100.0 + np.concatenate([np.arange(4), np.arange(6), np.arange(2)])], axis=1)
    for seed in range(20):
        out = other_episodes(y, episodes, np.random.default_rng(seed))
        assert not np.any(out // 100 == y // 100)
        for episode in (3, 5, 9):
            part = out[episodes == episode, 0]
            assert len(np.unique(part // 100)) == 1 and np.all(np.diff(part) >= 0)


def test_layer_is_chosen_by_its_selection_score() -> None:
    def of(selected: float, mean: float) -> Readout:
        zeros = np.zeros((2, 1))
        return Readout("", ("x",), zeros[0], mean, None, 0.0, 1.0, selected, zeros[0], (1, 1, 1), (1, 1, 1),
                       zeros[:, 0], zeros, zeros)  # fmt: skip

    assert best_layer({"vision.0": of(0.5, 0.9), "vision.1": of(0.6, 0.1)}) == "vision.1"


# --- comparison and intervals -----------------------------------------------------------------------------


def test_comparison_is_paired() -> None:
    x, y, episodes = planted(noise=1.0)
    parts = split(episodes)
    rng = np.random.default_rng(2)
    full = read_out("full", x, y, episodes, parts)
    worse = read_out("worse", x + 0.3 * rng.normal(size=x.shape), y, episodes, parts)
    difference = compare_probes(full, worse)
    assert difference.value == pytest.approx(full.mean - worse.mean)
    assert difference.interval is not None and 0 < difference.interval.low < difference.value
    assert full.interval is not None
    paired, single = np.ptp(difference.interval), np.ptp(full.interval)
    assert paired < 0.7 * single  # what both share drops out
    same = compare_probes(full, full)
    assert same.value == 0 and same.interval == (0, 0)
    elsewhere = read_out("elsewhere", x, y, episodes, split(episodes, seed=5))
    with pytest.raises(InputError, match="not tested on the same frames of the same episodes"):
        compare_probes(full, elsewhere)


def test_one_test_episode_has_no_interval() -> None:
    x, y, episodes = planted(count=3)
    parts = split(episodes)
    readout = read_out("small", x, y, episodes, parts)
    assert readout.interval is None and compare_probes(readout, readout).interval is None


@pytest.mark.slow
@pytest.mark.parametrize(("episodes", "tail"), [(5, 2.0), (12, 0.5), (30, 2.0)])
def test_interval_over_episodes_covers_the_truth(episodes: int, tail: float) -> None:
    """Errors of very unequal episodes; the true R² is 0.7 in every dimension."""
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(800):
        sst = rng.gamma(3, 1, size=(episodes, 3))
        sse = 0.3 * sst * rng.gamma(tail, 1 / tail, size=(episodes, 3))
        interval = _interval(sse, sst, 500, trial)
        hits += interval is not None and interval.low <= 0.7 <= interval.high
    assert 0.91 <= hits / 800 <= 0.98, hits / 800


# --- bad input --------------------------------------------------------------------------------------------


class FakeStore:
    path = "runs/store"
    state_names = ("x", "y", "z", "gripper")
    state = np.arange(12, dtype=np.float32).reshape(3, 4)

    def __len__(self) -> int:
        return len(self.state)


def test_target_is_read_from_the_named_states() -> None:
    found = target_of(FakeStore(), "gripper_xyz")  # type: ignore[arg-type]
    assert found.dims == ("x", "y", "z") and np.array_equal(found.values, FakeStore.state[:, :3])
    assert found.defined.all() and found.metres
    with pytest.raises(InputError, match=r"unknown target 'griper_xyz'; did you mean 'gripper_xyz'"):
        target_of(FakeStore(), "griper_xyz")  # type: ignore[arg-type]
    joints = FakeStore()
    joints.state_names = ("joint_0", "joint_1", "z", "gripper")
    with pytest.raises(InputError, match=r"needs the states x, y \[runs/store\]; this store records: joint_0"):
        target_of(joints, "gripper_xyz")  # type: ignore[arg-type]


def test_bad_features_and_targets_are_named() -> None:
    x, y, episodes = planted(count=10, length=3)
    parts = split(episodes)
    holed = x.copy()
    holed[4, 2] = np.nan
    with pytest.raises(InputError, match=r"features hold NaN or infinity in 1 of 30 frames \[vision.0\]"):
        read_out("vision.0", holed, y, episodes, parts)
    with pytest.raises(InputError, match="use --pool mean"):
        read_out("vision.0", x[:, None], y, episodes, parts)
    with pytest.raises(InputError, match="29 features, 30 targets"):
        read_out("vision.0", x[:29], y, episodes, parts)
    still = y.copy()
    still[parts.test, 1] = 0.25
    with pytest.raises(InputError, match="target y does not vary in the test episodes"):
        read_out("vision.0", x, still, episodes, parts, dims=("x", "y", "z"))
