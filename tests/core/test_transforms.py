"""Transforms against literal references, the output of OpenVLA's own TensorFlow code, and original CALVIN frames."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from vlm4vla_core import images
from vlm4vla_core.actions import BRIDGE, TABLETOP, ActionConvention
from vlm4vla_core.episodes.normalise import (
    clip_rescale,
    clip_unscale,
    cut_share,
    quantile_denormalise,
    quantile_normalise,
)
from vlm4vla_core.episodes.rlds import open_rlds
from vlm4vla_core.episodes.tfrecord import parse_example, read_records
from vlm4vla_core.episodes.transforms import (
    bridge_orig,
    calvin_relative,
    convert,
    no_ops,
    settled_gripper,
)
from vlm4vla_core.errors import InputError

# Quantiles of the whole of BridgeV2, as published with OpenVLA and in VLM4VLA's configs/data/oxe_dataset_stats.
# The sample's expected `norm_NN` were made with these, not with statistics of its own 25 episodes.
BRIDGE_Q01 = [-0.02872725307941437, -0.04170349963009357, -0.026093858778476715, -0.08092105075716972,
              -0.09288699507713317, -0.20718276381492615, 0.0]  # fmt: skip
BRIDGE_Q99 = [0.028309678435325586, 0.040855254605412394, 0.040161586627364146, 0.08192047759890528,
              0.07792850524187081, 0.20382574498653397, 1.0]  # fmt: skip


def test_gripper_settles_on_the_next_clear_command():
    raw = np.array([0.5, 0.99, 0.5, 0.02, 0.3, 0.96, 0.94, 0.5], np.float32)
    assert settled_gripper(raw).tolist() == [1, 1, 0, 0, 1, 1, 0.5, 0.5]  # nothing clear follows the end: last command


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 12), st.integers(0, 2**31))
def test_bridge_orig_against_a_literal_reference(length: int, seed: int):
    rng = np.random.default_rng(seed)
    action = rng.uniform(-1, 1, (length, 7)).astype(np.float32)
    action[:, 6] = rng.choice(np.float32([0, 0.04, 0.05, 0.5, 0.95, 0.96, 1]), length)
    state = rng.normal(size=(length, 7)).astype(np.float32)
    expected, steps = [], []
    for t in range(1, length - 1):
        clear = [g for g in action[t:, 6] if g > np.float32(0.95) or g < np.float32(0.05)]
        gripper = float(clear[0] > 0.5) if clear else action[-1, 6]
        expected.append([*(state[t + 1, :6] - state[t, :6]), gripper])
        steps.append(t)
    found, kept = bridge_orig(action, state)
    assert kept.tolist() == steps
    np.testing.assert_array_equal(found, np.array(expected, np.float32).reshape(-1, 7))


@pytest.mark.samples
def test_bridge_sample_equals_openvla_exactly(samples: Path):
    expected = np.load(samples / "bridge_rlds_octo" / "openvla_bridge_orig_expected.npz")
    ((path, count),) = open_rlds(samples / "bridge_rlds_octo").shards["train"]
    assert count == 25
    for number, data in enumerate(read_records(path)):
        found = parse_example(data)
        action, steps = bridge_orig(
            found["steps/action"].reshape(-1, 7), found["steps/observation/state"].reshape(-1, 7)
        )
        np.testing.assert_array_equal(action, expected[f"action_{number:02d}"], strict=True)
        np.testing.assert_array_equal(steps, expected[f"step_{number:02d}"])
        normalised = quantile_normalise(action, BRIDGE_Q01, BRIDGE_Q99)
        np.testing.assert_array_equal(normalised, expected[f"norm_{number:02d}"], strict=True)


# --- CALVIN and LIBERO


@pytest.mark.samples
def test_calvin_relative_reproduces_original_frames(samples: Path):
    frames = [np.load(path) for path in sorted((samples / "calvin_npz").glob("*.npz"))]
    assert len(frames) == 2
    actions, robot_obs, rel_actions = (
        np.stack([frame[key] for frame in frames]) for key in ("actions", "robot_obs", "rel_actions")
    )
    np.testing.assert_array_equal(calvin_relative(actions, robot_obs), rel_actions)


def test_calvin_angles_differ_the_shorter_way_round():
    """The literal reference: the angle between two directions of the unit circle."""
    rng = np.random.default_rng(0)
    actions, robot_obs = rng.uniform(-math.pi, math.pi, (400, 7)), rng.uniform(-math.pi, math.pi, (400, 15))
    actions[:, 3:6] = (
        robot_obs[:, 3:6] + rng.uniform(-0.06, 0.06, (400, 3)) + 2 * math.pi * rng.integers(-1, 2, (400, 3))
    )
    found = calvin_relative(actions, robot_obs)
    for row, (action, state) in enumerate(zip(actions, robot_obs, strict=True)):
        for k in range(3):
            assert found[row, k] == pytest.approx(max(-1.0, min(1.0, (action[k] - state[k]) / 0.02)))
            angle = np.angle(np.exp(1j * (action[3 + k] - state[3 + k])))
            assert found[row, 3 + k] == pytest.approx(max(-1.0, min(1.0, angle / 0.05)), abs=1e-12)
    np.testing.assert_array_equal(found[:, 6], actions[:, 6])


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.lists(st.tuples(st.sampled_from([0.0, 9e-5, 1.1e-4, 0.3]), st.sampled_from([-1.0, 1.0])), max_size=12))
def test_no_ops_against_the_loop_that_keeps_step_by_step(steps: list[tuple[float, float]]):
    action = np.array([[size, 0, 0, 0, 0, 0, gripper] for size, gripper in steps]).reshape(-1, 7)
    kept: list[int] = []
    for t, (size, gripper) in enumerate(steps):
        unchanged = not kept or gripper == steps[kept[-1]][1]
        if not (size < 1e-4 and unchanged):
            kept.append(t)
    assert np.flatnonzero(~no_ops(action)).tolist() == kept


def test_an_image_turned_by_180_degrees():
    picture = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3)).astype(np.uint8)
    turned = images.rotate_180(picture)
    assert turned.flags.c_contiguous
    np.testing.assert_array_equal(turned, np.stack([np.rot90(one, 2) for one in picture]))
    np.testing.assert_array_equal(images.rotate_180(turned[0]), picture[0])


# --- normalisation of VLM4VLA's authors


def test_clip_rescale_by_hand_and_back():
    action = np.array([[0.65, -0.325, 0.9, 1.0], [-2.0, 0.0, -0.65, 0.25]], np.float32)
    found = clip_rescale(action)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[1, -0.5, 1, 1], [-1, 0, -1, 0.25]], atol=1e-7)
    np.testing.assert_allclose(clip_unscale(found), [[0.65, -0.325, 0.65, 1], [-0.65, 0, -0.65, 0.25]], atol=1e-7)
    np.testing.assert_array_equal(cut_share(action), [0.5, 0, 0.5])  # 0.65 itself is not cut
    np.testing.assert_array_equal(cut_share(np.zeros((0, 4))), [0, 0, 0])


def test_what_is_not_cut_comes_back_to_the_last_digit():
    rng = np.random.default_rng(0)
    action = rng.uniform(-0.65, 0.65, (20000, 7)).astype(np.float32)
    back = clip_unscale(clip_rescale(action))
    assert (np.abs(back - action) <= np.spacing(np.abs(action))).all()


@pytest.mark.samples
def test_share_that_the_authors_cut_on_real_bridge_actions(samples: Path):
    """Measured before on these 25 episodes: 5.0 % of the values lie beyond 0.65 of the quantile range."""
    expected = np.load(samples / "bridge_rlds_octo" / "openvla_bridge_orig_expected.npz")
    normalised = np.concatenate([expected[f"norm_{number:02d}"] for number in range(25)])
    share = cut_share(normalised)
    assert share.shape == (6,)
    assert share.mean() == pytest.approx(0.05, abs=0.0015)
    assert share.mean() == pytest.approx(np.mean([abs(value) > 0.65 for value in normalised[:, :6].ravel().tolist()]))


def test_all_dimensions_can_be_normalised():
    q01, q99 = np.array([-2.0, 0.0]), np.array([2.0, 1.0])
    found = quantile_normalise([[1.0, 1.0], [0.0, 0.5]], q01, q99, keep=0)
    np.testing.assert_allclose(found, [[0.5, 1], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(quantile_denormalise(found, q01, q99, keep=0), [[1, 1], [0, 0.5]], atol=1e-6)


# --- between conventions

AXIS_ANGLE = replace(
    BRIDGE, names=("x", "y", "z", "rx", "ry", "rz", "gripper"), rotation="axis_angle", gripper_open=-1, gripper_closed=1
)
ROT6D = replace(
    BRIDGE, rotation="rot6d", names=("x", "y", "z", *(f"r{k}" for k in range(6)), "gripper"),
    units=("m",) * 3 + ("1",) * 7,
)  # fmt: skip


def test_gripper_values_convert_exactly():
    other = replace(BRIDGE, gripper_open=-1.0, gripper_closed=1.0)
    actions = np.array([[1, 2, 3, 4, 5, 6, 0.0], [1, 2, 3, 4, 5, 6, 1.0], [1, 2, 3, 4, 5, 6, 0.25]])
    found = convert(actions, BRIDGE, other)
    np.testing.assert_array_equal(found[:, 6], [1, -1, 0.5])
    np.testing.assert_array_equal(found[:, :6], actions[:, :6])
    np.testing.assert_array_equal(convert(found, other, BRIDGE), actions)


@pytest.mark.parametrize("other", [AXIS_ANGLE, ROT6D])
def test_rotations_convert_as_scipy_says(other: ActionConvention):
    rng = np.random.default_rng(0)
    actions = np.concatenate([rng.normal(0, 0.05, (4, 5, 6)), rng.integers(0, 2, (4, 5, 1))], -1)
    found = convert(actions, BRIDGE, other)
    assert found.shape == (4, 5, other.size)
    rotations = Rotation.from_euler("xyz", actions[..., 3:6].reshape(-1, 3))
    matrix = rotations.as_matrix()
    expected = rotations.as_rotvec() if other is AXIS_ANGLE else np.concatenate([matrix[..., 0], matrix[..., 1]], -1)
    np.testing.assert_allclose(found[..., 3:-1].reshape(20, -1), expected, atol=1e-14)
    np.testing.assert_allclose(convert(found, other, BRIDGE), actions, atol=1e-14)


def test_what_cannot_be_converted_is_named():
    actions = np.zeros((2, 7))
    np.testing.assert_array_equal(convert(actions, BRIDGE, BRIDGE), actions)
    for target, named in [
        (TABLETOP, "frame robot base, WidowX against table"),
        (replace(BRIDGE, control_hz=20.0), "control_hz 5.0 against 20.0"),
        (replace(BRIDGE, relative=False), "relative True against False"),
        (replace(BRIDGE, scaling="1 is 0.02 m"), "scaling"),
        (replace(BRIDGE, units=("1",) * 7), "units"),
        (replace(AXIS_ANGLE, units=("m",) * 3 + ("1",) * 4), "rotation axis_angle in 1, 1, 1"),
        (replace(AXIS_ANGLE, rotation="none"), "rotation none"),
        (replace(BRIDGE, gripper_open=0.0), "a gripper that is 0 both open and closed"),
    ]:
        with pytest.raises(InputError, match=named):
            convert(actions, BRIDGE, target)
    with pytest.raises(ValueError, match=r"7 numbers per action are declared, got shape \(2, 6\)"):
        convert(actions[:, :6], BRIDGE, AXIS_ANGLE)
