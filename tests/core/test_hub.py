"""Real weights never load as random ones: every family's published layout, sharded, loaded headless, bit for bit.

The layouts are written here by hand, from the names in the published files, and not by the table that reads them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_layouts import PUBLISHED, published
from safetensors.torch import load_file, save_file

from vlm4vla_core.backbone import Backbone, load_backbone, tiny
from vlm4vla_core.errors import InputError
from vlm4vla_core.families import families
from vlm4vla_core.hub import weight_files

KNOWN = {  # a few names as they stand in the published files
    "qwen2_5_vl": ["visual.blocks.0.attn.qkv.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"],
    "qwen3_vl": ["model.visual.deepstack_merger_list.0.linear_fc1.weight", "model.language_model.norm.weight"],
    "paligemma": [
        "vision_tower.vision_model.embeddings.patch_embedding.weight", "multi_modal_projector.linear.weight",
        "language_model.model.layers.0.mlp.down_proj.weight",
    ],
    "kosmos2": ["text_model.model.embed_tokens.weight", "vision_model.model.pre_layrnorm.weight"],
    "internvl": ["vision_tower.encoder.layer.0.lambda_1", "language_model.model.embed_tokens.weight"],
    "smolvlm": ["model.text_model.layers.0.mlp.up_proj.weight", "model.connector.modality_projection.proj.weight"],
    "llava_onevision": ["image_newline", "language_model.lm_head.weight"],
}  # fmt: skip


@lru_cache
def member(name: str) -> Backbone:
    """A tiny member with every number of it drawn, so that none is what a constructor would put there."""
    model = tiny(name, seed=8)
    generator = torch.Generator().manual_seed(9)
    for parameter in model.base.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) / 8)
    return model


def assert_equal(loaded: Backbone, model: Backbone) -> None:
    ours, theirs = dict(loaded.base.named_parameters()), dict(model.base.named_parameters())
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def test_every_family_has_a_published_layout():
    assert sorted(PUBLISHED) == families()


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_published_layout_loads_bit_equal(name: str, tmp_path: Path):
    model = member(name)
    extra = {"mtp.fc.weight": torch.zeros(2, 2)} if name == "qwen3_5" else {}
    if name == "kosmos2":  # as an old file
        extra = {"text_model.model.embed_positions.weights": torch.zeros(4, 64)}
    folder = published(tmp_path / "m", model, **extra)
    keys = {key: model.spec.canonical(key) for file in weight_files(folder) for key in load_file(file)}
    assert set(KNOWN.get(name, [])) <= set(keys)
    assert set(keys.values()) - {"lm_head.weight", *extra} == set(dict(model.base.named_parameters()))
    state = torch.get_rng_state()
    loaded = load_backbone(folder)
    assert torch.equal(state, torch.get_rng_state())
    assert loaded.spec.name == name and loaded.lineage == {"source": "m", "init": "pretrained", "init_seed": None}
    assert_equal(loaded, model)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "paligemma2", "kosmos2", "internvl"])
def test_loads_in_bf16_what_was_published_in_bf16(name: str, tmp_path: Path):
    model = member(name)
    folder = published(tmp_path / "m", model)
    for file in weight_files(folder):
        save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    for dtype in (torch.bfloat16, torch.float32):
        loaded = load_backbone(folder, dtype=dtype)
        for key, value in model.base.named_parameters():
            assert torch.equal(loaded.base.get_parameter(key), value.bfloat16().to(dtype))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_keys_that_do_not_fit_are_errors_that_name_them(name: str, tmp_path: Path):
    model = member(name)
    lost = published(tmp_path / "lost", model)
    file = weight_files(lost)[0]
    tensors = load_file(file)
    victim = next(key for key in tensors if "layers.0" in key and key.endswith("weight"))
    save_file({key: value for key, value in tensors.items() if key != victim}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"weights missing: .*layers\.0"):
        load_backbone(lost)
    more = published(tmp_path / "more", model, **{"surprise.weight": torch.zeros(2)})
    with pytest.raises(InputError, match=r"weights left over: surprise\.weight"):
        load_backbone(more)


def test_weights_of_another_shape_and_configs_that_contradict_themselves_are_told_in_a_line(tmp_path: Path):
    folder = published(tmp_path / "m", member("qwen2_5_vl"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"6 weights of another shape: language_model\.layers\.0\.mlp\.down_proj"):
        load_backbone(folder)
    config["text_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"cannot load the config \(.*layer_types"):
        load_backbone(folder)


def rename(folder: Path, change: Any) -> Path:
    """Rename weights in a folder's files."""
    for file in weight_files(folder):
        save_file({change(key): value for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(
            {"metadata": {}, "weight_map": {k: f.name for f in folder.glob("*.safetensors") for k in load_file(f)}}
        )
    )
    return folder


@pytest.mark.parametrize("name", ["qwen3_vl", "paligemma", "kosmos2", "llava_onevision"])
def test_a_checkpoint_of_unknown_names_never_loads_as_random_weights(name: str, tmp_path: Path):
    folder = rename(published(tmp_path / "m", member(name)), lambda key: f"trainer.net.{key}")
    with pytest.raises(InputError, match="weights missing"):
        load_backbone(folder)


def test_a_load_that_differs_from_the_files_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What the library reports as loaded is compared with the files all the same."""
    from transformers import AutoModel

    folder = published(tmp_path / "m", member("internvl"))
    real = AutoModel.from_pretrained

    def careless(*args: Any, **options: Any) -> Any:
        base, report = real(*args, **options)
        base.vision_tower.encoder.layer[1].mlp.fc1.weight.data[3, 5] += 1e-3
        return base, report

    monkeypatch.setattr(AutoModel, "from_pretrained", careless)
    with pytest.raises(InputError, match=r"encoder\.layer\.1\.mlp\.fc1\.weight was not loaded as it stands"):
        load_backbone(folder)


@pytest.mark.parametrize("name", ["internvl", "llava_onevision", "smolvlm", "qwen3_vl_moe", "kosmos2"])
def test_the_output_layer_of_the_file_is_used_whatever_the_config_says(name: str, tmp_path: Path):
    model = member(name)
    words = model.base.get_input_embeddings().weight
    head = torch.randn(words.shape, generator=torch.Generator().manual_seed(2))
    folder = published(tmp_path / "m", model, head)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = True  # as a config that leaves it unsaid
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_backbone(folder, language_head=True)
    assert loaded.lm_head is not None and torch.equal(loaded.lm_head, head)
    assert load_backbone(folder).lm_head is None
    with pytest.raises(InputError, match="not tied"):
        load_backbone(folder).language_loss(torch.zeros(1, 112, 112, 3, dtype=torch.uint8).numpy(), ["a"], ["b"])


def test_a_file_without_output_layer_is_tied_only_if_its_config_says_so_somewhere(tmp_path: Path):
    model = member("llava_onevision")
    for said in (True, False):
        folder = published(tmp_path / f"{said}", model)
        for file in weight_files(folder):
            kept = {key: value for key, value in load_file(file).items() if "lm_head" not in key}
            save_file(kept, file, metadata={"format": "pt"})
        rename(folder, str)  # writes the index anew
        config = json.loads((folder / "config.json").read_text())
        config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"] = False, said
        (folder / "config.json").write_text(json.dumps(config))
        loaded = load_backbone(folder)
        assert loaded.base.config.tie_word_embeddings == said
        if not said:
            with pytest.raises(InputError, match="no output layer"):
                load_backbone(folder, language_head=True)


# --- from scratch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PUBLISHED))
@pytest.mark.parametrize("parts", [("vision",), ("decoder",)])
def test_scratch_draws_exactly_the_named_part(name: str, parts: tuple[str, ...], tmp_path: Path):
    model = member(name)
    folder = published(tmp_path / "m", model)
    made = load_backbone(folder, init="scratch", scratch=parts, seed=3)
    assert made.lineage["init"] == f"scratch {parts[0]}" and made.lineage["init_seed"] == 3
    again = load_backbone(folder, init="scratch", scratch=parts, seed=3)
    for key, group in made.groups().items():
        if key == "query":
            continue
        drawn = group.startswith({"vision": ("vision.",), "decoder": ("decoder.", "embeddings")}[parts[0]])
        assert torch.equal(made.get_parameter(key), again.get_parameter(key))
        assert torch.equal(made.get_parameter(key), model.get_parameter(key)) == (not drawn), key


def test_scratch_of_all_leaves_no_image_projection_at_zero(tmp_path: Path):
    """The library leaves Gemma3's at zero, through which no gradient and no image passes."""
    folder = published(tmp_path / "m", member("gemma3"))
    state = torch.get_rng_state()
    made, other = (load_backbone(folder, init="scratch", seed=seed) for seed in (1, 2))
    assert torch.equal(state, torch.get_rng_state())
    weight = made.base.multi_modal_projector.mm_input_projection_weight
    assert 0.01 < float(weight.detach().std()) < 0.03
    assert not torch.equal(weight, other.base.multi_modal_projector.mm_input_projection_weight)
    assert made.lineage["init"] == "scratch" and made.lineage["init_seed"] == 1
    with pytest.raises(InputError, match="with no part to draw anew"):
        load_backbone(folder, init="scratch", scratch=())
    with pytest.raises(InputError, match="unknown part 'visoin' to draw anew; did you mean 'vision'"):
        load_backbone(folder, init="scratch", scratch=("visoin",))


def test_scratch_of_a_part_of_our_own_checkpoint(tmp_path: Path):
    member("qwen2_5_vl").save(tmp_path / "own")
    made = load_backbone(tmp_path / "own", init="scratch", scratch=("vision",), seed=3)
    for key, group in made.groups().items():
        if "norm" not in key and not key.endswith("bias"):  # these a member starts at one and zero, and keeps
            assert torch.equal(made.get_parameter(key), member("qwen2_5_vl").get_parameter(key)) == (
                not group.startswith("vision.")
            ), key


def test_a_missing_shard_is_refused_for_every_layout(tmp_path: Path):
    folder = published(tmp_path / "m", member("paligemma"))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="cannot load the model"):
        load_backbone(folder)
    with pytest.raises(InputError, match="a weight file is missing"):
        weight_files(folder)


def test_a_hub_id_loads_from_the_cache_offline(tmp_path: Path):
    """In a process of its own: the library reads the cache's place when it is imported."""
    cache = tmp_path / "hub" / "models--someone--some-vlm"
    (cache / "snapshots").mkdir(parents=True)
    published(cache / "snapshots" / "0123abcd", member("internvl"))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abcd")
    code = (
        "from vlm4vla_core.backbone import load_backbone; m = load_backbone('someone/some-vlm');"
        "print(m.spec.name, m.lineage['source'], float(sum(p.double().sum() for p in m.base.parameters())))"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1500:]
    name, source, total = done.stdout.split()
    expected = float(sum(p.double().sum() for p in member("internvl").base.parameters()).detach())
    assert (name, source, float(total)) == ("internvl", "some-vlm", pytest.approx(expected, rel=1e-12))
