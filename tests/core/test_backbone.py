"""Families and backbones against the library itself: its classes, its image processor, its own loss."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from vlm4vla_core.backbone import MAX_TEXT_TOKENS, Backbone, load_backbone, tiny
from vlm4vla_core.contract import ContractError, check_backbone
from vlm4vla_core.errors import InputError
from vlm4vla_core.families import Geometry, Prompt
from vlm4vla_core.families.qwen import qwen_patchify, qwen_window_order
from vlm4vla_core.options import BackboneOptions
from vlm4vla_core.tiny import tiny_tokenizer

TEXTS = ["open the drawer", "put the small red cup on the plate"]


def pictures(count: int = 2, size: int = 112, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny()


def full_model(seed: int = 3, *, tied: bool = True) -> Qwen2_5_VLForConditionalGeneration:
    """A full model of the library, with logits, of the tiny size."""
    config = copy.deepcopy(tiny().base.config)
    config.tie_word_embeddings = tied
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config).eval()


def saved(folder: Path, model: Any, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# --- families and tiny members --------------------------------------------------------------------------


def test_an_unknown_family_names_the_nearest():
    with pytest.raises(InputError, match=r"unknown model family 'qwen2_5vl'; did you mean 'qwen2_5_vl'"):
        tiny("qwen2_5vl")


def test_tiny_is_a_function_of_its_seed_and_leaves_the_global_state():
    before = torch.get_rng_state()
    one, same, other = tiny(seed=5), tiny(seed=5), tiny(seed=6)
    assert torch.equal(before, torch.get_rng_state())
    assert type(one.base).__name__ == "Qwen2_5_VLModel"
    assert 1e5 < sum(p.numel() for p in one.parameters()) < 5e5
    pairs = zip(one.state_dict().values(), same.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.query, other.query)
    assert not torch.equal(next(one.base.parameters()), next(other.base.parameters()))


def test_listed_words_are_one_token_and_specials_stay_whole():
    tokenizer = tiny_tokenizer()
    for word in ("cube", "left", "gripper", "drawer"):
        assert len(tokenizer(" " + word)["input_ids"]) == len(tokenizer(word)["input_ids"]) == 1
    assert len(tokenizer(" gruyere")["input_ids"]) == 8  # blank and letters, as bytes
    assert len(tokenizer("<|image_pad|>" * 3)["input_ids"]) == 3


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=40))
def test_any_text_survives_the_tokenizer(text: str):
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


# --- pictures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patch", "size"), [(14, 224), (14, 112), (16, 128)])
def test_patches_equal_the_library_processor_bit_for_bit(patch: int, size: int):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = pictures(3, size)
    processor = Qwen2VLImageProcessorPil(patch_size=patch, min_pixels=1, do_rescale=False, do_normalize=False)
    theirs = processor(list(images), return_tensors="pt")
    geometry = Geometry(patch, 2, 2, 0, size)
    ours = qwen_patchify(torch.from_numpy(images).permute(0, 3, 1, 2).float(), geometry)
    assert torch.equal(ours, theirs["pixel_values"].float())
    assert theirs["image_grid_thw"].tolist() == [[1, geometry.grid, geometry.grid]] * 3


def test_normalised_pixels_equal_the_library_processor(backbone: Backbone):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = pictures(2)
    shape = backbone.geometry
    processor = Qwen2VLImageProcessorPil(
        patch_size=shape.patch, merge_size=shape.merge, temporal_patch_size=shape.temporal, min_pixels=1
    )
    theirs = processor(list(images), return_tensors="pt")["pixel_values"]
    ours = backbone.pixels(torch.from_numpy(images))["pixel_values"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "window"), [(112, 56), (112, 112), (224, 56), (140, 56), (84, 56)])
def test_window_order_equals_the_library(size: int, window: int):
    from transformers.vision_utils import get_vision_window_index

    geometry = Geometry(14, 2, 2, window, size)
    grid = torch.tensor([[1, geometry.grid, geometry.grid]])
    theirs, _ = get_vision_window_index(grid, spatial_merge_size=2, window_size=window, patch_size=14)
    assert qwen_window_order(geometry) == theirs.tolist()


def test_features_lie_where_the_pixels_are_and_no_hook_stays(backbone: Backbone):
    hooks = sum(len(module._forward_hooks) for module in backbone.modules())
    features = backbone.vision_features(pictures())
    depth = backbone.base.config.vision_config.depth
    assert list(features) == [*(f"vision.{i}" for i in range(depth)), "projector"]
    assert features["vision.0"].shape[:2] == (2, backbone.geometry.grid**2)
    assert features["projector"].shape == (2, backbone.geometry.tokens, backbone.hidden_size)
    assert sum(len(module._forward_hooks) for module in backbone.modules()) == hooks


def test_an_image_size_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match=r"image size 100 does not divide.*multiple of 28"):
        tiny(image_size=100)


# --- the contract ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [56, 112, 140])  # 140: 5 x 5 tokens in unequal windows
def test_tiny_keeps_the_contract(size: int):
    model = tiny(seed=1, image_size=size)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_backbone(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_contract_holds_with_left_padding_two_queries_and_frozen_vision():
    made = tiny()
    options = BackboneOptions(n_queries=2)
    model = Backbone(made.base, made.tokenizer, made.spec, 112, options=options, padding="left")
    made.base.get_input_embeddings()._forward_hooks.popitem(last=False)  # the first backbone's hook
    for name, group in model.groups().items():
        model.get_parameter(name).requires_grad_(not group.startswith("vision"))
    check_backbone(model)
    assert model(model.collate(pictures(), TEXTS)).shape == (2, 2, model.hidden_size)


def with_spec(model: Backbone, **changes: Any) -> Backbone:
    model.spec = dataclasses.replace(model.spec, **changes)
    return model


def plain_positions(model: Backbone) -> Backbone:
    """Positions counted along the padded row, so that padding moves the query."""
    collate = model.collate

    def moved(images: Any, texts: Any, *, query: bool = True) -> dict[str, torch.Tensor]:
        batch = collate(images, texts, query=query)
        if query and model.padding == "right":
            batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["position_ids"]).clone()
        return batch

    model.collate = moved  # type: ignore[method-assign]
    return model


def without_hook(model: Backbone) -> Backbone:
    model.base.get_input_embeddings()._forward_hooks.clear()
    return model


def deaf(model: Backbone) -> Backbone:
    model.prompt = Prompt(model.prompt.text, "What now")
    return model


def frozen_by_detaching(model: Backbone) -> Backbone:
    visual = model.base.visual
    visual.merger.register_forward_hook(lambda module, args, out: out.detach())
    return model


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (without_hook, "vocabulary row"),
        (plain_positions, "padding on the left"),
        (lambda m: with_spec(m, raster=lambda x, g, merged: x), "raster order|changed most at"),
        (deaf, "instruction"),
        (frozen_by_detaching, "no gradient reaches"),
    ],
)
def test_a_broken_backbone_is_caught(breaks: Any, message: str):
    with pytest.raises(ContractError, match=message):
        check_backbone(breaks(tiny()))


def test_what_the_library_does_silently_raises_in_our_code(backbone: Backbone):
    batch = backbone.collate(pictures(), TEXTS)
    del batch["mm_token_type_ids"]
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        backbone(batch)


# --- language -------------------------------------------------------------------------------------------


def test_language_loss_equals_the_full_model_with_labels(tmp_path: Path):
    full = full_model()
    model = load_backbone(saved(tmp_path / "m", full), image_size=112)
    images, answers = pictures(), ["red cube", "left"]
    ours = model.language_loss(images, TEXTS, answers)
    batch = model.collate_answers(images, TEXTS, answers)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    theirs = full(**inputs, **model.pixels(batch["images"]), labels=batch["labels"]).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert (batch["labels"] != -100).sum() == 3 + 2  # words of the answers and one closing token each


def test_an_untied_output_layer_must_be_loaded(tmp_path: Path):
    full = full_model(tied=False)
    folder = saved(tmp_path / "m", full)
    images = pictures()
    with pytest.raises(InputError, match=r"not tied.*language_head=True"):
        load_backbone(folder, image_size=112).language_loss(images, TEXTS, ["yes", "no"])
    model = load_backbone(folder, image_size=112, language_head=True)
    batch = model.collate_answers(images, TEXTS, ["yes", "no"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    theirs = full(**inputs, **model.pixels(batch["images"]), labels=batch["labels"]).loss
    torch.testing.assert_close(model.language_loss(images, TEXTS, ["yes", "no"]), theirs, rtol=1e-6, atol=0)


# --- groups ---------------------------------------------------------------------------------------------


def test_every_parameter_is_in_one_named_group(backbone: Backbone):
    groups, config = backbone.groups(), backbone.base.config
    assert set(groups) == {name for name, _ in backbone.named_parameters()}
    expected = {"vision.embed", "projector", "embeddings", "decoder.norm", "query"}
    expected |= {f"vision.{i}" for i in range(config.vision_config.depth)}
    expected |= {f"decoder.{i}" for i in range(config.text_config.num_hidden_layers)}
    assert set(groups.values()) == expected
    assert groups["base.visual.merger.mlp.0.weight"] == "projector"


# --- real checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "200KB"}])
def test_a_full_checkpoint_loads_bit_equal(tmp_path: Path, options: dict[str, str]):
    full = full_model()
    folder = saved(tmp_path / "m", full, **options)
    assert (folder / "model.safetensors.index.json").exists() == bool(options)
    state = torch.get_rng_state()
    model = load_backbone(folder)
    assert torch.equal(state, torch.get_rng_state())
    expected = full.model.state_dict()
    assert set(model.base.state_dict()) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in model.base.state_dict().items())
    assert model.image_size == 224 and model.lineage["init"] == "pretrained"


def test_scratch_draws_anew_and_records_its_seed(tmp_path: Path):
    folder = saved(tmp_path / "m", full_model())
    one, same = (load_backbone(folder, init="scratch", seed=4, image_size=112) for _ in range(2))
    other, real = load_backbone(folder, init="scratch", seed=5), load_backbone(folder)
    name = "base.language_model.layers.0.mlp.up_proj.weight"
    weight = one.get_parameter(name)
    assert torch.equal(weight, same.get_parameter(name))
    assert not torch.equal(weight, other.get_parameter(name)) and not torch.equal(weight, real.get_parameter(name))
    assert one.lineage["init"] == "scratch" and one.lineage["init_seed"] == 4


def edit_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["visual.merger.mlp.0.bias" if "visual.merger.mlp.0.bias" in tensors else
            next(name for name in tensors if name.endswith("merger.mlp.0.bias"))][0] = float("nan")  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(next(n for n in t if n.endswith("merger.mlp.0.weight"))),
            r"weights missing: .*merger\.mlp\.0",
        ),
        (lambda t: t.update({"surprise.weight": torch.zeros(2)}), r"1 weights left over: surprise\.weight"),
        (nan, r"merger\.mlp\.0\.bias holds NaN"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, change: Any, message: str):
    folder = saved(tmp_path / "m", full_model())
    edit_weights(folder, change)
    with pytest.raises(InputError, match=message):
        load_backbone(folder)


def test_what_cannot_be_had_is_told_in_one_line(tmp_path: Path):
    with pytest.raises(InputError, match=r"no such model folder"):
        load_backbone(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"cannot load the config.*go online"):
        load_backbone("some-owner/some-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no config\.json"):
        load_backbone(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    for kind, message in (
        ("qwen9_vl", "model_type 'qwen9_vl'.*did you mean 'qwen"),
        ("bert", "model_type 'bert'"),
    ):
        (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(InputError, match=message):
            load_backbone(tmp_path / "other")
    with pytest.raises(InputError, match="unknown init 'random'"):
        load_backbone(tmp_path, init="random")


def test_a_missing_shard_and_a_pickle_are_refused(tmp_path: Path):
    folder = saved(tmp_path / "m", full_model(), max_shard_size="200KB")
    next(iter(sorted(folder.glob("model-*.safetensors")))).unlink()
    with pytest.raises(InputError, match="cannot load the model"):
        load_backbone(folder)
    folder = saved(tmp_path / "p", full_model())
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot load the model"):
        load_backbone(folder)


# --- bad batches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (pictures(2), ["one"], "2 images for 1 texts"),
        (pictures(1), ["  "], "empty instruction"),
        (pictures(1), ["take <|quad_start|> it"], r"reserved tokens \(<\|quad_start\|>\)"),
        (pictures(1), ["take <|image_pad|>"], "reserved tokens"),
        (pictures(1), ["zzzz " * MAX_TEXT_TOKENS], f"at most {MAX_TEXT_TOKENS}"),
        (pictures(1).astype(np.float32), ["take it"], "expected uint8"),
        (pictures(1)[..., :1], ["take it"], "expected uint8"),
    ],
)
def test_bad_batches_are_refused(backbone: Backbone, images: np.ndarray, texts: list[str], message: str):
    with pytest.raises(InputError, match=message):
        backbone.collate(images, texts)


def test_a_prompt_without_query_is_no_action_prompt(backbone: Backbone):
    with pytest.raises(ValueError, match="action queries"):
        backbone(backbone.collate(pictures(), TEXTS, query=False))
