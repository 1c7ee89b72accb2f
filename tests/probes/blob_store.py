"""A small episode store with a known truth: a bright spot on a dark ground, its place and size written in the state."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlm4vla_core.actions import TABLETOP
from vlm4vla_core.episodes.store import Episode, EpisodeStore, write_store

STATE = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
SIZE = 56


def blob_store(
    path: Path, *, episodes: int = 12, length: int = 6, seed: int = 0, names: tuple[str, ...] = STATE
) -> EpisodeStore:
    """x, y in [-0.5, 0.5] m: the spot's centre; z in [0, 0.3] m: its size. It drifts a little every step."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIZE, :SIZE] / (SIZE - 1) - 0.5

    def episode(number: int) -> Episode:
        start, drift = rng.uniform(-0.35, 0.35, 2), rng.uniform(-0.02, 0.02, 2)
        place = start + drift * np.arange(length)[:, None]  # (T, 2)
        height = rng.uniform(0.0, 0.3, length)
        glow = [
            np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * (0.1 + 0.5 * z) ** 2))
            for (x, y), z in zip(place, height, strict=True)
        ]
        images = np.repeat((30 + 200 * np.stack(glow)[..., None]).astype(np.uint8), 3, axis=-1)
        state = np.zeros((length, len(names)), np.float32)
        state[:, :2], state[:, 2], state[:, -1] = place, height, np.arange(length) % 2
        action = np.zeros((length, 7), np.float32)
        action[:, :2], action[:, -1] = drift + rng.normal(scale=0.003, size=(length, 2)), np.arange(length) % 2
        return Episode(f"push the cup {('left', 'right')[number % 2]}", {"front": images}, state, action)

    return write_store(
        path, (episode(number) for number in range(episodes)), source="spots", convention=TABLETOP, state_names=names,
        config={"seed": seed}, inputs={}, jpeg_444=True,
    )  # fmt: skip
