"""Every layer of every family through hooks, against direct calls; foreign weights, folders of pictures, resuming."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from blob_store import SIZE, blob_store
from PIL import Image
from safetensors.torch import load_file, save_file

from probes import features as module
from probes import taps
from probes.features import Features, extract, pooled
from probes.foreign import load_foreign, read_key_map
from probes.image_folder import ImageFolder, open_data
from probes.taps import class_tokens, layer_names, resolve_layers, tap
from vlm4vla_core.backbone import Backbone, tiny
from vlm4vla_core.cli import main
from vlm4vla_core.episodes.store import EpisodeStore
from vlm4vla_core.errors import InputError
from vlm4vla_core.families import families

WORDS = ["push it", "lift the red cube up"]
EVERY = pytest.mark.parametrize("name", families())


@lru_cache
def member(name: str) -> Backbone:
    return tiny(name, image_size=SIZE)


def pictures(count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, SIZE, SIZE, 3), dtype=np.uint8)


@EVERY
def test_layers_are_what_direct_calls_of_the_model_give(name: str) -> None:
    """Vision layers and projector as `vision_features` has them; the query as a policy's head reads it."""
    model, images = member(name), pictures()
    with torch.inference_mode():
        direct, names = model.vision_features(images), layer_names(model)
        whole = tap(model, images, names, WORDS)
        alone = tap(model, images, list(direct))
        query = model(model.collate(images, WORDS))
    assert list(whole) == names and names[-1] == "query" and list(direct) == [n for n in names if n in direct]
    for layer, wanted in direct.items():
        torch.testing.assert_close(whole[layer], wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alone[layer], wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole["query"], query)


@EVERY
def test_image_tokens_of_the_decoder_stand_where_the_projector_put_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first decoder layer that hands on what it is given holds the projector's tokens, in raster order, scaled."""
    model, images = tiny(name, image_size=SIZE), pictures()
    first = model.base.get_submodule(model.spec.layers)[0]
    monkeypatch.setattr(first, "forward", lambda hidden_states=None, *args, **kwargs: hidden_states)
    with torch.inference_mode():
        seen = tap(model, images, ["projector", "decoder.0"], WORDS)
    a, b = seen["projector"], seen["decoder.0"]
    if name == "kosmos2":  # positions and a scale are added before the first layer; differences between images stay
        a, b = a[0] - a[1], b[0] - b[1]
    scale = float((a * b).sum() / (a * a).sum())
    torch.testing.assert_close(b, scale * a, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_nothing_beyond_the_last_wanted_layer_is_computed() -> None:
    model, ran = member("paligemma"), []
    blocks = model.base.get_submodule(model.spec.blocks)
    handles = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(blocks)]
    try:
        with torch.inference_mode():
            tap(model, pictures(), ["vision.1"])
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0, 1]
    assert not any(block._forward_hooks for block in blocks)  # no hook stays behind


@pytest.mark.parametrize("name", ["internvl", "kosmos2"])
def test_class_token_is_the_first_of_the_tower(name: str) -> None:
    model, images, seen = member(name), pictures(), []
    block = model.base.get_submodule(model.spec.blocks)[1]
    handle = block.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.inference_mode():
        model.vision_features(images)
        handle.remove()
        torch.testing.assert_close(class_tokens(model, images, ["vision.1"])["vision.1"], seen[0][:, 0])
    for other, layer in (("paligemma", "vision.0"), (name, "projector")):
        with pytest.raises(InputError, match=f"{layer} of {other} has no class token"):
            class_tokens(member(other), images, [layer])


def test_attention_pooling_against_a_loop() -> None:
    tokens = torch.randn(3, 5, 4, dtype=torch.float64)
    got = pooled(tokens, "attn")
    for image, one in zip(tokens.numpy(), got, strict=True):
        flat = image - image.mean(1, keepdims=True)
        scores = np.array([row @ flat.mean(0) / 2 for row in flat])  # sqrt(4)
        weights = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(one, weights @ image, rtol=1e-5)


