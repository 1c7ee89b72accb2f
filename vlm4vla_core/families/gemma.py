"""PaliGemma 1 and 2, and Gemma3: a SigLIP tower before a Gemma decoder, with image blocks read in both directions.

Trap: without `token_type_ids` all three fall back to a plain causal mask and say nothing. In PaliGemma type 0 is the
prefix that is read in both directions and 1 the suffix; in Gemma3 type 1 is an image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def _prefix_and_suffix(image: Tensor, suffix: Tensor) -> dict[str, Tensor]:
    return {"token_type_ids": suffix.long()}


def _image_blocks(image: Tensor, suffix: Tensor) -> dict[str, Tensor]:
    return {"token_type_ids": image.long()}


def _pali_geometry(config: Any, size: int) -> Geometry:
    return fixed_geometry(config, size, 1)


def _gemma3_geometry(config: Any, size: int) -> Geometry:
    side = config.vision_config.image_size // config.vision_config.patch_size
    return fixed_geometry(config, size, side // int(config.mm_tokens_per_image**0.5))


def _tiny_pali(ids: dict[str, int], size: int, **text: Any) -> Any:
    from transformers import PaliGemmaConfig

    return PaliGemmaConfig(
        text_config=tiny_text(ids, "<pad>", "<eos>", **text),
        vision_config=tiny_siglip(size, projection_dim=64),
        projection_dim=64,
        hidden_size=64,
        image_token_index=ids["<image>"],
    )


def _tiny_paligemma(ids: dict[str, int], size: int) -> Any:
    return _tiny_pali(ids, size, model_type="gemma")


def _tiny_paligemma2(ids: dict[str, int], size: int) -> Any:
    return _tiny_pali(ids, size, model_type="gemma2", query_pre_attn_scalar=16)


def _tiny_gemma3(ids: dict[str, int], size: int) -> Any:
    from transformers import Gemma3Config

    return Gemma3Config(
        text_config=tiny_text(ids, "<pad>", "<end_of_turn>", query_pre_attn_scalar=16, sliding_window=512),
        vision_config=tiny_siglip(size),
        mm_tokens_per_image=(size // 28) ** 2,
        image_token_index=ids["<image_soft_token>"],
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
    )


def _spec(name: str, **changes: Any) -> FamilySpec:
    return FamilySpec(
        name=name,
        extra_inputs=("token_type_ids",),
        embed_scale="inside",
        projector=("multi_modal_projector",),
        **SIGLIP,
        **changes,
    )


# The processor puts the placeholders before the text's own first token and closes the text with a newline.
_PALI_PROMPT = Prompt("{image}<bos>{text}\n", "{instruction}")
_PALI: dict[str, Any] = {
    "model_types": ("paligemma",),
    "prompts": {"own": _PALI_PROMPT, "paper": _PALI_PROMPT},
    "answer_end": "<eos>",
    "turn": "{text}\n",
    "image_token": "<image>",
    "query_token": "<unused0>",
    "special_tokens": ("<pad>", "<eos>", "<bos>", "<unk>", "<unused0>", "<image>"),
    "positions": "count1",
    "token_inputs": _prefix_and_suffix,
    "geometry": _pali_geometry,
}
_GEMMA3_PROMPT = Prompt(
    "<bos><start_of_turn>user\n\n\n<start_of_image>{image}<end_of_image>\n\n{text}<end_of_turn>\n<start_of_turn>model\n"
)

SPECS = (
    _spec("paligemma", text_types=("gemma",), tiny_config=_tiny_paligemma, **_PALI),
    _spec(
        "paligemma2",
        text_types=("gemma2",),
        tiny_config=_tiny_paligemma2,
        attention={"text_config": "eager", "vision_config": "sdpa"},  # sdpa has no soft-capping and is refused
        **_PALI,
    ),
    _spec(
        "gemma3",
        model_types=("gemma3",),
        prompts={"own": _GEMMA3_PROMPT, "paper": _GEMMA3_PROMPT},
        answer_end="<end_of_turn>",
        turn="\n<start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n",
        image_token="<image_soft_token>",
        query_token="<unused0>",
        special_tokens=(
            "<pad>", "<eos>", "<bos>", "<unk>", "<unused0>", "<image_soft_token>", "<start_of_image>", "<end_of_image>",
            "<start_of_turn>", "<end_of_turn>",
        ),
        positions="count",
        token_inputs=_image_blocks,
        geometry=_gemma3_geometry,
        tiny_config=_tiny_gemma3,
    ),
)  # fmt: skip
