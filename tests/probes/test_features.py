"""Features against direct calls of the backbone, and the verbs that extract, probe and compare them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from blob_store import SIZE, STATE, blob_store

from probes import features as module
from probes.features import Features, choose_rows, extract, pooled
from probes.taps import resolve_layers
from vlm4vla_core.backbone import Backbone, tiny
from vlm4vla_core.cli import main
from vlm4vla_core.episodes.store import EpisodeStore
from vlm4vla_core.errors import InputError

LAYERS = ("vision.0", "vision.1", "vision.2", "projector")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, two tiny backbones' checkpoints, and grid-pooled features of both."""
    folder = tmp_path_factory.mktemp("features")
    blob_store(folder / "store", episodes=70, length=4)
    for seed in (0, 1):
        tiny(seed=seed, image_size=SIZE).save(folder / f"net{seed}")
        command = ["features", str(folder / f"net{seed}"), "--data", str(folder / "store"), "--pool", "grid"]
        command += ["--layers", "vision.0..-1", "projector", "--out", str(folder / f"f{seed}"), "--device", "cpu"]
        assert main(command) == 0
    return folder


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny(seed=0, image_size=SIZE)


def error_of(words: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    return line


# --- layers and rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expressions", "wanted"),
    [
        (["vision.0"], ["vision.0"]),
        (["vision.-1"], ["vision.2"]),
        (["vision.0..-1"], ["vision.0", "vision.1", "vision.2"]),
        (["vision.1..1", "projector", "vision.-2"], ["vision.1", "projector"]),
        (["projector", "vision.-3..1"], ["projector", "vision.0", "vision.1"]),
    ],
)
def test_layer_expressions(expressions: list[str], wanted: list[str]) -> None:
    assert resolve_layers(expressions, LAYERS) == wanted


@pytest.mark.parametrize("wrong", ["vision.3", "vision.-4", "vision.2..0", "vision", "decoder.0", "vision.0..3", ""])
def test_wrong_layer_lists_the_valid_ones(wrong: str) -> None:
    with pytest.raises(InputError, match=r"no layer '.*'; this model has vision.0, vision.1, vision.2, projector"):
        resolve_layers([wrong], LAYERS)


def test_rows_are_drawn_without_replacement_and_ascend() -> None:
    rows = choose_rows(100, 30, 4)
    assert len(set(rows)) == 30 and np.all(np.diff(rows) > 0) and np.array_equal(rows, choose_rows(100, 30, 4))
    assert not np.array_equal(rows, choose_rows(100, 30, 5))
    assert np.array_equal(choose_rows(5, None, 0), np.arange(5)) and np.array_equal(choose_rows(5, 9, 0), np.arange(5))
    with pytest.raises(InputError, match="0 frames"):
        choose_rows(5, 0, 0)


