"""CKA of many layers and of more than fits into memory, neighbours and rotations, against slow literal references."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from blob_store import SIZE, blob_store
from scipy.spatial import procrustes as scipy_procrustes

from probes import features, large_cka
from probes.alignment import alignments, cknna, mutual_knn, procrustes
from probes.features import Features
from probes.large_cka import gram_cka, minibatch_cka
from probes.similarity import cka
from vlm4vla_core.backbone import tiny
from vlm4vla_core.cli import main
from vlm4vla_core.errors import InputError


def pair(n: int = 60, d_x: int = 8, d_y: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d_x)) + 2
    return x, x[:, :d_y] @ rng.normal(size=(d_y, d_y)) + rng.normal(size=(n, d_y))


# --- many layers, more images than memory -------------------------------------------------------------------


@pytest.mark.parametrize("strip", [128, 7])
def test_all_pairs_at_once_equal_one_pair_at_a_time(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_cka, "STRIP", strip)
    rng = np.random.default_rng(1)
    a = {f"a{i}": rng.normal(size=(150, 20)) * 10.0**i + 5 for i in range(3)}
    b = {"b0": a["a0"] + 3 * rng.normal(size=(150, 20)), "b1": rng.normal(size=(150, 300))}
    got, own = gram_cka(a, b), gram_cka(a)
    for i, x in enumerate(a.values()):
        for j, y in enumerate(b.values()):
            assert got.value[i, j] == pytest.approx(cka(x, y).value, abs=2e-6)
        for j, y in enumerate(a.values()):
            assert own.value[i, j] == pytest.approx(cka(x, y).value, abs=2e-6)
    assert got.layers_a == ("a0", "a1", "a2") and got.layers_b == ("b0", "b1")
    assert list(got.to_frame().columns) == ["layer_a", "layer_b", "cka", "error", "n"]


def literal_batch_hsic(x: np.ndarray, y: np.ndarray) -> float:
    """Nguyen et al. 2021, eq. 3: zero diagonals, three terms, on one batch."""
    k, m, n = x @ x.T, y @ y.T, len(x)
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    one = np.ones(n)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return float((np.trace(k @ m) + middle - 2 / (n - 2) * one @ k @ m @ one) / (n * (n - 3)))


def test_minibatches_are_the_published_estimator_on_random_batches() -> None:
    x, y = pair(100)
    got = minibatch_cka(lambda _, rows: x[rows], ["x"], lambda _, rows: y[rows], ["y"], 100, batch=20, seed=3)
    order = np.random.default_rng(3).permutation(100)
    parts = [order[start : start + 20] for start in range(0, 100, 20)]
    xy, xx, yy = (
        np.mean([literal_batch_hsic(a[rows], b[rows]) for rows in parts]) for a, b in ((x, y), (x, x), (y, y))
    )
    assert got.value[0, 0] == pytest.approx(xy / np.sqrt(xx * yy), rel=1e-9)
    assert got.n == 100 and got.error[0, 0] > 0


def test_minibatches_are_unbiased_where_biased_cka_is_near_one_and_their_error_is_honest() -> None:
    """Unrelated features of 256 columns in batches of 32, many seeds: mean 0, spread as the standard error says."""
    values, errors = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=(320, 256)), rng.normal(size=(320, 256))
        got = minibatch_cka(lambda _, r, x=x: x[r], ["x"], lambda _, r, y=y: y[r], ["y"], 320, batch=32)
        values.append(got.value[0, 0])
        errors.append(got.error[0, 0])
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(40)
    assert 0.7 < np.mean(errors) / np.std(values) < 1.4
    assert cka(x, y, debiased=False).value > 0.4


def test_frames_in_order_do_not_make_the_batches() -> None:
    """Frames of an episode are alike: in batches of neighbours an unrelated pair of layers would look different."""
    rng = np.random.default_rng(5)
    scene = np.repeat(rng.normal(size=(40, 6)), 16, axis=0)
    x, y = scene + 0.1 * rng.normal(size=(640, 6)), scene[:, ::-1] ** 3 + 0.1 * rng.normal(size=(640, 6))
    whole = cka(x, y).value
    got = minibatch_cka(lambda _, r: x[r], ["x"], lambda _, r: y[r], ["y"], 640, batch=32)
    assert got.value[0, 0] == pytest.approx(whole, abs=4 * got.error[0, 0] + 0.02)
    ordered = [literal_batch_hsic(x[s : s + 16], y[s : s + 16]) for s in range(0, 640, 16)]
    scale = [np.mean([literal_batch_hsic(z[s : s + 16], z[s : s + 16]) for s in range(0, 640, 16)]) for z in (x, y)]
    assert abs(np.mean(ordered) / np.sqrt(np.prod(scale)) - whole) > 0.3


# --- neighbours ---------------------------------------------------------------------------------------------


def literal_neighbours(x: np.ndarray, k: int) -> list[set[int]]:
    x = x - x.mean(0)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return [
        set(sorted((j for j in range(len(x)) if j != i), key=lambda j: -float(x[i] @ x[j]))[:k]) for i in range(len(x))
    ]


def test_mutual_neighbours_against_a_loop() -> None:
    x, y = pair(30)
    a, b = literal_neighbours(x, 4), literal_neighbours(y, 4)
    assert mutual_knn(x, y, 4) == pytest.approx(np.mean([len(p & q) / 4 for p, q in zip(a, b, strict=True)]))
    assert mutual_knn(x, x, 4) == 1
    groups = np.arange(30) // 3
    alone = mutual_knn(x, np.repeat(y[::3], 3, axis=0) + 1e-9 * y, 2)
    assert mutual_knn(x, x, 2, groups=groups) == 1 and 0 <= alone <= 1
    rng = np.random.default_rng(0)
    chance = np.mean([mutual_knn(rng.normal(size=(100, 20)), rng.normal(size=(100, 20)), 10) for _ in range(5)])
    assert chance == pytest.approx(10 / 99, abs=0.03)


def test_cknna_against_a_loop_and_its_limit() -> None:
    x, y = pair(25)

    def kernel(z: np.ndarray) -> np.ndarray:
        z = z - z.mean(0)
        z = z / np.linalg.norm(z, axis=1, keepdims=True)
        h = np.eye(25) - 1 / 25
        return h @ (z @ z.T) @ h

    def aligned(k: np.ndarray, m: np.ndarray, near_k: list[set[int]], near_m: list[set[int]]) -> float:
        return sum(k[i, j] * m[i, j] for i in range(25) for j in range(25) if j in near_k[i] and j in near_m[i])

    for size in (3, 24):
        k, m, near_k, near_m = kernel(x), kernel(y), literal_neighbours(x, size), literal_neighbours(y, size)
        scale = np.sqrt(aligned(k, k, near_k, near_k) * aligned(m, m, near_m, near_m))
        assert cknna(x, y, size) == pytest.approx(aligned(k, m, near_k, near_m) / scale, rel=1e-9)
    assert cknna(x, 2 * x + 1, 5) == pytest.approx(1)


@pytest.mark.parametrize(("n", "d_x", "d_y"), [(40, 6, 6), (12, 20, 30), (40, 6, 3)])
def test_procrustes_against_scipy(n: int, d_x: int, d_y: int) -> None:
    """scipy's disparity is 1 - (nuclear norm)²; a narrower side is padded with zeros."""
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, d_x))
    y = rng.normal(size=(n, d_y)) + x[:, :1]
    width = max(d_x, d_y)
    padded = [np.hstack([z, np.zeros((n, width - z.shape[1]))]) for z in (x, y)]
    assert procrustes(x, y) == pytest.approx(np.sqrt(1 - scipy_procrustes(*padded)[2]), rel=1e-9)


