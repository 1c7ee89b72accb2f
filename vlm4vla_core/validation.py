"""What a model does on held-out rows: losses, errors in physical units, and what knowing nothing would give.

Trap: a held-out loss means little by itself. What a constant prediction gives stands beside every number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from vlm4vla_core.backbone import Backbone
    from vlm4vla_core.policy import VLAPolicy

_BATCH = 64
# Inputs of some places among the held-out rows.
BatchMaker = Callable[[slice, np.random.Generator], "dict[str, torch.Tensor]"]


def action_metrics(policy: VLAPolicy, batch: BatchMaker, rows: int) -> dict[str, Any]:
    """Losses and errors over that many held-out rows, every real step of every chunk counted once.

    loss, arm, gripper: as in training; of a flow head, the regression losses of its sample of seed 0. constant_arm: the
    arm loss of a constant action at each place of the chunk, the rows' own mean target. error: mean absolute error per
    arm dimension in the convention's units, against targets that normalising clips.
    gripper_accuracy, and gripper_majority: that of always giving the commoner state. rows: how many.
    """
    import torch

    from vlm4vla_core.heads import action_losses

    kept: dict[str, list[torch.Tensor]] = {name: [] for name in ("arm", "gripper", "targets", "opens", "mask")}
    with torch.no_grad():
        for start in range(0, rows, _BATCH):
            inputs = batch(slice(start, start + _BATCH), np.random.default_rng(0))
            arm, gripper = policy.outputs(inputs)
            values = (arm, gripper, inputs["arm_targets"], inputs["gripper_targets"], inputs["action_mask"])
            for name, value in zip(kept, values, strict=True):
                kept[name].append(value.cpu())
    arm, gripper, targets, opens, mask = (torch.cat(values) for values in kept.values())
    options = policy.loss_options()
    losses = action_losses(arm, gripper, targets, opens, mask, **options)
    weight = mask.float()[..., None]
    mean = (targets * weight).sum(0, keepdim=True) / weight.sum(0, keepdim=True).clamp(min=1)  # (1, chunk, A-1)
    constant = action_losses(mean.expand_as(targets), gripper, targets, opens, mask, **options)
    error = ((arm - targets).abs() * weight).sum((0, 1)) / weight.sum((0, 1))  # (A-1,) in normalised units
    names = policy.config.convention.names[:-1]
    open_share = float(opens[mask].mean())
    return {
        **{name: float(value) for name, value in losses.items()},
        "constant_arm": float(constant["arm"]),
        "error": dict(zip(names, (error.numpy() * policy.config.unit()).tolist(), strict=True)),
        "gripper_accuracy": float(((gripper > 0) == (opens > 0.5))[mask].float().mean()),
        "gripper_majority": max(open_share, 1 - open_share),
        "rows": rows,
    }


def language_metrics(
    backbone: Backbone,
    batch: BatchMaker,
    rows: int,
    read: Callable[[list[list[int]]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Loss and accuracy on fixed questions, one per row or as many as are asked in training.

    loss: mean cross-entropy over answer tokens (nats). token_accuracy: of answer tokens, given the ones before (teacher
    forcing), the closing token left out. answer_accuracy: answers with every token right. majority: answer accuracy
    of always giving the commonest answer. read: measures more on the tokens written, closing one left out, per row.
    """
    import torch

    losses, right, exact = [], [], []
    answers: list[tuple[int, ...]] = []
    written: list[list[int]] = []
    with torch.no_grad():
        for start in range(0, rows, _BATCH):
            inputs = batch(slice(start, start + _BATCH), np.random.default_rng([0, start]))
            logits, targets = backbone.answer_logits(inputs)
            losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
            guess = logits.argmax(-1).cpu()
            hit = guess == targets.cpu()
            content = (targets != backbone.end_id).cpu()
            right.append(hit[content])
            ends = (targets == backbone.end_id).cpu().nonzero()[:, 0] + 1  # every answer is closed by this token
            counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
            exact += [bool(part.all()) for part in hit.split(counts)]
            written += [part[:-1].tolist() for part in guess.split(counts)]
            answers += [tuple(part.tolist()) for part in targets.cpu().split(counts)]
    commonest = max(answers.count(answer) for answer in set(answers))
    return {
        "loss": float(torch.cat(losses).mean()),
        "token_accuracy": float(torch.cat(right).float().mean()),
        "answer_accuracy": float(np.mean(exact)),
        "majority": commonest / len(answers),
        **(read(written) if read else {}),
        "rows": rows,
    }


