"""Checkpoints: whole or absent, found again, and refused with one line when damaged, foreign or cut short."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm4vla_core import checkpoint, folders
from vlm4vla_core.actions import TABLETOP
from vlm4vla_core.backbone import Backbone, load_backbone, tiny
from vlm4vla_core.errors import InputError
from vlm4vla_core.policy import PolicyConfig, VLAPolicy
from vlm4vla_core.results import EPISODE_COLUMNS

CONFIG = PolicyConfig(chunk=2, convention=TABLETOP, q01=(-1.0,) * 7, q99=(1.0,) * 7, camera="front", width=16)


@pytest.fixture(scope="module")
def policy() -> VLAPolicy:
    return VLAPolicy(tiny(seed=2, image_size=56), CONFIG)


@pytest.fixture
def folder(policy: VLAPolicy, tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "ck", policy, step=7, config={"seed": 2, "freeze": ["vision"]}, inputs={"data": "abc"})
    return tmp_path / "ck"


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_policy_and_its_backbone_come_back_bit_equal(policy: VLAPolicy, folder: Path):
    loaded = VLAPolicy.load(folder)
    assert equal(policy, loaded) and loaded.config == policy.config and not loaded.training
    assert equal(policy.backbone, Backbone.load(folder)) and equal(policy.backbone, load_backbone(folder))
    assert loaded.backbone.describe() == policy.backbone.describe()


def test_a_backbone_alone_comes_back_and_is_no_policy(tmp_path: Path):
    backbone = tiny(seed=4)
    backbone.save(tmp_path / "b")
    assert equal(backbone, Backbone.load(tmp_path / "b"))
    with pytest.raises(InputError, match="a backbone without a policy head"):
        VLAPolicy.load(tmp_path / "b")


def test_settings_can_change_at_loading(policy: VLAPolicy, folder: Path):
    bigger = load_backbone(folder, image_size=112)
    assert bigger.image_size == 112 and equal(policy.backbone, bigger)
    half = load_backbone(folder, dtype=torch.bfloat16)
    assert half.base.dtype == torch.bfloat16 and half.query.dtype == torch.float32
    assert load_backbone(folder, attn="eager").describe()["attention"] == "eager" != bigger.describe()["attention"]
    fresh = load_backbone(folder, init="scratch", seed=9)
    assert equal(fresh.base, tiny(seed=9, image_size=56).base) and fresh.lineage["init_seed"] == 9


def test_nothing_is_pickled_and_no_path_of_this_machine_is_kept(folder: Path):
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "manifest.json", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    for name in ("config.json", "manifest.json", "tokenizer_config.json"):
        assert str(folder.parent) not in (folder / name).read_text()


def test_labels_fill_columns_of_the_rows(folder: Path):
    labels = checkpoint.row_labels(folder)
    assert set(labels) <= set(EPISODE_COLUMNS)
    assert labels["family"] == "qwen2_5_vl" and labels["step"] == 7 and labels["train_seed"] == 2
    assert labels["freeze"] == "vision" and labels["init"] == "scratch" and labels["note"] == "tiny random model"
    assert labels["run_id"] == folders.read_manifest(folder, "checkpoint")["fingerprint"]


def test_labels_of_a_model_of_unknown_origin_are_empty(tmp_path: Path):
    made = tiny(image_size=56)
    made.lineage = {}
    VLAPolicy(made, CONFIG).save(tmp_path / "ck")
    labels = checkpoint.row_labels(tmp_path / "ck")
    assert (labels["model"], labels["init"], labels["note"]) == ("unknown", None, None)


def test_resolve_takes_the_newest_whole_checkpoint_of_a_run(policy: VLAPolicy, tmp_path: Path):
    run = tmp_path / "run"
    for step in (0, 4, 12, 1_000_000):
        checkpoint.save(checkpoint.step_folder(run, step), policy, step=step)
    assert checkpoint.resolve(run).name == "step-1000000"
    shutil.rmtree(checkpoint.step_folder(run, 1_000_000))
    for step in (0, 4, 12):
        checkpoint.save(checkpoint.step_folder(run, step), policy, step=step)
    assert checkpoint.resolve(run).name == "step-000012"
    (checkpoint.step_folder(run, 12) / "manifest.json").unlink()  # as if killed before the end
    assert checkpoint.resolve(run).name == "step-000004"
    assert checkpoint.resolve(checkpoint.step_folder(run, 0)).name == "step-000000"
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    with pytest.raises(InputError, match="no whole checkpoint yet"):
        checkpoint.resolve(run)


def damage_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def poison(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["head.trunk.0.bias"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def drop_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["backbone.query"]
    save_file(tensors, folder / "model.safetensors")


def garble(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)


def foreign(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))


def other_family(folder: Path) -> None:
    description = json.loads((folder / "config.json").read_text())
    description["backbone"]["family"] = "qwen2_5vl"
    (folder / "config.json").write_text(json.dumps(description))


def other_version(folder: Path) -> None:
    description = json.loads((folder / "config.json").read_text())
    description["policy"]["temperature"] = 1.0
    (folder / "config.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("change", "resign", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), False, r"has no manifest\.json, so it is no finished checkpoint"),
        (lambda f: shutil.rmtree(f), False, "no such checkpoint or run"),
        (lambda f: (f / "model.safetensors").unlink(), False, "model.safetensors"),
        (lambda f: (f / "config.json").unlink(), False, "config.json"),
        (damage_weights, False, "bytes, the manifest says"),
        (garble, True, "not a whole safetensors file"),
        (drop_weight, True, r"1 weights missing: backbone\.query"),
        (poison, True, r"head\.trunk\.0\.bias holds NaN"),
        (foreign, True, "does not describe a model of this project"),
        (other_version, True, r"does not describe a policy .*'temperature'.*update vlm4vla"),
        (other_family, True, "unknown model family 'qwen2_5vl'"),
        (lambda f: folders.write_manifest(f, "rollouts", config={}, inputs={}), False, "expected a checkpoint, found"),
    ],
)
def test_bad_folders_are_refused_in_one_line(folder: Path, change, resign: bool, message: str):
    change(folder)
    if resign:  # the content is wrong although the manifest matches it
        folders.write_manifest(folder, "checkpoint", config={}, inputs={})
    with pytest.raises(InputError, match=message) as caught:
        VLAPolicy.load(folder)
    assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_the_old_checkpoint(policy: VLAPolicy, folder: Path, monkeypatch: pytest.MonkeyPatch):
    before = folders.read_manifest(folder, "checkpoint")["made_by"]["created"]

    def full_disk(*args, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr(policy.backbone.tokenizer, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(folder, policy)
    assert [path.name for path in folder.parent.iterdir()] == ["ck"]
    assert folders.read_manifest(folder, "checkpoint", hashes=True)["made_by"]["created"] == before


def test_optimizer_state_comes_back_bit_equal(tmp_path: Path):
    backbone = tiny(image_size=56)
    optimizer = torch.optim.AdamW(backbone.parameters(), 1e-3)
    for parameter in backbone.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    checkpoint.save(tmp_path / "b", backbone, optimizer=optimizer, step=1)
    fresh = torch.optim.AdamW(backbone.parameters(), 1e-3)
    assert checkpoint.restore_optimizer(tmp_path / "b", backbone, fresh) == 1
    for parameter in backbone.parameters():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, fresh.state[parameter][key])
    backbone.save(tmp_path / "plain")
    with pytest.raises(InputError, match="no training state"):
        checkpoint.restore_optimizer(tmp_path / "plain", backbone, fresh)


def test_optimizer_state_goes_where_the_parameters_are_and_no_further(tmp_path: Path):
    """Moments follow the parameter, in its dtype; a fused optimizer's step, too; an unfused one's stays on the CPU."""
    for fused in (False, True):
        backbone = tiny(image_size=56)
        backbone.base.to(torch.bfloat16)
        optimizer = torch.optim.AdamW(backbone.parameters(), 1e-3, fused=fused)
        for parameter in backbone.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        checkpoint.save(tmp_path / f"b{fused}", backbone, optimizer=optimizer, step=1)
        fresh = torch.optim.AdamW(backbone.parameters(), 1e-3, fused=fused)
        checkpoint.restore_optimizer(tmp_path / f"b{fused}", backbone, fresh)
        for parameter in backbone.parameters():
            state = fresh.state[parameter]
            assert state["exp_avg"].dtype == parameter.dtype and state["exp_avg"].device == parameter.device
            assert float(state["step"]) == 1
    moved = backbone.to("meta")
    there = torch.optim.AdamW(moved.parameters(), 1e-3, fused=False)
    checkpoint.restore_optimizer(tmp_path / "bFalse", moved, there)
    assert {there.state[parameter]["exp_avg_sq"].device.type for parameter in moved.parameters()} == {"meta"}
    assert {there.state[parameter]["step"].device.type for parameter in moved.parameters()} == {"cpu"}
    other = torch.optim.AdamW([moved.query], 1e-3)
    with pytest.raises(InputError, match="the training state is of other parameters"):
        checkpoint.restore_optimizer(tmp_path / "bTrue", moved, other)
