"""CKA against a literal U-statistic, published random-feature values, its invariances and a known truth."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from probes import similarity
from probes.similarity import _bootstrap, _hsic, _inner, _permuted_hsic, centred, cka, cka_matrix
from vlm4vla_core.errors import InputError


def literal_hsic(x: np.ndarray, y: np.ndarray) -> float:
    """Song et al. 2012, eq. 4: the U-statistic summed over all ordered quadruples of different images."""
    k, m = x @ x.T, y @ y.T
    n, total = len(x), 0.0
    for i, j, q, r in permutations(range(n), 4):
        total += k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
    return total / (n * (n - 1) * (n - 2) * (n - 3))


def literal_unbiased_matrix_form(k: np.ndarray, m: np.ndarray) -> float:
    """Song et al. 2012, eq. 5, as written: zero diagonals, three terms, uncentred Gram matrices."""
    n, one = len(k), np.ones(len(k))
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    terms = np.trace(k @ m) + one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ m @ one
    return terms / (n * (n - 3))


@pytest.mark.parametrize(("n", "d_x", "d_y"), [(4, 3, 2), (7, 2, 9), (9, 12, 5)])
def test_hsic_equals_the_literal_u_statistic(n: int, d_x: int, d_y: int) -> None:
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(n, d_x)) + 3.0, rng.normal(size=(n, d_y)) - 1.0
    slow = literal_hsic(x, y)
    x0, y0 = centred(x, "x"), centred(y, "y")
    assert _hsic(x0, y0, _inner(x0, y0)) == pytest.approx(slow, rel=1e-9, abs=1e-12)
    assert literal_unbiased_matrix_form(x @ x.T, y @ y.T) == pytest.approx(slow, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("n", "biased"), [(64, 0.946), (256, 0.818), (1024, 0.529)])
def test_random_features_have_biased_cka_near_one_and_debiased_near_zero(n: int, biased: float) -> None:
    """Single draws of the reference page, d = 1152, and theory: 1 / (1 + (n-1)/d), E||x'y||² against E||x'x||²."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, 1152)), rng.normal(size=(n, 1152))
    assert cka(x, y, debiased=False).value == pytest.approx(biased, abs=0.004)
    assert cka(x, y, debiased=False).value == pytest.approx(1 / (1 + (n - 1) / 1152), abs=0.002)
    assert abs(cka(x, y).value) < 0.02


def test_biased_value_equals_the_definition() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(20, 6)), rng.normal(size=(20, 3))
    h = np.eye(20) - 1 / 20
    k, m = h @ x @ x.T @ h, h @ y @ y.T @ h
    wanted = np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))
    assert cka(x, y, debiased=False).value == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("debiased", [True, False])
def test_unchanged_by_rotation_scale_and_shift_and_one_on_itself(debiased: bool) -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(50, 8))
    y = x @ rng.normal(size=(8, 12)) + rng.normal(size=(50, 12))
    rotation = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    before = cka(x, y, debiased=debiased).value
    assert 0.1 < before < 0.99
    assert cka(x, -7.0 * y @ rotation + 5.0, debiased=debiased).value == pytest.approx(before, rel=1e-10)
    assert cka(y, x, debiased=debiased).value == pytest.approx(before, rel=1e-12)
    assert cka(x, 3 * x + 1, debiased=debiased).value == pytest.approx(1.0, abs=1e-12)
    stretched = x * np.array([100.0, 1, 1, 1, 1, 1, 1, 1])  # not invariant to anisotropic scaling
    assert abs(cka(stretched, y, debiased=debiased).value - before) > 0.02


def test_both_routes_agree() -> None:
    """The Gram route (n < d) and the d x d route (n >= d) are the same number."""
    rng = np.random.default_rng(3)
    x, y = (centred(rng.normal(size=(30, d)), "x") for d in (10, 20))
    gram = np.vdot(x @ x.T, y @ y.T)
    assert _inner(x, y) == pytest.approx(gram, rel=1e-12)
    wide = np.hstack([x, np.zeros((30, 25))])  # zero columns change the route and nothing else
    assert _inner(wide, y) == pytest.approx(_inner(x, y), rel=1e-12)
    assert cka(wide, y).value == pytest.approx(cka(x, y).value, rel=1e-10)
    orders = [rng.permutation(30) for _ in range(3)]
    got = _permuted_hsic([x, wide], y, orders)
    assert got.shape == (2, 3) and _permuted_hsic([x], y, []).shape == (1, 0)
    np.testing.assert_allclose(got[1], got[0], rtol=1e-10)
    np.testing.assert_allclose(_permuted_hsic([x], y, orders), got[:1], rtol=1e-10)
    for order, value in zip(orders, got[0], strict=True):
        assert value == pytest.approx(_hsic(x, y[order], _inner(x, y[order])), rel=1e-10)


