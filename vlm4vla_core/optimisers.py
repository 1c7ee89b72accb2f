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
    """AdamW; decay only on matrices (not on query, norms, biases or word embeddings). "rate": a group's own, if any."""
    import torch

    backbone: Any = getattr(model, "backbone", model)
    seeing = {name for name, group in backbone.groups().items() if group.split(".")[0] in ("vision", "projector")}
    own = {"query": config.query_lr, "head": config.head_lr, "vision": config.vision_lr, "": None}
    groups: dict[tuple[str, bool], list[Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "query" if name.endswith("query") else "head" if name.startswith("head.") else ""
        part = "vision" if name.removeprefix("backbone.") in seeing else part
        decayed = parameter.ndim >= 2 and not name.endswith(("query", "embed_tokens.weight"))
        groups.setdefault((part if own[part] is not None else "", decayed), []).append(parameter)
    made = [
        {"params": groups[part, decayed], "weight_decay": config.weight_decay if decayed else 0.0, "rate": own[part]}
        for part, decayed in sorted(groups, key=lambda key: (key[0], not key[1]))
    ]
    return torch.optim.AdamW(made, config.lr, config.betas, fused=True)


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
