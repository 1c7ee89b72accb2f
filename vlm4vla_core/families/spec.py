"""What the rest of the code must know about a VLM family, as data: `FamilySpec`, and the geometry of one image.

Trap: a wrong entry rarely raises. Without `mm_token_type_ids`, for one, Qwen2.5-VL falls back to one-dimensional
positions and says nothing; so every silent failure of a family is listed here and checked by the contract.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
# The output layer, and tables that older files hold and the library computes.
UNEXPECTED = (r"lm_head\.weight", r".*\.position_ids", r".*\.inv_freq", r".*\.embed_positions\.weights")
ACTION_QUESTION = "What action should the robotic arm take to {instruction}"


@dataclass(frozen=True)
class Geometry:
    """How one square image becomes patches and image tokens.

    patch: pixels per side of a patch. merge: patches per side of one image token. temporal: frames per patch.
    window: pixels per side of an attention window (0: none). size: pixels per side of the image.
    placeholders: image tokens in the prompt, where they are not one per merged patch (Kosmos-2, LLaVA-OneVision).
    exact: the image must divide into patches; else the tower drops the pixels at its edge (SigLIP's 384 by 14).
    """

    patch: int
    merge: int
    temporal: int
    window: int
    size: int
    placeholders: int | None = None
    exact: bool = True

    def __post_init__(self) -> None:
        step = self.patch * self.merge
        if self.size < step or self.grid % self.merge or (self.exact and self.size % self.patch):
            raise InputError(
                f"image size {self.size} does not divide into image tokens of {step} pixels",
                fix=f"use a multiple of {step}, such as {max(1, round(self.size / step)) * step}",
            )

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.size // self.patch

    @property
    def tokens(self) -> int:
        """Image tokens of one image in the prompt."""
        return (self.grid // self.merge) ** 2 if self.placeholders is None else self.placeholders


@dataclass(frozen=True)
class Prompt:
    """text: up to the first answer token, with `{image}` and `{text}`. question: the text of a policy's prompt, with
    `{instruction}`."""

    text: str
    question: str = ACTION_QUESTION


def plain_pixels(images: Tensor, geometry: Geometry) -> dict[str, Tensor]:
    """The model cuts its own patches."""
    return {"pixel_values": images}


def no_inputs(image: Tensor, suffix: Tensor) -> dict[str, Tensor]:
    """Ids and mask are enough."""
    return {}


def last_grid(features: Tensor, geometry: Geometry, merged: bool) -> Tensor:
    """Already in raster order; a class token before the patches is dropped."""
    return features if merged else features[:, -(geometry.grid**2) :]


@dataclass(frozen=True)
class FamilySpec:
    """What the backbone must know about one family. Module paths are relative to the base that `AutoModel` gives.

    model_types: values of `model_type` in a Hugging Face config that belong here; text_types: of its text config, where
    that tells two families apart. prompts: "own" (the checkpoint's) and "paper" (the authors'; the own one for families
    that the paper does not have). answer_end: the token that closes an answer. image_token: placeholder, once per image
    token. turn: a further question about the same picture, from the answer's end to the next answer, with `{text}`.
    image_ids: ids that stand for it in the model's input, where they are not its own. query_token: a reserved
    token that occurs in no prompt; its embedding is replaced by the query. special_tokens: of the tiny tokenizer, the
    padding token first. mean, std: normalisation of RGB in [0, 1]. image_size: pixels per side, None for the config's
    own. upscale: factor by which the authors' processors enlarged their 224 px images. extra_inputs: inputs without
    which the family fails silently. positions: "mrope" (the model's own 3-axis rule), "count" (of real tokens from 0),
    "count1" (from 1) or "ids" (the model counts ids that are no padding). plain_pads: whether the authors' plain
    positions count padding. attention: implementation to ask for.
    embed_scale: where word embeddings are multiplied by sqrt(width): "none", "inside" the embedding layer (so not the
    query) or "after" it (so the query too). published: (pattern, replacement) pairs, applied in turn, from weight names
    in published files to names in the headless base. unexpected: patterns of headless names that the base leaves out.
    vision_norm: the tower's last norm. projector: includes every merger. no_gradient: patterns of parameters that a
    loss at the query need not reach, each explained beside its entry. spatial: image tokens lie on a grid.
    """

    name: str
    model_types: tuple[str, ...]
    prompts: Mapping[str, Prompt]
    answer_end: str
    turn: str
    image_token: str
    query_token: str
    special_tokens: tuple[str, ...]
    positions: str
    published: tuple[tuple[str, str], ...]
    vision_tower: str
    patch_embed: tuple[str, ...]
    blocks: str
    vision_norm: tuple[str, ...]
    projector: tuple[str, ...]
    geometry: Callable[[Any, int], Geometry]  # (config, image size)
    tiny_config: Callable[[dict[str, int], int], Any]  # (special token -> id and "vocab" -> size, image size) -> config
    pixel_inputs: Callable[[Tensor, Geometry], dict[str, Tensor]] = plain_pixels  # normalised (B, 3, H, W) -> inputs
    extra_inputs: tuple[str, ...] = ()
    token_inputs: Callable[[Tensor, Tensor], dict[str, Tensor]] = no_inputs  # (image, suffix), bool (B, L) -> those
    raster: Callable[[Tensor, Geometry, bool], Tensor] = last_grid  # (features (B, n, C), geometry, merged)
    embeddings: str = "language_model.embed_tokens"
    layers: str = "language_model.layers"
    norm: str = "language_model.norm"
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF
    text_types: tuple[str, ...] = ()
    image_size: int | None = None
    upscale: int = 1
    plain_pads: bool = True
    attention: str | dict[str, str] = "sdpa"
    embed_scale: str = "none"
    image_ids: Callable[[Any, int], list[int]] | None = None  # (tokenizer, number)
    unexpected: tuple[str, ...] = UNEXPECTED
    no_gradient: tuple[str, ...] = ()
    spatial: bool = True

    def group_of(self, name: str) -> str | None:
        """Module group of a parameter, by its name in the headless base: "vision.embed", "vision.0"…, "vision.norm",
        "projector", "embeddings", "decoder.0"…, "decoder.norm", "lm_head"; None when it belongs to none."""
        if name.split(".")[0] == "lm_head":
            return "lm_head"
        parts = {"vision.embed": self.patch_embed, "vision.norm": self.vision_norm, "projector": self.projector}
        parts |= {"embeddings": (self.embeddings,), "decoder.norm": (self.norm,)}
        for group, modules in parts.items():
            if any(f"{name}.".startswith(f"{module}.") for module in modules):
                return group
        for module, part in ((self.blocks, "vision"), (self.layers, "decoder")):
            if name.startswith(module + "."):
                return f"{part}.{name.removeprefix(module + '.').split('.')[0]}"
        return None

    def canonical(self, name: str) -> str:
        """A weight's name in a published file -> its name in the headless base (`lm_head.weight` for the output)."""
        for pattern, replacement in self.published:
            name = re.sub(pattern, replacement, name)
        return name

    def native_size(self, config: Any) -> int:
        """Pixels per side that the checkpoint's own processor makes of a 224 px camera image."""
        vision = config.vision_config
        if self.image_size is None:
            return int(vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0])
        step = vision.patch_size * vision.spatial_merge_size
        return -(-self.image_size // step) * step


# --- pieces that several families share -----------------------------------------------------------------


def fixed_geometry(config: Any, size: int, merge: int, placeholders: int | None = None) -> Geometry:
    """Geometry of a tower with a fixed table of positions. Raises InputError for another image size than its own."""
    vision = config.vision_config
    native, patch = (value if isinstance(value, int) else value[0] for value in (vision.image_size, vision.patch_size))
    if size != native:
        raise InputError(f"this model takes images of {native} pixels, not {size}", fix="leave the image size out")
    return Geometry(patch, merge, 1, 0, size, placeholders, exact=False)


def tiny_text(ids: dict[str, int], pad: str, end: str, **changes: Any) -> dict[str, Any]:
    """Config values of a decoder of two narrow layers."""
    common = {
        "vocab_size": ids["vocab"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "pad_token_id": ids[pad], "bos_token_id": ids[pad], "eos_token_id": ids[end],
    }  # fmt: skip
    return {**common, **changes}


# Where a SigLIP tower keeps its parts, and how published files name tower and language model.
SIGLIP: dict[str, Any] = {
    "published": (
        (r"^model\.", ""),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "language_model."),
        (r"^vision_tower\.vision_model\.", "vision_tower."),
    ),
    "vision_tower": "vision_tower",
    "patch_embed": ("vision_tower.embeddings",),
    "blocks": "vision_tower.encoder.layers",
    "vision_norm": ("vision_tower.post_layernorm",),
}


def tiny_siglip(size: int, **changes: Any) -> dict[str, Any]:
    """Config values of a narrow SigLIP tower."""
    common = {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "image_size": size, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    return {**common, **changes}
