"""Every family: the contract, the library's own language loss, groups, the options of the action query."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, Kosmos2ForConditionalGeneration

from vlm4vla_core.backbone import Backbone, tiny
from vlm4vla_core.contract import ContractError, check_backbone
from vlm4vla_core.errors import InputError
from vlm4vla_core.families import families, family, family_of
from vlm4vla_core.options import PAPER, BackboneOptions

TEXTS = ["open the drawer", "put the small red cup on the plate"]
FAMILIES = [
    "gemma3", "idefics3", "internvl", "kosmos2", "llava_onevision", "paligemma", "paligemma2", "qwen2_5_vl", "qwen2_vl",
    "qwen3_5", "qwen3_vl", "qwen3_vl_moe", "smolvlm",
]  # fmt: skip


@lru_cache
def member(name: str) -> Backbone:
    return tiny(name, seed=1)


def pictures(count: int = 2, size: int = 112, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def full_model(model: Backbone, seed: int = 3) -> Any:
    """A full model of the library, with logits, around the same base."""
    config = copy.deepcopy(model.base.config)
    kosmos = model.spec.name == "kosmos2"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"attn_implementation": model.spec.attention}
        full = Kosmos2ForConditionalGeneration if kosmos else AutoModelForImageTextToText
        made = (full._from_config if kosmos else full.from_config)(config, **options).eval()
    inner = made if kosmos else made.model
    missing, left = inner.load_state_dict(model.base.state_dict(), strict=False)
    assert not left and all("lm_head" in name for name in missing)
    return made


def test_families_are_listed_and_told_apart():
    assert families() == FAMILIES
    assert family_of("paligemma", text_type="gemma2").name == "paligemma2"
    assert family_of("paligemma", text_type="gemma").name == family_of("paligemma").name == "paligemma"
    with pytest.raises(InputError, match="model_type 'paligemma' with a gemma9 decoder"):
        family_of("paligemma", text_type="gemma9")
    with pytest.raises(InputError, match="unknown model family 'kosmos'; did you mean 'kosmos2'"):
        family("kosmos")


# --- the contract ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_the_contract(name: str):
    model = member(name)
    assert 1e5 < sum(parameter.numel() for parameter in model.parameters()) < 3.5e5
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_backbone(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "paligemma2", "kosmos2", "internvl"])
def test_the_paper_preset_keeps_what_is_left_of_the_contract(name: str):
    model = tiny(name, seed=1, image_size=56, options=PAPER)
    assert not model.query.any()
    check_backbone(model)


@pytest.mark.parametrize("name", ["smolvlm", "llava_onevision", "paligemma"])
def test_a_tower_may_drop_pixels_at_the_edge(name: str):
    """As SigLIP's 384 px by 14 in SmolVLM (81 tokens) and LLaVA-OneVision (27 x 27, twice, and 27 newlines)."""
    model = tiny(name, seed=1, image_size=118)
    assert model.geometry.grid == 8
    check_backbone(model)
    sizes = {"smolvlm": (3, 81), "llava_onevision": (None, 1485), "paligemma": (None, 729)}
    config = copy.deepcopy(model.base.config)
    config.vision_config.image_size = 384
    config.image_grid_pinpoints = [[384, 384]]
    config.scale_factor, tokens = sizes[name]
    assert model.spec.native_size(config) == 384 and model.spec.geometry(config, 384).tokens == tokens


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
def test_an_image_that_does_not_divide_into_patches_is_refused(name: str):
    with pytest.raises(InputError, match="image size 57 does not divide"):
        tiny(name, image_size=57)


@pytest.mark.parametrize("name", ["paligemma", "kosmos2", "qwen3_5"])
def test_several_queries_left_padding_and_frozen_parts(name: str):
    model = tiny(name, seed=2, options=BackboneOptions(n_queries=3))
    model.padding = "left"
    for parameter, group in model.groups().items():
        model.get_parameter(parameter).requires_grad_(not group.startswith(("vision", "embeddings")))
    check_backbone(model)
    assert model(model.collate(pictures(), TEXTS)).shape == (2, 3, 64)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_missing_input_raises_in_our_code_where_the_library_is_silent(name: str):
    model = member(name)
    batch = model.collate(pictures(), TEXTS)
    needed = {"qwen": "mm_token_type_ids", "pali": "token_type_ids", "gemm": "token_type_ids"}
    needed["kosm"] = "image_embeds_position_mask"
    assert model.spec.extra_inputs == ((needed[name[:4]],) if name[:4] in needed else ())
    for key in ("attention_mask", *model.spec.extra_inputs):
        with pytest.raises(ValueError, match=key):
            model({**{k: v for k, v in batch.items() if k != key}})


