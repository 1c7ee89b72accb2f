"""A toy episode store that can be learnt in seconds: the picture's colour and the instruction decide the action."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlm4vla_core.actions import TABLETOP
from vlm4vla_core.episodes.store import Episode, EpisodeStore, write_store

STATE = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
OBJECTS = tuple(f"object{slot}.{axis}" for slot in range(2) for axis in "xyz")


def toy_store(out: Path, *, episodes: int = 12, steps: int = 6, size: int = 28, seed: int = 0) -> EpisodeStore:
    """x of the action is the sign that the instruction names, y that of the picture's brightness; yaw alternates."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(episodes):
        word, bright = number % 2, (number // 2) % 2
        pictures = rng.integers(0, 60, (steps, size, size, 3)) + 180 * bright
        action = np.zeros((steps, 7), np.float32)
        action[:, 0] = 0.05 * (1 if word else -1)
        action[:, 1] = 0.04 * (1 if bright else -1)
        action[:, 5] = 0.2 * (-1.0) ** np.arange(steps)
        action[:, 6] = bright
        state = rng.uniform(-0.25, 0.25, (steps, 7)).astype(np.float32)
        state[:, 6] = bright
        objects = rng.uniform(-0.25, 0.25, (steps, 6)).astype(np.float32)
        if number % 3 == 0:
            objects[:, 3:] = -1  # the second object is absent
        made.append(
            Episode(
                instruction=f"move the gripper to the {'right' if word else 'left'}",
                images={"front": pictures.astype(np.uint8)},
                state=state,
                action=action,
                columns={"truth/objects": objects},
                source=f"toy {number}",
                info={"objects": "red cube" if number % 3 == 0 else "red cube;blue ball"},
            )
        )
    return write_store(
        out, made, source="toy", convention=TABLETOP, state_names=STATE, column_names={"truth/objects": OBJECTS},
        config={"seed": seed}, inputs={},
    )  # fmt: skip
