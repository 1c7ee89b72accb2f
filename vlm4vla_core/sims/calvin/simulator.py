"""CALVIN itself, from a user's checkout: chains of five instructions in scene D, and practice in A, B and C.

Physics, pictures and the test of success are calvin_env's; what is ours is when they happen: the simulation is loaded
anew before each chain, so that a chain does not depend on what ran before it, and pictures are rendered only when asked
for (a step costs 3 ms, a picture 25 to 50).

Trap: the two renderers do not look alike (mean difference 21 of 255 in the static view): "tiny" (no driver needed)
suits policies trained on local recordings with it, "egl" those trained on CALVIN's released data.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.sims.calvin import chains
from vlm4vla_core.sims.calvin import expert as scripted
from vlm4vla_core.sims.calvin.checkout import open_checkout, quiet
from vlm4vla_core.sims.simulator import Observation, SimulatorBenchmark

CHAIN, STEP_LIMIT = "chain", 360  # steps of one part of a chain
TEST_SCENE, TRAIN_SCENES = "D", ("A", "B", "C")


class CalvinSimulator:
    """One CALVIN world (see `sims.simulator.Simulator`). domain: the scene of the present episode.

    renderer: "tiny" (TinyRenderer, on the CPU) or "egl". Raises InputError without checkout or packages.
    """

    def __init__(self, benchmark: SimulatorBenchmark, renderer: str = "tiny") -> None:
        self._egl, self._renderer, self._checkout = renderer == "egl", renderer, open_checkout()
        self._env: Any = None
        self._cameras: dict[str, Any] = {}
        self.domain = self.instruction = ""
        self.renewed = self.running = False
        self._tasks: tuple[str, ...] = ()
        self._words: list[str] = []
        self._done = self._steps = self._part = 0
        self._expert: scripted.Expert | None = None

    def reset(self, task: str, episode: int, *, practice: bool = False) -> tuple[Observation, str]:
        """Begin chain number `episode` of the official 1000, or, for practice, one task of the experts' in a scene of
        the training's (A, B, C in turn), drawn with `episode` as the seed."""
        if practice:
            return self.practise(task, episode, TRAIN_SCENES[episode % len(TRAIN_SCENES)])
        if task != CHAIN or not 0 <= episode < chains.CHAINS:
            what = f"no chain number {episode}" if task == CHAIN else f"no task '{task}'"
            raise InputError(f"calvin-abc-d@1 has {what}", fix=f"give {CHAIN}, 0 to {chains.CHAINS - 1}")
        chain = chains.official_chains()[episode]
        self._open(TEST_SCENE)
        self._env.reset(*chains.reset_state(chain.state))
        return self._begin(chain.tasks, [self._checkout.asked[name][0] for name in chain.tasks])

    def practise(self, task: str, seed: int, scene: str) -> tuple[Observation, str]:
        """Begin one task of the experts' in a scene of choice, with doors, lights, blocks and arm as `seed` draws them,
        asked in a phrase of CALVIN's training data."""
        if task not in scripted.TASKS:
            raise InputError(f"CALVIN has no scripted expert for '{task}'", fix=nearest(task, scripted.TASKS))
        rng = np.random.default_rng([seed, 0xCA1, scripted.TASKS.index(task)])
        self._open(scene)
        self._env.reset(np.array(chains.ROBOT_START), self._practice_scene(task, rng))
        self._wander(rng)
        return self._begin((task,), [str(rng.choice(self._checkout.taught[task]))])

    def _begin(self, tasks: tuple[str, ...], words: list[str]) -> tuple[Observation, str]:
        self._tasks, self._words, self._done, self._steps, self.running = tasks, words, 0, 0, True
        self._ask()
        return self._observe(), self.instruction

    def _open(self, scene: str) -> None:
        """The scene, as it is when nothing has happened in it."""
        if scene != self.domain:
            self.close()
            self._env, self.domain = self._checkout.make(scene, egl=self._egl), scene
            # Its deletion would close it once more, and with it whichever simulation has its number by then.
            self._shut, self._env.close = self._env.close, lambda: None
            if self._env.cid != 0:  # some of calvin_env's calls name no client and reach number 0
                raise RuntimeError("this process holds another PyBullet connection; CALVIN needs one of its own")
            self._cameras = {f"rgb_{camera.name}": camera for camera in self._env.cameras}
            self._env.cameras = []  # else every step renders
        self._env.seed(0)
        self._env.scene.np_random = self._env.np_random
        self._env.load()
        self._env.robot.gripper_action = 1  # else the last command of the chain before shows in the first observation

    def _ask(self) -> None:
        """The next part begins: its words, its step count, and the state that success is measured from."""
        self.instruction, self.renewed, self._part = self._words[self._done], True, 0
        self._expert, self._start = None, self._env.get_info()

    def step(self, action: np.ndarray) -> Observation:
        """Carry out one action (7,); of the gripper's number only the sign counts: above 0 opens."""
        taken = np.array(action, float)  # a copy: one commit of calvin_env changes what it is given
        taken[6] = 1.0 if taken[6] > 0 else -1.0
        *_, info = self._env.step(taken)
        self._steps, self._part, self.renewed = self._steps + 1, self._part + 1, False
        if self._checkout.oracle.get_task_info_for_set(self._start, info, {self._tasks[self._done]}):
            self._done += 1
            if self._done < len(self._tasks):
                self._ask()
            else:
                self.running = False
        elif self._part >= STEP_LIMIT:
            self.running = False
        return self._observe()

    def outcome(self) -> dict[str, Any]:
        whole = self._done == len(self._tasks)
        return {
            "success": whole, "success_last": whole, "success_ever": whole, "steps": self._steps,
            "partial": round(self._done / len(self._tasks), 4), "chain": self._done if len(self._tasks) > 1 else None,
            "note": f"calvin_env {self._checkout.commit[:7]}, {self._renderer} renderer",
        }  # fmt: skip

    def expert(self) -> np.ndarray:
        """The expert's action (7,); standing still where there is none for the present task."""
        task = self._tasks[min(self._done, len(self._tasks) - 1)]
        robot = self._env.robot
        if task not in scripted.TASKS:
            return np.array([0.0] * 6 + [float(robot.gripper_action)])
        commanded, tool = (
            np.concatenate([robot.target_pos, robot.target_orn]),
            self._env.get_state_obs()["robot_obs"][:3],
        )
        if self._expert is None or self._expert.finished:  # not solved: once more, from where things are now
            self._expert = scripted.Expert(scripted.waypoints(task, self._layout()))
        return self._expert.act(commanded, tool)

    def _layout(self) -> scripted.Layout:
        p, env = self._env.p, self._env
        table = env.scene.fixed_objects[0]
        box = {name: np.array(p.getAABB(table.uid, link)) for name, link in table.info_dict["links"].items()}
        blocks = {
            body.name.removeprefix("block_"): body.get_state()[[0, 1, 2, 5]] for body in env.scene.movable_objects
        }
        tool = env.get_state_obs()["robot_obs"][:3]
        return scripted.Layout(tool, box["button_link"], box["drawer_link"], box["slide_link"], blocks)

    def _practice_scene(self, task: str, rng: np.random.Generator) -> np.ndarray:
        """scene_obs (24,) in which `task` can be asked: doors, lights and blocks at random."""
        surfaces, names = self._env.scene.surfaces, [body.name for body in self._env.scene.movable_objects]
        obs = np.zeros(24)
        slider, drawer, bulb, led = rng.integers(2, size=4)
        slider = {"move_slider_left": 0, "move_slider_right": 1}.get(task, slider)
        drawer = {"open_drawer": 0, "close_drawer": 1}.get(task, drawer)
        led = {"turn_on_led": 0, "turn_off_led": 1}.get(task, led)
        table = self._env.scene.fixed_objects[0]
        most = self._env.p.getJointInfo(table.uid, table.info_dict["links"]["slide_link"])[
            9
        ]  # its range differs by scene
        obs[:2] = slider * min(chains.SLIDER_OPEN, most), drawer * chains.DRAWER_OPEN
        obs[3:6] = bulb * chains.SWITCH_ON, bulb, led
        wanted = f"block_{task.split('_')[1]}" if task.startswith("lift") else ""
        placed: list[np.ndarray] = []
        for name in sorted(names, key=lambda name: name != wanted):
            for _ in range(1000):
                where = "table" if name == wanted else str(rng.choice(list(surfaces)))
                at = rng.uniform(*np.array(surfaces[where]))
                if all(np.abs(at[:2] - other[:2]).max() > 0.11 for other in placed):
                    break
            placed.append(at)
            k = 6 + 6 * names.index(name)
            obs[k : k + 3], obs[k + 5] = at, np.pi / 2 + rng.uniform(-np.pi / 8, np.pi / 8)
        return obs

    def _wander(self, rng: np.random.Generator) -> None:
        """The arm as an earlier task may have left it; a button that agrees with its lamp (one commit's does not)."""
        for button in self._env.scene.buttons:
            button.state = type(button.state)(button.light.get_state())
        goal = np.array(chains.ROBOT_START[:3]) + rng.uniform((-0.12, -0.08, -0.03), (0.12, 0.06, 0.06))
        is_open, robot = bool(rng.integers(2)), self._env.robot
        guide = scripted.Expert([scripted.Waypoint(tuple(goal), is_open, scripted.YAW + rng.uniform(-0.3, 0.3))])
        for _ in range(25):
            pose = np.concatenate([robot.target_pos, robot.target_orn])
            self._env.step(guide.act(pose, goal))

    def _observe(self) -> Observation:
        return Observation(np.asarray(self._env.get_state_obs()["robot_obs"], float), self._render)

    def _render(self, camera: str) -> np.ndarray:
        return np.array(self._cameras[camera].render()[0], np.uint8, order="C")

    def depth(self, camera: str) -> np.ndarray:
        """Depth (H, W) float32 in m by the camera whose pictures are called `camera`."""
        return np.asarray(self._cameras[camera].render()[1], np.float32)

    def scene_state(self) -> np.ndarray:
        """calvin_env's scene_obs (24,): doors, button, switch, lights, and the blocks in the order of the scene."""
        return np.asarray(self._env.get_state_obs()["scene_obs"], float)

    def snapshot(self) -> np.ndarray:
        """Proprioception, pose of the gripper's camera, lights, joints of arm and table, poses of the blocks."""
        p, env = self._env.p, self._env
        eye = p.getLinkState(env.robot.robot_uid, self._cameras["rgb_gripper"].gripper_cam_link)[:2]
        joints = [p.getJointState(uid, joint)[0] for uid, joint in self._joints()]
        bodies = [
            number
            for body in env.scene.movable_objects
            for part in p.getBasePositionAndOrientation(body.uid)
            for number in part
        ]
        lit = [lamp.get_state() for lamp in env.scene.lights]
        return np.array([*env.get_state_obs()["robot_obs"], *eye[0], *eye[1], *lit, *joints, *bodies])

    def recall(self, snapshot: np.ndarray) -> Observation:
        p, scene, joints = self._env.p, self._env.scene, self._joints()
        state, eye, lit, rest = np.split(snapshot, [15, 22, 24])
        for (uid, joint), value in zip(joints, rest, strict=False):
            p.resetJointState(uid, joint, value)
        for body, pose in zip(scene.movable_objects, rest[len(joints) :].reshape(-1, 7), strict=True):
            p.resetBasePositionAndOrientation(body.uid, pose[:3], pose[3:])
        for lamp, value in zip(scene.lights, lit, strict=True):
            lamp.reset(int(value))

        def render(camera: str) -> np.ndarray:
            # Live, PyBullet's link poses lag a substep behind the joints; the gripper's camera keeps the live one.
            return self._through(eye) if camera == "rgb_gripper" else self._render(camera)

        return Observation(state, render)

    def _through(self, eye: np.ndarray) -> np.ndarray:
        """The gripper's picture from a pose (7,) of its link: along the link's y, with z down."""
        p, camera = self._env.p, self._cameras["rgb_gripper"]
        _, along, down = np.array(p.getMatrixFromQuaternion(eye[3:])).reshape(3, 3).T
        view = p.computeViewMatrix(eye[:3], eye[:3] + along, -down)
        lens = p.computeProjectionMatrixFOV(camera.fov, camera.aspect, camera.nearval, camera.farval)
        pixels = p.getCameraImage(camera.width, camera.height, view, lens)[2]
        return np.array(np.reshape(pixels, (camera.height, camera.width, 4))[..., :3], np.uint8, order="C")

    def _joints(self) -> list[tuple[int, int]]:
        p = self._env.p
        bodies = [self._env.robot.robot_uid, *(body.uid for body in self._env.scene.fixed_objects)]
        return [(uid, joint) for uid in bodies for joint in range(p.getNumJoints(uid))]

    def close(self) -> None:
        if self._env is not None:
            with quiet():
                self._shut()
            self._env, self.domain = None, ""
