"""Rotations in the representations that robot data uses, exact both ways through rotation matrices (float64).

- `euler_xyz`: roll, pitch, yaw (rad) about the fixed axes x, then y, then z: R = Rz Ry Rx, as Bridge, CALVIN and
  PyBullet.
- `axis_angle`: the axis times the angle (rad), as LIBERO and robosuite.
- `quaternion`: x, y, z, w; given back with w >= 0. MuJoCo writes w first.
- `rot6d`: the first two columns of the matrix, one after the other (Zhou et al. 2019, arXiv 1812.07035). Some libraries
  write rows.

Trap: a difference of Euler angles, which several data sets call a relative rotation, is not the rotation between the
two poses. These functions take the numbers for what they are declared to be.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vlm4vla_core.errors import InputError, nearest


def to_matrix(rotation: np.ndarray, representation: str) -> np.ndarray:
    """Rotation matrices (..., 3, 3) of (..., k) numbers; k is `SIZES[representation]`.

    Quaternions are normalised, rot6d is made orthonormal (Gram-Schmidt). Raises InputError on an unknown representation
    and ValueError on a wrong last dimension, on what is not finite, and on numbers that name no rotation.
    """
    read, _ = _known(representation)
    rotation = np.asarray(rotation, np.float64)
    if rotation.shape[-1:] != (SIZES[representation],) or not np.isfinite(rotation).all():
        raise ValueError(f"{representation} needs {SIZES[representation]} finite numbers, got shape {rotation.shape}")
    return read(rotation)


def from_matrix(matrix: np.ndarray, representation: str) -> np.ndarray:
    """The (..., k) numbers of rotation matrices (..., 3, 3).

    Where Euler angles are not unique (pitch of 90 degrees) yaw is 0; of the two axes of a half turn one is given.
    """
    return _known(representation)[1](np.asarray(matrix, np.float64))


def convert_rotation(rotation: np.ndarray, source: str, target: str) -> np.ndarray:
    """(..., k) numbers in one representation as (..., m) in another; the rotation is the same to rounding."""
    return from_matrix(to_matrix(rotation, source), target)


def _known(representation: str) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]:
    if representation not in _WAYS:
        raise InputError(f"unknown rotation '{representation}'", fix=nearest(representation, _WAYS))
    return _WAYS[representation]


def _euler_to_matrix(angles: np.ndarray) -> np.ndarray:
    (cr, cp, cy), (sr, sp, sy) = np.moveaxis(np.cos(angles), -1, 0), np.moveaxis(np.sin(angles), -1, 0)
    rows = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def _matrix_to_euler(matrix: np.ndarray) -> np.ndarray:
    m = np.moveaxis(matrix, (-2, -1), (0, 1))
    yaw = np.arctan2(m[1, 0], m[0, 0])
    # Pitch and roll of what is left after turning the yaw back: exact however near a pitch of 90 degrees is.
    sin, cos = np.sin(yaw), np.cos(yaw)
    pitch = np.arctan2(-m[2, 0], cos * m[0, 0] + sin * m[1, 0])
    roll = np.arctan2(sin * m[0, 2] - cos * m[1, 2], cos * m[1, 1] - sin * m[0, 1])
    return np.stack([roll, pitch, yaw], -1)


def _quaternion_to_matrix(quaternion: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(quaternion, axis=-1, keepdims=True)
    if (length == 0).any():
        raise ValueError("a quaternion of length 0 is no rotation")
    x, y, z, w = np.moveaxis(quaternion / length, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def _matrix_to_quaternion(matrix: np.ndarray) -> np.ndarray:
    m = np.moveaxis(matrix, (-2, -1), (0, 1))
    xy, xz, yz = m[0, 1] + m[1, 0], m[0, 2] + m[2, 0], m[1, 2] + m[2, 1]
    wx, wy, wz = m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]
    x, y, z, w = (1 + a * m[0, 0] + b * m[1, 1] + c * m[2, 2] for a, b, c in _SIGNS)  # four times the squares
    # Four times the quaternion times each of its own parts; the largest part divides best (Shepperd 1978).
    products = [[x, xy, xz, wx], [xy, y, yz, wy], [xz, yz, z, wz], [wx, wy, wz, w]]
    table = np.stack([np.stack(row, -1) for row in products], -2)  # (..., 4, 4)
    best = np.stack([x, y, z, w], -1).argmax(-1)[..., None, None]
    quaternion = np.take_along_axis(table, best, -2)[..., 0, :]
    quaternion = quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True)
    return np.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


_SIGNS = ((1, -1, -1), (-1, 1, -1), (-1, -1, 1), (1, 1, 1))


def _axis_angle_to_matrix(vector: np.ndarray) -> np.ndarray:
    half = np.linalg.norm(vector, axis=-1, keepdims=True) / 2
    return _quaternion_to_matrix(np.concatenate([vector / 2 * np.sinc(half / np.pi), np.cos(half)], -1))


def _matrix_to_axis_angle(matrix: np.ndarray) -> np.ndarray:
    quaternion = _matrix_to_quaternion(matrix)
    sine = np.linalg.norm(quaternion[..., :3], axis=-1, keepdims=True)  # of half the angle
    half = np.arctan2(sine, quaternion[..., 3:])
    return 2 * quaternion[..., :3] / np.sinc(half / np.pi)


def _rot6d_to_matrix(rotation: np.ndarray) -> np.ndarray:
    first, second = rotation[..., :3], rotation[..., 3:]
    size = np.linalg.norm(first, axis=-1, keepdims=True)
    x = first / np.where(size == 0, 1, size)
    away = second - (x * second).sum(-1, keepdims=True) * x
    left = np.linalg.norm(away, axis=-1, keepdims=True)
    if (size == 0).any() or (left <= 1e-12 * np.linalg.norm(second, axis=-1, keepdims=True)).any():
        raise ValueError("rot6d with parallel or zero columns is no rotation")
    y = away / left
    return np.stack([x, y, np.cross(x, y)], -1)


def _matrix_to_rot6d(matrix: np.ndarray) -> np.ndarray:
    return np.concatenate([matrix[..., 0], matrix[..., 1]], -1)


_WAYS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
    "euler_xyz": (_euler_to_matrix, _matrix_to_euler),
    "axis_angle": (_axis_angle_to_matrix, _matrix_to_axis_angle),
    "quaternion": (_quaternion_to_matrix, _matrix_to_quaternion),
    "rot6d": (_rot6d_to_matrix, _matrix_to_rot6d),
}
SIZES = {"euler_xyz": 3, "axis_angle": 3, "quaternion": 4, "rot6d": 6}
