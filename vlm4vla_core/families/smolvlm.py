"""SmolVLM and Idefics3: a SigLIP tower, pixel shuffle and one linear layer before a Llama decoder.

Trap: their processors split large images into tiles; a camera image goes in whole, as their global view.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm4vla_core.families.spec import (
    FamilySpec,
    Geometry,
    Prompt,
    fixed_geometry,
    tiny_text,
)

if TYPE_CHECKING:
    from torch import Tensor

_PAD, _END = "<|im_end|>", "<end_of_utterance>"
_IMAGE = "<fake_token_around_image><global-img>{image}<fake_token_around_image>"


def _geometry(config: Any, size: int) -> Geometry:
    return fixed_geometry(config, size, config.scale_factor)


def _pixels(images: Tensor, geometry: Geometry) -> dict[str, Tensor]:
    return {"pixel_values": images[:, None]}  # (B, images per text, 3, H, W)


def _tiny(ids: dict[str, int], size: int, kind: str) -> Any:
    from transformers import AutoConfig

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    return AutoConfig.for_model(
        kind,
        text_config=tiny_text(ids, _PAD, _END, model_type="llama"),
        vision_config={**vision, "image_size": size, "patch_size": 14},
        scale_factor=2,
        image_token_id=ids["<image>"],
        tie_word_embeddings=False,
    )


def _tiny_smolvlm(ids: dict[str, int], size: int) -> Any:
    return _tiny(ids, size, "smolvlm")


def _tiny_idefics3(ids: dict[str, int], size: int) -> Any:
    return _tiny(ids, size, "idefics3")


def _spec(name: str, begin: str, **changes: Any) -> FamilySpec:
    prompt = Prompt(f"{begin}User:{_IMAGE}{{text}}<end_of_utterance>\nAssistant:")
    return FamilySpec(
        name=name,
        model_types=(name,),
        prompts={"own": prompt, "paper": prompt},
        answer_end=_END,
        turn="\nUser: {text}<end_of_utterance>\nAssistant:",
        image_token="<image>",
        query_token="<row_6_col_6>",  # marks a tile of a split image, so it never occurs here
        special_tokens=(
            _PAD, _END, begin, "<image>", "<fake_token_around_image>", "<global-img>", "<row_6_col_6>",
        ),
        positions="count",
        published=((r"^model\.", ""),),
        vision_tower="vision_model",
        patch_embed=("vision_model.embeddings",),
        blocks="vision_model.encoder.layers",
        vision_norm=("vision_model.post_layernorm",),
        projector=("connector",),
        embeddings="text_model.embed_tokens",
        layers="text_model.layers",
        norm="text_model.norm",
        geometry=_geometry,
        pixel_inputs=_pixels,
        **changes,
    )  # fmt: skip


SPECS = (
    _spec("smolvlm", "<|im_start|>", tiny_config=_tiny_smolvlm),
    _spec("idefics3", "<|begin_of_text|>", tiny_config=_tiny_idefics3),
)
