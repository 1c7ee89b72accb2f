"""The dense objective: targets against a slow reading of the store, exactness, carry-over through stages, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training_options import crash_at, losses, validations, weights
from toys import toy_store

from vlm4vla_core import checkpoint
from vlm4vla_core.actions import TABLETOP
from vlm4vla_core.backbone import Backbone, tiny
from vlm4vla_core.dense_heads import DenseHeads, dense_losses
from vlm4vla_core.dense_objective import dense_objective
from vlm4vla_core.dense_targets import DenseTargets
from vlm4vla_core.episodes.store import EpisodeStore, write_store
from vlm4vla_core.errors import InputError
from vlm4vla_core.families.spec import Geometry
from vlm4vla_core.image_tokens import given, image_tokens, on_grid
from vlm4vla_core.policy import VLAPolicy
from vlm4vla_core.presets import TrainConfig
from vlm4vla_core.sims.tabletop import demos, render
from vlm4vla_core.sims.tabletop.looks import LOOKS
from vlm4vla_core.training import train
from vlm4vla_core.training_data import Data
from vlm4vla_core.validation import average_precision

SMALL: dict[str, Any] = {
    "image_size": 56, "chunk": 2, "head_width": 16, "max_steps": 6, "batch_size": 4, "lr": 1e-3, "warmup_steps": 2,
    "clip": 1.0, "log_every": 1, "val_rows": 12, "threads": 1, "device": "cpu", "objective": "dense",
}  # fmt: skip
SIDE = 4
GRID = Geometry(
    14, 1, 1, 0, 60, exact=False
)  # 4 x 4 cells of 14 px, and 4 px on the right and below that no token sees


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**SMALL, **changes})


def record(out: Path, task: str, domains: tuple[str, ...], size: int = 60) -> EpisodeStore:
    return write_store(
        out, demos.demonstrations(demos.plan(6, (task,), domains, seed=3), size=size, noise=0.3, geometry=True),
        source="tabletop", convention=TABLETOP, state_names=demos.STATE_NAMES, column_names=demos.COLUMN_NAMES,
        config={}, inputs={}, jpeg_444=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    return record(tmp_path_factory.mktemp("tabletop") / "store", "put", ("A", "B", "C"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    return record(tmp_path_factory.mktemp("scenes") / "store", "scene", ("U", "V", "W"))


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_store(tmp_path_factory.mktemp("toys") / "store").path


def things(store: EpisodeStore, row: int) -> list[tuple[str, np.ndarray, float, float]]:
    """The slow way: name, place, column and row (in cells) of all objects and plates whose centre a cell shows."""
    episode = store.episodes.iloc[store.episode_of[row]]
    found = []
    for slot, name in enumerate(episode["objects"].split(";")):
        found.append((name, store.column("truth/objects")[row, 3 * slot : 3 * slot + 3]))
    for slot, name in enumerate(episode["plates"].split(";")):
        if name:
            found.append((name, np.append(store.column("truth/plates")[row, 2 * slot : 2 * slot + 2], 0.0)))
    seen = []
    for name, place in found:
        (u, v), _ = LOOKS[episode["domain"]].camera.project(place)
        x, y = u * 60 / 14, v * 60 / 14
        if 0 <= x < SIDE and 0 <= y < SIDE:
            seen.append((name, place, x, y))
    return seen


def test_targets_are_those_of_a_slow_reading(store: EpisodeStore):
    targets = DenseTargets(store, "front", GRID)
    assert not any(targets.missing.values()) and (targets.side, targets.cells) == (4, 16)
    plain = {"mean": [0.0] * 3, "std": [1.0] * 3}
    rows = np.arange(0, len(store), 7)
    presence, mask = targets.get("presence", rows, {})
    assert mask.all()
    xy, there = targets.get("position", rows, {"mean": [0.1, 0.0], "std": [1.0, 2.0]})
    gripper, shown = targets.get("gripper", rows, plain)
    depth, known = targets.get("depth", rows, {"mean": [0.0], "std": [1.0]})
    classes = {"classes": targets.segments}
    shares, covered = targets.get("segmentation", rows, classes)
    bare, _ = targets.get("segmentation", rows, classes, hand=False)
    assert shown.all() and known.all() and covered.all()
    offset, _ = targets.get("offset", rows, {})
    colours = ("red", "green", "blue", "yellow", "purple", "cyan")
    frames, labels = store.depth("front", rows), store.segmentation("front", rows)
    for i, row in enumerate(rows):
        expected = np.zeros((16, 24))
        places: dict[int, list[np.ndarray]] = {}
        off = np.full((16, 12, 2), np.nan)
        for name, place, x, y in things(store, int(row)):
            cell = 4 * int(y) + int(x)
            expected[cell, targets.classes.index(name)] = 1
            places.setdefault(cell, []).append(place[:2])
            colour, kind = name.split()
            off[cell, colours.index(colour) + 6 * (kind == "plate")] = x - int(x) - 0.5, y - int(y) - 0.5
        assert offset[i] == pytest.approx(off.reshape(16, 24), abs=1e-5, nan_ok=True)
        assert np.array_equal(presence[i], expected)
        assert np.flatnonzero(there[i]).tolist() == sorted(places)
        for cell, found in places.items():
            assert xy[i, cell] == pytest.approx((np.mean(found, axis=0) - [0.1, 0]) / [1, 2], abs=1e-6)
        assert not xy[i, ~there[i]].any()
        assert gripper[i] == pytest.approx(np.tile(store.state[row][[0, 1, 2, 6]], (16, 1)))
        kinds = [name.split()[1] for name in store.episodes["objects"].iloc[store.episode_of[row]].split(";")]
        for cell in range(16):
            part = np.s_[cell // 4 * 14 : cell // 4 * 14 + 14, cell % 4 * 14 : cell % 4 * 14 + 14]
            assert depth[i, cell, 0] == pytest.approx(frames[i][part].mean() / 1000, rel=1e-5)
            count = dict.fromkeys(targets.segments, 0)
            for label in labels[i][part].flatten().tolist():
                plate = render.PLATE_0 <= label < render.OBJECTS
                name = "plate" if plate else kinds[label - 7] if label >= 7 else targets.segments[label]
                count[name] += 1
            assert shares[i, cell] == pytest.approx(np.array(list(count.values())) / 196, abs=1e-6)
            without = np.array([0 if name == "gripper" else value for name, value in count.items()])
            assert bare[i, cell] == pytest.approx(without / max(1, without.sum()), abs=1e-6)
    assert shares[..., targets.segments.index("gripper")].any() and len(set(kinds)) > 1


def test_an_object_is_where_its_pixels_are(scenes: EpisodeStore):
    """Without a hand to hide it, the renderer's own label of an object lies at or around the centre of its cell."""
    targets = DenseTargets(scenes, "front", Geometry(4, 1, 1, 0, 60))
    rows = np.arange(len(scenes))
    assert targets.missing["gripper"] == "its pictures show no gripper"
    presence, _ = targets.get("presence", rows, {})
    shares, _ = targets.get("segmentation", rows, {"classes": targets.segments})
    hits = [
        shares[row, cell, targets.segments.index(targets.classes[index].split()[1])] > 0
        for row, cell, index in zip(*presence.nonzero(), strict=True)
    ]
    assert len(hits) > 20 and np.mean(hits) > 0.8  # some are hidden by what stands before them