def test_the_contract_catches_wrong_entries():
    def broken(name: str, **changes: Any) -> Backbone:
        model = tiny(name, seed=1)
        model.spec = dataclasses.replace(model.spec, **changes)
        return model

    wrong = [
        (broken("internvl", raster=lambda x, g, m: x if m else x[:, : g.grid**2]), "changed most at"),  # class token in
        (broken("llava_onevision", no_gradient=()), "no gradient reaches.*post_layernorm"),
        (broken("paligemma", positions="count"), "our forward against the library's"),
    ]
    for model, message in wrong:
        with pytest.raises(ContractError, match=message):
            check_backbone(model)


# --- language -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_language_loss_equals_the_full_model(name: str):
    """Tied and untied heads, Gemma 2's soft-capping, Kosmos-2's own head."""
    model = tiny(name, seed=4)
    full = full_model(model)
    tied = model.base.config.tie_word_embeddings
    assert tied == (name not in ("qwen3_vl_moe", "internvl", "smolvlm", "idefics3", "llava_onevision"))
    answers = ["red cube", "left"]
    if not tied:
        with pytest.raises(InputError, match=r"not tied.*language_head=True"):
            model.language_loss(pictures(), TEXTS, answers)
        model.lm_head = nn.Parameter(full.get_output_embeddings().weight.detach().clone())
    batch = model.collate_answers(pictures(), TEXTS, answers)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", *model.spec.extra_inputs)}
    logits = full(**inputs, **model.pixels(batch["images"]), use_cache=False).logits
    if name == "paligemma2" and "softcapping" not in inspect.getsource(type(full).forward):
        logits = torch.tanh(logits / 30) * 30  # transformers 5.17 forgets the cap of the published config
    theirs = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(model.language_loss(pictures(), TEXTS, answers), theirs, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_in_one_named_group(name: str):
    model = member(name)
    groups = model.groups()
    vision = model.base.get_submodule(model.spec.blocks)
    expected = {"vision.embed", "projector", "embeddings", "decoder.norm", "query"}
    expected |= {f"vision.{i}" for i in range(len(vision))}
    expected |= {f"decoder.{i}" for i in range(len(model.base.get_submodule(model.spec.layers)))}
    assert set(groups.values()) - {"vision.norm"} == expected
    assert ("vision.norm" in groups.values()) == (not name.startswith("qwen") and name != "internvl")
    tower = {key for key, group in groups.items() if group.startswith("vision.")}
    assert all(key.startswith(f"base.{model.spec.vision_tower}.") for key in tower)
    for path in (*model.spec.patch_embed[:1], *model.spec.projector[:1], model.spec.vision_tower):
        assert model.base.get_submodule(path) is not None
    if name in ("qwen3_vl", "qwen3_vl_moe"):
        assert groups["base.visual.deepstack_merger_list.0.norm.weight"] == "projector"


# --- the action query -----------------------------------------------------------------------------------


def test_the_query_is_as_long_as_a_typical_word_where_it_enters():
    """Gemma multiplies inside its embedding layer, so behind it a word is sqrt(64) times its row; Kosmos-2 after."""
    for name, factor in (("paligemma", 8.0), ("gemma3", 8.0), ("kosmos2", 1.0), ("smolvlm", 1.0)):
        model = tiny(name, seed=5, options=BackboneOptions(n_queries=64))
        words = model.base.get_input_embeddings()(torch.arange(200))
        rows = model.base.get_input_embeddings().weight
        assert float((words[0, 0] / rows[0, 0]).detach()) == pytest.approx(factor)
        ratio = float(model.query.detach().pow(2).mean().sqrt() / words.detach().pow(2).mean().sqrt())
        assert ratio == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl", "paligemma", "kosmos2"])
def test_the_paper_preset_equals_the_authors_way(name: str):
    """Embeddings spliced by hand, a vector after the padding, and the library's own fall-back positions; in Qwen3-VL
    an explicit arange on three axes, its DeepStack features kept."""
    model = tiny(name, seed=6, image_size=56, options=PAPER)
    with torch.no_grad():
        model.query.normal_(generator=torch.Generator().manual_seed(0))
    batch = model.collate(pictures(size=56), TEXTS)
    assert batch["input_ids"][:, -1].tolist() == [model.query_id] * 2
    assert not batch["attention_mask"][0, -3:-1].any() and batch["attention_mask"][:, -1].all()
    ids, mask = batch["input_ids"][:, :-1], batch["attention_mask"]
    image = (batch["image_embeds_position_mask"][:, :-1] if name == "kosmos2" else ids == model.image_id).bool()
    assert image.sum(1).tolist() == [{"kosmos2": 8}.get(name, model.geometry.tokens)] * 2
    base = model.base
    with torch.no_grad():
        seen = base.get_image_features(**model.pixels(batch["images"])).pooler_output
        seen = torch.cat(list(seen)) if isinstance(seen, tuple | list) else seen
        words = base.get_input_embeddings()(ids.masked_fill(image, 0))
        words[image] = seen.reshape(-1, words.shape[-1])
        embeds = torch.cat([words, model.query.expand(2, 1, -1)], dim=1)  # (B, L, D)
        if name == "kosmos2":
            theirs = base.text_model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state[:, -1]
        elif name == "qwen3_vl":
            deep = base.get_image_features(**model.pixels(batch["images"])).deepstack_features
            deep = [torch.cat(list(one)) if isinstance(one, tuple | list) else one for one in deep]
            where = torch.cat([image, torch.zeros(2, 1, dtype=torch.bool)], dim=1)
            inputs = {"inputs_embeds": embeds, "attention_mask": mask, "deepstack_visual_embeds": deep}
            inputs["position_ids"] = torch.arange(embeds.shape[1]).expand(3, 2, -1)
            theirs = base.language_model(**inputs, visual_pos_masks=where).last_hidden_state[:, -1]
            without = base.language_model(**{**inputs, "deepstack_visual_embeds": None}).last_hidden_state[:, -1]
            assert float((theirs - without).abs().max()) > 1e-3
        elif name == "paligemma":  # bidirectional over everything
            types = torch.zeros_like(mask)
            theirs = base(inputs_embeds=embeds, attention_mask=mask, token_type_ids=types).last_hidden_state[:, -1]
        else:  # the authors' version of the library counts real tokens in Qwen, columns elsewhere
            count = {"position_ids": (mask.cumsum(1) - 1).expand(3, -1, -1)} if name == "qwen2_5_vl" else {}
            theirs = base(inputs_embeds=embeds, attention_mask=mask, **count).last_hidden_state[:, -1]
        torch.testing.assert_close(model(batch)[:, 0], theirs, rtol=0, atol=1e-5)
        native = tiny(name, seed=6, image_size=56)
        assert float((native(native.collate(pictures(size=56), TEXTS))[:, 0] - theirs).abs().max()) > 1e-3


def test_the_paper_preset_sees_the_authors_tokens():
    sizes = {"qwen2_5_vl": (448, 256), "internvl": (448, 256), "paligemma": (224, 256)}
    for name, (pixels, tokens) in sizes.items():
        model = tiny(name, image_size=224, options=PAPER)
        assert (model.image_size, model.geometry.size, model.geometry.tokens) == (224, pixels, tokens)
        assert model.collate(pictures(size=200), TEXTS)["images"].shape == (2, pixels, pixels, 3)
    big = dataclasses.replace(member("qwen3_vl").geometry, patch=16, size=448)
    assert big.tokens == 196


def test_one_dimensional_positions_are_the_same_on_all_axes():
    model = tiny("qwen3_vl", options=BackboneOptions(positions="arange"))
    batch = model.collate(pictures(), TEXTS)
    expected = batch["attention_mask"].cumsum(1) - 1
    real = batch["attention_mask"].bool()
    assert batch["position_ids"].shape[0] == 3
    assert all(torch.equal(axis[real], expected[real]) for axis in batch["position_ids"])
    native = member("qwen3_vl").collate(pictures(), TEXTS)["position_ids"]
    assert not torch.equal(native[0], native[1])


def test_as_prefix_the_query_changes_what_the_prompt_reads_as_suffix_it_does_not():
    moved = {}
    for role in ("prefix", "suffix"):
        model = tiny("paligemma", seed=7, options=BackboneOptions(query_role=role))
        batch = model.collate(pictures(1), TEXTS[:1])
        with torch.no_grad():
            before = model.hidden(batch)[:, :-1]
            model.query.add_(1.0)
            moved[role] = float((model.hidden(batch)[:, :-1] - before).abs().max())
    assert moved["suffix"] == 0.0 and moved["prefix"] > 1e-4


def test_paligemma_reads_answers_and_the_query_as_suffix():
    """Type 1, causal, as its processor marks a suffix; the prompt, and all of it when nothing follows, is prefix."""
    model = member("paligemma")
    asked = model.collate_answers(pictures(), TEXTS, ["red cube", "left"])
    assert torch.equal(asked["token_type_ids"].bool(), asked["labels"] != -100)
    acting = model.collate(pictures(), TEXTS)
    assert torch.equal(acting["token_type_ids"].bool(), acting["input_ids"] == model.query_id)
    assert not model.collate(pictures(), TEXTS, query=False)["token_type_ids"].any()


def test_dropout_is_off_unless_asked_for():
    on, off = (tiny("kosmos2", options=BackboneOptions(dropout=kept)).train() for kept in (True, False))
    batch = off.collate(pictures(), TEXTS)
    with torch.no_grad():
        assert torch.equal(off(batch), off(batch))
        assert not torch.equal(on(batch), on(batch))
    assert off.base.config.text_config.dropout == 0.1  # the config still says what the checkpoint had


def test_options_survive_saving_and_unknown_ones_are_refused(tmp_path: Any):
    options = BackboneOptions(n_queries=2, query_init="zeros", prompt="paper", query_place="after_pads")
    model = tiny("internvl", options=options)
    model.save(tmp_path / "m")
    assert Backbone.load(tmp_path / "m").options == options
    assert BackboneOptions.from_dict({}) == BackboneOptions()
    with pytest.raises(InputError, match="unknown prompt 'papr'; did you mean 'paper'"):
        BackboneOptions(prompt="papr")
    with pytest.raises(InputError, match="unknown backbone option 'promt'; did you mean 'prompt'"):
        BackboneOptions.from_dict({"promt": "own"})
    with pytest.raises(InputError, match="n_queries is '2', not int"):
        BackboneOptions.from_dict({"n_queries": "2"})
    with pytest.raises(InputError, match="0 action queries"):
        BackboneOptions(n_queries=0)


# --- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_reserved_tokens_in_a_text_are_refused(name: str):
    model = member(name)
    for token in (model.spec.image_token, model.spec.query_token, model.spec.answer_end):
        with pytest.raises(InputError, match="reserved tokens"):
            model.collate(pictures(1), [f"take {token} it"])


@pytest.mark.parametrize("name", ["paligemma", "kosmos2", "gemma3", "smolvlm"])
def test_a_tower_with_fixed_positions_refuses_another_image_size(name: str):
    model = member(name)
    with pytest.raises(InputError, match="images of 112 pixels, not 56"):
        Backbone(copy.deepcopy(model.base), model.tokenizer, model.spec, 56)
    assert Backbone(copy.deepcopy(model.base), model.tokenizer, model.spec).image_size == 112  # the config's own


def test_a_tokenizer_that_pads_unlike_a_model_that_counts_ids_is_refused():
    model = member("kosmos2")
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.pad_token = "</s>"
    with pytest.raises(InputError, match="pads with id 2, the model with 1"):
        Backbone(copy.deepcopy(model.base), tokenizer, model.spec)
