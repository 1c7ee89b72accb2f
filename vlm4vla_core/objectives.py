"""What is trained: the model a run starts from, and the losses of its objectives (text: `text_objectives`).

An objective turns pictures and rows into model inputs, and those into losses that are means over `count` parts (steps
of chunks, answer tokens). So the parts of a batch that several processes or passes handle add up to the whole batch's.

Trap: every random draw is made for the whole global batch and then cut to the part, or another number of processes
would ask other questions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core import checkpoint, folders
from vlm4vla_core.errors import InputError
from vlm4vla_core.presets import TrainConfig
from vlm4vla_core.training_data import Data, Draw

if TYPE_CHECKING:
    import torch

    from vlm4vla_core.backbone import Backbone


@dataclass(frozen=True)
class Objective:
    """What the loop needs of an objective.

    make: pictures of a part, the global draw, a generator and the part -> inputs. loss: inputs -> scalars, "loss"
    first of all. count: of what the loss is a mean. evaluate: a maker of inputs for places of the held-out draw, and
    their number -> measured values. files: JSON to keep in every checkpoint.
    """

    make: Callable[[np.ndarray, Draw, np.random.Generator, slice], dict[str, torch.Tensor]]
    loss: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    count: Callable[[dict[str, torch.Tensor]], int]
    evaluate: Callable[[Any, int], dict[str, Any]]
    files: dict[str, Any] = field(default_factory=dict)


def build(config: TrainConfig, data: Data, inputs: dict[str, str]) -> tuple[Any, dict[str, Objective]]:
    """The model of a run, and its objectives by name, the main one first."""
    from vlm4vla_core.dense_objective import dense_objective
    from vlm4vla_core.text_objectives import fast_objective, language_objective

    model: Any = start(config, inputs)
    backbone: Backbone = model
    if seen := _looks(data):  # what is seen in training may not pass for unseen in evaluation
        backbone.lineage["domains"] = sorted({*backbone.lineage.get("domains", ()), *seen})
    if config.objective == "action":
        model = _policy(config, data, backbone)
    if config.compile:
        if config.objective != "action":
            raise InputError("compile is for the action objective", fix="leave it out")
        model.compile_layers()
    makers = {"language": language_objective, "fast": fast_objective, "dense": dense_objective}
    if "dense" not in config.objectives() and backbone.dense is not None:
        backbone.dense.requires_grad_(False)  # kept for a later stage, but a policy has no use for it
        backbone.dense = backbone.dense if config.objective != "action" else None
    return model, {
        name: action_objective(config, data, model) if name == "action" else makers[name](config, data, backbone)
        for name in config.objectives()
    }


def _looks(data: Data) -> set[str]:
    """The looks of the episodes that are trained on; of CALVIN's ABC-D, held-out episodes show another scene."""
    found: set[str] = set()
    for store, rows in zip(data.stores, data.mixture.train, strict=False):  # question files come after the stores
        if "domain" in store.episodes:
            looks = store.episodes["domain"].to_numpy()[np.unique(store.episode_of[rows])]
            found |= {look for look in looks if isinstance(look, str)}
    return found


def start(config: TrainConfig, inputs: dict[str, str]) -> Backbone:
    """The backbone a run starts from, with what is frozen marked and adapters in place."""
    from vlm4vla_core.backbone import load_backbone, tiny
    from vlm4vla_core.freezing import freeze
    from vlm4vla_core.lora import add_lora
    from vlm4vla_core.nano import nano

    writes = set(config.objectives()) != {"action"}
    if config.backbone == "nano":
        backbone = nano(
            config.family, config.size, seed=config.seed, image_size=config.image_size or 112, options=config.options()
        )
    elif config.backbone == "tiny":
        backbone = tiny(
            config.family, seed=config.seed, image_size=config.image_size or 112, options=config.options(),
            language_head=writes,
        )  # fmt: skip
    else:
        own = checkpoint.looks_like_one(Path(config.backbone))
        backbone = load_backbone(
            config.backbone,
            init=config.init,
            scratch=config.scratch,
            seed=config.seed,
            options=None if own and _keeps_options(config) else config.options(),
            image_size=config.image_size,
            language_head=writes,
        )
        if own:
            backbone.lineage["ancestors"] = [*backbone.lineage.get("ancestors", []), inputs["backbone"]]
    stage = "+".join(config.objectives())
    backbone.lineage["stages"] = [*backbone.lineage.get("stages", []), stage]
    if config.lora:
        add_lora(backbone, config.lora, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed)
    freeze(backbone, config.freeze)
    return backbone


def _keeps_options(config: TrainConfig) -> bool:
    """Whether a checkpoint's own options are those asked for, or none are."""
    if config.default_options():
        return True
    own = folders.read_json(checkpoint.resolve(config.backbone) / checkpoint.CONFIG)["backbone"].get("options", {})
    return {**own, "image_size": None} == {**config.options().to_dict(), "image_size": None}


# --- (a) actions at the query


def _policy(config: TrainConfig, data: Data, backbone: Backbone) -> Any:
    from vlm4vla_core.policy import PolicyConfig, VLAPolicy

    settings = PolicyConfig(
        chunk=config.chunk,
        convention=data.stores[0].convention,
        q01=data.stats["q01"],
        q99=data.stats["q99"],
        camera=data.cameras[0],
        width=config.head_width,
        head=config.head,
        arm_loss=config.arm_loss,
        huber_delta=config.huber_delta,
        gripper_weight=config.gripper_weight,
        flow_steps=config.flow_steps,
        pad_to=config.pad_to,
        normalisation=config.normalisation,
        clip=config.clip_actions,
    )
    return VLAPolicy(backbone, settings, seed=config.seed)


def action_objective(config: TrainConfig, data: Data, policy: Any) -> Objective:
    """The VLA objective: chunks of actions at the query."""
    import torch

    def make(images: np.ndarray, draw: Draw, rng: np.random.Generator, part: slice) -> dict[str, torch.Tensor]:
        mine = draw.part(part)
        chunks, mask = data.actions(mine, config.chunk)
        batch = policy.collate(images, data.texts(mine), chunks, mask)
        if config.head == "flow":
            shape = (len(draw.rows), *batch["arm_targets"].shape[1:])
            batch["flow_noise"] = torch.from_numpy(rng.standard_normal(shape, np.float32)[part])
            batch["flow_time"] = torch.from_numpy(rng.random(len(draw.rows), np.float32)[part])
        return batch

    def evaluate(batch: Any, rows: int) -> dict[str, Any]:
        from vlm4vla_core.validation import action_metrics

        return action_metrics(policy, batch, rows)

    return Objective(make, policy, lambda batch: int(batch["action_mask"].sum()), evaluate)


def losses_module(model: Any, objectives: dict[str, Any]) -> Any:
    """A module whose forward gives every objective's losses, as DistributedDataParallel needs one.

    Objectives that see the same pictures share one pass of the vision tower.
    """
    import torch

    from vlm4vla_core.image_tokens import image_tokens

    backbone = getattr(model, "backbone", model)

    class Losses(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, parts: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
            pictures = [part["images"] for part in parts.values() if "tokens" not in part]
            if len(pictures) > 1 and all(torch.equal(pictures[0], other) for other in pictures[1:]):
                tokens = image_tokens(backbone, pictures[0])
                parts = {name: {**part, "tokens": tokens} for name, part in parts.items()}
            return {name: objective.loss(parts[name]) for name, objective in objectives.items()}

    return Losses()
