"""What a backbone computes on the way, layer by layer: hooks on the model's own unmodified forward.

    names = layer_names(backbone)                                   # vision.0…, projector, decoder.0…, query
    tap(backbone, images, ["vision.-1"])                            # {"vision.11": (B, grid², C)}, raster order
    tap(backbone, images, ["decoder.0", "query"], instructions)     # the decoder also needs the words

vision.i: patch tokens after block i. projector: the image tokens that the decoder reads. decoder.i: the same tokens
after decoder layer i. query: the action queries after the last norm, what a policy's head reads. The model runs only as
far as the last of them: nothing beyond is computed.
Trap: layer i is the *output* of block i, before any final norm; Qwen's blocks see their patches in window order, so
what a hook holds is put back into raster order here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlm4vla_core.backbone import Backbone

QUERY, PROJECTOR = "query", "projector"
_NUMBERED = re.compile(r"(vision|decoder)\.(-?\d+)(?:\.\.(-?\d+))?")


def layer_names(backbone: Backbone) -> list[str]:
    """Every layer that can be tapped, from the eye to the answer."""
    base: Any = backbone.base
    counts = [len(base.get_submodule(path)) for path in (backbone.spec.blocks, backbone.spec.layers)]
    vision, decoder = ([f"{part}.{i}" for i in range(n)] for part, n in zip(("vision", "decoder"), counts, strict=True))
    return [*vision, PROJECTOR, *decoder, QUERY]


def resolve_layers(expressions: Sequence[str], available: Sequence[str]) -> list[str]:
    """Layer names for expressions such as "vision.0", "decoder.-1", "vision.0..-1" (inclusive), "projector", "query".

    One expression may hold several, with commas between. available: the model's layers in order. Each layer once, in
    order of first mention. Raises InputError for an expression that names none, with the valid ones.
    """
    chosen: list[str] = []
    for expression in (part.strip() for text in expressions for part in text.split(",")):
        match = _NUMBERED.fullmatch(expression)
        if match:
            same = [name for name in available if name.startswith(f"{match[1]}.")]
            first = int(match[2])
            last = first if match[3] is None else int(match[3])
            ends = [number + len(same) if number < 0 else number for number in (first, last)]
            named = same[ends[0] : ends[1] + 1] if 0 <= ends[0] <= ends[1] < len(same) else []
        else:
            named = [expression] if expression in available else []
        if not named:
            fix = f"this model has {_short(available)} (vision.-1 is the last block, vision.0..-1 all blocks)"
            raise InputError(f"no layer '{expression}'", fix=fix)
        chosen += named
    if not chosen:
        raise InputError("no layers were asked for", fix=f"this model has {_short(available)}")
    return list(dict.fromkeys(chosen))


def _short(names: Sequence[str]) -> str:
    """`vision.0, …, vision.31` for a long run of blocks, each name for a short one."""
    out: list[str] = []
    for part in dict.fromkeys(name.split(".")[0] for name in names):
        run = [name for name in names if name.split(".")[0] == part]
        out += run if len(run) <= 4 else [run[0], run[1], "…", run[-1]]
    return ", ".join(out)


def needs_words(names: Sequence[str]) -> bool:
    """Whether one of these layers lies behind the decoder's input, where the instruction comes in."""
    return any(name == QUERY or name.startswith("decoder.") for name in names)


class _Enough(Exception):
    """Everything that was asked for has been seen."""


def tap(
    backbone: Backbone, images: np.ndarray | Tensor, names: Sequence[str], instructions: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Tokens (B, N, d) of each named layer in raster order, in the base's dtype; query: (B, n_queries, D).

    images: uint8 (B, H, W, 3). instructions: B texts, needed for decoder layers and the query. Gradients flow unless
    switched off. Raises InputError when they are needed and missing.
    """
    if needs_words(names):
        if len(instructions) != len(images):
            raise InputError(f"{names[-1]} lies behind the instruction, and none was given", fix="give --instruction")
        return _through_decoder(backbone, np.asarray(images), names, instructions)
    return {name: _in_place(backbone, name, seen) for name, seen in _vision(backbone, images, names).items()}


def class_tokens(backbone: Backbone, images: np.ndarray | Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The class token (B, d) of each named vision layer. Raises InputError for towers and layers that have none."""
    out = {}
    for name, seen in _vision(backbone, images, names).items():
        if not name.startswith("vision.") or seen.shape[1] != backbone.geometry.grid**2 + 1:
            what = f"{name} of {backbone.spec.name} has no class token"
            raise InputError(what, fix="use --pool mean, or attn")
        out[name] = seen[:, 0]
    return out


def _vision(backbone: Backbone, images: np.ndarray | Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """What the hooks see (B, n, C), in the order in which the model holds it."""
    import torch

    from vlm4vla_core import images as pictures

    if isinstance(images, np.ndarray):
        images = pictures.resize(pictures.resize(images, backbone.image_size), backbone.geometry.size)
        images = torch.from_numpy(np.ascontiguousarray(images))
    batch, wanted = backbone.pixels(images.to(backbone.device)), _modules(backbone, names)
    seen = _run(wanted, lambda: backbone.base.get_image_features(**batch))
    return {name: seen[name].reshape(len(images), -1, seen[name].shape[-1]) for name in names}


def _through_decoder(
    backbone: Backbone, images: np.ndarray, names: Sequence[str], instructions: Sequence[str]
) -> dict[str, Tensor]:
    batch = backbone.collate(images, list(instructions))
    seen: dict[str, Tensor] = {}
    hooked = [name for name in names if name != QUERY]

    def forward() -> None:
        seen[QUERY] = backbone(batch)

    seen |= _run(_modules(backbone, hooked), forward, stop=QUERY not in names)
    mask = batch.get("image_embeds_position_mask")
    where = (batch["input_ids"] == backbone.image_id if mask is None else mask.bool()).to(backbone.device)  # (B, L)
    out = {}
    for name in names:
        value = seen[name]
        if name.startswith("decoder."):
            value = value[where].reshape(len(images), -1, value.shape[-1])  # (B, image tokens, D), raster order
            if backbone.spec.spatial:  # LLaVA-OneVision: the whole picture stands before its tile
                value = value[:, : (backbone.geometry.grid // backbone.geometry.merge) ** 2]
        elif name != QUERY:
            value = _in_place(backbone, name, value.reshape(len(images), -1, value.shape[-1]))
        out[name] = value
    return out


def _in_place(backbone: Backbone, name: str, seen: Tensor) -> Tensor:
    return backbone.spec.raster(seen, backbone.geometry, name == PROJECTOR)


def _modules(backbone: Backbone, names: Sequence[str]) -> dict[str, nn.Module]:
    base: Any = backbone.base
    paths = {"vision": backbone.spec.blocks, "decoder": backbone.spec.layers}
    found = {}
    for name in names:
        part, _, number = name.partition(".")
        path = backbone.spec.projector[0] if name == PROJECTOR else f"{paths[part]}.{number}"
        found[name] = base.get_submodule(path)
    return found


def _run(modules: dict[str, nn.Module], forward: Any, *, stop: bool = True) -> dict[str, Tensor]:
    """Outputs of modules during `forward`, which is left once all have been seen."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            seen[name] = out[0] if isinstance(out, tuple) else out
            if stop and len(seen) == len(modules):
                raise _Enough

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        forward()
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen
