"""`bridge_orig` against a literal reference and against the output of OpenVLA's own TensorFlow code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm4vla_core.episodes.rlds import open_rlds
from vlm4vla_core.episodes.sampling import quantile_normalise
from vlm4vla_core.episodes.tfrecord import parse_example, read_records
from vlm4vla_core.episodes.transforms import TRANSFORMS, bridge_orig, settled_gripper, transform_named
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


def test_named_transforms():
    assert set(TRANSFORMS) == {"none", "bridge_orig"}
    action = np.arange(14.0).reshape(2, 7)
    same, steps = transform_named("none")(action, action)
    np.testing.assert_array_equal(same, action)
    assert steps.tolist() == [0, 1]
    with pytest.raises(InputError, match="did you mean 'bridge_orig'"):
        transform_named("bridge")


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
