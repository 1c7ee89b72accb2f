"""LLaVA-OneVision: a SigLIP tower and a two-layer projector before a Qwen2 decoder.

Trap: an image is given as a whole and, again, as tiles. Of a square image at the tower's own size there is one tile,
the same picture: it stands twice in the prompt, the second time with a newline vector after each row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm4vla_core.errors import InputError
from vlm4vla_core.families.spec import (
    SIGLIP,
    FamilySpec,
    Geometry,
    Prompt,
    fixed_geometry,
    tiny_siglip,
    tiny_text,
)

if TYPE_CHECKING:
    from torch import Tensor

_PAD, _END = "<|endoftext|>", "<|im_end|>"


def _geometry(config: Any, size: int) -> Geometry:
    if [size, size] not in [list(pair) for pair in config.image_grid_pinpoints]:
        raise InputError(f"this model has no tiling of images of {size} pixels", fix="leave the image size out")
    side = fixed_geometry(config, size, 1).grid
    return fixed_geometry(config, size, 1, placeholders=2 * side**2 + side)


def _pixels(images: Tensor, geometry: Geometry) -> dict[str, Tensor]:
    import torch

    sizes = torch.full((len(images), 2), geometry.size, device=images.device)
    return {"pixel_values": images[:, None].repeat(1, 2, 1, 1, 1), "image_sizes": sizes}  # (B, whole and tile, 3, H, W)


def _whole(features: Tensor, geometry: Geometry, merged: bool) -> Tensor:
    """Of the whole image and its one tile (B, 2 grid², C), the whole."""
    return features[:, : geometry.grid**2]


def _tiny(ids: dict[str, int], size: int) -> Any:
    from transformers import LlavaOnevisionConfig

    return LlavaOnevisionConfig(
        text_config=tiny_text(ids, _PAD, _END, model_type="qwen2"),
        vision_config=tiny_siglip(size),
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=[[size, size]],
        tie_word_embeddings=False,
    )


_PROMPT = Prompt("<|im_start|>user {image}\n{text}<|im_end|><|im_start|>assistant\n")
SPECS = (
    FamilySpec(
        name="llava_onevision",
        model_types=("llava_onevision",),
        prompts={"own": _PROMPT, "paper": _PROMPT},
        answer_end=_END,
        turn="<|im_start|>user\n{text}<|im_end|><|im_start|>assistant\n",
        image_token="<image>",
        query_token="<video>",  # we show it no videos
        special_tokens=(_PAD, "<|im_start|>", _END, "<image>", "<video>"),
        positions="count",
        projector=("multi_modal_projector", "image_newline"),
        # The projector reads the last block's output, before the tower's last norm.
        no_gradient=(r"vision_tower\.post_layernorm\..*",),
        geometry=_geometry,
        pixel_inputs=_pixels,
        raster=_whole,
        tiny_config=_tiny,
        **SIGLIP,
    ),
)
