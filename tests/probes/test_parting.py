"""Shared phase, divergence point and the null of a path, against literal sums, closed forms and planted truth."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from probes.parting import labellings, parting
from probes.report.views import training_divergence
from probes.trajectories import path_shares, read_trajectories
from vlm4vla_core import folders
from vlm4vla_core.cli import main
from vlm4vla_core.errors import InputError

STEPS = 2 ** np.arange(9)


def paths(
    rng: np.random.Generator, *, seeds: int = 4, part: int | None = None, signal: float = 1.0, paired: float = 0.0
) -> np.ndarray:
    """(2 seeds, T, k): noise of every run on a drift that both arms share before place `part`, and of their own from
    there on. paired: share of the noise's variance that runs of one seed have in common."""
    count, k = len(STEPS), 128

    def drawn(*shape: int) -> np.ndarray:
        return rng.standard_normal((*shape, k)) / np.sqrt(k)

    noise = np.sqrt(1 - paired) * drawn(2 * seeds, count) + np.sqrt(paired) * np.tile(drawn(seeds, count), (2, 1, 1))
    drift = np.tile(drawn(), (2 * seeds, count, 1))
    if part is not None:
        drift[:seeds, part:], drift[seeds:, part:] = drawn(), drawn()
    size = np.sqrt(np.diff(STEPS, prepend=0))
    return np.cumsum((signal * drift + noise) * size[:, None], axis=1)


def ask(moved: np.ndarray, seeds: int = 4):
    arms = ["language"] * seeds + ["action"] * (len(moved) - seeds)
    every = [*range(seeds), *range(len(moved) - seeds)]
    return parting({"all": moved}, arms, every, STEPS).modules["all"]


def test_estimates_equal_literal_sums() -> None:
    moved = paths(np.random.default_rng(0), part=4)
    found = ask(moved)
    for t in (0, 8):
        a, c = moved[:4, t], moved[4:, t]
        pairs = list(combinations(range(4), 2))
        own_a, own_c = (np.mean([x[i] @ x[j] for i, j in pairs]) for x in (a, c))
        other = [(i, j) for i in range(4) for j in range(4) if i != j]  # runs of one seed saw the same data
        cross = np.mean([a[i] @ c[j] for i, j in other])
        assert found.cosine[t] == pytest.approx(cross / np.sqrt(own_a * own_c))
        near = [np.mean([np.sum((x[i] - x[j]) ** 2) for i, j in pairs]) for x in (a, c)]
        far = np.mean([np.sum((a[i] - c[j]) ** 2) for i, j in other])
        assert found.excess[t] == pytest.approx(far / max(near) - 1)
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, c)]
        assert found.same_a[t] == pytest.approx(np.mean([unit[0][i] @ unit[0][j] for i, j in pairs]))
        assert found.naive[t] == pytest.approx(np.mean([unit[0][i] @ unit[1][j] for i, j in other]))


def test_the_test_counts_labellings() -> None:
    """70 ways to name four of eight; with equal arms each counts twice, so the least p is 2 / 70."""
    every = labellings(np.arange(8) < 4)
    assert every.shape == (70, 8) and (every.sum(1) == 4).all() and len(np.unique(every, axis=0)) == 70
    assert (every[0] == (np.arange(8) < 4)).all()
    found = ask(paths(np.random.default_rng(1), part=3))
    assert found.p == pytest.approx(2 / 70) and found.p_all == found.p


def test_a_planted_point_is_found_and_said() -> None:
    found = ask(paths(np.random.default_rng(2), part=5, signal=1.5))
    truth = STEPS[4]
    assert found.parted.step == truth and found.shared.step == truth
    assert found.parted.low <= truth <= found.parted.high and found.shared.low <= truth <= found.shared.high
    assert found.verdict.startswith("the arms part after step 16 (") and "p 0.029 over all" in found.verdict
    assert (found.cosine[:5] > 0.8).all() and found.cosine[-1] < 0.3 and (found.ceiling_low > 0.5).all()
    assert (found.floor[:5] < found.cosine[:5]).all() and (found.cosine[6:] < found.floor[6:]).all()
    assert np.isfinite(found.norm_matched[:4]).all()


def test_arms_that_do_not_differ_are_not_told_apart() -> None:
    found = ask(paths(np.random.default_rng(3)))
    assert found.parted.step is None and found.verdict.startswith("not distinguishable from seeds (p ")


def test_apart_for_a_while_is_no_divergence_point() -> None:
    moved = paths(np.random.default_rng(4))
    moved[:4, 3:6, 0] += 50
    found = ask(moved)
    assert found.p == pytest.approx(2 / 70) and "not reached" in found.verdict and found.parted.step is None


