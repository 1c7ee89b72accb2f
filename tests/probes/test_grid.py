"""The one-pass grid against one fit at a time, L-BFGS against its conditions, controls, targets, maps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

from probes import grid
from probes.control import control_labels, types_of
from probes.dense import most_common
from probes.grid import ALPHAS, LOGISTIC, Parts, logistic_grid, ridge_grid, ridge_path, scaling
from probes.learned import GRID, train
from probes.readout import Readout, _accuracy_interval, compare_probes, read_out, split
from probes.targets import cells, target_of
from vlm4vla_core.cli import main
from vlm4vla_core.episodes.store import EpisodeStore
from vlm4vla_core.errors import InputError


def split_of(n: int) -> Parts:
    a, b = int(0.6 * n), int(0.8 * n)
    return Parts(np.arange(a), np.arange(a, b), np.arange(b, n))


# --- the ridge grid -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(120, 9), (60, 150)])
def test_grid_equals_one_fit_for_every_strength(n: int, d: int) -> None:
    """Selection scores by predicting, the refit by least squares with added rows; both routes, a constant column."""
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, d)) * rng.uniform(0.1, 9, d) + rng.normal(size=d)
    x[:, 3] = 7.0
    labels = np.stack([x[:, :2] + rng.normal(size=(n, 2)), rng.normal(size=(n, 2))], axis=1)  # (n, 2, 2)
    parts = split_of(n)
    got = ridge_grid(x, labels, parts)
    trial = ridge_path(x[parts.fit], labels[parts.fit], x[parts.select], ALPHAS)
    y, centre = labels[parts.select], labels[parts.fit].mean(0)
    scores = (1 - np.square(trial - y).sum(1) / np.square(y - centre).sum(0)).mean(-1)
    np.testing.assert_allclose(got.scores, scores, rtol=1e-6, atol=1e-8)
    assert list(got.best) == list(scores.argmax(0))
    both = np.concatenate(parts[:2])
    sd = x[parts.fit].std(0)
    sd = np.maximum(sd, 0.1 * np.sqrt(np.square(sd).sum() / (d - 1)))  # the floor; column 3 is constant
    z = np.delete((x - x[parts.fit].mean(0)) / sd, 3, axis=1)
    for i, best in enumerate(got.best):
        alpha, yb = ALPHAS[best] * len(both), labels[both, i]
        zc = z[both] - z[both].mean(0)
        stacked = np.vstack([zc, np.sqrt(alpha) * np.eye(zc.shape[1])])
        w = np.linalg.lstsq(stacked, np.vstack([yb - yb.mean(0), np.zeros((zc.shape[1], 2))]), rcond=None)[0]
        wanted = (z[parts.test] - z[both].mean(0)) @ w + yb.mean(0)
        np.testing.assert_allclose(got.predicted[:, i], wanted, rtol=1e-6, atol=1e-7)


def test_a_column_that_hardly_varied_is_not_blown_up() -> None:
    """Columns of deviation 3, 4 and 0.001 and a constant one: the smallest scale is a tenth of sqrt((9 + 16) / 3)."""
    signs = np.tile([[1.0, 1.0, 1.0], [1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]], (50, 1))
    x = np.hstack([signs * [3.0, 4.0, 0.001] + 2.0, np.full((200, 1), 7.0)])
    mean, scale = scaling(x, np.arange(200))
    np.testing.assert_allclose(mean, [2.0, 2.0, 2.0, 7.0])
    np.testing.assert_allclose(scale, [3.0, 4.0, 0.1 * np.sqrt(25 / 3), np.inf], rtol=1e-6)


def test_float32_products_change_the_score_by_little(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 20)).astype(np.float32) + 50
    labels = (x[:, :3] + rng.normal(size=(3000, 3)))[:, None]
    exact = ridge_grid(x, labels, split_of(3000))
    monkeypatch.setattr(grid, "_LARGE", 0)
    rough = ridge_grid(x, labels, split_of(3000))
    assert np.abs(rough.scores - exact.scores).max() < 1e-4
    assert not np.array_equal(rough.scores, exact.scores)


def test_what_cannot_be_decomposed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "_SIDE", 30)
    with pytest.raises(InputError, match="48 frames of width 40 are too many"):
        ridge_grid(np.zeros((60, 40)), np.zeros((60, 1, 1)), split_of(60))


# --- the logistic grid --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(300, 6), (60, 90)])
def test_logistic_grid_is_at_the_minimum_of_its_loss(n: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of mean cross-entropy + strength |w|² / 2, written out, vanishes at every fit; both routes."""
    rng = np.random.default_rng(d)
    x = rng.normal(size=(n, d)) * rng.uniform(0.5, 3, d) + 4
    labels = np.stack([(x[:, :3] + rng.normal(size=(n, 3))).argmax(1), rng.integers(0, 3, n)], axis=1)
    parts, fits = split_of(n), []
    real = grid._fit_logistic
    monkeypatch.setattr(
        grid,
        "_fit_logistic",
        lambda b, y, s, strength: fits.append((b, y, strength, w := real(b, y, s, strength))) or w,
    )
    got = logistic_grid(x, labels, 3, parts)
    z = (x - x[parts.fit].mean(0)) / x[parts.fit].std(0)
    for basis, y, strength, w in fits:
        rows = parts.fit if len(y) == len(parts.fit) else np.concatenate(parts[:2])
        np.testing.assert_allclose(basis.scores @ basis.axes.T, z[rows], atol=1e-8)
        for c in range(2):
            off = (np.exp(log_softmax(z[rows] @ w[:-1, c] + w[-1, c], axis=1)) - np.eye(3)[y[:, c]]) / len(rows)
            assert np.abs(z[rows].T @ off + strength * w[:-1, c]).max() < 3e-3
            assert np.abs(off.sum(0)).max() < 3e-3
    assert len(got.scores) == len(LOGISTIC)
    told = log_softmax(z[parts.select] @ fits[0][3][:-1, 0] + fits[0][3][-1, 0], axis=1)
    assert got.scores[0, 0] == pytest.approx(told[np.arange(len(told)), labels[parts.select, 0]].mean())
    assert d > n or (got.predicted[:, 0] == labels[parts.test, 0]).mean() > 0.6


