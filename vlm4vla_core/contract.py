"""The contract that every backbone must keep; run it on a family of your own before you trust a number from it.

`check_backbone` raises on the first broken point and names it. It makes its own images and texts, leaves weights
and gradients as they were, and takes seconds on a tiny member.

Trap: test losses. The sum of a norm layer's output is constant at initialisation, so its gradients vanish;
gradients are checked through a random projection.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from vlm4vla_core.backbone import Backbone

TOLERANCE = 2e-6  # fp32, relative to the largest hidden state (at least 1)
_TEXTS = ("open the drawer", "put the small red cup on the plate near the pot")


class ContractError(AssertionError):
    """A backbone that does not keep the contract; the message names the point and the size of the failure."""


def check_backbone(backbone: Backbone) -> None:
    """Check one backbone; raises ContractError on the first broken point.

    The points: the hook equals a real extra vocabulary row (difference 0); the padding side does not matter;
    the query sees instruction and pixels; gradients reach exactly what is not frozen; without the query our forward
    equals the library's; a missing extra input raises in our code; features come in raster order.
    """
    was_training = backbone.training
    gradients = {name: parameter.grad for name, parameter in backbone.named_parameters()}
    backbone.eval()
    try:
        for check in (_library, _vocabulary_row, _padding, _sensitivity, _missing_inputs, _raster, _gradients):
            check(backbone)
    finally:
        for name, parameter in backbone.named_parameters():
            parameter.grad = gradients[name]
        backbone.train(was_training)


def _images(backbone: Backbone, count: int = 2) -> np.ndarray:
    shape = (count, backbone.image_size, backbone.image_size, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _close(what: str, ours: Tensor, reference: Tensor, tolerance: float) -> None:
    difference = float((ours.float() - reference.float()).abs().max())
    bound = tolerance * max(1.0, float(reference.abs().max()))
    if not difference <= bound:
        raise ContractError(f"{what}: difference {difference:.2e}, at most {bound:.1e} allowed")


@torch.no_grad()
def _library(backbone: Backbone) -> None:
    """Without the query, our inputs and positions give the library's own hidden states."""
    batch = backbone.collate(_images(backbone), _TEXTS, query=False)
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
    rows = len(words.weight)
    table = torch.cat([words.weight, plain.query.to(words.weight.dtype)])
    plain.base.set_input_embeddings(nn.Embedding.from_pretrained(table, padding_idx=words.padding_idx))
    ids = batch["input_ids"].clone()
    hit = ids == backbone.query_id
    number = hit.cumsum(1) - 1
    ids[hit] = rows + number[hit]
    states = plain.hidden({**batch, "input_ids": ids})
    _close("the query hook against a real vocabulary row", ours, states[hit].view_as(ours), 0.0)


@torch.no_grad()
def _padding(backbone: Backbone) -> None:
    """Left-padded, right-padded and alone: the same hidden state at the query."""
    images, side = _images(backbone), backbone.padding
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
    images = _images(backbone, 2)
    features = backbone.vision_features(images)
    theirs = backbone.base.get_image_features(**backbone.pixels(torch.from_numpy(images).to(backbone.device)))
    pooled = theirs.pooler_output
    pooled = pooled if isinstance(pooled, Tensor) else torch.stack(list(pooled))
    _close("projector features in raster order", features["projector"], pooled.view_as(features["projector"]), 0.0)
    grid, size = backbone.geometry.grid, backbone.geometry.patch
    for row, column in ((0, grid - 1), (grid // 2, 1)):
        changed = images[:1].copy()
        changed[:, row * size : (row + 1) * size, column * size : (column + 1) * size] ^= 255
        # The residual stream carries a patch's own content, so the changed patch changes most in the first block.
        moved = (backbone.vision_features(changed)["vision.0"][0] - features["vision.0"][0]).float().norm(dim=-1)
        found = int(moved.argmax())
        if found != row * grid + column:
            raise ContractError(f"patch ({row}, {column}) was changed, but the features changed most at {found}")


def _gradients(backbone: Backbone) -> None:
    """A loss at the query reaches query, vision, projector and decoder, and nothing that is frozen."""
    batch = backbone.collate(_images(backbone), _TEXTS)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(backbone.hidden_size, generator=generator).to(backbone.device)
    backbone.zero_grad(set_to_none=True)
    (backbone(batch).float() @ direction).sum().backward()
    reached: dict[str, float] = {}
    for name, group in backbone.groups().items():
        parameter = backbone.get_parameter(name)
        if not parameter.requires_grad:
            if parameter.grad is not None:
                raise ContractError(f"{name} is frozen and received a gradient")
            continue
        size = 0.0 if parameter.grad is None else float(parameter.grad.float().norm())
        reached[group] = max(reached.get(group, 0.0), size)
    reached.pop("lm_head", None)  # actions never meet the output layer
    if silent := [group for group, size in reached.items() if not size > 0]:
        raise ContractError(f"no gradient reaches {', '.join(silent)}")
    backbone.zero_grad(set_to_none=True)
