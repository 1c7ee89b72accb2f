"""SIMPLER-Bridge in ManiSkill 3's port (mani-skill 3.0.1, sapien 3.0.3): four WidowX tasks, 24 fixed episodes each.

Trap: it is a port, not the published benchmark (rotations, grasp test, settling, the eggplant's poses and the physics
differ), so its numbers bear the name `simpler-bridge-ms3@1` and are not compared with published ones. The original,
`simpler-bridge@1`, wants its own Python and a GPU's driver: it is reached through `vlm4vla serve`.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm4vla_core.actions import BRIDGE
from vlm4vla_core.sims.simpler.command import GRIPPER_RULES
from vlm4vla_core.sims.simulator import SimulatorBenchmark

ORIGINAL = (
    "it is the original SimplerEnv, which has an environment of its own: serve the policy "
    "(`vlm4vla serve`) and run the client of docs/policy-server.md there; simpler-bridge-ms3@1 is ManiSkill 3's port"
)
CAMERA = "3rd_view_camera"


@dataclass(frozen=True)
class Task:
    """One task: ManiSkill's environment, what is moved and where to, and the scene's stage and photo."""

    env: str
    source: str
    target: str
    stage: str = "bridge_table_1_v1.glb"
    photo: str = "bridge_real_eval_1.png"
    also: tuple[str, ...] = ()  # further models of the scene


TASKS = {
    "widowx_spoon_on_towel": Task(
        "PutSpoonOnTableClothInScene-v1", "bridge_spoon_generated_modified", "table_cloth_generated_shorter"
    ),
    "widowx_carrot_on_plate": Task(
        "PutCarrotOnPlateInScene-v1", "bridge_carrot_generated_modified", "bridge_plate_objaverse_larger"
    ),
    "widowx_stack_cube": Task(
        "StackGreenCubeOnYellowCubeBakedTexInScene-v1", "baked_green_cube_3cm", "baked_yellow_cube_3cm"
    ),
    "widowx_put_eggplant_in_basket": Task(
        "PutEggplantInBasketScene-v1", "eggplant", "dummy_sink_target_plane",
        "bridge_table_1_v2.glb", "bridge_sink.png", ("sink",),
    ),
}  # fmt: skip
_PRACTICE = 0xB21D6E  # first word of the seed sequence of practice scenes


def home() -> Path:
    """What ManiSkill calls MS_ASSET_DIR: that variable, else `simpler` in VLM4VLA_SIM_ASSETS, else ManiSkill's own."""
    if named := os.environ.get("MS_ASSET_DIR"):
        return Path(named)
    shared = os.environ.get("VLM4VLA_SIM_ASSETS")
    return Path(shared) / "simpler" if shared else Path.home() / ".maniskill"


def assets() -> Path:
    """ManiSkill's data folder."""
    return home() / "data"


def scenes() -> Path:
    """The Bridge scenes within it."""
    return assets() / "tasks" / "bridge_v2_real2sim_dataset"


def stand_ins(task: str) -> list[str]:
    """What of a task's assets here is a stand-in: a stage below 64 KiB (the originals have over 4 MB; it is hidden
    behind the photo), the eggplant without its textured.dae (a plain look)."""
    found, root = [], scenes()
    stage = root / "stages" / TASKS[task].stage
    if stage.is_file() and stage.stat().st_size < 1 << 16:
        found.append("the table under the photo")
    eggplant = root / "custom" / "models" / "eggplant"
    if TASKS[task].source == "eggplant" and not any(
        (eggplant / f"textured.{ending}").is_file() for ending in ("obj", "dae")
    ):
        found.append("the eggplant's look")
    return found