def test_losses_are_means_of_pictures_and_cells():
    rng = np.random.default_rng(0)
    settings = {
        "presence": {"classes": ["a", "b"]}, "position": {"mean": [0, 0], "std": [1, 1]},
        "gripper": {"mean": [0] * 3, "std": [1] * 3}, "depth": {"mean": [1], "std": [1]},
        "segmentation": {"classes": ["x", "y", "z"]},
    }  # fmt: skip
    heads = DenseHeads(8, settings, seed=1)
    tokens = torch.from_numpy(rng.normal(size=(3, 4, 8)).astype(np.float32))
    out = {name: value.detach() for name, value in heads(tokens).items()}
    assert {name: value.shape[-1] for name, value in out.items()} == {
        "presence": 2, "position": 2, "gripper": 4, "depth": 1, "segmentation": 3
    }  # fmt: skip
    flat = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    head = heads.heads["depth"]
    assert out["depth"].numpy() == pytest.approx((flat @ head.weight.T + head.bias).detach().numpy(), abs=1e-6)
    batch: dict[str, Any] = {}
    for name, value in out.items():
        target = rng.normal(size=value.shape).astype(np.float32) * 2
        if name == "segmentation":
            target = np.exp(target) / np.exp(target).sum(-1, keepdims=True)
        if name in ("presence", "gripper"):
            target[..., -2 if name == "presence" else 3 :] = target[..., -2 if name == "presence" else 3 :] > 0
        mask = rng.random(value.shape[:2]) < 0.5
        mask[0] = False  # a picture without any target counts as 0
        batch |= {f"dense_{name}": torch.from_numpy(target), f"dense_{name}_mask": torch.from_numpy(mask)}

    def entropy(logit: float, target: float) -> float:
        p = 1 / (1 + np.exp(-logit))
        return float(-(target * np.log(p) + (1 - target) * np.log(1 - p)))

    def huber(a: float, b: float) -> float:
        return (a - b) ** 2 / 2 if abs(a - b) <= 1 else abs(a - b) - 0.5

    total = 0.0
    found = dense_losses(out, batch)
    assert next(iter(found)) == "loss"
    for name, value in out.items():
        target, mask = batch[f"dense_{name}"].numpy().astype(float), batch[f"dense_{name}_mask"].numpy()
        pictures = []
        for i in range(3):
            cells = []
            for j in np.flatnonzero(mask[i]):
                v, t = value[i, j].numpy().astype(float), target[i, j]
                if name == "presence":
                    cells.append(sum(map(entropy, v, t)))
                elif name == "segmentation":
                    cells.append(-sum(t * (v - np.log(np.exp(v).sum()))))
                else:
                    numbers = 3 if name == "gripper" else len(v)
                    cells.append(sum(map(huber, v[:numbers], t[:numbers])))
                    cells[-1] += entropy(v[3], t[3]) if name == "gripper" else 0
            count = target[i].sum() if name == "presence" else len(cells)  # of presence, per object that is there
            pictures.append(sum(cells) / max(1, count))
        assert float(found[name]) == pytest.approx(np.mean(pictures), rel=1e-5), name
        total += np.mean(pictures)
    assert float(found["loss"]) == pytest.approx(total, rel=1e-5)