def test_fewer_than_four_seeds_are_not_estimable() -> None:
    moved = paths(np.random.default_rng(5), part=2)
    three = ask(np.delete(moved, [0, 4], axis=0), 3)
    assert three.p is None and three.parted.step is None and three.critical is None
    assert three.verdict == "not estimable with 3 and 3 seeds, 4 per arm are needed"
    assert np.isfinite(three.cosine).all() and np.isnan(three.ceiling_low).all()
    one = ask(moved[[0, 5]], 1)
    assert "no ceiling: a single seed" in one.verdict and np.isnan(one.cosine).all()


def test_norm_matching_undoes_a_difference_of_speed() -> None:
    """One way for both arms, and C is four times as fast: at equal length they are equal."""
    way = np.cumsum(np.random.default_rng(6).normal(size=(40, 128)), axis=0)
    slow, fast = way[:9], way[3:39:4]
    noise = 1e-3 * np.random.default_rng(7).normal(size=(8, 9, 128))
    found = ask(np.concatenate([np.tile(slow, (4, 1, 1)), np.tile(fast, (4, 1, 1))]) + noise)
    assert found.cosine[6] < 0.8 and found.norm_matched[7] > 0.99


# --- PCA --------------------------------------------------------------------------------------------------


def test_a_single_walk_has_the_textbook_shares() -> None:
    """6 / (pi k)²: 60.7, 15.3, 6.8 % (Antognini and Sohl-Dickstein 2018), of the walk and of its null."""
    walk = np.cumsum(np.random.default_rng(8).normal(size=(1, 49, 20_000)), axis=1)
    found = path_shares(walk, draws=3)
    theory = [0.607, 0.153, 0.068]
    np.testing.assert_allclose(found.shares, theory, atol=0.006)
    np.testing.assert_allclose(found.low, theory, atol=0.006)
    assert found.points.shape == (1, 50, 2)


def test_the_null_follows_steps_and_runs_and_a_straight_path_is_beyond_it() -> None:
    rng = np.random.default_rng(9)
    walks = np.cumsum(rng.normal(size=(6, 9, 400)) * np.sqrt(np.diff(STEPS, prepend=0))[:, None], axis=1)
    found = path_shares(walks, draws=100)
    inside = (found.low - 0.01 <= found.shares) & (found.shares <= found.high + 0.01)
    assert inside.all() and found.shares[0] < 0.4  # far from the textbook's 60.7 %
    straight = path_shares(np.tile(STEPS[:, None] * rng.normal(size=400), (6, 1, 1)) + walks, draws=50)
    assert straight.shares[0] > straight.high[0]


# --- reading ----------------------------------------------------------------------------------------------


def run(folder: Path, arm: str, seed: int, moved: np.ndarray, start: np.ndarray, *, projection: int = 2) -> Path:
    """A run folder as training leaves it, with two groups of the base and a head."""
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"identity": {"objective": arm, "seed": seed}}))
    for step, value in zip((0, *STEPS), (0 * moved[0], *moved), strict=True):
        with folders.new_folder(folder / "trajectory" / f"step-{step:06d}", "snapshot") as made:
            tensors = {"vision.0": start + value, "decoder.0": start - 2 * value, "head": value + seed}
            save_file({name: x.astype(np.float32) for name, x in tensors.items()}, made / "sketch.safetensors")
            config = {"size": len(start), "seed": 1, "projection": projection}
            folders.write_manifest(made, "snapshot", config=config, inputs={})
    return folder


