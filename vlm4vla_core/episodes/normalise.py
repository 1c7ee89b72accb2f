"""Actions in and out of the range [-1, 1] that a policy is trained on.

`quantile_normalise` is OpenVLA's rule; `clip_rescale` is the second one that VLM4VLA's authors put after it (and, on
CALVIN's relative actions, use alone): an option of training that is recorded with the policy, since evaluation has to
undo it.

Trap: both cut. What lies beyond the quantiles or the bound cannot be told from the edge afterwards, and a bound of
0.65 makes the largest motion that a policy can ask for 0.65 of the quantile range (on Bridge it cuts 5 % of the
values, `cut_share`).
"""

from __future__ import annotations

import numpy as np

AUTHORS_BOUND = 0.65  # norm_min, norm_max of all published VLM4VLA configurations


def quantile_normalise(action: np.ndarray, q01: np.ndarray, q99: np.ndarray, *, keep: int = 1) -> np.ndarray:
    """OpenVLA's rule: 2 (a - q01) / (q99 - q01 + 1e-8) - 1, clipped to [-1, 1]; the last dimension is left alone.

    action: (..., A) physical units; q01, q99: (A,); keep: how many last dimensions stay as they are (the gripper's).
    Returns float32 (..., A). A dimension with q01 = q99 becomes 0.
    """
    low, high, constant = _bounds(q01, q99)
    out = np.array(action, dtype=np.float32)
    scaled = np.clip(2 * (out - low) / (high - low + np.float32(1e-8)) - 1, -1, 1)
    arm = out.shape[-1] - keep
    out[..., :arm] = np.where(constant, np.float32(0), scaled)[..., :arm]
    return out


def quantile_denormalise(action: np.ndarray, q01: np.ndarray, q99: np.ndarray, *, keep: int = 1) -> np.ndarray:
    """The way back of `quantile_normalise` (what was clipped stays clipped); shapes as there.

    A dimension with q01 = q99 becomes q01 whatever was predicted.
    """
    low, high, constant = _bounds(q01, q99)
    out = np.array(action, dtype=np.float32)
    physical = (out + 1) / 2 * (high - low + np.float32(1e-8)) + low
    arm = out.shape[-1] - keep
    out[..., :arm] = np.where(constant, low, physical)[..., :arm]
    return out


def _bounds(q01: np.ndarray, q99: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    low, high = np.asarray(q01, np.float32), np.asarray(q99, np.float32)
    return low, high, low == high


def clip_rescale(action: np.ndarray, bound: float = AUTHORS_BOUND) -> np.ndarray:
    """Normalised actions (..., A) clipped to [-bound, bound] and stretched to [-1, 1]; the gripper (last) stays.
    float32.

    Source: VLM4VLA's released configurations (`norm_min`, `norm_max`) and their reading in its data code.
    """
    out = np.array(action, dtype=np.float32)
    out[..., :-1] = np.clip(out[..., :-1], -np.float32(bound), np.float32(bound)) / np.float32(bound)
    return out


def clip_unscale(action: np.ndarray, bound: float = AUTHORS_BOUND) -> np.ndarray:
    """The way back of `clip_rescale`, to the last float32 digit where nothing was cut. float32."""
    out = np.array(action, dtype=np.float32)
    out[..., :-1] *= np.float32(bound)
    return out


def cut_share(action: np.ndarray, bound: float = AUTHORS_BOUND) -> np.ndarray:
    """(A - 1,) share of values, per arm dimension, that `clip_rescale` would cut off (0 for no actions)."""
    beyond = np.abs(np.asarray(action, np.float32)[..., :-1]) > np.float32(bound)
    return beyond.reshape(-1, beyond.shape[-1]).sum(0) / max(1, beyond.size // beyond.shape[-1])