def test_pooling_against_loops() -> None:
    tokens = torch.randn(2, 64, 3)  # an 8 x 8 grid
    np.testing.assert_allclose(pooled(tokens, "mean"), tokens.numpy().mean(1), rtol=1e-5, atol=1e-6)
    square, wanted = tokens.numpy().reshape(2, 8, 8, 3), []
    for row in range(4):
        for column in range(4):
            wanted.append(square[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((1, 2)))
    np.testing.assert_allclose(pooled(tokens, "grid"), np.concatenate(wanted, axis=1), rtol=1e-5, atol=1e-6)
    assert np.array_equal(pooled(tokens[:, :4], "grid"), tokens[:, :4].reshape(2, 12).numpy())  # fewer than 4 a side
    with pytest.raises(InputError, match="form no square grid"):
        pooled(tokens[:, : 65 - 2], "grid")


# --- extraction -------------------------------------------------------------------------------------------


def test_features_are_the_pooled_tokens_of_the_named_frames(
    room: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small shards and batches that do not divide the frames change nothing."""
    store = EpisodeStore.open(room / "store")
    monkeypatch.setattr(module, "SHARD_BYTES", 5_000)
    got = extract(
        backbone, store, tmp_path / "f", layers=["vision.0..-1", "projector"], camera="front", max_frames=41, seed=3,
        batch_size=7, config={"pool": "mean", "camera": "front"}, inputs={"store": "s", "checkpoint": "x"},
    )  # fmt: skip
    rows = got.index["row"].to_numpy()
    assert len(list((tmp_path / "f").glob("features-*.safetensors"))) > 1 and len(rows) == len(got) == 41
    assert got.layers == LAYERS and np.all(np.diff(rows) > 0)
    assert np.array_equal(got.index["episode"], store.episode_of[rows])
    assert np.array_equal(got.index["step"], store.step_of[rows]) and set(got.index["split"]) == {"train"}
    with torch.no_grad():
        direct = backbone.vision_features(store.images("front", rows))
    for name in LAYERS:
        assert got.layer(name).dtype == np.float32
        np.testing.assert_allclose(got.layer(name), direct[name].mean(1).numpy(), rtol=1e-4, atol=1e-5)
    assert np.array_equal(got.layer("vision.-1"), got.layer("vision.2"))


def test_tokens_are_kept_without_pooling(room: Path, backbone: Backbone, tmp_path: Path) -> None:
    store = EpisodeStore.open(room / "store")
    got = extract(
        backbone, store, tmp_path / "f", layers=["vision.1"], pool="none", camera="front", max_frames=5,
        config={"pool": "none", "camera": "front"}, inputs={"store": "s", "checkpoint": "c"},
    )  # fmt: skip
    assert got.layer("vision.1").shape == (5, (SIZE // 14) ** 2, backbone.base.config.vision_config.hidden_size)
    with pytest.raises(InputError, match=r"layer 'vision.-1' is not in these features .*; they hold vision.1"):
        got.layer("vision.-1")


def test_features_that_are_not_finite_leave_nothing_behind(
    room: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "tap", lambda *_: {"vision.0": torch.full((8, 16, 4), float("nan"))})
    store = EpisodeStore.open(room / "store")
    with pytest.raises(InputError, match=r"features of vision\.0 are NaN"):
        extract(
            backbone, store, tmp_path / "f", layers=["vision.0"], camera="front", max_frames=8, config={}, inputs={}
        )
    assert list(tmp_path.iterdir()) == []


# --- the verbs --------------------------------------------------------------------------------------------


def test_same_command_again_loads_no_model(
    room: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("vlm4vla_core.backbone.load_backbone", refuse)
    command = [
        "features",
        str(room / "net0"),
        "--data",
        str(room / "store"),
        "--pool",
        "grid",
        "--out",
        str(room / "f0"),
    ]
    command += ["--layers", "vision.0..-1", "projector", "--json", str(room / "features.json")]
    assert main(command) == 0
    assert "is up to date" in capsys.readouterr().out
    written = json.loads((room / "features.json").read_text())
    assert written["config"]["preprocessing"]["size"] == SIZE and set(written["inputs"]) == {"checkpoint", "store"}
    with pytest.raises(AssertionError, match="the model was loaded"):
        main([*command, "--max-frames", "9"])


def test_bad_input_of_the_features_verb(room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--data", room / "store", "--out", tmp_path / "out"]
    line = error_of(["features", room / "net0", *common, "--layers", "vision.7"], capsys)
    assert "no layer 'vision.7'" in line and "vision.0, vision.1, vision.2, projector" in line
    assert "no such checkpoint or run" in error_of(["features", tmp_path / "none", *common], capsys)
    assert "no camera 'wrist'" in error_of(["features", room / "net0", *common, "--camera", "wrist"], capsys)
    assert "no such folder" in error_of(
        ["features", room / "net0", "--data", tmp_path / "s", "--out", tmp_path / "o"], capsys
    )
    assert "0 frames" in error_of(["features", room / "net0", *common, "--max-frames", 0], capsys)
    assert list(tmp_path.iterdir()) == []


def test_probe_finds_the_spot_where_it_is(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = room / "probe.json"
    command = [
        "probe",
        str(room / "f0"),
        "--against",
        str(room / "f1"),
        "--data",
        str(room / "store"),
        "--json",
        str(out),
    ]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "pixels 16 x 16" in text and "labels of other episodes" in text and "mean predictor" in text
    result = json.loads(out.read_text())
    (told,) = result["results"]
    rows = {(row["kind"], row["layer"]): row for row in result["rows"]}
    assert rows["mean", ""]["r2"] == pytest.approx(0, abs=1e-9)
    assert rows["pixels", ""]["r2"] > 0.4  # the spot is plain to see
    assert rows["features", told["layer"]]["r2"] > 0.3 and rows["shuffled", told["layer"]]["r2"] < 0.2
    assert rows["features", "vision.0"]["r2_x"] > 0.3
    assert sum(told["episodes"].values()) == 70
    names = [difference["name"] for difference in result["differences"]]
    assert f"net0 - pixels, {told['layer']}" in names and "net0 - net1, projector" in names
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == f"{out} is up to date"


def test_bad_input_of_the_probe_verb(room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = blob_store(tmp_path / "other", episodes=3, length=4, seed=9, names=("a", "b", "c", *STATE[3:]))
    features = room / "f0"
    assert "another episode store" in error_of(["probe", features, "--data", other.path], capsys)
    wrong = error_of(["probe", features, "--data", room / "store", "--target", "griper_xyz"], capsys)
    assert "unknown target 'griper_xyz' of a linear readout; did you mean 'gripper_xyz'?" in wrong
    assert "no manifest.json" in error_of(["probe", room, "--data", room / "store"], capsys)
    command = ["features", room / "net0", "--data", other.path, "--out", tmp_path / "f"]
    assert main([str(word) for word in command]) == 0
    assert "needs the states x, y, z" in error_of(["probe", tmp_path / "f", "--data", other.path], capsys)


def test_similarity_of_a_net_with_itself_is_one(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = room / "similarity.json"
    command = ["similarity", str(room / "f0"), str(room / "f0"), "--json", str(out)]
    assert main(command) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 16
    for row in rows:
        assert row["cka"] <= 1 + 1e-9 and (row["layer_a"] != row["layer_b"] or row["cka"] == pytest.approx(1))
        assert row["floor"] < 0.3
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == f"{out} is up to date"


def test_features_of_other_frames_are_not_compared(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        command = ["features", room / "net1", "--data", room / "store", "--out", tmp_path / f"s{seed}"]
        assert main([str(word) for word in [*command, "--max-frames", 20, "--seed", seed]]) == 0
    assert "numbers of frames (280 and 20)" in error_of(["similarity", room / "f0", tmp_path / "s0"], capsys)
    assert "different frames of the store" in error_of(["similarity", tmp_path / "s1", tmp_path / "s0"], capsys)
    assert "numbers of frames" in error_of(
        ["probe", room / "f0", "--against", tmp_path / "s0", "--data", room / "store"], capsys
    )


def test_features_pooled_otherwise_are_not_compared(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mean loses where things are, the grid keeps it: their difference would be the pooling's."""
    command = ["features", room / "net1", "--data", room / "store", "--out", tmp_path / "mean", "--pool", "mean"]
    assert main([str(word) for word in [*command, "--layers", "vision.0..-1", "projector"]]) == 0
    told = "features of different poolings (grid and mean) cannot be paired"
    assert told in error_of(["similarity", room / "f0", tmp_path / "mean"], capsys)
    assert told in error_of(["probe", room / "f0", "--against", tmp_path / "mean", "--data", room / "store"], capsys)


@pytest.mark.parametrize("verb", ["features", "probe", "similarity", "diverge", "correlate"])
def test_a_negative_seed_is_one_line(verb: str, room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, net, features = room / "store", room / "net0", room / "f0"
    words = {
        "features": [net, "--data", store, "--out", tmp_path / "out"],
        "probe": [features, "--data", store],
        "similarity": [features, features],
        "diverge": ["--base", net, "--vlm", net, "--vla", net, "--out", tmp_path / "out"],
        "correlate": [],
    }
    assert "seed -1; use --seed 0 or more" in error_of([verb, *words[verb], "--seed", -1], capsys)


def test_damaged_features_are_refused(room: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(room / "f0", tmp_path / "f")
    shard = tmp_path / "f" / "features-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(InputError, match="the manifest says"):
        Features.open(tmp_path / "f")
    shard.unlink()
    with pytest.raises(InputError, match="missing"):
        Features.open(tmp_path / "f")


@pytest.mark.samples
def test_real_bridge_data_goes_through_features_and_probe(samples: Path, room: Path, tmp_path: Path) -> None:
    """25 real episodes of 10 frames: no claim about the numbers, only that the whole way works."""
    store = tmp_path / "bridge"
    assert main(["convert", "rlds", str(samples / "bridge_rlds_octo"), "--out", str(store)]) == 0
    command = ["features", str(room / "net0"), "--data", str(store), "--out", str(tmp_path / "f"), "--pool", "grid"]
    assert main(command) == 0
    assert main(["probe", str(tmp_path / "f"), "--data", str(store), "--json", str(tmp_path / "p.json")]) == 0
    result = json.loads((tmp_path / "p.json").read_text())
    assert sum(result["results"][0]["episodes"].values()) <= 25 and all(row["r2"] <= 1 for row in result["rows"])
