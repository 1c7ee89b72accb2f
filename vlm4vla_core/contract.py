"""The contract that every backbone must keep; run it on a family of your own before you trust a number from it.

`check_backbone` raises on the first broken point and names it. It makes its own images and texts, leaves weights
and gradients as they were, and takes seconds on a tiny member.

Trap: test losses. The sum of a norm layer's output is constant at initialisation, so its gradients vanish;
gradients are checked through a random projection.
"""

from __future__ import annotations

import copy
import math
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vlm4vla_core.backbone import Backbone, _switch_off_dropout

TOLERANCE = 2e-6  # fp32, relative to the largest hidden state (at least 1)
_TEXTS = ("open the drawer", "put the small red cup on the plate near the pot")


class ContractError(AssertionError):
    """A backbone that does not keep the contract; the message names the point and the size of the failure."""


def check_backbone(backbone: Backbone) -> None:
    """Check one backbone; raises ContractError on the first broken point.

    The points: the hook equals a real extra vocabulary row (difference 0); the padding side does not matter;
    the query sees instruction and pixels; gradients reach exactly what is not frozen, with gradient checkpointing the
    same; without the query our forward equals the library's; a missing extra input raises in our code; features come
    in raster order; a saved and loaded copy is equal to the bit; a bf16 base works with the fp32 query.
    Options that give up a point on purpose (`PAPER`) are checked for the rest only.
    """
    was_training = backbone.training
    gradients = {name: parameter.grad for name, parameter in backbone.named_parameters()}
    backbone.eval()
    try:
        for check in (*_CHECKS, _gradients, _checkpointing, _round_trip, _bf16):
            check(backbone)
    finally:
        for name, parameter in backbone.named_parameters():
            parameter.grad = gradients[name]
        backbone.train(was_training)