# --- trained readouts ---------------------------------------------------------------------------------------


def test_mlp_reads_what_is_not_linear() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 4))
    y = (x[:, :1] * x[:, 1:2])[:, None]  # (n, 1, 1)
    parts = split_of(2000)
    r2 = {}
    for name, found in (("linear", ridge_grid(x, y, parts)), ("mlp", train("mlp", x, y, parts))):
        truth = y[parts.test]
        r2[name] = 1 - np.square(found.predicted - truth).sum() / np.square(truth - truth.mean()).sum()
    assert r2["linear"] < 0.05 and r2["mlp"] > 0.7, r2


def test_attentive_readout_finds_the_one_token_that_matters() -> None:
    """One token of nine, anywhere, is marked in its first channel; its second channel is the answer."""
    rng = np.random.default_rng(1)
    x = 0.5 * rng.normal(size=(1500, 9, 5))
    place = rng.integers(0, 9, 1500)
    x[np.arange(1500), place, 0] += 6
    y = x[np.arange(1500), place, 1]
    labels = np.stack([(y > 0).astype(int), rng.integers(0, 2, 1500)], axis=1)
    parts = split_of(1500)
    found = train("attentive", x, labels, parts, classes=2)
    accuracy = (found.predicted == labels[parts.test]).mean(0)
    assert accuracy[0] > 0.9 and abs(accuracy[1] - 0.5) < 0.1
    assert found.scores.shape == (len(GRID), 2)
    mean = ridge_grid(x.mean(1), y[:, None, None], parts)
    assert mean.scores.max() < 0.5  # what pooling loses


# --- controls -----------------------------------------------------------------------------------------------


def test_control_labels_are_a_function_of_a_type_that_recurs() -> None:
    rng = np.random.default_rng(2)
    looks = rng.normal(size=(5, 12)) * 10
    look = rng.integers(0, 5, 400)
    types = types_of(looks[look] + rng.normal(size=(400, 12)), np.arange(240), types=5)
    assert len(np.unique(types)) <= 5 and all(len(set(types[look == one])) == 1 for one in range(5))
    y = rng.normal(size=(400, 2))
    control = control_labels(y, types, np.arange(240), np.random.default_rng(0))
    for one in np.unique(types):
        assert len(np.unique(control[types == one], axis=0)) == 1
    assert all(row in y[:240].tolist() for row in control.tolist())


def test_features_that_name_the_type_learn_the_control_task_and_have_no_selectivity() -> None:
    rng = np.random.default_rng(3)
    episodes = np.repeat(np.arange(40), 10)
    types = rng.integers(0, 8, 400)
    y = rng.normal(size=(400, 1))
    control = control_labels(y, types, np.arange(400), rng)
    parts = split(episodes)
    by_heart = read_out("types", np.eye(8)[types], y, episodes, parts, control=control, shuffles=0)
    assert by_heart.control == pytest.approx(1, abs=1e-3) and by_heart.selectivity is not None
    assert by_heart.selectivity < -0.9
    knows = read_out("truth", y + 0.1, y, episodes, parts, control=control, shuffles=0)
    assert knows.selectivity is not None and knows.selectivity > 0.8


# --- classes, intervals, comparisons ------------------------------------------------------------------------


