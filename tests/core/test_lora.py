"""LoRA: no effect at first, gradients in the adapters alone, B A as the formula says, saved, loaded, merged."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import toy_store

from vlm4vla_core import checkpoint, folders
from vlm4vla_core.actions import TABLETOP
from vlm4vla_core.backbone import Backbone, load_backbone, tiny
from vlm4vla_core.errors import InputError
from vlm4vla_core.families import families
from vlm4vla_core.freezing import PARTS, freeze, part_of
from vlm4vla_core.lora import add_lora, export_merged, lora_size, merge_lora
from vlm4vla_core.policy import PolicyConfig, VLAPolicy
from vlm4vla_core.presets import TrainConfig, make_config
from vlm4vla_core.training import train

CONFIG = PolicyConfig(chunk=2, convention=TABLETOP, q01=(-1.0,) * 7, q99=(1.0,) * 7, camera="front", width=16)
TEXTS = ["move left", "touch the red cube"]


def pictures(backbone: Backbone) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, backbone.image_size, backbone.image_size, 3), np.uint8)


def state(backbone: Backbone) -> torch.Tensor:
    return backbone(backbone.collate(pictures(backbone), TEXTS))[:, 0]  # (2, D)


def move_adapters(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", families())
def test_on_every_part_of_every_family(name: str):
    backbone, parts = tiny(name), list(PARTS)
    if name == "gemma3":  # its projector is a bare matrix
        with pytest.raises(InputError, match="gemma3 has no module that takes an adapter in projector"):
            add_lora(backbone, parts)
        parts.remove("projector")
    before, count = state(backbone).detach(), sum(p.numel() for p in backbone.parameters())
    named, expected = list(backbone.state_dict()), lora_size(backbone.base, backbone.spec, parts, 4)
    add_lora(backbone, parts, rank=4)
    freeze(backbone, [])
    assert sum(p.numel() for p in backbone.parameters()) == count + expected
    assert torch.equal(state(backbone), before)
    move_adapters(backbone)
    moved = state(backbone)
    direction = torch.randn(backbone.hidden_size, generator=torch.Generator().manual_seed(0))
    (moved @ direction).sum().backward()
    groups, reached = backbone.groups(), dict.fromkeys((*PARTS, None), 0.0)
    for parameter_name, parameter in backbone.named_parameters():
        # LoRA's own weights and the query; what has no adapter beside it (norms, convolutions) rests with its part
        part = part_of(groups[parameter_name])
        trained = ".lora_" in parameter_name or part not in parts
        assert parameter.requires_grad == trained and (trained or parameter.grad is None), parameter_name
        if parameter.grad is not None:
            reached[part] += float(parameter.grad.abs().sum())
    assert min(reached.values()) > 0
    merge_lora(backbone)
    assert list(backbone.state_dict()) == named and "lora" not in backbone.lineage
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    scale = float(moved.detach().abs().max())
    torch.testing.assert_close(state(backbone), moved, atol=2e-5 * max(1, scale), rtol=0)


def test_the_merged_weight_is_the_formula():
    backbone = tiny(image_size=56)
    plain = {name: value.clone() for name, value in backbone.state_dict().items()}
    add_lora(backbone, ["decoder"], rank=3, alpha=12)
    move_adapters(backbone)
    layer = backbone.base.get_submodule("language_model.layers.1.mlp.up_proj")
    a, b = layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double()
    merge_lora(backbone)
    key = "base.language_model.layers.1.mlp.up_proj.weight"
    expected = plain[key].double() + 12 / 3 * b @ a
    torch.testing.assert_close(backbone.state_dict()[key].double(), expected, atol=1e-6, rtol=1e-6)
    others = [name for name in plain if not name.endswith("proj.weight") and "layers" in name]
    assert others and all(torch.equal(plain[name], backbone.state_dict()[name]) for name in others)


def test_an_adapter_on_the_words_leaves_the_query_as_it_is():
    backbone = tiny(image_size=56)
    add_lora(backbone, ["word_embeddings"], rank=2)
    with torch.no_grad():
        words = backbone.base.get_submodule(backbone.spec.embeddings)
        for factor in (words.lora_embedding_A["default"], words.lora_embedding_B["default"]):
            factor.normal_(generator=torch.Generator().manual_seed(0))
        ids = torch.tensor([[3, backbone.query_id]])
        out = words(ids)
    assert torch.equal(out[0, 1], backbone.query[0])
    assert float((out[0, 0] - words.weight[3]).detach().abs().max()) > 0.1


def test_adapters_on_a_bf16_base_are_fp32_and_start_from_their_seed():
    backbones = []
    for seed in (1, 1, 2):
        backbone = tiny(image_size=56)
        backbone.base.to(torch.bfloat16)
        before = torch.get_rng_state()
        add_lora(backbone, ["vision"], rank=2, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        backbones.append({k: v for k, v in backbone.state_dict().items() if ".lora_A" in k})
    assert all(value.dtype == torch.float32 for value in backbones[0].values())
    same, other = ([torch.equal(backbones[0][k], one[k]) for k in backbones[0]] for one in backbones[1:])
    assert all(same) and not any(other)
    assert torch.isfinite(state(backbone).float()).all()


def test_a_policy_with_adapters_is_saved_loaded_and_exported(tmp_path: Path):
    policy = VLAPolicy(tiny(seed=1, image_size=56), CONFIG)
    add_lora(policy.backbone, ["vision", "decoder"], rank=2)
    move_adapters(policy)
    policy.eval().save(tmp_path / "ck")
    expected = policy.predict(pictures(policy.backbone), TEXTS).actions
    loaded = VLAPolicy.load(tmp_path / "ck")
    assert np.array_equal(loaded.predict(pictures(policy.backbone), TEXTS).actions, expected)
    assert loaded.backbone.lineage["lora"] == policy.backbone.lineage["lora"]
    assert any(".lora_A" in name for name in loaded.state_dict())
    assert checkpoint.row_labels(tmp_path / "ck")["freeze"] == "lora(vision)+lora(decoder)"
    export_merged(tmp_path / "ck", tmp_path / "merged")
    merged = VLAPolicy.load(tmp_path / "merged")
    assert not any("lora" in name or "base_layer" in name for name in merged.state_dict())
    np.testing.assert_allclose(merged.predict(pictures(policy.backbone), TEXTS).actions, expected, atol=1e-4)
    assert checkpoint.row_labels(tmp_path / "merged")["freeze"] == "lora(vision)+lora(decoder)"
    start = load_backbone(tmp_path / "ck")  # new work starts from merged weights
    pairs = zip(start.state_dict().items(), merged.backbone.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    with pytest.raises(InputError, match="no adapters to merge"):
        export_merged(tmp_path / "merged", tmp_path / "again")
    with pytest.raises(InputError, match="has adapters already"):
        add_lora(loaded.backbone, ["vision"])


def test_training_moves_adapters_query_and_head_alone_and_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = toy_store(tmp_path / "store").path
    settings = {
        "image_size": 28, "chunk": 2, "head_width": 16, "max_steps": 4, "batch_size": 4, "lr": 1e-2, "warmup_steps": 0,
        "save_every": 2, "val_rows": 4, "threads": 1, "lora": ("decoder",), "lora_rank": 2, "freeze": ("vision",),
    }  # fmt: skip
    last = train(TrainConfig(**settings), data, tmp_path / "run")
    start = VLAPolicy.load(last.parent / "step-000000").state_dict()
    end = VLAPolicy.load(last).state_dict()
    groups = VLAPolicy.load(last).backbone.groups()
    for name, value in end.items():
        part = part_of(groups.get(name.removeprefix("backbone."), ""))
        still = part in ("vision", "decoder") and ".lora_" not in name
        assert torch.equal(value, start[name]) == still, name
    run = folders.read_json(tmp_path / "run" / "run.json")
    assert run["config"]["lora"] == ["decoder"] and run["parameters"]["trained"] < run["parameters"]["total"]
    step = checkpoint.step_folder(tmp_path / "run", 4)
    kept = {name: (step / name).read_bytes() for name in (checkpoint.WEIGHTS, checkpoint.STATE)}
    shutil.rmtree(step)  # as if killed before the last one was written
    train(TrainConfig(**settings), data, tmp_path / "run")
    assert kept == {name: (step / name).read_bytes() for name in kept}


def test_contradictions_are_refused():
    with pytest.raises(InputError, match="vision stands in freeze and in lora"):
        make_config("tiny", {"lora": ("vision",), "freeze": ("vision",)})
