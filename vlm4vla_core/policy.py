"""The VLA: backbone, head and everything needed to turn a picture and an instruction into actions in real units.

Targets are the dataset's actions mapped to [-1, 1] by their 1st and 99th percentile (OpenVLA's rule), the gripper
to {0, 1} with 1 for open; `predict` undoes both by what `config.json` records. It needs no training code.

Trap: quantiles clip. An action beyond the percentiles can be neither learnt nor predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlm4vla_core.actions import ActionConvention
from vlm4vla_core.backbone import Backbone
from vlm4vla_core.episodes.sampling import quantile_denormalise, quantile_normalise
from vlm4vla_core.errors import InputError
from vlm4vla_core.heads import GRIPPER_WEIGHTS, PAPER_WIDTH, FCHead, action_losses


@dataclass(frozen=True)
class ActionChunk:
    """actions: (B, chunk, A) float32 in the convention's real units, the gripper at its open or closed value.
    gripper_open: (B, chunk) probability that the gripper is open."""

    actions: np.ndarray
    gripper_open: np.ndarray


@dataclass(frozen=True)
class PolicyConfig:
    """What a policy must remember.

    q01, q99: (A,) of all actions of the store trained on. camera: the store's camera trained on.
    head: "fc". width: of the head. huber_delta, gripper_weight: of the loss (see `heads`).
    """

    chunk: int
    convention: ActionConvention
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    camera: str
    head: str = "fc"
    width: int = PAPER_WIDTH
    huber_delta: float = 1.0
    gripper_weight: float = GRIPPER_WEIGHTS["authors_code"]

    def __post_init__(self) -> None:
        for name in ("q01", "q99"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
            if len(getattr(self, name)) != self.convention.size:
                raise InputError(f"{name} has {len(getattr(self, name))} values for {self.convention.size} dimensions")
        if self.head != "fc":
            raise InputError(f"unknown head '{self.head}'", fix="known: fc")
        if self.chunk < 1:
            raise InputError(f"a chunk of {self.chunk} actions", fix="use at least 1")

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` takes them back."""
        return {**vars(self), "convention": self.convention.to_dict(), "q01": list(self.q01), "q99": list(self.q99)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> PolicyConfig:
        return cls(**{**value, "convention": ActionConvention.from_dict(value["convention"])})


class VLAPolicy(nn.Module):
    """A backbone with a head on its action query."""

    backbone: Backbone
    config: PolicyConfig

    def __init__(self, backbone: Backbone, config: PolicyConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.backbone, self.config = backbone, config
        size = backbone.hidden_size * len(backbone.query)
        # Drawn apart from the backbone's weights, so that a run without a head starts from the same backbone.
        self.head = FCHead(size, config.chunk, config.convention.size - 1, width=config.width, seed=seed + 104729)
        self.head.to(backbone.device)

    def new_parameters(self) -> tuple[int, float]:
        """Parameters that the adaptation adds (query and head), and their share of all. Below 1 % for real VLMs."""
        new = self.backbone.query.numel() + sum(parameter.numel() for parameter in self.head.parameters())
        return new, new / sum(parameter.numel() for parameter in self.parameters())

    def _opens(self, gripper: np.ndarray) -> np.ndarray:
        """1 where a gripper value lies nearer to open than to closed."""
        convention = self.config.convention
        middle = (convention.gripper_open + convention.gripper_closed) / 2
        return ((gripper > middle) == (convention.gripper_open > middle)).astype(np.float32)

    def collate(
        self, images: np.ndarray, instructions: Sequence[str], chunks: np.ndarray, mask: np.ndarray
    ) -> dict[str, Tensor]:
        """A training batch: images uint8 (B, H, W, 3), B instructions, actions (B, chunk, A) in real units, and
        mask (B, chunk), True where an action is real. Raises InputError when the chunk does not fit the head."""
        expected = (len(images), self.config.chunk, self.config.convention.size)
        if chunks.shape != expected or mask.shape != expected[:2]:
            raise InputError(f"actions {chunks.shape} with mask {mask.shape} do not fit a head for {expected}")
        targets = quantile_normalise(chunks, np.array(self.config.q01), np.array(self.config.q99))
        batch = self.backbone.collate(images, instructions)
        batch["arm_targets"] = torch.from_numpy(np.ascontiguousarray(targets[..., :-1]))  # (B, chunk, A-1)
        batch["gripper_targets"] = torch.from_numpy(self._opens(chunks[..., -1]))  # (B, chunk)
        batch["action_mask"] = torch.from_numpy(np.ascontiguousarray(mask))
        return batch

    def outputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Normalised arm actions (B, chunk, A-1) and gripper logits (B, chunk)."""
        inputs = {name: value for name, value in batch.items() if name not in _TARGETS}
        return self.head(self.backbone(inputs).flatten(1))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch from `collate`: scalars "loss", "arm", "gripper" (see `heads.action_losses`)."""
        arm, gripper = self.outputs(batch)
        targets, opens, mask = (batch[name].to(arm.device) for name in _TARGETS)
        return action_losses(
            arm, gripper, targets, opens, mask,
            delta=self.config.huber_delta, gripper_weight=self.config.gripper_weight,
        )  # fmt: skip

    def predict(self, images: np.ndarray, instructions: Sequence[str]) -> ActionChunk:
        """The next actions for B pictures uint8 (B, H, W, 3) and B instructions. Deterministic; no gradients.

        Raises InputError on wrong images or texts (see `Backbone.collate`).
        """
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                arm, logits = self.outputs(self.backbone.collate(images, instructions))
        finally:
            self.train(was_training)
        return self.actions(arm, logits)

    def actions(self, arm: Tensor, logits: Tensor) -> ActionChunk:
        """Head outputs as actions in real units."""
        config, convention = self.config, self.config.convention
        opens = torch.sigmoid(logits.float()).cpu().numpy()  # (B, chunk)
        gripper = np.where(opens >= 0.5, convention.gripper_open, convention.gripper_closed).astype(np.float32)
        normalised = np.concatenate([arm.float().cpu().numpy(), gripper[..., None]], axis=-1)
        return ActionChunk(quantile_denormalise(normalised, np.array(config.q01), np.array(config.q99)), opens)

    def save(self, folder: Path) -> None:
        """Write a checkpoint folder (see `vlm4vla_core.checkpoint`)."""
        from vlm4vla_core import checkpoint

        checkpoint.save(Path(folder), self)

    @staticmethod
    def load(folder: Path | str, device: str = "cpu") -> VLAPolicy:
        """Read the policy of a checkpoint or run folder. Raises InputError when it is damaged, foreign or no policy."""
        from vlm4vla_core import checkpoint

        return checkpoint.load_policy(Path(folder), device)


_TARGETS = ("arm_targets", "gripper_targets", "action_mask")