def test_average_precision_is_that_of_a_slow_count():
    rng = np.random.default_rng(0)
    score, truth = rng.normal(size=50).round(1), (rng.random(50) < 0.3).astype(float)
    expected = 0.0
    for level in sorted(set(score), reverse=True):
        taken = score >= level
        gained = truth[score == level].sum() / truth.sum()
        expected += gained * truth[taken].mean()
    assert average_precision(score, truth) == pytest.approx(expected)
    assert average_precision(truth, truth) == 1.0 and np.isnan(average_precision(score, truth * 0))


def test_it_learns_positions_from_pictures_and_says_so_in_centimetres(store: EpisodeStore, tmp_path: Path):
    wanted = ("presence", "position", "gripper", "depth")
    settings = config(max_steps=40, batch_size=8, lr=3e-3, val_rows=1000, warmup_steps=5, dense_targets=wanted)
    train(settings, store.path, tmp_path / "run")
    start, end = validations(tmp_path / "run")
    assert end["depth_cm"] < 0.3 * start["depth_cm"] and end["position_cm"] < 0.8 * start["position_cm"]
    assert end["presence_precision"] > end["presence_share"]
    heads = Backbone.load(tmp_path / "run").dense  # errors again, by hand
    data, backbone = Data(settings, [store.path]), Backbone.load(tmp_path / "run")
    targets = DenseTargets(data.stores[0], "front", backbone.geometry)
    rows = data.val.rows
    with torch.no_grad():
        tokens = image_tokens(backbone, backbone.pictures(data.images(data.val, 56)))
        out = heads(on_grid(backbone, tokens))
    for name, size in (("position", 2), ("gripper", 3), ("depth", 1)):
        plain, mask = targets.get(name, rows, {"mean": [0.0] * size, "std": [1.0] * size})
        scale = heads.settings[name]
        said = out[name].numpy()[..., :size] * scale["std"] + scale["mean"]
        if name == "gripper":
            said, plain, mask = said.mean(1, keepdims=True), plain[:, :1], mask[:, :1]
        distance = np.linalg.norm(said - plain[..., :size], axis=-1)[mask].mean()
        assert end[f"{name}_cm"] == pytest.approx(100 * distance, rel=1e-4)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision", "smolvlm"])