def test_measures_do_not_see_rotation_scale_and_shift() -> None:
    x, y = pair(50)
    turned = -3 * y @ np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0] + 7
    for measure in (mutual_knn, cknna, procrustes):
        assert measure(x, turned) == pytest.approx(measure(x, y), rel=1e-9)
        assert measure(y, turned) == pytest.approx(1, rel=1e-9)
    frame = alignments({"x": x}, {"y": y, "z": turned})
    assert list(frame["layer_b"]) == ["y", "z"] and frame["procrustes"].iloc[0] == pytest.approx(procrustes(x, y))


def test_bad_input_is_named() -> None:
    x, y = pair(20)
    for measure in (mutual_knn, cknna, procrustes):
        with pytest.raises(InputError, match="20 images on one side and 19"):
            measure(x, y[:19])
        with pytest.raises(InputError, match="same for all 20 images"):
            measure(x, np.ones((20, 3)))
    with pytest.raises(InputError, match="20 neighbours of each image, and 19 can be"):
        mutual_knn(x, y, 20)
    with pytest.raises(InputError, match="two batches"):
        minibatch_cka(lambda _, r: x[r], ["x"], lambda _, r: y[r], ["y"], 20, batch=16)
    with pytest.raises(InputError, match="NaN"):
        minibatch_cka(lambda _, r: x[r] * np.nan, ["x"], lambda _, r: y[r], ["y"], 20, batch=5)
    with pytest.raises(InputError, match="not of the same images"):
        gram_cka({"x": x}, {"y": y[:9]})