def dense_metrics(
    outputs: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    batch: BatchMaker,
    rows: int,
    settings: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Losses and errors of the dense heads, each of its own target, beside what knowing no picture would give.

    loss, loss_NAME: as in training. presence_precision: average precision over all cells and classes; presence_share:
    of what is there, that of chance. position_cm: mean distance of x and y in cells with an object; gripper_cm: of the
    mean over tokens from the gripper's x, y, z; depth_cm: mean absolute; constant_…: of each place's own mean. offset:
    mean absolute error per axis in cell sides. gripper_open: accuracy; gripper_majority: of the commoner state.
    segmentation: cells whose commonest class is right; segmentation_majority: of each place's commonest class.
    """
    import torch

    from vlm4vla_core.dense_heads import dense_losses

    kept: dict[str, list[torch.Tensor]] = {}
    sums: dict[str, float] = {}
    with torch.no_grad():
        for start in range(0, rows, _BATCH):
            inputs = batch(slice(start, start + _BATCH), np.random.default_rng([0, start]))
            out = {name: value.cpu() for name, value in outputs(inputs).items() if name in settings}
            for name, value in dense_losses(out, inputs).items():
                key = name if name == "loss" else f"loss_{name}"
                sums[key] = sums.get(key, 0.0) + float(value) * len(next(iter(out.values())))
            for name, value in out.items():
                kept.setdefault(name, []).append(value)
                for key in (f"dense_{name}", f"dense_{name}_mask"):
                    kept.setdefault(key, []).append(inputs[key])
    every = {name: torch.cat(values) for name, values in kept.items()}
    found: dict[str, Any] = {name: value / rows for name, value in sums.items()}
    for name in settings:
        value, target, mask = every[name], every[f"dense_{name}"], every[f"dense_{name}_mask"]
        if not mask.any():
            continue
        if name == "presence":
            found |= {
                "presence_precision": average_precision(value[mask].flatten().numpy(), target[mask].flatten().numpy()),
                "presence_share": float(target[mask].mean()),
            }
        elif name == "offset":
            found["offset"] = float((value - target).abs().nanmean())
        elif name == "segmentation":
            seen = mask & (target.max(-1).values > 0)
            commonest = target.sum(0).argmax(-1).expand(len(target), -1)  # (B, n)
            truth = target.argmax(-1)
            found |= {
                "segmentation": float((value.argmax(-1) == truth)[seen].float().mean()),
                "segmentation_majority": float((commonest == truth)[seen].float().mean()),
            }
        else:
            if name == "gripper":  # one answer of a picture
                value, target, mask = value.mean(1, keepdim=True), target[:, :1], mask[:, :1]
                opened = target[..., 3][mask]
                found["gripper_open"] = float(((value[..., 3][mask] > 0) == (opened > 0.5)).float().mean())
                found["gripper_majority"] = float(max(opened.mean(), 1 - opened.mean()))
            spread = torch.tensor(settings[name]["std"]) * 100  # cm
            value, target = value[..., : len(spread)] * spread, target[..., : len(spread)] * spread
            weight = mask[..., None].float()
            constant = (target * weight).sum(0) / weight.sum(0).clamp(min=1)  # (n, k)
            found[f"{name}_cm"] = float((value - target).norm(dim=-1)[mask].mean())
            found[f"constant_{name}_cm"] = float((constant - target).norm(dim=-1)[mask].mean())
    return {**found, "rows": rows}


def average_precision(score: np.ndarray, truth: np.ndarray) -> float:
    """Mean precision at the rank of each positive; nan without one. score, truth (0 or 1): (m,); ties count as one."""
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(truth[order])
    last = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)  # of each run of equal scores
    gained = np.diff(hits[last], prepend=0.0)
    return float((gained * hits[last] / (last + 1)).sum() / hits[-1]) if len(order) and hits[-1] else float("nan")
