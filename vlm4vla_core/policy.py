"""The VLA: backbone, head and everything needed to turn a picture and an instruction into actions in real units.

Targets are the dataset's actions mapped to [-1, 1] by their 1st and 99th percentile (OpenVLA's rule), the gripper
to {0, 1} with 1 for open; `predict` undoes both by what `config.json` records. It needs no training code.

Trap: normalising clips. An action beyond the percentiles can be neither learnt nor predicted, and by the authors' rule
("quantile_clip") none beyond 65 % of their range.
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
from vlm4vla_core.episodes.normalise import (
    AUTHORS_BOUND,
    clip_rescale,
    clip_unscale,
    quantile_denormalise,
    quantile_normalise,
)
from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.heads import GRIPPER_WEIGHTS, HEADS, PAPER_WIDTH, action_losses, make_head

NORMALISATIONS = ("quantile", "quantile_clip", "clip")


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
    head: a name of `heads.HEADS`. width: of the head. arm_loss, huber_delta, gripper_weight: of the loss (see `heads`).
    flow_steps: from noise to action ("flow"). pad_to: tokens that every batch is padded to; None for its longest.
    normalisation: "quantile"; "quantile_clip" (the authors', on Bridge and LIBERO), whose result is then clipped to
    ±clip and scaled to ±1; "clip" (the authors', on CALVIN), the same without quantiles, for actions in [-1, 1].
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
    arm_loss: str = "huber"
    flow_steps: int = 10
    pad_to: int | None = None
    normalisation: str = "quantile"
    clip: float = AUTHORS_BOUND

    def __post_init__(self) -> None:
        for name in ("q01", "q99"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
            if len(getattr(self, name)) != self.convention.size:
                raise InputError(f"{name} has {len(getattr(self, name))} values for {self.convention.size} dimensions")
        if np.isnan([self.convention.gripper_open, self.convention.gripper_closed]).any():
            what = "the actions' convention does not say what opens the gripper, so no policy can be trained on them"
            raise InputError(what, fix="convert the data again and say what they mean (`vlm4vla convert --convention`)")
        choices = {"head": tuple(HEADS), "arm_loss": ("huber", "l1", "l2"), "normalisation": NORMALISATIONS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"unknown {name} '{getattr(self, name)}'", fix=nearest(getattr(self, name), known))
        for name in ("chunk", "flow_steps", "clip", "width"):
            if not getattr(self, name) > 0:
                raise InputError(f"a policy's {name} cannot be {getattr(self, name)}", fix="use a positive number")

    def normalise(self, actions: np.ndarray) -> np.ndarray:
        """Actions (..., A) in real units -> targets in [-1, 1], float32; the gripper, last, is left alone."""
        out = np.array(actions, np.float32)
        if self.normalisation != "clip":
            out = quantile_normalise(out, np.array(self.q01), np.array(self.q99))
        if self.normalisation != "quantile":
            out = clip_rescale(out, self.clip)
        return out

    def denormalise(self, normalised: np.ndarray) -> np.ndarray:
        """The way back of `normalise`; what was clipped stays clipped."""
        out = np.array(normalised, np.float32)
        if self.normalisation != "quantile":
            out = clip_unscale(out, self.clip)
        if self.normalisation != "clip":
            out = quantile_denormalise(out, np.array(self.q01), np.array(self.q99))
        return out

    def unit(self) -> np.ndarray:
        """(A-1,) real units in one unit of a normalised arm dimension."""
        half = (np.array(self.q99[:-1]) - np.array(self.q01[:-1])) / 2
        factors = {"quantile": half, "quantile_clip": half * self.clip, "clip": np.full(len(half), self.clip)}
        return factors[self.normalisation]

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
        if config.pad_to and backbone.options.query_place == "after_pads":
            raise InputError("pad_to would put padding after a query that stands after the padding", fix="drop one")
        # Drawn apart from the backbone's weights, so that a run without a head starts from the same backbone.
        self.head = make_head(
            config.head, backbone.hidden_size * len(backbone.query), config.chunk, config.convention.size - 1,
            width=config.width, seed=seed + 104729, steps=config.flow_steps,
        )  # fmt: skip
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

    def compile_layers(self, **options: Any) -> None:
        """Compile each vision block and decoder layer for itself, in place: one graph serves all of a kind.

        Names and values of weights stay. Give batches one length (`pad_to`), or every new one compiles anew.
        options: of `torch.compile`, beside dynamic=False. Needs a C compiler on the CPU, Triton on a GPU."""
        from vlm4vla_core.windows import one_call_per_layer

        base, spec, settings = self.backbone.base, self.backbone.spec, {"dynamic": False, **options}
        whole = one_call_per_layer(self.backbone)  # elsewhere the library hooks into vision blocks, which parts graphs
        # Layers of all kinds share one count of graphs in torch, and its limit of 8 would stop a validation.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for block in base.get_submodule(spec.blocks):
            block.compile(fullgraph=whole, **settings)
        for layer in base.get_submodule(spec.layers):
            layer.compile(fullgraph=True, **settings)

    def _inputs(self, images: np.ndarray, instructions: Sequence[str]) -> dict[str, Tensor]:
        """The backbone's batch, padded to the fixed length if there is one."""
        batch = self.backbone.collate(images, instructions)
        if self.config.pad_to is None:
            return batch
        length = batch["input_ids"].shape[1]
        if length > self.config.pad_to:
            what = f"a prompt of {length} tokens, image and query included, does not fit pad_to = {self.config.pad_to}"
            raise InputError(what, where=max(instructions, key=len)[:80], fix="shorten it, or train with more")
        more = self.config.pad_to - length
        side = (more, 0) if self.backbone.padding == "left" else (0, more)
        for name in ("input_ids", "attention_mask", "position_ids", *self.backbone.spec.extra_inputs):
            if name in batch and batch[name].shape[-1] == length:
                fill = self.backbone.pad_id if name == "input_ids" else 0
                batch[name] = nn.functional.pad(batch[name], side, value=fill)
        return batch

    def collate(
        self,
        images: np.ndarray,
        instructions: Sequence[str],
        chunks: np.ndarray,
        mask: np.ndarray,
        rng: np.random.Generator | None = None,
    ) -> dict[str, Tensor]:
        """A training batch: images uint8 (B, H, W, 3), B instructions, actions (B, chunk, A) in real units, and
        mask (B, chunk), True where an action is real. rng: of a flow head's noise and times, default_rng(0) when left
        out; other heads draw nothing. Raises InputError when the chunk does not fit the head."""
        expected = (len(images), self.config.chunk, self.config.convention.size)
        if chunks.shape != expected or mask.shape != expected[:2]:
            raise InputError(f"actions {chunks.shape} with mask {mask.shape} do not fit a head for {expected}")
        targets = self.config.normalise(chunks)
        batch = self._inputs(images, instructions)
        batch["arm_targets"] = torch.from_numpy(np.ascontiguousarray(targets[..., :-1]))  # (B, chunk, A-1)
        batch["gripper_targets"] = torch.from_numpy(self._opens(chunks[..., -1]))  # (B, chunk)
        batch["action_mask"] = torch.from_numpy(np.ascontiguousarray(mask))
        if self.config.head == "flow":
            rng = rng or np.random.default_rng(0)
            batch["flow_noise"] = torch.from_numpy(rng.standard_normal(batch["arm_targets"].shape, np.float32))
            batch["flow_time"] = torch.from_numpy(rng.random(len(images), np.float32))
        return batch

    def _state(self, batch: dict[str, Tensor]) -> Tensor:
        return self.backbone({name: value for name, value in batch.items() if name not in _TARGETS}).flatten(1)

    def outputs(self, batch: dict[str, Tensor], seed: int | Sequence[int] = 0) -> tuple[Tensor, Tensor]:
        """Normalised arm actions (B, chunk, A-1) and gripper logits (B, chunk); `seed` as in `predict`."""
        state = self._state(batch)
        if self.config.head != "flow":
            return self.head(state)
        shape = (self.config.chunk, self.config.convention.size - 1)
        seeds = [seed] if isinstance(seed, int) else list(seed)
        if len(seeds) not in (1, len(state)):
            raise InputError(f"{len(seeds)} seeds for {len(state)} pictures", fix="give one, or one for each picture")
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(one)) for one in seeds]
        return self.head(state, torch.stack(drawn).expand(len(state), *shape))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch from `collate`: scalars "loss", "arm", "gripper" (see `heads`)."""
        config, state = self.config, self._state(batch)
        targets, opens, mask = (batch[name].to(state.device) for name in _TARGETS[:3])
        if config.head == "flow":
            noise, time = (batch[name].to(state.device) for name in _TARGETS[3:])
            return self.head.losses(state, noise, time, targets, opens, mask, gripper_weight=config.gripper_weight)
        arm, logits = self.head(state)
        return action_losses(arm, logits, targets, opens, mask, **self.loss_options())

    def loss_options(self) -> dict[str, Any]:
        """What `heads.action_losses` is called with."""
        config = self.config
        return {"arm_loss": config.arm_loss, "delta": config.huber_delta, "gripper_weight": config.gripper_weight}

    def predict(self, images: np.ndarray, instructions: Sequence[str], *, seed: int | Sequence[int] = 0) -> ActionChunk:
        """The next actions for B pictures uint8 (B, H, W, 3) and B instructions. Deterministic; no gradients.

        seed: of a flow head's noise; one for the whole batch, so that an answer does not depend on its neighbours, or
        one for each picture. Other heads ignore it. Raises InputError on wrong images or texts (`Backbone.collate`).
        """
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                arm, logits = self.outputs(self._inputs(images, instructions), seed)
        finally:
            self.train(was_training)
        return self.actions(arm, logits)

    def actions(self, arm: Tensor, logits: Tensor) -> ActionChunk:
        """Head outputs as actions in real units."""
        config, convention = self.config, self.config.convention
        opens = torch.sigmoid(logits.float()).cpu().numpy()  # (B, chunk)
        gripper = np.where(opens >= 0.5, convention.gripper_open, convention.gripper_closed).astype(np.float32)
        normalised = np.concatenate([arm.float().cpu().numpy(), gripper[..., None]], axis=-1)
        return ActionChunk(config.denormalise(normalised), opens)

    def save(self, folder: Path) -> None:
        """Write a checkpoint folder (see `vlm4vla_core.checkpoint`)."""
        from vlm4vla_core import checkpoint

        checkpoint.save(Path(folder), self)

    @staticmethod
    def load(folder: Path | str, device: str = "cpu", dtype: torch.dtype | None = None) -> VLAPolicy:
        """Read the policy of a checkpoint or run folder. dtype: of the backbone, the saved one when left out; query and
        head stay fp32. Raises InputError when it is damaged, foreign or no policy."""
        from vlm4vla_core import checkpoint

        return checkpoint.load_policy(Path(folder), device, dtype)


_TARGETS = ("arm_targets", "gripper_targets", "action_mask", "flow_noise", "flow_time")