def test_permuted_gram_in_many_pieces_is_the_plain_product() -> None:
    """Wide features go through the Gram matrix, more rows than one piece holds."""
    rng = np.random.default_rng(11)
    xs = [centred(rng.normal(size=(150, d)), "x") for d in (80, 30)]
    y, order = centred(rng.normal(size=(150, 90)), "y"), rng.permutation(150)
    assert 20 * 150 < 80 * 90 and 2 * similarity._FEW_ROWS < 150
    wanted = [_hsic(x, y[order], float(np.square(x.T @ y[order]).sum())) for x in xs]
    np.testing.assert_allclose(_permuted_hsic(xs, y, [order])[:, 0], wanted, rtol=1e-9)


def test_float32_far_from_zero_is_computed_in_float64() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(40, 5))
    shifted = (x + 1000.0).astype(np.float32)
    assert cka(x, shifted).value == pytest.approx(1.0, abs=1e-6)


def test_matrix_holds_cka_of_every_pair_with_interval_and_floor() -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(120, 6))
    layers_a = {"vision.0": x, "vision.1": rng.normal(size=(120, 4))}
    layers_b = {"vision.0": x + 0.5 * rng.normal(size=(120, 6)), "vision.1": layers_a["vision.1"]}
    result = cka_matrix(layers_a, layers_b, resamples=100, permutations=40, seed=1)
    for i, a in enumerate(layers_a.values()):
        for j, b in enumerate(layers_b.values()):
            assert result.value[i, j] == pytest.approx(cka(a, b).value, rel=1e-12)
            assert result.biased[i, j] == pytest.approx(cka(a, b, debiased=False).value, rel=1e-12)
    assert result.value[1, 1] == pytest.approx(1.0) == result.low[1, 1]
    assert result.low[0, 0] < result.value[0, 0] < result.high[0, 0] < 1.0
    assert (result.floor < 0.1).all() and result.value[0, 0] > result.floor[0, 0]
    frame = result.to_frame()
    assert list(frame.columns) == ["layer_a", "layer_b", "cka", "low", "high", "floor", "biased", "n"]
    assert len(frame) == 4 and set(frame["n"]) == {120}
    again = cka_matrix(layers_a, layers_b, resamples=100, permutations=40, seed=1)
    assert np.array_equal(again.low, result.low) and np.array_equal(again.floor, result.floor)


