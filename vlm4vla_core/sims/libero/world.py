"""One LIBERO task on robosuite and MuJoCo, stepped without pictures; a camera draws only when it is asked.

Trap: LIBERO's own wrapper repeats a failing reset for ever, so a missing mesh looks like a hang; the problem class is
driven directly here. And `reset` loads the model anew: a soft reset leaves differences of 2 mm behind.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from vlm4vla_core.errors import InputError
from vlm4vla_core.images import rotate_180
from vlm4vla_core.sims.libero import CAMERAS, RENDERER_ADVICE, SETTLE, LiberoBenchmark, assets, renderer
from vlm4vla_core.sims.libero.expert import Expert
from vlm4vla_core.sims.simulator import Observation

NOTHING = np.array([0.0, 0, 0, 0, 0, 0, -1])  # the waiting action: no motion, hand open


class Libero:
    """See `Simulator`. settle: "still", or "acting" where the policy acts between the waiting steps. crop: share of the
    picture's area that is kept, from its middle. size: pixels drawn. antialias: "off" draws nearly twice as fast on a
    CPU and changes edges."""

    def __init__(
        self,
        benchmark: LiberoBenchmark,
        settle: str = "still",
        crop: float = 1.0,
        size: int = 256,
        antialias: str = "on",
    ) -> None:
        if missing := benchmark.missing():
            raise InputError("; ".join(missing))
        if not (0 < crop <= 1 and 16 <= size <= 480):
            raise InputError(f"crop {crop} or size {size} is out of range", fix="crop is in (0, 1], size in 16…480")
        self.benchmark, self._acting, self._size, self._plain = benchmark, settle == "acting", size, antialias == "off"
        self._side = round(size * crop**0.5)
        os.environ["MUJOCO_GL"] = renderer() or os.environ.get("MUJOCO_GL", "")
        self._directory = tempfile.TemporaryDirectory()
        assets.configure(Path(self._directory.name))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            # Both print advice about files that nobody needs, and the order of the tasks.
            import libero.libero as package
            import robosuite  # noqa: F401
            from libero.libero import benchmark as suites

            self._suite = suites.get_benchmark_dict()[benchmark.suite]()
        folder = assets.folder()
        assert folder is not None
        self.assets = folder
        self.note = "stand-in assets" if assets.stand_ins(folder) else ""
        package._assets_path_cache = str(folder)
        self._task = ""
        self._env: Any = None
        self._context: Any = None
        self.instruction, self.renewed, self.running = "", False, False

    # --- an episode -----------------------------------------------------------------------------------------

    def reset(self, task: str, episode: int, *, practice: bool = False) -> tuple[Observation, str]:
        """Begin; see `Simulator.reset`. practice: the task's own random placement, with a seed of its own."""
        if task not in self.benchmark.tasks:
            raise InputError(f"{self.benchmark.protocol} has no task '{task}'")
        if not practice and not 0 <= episode < self.benchmark.episodes:
            raise InputError(f"{self.benchmark.protocol} has {self.benchmark.episodes} initial states per task")
        number = int(task)
        if task != self._task or self._env is None:
            self.close()
            self._env, self._task = self._build(number), task
            self._states = self._suite.get_task_init_states(number)  # (50, 1 + nq + nv)
        env = self._env
        # Never 0, which is the evaluation's: the random part of a practice scene is its own.
        seed = 1 + zlib.crc32(f"{self.benchmark.suite} {task} {episode}".encode()) if practice else 0
        np.random.seed(seed)  # noqa: NPY002 (LIBERO draws from it)
        env.object_property_initializers.clear()  # loading appends to them once more
        self._context = None
        env.reset()
        if not practice:
            env.sim.set_state_from_flattened(self._states[episode])
            env.sim.forward()
            env._check_success()
            env._post_process()
            env._update_observables(force=True)
        self.instruction, self.renewed, self.running = self._suite.get_task(number).language, True, True
        self._steps, self._done, self._waits = 0, False, SETTLE // 2 if self._acting else SETTLE
        self._expert: Expert | None = None
        if self._acting:
            self._wait()
        else:
            while self._waits:
                self._wait()
        return self._observation(), self.instruction

    def _wait(self) -> None:
        self._seen, _, self._done, _ = self._env.step(NOTHING)
        self._waits -= 1

    def step(self, action: np.ndarray) -> Observation:
        """One control step of 1/20 s. Raises InputError on a wrong shape, NaN or infinity."""
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise InputError(f"an action has to be 7 finite numbers, got shape {action.shape}")
        self._seen, _, self._done, _ = self._env.step(np.clip(action, -1.0, 1.0))
        self._steps += 1
        # In the authors' loop waiting steps count as steps: five of the policy's fall into the first ten.
        limit = self.benchmark.step_limits[self._task] + (SETTLE // 2 if self._acting else 0)
        self.running, self.renewed = not self._done and self._steps < limit, False
        if self.running and self._waits:
            self._wait()
        return self._observation()

    def outcome(self) -> dict[str, Any]:
        done = bool(self._done)
        held = [bool(self._env._eval_predicate(ask)) for ask in self._env.parsed_problem["goal_state"]]
        partial = 1.0 if done else round(float(np.mean(held)), 4)
        return {
            "success": done, "success_last": done, "success_ever": done, "partial": partial, "steps": self._steps,
            "chain": None, "note": self.note,
        }  # fmt: skip

    def expert(self) -> np.ndarray:
        """The scripted expert's action (7,) now. Raises InputError for a task that it cannot do."""
        if self._task not in self.benchmark.experts:
            known = ", ".join(self.benchmark.experts) or "none of them"
            what = f"no scripted expert for task {self._task} of {self.benchmark.protocol}"
            raise InputError(what, fix=f"it does: {known}")
        if self._expert is None:
            self._expert = Expert(self._env)
        return self._expert.act()

    # --- what is seen ---------------------------------------------------------------------------------------

    def _observation(self) -> Observation:
        import robosuite.utils.transform_utils as transforms

        seen = self._seen
        turn = transforms.quat2axisangle(np.array(seen["robot0_eef_quat"]))
        state = np.concatenate([seen["robot0_eef_pos"], turn, seen["robot0_gripper_qpos"]])  # (8,)
        return Observation(np.asarray(state, np.float64), self._render)

    def _render(self, camera: str) -> np.ndarray:
        if camera not in CAMERAS:
            raise InputError(f"LIBERO has no camera '{camera}'", fix=f"it has {', '.join(CAMERAS)}")
        sim = self._env.sim
        if self._context is None:
            self._context = self._draw_with(sim)
        picture = sim.render(camera_name=CAMERAS[camera], width=self._size, height=self._size)  # OpenGL: upside down
        edge = (self._size - self._side) // 2
        return rotate_180(picture)[edge : edge + self._side, edge : edge + self._side]

    def _draw_with(self, sim: Any) -> Any:
        from robosuite.utils.binding_utils import MjRenderContextOffscreen

        if self._plain:
            sim.model._model.vis.quality.offsamples = 0
        warm = np.array(sim.data.qacc_warmstart)  # the context calls forward, which must not move the next step
        try:
            context = MjRenderContextOffscreen(sim, device_id=-1)
        except Exception as error:  # of PyOpenGL, mujoco or robosuite, by renderer
            raise RuntimeError(f"MuJoCo cannot draw with MUJOCO_GL={renderer()} ({error}); {RENDERER_ADVICE}") from None
        sim.data.qacc_warmstart[:] = warm
        context.vopt.geomgroup[0], context.vopt.geomgroup[1] = 0, 1  # what collides is hidden, what is seen is shown
        return context

    def snapshot(self) -> np.ndarray:
        return self._env.sim.get_state().flatten()

    def recall(self, snapshot: np.ndarray) -> Observation:
        env = self._env
        env.sim.set_state_from_flattened(snapshot)
        env.sim.forward()
        env._post_process()
        env._update_observables(force=True)
        self._seen = env._get_observations()
        return self._observation()

    # --- the model ------------------------------------------------------------------------------------------

    def _build(self, number: int) -> Any:
        import robosuite
        from libero.libero.envs import TASK_MAPPING
        from libero.libero.envs import bddl_utils as bddl

        path = self._suite.get_task_bddl_file_path(number)
        problem = TASK_MAPPING[bddl.get_problem_info(path)["problem_name"]]
        settings: dict[str, Any] = {
            "robots": ["Panda"],
            "controller_configs": robosuite.load_controller_config(default_controller="OSC_POSE"),
            "initialization_noise": None, "use_camera_obs": False, "has_renderer": False,
            "has_offscreen_renderer": False, "control_freq": 20, "ignore_done": True, "hard_reset": True,
        }  # fmt: skip
        np.random.seed(0)  # noqa: NPY002 (LIBERO draws from it)
        try:
            return problem(path, **settings)
        except (OSError, ValueError) as error:  # the second is MuJoCo's of a file that is not there
            gone = self._absent(problem, path, settings)
            gone |= set(re.findall(r"'([^']+\.(?:xml|msh|stl|png|obj))'", str(error)))
            if gone:
                what = f"{len(gone)} asset files of task {number} of {self.benchmark.suite} are missing"
                names = ", ".join(sorted(name.removeprefix(f"{self.assets}/") for name in gone))
                raise InputError(f"{what}: {names}", where=self.assets, fix=assets.ADVICE) from None
            raise

    @staticmethod
    def _absent(problem: Any, path: str, settings: dict[str, Any]) -> set[str]:
        """Files that the composed model names and that are not there."""
        from robosuite.environments.base import MujocoEnv

        found: list[str] = []

        def compose(env: Any, xml_string: str | None = None) -> None:
            found.extend(re.findall(r'file="([^"]+)"', env.model.get_xml()))
            raise OSError

        original, MujocoEnv._initialize_sim = MujocoEnv._initialize_sim, compose
        try:
            problem(path, **settings)
        except OSError:
            pass
        finally:
            MujocoEnv._initialize_sim = original
        return {name for name in found if not Path(name).is_file()}

    def close(self) -> None:
        self._context = None
        if self._env is not None:
            self._env.close()
            self._env = None
