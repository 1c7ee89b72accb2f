"""Kosmos-2: a CLIP tower, a resampler to 64 latents and a Magneto decoder with sinusoidal positions.

Traps: without `image_embeds_position_mask` the image is dropped silently; word embeddings are multiplied by sqrt(width)
after the embedding layer, so the query is too; and its decoder has dropout of 0.1 (see `BackboneOptions.dropout`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm4vla_core.families.spec import (
    CLIP_MEAN,
    CLIP_STD,
    FamilySpec,
    Geometry,
    Prompt,
    fixed_geometry,
)

if TYPE_CHECKING:
    from torch import Tensor


def _geometry(config: Any, size: int) -> Geometry:
    return fixed_geometry(config, size, 1, placeholders=config.latent_query_num)


def _image_mask(image: Tensor, suffix: Tensor) -> dict[str, Tensor]:
    return {"image_embeds_position_mask": image.long()}


def _image_ids(tokenizer: Any, number: int) -> list[int]:
    """The processor marks the image by the ids that follow the unknown token's; their embeddings are overwritten."""
    first = tokenizer.unk_token_id + 1
    return list(range(first, first + number))


def _tiny(ids: dict[str, int], size: int) -> Any:
    from transformers import Kosmos2Config

    return Kosmos2Config(
        text_config={
            "vocab_size": ids["vocab"], "embed_dim": 64, "layers": 2, "ffn_dim": 96, "attention_heads": 4,
            "max_position_embeddings": 1024, "pad_token_id": ids["<pad>"], "bos_token_id": ids["<s>"],
            "eos_token_id": ids["</s>"],
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": size, "patch_size": 14,
        },
        latent_query_num=8,
    )  # fmt: skip


SPECS = (
    FamilySpec(
        name="kosmos2",
        model_types=("kosmos-2",),
        prompts={
            "own": Prompt("<s><image>{image}</image> Question: {text} Answer:"),
            "paper": Prompt("<s><image>{image}</image><p>{text}\n</p>", "{instruction}"),
        },
        answer_end="</s>",
        turn=" Question: {text} Answer:",
        image_token="</chunk>",
        query_token="</line>",
        special_tokens=("<s>", "<pad>", "</s>", "<unk>", "<image>", "</image>", "</chunk>", "</line>"),
        mean=CLIP_MEAN,
        std=CLIP_STD,
        extra_inputs=("image_embeds_position_mask",),
        positions="ids",
        embed_scale="after",
        image_ids=_image_ids,
        published=((r"^text_model\.lm_head\.", "lm_head."),),
        vision_tower="vision_model",
        patch_embed=("vision_model.model.embeddings", "vision_model.model.pre_layrnorm"),
        blocks="vision_model.model.encoder.layers",
        vision_norm=("vision_model.model.post_layernorm",),
        projector=("image_to_text_projection",),
        embeddings="text_model.model.embed_tokens",
        layers="text_model.model.layers",
        norm="text_model.model.layer_norm",
        geometry=_geometry,
        token_inputs=_image_mask,
        tiny_config=_tiny,
        spatial=False,
    ),
)