def test_bootstrap_with_every_image_once_is_the_estimate() -> None:
    """Unit weights give the estimator itself, in more than one block of rows."""
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(600, 3)), rng.normal(size=(600, 2))
    y[:, 0] += x[:, 0]

    class Once:
        def multinomial(self, n: int, p: np.ndarray, size: int) -> np.ndarray:
            return np.ones((size, n))

    for units in (np.arange(600), np.arange(600) // 7):
        draws = _bootstrap([centred(x, "x")], [centred(y, "y")], units, 1, Once())  # type: ignore[arg-type]
        assert draws[0, 0, 0] == pytest.approx(cka(x, y).value, rel=1e-10)


@pytest.mark.parametrize("units", [np.repeat(np.arange(4), 3), np.array([2, 0, 3, 1, 1, 0, 2, 2, 3, 2, 0, 1])])
def test_drawn_pairs_equal_a_literal_sum(units: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of different images; w v between units, w within one; the U-centring is that of all images.

    Units cross the pieces that the Gram matrices are worked on in, and need not stand side by side.
    """
    monkeypatch.setattr(similarity, "_ROWS", 5)
    rng = np.random.default_rng(9)
    x, y = centred(rng.normal(size=(12, 3)), "x"), centred(rng.normal(size=(12, 4)), "y")
    drawn = np.array([2.0, 0.0, 1.0, 1.0])

    class Drawn:
        def multinomial(self, n: int, p: np.ndarray, size: int) -> np.ndarray:
            return np.tile(drawn, (size, 1))

    def literal(a: np.ndarray, b: np.ndarray) -> float:
        def u_centred(f: np.ndarray) -> np.ndarray:
            k = f @ f.T - np.diag(np.square(f).sum(1))
            return k - k.sum(0) / 10 - k.sum(1)[:, None] / 10 + k.sum() / (11 * 10)

        k, m, total = u_centred(a), u_centred(b), 0.0
        for i in range(12):
            for j in range(12):
                w, v = drawn[units[i]], drawn[units[j]]
                total += 0.0 if i == j else (w if units[i] == units[j] else w * v) * k[i, j] * m[i, j]
        return total

    wanted = literal(x, y) / np.sqrt(literal(x, x) * literal(y, y))
    got = _bootstrap([x], [y], units, 1, Drawn())[0, 0, 0]  # type: ignore[arg-type]
    assert got == pytest.approx(wanted, rel=1e-10)


def test_interval_over_episodes_is_wider_than_over_their_repeated_frames() -> None:
    """Ten nearly equal frames an episode: drawing frames one by one would claim ten times the evidence."""
    rng = np.random.default_rng(10)
    scene = rng.normal(size=(20, 5))
    x = np.repeat(scene, 10, axis=0) + 0.05 * rng.normal(size=(200, 5))
    y = np.repeat(scene[:, :3] + rng.normal(size=(20, 3)), 10, axis=0) + 0.05 * rng.normal(size=(200, 3))
    frames = cka_matrix({"x": x}, {"y": y}, permutations=0)
    episodes = cka_matrix({"x": x}, {"y": y}, permutations=0, clusters=np.repeat(np.arange(20) + 5, 10))
    assert episodes.high[0, 0] - episodes.low[0, 0] > 1.5 * (frames.high[0, 0] - frames.low[0, 0])
    assert episodes.value[0, 0] == frames.value[0, 0]


def test_few_episodes_have_no_interval() -> None:
    rng = np.random.default_rng(12)
    x = rng.normal(size=(200, 5))
    for count, known in ((similarity.MIN_UNITS, True), (similarity.MIN_UNITS - 1, False)):
        result = cka_matrix({"x": x}, {"y": x + 1}, permutations=0, clusters=np.arange(200) % count)
        assert np.isfinite(result.low[0, 0]) == np.isfinite(result.high[0, 0]) == known


@pytest.mark.slow
def test_interval_over_as_few_episodes_as_allowed_covers_as_stated() -> None:
    """Ten frames an episode, four fifths of the variance shared by them; population CKA as below."""
    rng, units, hits = np.random.default_rng(7), np.repeat(np.arange(similarity.MIN_UNITS), 10), 0
    mix = rng.normal(size=(6, 5))
    truth = np.square(mix).sum() / (np.sqrt(6) * np.linalg.norm(mix.T @ mix + np.eye(5)))

    def frames(d: int) -> np.ndarray:
        return np.sqrt(0.8) * rng.normal(size=(len(units), d))[units] + np.sqrt(0.2) * rng.normal(size=(len(units), d))

    for trial in range(400):
        x = frames(6)
        y = x @ mix + frames(5)
        result = cka_matrix({"x": x}, {"y": y}, permutations=0, clusters=units, seed=trial)
        hits += bool(result.low[0, 0] <= truth <= result.high[0, 0])
    assert 0.80 <= hits / 400 <= 0.97, hits / 400


@pytest.mark.slow
@pytest.mark.parametrize("n", [60, 200])
def test_interval_covers_the_truth(n: int) -> None:
    """Gaussian features with a known population CKA: ||Cxy||² / (||Cxx|| ||Cyy||)."""
    rng = np.random.default_rng(7)
    mix = rng.normal(size=(6, 5))
    cxy, cyy = mix, mix.T @ mix + np.eye(5)
    truth = np.square(cxy).sum() / (np.sqrt(6) * np.linalg.norm(cyy))
    hits = 0
    for trial in range(400):
        x = rng.normal(size=(n, 6))
        y = x @ mix + rng.normal(size=(n, 5))
        result = cka_matrix({"x": x}, {"y": y}, resamples=300, permutations=0, seed=trial)
        hits += bool(result.low[0, 0] <= truth <= result.high[0, 0])
    assert 0.91 <= hits / 400 <= 0.98, hits / 400


def test_bad_input_is_named() -> None:
    rng = np.random.default_rng(8)
    x = rng.normal(size=(10, 3))
    with pytest.raises(InputError, match="10 images on one side and 9"):
        cka(x, x[:9])
    with pytest.raises(InputError, match="3 images are too few, the estimator needs 4"):
        cka(x[:3], x[:3])
    holed = x.copy()
    holed[2, 1] = np.nan
    with pytest.raises(InputError, match="1 of 10 rows hold NaN"):
        cka(x, holed)
    with pytest.raises(InputError, match="same for all 10 images"):
        cka(x, np.full((10, 3), 0.1))
    with pytest.raises(InputError, match="--pool mean"):
        cka(x, rng.normal(size=(10, 4, 3)))
    with pytest.raises(InputError, match="undefined"):
        cka(np.eye(10), x)
    with pytest.raises(InputError, match="10 images on one side and 8"):
        cka_matrix({"a": x}, {"b": x[:8]})