def test_accuracy_is_counted_over_episodes_and_one_class_is_refused() -> None:
    rng = np.random.default_rng(4)
    episodes = np.repeat(np.arange(50), 6)
    x = rng.normal(size=(300, 3))
    y = (x[:, 0] > 0).astype(int)
    found = read_out("a", x, y, episodes, split(episodes), classes=("no", "yes"))
    assert found.mean > 0.9 and np.isnan(found.error_mm) and found.interval is not None
    assert found.mean == pytest.approx((found.predicted == y[split(episodes).test]).mean())
    assert found.interval.low < found.mean < found.interval.high <= 1 and abs(found.shuffled.mean() - 0.5) < 0.15
    with pytest.raises(InputError, match="the fit episodes hold only 'no'"):
        read_out("a", x, np.zeros(300, int), episodes, split(episodes), classes=("no", "yes"))
    with pytest.raises(InputError, match="did you mean 'linear'"):
        read_out("a", x, y, episodes, split(episodes), classes=("no", "yes"), kind="liner")


def of_errors(errors: np.ndarray, frames: int) -> Readout:
    e, f = errors[:, None].astype(float), np.full((len(errors), 1), float(frames))
    mean = 1 - e.sum() / f.sum()
    return Readout("", ("c",), np.array([mean]), mean, None, np.nan, 1.0, 0.0, np.empty(0), (1, 1, len(e)), (1, 1, 1),
                   np.arange(len(e)), e, f, classes=("a", "b"))  # fmt: skip


def test_accuracy_interval_of_independent_frames_is_near_wilsons() -> None:
    from statsmodels.stats.proportion import proportion_confint

    rng = np.random.default_rng(5)
    errors = rng.binomial(10, 0.3, 400)[:, None].astype(float)
    got = _accuracy_interval(errors, np.full((400, 1), 10.0))
    low, high = proportion_confint(4000 - errors.sum(), 4000, method="wilson")
    assert got is not None and got.low == pytest.approx(low, abs=4e-3) and got.high == pytest.approx(high, abs=4e-3)
    perfect = _accuracy_interval(np.zeros((12, 1)), np.full((12, 1), 10.0))
    assert perfect is not None and perfect.high == 1 and 0.6 < perfect.low < 0.85  # 12 episodes, not 120 frames


@pytest.mark.slow
@pytest.mark.parametrize("episodes", [10, 30])
@pytest.mark.parametrize("accuracy", [0.5, 0.9])
def test_accuracy_interval_covers_the_truth(episodes: int, accuracy: float) -> None:
    rng, hits = np.random.default_rng(6), 0
    for _ in range(1500):
        own = rng.beta(4 * (1 - accuracy), 4 * accuracy, episodes)  # strongly clustered
        errors = rng.binomial(10, own)[:, None].astype(float)
        got = _accuracy_interval(errors, np.full((episodes, 1), 10.0))
        hits += got is not None and got.low <= accuracy <= got.high
    assert 0.93 <= hits / 1500 <= 0.99, hits / 1500


def test_detectable_difference_is_seen_with_the_power_it_claims() -> None:
    """Simulated: true differences of the detectable size have intervals that exclude 0 in about 80 %."""
    rng = np.random.default_rng(7)
    found = [compare_probes(of_errors(rng.binomial(20, 0.3, 20), 20), of_errors(rng.binomial(20, 0.3, 20), 20), seed=i)
             for i in range(60)]  # fmt: skip
    gap = float(np.mean([one.detectable for one in found]))
    assert 0.03 < gap < 0.25
    seen = 0
    for i in range(150):
        a, b = of_errors(rng.binomial(20, 0.3, 20), 20), of_errors(rng.binomial(20, 0.3 + gap, 20), 20)
        interval = compare_probes(a, b, resamples=400, seed=i).interval
        seen += interval is not None and interval.low > 0
    assert 0.68 <= seen / 150 <= 0.92, seen / 150
    same = compare_probes(of_errors(np.zeros(10), 5), of_errors(np.zeros(10), 5))
    assert same.interval is not None and same.interval.high == pytest.approx(1 - 0.05**0.1)


# --- targets ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tabletop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("targets") / "store"
    command = f"record tabletop --episodes 16 --tasks pick push move --size 56 --geometry --workers 1 --out {out}"
    assert main(command.split()) == 0
    return out


