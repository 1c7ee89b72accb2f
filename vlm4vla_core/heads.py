"""From the hidden state at the action query to a chunk of actions, and the loss on it.

"fc", the default, is the head of VLM4VLA's released code (`FCDecoder`, read as facts): a shared trunk d -> d/2 ->
width, then one branch for the arm (tanh) and one for the gripper (logits), each width -> width -> width/2 -> width/4 ->
out. "mlp" is the two-layer head that descriptions of the paper speak of. "flow" generates the arm's actions from noise
(conditional flow matching, Lipman et al. 2023), so that "generative heads make inference stochastic" can be tested.

Trap: the gripper's weight in the loss is 0.01 in the authors' code and 1 in the paper's equation, which also has a
squared error on the arm where the code has Huber's. Each has a name; every checkpoint says what was used.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

GRIPPER_WEIGHTS = {"authors_code": 0.01, "paper_equation": 1.0}
PAPER_WIDTH = 1024
_TIMES = 32  # sines and cosines that tell the flow head the time


class FCHead(nn.Module):
    """(B, d) -> arm (B, chunk, arm_size) in [-1, 1] and gripper logits (B, chunk).

    width: 1024 in the paper, which gives 6.579 M parameters for d = 2048 and chunk 10 (with the query's 2048).
    Xavier-uniform weights and zero biases, drawn from `seed` without touching torch's global state.
    """

    def __init__(self, hidden_size: int, chunk: int, arm_size: int, *, width: int = PAPER_WIDTH, seed: int = 0) -> None:
        super().__init__()
        self.chunk, self.arm_size = chunk, arm_size
        branch = [width, width, width // 2, width // 4]
        with torch.random.fork_rng(devices=[]):  # nn.Linear draws on construction
            self.trunk = _mlp([hidden_size, hidden_size // 2, width])
            self.arm = _mlp([*branch, arm_size * chunk])
            self.gripper = _mlp([*branch, chunk])
        _initialise(self, seed)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """state: (B, d), any dtype; computed in the head's fp32."""
        shared = torch.relu(self.trunk(_own_dtype(self, state)))  # (B, width)
        arm = torch.tanh(self.arm(shared)).view(-1, self.chunk, self.arm_size)
        return arm, self.gripper(shared)  # (B, chunk, arm_size), (B, chunk)


class MLPHead(nn.Module):
    """Two plain layers, d -> width -> chunk * (arm_size + 1); inputs, outputs and initialisation as in `FCHead`."""

    def __init__(self, hidden_size: int, chunk: int, arm_size: int, *, width: int = PAPER_WIDTH, seed: int = 0) -> None:
        super().__init__()
        self.chunk, self.arm_size = chunk, arm_size
        with torch.random.fork_rng(devices=[]):
            self.layers = _mlp([hidden_size, width, chunk * (arm_size + 1)])
        _initialise(self, seed)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        out = self.layers(_own_dtype(self, state)).view(-1, self.chunk, self.arm_size + 1)
        return torch.tanh(out[..., :-1]), out[..., -1]  # (B, chunk, arm_size), (B, chunk)


class FlowHead(nn.Module):
    """(B, d) and noise (B, chunk, arm_size) -> arm in [-1, 1], carried from noise to action in `steps` Euler steps.

    The velocity is a small network of the noisy chunk x, the time t in [0, 1] and the state. The gripper, which is
    two-valued, keeps its logits.
    """

    def __init__(
        self, hidden_size: int, chunk: int, arm_size: int, *, width: int = PAPER_WIDTH, seed: int = 0, steps: int = 10
    ) -> None:
        super().__init__()
        self.chunk, self.arm_size, self.steps = chunk, arm_size, steps
        with torch.random.fork_rng(devices=[]):
            self.condition = nn.Linear(hidden_size, width)
            self.noisy = nn.Linear(chunk * arm_size + _TIMES, width)
            self.field = _mlp([width, width, width // 2, chunk * arm_size])
            self.gripper = _mlp([width, width // 4, chunk])
        _initialise(self, seed)

    def velocity(self, condition: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """condition: (B, width); x: (B, chunk, arm_size); t: (B,). Returns the velocity, shaped as x."""
        rates = torch.arange(_TIMES // 2, device=x.device) * math.pi  # 0, pi, 2 pi, …
        angles = t[:, None] * rates  # (B, times / 2)
        told = self.noisy(torch.cat([x.flatten(1), angles.sin(), angles.cos()], dim=1))
        return self.field(torch.relu(condition + told)).view_as(x)

    def forward(self, state: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        condition = self.condition(_own_dtype(self, state))
        x = noise.to(condition)
        for step in range(self.steps):
            x = x + self.velocity(condition, x, x.new_full((len(x),), step / self.steps)) / self.steps
        return x.clamp(-1, 1), self.gripper(torch.relu(condition))

    def losses(
        self, state: Tensor, noise: Tensor, time: Tensor, targets: Tensor, opens: Tensor, mask: Tensor,
        *, gripper_weight: float,
    ) -> dict[str, Tensor]:  # fmt: skip
        """As `action_losses`, with "arm" the flow-matching loss: the squared error of the velocity at the points
        x = (1 - t) noise + t target, whose true velocity is target - noise. noise: shaped as targets; time: (B,)."""
        condition = self.condition(_own_dtype(self, state))
        noise, time, targets = noise.to(condition), time.to(condition), targets.to(condition)
        t = time[:, None, None]
        moved = self.velocity(condition, (1 - t) * noise + t * targets, time)
        error = (moved - (targets - noise)).square().mean(-1)  # (B, chunk)
        return _total(error, self.gripper(torch.relu(condition)), opens, mask, gripper_weight)


HEADS: dict[str, type[nn.Module]] = {"fc": FCHead, "mlp": MLPHead, "flow": FlowHead}


def make_head(
    name: str, hidden_size: int, chunk: int, arm_size: int, *, width: int = PAPER_WIDTH, seed: int = 0, steps: int = 10
) -> Any:
    """A head of HEADS; `steps` is read by "flow" alone."""
    extra = {"steps": steps} if name == "flow" else {}
    return HEADS[name](hidden_size, chunk, arm_size, width=width, seed=seed, **extra)


def _mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inner, outer in pairwise(sizes):
        layers += [nn.Linear(inner, outer), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _initialise(head: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for module in head.modules():
        if isinstance(module, nn.Linear) and not module.weight.is_meta:  # only counted there
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)


def _own_dtype(head: nn.Module, state: Tensor) -> Tensor:
    return state.to(next(head.parameters()).dtype)


# --- losses ---------------------------------------------------------------------------------------------


def action_losses(
    arm: Tensor,
    gripper: Tensor,
    targets: Tensor,
    opens: Tensor,
    mask: Tensor,
    *,
    arm_loss: str = "huber",
    delta: float = 1.0,
    gripper_weight: float = GRIPPER_WEIGHTS["authors_code"],
) -> dict[str, Tensor]:
    """Masked losses of one batch: scalars "loss", "arm" and "gripper", where loss = arm + gripper_weight * gripper.

    arm: (B, chunk, A-1) in [-1, 1]; gripper: logits (B, chunk); targets as arm; opens: (B, chunk) 1 where open;
    mask: (B, chunk) True where the step is real. arm_loss, a mean over real steps and dimensions: "huber" with `delta`
    (Huber 1964), "l1" |e| or "l2" e². gripper: binary cross-entropy in nats, the mean over real steps.
    """
    if arm_loss == "huber":
        error = nn.functional.huber_loss(arm, targets, delta=delta, reduction="none")
    else:
        error = (arm - targets).abs() if arm_loss == "l1" else (arm - targets).square()
    return _total(error.mean(-1), gripper, opens, mask, gripper_weight)


def _total(arm_error: Tensor, gripper: Tensor, opens: Tensor, mask: Tensor, gripper_weight: float) -> dict[str, Tensor]:
    weight = mask.float()
    steps = weight.sum().clamp(min=1)
    bce = nn.functional.binary_cross_entropy_with_logits(gripper, opens, reduction="none")  # (B, chunk)
    arm_loss, gripper_loss = (arm_error * weight).sum() / steps, (bce * weight).sum() / steps
    return {"loss": arm_loss + gripper_weight * gripper_loss, "arm": arm_loss, "gripper": gripper_loss}
