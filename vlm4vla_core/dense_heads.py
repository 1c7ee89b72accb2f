"""Linear heads on image tokens: what is in a token's part of the picture, and how near it is.

Targets, by name: "presence" of object centres (multi-label over classes), "position" (mean x, y of the centres in the
cell), "gripper" (x, y, z and whether it is open, the same at every token), "depth" (mean over the cell),
"segmentation" (share of the cell's pixels by class) and "offset" (of each centre, by its colour, from the cell's centre
in the picture: no knowledge of the camera is asked for, and two objects in a cell do not blur). A stand-in for a VLM's
start from a trained image encoder, and the paper's depth and segmentation task without its diffusion model.

Trap: the heads see tokens after a normalisation without parameters, since projectors of different families differ in
scale by orders of magnitude; it is part of the head, not of what the decoder receives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

TARGETS = ("presence", "position", "gripper", "depth", "segmentation", "offset")
_RARE = -4.0  # start of the presence logits: about 2 % of classes are in a cell


def size_of(name: str, settings: Mapping[str, Any]) -> int:
    """Outputs of one head: its classes (for "offset" twice as many), or its standardised numbers and, of the gripper,
    whether it is open."""
    if "classes" in settings:
        return len(settings["classes"]) * (2 if name == "offset" else 1)
    return len(settings["mean"]) + (name == "gripper")


class DenseHeads(nn.Module):
    """One linear head per target. width: D of an image token. settings: target -> {"classes": names} or {"mean", "std"}
    of its numbers in metres, by which targets are standardised (JSON values; kept in the checkpoint)."""

    def __init__(self, width: int, settings: Mapping[str, Mapping[str, Any]], *, seed: int = 0) -> None:
        super().__init__()
        self.width, self.settings = width, {name: dict(settings[name]) for name in TARGETS if name in settings}
        self.heads = nn.ModuleDict()
        for number, name in enumerate(TARGETS):  # each drawn apart, so that one more changes no other
            if name in self.settings:
                head = nn.Linear(width, size_of(name, self.settings[name]))
                generator = torch.Generator().manual_seed(seed + 15485863 + number)
                with torch.no_grad():
                    head.weight.normal_(std=0.1 / width**0.5, generator=generator)
                    head.bias.fill_(_RARE if name == "presence" else 0.0)
                self.heads[name] = head

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Image tokens (B, n, D) -> by target (B, n, k) fp32: logits of classes, else standardised numbers."""
        x = nn.functional.layer_norm(tokens.float(), (self.width,))
        return {name: head(x) for name, head in self.heads.items()}


def dense_losses(out: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Losses by target, each a mean over pictures, and their sum as "loss", first of all.

    batch: "dense_NAME" (B, n, k) and "dense_NAME_mask" (B, n) for the targets to learn. Of one picture: the mean over
    masked cells, 0 where there is none, so that parts of a batch add up. presence: binary cross-entropy summed over
    classes and cells, per object that is there (as a mean over cells the other targets drown it); segmentation:
    cross-entropy with the shares; offset: smooth L1 (beta 0.1) in cell sides, where the target is a number; else
    Huber's loss (delta 1) of standardised numbers, summed over them, plus binary cross-entropy of the open gripper.
    """
    functional, found = nn.functional, {}
    for name in TARGETS:
        if f"dense_{name}" not in batch:
            continue
        value, target = out[name], batch[f"dense_{name}"].to(out[name].device)
        mask = batch[f"dense_{name}_mask"].to(value.device).float()  # (B, n)
        if name == "presence":
            cell = functional.binary_cross_entropy_with_logits(value, target, reduction="none").sum(-1)
        elif name == "offset":
            distance = functional.smooth_l1_loss(value, target.nan_to_num(), reduction="none", beta=0.1)
            cell = (distance * ~target.isnan()).sum(-1)
        elif name == "segmentation":
            cell = -(target * functional.log_softmax(value, -1)).sum(-1)
        elif name == "gripper":
            opening = functional.binary_cross_entropy_with_logits(value[..., 3], target[..., 3], reduction="none")
            cell = functional.huber_loss(value[..., :3], target[..., :3], reduction="none").sum(-1) + opening
        else:
            cell = functional.huber_loss(value, target, reduction="none").sum(-1)
        count = target.sum((1, 2)) if name == "presence" else mask.sum(1)
        found[name] = ((cell * mask).sum(1) / count.clamp(min=1)).mean()
    return {"loss": torch.stack(list(found.values())).sum(), **found}