def test_runs_are_read_without_head_and_checked(tmp_path: Path) -> None:
    rng = np.random.default_rng(10)
    moved, start = paths(rng, seeds=2), rng.normal(size=128)
    runs = [run(tmp_path / f"r{i}", "language" if i < 2 else "action", i % 2, moved[i], start) for i in range(4)]
    found = read_trajectories(runs)
    assert found.arms == ("language", "language", "action", "action") and found.seeds == (0, 1, 0, 1)
    assert list(found.steps) == list(STEPS) and set(found.moved) == {"vision.0", "decoder.0"}
    np.testing.assert_allclose(found.moved["decoder.0"], -2 * moved, atol=1e-4)
    assert set(found.modules()) == {"vision tower", "decoder", "all"}
    assert found.modules()["all"].shape == (4, 9, 256) and found.left_out == ()
    assert len(found.sizes()) == 2 * 4 * 9
    ceilings, last = found.same_arm(), moved[:, -1] / np.linalg.norm(moved[:, -1], axis=1, keepdims=True)
    assert ceilings.loc["vision.0", "same_a"] == pytest.approx(last[0] @ last[1], abs=1e-4)
    assert ceilings.loc["decoder.0", "same_c"] == pytest.approx(last[2] @ last[3], abs=1e-4)
    assert read_trajectories(runs[1:]).same_arm()["same_a"].isna().all()
    with pytest.raises(InputError, match="seed 0 of language twice"):
        read_trajectories([*runs, run(tmp_path / "twice", "language", 0, moved[0], start)])
    with pytest.raises(InputError, match=r"1 kind of training \(language\)"):
        read_trajectories(runs[:2])
    with pytest.raises(InputError, match="share no base"):
        read_trajectories([*runs[:3], run(tmp_path / "other", "action", 3, moved[3], start + 1)])
    with pytest.raises(InputError, match="different projections"):
        read_trajectories([*runs[:3], run(tmp_path / "old", "action", 3, moved[3], start, projection=1)])
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "run.json").write_text((runs[0] / "run.json").read_text())
    with pytest.raises(InputError, match="recorded no snapshots"):
        read_trajectories([*runs, tmp_path / "bare"])


def test_the_verb_tells_where_the_arms_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(13)
    moved, start = paths(rng, part=5, signal=1.5), rng.normal(size=128)
    runs = [run(tmp_path / f"r{i}", "language" if i < 4 else "action", i % 4, moved[i], start) for i in range(8)]
    for name in "bac":
        save_file({"layers.0.w": rng.normal(size=(4, 4)).astype(np.float32)}, tmp_path / f"{name}.safetensors")
    command = ["diverge", "--out", str(tmp_path / "out")]
    for flag, name in (("--base", "b"), ("--vlm", "a"), ("--vla", "c")):
        command += [flag, str(tmp_path / f"{name}.safetensors")]
    assert main([*command, "--trajectory", *map(str, runs)]) == 0
    text = capsys.readouterr().out
    assert "vision tower: the arms part after step 16 (" in text and "PCA of the joint path" in text
    told = json.loads((tmp_path / "out" / "divergence.json").read_text())
    assert {row["module"] for row in told["parting"]} == {"vision tower", "decoder", "all"}
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"trajectory.parquet", "trajectory.png", "path.svg", "path_shares.parquet", "moved.parquet"} <= made
    found = training_divergence.read_folder(tmp_path / "out")
    figures = training_divergence.pictures(found, "paths")
    assert len(figures) == 2 and all(words for _, words in figures)
    assert [module for module, _ in training_divergence.glance(found)] == ["vision tower", "decoder", "all"]
    assert "; over all modules the arms part after step 16 (" in training_divergence.answer(found)
    assert main([*command, "--trajectory", *map(str, runs)]) == 0
    assert "is up to date" in capsys.readouterr().out
    assert main([*command[:2], str(tmp_path / "few"), *command[3:], "--trajectory", *map(str, runs[1:])]) == 0
    assert "not estimable with 3 and 4 seeds" in capsys.readouterr().out


# --- simulations with known truth -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "paired", "trials"), [(4, 0.0, 800), (4, 0.5, 400), (6, 0.0, 300)])
def test_false_positives_stay_below_a_twentieth(seeds: int, paired: float, trials: int) -> None:
    """Several modules at once; a module that is told apart anywhere counts."""
    rng, hits = np.random.default_rng(11), 0
    arms, every = ["a"] * seeds + ["c"] * seeds, [*range(seeds), *range(seeds)]
    for _ in range(trials):
        modules = {name: paths(rng, seeds=seeds, paired=paired) for name in "uvw"}
        found = parting(modules, arms, every, STEPS).modules.values()
        hits += any(module.p_all <= 0.05 for module in found)
    print(f"told apart: {hits} of {trials}")
    assert hits / trials <= 0.05 + 1.65 * np.sqrt(0.05 * 0.95 / trials), hits / trials


@pytest.mark.slow
@pytest.mark.parametrize("signal", [0.7, 1.5])
def test_planted_points_lie_in_their_intervals(signal: float) -> None:
    rng, parted, shared, trials, truth = np.random.default_rng(12), 0, 0, 100, STEPS[4]
    for _ in range(trials):
        found = ask(paths(rng, part=5, signal=signal))
        for when in (found.parted, found.shared):
            inside = when.step is not None and when.low <= truth and (when.high is None or truth <= when.high)
            parted += inside and when is found.parted
            shared += inside and when is found.shared
    print(f"in their intervals: divergence point {parted}, shared phase {shared} of {trials}")
    assert parted / trials >= 0.9 and shared / trials >= 0.9, (parted, shared)