def test_targets_of_the_tabletop_world_are_its_truth(tabletop: Path) -> None:
    store = EpisodeStore.open(tabletop)
    truth, table = np.asarray(store.column("truth/objects")), store.episodes
    place = target_of(store, "object_xy")
    colour, shape = target_of(store, "colour"), target_of(store, "shape")
    progress, grasp = target_of(store, "task_progress"), target_of(store, "grasp")
    for row in range(0, len(store), 7):
        episode = int(store.episode_of[row])
        wanted, present = table["target"][episode], table["objects"][episode].split(";")
        assert place.defined[row] == colour.defined[row] == (wanted != "")
        if wanted:
            slot = present.index(wanted)
            assert np.array_equal(place.values[row], truth[row, 3 * slot : 3 * slot + 2])
            assert f"{colour.classes[colour.values[row]]} {shape.classes[shape.values[row]]}" == wanted
        assert progress.values[row, 0] == pytest.approx(store.step_of[row] / (store.lengths[episode] - 1))
        assert grasp.classes[grasp.values[row]] == (
            "holding" if store.column("truth/held")[row, 0] >= 0 else "empty hand"
        )
    chunk = target_of(store, "next_chunk")
    row = int(store.starts[2])
    moving = [i for i, name in enumerate(store.convention.names) if name in chunk.dims[0] or f"{name}+0" in chunk.dims]
    assert np.array_equal(chunk.values[row], store.action[row : row + 5][:, moving].ravel())
    last = int(store.starts[2] + store.lengths[2] - 1)
    assert chunk.defined[last - 4] and not chunk.defined[last - 3]
    depth = target_of(store, "depth", rows=np.array([3]))
    np.testing.assert_allclose(
        depth.values[3].reshape(4, 4)[1, 2], store.depth("front", [3])[0, 14:28, 28:42].mean() / 1000
    )
    assert depth.defined.sum() == 1 and target_of(store, "task").classes == ("move", "pick", "push")


def test_cells_and_most_common_labels_against_loops() -> None:
    maps = np.random.default_rng(8).integers(0, 4, (2, 10, 9)).astype(np.uint8)
    edges = [np.linspace(0, size, 4).round().astype(int) for size in (10, 9)]
    for i in range(2):
        for row in range(3):
            for column in range(3):
                part = maps[i, edges[0][row] : edges[0][row + 1], edges[1][column] : edges[1][column + 1]]
                assert cells(maps.astype(float), 3)[i, row, column] == pytest.approx(part.mean())
                assert most_common(maps, 3)[i, row, column] == np.bincount(part.ravel()).argmax()


@pytest.mark.parametrize(
    ("name", "words"),
    [("gripper", "unknown target 'gripper'; did you mean 'gripper_x"), ("instruction", "with at least 3 episodes each"),
     ("depth", "needs the depth of camera 'front'"), ("grasp", "needs truth/held"), ("colour", "episode's target")],
)  # fmt: skip
def test_missing_targets_are_named(name: str, words: str, tmp_path: Path) -> None:
    from blob_store import blob_store

    with pytest.raises(InputError, match=words):
        target_of(blob_store(tmp_path / "s", episodes=4, length=3), name)


# --- the verb -----------------------------------------------------------------------------------------------


def test_probe_of_checkpoints_makes_features_figures_and_maps(tabletop: Path, tmp_path: Path, capsys) -> None:
    from vlm4vla_core.backbone import tiny

    for seed in (0, 1):
        tiny(seed=seed, image_size=56).save(tmp_path / f"net{seed}")
    common = f"probe {tmp_path}/net0 --data {tabletop} --device cpu --max-frames 120 --layers vision.-1"
    command = (
        f"{common} --against {tmp_path}/net1 --targets gripper_xy,grasp --out {tmp_path}/out --json {tmp_path}/p.json"
    )
    assert main(command.split()) == 0
    told = json.loads((tmp_path / "p.json").read_text())
    assert told["label"] == "net0" and told["against"] == ["net1", "untrained net0"]
    assert [(one["target"], one["score"]) for one in told["results"]] == [("gripper_xy", "R²"), ("grasp", "accuracy")]
    kinds = {row["kind"] for row in told["rows"]}
    assert kinds == {"features", "against", "pixels", "shuffled", "control", "mean"}
    assert all(row["detectable"] > 0 for row in told["differences"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "features", "probe.json", "rows.parquet", "differences.parquet", "layers-linear.png", "layers-linear.svg"
    }  # fmt: skip
    capsys.readouterr()
    assert main(command.split()) == 0
    assert capsys.readouterr().out.strip().endswith("probe.json is up to date")
    assert main(f"{common} --readout dense --targets depth --no-untrained --out {tmp_path}/dense".split()) == 0
    assert (tmp_path / "dense" / "maps-depth.png").is_file()
    assert main(f"{common} --targets gripper_xyz".split()) == 2
    assert "features of a checkpoint need a place" in capsys.readouterr().err
    assert main(f"{common} --readout dense --targets grasp --out {tmp_path}/o".split()) == 2
    assert "unknown target 'grasp' of a dense readout" in capsys.readouterr().err
