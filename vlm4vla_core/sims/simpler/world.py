"""One ManiSkill 3 Bridge scene behind the interface of `simulator.py`: CPU physics, lavapipe pictures, one world.

Every episode begins in a scene that is built anew: ManiSkill settles the objects before it moves the arm back, so in a
reused scene the last episode's arm may stand where the next one's objects fall.

Trap: ManiSkill renders at every step; here its observation mode is "none" but while a picture is asked for.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core.episodes.rotations import convert_rotation
from vlm4vla_core.errors import InputError
from vlm4vla_core.sims.simpler import CAMERA, TASKS, driver, home, practice_scene, stand_ins
from vlm4vla_core.sims.simpler.command import Commander
from vlm4vla_core.sims.simpler.expert import Expert, Seen
from vlm4vla_core.sims.simulator import Observation

if TYPE_CHECKING:
    from vlm4vla_core.sims.simpler import SimplerBenchmark

_MODE = "rgb+segmentation"  # the only one that the port knows; the segmentation drives the photo behind the objects
_FINGER = (0.014, 0.038)  # m, the fingers' target closed and open


class SimplerBridge:
    """See `simulator.Simulator`. gripper: rule of `Commander`. Raises InputError when something is missing."""

    def __init__(self, benchmark: SimplerBenchmark, gripper: str = "plain") -> None:
        if lines := benchmark.missing():
            raise InputError("; ".join(lines))
        driver.activate()
        os.environ["MS_ASSET_DIR"] = str(home())  # read, like the driver's variable, when ManiSkill is imported
        import torch

        torch.set_num_threads(1)  # the tensors are of one world
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import mani_skill.envs  # noqa: F401  (registers the environments)
            from mani_skill.utils.logging_utils import logger
        logger.setLevel(logging.ERROR)  # it warns of its own tasks' settings at every reset
        self.instruction, self.renewed, self.running = "", False, False
        self._benchmark, self._gripper = benchmark, gripper
        self._env: Any = None
        self._task = ""

    def reset(self, task: str, episode: int, *, practice: bool = False) -> tuple[Observation, str]:
        if not practice and not 0 <= episode < self._benchmark.episodes:
            what = f"{self._benchmark.protocol} has episodes 0 to {self._benchmark.episodes - 1}, not {episode}"
            raise InputError(what, where=task)
        if task != self._task:
            self._open(task)
        import torch

        env, number = self._env, episode
        env.xyz_configs, env.quat_configs = self._fixed
        if practice:
            position, quaternion = practice_scene(task, episode)
            env.xyz_configs = torch.tensor(position[None], dtype=torch.float32)  # (1, 2, 3)
            env.quat_configs = torch.tensor(quaternion[None], dtype=torch.float32)  # (1, 2, 4)
            number = 0
        # Nothing is drawn: the number, or the practice scene, says all. ManiSkill's seeds have 32 bits, ours more.
        env.reset(seed=0, options={"episode_id": torch.tensor([number]), "reconfigure": True})
        self.instruction, self.renewed, self.running = env.get_language_instruction()[0], False, True
        self._practice = practice
        self._steps, self._last, self._ever, self._grasped = 0, False, False, False
        self._command, self._expert = Commander(self._gripper), Expert(task)
        observation = self._observe()
        if not observation.render(CAMERA).std() > 0:
            what = "the simulator's picture is of one colour, so its renderer does not work"
            raise InputError(what, where=task, fix="see `vlm4vla doctor` for the driver")
        return observation, self.instruction

    def step(self, action: np.ndarray) -> Observation:
        assert self.running, "reset first"
        info = self._env.step(self._command(action))[-1]
        self._steps += 1
        self._last = bool(info["success"])
        self._ever |= self._last
        self._grasped |= bool(info["is_src_obj_grasped"])
        self.running = self._steps < self._benchmark.step_limits[self._task]
        if self._practice and self._expert.finished:  # the rest would be pictures of a hand that waits
            self.running = False
        return self._observe()

    def outcome(self) -> dict[str, Any]:
        note = f"stand-in assets: {', '.join(found)}" if (found := stand_ins(self._task)) else ""
        return {
            "success": self._last, "success_last": self._last, "success_ever": self._ever,
            "partial": float(self._grasped), "steps": self._steps, "chain": None, "note": note,
        }  # fmt: skip

    def expert(self) -> np.ndarray:
        return self._expert(self._seen())

    def snapshot(self) -> np.ndarray:
        return self._env.get_state()[0].numpy().astype(np.float64)

    def recall(self, snapshot: np.ndarray) -> Observation:
        import torch

        self._env.set_state(torch.tensor(snapshot[None], dtype=torch.float32))
        return self._observe()

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env, self._task = None, ""

    def _open(self, task: str) -> None:
        """One environment at a time: they share the photo behind the objects."""
        import gymnasium

        self.close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                made = gymnasium.make(
                    TASKS[task].env, obs_mode=_MODE, num_envs=1, sim_backend="cpu", render_backend="cpu"
                )  # fmt: skip
            except RuntimeError as error:  # SAPIEN's, of Vulkan
                if "vk::" in str(error) or "rendering device" in str(error):
                    raise driver.failed(error) from None
                raise
        self._env, self._task = made.unwrapped, task  # the step limit is counted here
        self._env._obs_mode = "none"
        self._fixed = self._env.xyz_configs, self._env.quat_configs

    def _observe(self) -> Observation:
        position, rotation = self._tool()
        low, high = _FINGER
        finger = float(self._env.agent.robot.get_qpos()[0, -2])
        state = np.concatenate(
            [position, convert_rotation(rotation, "quaternion", "euler_xyz"), [(finger - low) / (high - low)]]
        )
        return Observation(state, self._render)

    def _render(self, camera: str) -> np.ndarray:
        if camera != CAMERA:
            raise InputError(f"{self._benchmark.protocol} has no camera '{camera}'", fix=f"known: {CAMERA}")
        self._env._obs_mode = _MODE
        try:
            seen = self._env.get_obs({})  # with an info given, nothing is evaluated anew
        finally:
            self._env._obs_mode = "none"
        return seen["sensor_data"][camera]["rgb"][0].numpy()

    def _tool(self) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) m and quaternion (4,), w last, of the gripper's point in the robot's base."""
        pose = self._env.agent.controller.controllers["arm"].ee_pose_at_base
        return _numbers(pose)

    def _seen(self) -> Seen:
        """The simulator's state as the expert reads it, in the robot's base."""
        env, task = self._env, TASKS[self._task]
        base = env.agent.robot.pose.inv()
        target_pose = env.agent.controller.controllers["arm"]._target_pose
        boxes = env.episode_model_bbox_sizes
        position, rotation = self._tool()
        source, turned = _numbers(base * env.objs[task.source].pose)
        target, _ = _numbers(base * env.objs[task.target].pose)
        commanded, sent = _numbers(target_pose)
        return Seen(
            position, rotation, commanded, sent, source, turned, boxes[task.source].numpy().astype(float), target,
            boxes[task.target].numpy().astype(float), float(env.agent.robot.get_qpos()[0, -2]),
            bool(env.agent.is_grasping(env.objs[task.source])),
        )  # fmt: skip


def _numbers(pose: Any) -> tuple[np.ndarray, np.ndarray]:
    """Position (3,) and quaternion (4,), w last, of one ManiSkill pose."""
    quaternion = pose.q[0].numpy().astype(np.float64)
    return pose.p[0].numpy().astype(np.float64), np.roll(quaternion, -1)
