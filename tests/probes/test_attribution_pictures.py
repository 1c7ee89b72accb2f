"""Pictures of features: PCA against an SVD, neighbours against a literal loop, the readout and the camera."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from blob_store import SIZE, blob_store

from probes.figures_attribution import overlay, reach_of
from probes.pictures import neighbours, on_picture, patch_tokens, pca_maps, predict_gripper
from vlm4vla_core.backbone import tiny
from vlm4vla_core.cli import main
from vlm4vla_core.episodes.store import EpisodeStore
from vlm4vla_core.errors import InputError


def test_pca_maps_are_the_leading_singular_vectors_in_raster_order() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(3, 16, 6)) * [9, 4, 2, 0.3, 0.2, 0.1] @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
    colours, shares = pca_maps(tokens)
    flat = tokens.reshape(-1, 6) - tokens.reshape(-1, 6).mean(0)
    _, sizes, right = np.linalg.svd(flat, full_matrices=False)
    np.testing.assert_allclose(shares, (sizes**2 / (sizes**2).sum())[:3], rtol=1e-9)
    assert colours.shape == (3, 4, 4, 3) and colours.min() == 0 and colours.max() == 1
    for k in range(3):
        weights = right[k] * np.sign(right[k][np.abs(right[k]).argmax()])
        score = flat @ weights
        low, high = np.quantile(score, [0.01, 0.99])
        np.testing.assert_allclose(colours[..., k].ravel(), np.clip((score - low) / (high - low), 0, 1), atol=1e-9)
    with pytest.raises(InputError, match="no square grid"):
        pca_maps(tokens[:, :15])


def test_neighbours_are_the_literal_best_frame_of_each_other_episode() -> None:
    rng = np.random.default_rng(1)
    bank, queries, episodes = rng.normal(size=(30, 4)), rng.normal(size=(5, 4)), np.repeat(np.arange(6), 5)
    found, cosine = neighbours(queries, bank, episodes, 3)
    centre = bank.mean(0)
    for query, row, told in zip(queries, found, cosine, strict=True):
        best = []
        for episode in range(6):
            each = []
            for i in np.flatnonzero(episodes == episode):
                a, b = query - centre, bank[i] - centre
                each.append((float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)), i))
            best.append(max(each))
        wanted = sorted(best, reverse=True)[:3]
        assert row.tolist() == [i for _, i in wanted]
        np.testing.assert_allclose(told, [value for value, _ in wanted])
    with pytest.raises(InputError, match="6 other episodes for 7 neighbours"):
        neighbours(queries, bank, episodes, 7)


def test_the_readout_finds_a_place_that_is_linear_in_the_features() -> None:
    rng = np.random.default_rng(2)
    features, weights = rng.normal(size=(60, 5)), rng.normal(size=(5, 3))
    told = predict_gripper(features[:50], features[:50] @ weights + 1, np.repeat(np.arange(10), 5), features[50:])
    np.testing.assert_allclose(told, features[50:] @ weights + 1, atol=1e-3)


def test_an_overlay_is_orange_above_and_purple_below_and_grey_where_nothing_is() -> None:
    frame = np.full((8, 8, 3), 128, np.uint8)
    scores = np.array([[1.0, -1.0], [0.0, 0.0]])
    drawn = overlay(frame, scores, reach_of([scores])).astype(int)
    (red, _, blue), (other_red, _, other_blue) = drawn[0, 0], drawn[0, 7]
    assert red > blue + 60 and other_blue > other_red + 20
    assert (drawn[4:] == 128).all() and (drawn[:4, :4] == drawn[0, 0]).all()


def test_the_gripper_is_drawn_where_the_picture_shows_it(tmp_path: Path) -> None:
    """The projected position lies among the pixels that the world's own segmentation calls gripper."""
    from vlm4vla_core.sims.tabletop.render import GRIPPER

    command = f"record tabletop --episodes 3 --geometry --out {tmp_path}/store"
    assert main(command.split()) == 0
    store = EpisodeStore.open(tmp_path / "store")
    for episode, start in enumerate(store.starts):
        right, down = on_picture(store, episode, "front", store.state[start : start + 1, :3])[0]
        rows, columns = np.nonzero(store.segmentation("front", [start])[0] == GRIPPER)
        side = store.segmentation("front", [start]).shape[1]
        assert columns.min() - 1 <= right * side <= columns.max() + 2
        assert rows.min() - 1 <= down * side <= rows.max() + 5  # between the tips of its fingers
    with pytest.raises(InputError, match="only of the tabletop world's front camera"):
        on_picture(blob_store(tmp_path / "blobs", episodes=3), 0, "front", np.zeros((1, 3)))
    tiny(image_size=56).save(tmp_path / "net")
    show = f"pictures {tmp_path}/net --data {tmp_path}/store --episode 0 --show gripper --device cpu --out {tmp_path}/g"
    assert main([*show.split(), "--json", f"{tmp_path}/g.json"]) == 0
    assert {"step", "error_mm", "mean_predictor_mm"} == set(json.loads((tmp_path / "g.json").read_text())["rows"][0])


# --- the verb -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    blob_store(folder / "store", episodes=6, length=3)
    for name in ("qwen2_5_vl", "kosmos2"):
        tiny(name, image_size=SIZE).save(folder / name)
    return folder


def call(room: Path, model: str, *more: object) -> int:
    words = ["pictures", room / model, "--data", room / "store", "--episode", 2, "--device", "cpu", *more]
    return main([str(word) for word in words])


def test_neighbours_leave_out_the_episode_itself(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--show", "neighbours", "--number", 5, "--out", room / "n", "--json", room / "n.json")
    assert call(room, "kosmos2", *more) == 0
    rows = json.loads((room / "n.json").read_text())["rows"]
    for step in range(3):
        assert sorted(row["episode"] for row in rows if row["step"] == step) == [0, 1, 3, 4, 5]
    assert call(room, "kosmos2", *more) == 0 and "is up to date" in capsys.readouterr().out


def test_pca_of_any_family_and_twice_the_same(room: Path) -> None:
    for out in ("p", "q"):
        assert call(room, "qwen2_5_vl", "--layer", "vision.0", "--steps", 1, "--out", room / out) == 0
    assert (room / "p" / "sheet.png").read_bytes() == (room / "q" / "sheet.png").read_bytes()


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--layer", "vision.9"), "no layer 'vision.9'; this model has vision.0, vision.1"),
        (("--episode", 6), "this store has episodes 0 to 5"),
        (("--camera", "wrist"), "no camera 'wrist'"),
        (("--layer", "projector"), "projector of kosmos2 lie on no grid"),
        (("--show", "neighbours", "--number", 6), "5 other episodes for 6 neighbours"),
        (("--show", "gripper"), "known only of the tabletop world's front camera"),
    ],
)
def test_bad_input_is_one_line(
    more: tuple[object, ...], line: str, room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(room, "kosmos2", *more, "--out", room / "bad") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and line in told, told
    assert not (room / "bad").exists()


def test_patches_stand_in_raster_order() -> None:
    """A change in one corner of the picture changes that corner's patch most (first block, before much mixing)."""
    backbone = tiny("internvl", image_size=SIZE)
    images = np.full((2, SIZE, SIZE, 3), 100, np.uint8)
    images[1, :14, -14:] = 220
    tokens = patch_tokens(backbone, images, "vision.0")
    side = round(tokens.shape[1] ** 0.5)
    assert np.abs(tokens[1] - tokens[0]).sum(1).argmax() == side - 1
