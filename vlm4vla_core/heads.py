"""From the hidden state at the action query to a chunk of actions, and the loss on it.

The default is the head of VLM4VLA's released code (`FCDecoder`, read as facts): a shared trunk d -> d/2 -> width, then
one branch for the arm (tanh) and one for the gripper (logits), each width -> width -> width/2 -> width/4 -> out.

Trap: the gripper's weight in the loss is 0.01 in the authors' code and 1 in the paper's equation. Both have a name
here, and the number used is written into every checkpoint.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

GRIPPER_WEIGHTS = {"authors_code": 0.01, "paper_equation": 1.0}
PAPER_WIDTH = 1024


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
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """state: (B, d), any dtype; computed in the head's fp32."""
        shared = torch.relu(self.trunk(state.to(next(self.parameters()).dtype)))  # (B, width)
        arm = torch.tanh(self.arm(shared)).view(-1, self.chunk, self.arm_size)
        return arm, self.gripper(shared)  # (B, chunk, arm_size), (B, chunk)


def _mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inner, outer in pairwise(sizes):
        layers += [nn.Linear(inner, outer), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def action_losses(
    arm: Tensor,
    gripper: Tensor,
    targets: Tensor,
    opens: Tensor,
    mask: Tensor,
    *,
    delta: float = 1.0,
    gripper_weight: float = GRIPPER_WEIGHTS["authors_code"],
) -> dict[str, Tensor]:
    """Masked losses of one batch: scalars "loss", "arm" and "gripper", where loss = arm + gripper_weight * gripper.

    arm: (B, chunk, A-1) in [-1, 1]; gripper: logits (B, chunk); targets as arm; opens: (B, chunk) 1 where open;
    mask: (B, chunk) True where the step is real. arm: Huber with `delta` (Huber 1964), the mean over real steps and
    dimensions. gripper: binary cross-entropy in nats, the mean over real steps.
    """
    weight = mask.float()
    steps = weight.sum().clamp(min=1)
    huber = nn.functional.huber_loss(arm, targets, delta=delta, reduction="none").mean(-1)  # (B, chunk)
    bce = nn.functional.binary_cross_entropy_with_logits(gripper, opens, reduction="none")  # (B, chunk)
    arm_loss, gripper_loss = (huber * weight).sum() / steps, (bce * weight).sum() / steps
    return {"loss": arm_loss + gripper_weight * gripper_loss, "arm": arm_loss, "gripper": gripper_loss}
