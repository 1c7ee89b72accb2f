"""Sizes on the meta device: the paper's counts, a closed form per architecture, real instances, and what is trained."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from vlm4vla_core import folders, sizes
from vlm4vla_core.actions import TABLETOP
from vlm4vla_core.backbone import tiny
from vlm4vla_core.errors import InputError
from vlm4vla_core.families import families
from vlm4vla_core.freezing import freeze
from vlm4vla_core.lora import add_lora
from vlm4vla_core.policy import PolicyConfig, VLAPolicy


@pytest.fixture(scope="module")
def known() -> dict[str, sizes.Size]:
    return {size.name: size for size in sizes.known_sizes()}


def qwen2_5(d: int, layers: int, kv: int, wide: int, vocabulary: int, tied: bool) -> dict[str, int]:
    """Parameters of Qwen2.5-VL written out: RMS norms, biases on q, k, v, a gated MLP, heads of 128."""
    attention = d * d + d + 2 * (d * 128 * kv + 128 * kv) + d * d
    decoder = layers * (attention + 3 * d * wide + 2 * d) + d
    block = (3 * 1280 * 1280 + 3 * 1280) + (1280 * 1280 + 1280) + 2 * (1280 * 3420 + 3420) + (3420 * 1280 + 1280) + 2560
    vision = 3 * 2 * 14 * 14 * 1280 + 32 * block
    merger = 1280 + (5120 * 5120 + 5120) + (5120 * d + d)
    return {
        "vision": vision, "projector": merger, "decoder": decoder, "word_embeddings": vocabulary * d,
        "lm_head": 0 if tied else vocabulary * d,
    }  # fmt: skip


def paligemma(d: int, layers: int, heads: int, kv: int, size: int, wide: int, norms: int) -> dict[str, int]:
    """Parameters of PaliGemma written out: SigLIP-So400m at 224 px, a Gemma decoder without biases."""
    block = 4 * (1152 * 1152 + 1152) + (1152 * 4304 + 4304) + (4304 * 1152 + 1152) + 4 * 1152
    vision = 3 * 14 * 14 * 1152 + 1152 + 256 * 1152 + 27 * block + 2 * 1152
    layer = 2 * d * heads * size + 2 * d * kv * size + 3 * d * wide + norms * d
    return {
        "vision": vision, "projector": 1152 * d + d, "decoder": layers * layer + d, "word_embeddings": 257216 * d,
        "lm_head": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen2.5-VL-3B", qwen2_5(2048, 36, 2, 11008, 151936, True)),
        ("Qwen2.5-VL-7B", qwen2_5(3584, 28, 4, 18944, 152064, False)),
        ("PaliGemma-1", paligemma(2048, 18, 8, 1, 256, 16384, 2)),
        ("PaliGemma-2", paligemma(2304, 26, 8, 4, 256, 9216, 4)),
    ],
)
def test_parts_have_their_closed_form(known: dict[str, sizes.Size], name: str, expected: dict[str, int]):
    assert {**known[name].parts, "lm_head": known[name].lm_head} == expected


def test_totals_are_the_published_ones(known: dict[str, sizes.Size]):
    """The two totals that the published safetensors indexes state, and the paper's sizes in billions, with the head."""
    assert known["Qwen2.5-VL-3B"].total == 3_754_622_976 and known["Qwen2.5-VL-7B"].total == 8_292_166_656
    for size in known.values():
        assert round((size.total + size.new) / 1e9, 1) == size.paper_b, size.name


def test_new_parameters_are_those_of_the_paper(known: dict[str, sizes.Size]):
    chunk4 = {size.name: size.new for size in sizes.known_sizes(chunk=4)}
    new = [size.new for size in known.values()] + list(chunk4.values())
    assert round(min(new) / 1e6, 3) == 6.568 and round(max(new) / 1e6, 3) == 13.922
    assert all(size.new_share < 0.01 for size in known.values())


# The authors' flag for the vision encoder freezes the merger, too, where it lies inside the tower's module.
FROZEN = {"none": (), "vision encoder frozen": ("vision", "projector"), "word embeddings frozen": ("word_embeddings",)}


def test_trainable_counts_are_those_of_the_paper(known: dict[str, sizes.Size]):
    path = folders.shipped("data/paper/freeze_ablation.csv")
    with path.open() as handle:
        rows = [row for row in csv.DictReader(handle) if row["metric"] == "trainable_params_b"]
    seen = {}
    for row in rows:
        parts = next((FROZEN[key] for key in FROZEN if key in row["setting"]), ())
        if row["model"].startswith("PaliGemma"):
            parts = tuple(part for part in parts if part != "projector")  # a module of its own there
        ours = known[row["model"]].trained(parts, output_layer=True) / 1e9
        seen[row["model"], parts] = (float(row["value"]), ours)
    wrong = ("PaliGemma-1", ("word_embeddings",))
    assert seen.pop(wrong)[0] == 2.7 and round(known["PaliGemma-1"].trained(wrong[1]) / 1e9, 1) == 2.4
    border = ("Qwen2.5-VL-3B", ("word_embeddings",))  # 3.45004: printed 3.4
    printed, ours = seen.pop(border)
    assert printed == 3.4 and ours == pytest.approx(3.45004, abs=1e-5)
    assert all(printed == round(ours, 1) for printed, ours in seen.values()), seen
    assert len(rows) >= 6 and {name for name, _ in seen} >= {"Qwen2.5-VL-3B", "Qwen2.5-VL-7B", "PaliGemma-1"}


@pytest.mark.parametrize("name", families())
def test_a_meta_count_equals_a_real_instance(name: str):
    backbone = tiny(name)
    policy = VLAPolicy(backbone, PolicyConfig(2, TABLETOP, (-1.0,) * 7, (1.0,) * 7, "front", head="flow", width=16))
    lora = ("vision", "decoder")
    options = {"head": "flow", "chunk": 2, "width": 16, "lora": lora, "rank": 2, "image_size": backbone.image_size}
    made = sizes.measure(backbone.base.config, name, **options)
    assert (made.family, made.headless) == (name, sum(p.numel() for p in backbone.base.parameters()))
    assert made.new == policy.new_parameters()[0] and made.new_share == pytest.approx(policy.new_parameters()[1])
    assert made.image_tokens == backbone.geometry.tokens
    add_lora(backbone, lora, rank=2)
    freeze(backbone, ["word_embeddings"])
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert made.trained(["word_embeddings"]) == trained


def test_memory_is_the_stated_rule(known: dict[str, sizes.Size]):
    size = known["PaliGemma-1"]
    words = 257216 * 2048
    assert size.training_gb() == pytest.approx(16 * (2_923_466_480 + size.new) / 1e9)
    assert size.training_gb() - size.training_gb(["word_embeddings"]) == pytest.approx(14 * words / 1e9)


def test_a_checkpoint_brings_its_own_head(tmp_path: Path):
    config = PolicyConfig(3, TABLETOP, (-1.0,) * 7, (1.0,) * 7, "front", head="mlp", width=8)
    policy = VLAPolicy(tiny("qwen3_vl"), config)
    policy.save(tmp_path / "ck")
    made = sizes.size_of(str(tmp_path / "ck"))
    assert made.new == policy.new_parameters()[0] and made.family == "qwen3_vl"
    folder = tmp_path / "hf"
    policy.backbone.base.save_pretrained(folder)
    assert sizes.size_of(str(folder), image_size=112).parts == made.parts
    with pytest.raises(InputError, match=r"no such folder, hub id or known model.*did you mean 'Kosmos-2'"):
        sizes.size_of("Kosmos2")
    assert torch.get_default_device() == torch.device("cpu")
