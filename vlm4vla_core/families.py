"""One entry per VLM family: everything in which families differ, so that the rest of the code need not know them.

Adding a family means adding one `FamilySpec` to `_SPECS` and passing `vlm4vla_core.check_backbone`.
torch is imported inside the functions: naming the families must not cost a second.

Trap: a wrong entry rarely raises. Without `mm_token_type_ids`, for one, Qwen2.5-VL falls back to one-dimensional
positions and says nothing; so every silent failure of a family is listed here and checked by the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm4vla_core.errors import InputError, nearest

if TYPE_CHECKING:
    from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Geometry:
    """How one square image becomes patches and image tokens.

    patch: pixels per side of a patch. merge: patches per side of one image token. temporal: frames per patch.
    window: pixels per side of an attention window (0: none). size: pixels per side of the image.
    """

    patch: int
    merge: int
    temporal: int
    window: int
    size: int

    def __post_init__(self) -> None:
        step = self.patch * self.merge
        if self.size < step or self.size % step:
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
        """Image tokens of one image."""
        return (self.grid // self.merge) ** 2


@dataclass(frozen=True)
class FamilySpec:
    """What the backbone must know about one family.

    model_types: values of `model_type` in a Hugging Face config that belong here.
    prompt: text up to the first answer token, with `{image}` and `{text}`. action_question: the text of a policy's
    prompt, with `{instruction}`. answer_end: the token that closes an answer. image_token: placeholder, once per
    image token. query_token: a reserved token that occurs in no prompt; its embedding is replaced by the query.
    mean, std: normalisation of RGB in [0, 1]. image_size: default pixels per side.
    extra_inputs: inputs without which the family fails silently. attention: implementation to ask transformers for.
    unexpected: patterns of weights in a full checkpoint that the headless base leaves out.
    module paths are relative to the headless base that `AutoModel` gives.
    """

    name: str
    model_types: tuple[str, ...]
    prompt: str
    action_question: str
    answer_end: str
    image_token: str
    query_token: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    extra_inputs: tuple[str, ...]
    attention: str
    unexpected: tuple[str, ...]
    head_weight: str  # name of the output layer in a full checkpoint, where it is not tied to the word embeddings
    patch_embed: str
    blocks: str
    projector: str
    embeddings: str
    layers: str
    norm: str
    geometry: Callable[[Any, int], Geometry]  # (config, image size)
    pixel_inputs: Callable[[Tensor, Geometry], dict[str, Tensor]]  # normalised (B, 3, H, W) -> model inputs
    token_inputs: Callable[[Tensor, int], dict[str, Tensor]]  # (ids (B, L), image id) -> extra inputs
    raster: Callable[[Tensor, Geometry, bool], Tensor]  # (features (B, n, C), geometry, merged) -> raster order
    tiny_config: Callable[[dict[str, int]], Any]  # (special token -> id, and "vocab") -> config

    def group_of(self, name: str) -> str | None:
        """Module group of a parameter, by its name in the headless base: "vision.embed", "vision.0"…, "projector",
        "embeddings", "decoder.0"…, "decoder.norm", "lm_head"; None when it belongs to none."""
        if name.split(".")[0] == "lm_head":
            return "lm_head"
        single = {self.patch_embed: "vision.embed", self.projector: "projector"}
        single |= {self.embeddings: "embeddings", self.norm: "decoder.norm"}
        for module, group in single.items():
            if name.startswith(module + "."):
                return group
        for module, part in ((self.blocks, "vision"), (self.layers, "decoder")):
            if name.startswith(module + "."):
                return f"{part}.{name.removeprefix(module + '.').split('.')[0]}"
        return None


def families() -> list[str]:
    """Names of the families that can be loaded."""
    return sorted(_SPECS)


def family(name: str) -> FamilySpec:
    """The entry of one family. Raises InputError naming the nearest known one."""
    if name not in _SPECS:
        raise InputError(f"unknown model family '{name}'", fix=nearest(name, _SPECS))
    return _SPECS[name]


def family_of(model_type: str, *, where: object = "") -> FamilySpec:
    """The entry for a Hugging Face `model_type`. Raises InputError naming the nearest known one."""
    by_type = {kind: spec for spec in _SPECS.values() for kind in spec.model_types}
    if model_type not in by_type:
        what = f"no model family for model_type '{model_type}'"
        raise InputError(what, where=where, fix=nearest(model_type, by_type))
    return by_type[model_type]


# --- Qwen2.5-VL -----------------------------------------------------------------------------------------


def _qwen_geometry(config: Any, size: int) -> Geometry:
    vision = config.vision_config
    return Geometry(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, vision.window_size, size)


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


def _qwen_token_types(ids: Tensor, image_id: int) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (ids == image_id).int()}


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


def _tiny_qwen2_5_vl(ids: dict[str, int]) -> Any:
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


_CHATML = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|>{image}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)

_SPECS: dict[str, FamilySpec] = {
    "qwen2_5_vl": FamilySpec(
        name="qwen2_5_vl",
        model_types=("qwen2_5_vl",),
        prompt=_CHATML,
        action_question="What action should the robotic arm take to {instruction}",
        answer_end="<|im_end|>",
        image_token="<|image_pad|>",
        query_token="<|quad_start|>",
        mean=CLIP_MEAN,
        std=CLIP_STD,
        image_size=224,
        extra_inputs=("mm_token_type_ids",),
        attention="sdpa",
        unexpected=(r"lm_head\.weight",),
        head_weight="lm_head.weight",
        patch_embed="visual.patch_embed",
        blocks="visual.blocks",
        projector="visual.merger",
        embeddings="language_model.embed_tokens",
        layers="language_model.layers",
        norm="language_model.norm",
        geometry=_qwen_geometry,
        pixel_inputs=_qwen_pixels,
        token_inputs=_qwen_token_types,
        raster=_qwen_raster,
        tiny_config=_tiny_qwen2_5_vl,
    ),
}

SPECIAL_TOKENS: Sequence[str] = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|quad_start|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
