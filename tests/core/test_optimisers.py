"""The optimizer: what Muon moves and how far, against the singular value decomposition; AdamW on the rest."""

from __future__ import annotations

import pytest
import torch

from vlm4vla_core.errors import InputError
from vlm4vla_core.nano import nano
from vlm4vla_core.optimisers import make_optimizer, set_rates
from vlm4vla_core.presets import make_config

RATE, DECAY = 1e-2, 0.1


def one_step(optimizer: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights before, gradients and weights after a first step."""
    settings = {"optimizer": optimizer, "lr": RATE, "weight_decay": DECAY, "warmup_steps": 0, "vision_lr": RATE / 4}
    config = make_config("nano/pretrain", settings)
    model, draw = nano("paligemma", "xs"), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    made = make_optimizer(config, model)
    set_rates(config, made, 0)
    made.step()
    return before, gradients, {name: parameter.detach() for name, parameter in model.named_parameters()}


def linear(name: str) -> bool:
    return name.endswith(("proj.weight", "linear.weight", "fc1.weight", "fc2.weight"))


def test_a_linear_layer_moves_along_the_nearest_orthogonal_matrix_by_as_much_as_adamw_would():
    before, gradients, after = one_step("muon")
    moved = [name for name in before if linear(name)]
    assert len(moved) == 34  # 2 x 6 of the tower, the projector, 3 x 7 of the decoder
    for name in moved:
        rate = RATE / 4 if "vision" in name or "projector" in name else RATE
        update = (before[name] * (1 - rate * DECAY) - after[name]) / rate
        left, _, right = torch.linalg.svd(gradients[name], full_matrices=False)
        nearest = left @ right * 0.2 * max(update.shape) ** 0.5
        # Five Newton-Schulz steps end with singular values between 0.7 and 1.2 (Jordan 2024).
        assert torch.nn.functional.cosine_similarity(update.flatten(), nearest.flatten(), dim=0) > 0.95, name
        assert 0.6 < float(update.norm() / nearest.norm()) < 1.3, name
        assert 0.1 < float(update.square().mean().sqrt()) < 0.4, name  # AdamW's: 0.2 to 0.4 (arXiv 2502.16982)


def test_all_else_moves_as_under_adamw_alone():
    (before, _, muon), (_, _, adamw) = one_step("muon"), one_step("adamw")
    same = [name for name in before if torch.equal(muon[name], adamw[name])]
    assert sorted(same) == sorted(name for name in before if not linear(name))
    assert {"query", "base.language_model.embed_tokens.weight"} <= set(same)


def test_muon_is_refused_where_matrices_are_shared_out():
    with pytest.raises(InputError, match="whole matrices"):
        make_config("nano/pretrain", {"optimizer": "muon", "parallel": "fsdp"})
