"""Pictures of the world for people: a contact sheet of tasks and looks, and a film of a chain of five instructions.

Example: python -m vlm4vla_core.sims.tabletop.showcase docs

Trap: nine rays per pixel, so smoother than anything that a policy sees.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from vlm4vla_core.film import captioned, write_video
from vlm4vla_core.sims.tabletop.env import BatchedEnv
from vlm4vla_core.sims.tabletop.render import render

# Task, seed, look, camera, and how many of the expert's steps before the picture is taken.
_SHOWN = (
    ("pick", 9, "A", "front", 12), ("push", 5, "B", "front", 9), ("stack", 3, "C", "front", 14),
    ("switch", 8, "D", "front", 6), ("put", 5, "B", "wrist", 8), ("tower", 4, "A", "front", 36),
    ("two-plates", 2, "S", "front", 20), ("put", 12, "C", "front", 11),
)  # fmt: skip
_CHAIN_SEED, _CHAIN_LOOK, _SIZE = 11, "D", 224


def _picture(env: BatchedEnv, camera: str = "front") -> np.ndarray:
    return render(env.state, env.domains, _SIZE, camera=camera, samples=3).rgb[0]


def sheet() -> np.ndarray:
    """Two rows of captioned pictures, uint8 (H, W, 3)."""
    cells = []
    for task, seed, look, camera, steps in _SHOWN:
        env = BatchedEnv([task], [seed], [look], _SIZE)
        for _ in range(steps):
            env.step(env.expert())
        cells.append(captioned(_picture(env, camera), env.instructions[0]))
    half = len(cells) // 2
    return np.concatenate([np.concatenate(cells[:half], 1), np.concatenate(cells[half:], 1)])


def chain() -> list[np.ndarray]:
    """Every second frame of the scripted expert on one chain."""
    env, frames = BatchedEnv(["chain"], [_CHAIN_SEED], [_CHAIN_LOOK], _SIZE), []
    while env.running[0]:
        if env.steps[0] % 2 == 0:
            frames.append(captioned(_picture(env), env.instructions[0]))
        env.step(env.expert())
    done = captioned(_picture(env), env.instructions[0], outcome=f"{env.done[0]} of 5 in {env.steps[0]} steps")
    return [*frames, *[done] * 5]


if __name__ == "__main__":
    from PIL import Image

    folder = Path(sys.argv[1])
    Image.fromarray(sheet()).save(folder / "tabletop.png", optimize=True)
    write_video(folder / "tabletop.gif", chain(), fps=6)
