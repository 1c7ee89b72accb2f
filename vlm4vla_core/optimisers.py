"""The optimizer of a run: parameter groups, the rate at every step, and a moving average of the weights.

Trap: the average is kept in the optimizer's state, beside AdamW's moments, so that it is saved and resumed with them;
it begins at the weights after the first step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vlm4vla_core.presets import TrainConfig

if TYPE_CHECKING:
    import torch

EMA = "ema"


def schedule(config: TrainConfig, step: int) -> float:
    """Share of the full rate at step `step` (from 0): linear warm-up, then constant, or a cosine to 0 at the end."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    part = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, part)))


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of step `step`; query, head and vision may have their own, with the same schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    return config.lr * schedule(config, step)


def make_optimizer(config: TrainConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW, or Muon for the backbone's linear layers and AdamW for all else (`config.optimizer`).

    Decay only on matrices (not on query, norms, biases or word embeddings). "rate": a group's own, if any.
    """
    import torch

    backbone: Any = getattr(model, "backbone", model)
    seeing = {name for name, group in backbone.groups().items() if group.split(".")[0] in ("vision", "projector")}
    own = {"query": config.query_lr, "head": config.head_lr, "vision": config.vision_lr, "": None}
    linear = _linear(backbone) if config.optimizer == "muon" else set()
    groups: dict[tuple[str, str], list[Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "query" if name.endswith("query") else "head" if name.startswith("head.") else ""
        part = "vision" if name.removeprefix("backbone.") in seeing else part
        decayed = parameter.ndim >= 2 and not name.endswith(("query", "embed_tokens.weight"))
        kind = "muon" if id(parameter) in linear else "decayed" if decayed else "plain"
        groups.setdefault((part if own[part] is not None else "", kind), []).append(parameter)
    made: list[dict[str, Any]] = [
        {
            "params": groups[part, kind],
            "weight_decay": 0.0 if kind == "plain" else config.weight_decay,
            "rate": own[part],
            **({"muon": kind == "muon"} if linear else {}),
        }
        for part, kind in sorted(groups)
    ]
    if linear:
        return _muon_and_adamw(made, config)
    return torch.optim.AdamW(made, config.lr, config.betas, fused=True)


def _linear(backbone: Any) -> set[int]:
    """Weights of the backbone's linear layers: neither word embeddings that the output layer shares, nor adapters."""
    import torch

    shared = {id(module.weight) for module in backbone.modules() if isinstance(module, torch.nn.Embedding)}
    left = shared.union(map(id, backbone.dense.parameters()) if backbone.dense is not None else ())
    layers = {name: module for name, module in backbone.named_modules() if isinstance(module, torch.nn.Linear)}
    return {id(layer.weight) for name, layer in layers.items() if "lora_" not in name} - left


def _muon_and_adamw(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """torch's Muon (Jordan et al. 2024) and AdamW as one optimizer; a matrix's update is scaled to the size of AdamW's
    (Moonshot 2025, arXiv 2502.16982), so that both share their rates."""
    import torch

    class MuonAndAdamW(torch.optim.Optimizer):
        """Two optimizers over the groups and the state of one."""

        def __init__(self) -> None:
            super().__init__(groups, {"lr": config.lr})
            self._share()

        def _share(self) -> None:
            chosen = [[group for group in self.param_groups if group["muon"] is muon] for muon in (True, False)]
            self.both = [
                torch.optim.Muon(chosen[0], config.lr, adjust_lr_fn="match_rms_adamw"),
                *([torch.optim.AdamW(chosen[1], config.lr, config.betas, fused=True)] if chosen[1] else []),
            ]
            for one in self.both:
                one.state = self.state

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            self._share()

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for one in self.both:
                one.step()

    return MuonAndAdamW()


def set_rates(config: TrainConfig, optimizer: torch.optim.Optimizer, step: int) -> float:
    """Give every group its rate of this step; returns the common one."""
    rate = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate if group["rate"] is None else group["rate"] * schedule(config, step)
    return rate


def average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Move the averages towards the weights, after a step: average = decay * average + (1 - decay) * weight."""
    import torch

    with torch.no_grad():
        for parameter, state in optimizer.state.items():
            if EMA in state:
                state[EMA].lerp_(parameter, 1 - decay)
            else:
                state[EMA] = parameter.detach().clone()


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The averages in place of the weights, until the context ends."""
    import torch

    pairs = [(parameter, state[EMA]) for parameter, state in optimizer.state.items() if EMA in state]
    plain = [parameter.detach().clone() for parameter, _ in pairs]
    with torch.no_grad():
        for parameter, value in pairs:
            parameter.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for (parameter, _), value in zip(pairs, plain, strict=True):
                parameter.copy_(value)