def test_layer_expressions_with_commas_and_decoder_layers() -> None:
    names = ["vision.0", "vision.1", "projector", "decoder.0", "decoder.1", "query"]
    assert resolve_layers(["vision.0..-1,projector, decoder.-1", "query"], names) == [*names[:3], "decoder.1", "query"]
    with pytest.raises(InputError, match=r"no layer 'decoder.2'; this model has vision.0, vision.1, projector"):
        resolve_layers(["decoder.2"], names)
    many = [f"vision.{i}" for i in range(32)]
    with pytest.raises(InputError, match=r"this model has vision.0, vision.1, …, vision.31 "):
        resolve_layers(["vision.32"], many)


# --- interrupted and damaged --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taps")
    blob_store(folder / "store", episodes=8, length=5)
    member("qwen2_5_vl").save(folder / "net")
    return folder


def test_an_interrupted_run_goes_on_where_it_was(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, model, calls = EpisodeStore.open(room / "store"), member("qwen2_5_vl"), []
    monkeypatch.setattr(module, "SHARD_BYTES", 4_000)
    facts = {"config": {"pool": "mean", "camera": "front"}, "inputs": {"store": "s", "checkpoint": "x"}}
    options = {"layers": ["vision.-1", "projector"], "camera": "front", "batch_size": 3, **facts}
    whole = extract(model, store, tmp_path / "whole", **options)
    shards = len(list((tmp_path / "whole").glob("features-*.safetensors")))
    assert shards >= 3

    def counted(*args: object) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return taps.tap(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "tap", counted)
    with pytest.raises(KeyboardInterrupt):
        extract(model, store, tmp_path / "f", **options)
    assert not (tmp_path / "f").exists()
    made = len(list(tmp_path.glob(".f.*.work/features-*.safetensors")))
    assert 0 < made < shards
    before = len(calls)
    again = extract(model, store, tmp_path / "f", **options)
    assert len(calls) - before < 14 - made  # 40 frames in batches of 3 are 14; finished shards are not made again
    for layer in whole.layers:
        assert np.array_equal(again.layer(layer), whole.layer(layer))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "whole"]  # nothing is left behind
    table = pd.read_parquet(tmp_path / "f" / "shards.parquet")
    assert len(table) == 2 * shards and table.groupby("layer")["rows"].sum().eq(40).all()
    assert {"weights", "layer", "pooling", "preprocessing", "data"} <= set(table.columns)
    assert np.array_equal(np.concatenate(list(again.chunks("projector"))), again.layer("projector"))


def test_a_shard_with_another_content_is_refused(room: Path, tmp_path: Path) -> None:
    command = f"features {room}/net --data {room}/store --out {tmp_path}/f --device cpu"
    assert main(command.split()) == 0
    shard = tmp_path / "f" / "features-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match="have changed since they were made"):
        Features.open(tmp_path / "f").layer("vision.-1")


def test_another_preprocessing_does_not_replace_the_cache(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = f"features {room}/net --data {room}/store --out {tmp_path}/f --device cpu".split()
    assert main(command) == 0
    import probes.verbs.shared as shared

    real = shared.preprocessing
    monkeypatch.setattr(shared, "preprocessing", lambda *args: {**real(*args), "mean": [0.0, 0.0, 0.0]})
    assert main(command) == 2
    assert "made with another preprocessing (mean [0.48" in capsys.readouterr().err


def test_a_processor_that_normalises_otherwise_is_refused(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(room / "net", tmp_path / "net")
    values = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.27, 0.26, 0.28]}
    (tmp_path / "net" / "preprocessor_config.json").write_text(json.dumps(values))
    assert main(f"features {tmp_path}/net --data {room}/store --out {tmp_path}/f".split()) == 2
    assert "the checkpoint's processor has image_mean [0.5, 0.5, 0.5]" in capsys.readouterr().err


# --- other data, other weights ------------------------------------------------------------------------------