# --- the verb -----------------------------------------------------------------------------------------------


def test_similarity_of_checkpoints_with_ceiling_and_streaming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(features, "SHARD_BYTES", 20_000)
    blob_store(tmp_path / "store", episodes=25, length=5)
    for seed in range(3):
        tiny(seed=seed, image_size=SIZE).save(tmp_path / f"net{seed}")
    common = f"similarity {tmp_path}/net0 {tmp_path}/net1 --data {tmp_path}/store --device cpu --resamples 20"
    assert main(f"{common} --ceiling {tmp_path}/net2 --out {tmp_path}/out --json {tmp_path}/s.json".split()) == 0
    told = json.loads((tmp_path / "s.json").read_text())
    rows = {(row["layer_a"], row["layer_b"]): row for row in told["rows"]}
    a, b, c = (Features.open(next((tmp_path / "out" / "features").glob(f"net{i}-*"))) for i in range(3))
    assert len(list(a.path.glob("features-*.safetensors"))) > 1
    for layer in ("vision.0", "projector"):
        x, y = a.layer(layer), b.layer("vision.1")
        row = rows[layer, "vision.1"]
        assert row["cka"] == pytest.approx(cka(x, y).value)
        assert row["ceiling"] == pytest.approx(cka(x, c.layer(layer)).value)
        assert row["procrustes"] == pytest.approx(procrustes(x, y))
        assert row["mutual_knn"] == pytest.approx(mutual_knn(x, y, groups=a.index["episode"].to_numpy()))
        places = np.array([3, 99, 4, 124])
        assert np.array_equal(a.rows(layer, places), x[places])
    assert (tmp_path / "out" / "similarity.png").is_file()
    assert main(f"{common} --estimator minibatch --batch 20 --out {tmp_path}/out --json {tmp_path}/m.json".split()) == 0
    streamed = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert all(
        abs(row["cka"] - rows[row["layer_a"], row["layer_b"]]["cka"]) < 4 * row["error"] + 0.02 for row in streamed
    )
    assert main(f"{common} --estimator gram --out {tmp_path}/out --json {tmp_path}/g.json".split()) == 0
    for row in json.loads((tmp_path / "g.json").read_text())["rows"]:
        assert row["cka"] == pytest.approx(rows[row["layer_a"], row["layer_b"]]["cka"], abs=1e-5)
    capsys.readouterr()
    assert main(common.split()) == 2
    assert "features of a checkpoint need a place" in capsys.readouterr().err