def _images(backbone: Backbone, count: int = 2, size: int | None = None) -> np.ndarray:
    shape = (count, size or backbone.image_size, size or backbone.image_size, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _close(what: str, ours: Tensor, reference: Tensor, tolerance: float) -> None:
    difference = float((ours.float() - reference.float()).abs().max())
    bound = tolerance * max(1.0, float(reference.abs().max()))
    if not difference <= bound:
        raise ContractError(f"{what}: difference {difference:.2e}, at most {bound:.1e} allowed")


@torch.no_grad()
def _library(backbone: Backbone) -> None:
    """Without the query, our inputs and positions give the library's own hidden states."""
    if backbone.options.positions != "native":
        return
    side = backbone.padding
    try:
        backbone.padding = "right"  # the library counts padding on the left as positions in half of the families
        batch = backbone.collate(_images(backbone), _TEXTS, query=False)
    finally:
        backbone.padding = side
    ours = backbone.hidden(batch)
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", *backbone.spec.extra_inputs)}
    inputs = {name: value.to(backbone.device) for name, value in plain.items()}
    theirs = backbone.base(**inputs, **backbone.pixels(batch["images"].to(backbone.device)), use_cache=False)
    real = batch["attention_mask"].bool()
    _close("our forward against the library's", ours[real], theirs.last_hidden_state[real], 0.0)


@torch.no_grad()
def _vocabulary_row(backbone: Backbone) -> None:
    """The hook gives what appending the query vectors to the vocabulary gives."""
    batch = backbone.collate(_images(backbone), _TEXTS)
    ours = backbone(batch)
    plain = copy.deepcopy(backbone)
    words = plain.base.get_input_embeddings()
    assert isinstance(words, nn.Embedding)
    words._forward_hooks.clear()
    rows, scale = len(words.weight), backbone.embed_scale
    words.weight = nn.Parameter(torch.cat([words.weight, plain.query.to(words.weight.dtype) / scale]))
    ids = batch["input_ids"].clone()
    hit = ids == backbone.query_id
    number = hit.cumsum(1) - 1
    ids[hit] = rows + number[hit]
    states = plain.hidden({**batch, "input_ids": ids})
    exact = math.log2(scale).is_integer()  # a row that is multiplied by another number is rounded on the way
    what = "the query hook against a real vocabulary row"
    _close(what, ours, states[hit].view_as(ours), 0.0 if exact else TOLERANCE)


@torch.no_grad()
def _padding(backbone: Backbone) -> None:
    """Left-padded, right-padded and alone: the same hidden state at the query."""
    options, images, side = backbone.options, _images(backbone), backbone.padding
    if options.positions != "native" or options.query_place != "before_pads":
        return
    tolerance = TOLERANCE if backbone.base.dtype == torch.float32 else 2e-2
    alone = torch.cat([backbone(backbone.collate(images[i : i + 1], _TEXTS[i : i + 1])) for i in range(2)])
    try:
        for backbone.padding in ("left", "right"):
            padded = backbone(backbone.collate(images, _TEXTS))
            _close(f"padding on the {backbone.padding} against no padding", padded, alone, tolerance)
    finally:
        backbone.padding = side


@torch.no_grad()
def _sensitivity(backbone: Backbone) -> None:
    """Another instruction, and other pixels anywhere in the image, change the hidden state at the query."""
    images = _images(backbone, 1)
    state = backbone(backbone.collate(images, _TEXTS[:1]))
    other = backbone(backbone.collate(images, [_TEXTS[0].replace("open", "close")]))
    if not float((state - other).abs().max()) > 0:
        raise ContractError("another instruction does not change the query's hidden state")
    half = backbone.image_size // 2
    for row in (0, half):
        for column in (0, half):
            changed = images.copy()
            changed[:, row : row + half, column : column + half] ^= 255
            moved = backbone(backbone.collate(changed, _TEXTS[:1]))
            if not float((state - moved).abs().max()) > 0:
                raise ContractError(f"pixels of the quarter at ({row}, {column}) do not reach the query")


@torch.no_grad()
def _missing_inputs(backbone: Backbone) -> None:
    """What the family would silently do without raises in our code."""
    batch = backbone.collate(_images(backbone), _TEXTS)
    for name in backbone.spec.extra_inputs:
        try:
            backbone({key: value for key, value in batch.items() if key != name})
        except ValueError as error:
            if name in str(error):
                continue
        raise ContractError(f"a batch without {name} was accepted")


@torch.no_grad()
def _raster(backbone: Backbone) -> None:
    """Projector features equal the library's (which undoes the window order); patches lie where the pixels were."""
    images = torch.from_numpy(_images(backbone, 2, backbone.geometry.size)).to(backbone.device)
    features = backbone.vision_features(images)
    theirs = backbone.base.get_image_features(**backbone.pixels(images))
    pooled = theirs.pooler_output
    pooled = pooled if isinstance(pooled, Tensor) else torch.stack(list(pooled))
    pooled = pooled.reshape(len(images), -1, pooled.shape[-1])  # (B, tokens, D)
    ours = features["projector"]
    _close(
        "projector features in raster order",
        ours,
        pooled.reshape(len(ours), -1, ours.shape[-1])[:, : ours.shape[1]],
        0.0,
    )
    grid, size = backbone.geometry.grid, backbone.geometry.patch
    for row, column in ((0, grid - 1), (grid // 2, 1)):
        changed = images[:1].clone()
        changed[:, row * size : (row + 1) * size, column * size : (column + 1) * size] ^= 255
        # The residual stream carries a patch's own content, so the changed patch changes most in the first block.
        seen = backbone.vision_features(changed)
        merge = backbone.geometry.merge
        places = {"vision.0": row * grid + column, "projector": row // merge * (grid // merge) + column // merge}
        for name in ("vision.0", "projector") if backbone.spec.spatial else ("vision.0",):
            moved = (seen[name][0] - features[name][0]).float().norm(dim=-1)
            if int(moved.argmax()) != places[name]:
                found = f"{name} changed most at {int(moved.argmax())} instead of {places[name]}"
                raise ContractError(f"patch ({row}, {column}) was changed, but the features changed most at: {found}")


_CHECKS = (_library, _vocabulary_row, _padding, _sensitivity, _missing_inputs, _raster)


def _backward(backbone: Backbone) -> dict[str, Tensor]:
    """Gradients of a random projection of the query's hidden state, for the parameters that got one."""
    batch = backbone.collate(_images(backbone), _TEXTS)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(backbone.hidden_size, generator=generator).to(backbone.device)
    backbone.zero_grad(set_to_none=True)
    (backbone(batch).float() @ direction).sum().backward()
    gradients = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    backbone.zero_grad(set_to_none=True)
    return gradients


_UNMET = ("lm_head", "dense")  # groups that actions do not meet


def _gradients(backbone: Backbone) -> None:
    """A loss at the query reaches query, vision, projector and decoder, and nothing that is frozen."""
    gradients = _backward(backbone)
    exempt = re.compile("|".join(backbone.spec.no_gradient) or r"(?!)")
    reached: dict[str, float] = {}
    for name, group in backbone.groups().items():
        if not backbone.get_parameter(name).requires_grad:
            if name in gradients:
                raise ContractError(f"{name} is frozen and received a gradient")
        elif group not in _UNMET and not exempt.fullmatch(name.removeprefix("base.")):
            if name not in gradients:
                raise ContractError(f"no gradient reaches {name}")
            reached[group] = max(reached.get(group, 0.0), float(gradients[name].float().norm()))
    if silent := [group for group, size in reached.items() if not size > 0]:
        raise ContractError(f"no gradient reaches {', '.join(silent)}")


def _checkpointing(backbone: Backbone) -> None:
    """Gradient checkpointing gives the same gradients; it is active in training mode only, so dropout is off."""
    plain = _backward(backbone)
    copied = copy.deepcopy(backbone)
    _switch_off_dropout(copied.base)
    copied.checkpoint_activations()
    saved = _backward(copied.train())
    if plain.keys() != saved.keys():
        raise ContractError("gradient checkpointing changes which parameters receive a gradient")
    for name, gradient in plain.items():
        _close(f"gradient of {name} with checkpointing", saved[name], gradient, 0.0)


@torch.no_grad()
def _round_trip(backbone: Backbone) -> None:
    """What is saved and loaded again gives the same hidden states, to the bit."""
    with tempfile.TemporaryDirectory() as folder:
        backbone.save(Path(folder) / "saved")
        loaded = Backbone.load(Path(folder) / "saved", str(backbone.device))
    for name, value in backbone.state_dict().items():
        if not torch.equal(loaded.state_dict()[name], value):
            raise ContractError(f"{name} changed when saved and loaded")
    batch = backbone.collate(_images(backbone), _TEXTS)
    again = loaded.collate(_images(loaded), _TEXTS)
    if batch.keys() != again.keys() or not all(torch.equal(batch[key], again[key]) for key in batch):
        raise ContractError("the saved and loaded backbone collates another batch")
    _close("hidden states of the saved and loaded backbone", loaded(again), backbone(batch), 0.0)


def _bf16(backbone: Backbone) -> None:
    """A base in bf16 with its fp32 query: finite states, and an fp32 gradient at the query."""
    if not backbone.query.requires_grad:
        return
    half = copy.deepcopy(backbone)
    half.base.to(torch.bfloat16)
    gradient = _backward(half).get("query")
    if gradient is None or gradient.dtype != torch.float32 or not bool(torch.isfinite(gradient).all()):
        raise ContractError("a base in bf16 gives the query no finite fp32 gradient")
