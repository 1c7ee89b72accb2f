"""Freezing by parts: exactly what is named stops, in every family, and the merger's membership is explicit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm4vla_core.backbone import tiny
from vlm4vla_core.families import families
from vlm4vla_core.freezing import PARTS, freeze, part_of


@pytest.mark.parametrize("name", families())
def test_gradients_reach_exactly_what_is_not_frozen(name: str):
    backbone = tiny(name)
    images = np.random.default_rng(0).integers(0, 256, (1, backbone.image_size, backbone.image_size, 3), np.uint8)
    direction = torch.randn(backbone.hidden_size, generator=torch.Generator().manual_seed(0))
    freeze(backbone, ["vision", "word_embeddings"])
    (backbone(backbone.collate(images, ["move left"]))[0, 0] @ direction).backward()
    reached = dict.fromkeys((*PARTS, None), 0.0)
    for parameter_name, group in backbone.groups().items():
        gradient = backbone.get_parameter(parameter_name).grad
        reached[part_of(group)] += 0.0 if gradient is None else float(gradient.abs().sum())
    assert reached["vision"] == reached["word_embeddings"] == 0.0
    assert min(reached["projector"], reached["decoder"], reached[None]) > 0  # None: the query


@pytest.mark.parametrize("name", families())
def test_every_parameter_but_query_and_output_layer_belongs_to_one_part(name: str):
    groups = tiny(name).groups()
    assert {part_of(group) for group in groups.values()} == {*PARTS, None}
    assert {group for group in groups.values() if part_of(group) is None} == {"query"}


def test_vision_leaves_the_merger_of_qwen_to_projector():
    backbone = tiny("qwen2_5_vl")
    freeze(backbone, ["vision"])
    fixed = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert fixed and all(name.startswith("base.visual.") and ".merger." not in name for name in fixed)
    freeze(backbone, ["projector"])  # sets anew, does not add
    fixed = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert fixed and all(".merger." in name for name in fixed)
    freeze(backbone, [])
    assert all(parameter.requires_grad for parameter in backbone.parameters())