def test_tokens_on_the_grid_are_the_projectors_and_can_be_given_back(family: str):
    backbone = tiny(family, image_size=56)
    pictures = np.random.default_rng(0).integers(0, 255, (2, 56, 56, 3)).astype(np.uint8)
    batch = backbone.collate(pictures, ["push the red cube", "stop"])
    with torch.no_grad():
        tokens = image_tokens(backbone, batch["images"])
        assert torch.equal(on_grid(backbone, tokens), backbone.vision_features(pictures)["projector"])
        own = backbone.hidden(batch)
        assert torch.equal(backbone.hidden({**batch, "tokens": tokens}), own)
        assert not torch.equal(backbone.hidden({**batch, "tokens": tokens.flip(0)}), own)
        if family == "qwen3_vl":  # its deep-stack features are used as well
            deep = torch.cat([tokens[..., :64], tokens[..., 64:].flip(0)], -1)
            assert not torch.equal(backbone.hidden({**batch, "tokens": deep}), own)
        with given(backbone, tokens):
            pass
        assert torch.equal(backbone.hidden(batch), own)  # as before


MIX: dict[str, Any] = {"objective": "language", "auxiliary": {"dense": 0.3}, "questions_per_picture": 3}


@pytest.mark.parametrize("name", ["alone", "beside"])
def test_it_resumes_exactly_and_parts_add_up(
    store: EpisodeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    settings = config(**({} if name == "alone" else MIX), save_every=2)
    train(settings, store.path, tmp_path / "whole")
    with monkeypatch.context() as patch:
        crash_at(patch, 3)
        with pytest.raises(RuntimeError, match="crash"):
            train(settings, store.path, tmp_path / "cut")
    train(settings, store.path, tmp_path / "cut")
    a, b = (checkpoint.resolve(tmp_path / run) for run in ("whole", "cut"))
    for file in (checkpoint.WEIGHTS, checkpoint.STATE):
        assert (a / file).read_bytes() == (b / file).read_bytes()
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    train(settings.model_copy(update={"accumulate": 4}), store.path, tmp_path / "parts")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_one_pass_of_the_tower_serves_both_objectives(store: EpisodeStore, tmp_path: Path, monkeypatch):
    """The losses of a mixture are those of its parts, and the shared tower gets the gradient of both."""
    train(config(**MIX, max_steps=1), store.path, tmp_path / "both")
    train(config(max_steps=1), store.path, tmp_path / "dense")
    train(config(objective="language", questions_per_picture=3, max_steps=1), store.path, tmp_path / "language")
    dense, language = (losses(tmp_path / name)[0] for name in ("dense", "language"))
    assert losses(tmp_path / "both")[0] == pytest.approx(language + 0.3 * dense, rel=1e-6)
    held_out = {name: validations(tmp_path / name)[0] for name in ("both", "dense", "language")}
    assert held_out["both"].pop("dense") == {key: x for key, x in held_out["dense"].items() if key != "step"}
    assert held_out["both"] == held_out["language"]
    from vlm4vla_core import image_tokens as module
    from vlm4vla_core import objectives

    calls = []
    monkeypatch.setattr(module, "image_tokens", lambda *args: calls.append(1) or image_tokens(*args))
    data, settings = Data(config(**MIX), [store.path]), config(**MIX)
    model, made = objectives.build(settings, data, {})
    draw, norms = data.batch(0), []
    parts = {n: one.make(data.images(draw, 56), draw, np.random.default_rng(0), slice(None)) for n, one in made.items()}
    for shared in (True, False):
        if not shared:
            parts["language"]["images"] = parts["language"]["images"].clone()
            parts["dense"] = {**parts["dense"], "tokens": image_tokens(model, parts["dense"]["images"])}
        model.zero_grad()
        found = objectives.losses_module(model, made)(parts)
        (found["language"]["loss"] + 0.3 * found["dense"]["loss"]).backward()
        norms.append([float(p.grad.norm()) for n, p in model.named_parameters() if "visual" in n])
    assert calls == [1] and norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_heads_go_on_through_stages_and_leave_a_policy(store: EpisodeStore, scenes: EpisodeStore, tmp_path: Path):
    targets = ("presence", "position")
    v = train(config(dense_targets=targets), scenes.path, tmp_path / "v")
    assert list(Backbone.load(v).dense.settings) == list(targets)
    moved = weights(tmp_path / "v")
    still = {k: x for k, x in weights(tmp_path / "v" / "checkpoints" / "step-000000").items() if "language_model" in k}
    assert all(torch.equal(value, moved[name]) for name, value in still.items())  # the decoder takes no part
    language = config(objective="language", backbone=str(v), freeze=("vision", "projector"))
    lm = train(language, scenes.path, tmp_path / "l")
    kept = {k: x for k, x in weights(tmp_path / "l").items() if ".dense." in k or k.startswith("dense.")}
    assert len(kept) == 4 and all(torch.equal(value, moved[name]) for name, value in kept.items())
    both = config(**{**MIX, "backbone": str(lm)}, dense_targets=("position", "gripper"))
    j = train(both, store.path, tmp_path / "j")
    begun = weights(tmp_path / "j" / "checkpoints" / "step-000000")
    assert all(torch.equal(begun[name], value) for name, value in kept.items())
    ended = weights(tmp_path / "j")
    changed = {name for name, value in begun.items() if "dense." in name and not torch.equal(value, ended[name])}
    assert {name.split(".")[-2] for name in changed} == {"position", "gripper"}  # presence is kept and not trained
    end = Backbone.load(j)
    assert list(end.dense.settings) == ["presence", "position", "gripper"]
    assert end.dense.settings["position"] == Backbone.load(v).dense.settings["position"]  # its scale, too
    assert end.lineage["stages"] == ["dense", "language", "language+dense"]
    assert {group for name, group in end.groups().items() if "dense" in name} == {"dense"}
    policy = VLAPolicy.load(train(config(objective="action", backbone=str(j)), store.path, tmp_path / "vla"))
    assert policy.backbone.dense is None
    with_heads = config(objective="action", backbone=str(j), auxiliary={"dense": 0.1}, dense_targets=targets)
    loaded = VLAPolicy.load(train(with_heads, store.path, tmp_path / "vla2")).backbone
    assert loaded.dense is not None and "presence" in loaded.dense.settings


def test_stores_that_lack_a_target_train_the_others(store: EpisodeStore, scenes: EpisodeStore, tmp_path: Path):
    data = Data(config(), [store.path, scenes.path])
    backbone = tiny(image_size=56)
    objective = dense_objective(config(), data, backbone)
    assert list(backbone.dense.settings) == ["presence", "position", "gripper", "depth", "segmentation", "offset"]
    draw = data.batch(0)
    batch = objective.make(data.images(draw, 56), draw, np.random.default_rng(0), slice(None))
    assert batch["dense_gripper_mask"].any(1).tolist() == (draw.which == 0).tolist()
    assert objective.count(batch) == len(draw.rows)


def test_what_cannot_be_learnt_is_refused_in_one_line(toys: Path, scenes: EpisodeStore, tmp_path: Path):
    with pytest.raises(InputError, match="no targets 'presence' for the dense objective: the camera's projection"):
        train(config(image_size=28, dense_targets=("presence",)), toys, tmp_path / "a")
    with pytest.raises(InputError, match="no targets 'gripper' for the dense objective: its pictures show no gripper"):
        train(config(dense_targets=("gripper",)), scenes.path, tmp_path / "b")
    with pytest.raises(InputError, match="the 8 image tokens of kosmos2 make no square grid"):
        train(config(family="kosmos2"), scenes.path, tmp_path / "c")
    train(config(image_size=28, max_steps=1), toys, tmp_path / "d")  # a gripper is all that this store records
    assert list(Backbone.load(tmp_path / "d").dense.settings) == ["gripper"]
