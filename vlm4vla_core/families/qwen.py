"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL (also mixture of experts) and Qwen3.5: flat patches and three-axis positions.

Trap: Qwen2.5-VL's tower works window by window, so hooks on its blocks, and on its merger, see another order than
`get_image_features` returns. Qwen3-VL's DeepStack mergers belong to the projector.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm4vla_core.families.spec import (
    CLIP_MEAN,
    CLIP_STD,
    UNEXPECTED,
    FamilySpec,
    Geometry,
    Prompt,
    tiny_text,
)

if TYPE_CHECKING:
    from torch import Tensor

_PAD, _END = "<|endoftext|>", "<|im_end|>"
SPECIAL_TOKENS = (
    _PAD, "<|im_start|>", _END, "<|quad_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
_TURN = "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
_WITH_SYSTEM = Prompt("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + _TURN)


def _qwen_geometry(config: Any, size: int) -> Geometry:
    vision = config.vision_config
    window = getattr(vision, "window_size", 0)
    return Geometry(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, window, size)


def qwen_patchify(images: Tensor, geometry: Geometry) -> Tensor:
    """Cut normalised images (B, 3, H, W) into Qwen's flat patches (B * grid², 3 * temporal * patch²).

    A still image fills every frame of a temporal patch. Patches come in merge blocks, blocks in raster order,
    exactly as transformers' `Qwen2VLImageProcessorPil` orders them. Works on any device.
    """
    p, m, t = geometry.patch, geometry.merge, geometry.temporal
    b, c, height, width = images.shape
    gh, gw = height // p, width // p
    x = images.unsqueeze(1).expand(b, t, c, height, width).reshape(b, 1, t, c, gh // m, m, p, gw // m, m, p)
    x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)  # (B, 1, gh/m, gw/m, m, m, C, t, p, p)
    return x.reshape(b * gh * gw, c * t * p * p)


def _qwen_pixels(images: Tensor, geometry: Geometry) -> dict[str, Tensor]:
    import torch

    grid = torch.tensor([[1, geometry.grid, geometry.grid]]).repeat(len(images), 1)
    return {"pixel_values": qwen_patchify(images, geometry), "image_grid_thw": grid.to(images.device)}


def _qwen_token_types(image: Tensor, suffix: Tensor) -> dict[str, Tensor]:
    return {"mm_token_type_ids": image.int()}


def qwen_window_order(geometry: Geometry) -> list[int]:
    """Image tokens of one image in the order in which Qwen2.5-VL's vision tower processes them (window by window).

    Entry i is the raster number of the i-th processed token. Windows at the edges may be smaller.
    """
    side = geometry.grid // geometry.merge
    window = max(1, geometry.window // geometry.patch // geometry.merge)
    starts = range(0, side, window)
    return [
        row * side + column
        for top in starts
        for left in starts
        for row in range(top, min(top + window, side))
        for column in range(left, min(left + window, side))
    ]


def _qwen_raster(features: Tensor, geometry: Geometry, merged: bool) -> Tensor:
    """Bring what a hook saw, in window order (B, n, C), into raster order: image tokens if merged, else patches."""
    import torch

    m, side = geometry.merge, geometry.grid // geometry.merge
    order = torch.as_tensor(qwen_window_order(geometry), device=features.device)
    blocks = features.reshape(len(features), side * side, -1, features.shape[-1])  # (B, tokens, m² or 1, C)
    raster = torch.empty_like(blocks)
    raster[:, order] = blocks
    if merged:
        return raster[:, :, 0]
    x = raster.reshape(len(features), side, side, m, m, features.shape[-1]).transpose(2, 3)
    return x.reshape(features.shape)


def _tiny_qwen2_5_vl(ids: dict[str, int], size: int) -> Any:
    """The real class at 0.3 M parameters. The rotary base is 10: with the published 1e6 the height and width axes of
    so narrow a head hardly turn over a grid of a few tokens."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": ids["vocab"], "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10.0},
            "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 3, "hidden_size": 48, "intermediate_size": 144, "num_heads": 3, "out_hidden_size": 64,
            "patch_size": 14, "temporal_patch_size": 1, "window_size": 56, "fullatt_block_indexes": [0, 1, 2],
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip


def _tiny_ids(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
    }  # fmt: skip


def _rope(section: list[int], **changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "mrope_section": section, "rope_theta": 10.0, **changes}}


def _tiny_qwen2_vl(ids: dict[str, int], size: int) -> Any:
    from transformers import Qwen2VLConfig

    return Qwen2VLConfig(
        text_config=tiny_text(ids, _PAD, _END, **_rope([2, 3, 3])),
        vision_config={"depth": 3, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2},
        tie_word_embeddings=True,
        **_tiny_ids(ids),
    )


# The DeepStack features of layer n enter the decoder after its layer n: three layers, so that both are used.
_TINY_VISION = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
_TINY_VISION |= {"num_position_embeddings": 64, "patch_size": 14}
_DEEPSTACK = {"deepstack_visual_indexes": [0, 1]}


def _tiny_qwen3_vl(ids: dict[str, int], size: int) -> Any:
    from transformers import Qwen3VLConfig

    text = tiny_text(ids, _PAD, _END, num_hidden_layers=3, **_rope([2, 3, 3], mrope_interleaved=True))
    vision = {**_TINY_VISION, **_DEEPSTACK}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **_tiny_ids(ids))


def _tiny_qwen3_vl_moe(ids: dict[str, int], size: int) -> Any:
    from transformers import Qwen3VLMoeConfig

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    text = tiny_text(ids, _PAD, _END, num_hidden_layers=3, **experts, **_rope([2, 3, 3], mrope_interleaved=True))
    vision = {**_TINY_VISION, **_DEEPSTACK}
    return Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **_tiny_ids(ids))


def _tiny_qwen3_5(ids: dict[str, int], size: int) -> Any:
    """Three layers of linear attention and one of full attention, as in the published pattern."""
    from transformers import Qwen3_5Config

    linear = {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    linear |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    rope = _rope([2, 1, 1], partial_rotary_factor=0.5, mrope_interleaved=True)
    text = tiny_text(ids, _PAD, _END, num_hidden_layers=4, **linear, **rope)
    return Qwen3_5Config(text_config=text, vision_config=_TINY_VISION, tie_word_embeddings=True, **_tiny_ids(ids))


def _spec(name: str, **changes: Any) -> FamilySpec:
    common: dict[str, Any] = {
        "prompts": {"own": Prompt(_TURN), "paper": _WITH_SYSTEM},
        # The authors' processor enforced 256 x 28 x 28 pixels, so their 224 px images became 448 px.
        "upscale": 2,
        "patch_embed": ("visual.patch_embed", "visual.pos_embed"),
        "projector": ("visual.merger", "visual.deepstack_merger_list"),
        "published": ((r"^model\.(?=visual\.|language_model\.)", ""),),
    }
    return FamilySpec(
        name=name,
        model_types=(name,),
        answer_end=_END,
        turn="\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
        image_token="<|image_pad|>",
        query_token="<|quad_start|>",
        special_tokens=SPECIAL_TOKENS,
        extra_inputs=("mm_token_type_ids",),
        positions="mrope",
        vision_tower="visual",
        blocks="visual.blocks",
        vision_norm=(),
        geometry=_qwen_geometry,
        pixel_inputs=_qwen_pixels,
        token_inputs=_qwen_token_types,
        raster=_qwen_raster,
        **{**common, **changes},
    )


_OLDER: dict[str, Any] = {
    "prompts": {"own": _WITH_SYSTEM, "paper": _WITH_SYSTEM},
    "mean": CLIP_MEAN,
    "std": CLIP_STD,
    "plain_pads": False,  # the library's own fall-back, where the authors gave no positions; for the newer they did
    "image_size": 224,  # the published 3136 pixels at least leave it as it is
    "published": ((r"^model\.(?=visual\.|language_model\.)", ""), (r"^model\.", "language_model.")),
}
# Qwen3-VL's published 65536 pixels at least make 256 px of a smaller image.
_NEWER: dict[str, Any] = {"image_size": 256}

SPECS = (
    _spec("qwen2_vl", tiny_config=_tiny_qwen2_vl, **_OLDER),
    _spec("qwen2_5_vl", tiny_config=_tiny_qwen2_5_vl, **_OLDER),
    _spec("qwen3_vl", tiny_config=_tiny_qwen3_vl, **_NEWER),
    _spec(
        "qwen3_vl_moe",
        tiny_config=_tiny_qwen3_vl_moe,
        no_gradient=(r".*\.mlp\.(experts|gate)\..*",),  # an expert to which no token is routed
        **_NEWER,
    ),
    _spec(
        "qwen3_5",
        tiny_config=_tiny_qwen3_5,
        unexpected=(*UNEXPECTED, r"mtp\..*"),  # its multi-token predictor
        **_NEWER,
    ),
)
