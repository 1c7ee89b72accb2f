"""Rotation representations against scipy's Rotation, singularities included."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from vlm4vla_core.episodes.rotations import SIZES, convert_rotation, from_matrix, to_matrix
from vlm4vla_core.errors import InputError

HYPOTHESIS = settings(deadline=None, derandomize=True, max_examples=60)
TURNS = [0.0, 1e-300, 1e-12, 1e-8, 1e-4, np.pi / 2 - 1e-9, np.pi / 2, np.pi - 1e-9, np.pi, -np.pi / 2, -np.pi]


def theirs(numbers: np.ndarray, name: str) -> np.ndarray:
    """scipy's matrices of (n, k) numbers."""
    if name == "euler_xyz":
        return Rotation.from_euler("xyz", numbers).as_matrix()
    if name == "axis_angle":
        return Rotation.from_rotvec(numbers).as_matrix()
    return Rotation.from_quat(numbers).as_matrix()


def hard_rotations() -> np.ndarray:
    """(n, 3, 3): random ones, all combinations of awkward Euler angles, tiny and half turns about any axis."""
    rng = np.random.default_rng(0)
    axes = rng.normal(size=(40, 3))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    axes = np.concatenate([axes, np.eye(3), -np.eye(3)])
    about = Rotation.from_rotvec((axes[:, None] * np.array(TURNS)[:, None]).reshape(-1, 3))
    parts = [Rotation.random(200, rng=1), Rotation.from_euler("xyz", list(itertools.product(TURNS, repeat=3))), about]
    return Rotation.concatenate(parts).as_matrix()


@pytest.mark.parametrize("name", ["euler_xyz", "axis_angle", "quaternion"])
def test_to_matrix_equals_scipy(name: str):
    numbers = np.random.default_rng(1).normal(size=(300, SIZES[name])) * 2
    np.testing.assert_allclose(to_matrix(numbers, name), theirs(numbers, name), atol=1e-14)


def test_from_matrix_equals_scipy_where_it_is_unique():
    rotation = Rotation.random(500, rng=2)
    matrix = rotation.as_matrix()
    np.testing.assert_allclose(from_matrix(matrix, "euler_xyz"), rotation.as_euler("xyz"), atol=1e-12)
    np.testing.assert_allclose(from_matrix(matrix, "axis_angle"), rotation.as_rotvec(), atol=1e-12)
    np.testing.assert_allclose(from_matrix(matrix, "quaternion"), rotation.as_quat(canonical=True), atol=1e-12)
    np.testing.assert_array_equal(from_matrix(matrix, "rot6d"), matrix[:, :, :2].transpose(0, 2, 1).reshape(-1, 6))


@pytest.mark.parametrize("name", list(SIZES))
def test_every_rotation_survives_the_way_there_and_back(name: str):
    matrix = hard_rotations()
    numbers = from_matrix(matrix, name)
    assert numbers.shape == (len(matrix), SIZES[name])
    assert np.isfinite(numbers).all()
    np.testing.assert_allclose(to_matrix(numbers, name), matrix, atol=1e-14)


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(SIZES, 2)))
def test_conversions_compose(source: str, target: str):
    numbers = from_matrix(hard_rotations(), source).reshape(-1, 1, SIZES[source])  # any leading shape
    there = convert_rotation(numbers, source, target)
    assert there.shape == (len(numbers), 1, SIZES[target])
    back = convert_rotation(there, target, source)
    np.testing.assert_allclose(to_matrix(back, source), to_matrix(numbers, source), atol=1e-14)


@HYPOTHESIS
@given(st.lists(st.floats(-1e-7, 1e-7), min_size=3, max_size=3))
def test_tiny_turns_keep_their_relative_size(vector: list[float]):
    for name in ("axis_angle", "euler_xyz", "quaternion"):  # not lost beside the ones of the matrix
        back = convert_rotation(convert_rotation(np.array(vector), "axis_angle", name), name, "axis_angle")
        np.testing.assert_allclose(back, vector, rtol=1e-7, atol=1e-15)


def test_rot6d_is_made_orthonormal():
    skew = np.array([[2.0, 0, 0, 1, 3, 0]])
    np.testing.assert_allclose(to_matrix(skew, "rot6d")[0], np.eye(3), atol=1e-15)


def test_what_is_no_rotation_is_refused():
    with pytest.raises(InputError, match="did you mean 'euler_xyz'"):
        to_matrix(np.zeros(3), "euler_zyx")
    with pytest.raises(ValueError, match=r"quaternion needs 4 finite numbers, got shape \(3,\)"):
        to_matrix(np.zeros(3), "quaternion")
    for numbers, name in ((np.zeros(4), "quaternion"), (np.zeros(6), "rot6d"), ([1, 1, 0, 2, 2, 0], "rot6d")):
        with pytest.raises(ValueError, match="no rotation"):
            to_matrix(np.array(numbers), name)
    with pytest.raises(ValueError, match="finite"):
        to_matrix(np.array([0, np.nan, 0]), "euler_xyz")
