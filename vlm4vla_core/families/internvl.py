"""InternVL (3.5 in the paper): an InternViT tower with a class token, pixel shuffle, and a Qwen decoder.

Trap: its own images are 448 px, 256 tokens. A 224 px image runs too, with interpolated positions and 64 tokens.
"""

from __future__ import annotations

from typing import Any

from vlm4vla_core.families.spec import FamilySpec, Geometry, Prompt, tiny_text

_PAD, _END = "<|endoftext|>", "<|im_end|>"


def _geometry(config: Any, size: int) -> Geometry:
    patch = config.vision_config.patch_size
    return Geometry(patch if isinstance(patch, int) else patch[0], round(1 / config.downsample_ratio), 1, 0, size)


def _tiny(ids: dict[str, int], size: int) -> Any:
    from transformers import InternVLConfig

    return InternVLConfig(
        text_config=tiny_text(ids, _PAD, _END, model_type="qwen3"),
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": [size, size], "patch_size": [14, 14],
        },
        image_token_id=ids["<IMG_CONTEXT>"],
        tie_word_embeddings=False,
    )  # fmt: skip


_ASSISTANT = "{text}<|im_end|>\n<|im_start|>assistant\n"
SPECS = (
    FamilySpec(
        name="internvl",
        model_types=("internvl",),
        prompts={
            "own": Prompt("<|im_start|>user\n<img>{image}</img>\n" + _ASSISTANT),
            "paper": Prompt(
                "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<img>{image}</img>"
                + _ASSISTANT
            ),
        },
        answer_end=_END,
        turn="\n<|im_start|>user\n" + _ASSISTANT,
        image_token="<IMG_CONTEXT>",
        query_token="<|quad_start|>",
        special_tokens=(_PAD, "<|im_start|>", _END, "<|quad_start|>", "<img>", "</img>", "<IMG_CONTEXT>"),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        upscale=2,
        positions="count",
        published=(
            (r"^model\.", ""),
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^language_model\.model\.", "language_model."),
        ),
        vision_tower="vision_tower",
        patch_embed=("vision_tower.embeddings",),
        blocks="vision_tower.encoder.layer",
        vision_norm=("vision_tower.layernorm",),
        projector=("multi_modal_projector",),
        geometry=_geometry,
        tiny_config=_tiny,
    ),
)
