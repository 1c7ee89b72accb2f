"""Head and policy: the paper's parameter counts, losses against a slow reference, real units, nothing of training."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlm4vla_core import backbone
from vlm4vla_core.actions import TABLETOP, ActionConvention
from vlm4vla_core.backbone import tiny
from vlm4vla_core.errors import InputError
from vlm4vla_core.families import families
from vlm4vla_core.heads import GRIPPER_WEIGHTS, FCHead, action_losses
from vlm4vla_core.options import BackboneOptions
from vlm4vla_core.policy import PolicyConfig, VLAPolicy
from vlm4vla_core.windows import one_call_per_layer

Q01 = (-0.05, -0.04, -0.03, 0.0, -0.02, -0.2, 0.0)
Q99 = (0.06, 0.05, 0.03, 0.0, 0.02, 0.3, 1.0)
INVERTED = replace(TABLETOP, gripper_open=-1.0, gripper_closed=1.0)
TEXTS = ["move left", "touch the red cube", "push the blue ball to the right"]


def pictures(count: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


def make(convention: ActionConvention = TABLETOP, chunk: int = 4, seed: int = 0, **options: Any) -> VLAPolicy:
    config = PolicyConfig(chunk=chunk, convention=convention, q01=Q01, q99=Q99, camera="front", width=32, **options)
    return VLAPolicy(tiny(seed=seed, image_size=56), config, seed=seed).eval()


@pytest.mark.parametrize(
    ("hidden", "chunk", "millions"),
    [
        (2048, 10, 6.579), (2048, 4, 6.568), (2304, 10, 7.268), (2304, 4, 7.257), (2560, 10, 8.022),
        (2560, 4, 8.011), (3584, 10, 11.693), (3584, 4, 11.683), (4096, 10, 13.922), (4096, 4, 13.912),
    ],
)  # fmt: skip
def test_the_head_has_the_size_of_the_paper(hidden: int, chunk: int, millions: float):
    count = hidden + sum(parameter.numel() for parameter in FCHead(hidden, chunk, 6).parameters())
    assert round(count / 1e6, 3) == millions


def test_losses_equal_a_slow_reference():
    rng = np.random.default_rng(0)
    arm, targets = rng.uniform(-1, 1, (3, 4, 6)), rng.uniform(-2.5, 2.5, (3, 4, 6))
    logits, opens = rng.normal(size=(3, 4)), rng.integers(0, 2, (3, 4)).astype(float)
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
    huber, entropy = [], []
    for b, c in zip(*np.nonzero(mask), strict=True):
        for error in np.abs(arm[b, c] - targets[b, c]):
            huber.append(0.5 * error**2 if error <= 1 else error - 0.5)
        p = 1 / (1 + np.exp(-logits[b, c]))
        entropy.append(-(opens[b, c] * np.log(p) + (1 - opens[b, c]) * np.log(1 - p)))
    values = [torch.tensor(value) for value in (arm, logits, targets, opens)]
    losses = action_losses(*values, torch.tensor(mask), gripper_weight=GRIPPER_WEIGHTS["paper_equation"])
    assert losses["arm"].item() == pytest.approx(np.mean(huber), rel=1e-6)
    assert losses["gripper"].item() == pytest.approx(np.mean(entropy), rel=1e-6)
    assert losses["loss"].item() == pytest.approx(np.mean(huber) + np.mean(entropy), rel=1e-6)
    code = action_losses(*values, torch.tensor(mask))
    assert code["loss"].item() == pytest.approx(np.mean(huber) + 0.01 * np.mean(entropy), rel=1e-6)


def test_positions_do_not_depend_on_how_many_layouts_are_remembered(monkeypatch: pytest.MonkeyPatch):
    policy = make()
    expected = policy.backbone.collate(pictures(), TEXTS)["position_ids"]
    monkeypatch.setattr(backbone, "MAX_LAYOUTS", 2)  # three texts of different lengths: some are forgotten on the way
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        batch = make().backbone.collate(pictures(), [TEXTS[i] for i in order])
        assert torch.equal(batch["position_ids"], expected[:, order])
        policy.backbone.collate(pictures(), [TEXTS[i] for i in order])


def test_padded_steps_do_not_count():
    policy, rng = make(), np.random.default_rng(1)
    chunks = rng.uniform(-0.03, 0.03, (3, 4, 7)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], bool)
    other = chunks.copy()
    other[~mask] = 0.05
    same = [policy(policy.collate(pictures(), TEXTS, value, mask))["loss"] for value in (chunks, other)]
    assert same[0] == same[1]


def test_targets_are_normalised_by_the_recorded_quantiles():
    policy = make(INVERTED)
    low, high = np.array(Q01, np.float32), np.array(Q99, np.float32)
    chunks = np.stack([low, high, (low + high) / 2, 2 * high])[None].repeat(3, 0)  # (3, 4, 7)
    chunks[..., -1] = [-1, 1, -1, 1]
    batch = policy.collate(pictures(), TEXTS, chunks, np.ones((3, 4), bool))
    expected = np.array([[-1, -1, -1, 0, -1, -1], [1, 1, 1, 0, 1, 1], [0] * 6, [1, 1, 1, 0, 1, 1]], np.float32)
    np.testing.assert_allclose(batch["arm_targets"][0], expected, atol=1e-5)
    assert batch["gripper_targets"][0].tolist() == [1, 0, 1, 0]  # open is -1 here


@pytest.mark.parametrize("convention", [TABLETOP, INVERTED])
def test_predictions_are_in_real_units_and_deterministic(convention: ActionConvention):
    policy = make(convention).train()
    one, two = policy.predict(pictures(), TEXTS), policy.predict(pictures(), TEXTS)
    assert policy.training and one.actions.shape == (3, 4, 7) and one.actions.dtype == np.float32
    assert np.array_equal(one.actions, two.actions)
    assert (one.actions[..., :-1] >= np.array(Q01, np.float32)[:-1] - 1e-6).all()
    assert (one.actions[..., :-1] <= np.array(Q99, np.float32)[:-1] + 1e-6).all()
    assert (one.actions[..., 3] == 0).all()  # a dimension that never varied
    expected = np.where(one.gripper_open >= 0.5, convention.gripper_open, convention.gripper_closed)
    assert np.array_equal(one.actions[..., -1], expected)
    alone = policy.predict(pictures()[:1], TEXTS[:1])
    np.testing.assert_allclose(alone.actions[0], one.actions[0], atol=1e-6)


def test_head_outputs_map_back_to_the_targets():
    policy = make()
    chunks = np.random.default_rng(2).uniform(-0.02, 0.02, (3, 4, 7)).astype(np.float32)
    chunks[..., 3], chunks[..., -1] = 0, np.arange(12).reshape(3, 4) % 2
    batch = policy.collate(pictures(), TEXTS, chunks, np.ones((3, 4), bool))
    back = policy.actions(batch["arm_targets"], 20 * batch["gripper_targets"] - 10)
    np.testing.assert_allclose(back.actions, chunks, atol=1e-6)


def test_the_start_of_the_backbone_does_not_depend_on_the_head():
    before = torch.get_rng_state()
    wide, narrow = make(chunk=8).backbone.state_dict(), make(chunk=1).backbone.state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, narrow[name]) for name, value in wide.items())


def test_new_parameters_are_query_and_head():
    policy = make()
    new, share = policy.new_parameters()
    total = sum(parameter.numel() for parameter in policy.parameters())
    backbone = sum(parameter.numel() for name, parameter in policy.named_parameters() if ".base." in name)
    assert new == total - backbone and share == pytest.approx(new / total)


def test_a_saved_policy_predicts_the_same_in_another_process_without_training_code(tmp_path: Path):
    policy = make(seed=3)
    policy.save(tmp_path / "ck")
    expected = policy.predict(pictures(), TEXTS).actions
    np.save(tmp_path / "images.npy", pictures())
    code = (
        "import sys, numpy as np, torch; torch.set_num_threads(1)\n"
        "from vlm4vla_core.policy import VLAPolicy\n"
        f"p = VLAPolicy.load({str(tmp_path / 'ck')!r})\n"
        f"images = np.load({str(tmp_path / 'images.npy')!r})\n"
        f"np.save({str(tmp_path / 'out.npy')!r}, p.predict(images, {TEXTS!r}).actions)\n"
        "left_out = ('training', 'validation', 'presets', 'evaluation', 'lora', 'episodes.store')\n"
        "assert not [name for name in left_out if f'vlm4vla_core.{name}' in sys.modules]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert np.array_equal(np.load(tmp_path / "out.npy"), expected)


def test_what_does_not_fit_is_refused():
    policy = make()
    with pytest.raises(InputError, match=r"actions \(3, 5, 7\).*do not fit a head for \(3, 4, 7\)"):
        policy.collate(pictures(), TEXTS, np.zeros((3, 5, 7), np.float32), np.ones((3, 5), bool))
    with pytest.raises(InputError, match="q01 has 2 values for 7"):
        replace(policy.config, q01=(0.0, 1.0))
    with pytest.raises(InputError, match="unknown head 'flaw'; did you mean 'flow'"):
        replace(policy.config, head="flaw")
    for unsaid in ("gripper_open", "gripper_closed"):
        with pytest.raises(InputError, match="does not say what opens the gripper"):
            replace(policy.config, convention=replace(policy.config.convention, **{unsaid: float("nan")}))
    for bad in ({"chunk": 0}, {"clip": 0.0}, {"flow_steps": 0}):
        with pytest.raises(InputError, match="use a positive number"):
            replace(policy.config, **bad)
    for bad, known in (({"arm_loss": "hubert"}, "huber"), ({"normalisation": "quantiles"}, "quantile")):
        with pytest.raises(InputError, match=f"did you mean '{known}'"):
            replace(policy.config, **bad)


# --- heads and normalisations ---------------------------------------------------------------------------


def test_old_configs_mean_what_they_meant():
    value = make().config.to_dict()
    later = ("arm_loss", "flow_steps", "pad_to", "normalisation", "clip")
    old = PolicyConfig.from_dict({key: one for key, one in value.items() if key not in later})
    assert old == make().config and (old.head, old.arm_loss, old.normalisation) == ("fc", "huber", "quantile")


def test_the_authors_second_clip_is_learnt_and_undone():
    """On a scale where the quantiles are ±1: 0.65 of the range is all that can be asked for, and maps to 1."""
    low, high = np.array(Q01)[:-1], np.array(Q99)[:-1]
    for name in ("quantile_clip", "clip"):
        policy = make(normalisation=name)
        scale = np.maximum((high - low) / 2, 1e-9) if name == "quantile_clip" else np.ones(6)
        middle = (high + low) / 2 if name == "quantile_clip" else np.zeros(6)
        chunks = np.zeros((3, 4, 7), np.float32)
        for step, part in enumerate((0.65, -0.65, 0.325, 0.9)):
            chunks[:, step, :-1] = middle + part * scale
        targets = policy.collate(pictures(), TEXTS, chunks, np.ones((3, 4), bool))["arm_targets"]
        varied = [dimension for dimension in range(6) if name == "clip" or dimension != 3]  # 3 never varies in Q01, Q99
        for step, part in enumerate((1.0, -1.0, 0.5, 1.0)):
            np.testing.assert_allclose(targets[:, step, varied], part, atol=1e-4)
        back = policy.actions(targets, torch.zeros(3, 4)).actions
        np.testing.assert_allclose(back[:, :3, varied], chunks[:, :3, varied], atol=1e-5)
        np.testing.assert_allclose(back[:, 3, varied], np.tile((middle + 0.65 * scale)[varied], (3, 1)), atol=1e-5)
        ends = (
            policy.actions(torch.ones(3, 4, 6), torch.zeros(3, 4)).actions
            - policy.actions(torch.zeros(3, 4, 6), torch.zeros(3, 4)).actions
        )
        np.testing.assert_allclose(ends[0, 0, :-1], policy.config.unit(), atol=1e-6)


@pytest.mark.parametrize("head", ["fc", "mlp", "flow"])
def test_every_head_is_saved_loaded_and_reached_by_gradients(head: str, tmp_path: Path):
    policy = make(head=head, arm_loss="l1")
    chunks = np.random.default_rng(0).uniform(-0.02, 0.02, (3, 4, 7)).astype(np.float32)
    losses = policy(policy.collate(pictures(), TEXTS, chunks, np.ones((3, 4), bool), np.random.default_rng(1)))
    losses["loss"].backward()
    for name, parameter in policy.named_parameters():
        if name.startswith("head.") or name == "backbone.query":
            assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name
    policy.save(tmp_path / "ck")
    loaded = VLAPolicy.load(tmp_path / "ck")
    assert loaded.config == policy.config
    assert np.array_equal(loaded.predict(pictures(), TEXTS).actions, policy.predict(pictures(), TEXTS).actions)


@pytest.mark.parametrize("loss", ["huber", "l1", "l2"])
def test_the_policys_loss_is_its_configs(loss: str):
    policy = make(arm_loss=loss, gripper_weight=1.0)
    chunks = np.random.default_rng(0).uniform(-0.03, 0.03, (3, 4, 7)).astype(np.float32)
    batch = policy.collate(pictures(), TEXTS, chunks, np.ones((3, 4), bool))
    arm, _ = policy.outputs(batch)
    error = (arm - batch["arm_targets"]).abs()
    expected = {"huber": torch.where(error < 1, error**2 / 2, error - 0.5), "l1": error, "l2": error**2}[loss].mean()
    losses = policy(batch)
    assert losses["arm"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses["loss"].item() == pytest.approx((losses["arm"] + losses["gripper"]).item(), rel=1e-6)


def test_a_flow_head_makes_inference_stochastic_and_stays_deterministic_given_the_seed():
    policy = make(head="flow")
    one = policy.predict(pictures(), TEXTS, seed=1)
    assert np.array_equal(one.actions, policy.predict(pictures(), TEXTS, seed=1).actions)
    other = policy.predict(pictures(), TEXTS, seed=2)
    assert not np.array_equal(one.actions, other.actions)
    assert np.array_equal(one.gripper_open, other.gripper_open)
    alone = policy.predict(pictures()[1:2], TEXTS[1:2], seed=1)  # neighbours do not matter
    np.testing.assert_allclose(alone.actions[0], one.actions[1], atol=1e-6)
    mixed = policy.predict(pictures(), TEXTS, seed=[1, 2, 1])
    np.testing.assert_allclose(mixed.actions[:2], [one.actions[0], other.actions[1]], atol=1e-6)
    with pytest.raises(InputError, match="2 seeds for 3 pictures"):
        policy.predict(pictures(), TEXTS, seed=[1, 2])
    plain = make()
    assert np.array_equal(plain.predict(pictures(), TEXTS, seed=1).actions, plain.predict(pictures(), TEXTS).actions)


def test_a_flow_heads_batch_is_a_function_of_its_generator():
    policy, chunks = make(head="flow"), np.zeros((3, 4, 7), np.float32)
    rngs = (np.random.default_rng(seed) for seed in (5, 5, 6))
    same, again, other = (policy.collate(pictures(), TEXTS, chunks, np.ones((3, 4), bool), rng) for rng in rngs)
    assert torch.equal(same["flow_noise"], again["flow_noise"]) and torch.equal(same["flow_time"], again["flow_time"])
    assert not torch.equal(same["flow_noise"], other["flow_noise"])
    assert policy(same)["loss"] == policy(again)["loss"] != policy(other)["loss"]


# --- one length, compiled, other dtypes -----------------------------------------------------------------


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_fixed_length_changes_no_prediction(name: str, padding: str):
    backbone = tiny(name)
    backbone.padding = padding
    config = replace(make().config, width=16)
    side = backbone.image_size
    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    plain = VLAPolicy(backbone, config)
    expected = plain.predict(images, TEXTS[:2]).actions
    length = plain.backbone.collate(images, TEXTS[:2])["input_ids"].shape[1]
    fixed = VLAPolicy(backbone, replace(config, pad_to=length + 9))
    batch = fixed.collate(images, TEXTS[:2], np.zeros((2, 4, 7), np.float32), np.ones((2, 4), bool))
    assert batch["input_ids"].shape == (2, length + 9)
    np.testing.assert_allclose(fixed.predict(images, TEXTS[:2]).actions, expected, atol=2e-6)
    with pytest.raises(InputError, match=f"prompt of {length} tokens.*does not fit pad_to = {length - 1}"):
        VLAPolicy(backbone, replace(config, pad_to=length - 1)).predict(images, TEXTS[:2])


def test_no_padding_is_put_after_a_query_that_stands_after_the_padding():
    backbone = tiny(options=BackboneOptions(query_place="after_pads"), image_size=56)
    with pytest.raises(InputError, match="pad_to would put padding after"):
        VLAPolicy(backbone, replace(make().config, pad_to=80))


@pytest.mark.slow
@pytest.mark.parametrize("name", families())
def test_compiled_layers_give_the_same_and_keep_their_names(name: str, tmp_path: Path):
    torch._dynamo.reset()
    backbone = tiny(name)
    policy = VLAPolicy(backbone, replace(make().config, pad_to=320)).eval()
    images = np.random.default_rng(0).integers(0, 256, (3, backbone.image_size, backbone.image_size, 3), np.uint8)
    expected, names = policy.predict(images, TEXTS).actions, list(policy.state_dict())
    seen = []

    def backend(graph: Any, inputs: Any) -> Any:  # counts graphs and runs them as they are: no C compiler is needed
        seen.append(graph)
        return graph.forward

    described = backbone.describe()
    policy.compile_layers(backend=backend)
    np.testing.assert_allclose(policy.predict(images, TEXTS).actions, expected, atol=1e-6)
    assert list(policy.state_dict()) == names and backbone.describe() == described
    if name == "qwen2_5_vl":
        assert len(seen) <= 4  # one for vision blocks, one for decoder layers; twice where first and later calls differ
    many = len(seen)
    policy.predict(images[::-1].copy(), TEXTS[::-1])
    assert len(seen) == many  # one length: nothing is compiled anew
    policy.save(tmp_path / "ck")
    np.testing.assert_allclose(VLAPolicy.load(tmp_path / "ck").predict(images, TEXTS).actions, expected, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in families() if name.startswith("qwen")])
@pytest.mark.parametrize("side", [112, 140])
def test_one_attention_call_for_all_windows_changes_nothing(name: str, side: int, monkeypatch: pytest.MonkeyPatch):
    backbone = tiny(name, image_size=side)
    batch = backbone.collate(np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8), TEXTS)
    attention, calls = torch.nn.functional.scaled_dot_product_attention, []

    def count(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return attention(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    expected, before = backbone(batch), len(calls)
    changed = one_call_per_layer(backbone)
    uneven = backbone.geometry.window and side % backbone.geometry.window
    assert changed == (not uneven)  # Qwen2.5-VL's windows do not tile 140 pixels
    torch.testing.assert_close(backbone(batch), expected, atol=2e-6, rtol=0)
    assert (len(calls) - before < before) == changed


def test_dtype_and_device_can_change_at_loading(tmp_path: Path):
    policy = make(seed=3)
    policy.save(tmp_path / "ck")
    half = VLAPolicy.load(tmp_path / "ck", "cpu", torch.bfloat16)
    assert half.backbone.base.dtype == torch.bfloat16
    assert half.backbone.query.dtype == half.head.trunk[0].weight.dtype == torch.float32
    one, two = (model.predict(pictures(), TEXTS).actions for model in (policy, half))
    assert not np.array_equal(one, two)
    np.testing.assert_allclose(one, two, atol=0.02)
    half.save(tmp_path / "half")
    again = VLAPolicy.load(tmp_path / "half")
    assert again.backbone.base.dtype == torch.bfloat16
    assert np.array_equal(again.predict(pictures(), TEXTS).actions, two)
    with pytest.raises(InputError, match="cannot be moved to 'cuda:99'"):
        VLAPolicy.load(tmp_path / "ck", "cuda:99")
    meta = VLAPolicy.load(tmp_path / "ck", "meta")
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}