@dataclass(frozen=True)
class SimplerBenchmark(SimulatorBenchmark):
    """The port's protocol; knows its assets and its driver."""

    def missing(self) -> list[str]:
        """One line each for packages, the asset folder and the Vulkan driver. ManiSkill itself would ask for missing
        assets on standard input."""
        from vlm4vla_core.sims.simpler import driver

        lines, root = super().missing(), scenes()
        needed = [assets() / "robots/widowx/wx250s.urdf", assets() / "robots/widowx/wx250s.srdf"]
        needed += [root / "custom" / f"info_bridge_custom{kind}_v0.json" for kind in ("", "_baked_tex")]
        for task in (TASKS[name] for name in self.tasks):
            models = (task.source, task.target, *task.also)
            needed += [root / "stages" / task.stage, root / "real_inpainting" / task.photo]
            needed += [root / "custom" / "models" / model / "collision.obj" for model in models]
        gone = sorted({str(path.relative_to(assets())) for path in needed if not path.is_file()})
        if gone:
            more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
            lines.append(
                f"{self.protocol} needs ManiSkill's assets: no {gone[0]}{more} in {assets()}: run `python -m "
                "mani_skill.utils.download_asset` for bridge_v2_real2sim and widowx250s, and set MS_ASSET_DIR to the "
                "folder above data"
            )
        return lines + driver.missing()

    def describe(self) -> dict[str, Any]:
        told = {task: found for task in self.tasks if (found := stand_ins(task))}
        return super().describe() | {
            "simulator": "mani-skill 3.0.1, sapien 3.0.3, CPU; 5 Hz control, 500 Hz physics",
            "environments": {name: TASKS[name].env for name in self.tasks},
            "partial": "1 when the object was ever grasped",
            "rotation": "the policy's fixed-axes roll, pitch, yaw, converted to the port's intrinsic Euler XYZ",
            "not": "the published benchmark (simpler-bridge@1): a port with other physics and checks",
            "stand_in_assets": told,
        }


def practice_scene(task: str, episode: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions (2, 3) m and quaternions (2, 4), w first, of source and target for demonstration `episode`: none of the
    fixed ones, but anywhere in the square that those span, at their heights, turned by up to 0.35 rad from theirs."""
    rng = np.random.default_rng([_PRACTICE, zlib.crc32(task.encode()), episode])
    if task == "widowx_put_eggplant_in_basket":  # tumbles where it falls; drawn about the fixed places
        position = np.array([-0.105, 0.206, 0.933]) + rng.uniform(-1, 1, 3) * [0.015, 0.02, 0.0]
        return np.stack([position, [-0.125, 0.025, 1.0]]), np.stack([_turn(rng.uniform(-np.pi, np.pi)), _turn(0.0)])
    half, heights, apart, turns = {
        "widowx_spoon_on_towel": (0.075, (0.88, 0.875), 0.13, (0.0, np.pi / 2)),
        "widowx_carrot_on_plate": (0.075, (0.887529, 0.869532), 0.13, (np.pi, -np.pi / 2)),
        "widowx_stack_cube": (0.1, (0.887529, 0.887529), 0.08, (0.0,)),
    }[task]
    while True:
        places = rng.uniform(-half, half, (2, 2)) + np.array([-0.16, 0.0])
        if np.linalg.norm(places[0] - places[1]) >= apart:
            break
    angles = (
        rng.choice(turns) + rng.uniform(-0.35, 0.35),
        rng.uniform(-0.35, 0.35) if task == "widowx_stack_cube" else 0.0,
    )
    return np.column_stack([places, heights]), np.stack([_turn(angle) for angle in angles])


def _turn(angle: float) -> np.ndarray:
    """Quaternion, w first, of a turn about the vertical."""
    return np.array([np.cos(angle / 2), 0.0, 0.0, np.sin(angle / 2)])


_BENCHMARK = SimplerBenchmark(
    name="simpler-bridge-ms3",
    version=1,
    title="SIMPLER-Bridge, ManiSkill 3 port (not the published benchmark): four WidowX tasks, visual matching",
    tasks=tuple(TASKS),
    convention=BRIDGE,
    cameras=(CAMERA,),
    state_names=("x", "y", "z", "roll", "pitch", "yaw", "gripper"),  # of ee_gripper_link in the base; 1 is open
    success_rule="last_step",
    step_limits={task: 120 if task == "widowx_put_eggplant_in_basket" else 60 for task in TASKS},
    action_limit=(0.03, 0.04, 0.04, 0.08, 0.09, 0.2, 1.0),  # about q01 and q99 of the Bridge data
    episodes=24,
    factory="vlm4vla_core.sims.simpler.world:SimplerBridge",
    environment="simpler",
    modules=("mani_skill", "sapien"),
    options={"gripper": GRIPPER_RULES},
    experts=tuple(TASKS),
)
PROTOCOLS: dict[str, SimulatorBenchmark] = {_BENCHMARK.protocol: _BENCHMARK}
