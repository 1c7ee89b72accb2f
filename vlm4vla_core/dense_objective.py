"""The dense objective: what a store records about its scenes, learnt from the projector's image tokens alone.

The decoder takes no part; what there is to learn is `dense_targets`.

Trap: a target's scale (mean and deviation of its numbers) is that of the stage that first trained its head. Later
stages keep it, or the head's outputs would mean something else.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core.dense_heads import TARGETS, DenseHeads, dense_losses, size_of
from vlm4vla_core.dense_targets import COLOURED, SAMPLED, DenseTargets
from vlm4vla_core.errors import InputError
from vlm4vla_core.image_tokens import image_tokens, on_grid
from vlm4vla_core.objectives import Objective
from vlm4vla_core.presets import TrainConfig
from vlm4vla_core.training_data import Data, Draw

if TYPE_CHECKING:
    import torch

    from vlm4vla_core.backbone import Backbone
    from vlm4vla_core.families import Geometry


def dense_objective(config: TrainConfig, data: Data, backbone: Backbone) -> Objective:
    """Linear heads on image tokens (`dense_heads`), which are put on the backbone, or go on where it has them.

    Raises InputError when the family's tokens make no square grid, and when no store has any of the targets asked for.
    """
    import torch

    cells = _cells(backbone)
    sources = [DenseTargets(store, camera, cells) for store, camera in zip(data.stores, data.cameras, strict=True)]
    wanted = _wanted(config, sources)
    before: dict[str, Any] = backbone.dense.settings if backbone.dense is not None else {}
    settings = {name: before.get(name) or _settings(name, sources, data) for name in wanted}
    heads = DenseHeads(backbone.hidden_size, {**before, **settings}, seed=config.seed)
    if backbone.dense is not None:
        heads.load_state_dict(backbone.dense.state_dict(), strict=False)
    backbone.dense = heads.to(backbone.device)
    for name, head in heads.heads.items():
        head.requires_grad_(name in wanted)
    hand = "gripper" in wanted

    def make(images: np.ndarray, draw: Draw, rng: np.random.Generator, part: slice) -> dict[str, torch.Tensor]:
        mine = draw.part(part)
        batch = {"images": backbone.pictures(images)}
        for name in wanted:
            values = np.zeros((len(mine.rows), sources[0].cells, size_of(name, settings[name])), np.float32)
            mask = np.zeros(values.shape[:2], bool)
            for which in np.unique(mine.which):
                if not sources[which].missing[name]:
                    here = mine.which == which
                    values[here], mask[here] = sources[which].get(name, mine.rows[here], settings[name], hand=hand)
            batch |= {f"dense_{name}": torch.from_numpy(values), f"dense_{name}_mask": torch.from_numpy(mask)}
        return batch

    def outputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tokens = batch["tokens"] if "tokens" in batch else image_tokens(backbone, batch["images"])
        return heads(on_grid(backbone, tokens.to(backbone.device)))

    def loss(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dense_losses(outputs(batch), batch)

    def evaluate(batch: Any, rows: int) -> dict[str, Any]:
        from vlm4vla_core.validation import dense_metrics

        return dense_metrics(outputs, batch, rows, settings)

    return Objective(make, loss, lambda batch: int(batch[f"dense_{wanted[0]}"].shape[0]), evaluate)


def _cells(backbone: Backbone) -> Geometry:
    """The geometry whose image tokens are the cells of the targets: the backbone's own. Where tokens are learned
    latents (Kosmos-2), latent i is put in charge of cell i of a square grid, which the resampler then learns."""
    geometry = backbone.geometry
    if backbone.spec.spatial:
        return geometry
    side = math.isqrt(geometry.tokens)
    if side**2 != geometry.tokens or geometry.size % side:
        raise InputError(
            f"the {geometry.tokens} image tokens of {backbone.spec.name} make no square grid of {geometry.size} pixels",
            fix="use a model with a square number of latents",
        )
    return replace(geometry, patch=geometry.size // side, merge=1, placeholders=None)


def _wanted(config: TrainConfig, sources: list[DenseTargets]) -> tuple[str, ...]:
    """The targets to learn: those asked for, each of which some store must have; by default all that some store has."""
    lacking = {name: [source.missing[name] for source in sources] for name in TARGETS}
    for name in config.dense_targets:
        if all(lacking[name]):
            raise InputError(
                f"no targets '{name}' for the dense objective: {'; '.join(dict.fromkeys(lacking[name]))}",
                where=sources[0].store.path,
                fix="leave it out of dense_targets, or use a store that has it (`vlm4vla record tabletop --geometry`)",
            )
    found = tuple(name for name in config.dense_targets or TARGETS if not all(lacking[name]))
    if not found:
        reasons = dict.fromkeys(reason for one in lacking.values() for reason in one)
        raise InputError(
            f"nothing for the dense objective to learn: {'; '.join(reasons)}",
            where=sources[0].store.path,
            fix="use a store made by `vlm4vla record tabletop`",
        )
    return found


def _settings(name: str, sources: list[DenseTargets], data: Data) -> dict[str, Any]:
    """Classes of a target, or mean and standard deviation of its numbers over training rows."""
    having = [source for source in sources if not source.missing[name]]
    if name in ("presence", "segmentation", "offset"):
        listed = [source.segments if name == "segmentation" else source.classes for source in having]
        longest = max(listed, key=len)
        if any(names != longest[: len(names)] for names in listed):
            raise InputError(f"the stores name different classes of {name}", fix="leave it out of dense_targets")
        return {"classes": list(COLOURED if name == "offset" else longest)}
    parts = []
    for source, rows in zip(sources, data.mixture.train, strict=True):
        if not source.missing[name]:
            chosen = rows[np.linspace(0, len(rows) - 1, min(SAMPLED, len(rows))).astype(int)]
            parts.append(source.numbers(name, chosen if name == "depth" else rows))
    values = np.concatenate(parts).astype(np.float64)  # (m, k)
    if not len(values):
        raise InputError(f"no training row has a target '{name}'", fix="leave it out of dense_targets")
    return {"mean": values.mean(0).tolist(), "std": np.maximum(values.std(0), 1e-3).tolist()}