def test_a_folder_of_pictures_is_looked_at(room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = pictures(5)
    (tmp_path / "pics" / "more").mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "pics" / ("more" if i > 2 else ".") / f"{i}.png")
    command = ["features", str(room / "net"), "--data", str(tmp_path / "pics"), "--out", str(tmp_path / "f")]
    assert main([*command, "--device", "cpu", "--layers", "vision.0..-1,projector"]) == 0
    made = Features.open(tmp_path / "f")
    assert list(made.index["file"]) == ["0.png", "1.png", "2.png", "more/3.png", "more/4.png"]
    with torch.inference_mode():
        direct = member("qwen2_5_vl").vision_features(images)["vision.1"].mean(1)
    np.testing.assert_allclose(made.layer("vision.1"), direct.numpy(), rtol=1e-4, atol=1e-5)
    before = ImageFolder(tmp_path / "pics").fingerprint
    Image.fromarray(255 - images[0]).save(tmp_path / "pics" / "0.png")
    assert ImageFolder(tmp_path / "pics").fingerprint != before
    assert main([*command, "--layers", "query"]) == 2
    assert "query lies behind the instruction, and none was given; give --instruction" in capsys.readouterr().err
    assert main([*command, "--layers", "query", "--instruction", "push the cup"]) == 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither an episode store nor a folder of pictures"):
        open_data(tmp_path / "empty")
    (tmp_path / "pics" / "0.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="damaged picture"):
        ImageFolder(tmp_path / "pics").images("picture", [0], 8)


def test_weights_of_another_trainer_are_opened_by_a_key_map(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model's own weights under foreign names give its own features; the policy's head is told and left out."""
    other = tiny("qwen2_5_vl", seed=7, image_size=SIZE)
    weights = {f"vla.trunk.{name}": value for name, value in other.base.state_dict().items()}
    save_file({**weights, "vla.action_head.weight": torch.zeros(3)}, tmp_path / "vla.safetensors")
    command = f"features {room}/net --data {room}/store --out {tmp_path}/f --device cpu --layers vision.0..-1,query"
    words = [*command.split(), "--weights", str(tmp_path / "vla.safetensors"), "--family", "qwen2_5_vl"]
    assert main(words) == 2
    assert "weights missing: visual.patch_embed" in (line := capsys.readouterr().err) and "vla.action_head" in line
    assert main([*words, "--key-map", r"^vla\.trunk\.=>"]) == 0
    assert "1 tensors of" in capsys.readouterr().out
    other.save(tmp_path / "own")
    assert (
        main(
            f"features {tmp_path}/own --data {room}/store --out {tmp_path}/g --device cpu --layers vision.0..-1".split()
        )
        == 0
    )
    for layer in ("vision.0", "vision.2"):
        assert np.array_equal(Features.open(tmp_path / "f").layer(layer), Features.open(tmp_path / "g").layer(layer))
    assert main([*words[:-1], "paligemma", "--key-map", r"^vla\.trunk\.=>"]) == 2
    assert "is of family qwen2_5_vl, not paligemma" in capsys.readouterr().err


def test_foreign_weights_that_do_not_fit_are_named(room: Path, tmp_path: Path) -> None:
    model = tiny("qwen2_5_vl", image_size=SIZE)
    weights = dict(model.base.state_dict())
    name = next(key for key in weights if "blocks.0" in key)

    def opened(changed: dict[str, torch.Tensor], match: str, *key_map: str) -> None:
        save_file({key: value.contiguous().clone() for key, value in changed.items()}, tmp_path / "w.safetensors")
        with pytest.raises(InputError, match=match):
            load_foreign(model, tmp_path / "w.safetensors", read_key_map(key_map))

    opened({**weights, name: weights[name][:1]}, "has shape")
    opened({**weights, name: weights[name] * float("nan")}, "holds NaN or infinity")
    opened({**weights, "x." + name: weights[name]}, "both stand for", "^x.=>")
    opened({key: value for key, value in weights.items() if key != name}, "1 weights missing")
    with pytest.raises(InputError, match="is no key map"):
        read_key_map(["a=b"])
    with pytest.raises(InputError, match="is no replacement"):
        read_key_map(["(=>x"])
    (tmp_path / "map.json").write_text(json.dumps({"^a": "b"}))
    assert read_key_map([str(tmp_path / "map.json"), "c=>d"]) == (("^a", "b"), ("c", "d"))
    assert len(load_file(room / "net" / "model.safetensors"))  # the room's own net is as it was


def test_hub_ids_are_fetched_as_a_folder(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    command = f"features some/model --data {room}/store --out {tmp_path}/f --device cpu".split()
    assert main(command) == 2
    line = capsys.readouterr().err
    assert "not to be had from the hub" in line and line.count("\n") == 1
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(room / "net"))
    assert main(command) == 0
    assert Features.open(tmp_path / "f").label == "some/model"
