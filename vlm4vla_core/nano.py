"""Nano members of the real model classes, 0.5 to 5 million parameters: small enough to train from nothing on two cores.

A nano model is drawn from a seed (`nano`), pretrained by ordinary training configs (`data/nano/recipes`), and shipped
in `data/nano` with a card (`ship`). Classes are transformers' own, unmodified. Pictures are 112 px in patches of 14.

Trap: next-token loss alone does not teach such a model to see within minutes. The dense stage first, then language on
the frozen tower's features, then both together; docs/nano-zoo.md has the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.families import FamilySpec, family

if TYPE_CHECKING:
    import torch

    from vlm4vla_core.backbone import Backbone
    from vlm4vla_core.options import BackboneOptions

IMAGE, PATCH = 112, 14  # pixels
CARD = "card.json"
_SOFTLY = 0.4
_FAINTLY = 0.25
_SCALE = 0.15  # of the last norm: with word embeddings of std 0.5, tied logits start near the uniform distribution


@dataclass(frozen=True)
class NanoSize:
    """Widths and layers of the vision tower and the decoder; merge: patches per side of an image token, where the
    family merges any."""

    vision_width: int
    vision_layers: int
    width: int
    layers: int
    heads: int
    merge: int


SIZES = {
    "xs": NanoSize(64, 2, 96, 3, 4, merge=2),
    "s": NanoSize(64, 2, 96, 3, 4, merge=1),
    "m": NanoSize(96, 3, 128, 4, 4, merge=1),
    "l": NanoSize(128, 4, 192, 5, 6, merge=1),
}


def nano(
    name: str = "paligemma",
    size: str = "s",
    *,
    seed: int = 0,
    image_size: int = IMAGE,
    options: BackboneOptions | None = None,
) -> Backbone:
    """A nano member of a family's real class, randomly initialised, on the CPU in fp32; its output layer is tied.

    The same seed gives the same weights; torch's global random state is left alone. Raises InputError on an unknown
    family or size.
    """
    import torch
    from transformers import AutoModel

    from vlm4vla_core.backbone import Backbone
    from vlm4vla_core.tiny import tiny_tokenizer

    spec, sizes = family(name), _size(size)
    if name not in FAMILIES:
        raise InputError(f"no nano member of the family '{name}'", fix=nearest(name, FAMILIES))
    tokenizer = tiny_tokenizer(spec, _PHRASES)
    ids: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in spec.special_tokens}
    config = FAMILIES[name](sizes, {**ids, "vocab": len(tokenizer)}, image_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = AutoModel.from_config(config, attn_implementation=spec.attention, dtype=torch.float32)
    initialise(base, spec, torch.Generator().manual_seed(seed))
    lineage = {"source": f"nano {name} {size}", "init": "scratch", "init_seed": seed}
    return Backbone(base, tokenizer, spec, image_size, options=options, seed=seed, lineage=lineage).eval()


def initialise(base: Any, spec: FamilySpec, generator: torch.Generator) -> None:
    """`tiny.initialise`, and a small last norm that keeps tied logits near 0.

    Kosmos-2's decoder names its layers otherwise; it is to write into the residual stream as softly as the others' do.
    """
    import torch

    from vlm4vla_core.tiny import initialise as draw

    draw(base, spec, generator)
    with torch.no_grad():  # Gemma's norms multiply by 1 + weight
        base.get_submodule(spec.norm).weight.fill_(_SCALE - (spec.embed_scale == "inside"))
        for name, parameter in base.get_submodule(spec.layers).named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                parameter.mul_(_SOFTLY)
    if hasattr(base, "image_to_text_projection"):
        _place_latents(base, generator)


def _place_latents(base: Any, generator: torch.Generator) -> None:
    """Let each latent of Kosmos-2's resampler begin by looking at its own cell of a square grid.

    Nearly equal latents would all ask for the same mean of the picture, and stay there. A latent is therefore what the
    tower says of its cell in a picture of nothing, where patches differ by position alone; queries and keys begin
    alike, so that like finds like. Latents are keys, too, and are kept small, for each would find itself. Patches
    arrive with length 1, and their positions, drawn as the library draws them, would be lost beside what they show.
    """
    import torch

    projection, size = base.image_to_text_projection, base.config.vision_config
    seen: list[torch.Tensor] = []
    hook = projection.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        base.vision_model.get_submodule("model.embeddings.position_embedding").weight.normal_(generator=generator)
        base.get_image_features(torch.zeros(1, 3, size.image_size, size.image_size))
        hook.remove()
        projection.dense.weight.mul_(math.sqrt(size.hidden_size))
        grid, side = size.image_size // size.patch_size, math.isqrt(base.config.latent_query_num)
        places = projection.dense(seen[0][0, 1:]).unflatten(0, (side, grid // side, side, grid // side))
        places = places.mean((1, 3)).flatten(0, 1)  # (latents, width)
        places -= places.mean(0)
        projection.latent_query.copy_(_FAINTLY * places / places.square().mean().sqrt())
        query, key = projection.x_attn.q_proj, projection.x_attn.k_proj
        torch.nn.init.orthogonal_(key.weight, gain=1.4, generator=generator)
        query.weight.copy_(key.weight / _FAINTLY)
        query.bias.zero_()
        key.bias.zero_()


def _size(name: str) -> NanoSize:
    if name not in SIZES:
        raise InputError(f"unknown nano size '{name}'", fix=nearest(name, SIZES))
    return SIZES[name]


# --- configs ------------------------------------------------------------------------------------------------

# Questions of `vqa.general` and about the hand, and their options, each one token: a step pays for what differs.
_PHRASES = (
    "What color is the", ": red, green, blue, yellow, purple or cyan?",
    "What shape is the", " object: cube, ball or cylinder?",
    "How many", " are there: zero, one, two, three or four?",
    "Is the", " left of the", " behind the", ", yes or no?",
    "Which object is closest to the",
    "Where is the", ", in column one to eight and row one to six?",
    "List the objects from left to right.",
    "Is the gripper", " left, middle or right?", " near, middle or far?", " low, middle or high?", " open?",
    "Which object is nearest to the gripper?", " left or right of the gripper?",
    "Which way is the", " from the gripper?",
)  # fmt: skip


def _text(size: NanoSize, ids: dict[str, int], pad: str, end: str, **changes: Any) -> dict[str, Any]:
    from vlm4vla_core.families.spec import tiny_text

    # With a small base every pair of a head turns fast, and a word cannot find its object wherever that stands.
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    own = {
        "hidden_size": size.width, "intermediate_size": 3 * size.width, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "num_key_value_heads": size.heads, "head_dim": size.width // size.heads,
    }  # fmt: skip
    extra = changes.pop("rope", {})
    return tiny_text(ids, pad, end, **own, rope_parameters={**rope, **extra}, **changes)


def _vision(size: NanoSize, **changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": size.vision_width, "intermediate_size": 3 * size.vision_width,
        "num_hidden_layers": size.vision_layers, "num_attention_heads": size.vision_width // 32,
        **changes,
    }  # fmt: skip


def _qwen(kind: str, size: NanoSize, ids: dict[str, int], image: int, vision: dict[str, Any], **rope: Any) -> Any:
    from transformers import AutoConfig

    half = size.width // size.heads // 2
    axis = half * 3 // 8
    text = _text(
        size, ids, "<|endoftext|>", "<|im_end|>", rope={"mrope_section": [half - 2 * axis, axis, axis], **rope}
    )
    common = {
        "depth": size.vision_layers, "hidden_size": size.vision_width, "intermediate_size": 3 * size.vision_width,
        "num_heads": size.vision_width // 32, "out_hidden_size": size.width, "patch_size": PATCH,
        "spatial_merge_size": size.merge, "temporal_patch_size": 1,
    }  # fmt: skip
    return AutoConfig.for_model(
        kind, text_config=text, vision_config={**common, **vision}, tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip


def _qwen2_5_vl(size: NanoSize, ids: dict[str, int], image: int) -> Any:
    vision = {"window_size": image, "fullatt_block_indexes": list(range(size.vision_layers))}
    return _qwen("qwen2_5_vl", size, ids, image, vision)


def _qwen3_vl(size: NanoSize, ids: dict[str, int], image: int) -> Any:
    vision = {"num_position_embeddings": (image // PATCH) ** 2, "deepstack_visual_indexes": []}
    return _qwen("qwen3_vl", size, ids, image, vision, mrope_interleaved=True)


def _paligemma(size: NanoSize, ids: dict[str, int], image: int) -> Any:
    from transformers import PaliGemmaConfig

    tower = {"model_type": "siglip_vision_model", "image_size": image, "patch_size": PATCH, "vision_use_head": False}
    return PaliGemmaConfig(
        text_config=_text(size, ids, "<pad>", "<eos>", model_type="gemma"),
        vision_config=_vision(size, **tower, projection_dim=size.width),
        projection_dim=size.width,
        hidden_size=size.width,
        image_token_index=ids["<image>"],
    )


def _internvl(size: NanoSize, ids: dict[str, int], image: int) -> Any:
    from transformers import InternVLConfig

    return InternVLConfig(
        text_config=_text(size, ids, "<|endoftext|>", "<|im_end|>", model_type="qwen3"),
        vision_config=_vision(size, image_size=[image, image], patch_size=[PATCH, PATCH]),
        downsample_ratio=1 / size.merge,
        image_token_id=ids["<IMG_CONTEXT>"],
        tie_word_embeddings=True,
    )


def _smolvlm(size: NanoSize, ids: dict[str, int], image: int) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        "smolvlm",
        text_config=_text(size, ids, "<|im_end|>", "<end_of_utterance>", model_type="llama"),
        vision_config=_vision(size, image_size=image, patch_size=PATCH),
        scale_factor=size.merge,
        image_token_id=ids["<image>"],
        tie_word_embeddings=True,
    )


def _kosmos2(size: NanoSize, ids: dict[str, int], image: int) -> Any:
    from transformers import Kosmos2Config

    return Kosmos2Config(
        text_config={
            "vocab_size": ids["vocab"], "embed_dim": size.width, "layers": size.layers, "ffn_dim": 4 * size.width,
            "attention_heads": size.heads, "max_position_embeddings": 1024, "pad_token_id": ids["<pad>"],
            "bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"],
        },
        vision_config=_vision(size, image_size=image, patch_size=PATCH),
        latent_query_num=(image // PATCH // size.merge) ** 2,
    )  # fmt: skip


FAMILIES = {
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "paligemma": _paligemma,
    "internvl": _internvl,
    "smolvlm": _smolvlm,
    "kosmos2": _kosmos2,
}


# --- what ships ---------------------------------------------------------------------------------------------


def ship(checkpoint: Path, folder: Path, card: dict[str, Any]) -> None:
    """Write a trained nano VLM, or a policy made of one, as a checkpoint folder with weights in fp16 and `card.json`.

    Loading gives fp32 again (`load_backbone`, `VLAPolicy.load`). Dense heads and training state stay behind, what was
    measured on held-out data stays in the manifest. The card is completed by family, size, parameters and the
    fingerprint of the stored weights. Nothing is written when the folder holds this already. Raises InputError when the
    checkpoint is none.
    """
    from vlm4vla_core import checkpoint as checkpoints
    from vlm4vla_core import folders
    from vlm4vla_core.text_objectives import FAST_FILE

    source = checkpoints.resolve(checkpoint)
    manifest = folders.read_manifest(source, checkpoints.KIND)
    policy: bool = manifest["facts"]["policy"]
    model: Any = checkpoints.load_policy(source) if policy else checkpoints.load_backbone(source)
    backbone = model.backbone if policy else model
    backbone.dense = None
    half = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    kind, name, size = str(backbone.lineage["source"]).split()
    assert kind == "nano"
    facts = {
        "family": name,
        "size": size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights": fingerprint(half),
    }
    files: dict[str, Any] = {CARD: folders.as_json({**card, **facts})}
    if (source / FAST_FILE).is_file():
        files[FAST_FILE] = folders.read_json(source / FAST_FILE)
    made: dict[str, Any] = {"config": manifest["config"], "inputs": manifest["inputs"]}
    if folders.current(folder, checkpoints.KIND, **made) and folders.read_json(folder / CARD) == files[CARD]:
        return
    checkpoints.save(
        folder, model, tensors=(half, {}), step=manifest["step"], metrics=manifest["metrics"], files=files, **made
    )


def fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """First 16 hex digits of the SHA-256 of named tensors: names, types, shapes and bytes, in order of name."""
    import hashlib

    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
