"""LIBERO's five suites as protocols: real tasks on robosuite and MuJoCo, in the environment of `make venv-libero`.

Tasks are called by their number within the suite, in the order that LIBERO itself (task order 0) and the published
evaluations use. An episode settles for ten steps without motion, then the policy has the suite's published number of
steps and stops at the first success. Option `settle=acting` is the VLM4VLA authors' loop, in which the policy acts
between the waiting steps and both count. Option `crop=0.9` cuts the middle out of every picture by area, as policies
need that were trained with random crops (OpenVLA, VLM4VLA); the picture is not scaled back, which the policy's own
resizing does.

Trap: before every episode the simulator's random numbers start at 0, so that where cabinets and stoves stand does not
depend on the episodes before; the public loops seed once per task, and theirs does.
"""

from __future__ import annotations

import ctypes.util
import os
from dataclasses import dataclass
from typing import Any

from vlm4vla_core.actions import LIBERO
from vlm4vla_core.episodes.libero import STATE
from vlm4vla_core.sims.libero import assets
from vlm4vla_core.sims.simulator import SimulatorBenchmark

SETTLE = 10  # steps without motion before an episode
CAMERAS = {
    "agentview_rgb": "agentview", "eye_in_hand_rgb": "robot0_eye_in_hand",  # LIBERO's HDF5 files
    "image": "agentview", "wrist_image": "robot0_eye_in_hand",  # the RLDS and LeRobot conversions
}  # fmt: skip


@dataclass(frozen=True)
class LiberoBenchmark(SimulatorBenchmark):
    """A suite; see `SimulatorBenchmark`."""

    @property
    def suite(self) -> str:
        """LIBERO's own name of the suite."""
        return self.name.replace("-", "_")

    def missing(self) -> list[str]:
        lines = super().missing()
        if assets.folder() is None:
            lines.append(f"{self.protocol} needs LIBERO's assets: {assets.ADVICE}")
        named = os.environ.get("MUJOCO_GL")
        other = f", and MUJOCO_GL={named} is none that is here and draws without a display" if named else ""
        return lines if renderer() else [*lines, f"{self.protocol} needs a renderer{other}: {RENDERER_ADVICE}"]

    def describe(self) -> dict[str, Any]:
        return super().describe() | {
            "settle_steps": SETTLE, "simulator": "hf-libero 0.1.4, robosuite 1.4.0, mujoco 3.8.1",
            "seed": "0 before every reset", "rotation": "pictures turned by 180 degrees",
            "limits": {"translation_m": 0.05, "rotation_rad": 0.5},
        }  # fmt: skip


RENDERER_ADVICE = "run `apt-get install libosmesa6` (or libegl1), or set MUJOCO_GL to one that is there"


def renderer() -> str:
    """What MuJoCo shall draw with: the user's choice, else OSMesa or EGL, whichever is installed; "" for neither."""
    for name, library in (("osmesa", "OSMesa"), ("egl", "EGL")):
        if os.environ.get("MUJOCO_GL", name) == name and ctypes.util.find_library(library):
            return name
    return ""


def _suite(name: str, title: str, tasks: int, limit: int, experts: tuple[str, ...] = ()) -> LiberoBenchmark:
    numbers = tuple(map(str, range(tasks)))
    return LiberoBenchmark(
        name=name, version=1, title=f"LIBERO, {title}", tasks=numbers, convention=LIBERO, cameras=tuple(CAMERAS),
        state_names=STATE, success_rule="any_step", step_limits=dict.fromkeys(numbers, limit), action_limit=(1.0,) * 7,
        episodes=50, factory="vlm4vla_core.sims.libero.world:Libero", environment="libero",
        modules=("libero", "robosuite", "mujoco", "bddl"), experts=experts,
        options={"settle": ("still", "acting"), "crop": (1.0,), "size": (256,), "antialias": ("on", "off")},
    )  # fmt: skip


PROTOCOLS: dict[str, SimulatorBenchmark] = {
    bench.protocol: bench
    for bench in (
        _suite("libero-spatial", "the same objects in other places", 10, 220, ("0", "2")),
        _suite("libero-object", "other objects into the basket", 10, 280, tuple(map(str, range(10)))),
        _suite("libero-goal", "the same scene with other goals", 10, 300),
        _suite("libero-10", "ten long tasks (LIBERO-Long)", 10, 520, ("0", "1", "7")),
        _suite("libero-90", "ninety short tasks", 90, 400),
    )
}
