"""Heads and losses: closed forms, a literal reference of the flow, and what the flow can learn that a mean cannot."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from vlm4vla_core import folders
from vlm4vla_core.heads import HEADS, FlowHead, MLPHead, action_losses, make_head

ONE = torch.ones(1, 1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("loss", "error", "value"),
    [
        ("l1", 0.5, 0.5), ("l1", -3.0, 3.0), ("l2", 0.5, 0.25), ("l2", -3.0, 9.0),
        ("huber", 0.5, 0.125), ("huber", -3.0, 2.5), ("huber", 1.0, 0.5),
    ],
)  # fmt: skip
def test_arm_losses_and_their_slopes_have_their_closed_form(loss: str, error: float, value: float):
    arm = torch.tensor([[[error]]], requires_grad=True)
    losses = action_losses(arm, torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.ones(1, 1), ONE, arm_loss=loss)
    assert losses["arm"].item() == pytest.approx(value)
    losses["arm"].backward()
    slope = {"l1": np.sign(error), "l2": 2 * error, "huber": np.clip(error, -1, 1)}[loss]
    assert arm.grad.item() == pytest.approx(slope)


def test_huber_with_another_delta():
    values = (torch.tensor([[[2.0]]]), torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.ones(1, 1), ONE)
    assert action_losses(*values, delta=0.5)["arm"].item() == pytest.approx(0.5 * (2 - 0.25))


@pytest.mark.parametrize("loss", ["huber", "l1", "l2"])
def test_a_padded_step_changes_no_loss_and_gets_no_gradient(loss: str):
    arm = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    losses = action_losses(arm, torch.zeros(2, 3), torch.zeros(2, 3, 6), torch.ones(2, 3), mask, arm_loss=loss)
    losses["loss"].backward()
    assert (arm.grad[~mask] == 0).all() and (arm.grad[mask] != 0).all()
    power = {"huber": None, "l1": arm.abs(), "l2": arm**2}[loss]
    if power is not None:
        assert losses["arm"].item() == pytest.approx(power[mask].mean().item(), rel=1e-6)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_a_head_is_a_function_of_its_seed_and_leaves_the_global_state(name: str):
    before = torch.get_rng_state()
    heads = [make_head(name, 24, 3, 6, width=16, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(before, torch.get_rng_state())
    weights = [torch.cat([value.flatten() for value in head.state_dict().values()]) for head in heads]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_two_layer_head_is_two_matrices():
    head = MLPHead(24, 3, 6, width=16, seed=0)
    first, second = head.layers[0], head.layers[2]
    state = torch.randn(5, 24)
    hidden = np.maximum(state.numpy() @ first.weight.detach().numpy().T + first.bias.detach().numpy(), 0)
    out = (hidden @ second.weight.detach().numpy().T + second.bias.detach().numpy()).reshape(5, 3, 7)
    arm, gripper = head(state)
    np.testing.assert_allclose(arm.detach().numpy(), np.tanh(out[..., :6]), atol=1e-6)
    np.testing.assert_allclose(gripper.detach().numpy(), out[..., 6], atol=1e-6)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_new_parameters_stay_below_one_percent_of_every_backbone_of_the_paper(name: str):
    models = folders.read_json(folders.shipped("data/backbones.json"))["models"]
    assert len(models) == 10
    for model in models:
        text = model["config"].get("text_config", model["config"])
        width = text.get("hidden_size") or text["embed_dim"]
        with torch.device("meta"):
            count = width + sum(parameter.numel() for parameter in make_head(name, width, 10, 6).parameters())
        assert count < 0.01 * model["paper_b"] * 1e9, json.dumps(model["name"])


# --- flow -----------------------------------------------------------------------------------------------


def literal_velocity(head: FlowHead, state: np.ndarray, x: np.ndarray, t: float) -> np.ndarray:
    """One sample, matrix by matrix, in double precision."""
    weight = {name: value.detach().double().numpy() for name, value in head.state_dict().items()}
    condition = weight["condition.weight"] @ state + weight["condition.bias"]
    angles = np.pi * t * np.arange(16)
    told = np.concatenate([x.ravel(), np.sin(angles), np.cos(angles)])
    hidden = np.maximum(condition + weight["noisy.weight"] @ told + weight["noisy.bias"], 0)
    layers = sorted({int(name.split(".")[1]) for name in weight if name.startswith("field.")})
    for index, _ in pairwise([*layers, None]):
        hidden = weight[f"field.{index}.weight"] @ hidden + weight[f"field.{index}.bias"]
        hidden = hidden if index == layers[-1] else np.maximum(hidden, 0)
    return hidden.reshape(x.shape)


def test_the_flow_equals_a_literal_reference():
    head, rng = FlowHead(8, 2, 3, width=16, seed=3, steps=4), np.random.default_rng(0)
    state, noise, targets = rng.normal(size=(2, 8)), rng.normal(size=(2, 2, 3)), rng.uniform(-1, 1, (2, 2, 3))
    time, mask = np.array([0.2, 0.7]), np.array([[1, 1], [1, 0]], bool)
    errors = []
    for b in range(2):
        x = (1 - time[b]) * noise[b] + time[b] * targets[b]
        moved = literal_velocity(head, state[b], x, time[b])
        errors += list(((moved - (targets[b] - noise[b])) ** 2).mean(-1)[mask[b]])
    tensors = [torch.tensor(value, dtype=torch.float32) for value in (state, noise, time, targets, np.ones((2, 2)))]
    losses = head.losses(*tensors, torch.tensor(mask), gripper_weight=0.5)
    assert losses["arm"].item() == pytest.approx(np.mean(errors), rel=1e-5)
    assert losses["loss"].item() == pytest.approx(losses["arm"].item() + 0.5 * losses["gripper"].item(), rel=1e-6)
    for b in range(2):
        x = noise[b]
        for step in range(4):
            x = x + literal_velocity(head, state[b], x, step / 4) / 4
        arm, _ = head(tensors[0], tensors[1])
        np.testing.assert_allclose(arm[b].detach().numpy(), np.clip(x, -1, 1), atol=1e-5)


def test_the_flow_learns_both_modes_where_a_mean_would_lie_between():
    """One state, two equally common actions, -0.6 and 0.6: samples must lie at both; the best constant is 0."""
    head = FlowHead(4, 1, 1, width=64, seed=0, steps=20)
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    state, ones = torch.ones(128, 4), torch.ones(128, 1)
    for _ in range(400):
        targets = 0.6 * (2.0 * torch.randint(0, 2, (128, 1, 1), generator=generator) - 1)
        noise, time = torch.randn(128, 1, 1, generator=generator), torch.rand(128, generator=generator)
        losses = head.losses(state, noise, time, targets, ones, ones.bool(), gripper_weight=0.0)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        arm, _ = head(torch.ones(400, 4), torch.randn(400, 1, 1, generator=generator))
    near = (arm.abs() - 0.6).abs() < 0.2
    assert near.float().mean() > 0.85
    assert 0.35 < (arm > 0).float().mean() < 0.65
