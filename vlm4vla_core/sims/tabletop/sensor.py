"""A worse camera: exposure, colour cast, blur and noise on rendered pictures, as a stand-in for "real" ones.

Trap: what is drawn is a function of (seed, step) alone: exposure, cast and blur belong to the episode, noise to the
step. So a degraded picture is the same in any batch, and again after a resume.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sensor:
    """exposure: largest change of brightness in stops. cast: standard deviation of each channel's gain. blur: largest
    standard deviation of the blur, in units of 1/100 of the picture's width. noise: standard deviation, in grey
    levels."""

    exposure: float
    cast: float
    blur: float
    noise: float


REAL_LIKE = Sensor(exposure=0.7, cast=0.08, blur=1.0, noise=8.0)


def degrade(rgb: np.ndarray, sensor: Sensor, seed: int, step: int) -> np.ndarray:
    """One picture uint8 (H, W, 3) as the sensor would give it, of the same shape."""
    from scipy.ndimage import gaussian_filter

    episode, moment = np.random.default_rng([seed, 3]), np.random.default_rng([seed, 4, step])
    gain = 2.0 ** episode.uniform(-sensor.exposure, sensor.exposure) * (1 + sensor.cast * episode.standard_normal(3))
    width = episode.uniform(0, sensor.blur) * rgb.shape[1] / 100
    x = rgb.astype(np.float32) * gain.astype(np.float32)
    x = gaussian_filter(x, (width, width, 0)) if width > 0.05 else x
    x += np.float32(sensor.noise) * moment.standard_normal(x.shape, dtype=np.float32)
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)
