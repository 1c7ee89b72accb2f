"""The tabletop world as a gymnasium environment.

    import gymnasium, vlm4vla_core.sims.gym          # the import registers it
    env = gymnasium.make("vlm4vla/Tabletop-v0", task="pick")

One observation holds the picture, the hand's state and the instruction; the reward is 1 at the step at which the goal
is reached, and the episode ends there. Both of gymnasium's vectorised forms (sync, async) give all three.

Trap: `reset(seed=…)` draws scenes that are neither evaluation nor recording seeds, so what is learnt or tuned here has
not seen either; a protocol's episodes are run by `vlm4vla evaluate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import read_from_shared_memory

from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.sims.tabletop import world
from vlm4vla_core.sims.tabletop.env import CHAIN_TASK, BatchedEnv, step_limit
from vlm4vla_core.sims.tabletop.looks import LOOKS
from vlm4vla_core.sims.tabletop.scenes import LONG
from vlm4vla_core.sims.tabletop.tasks import TASKS

_PLAY_BIT = 1 << 50  # evaluation seeds have bit 48 set, recording seeds neither


class Words(spaces.Text):
    """Text that may change: gymnasium's AsyncVectorEnv reads text from its shared memory only once, when it is made."""


class _Shared(Sequence[str]):
    """The words of n environments as they stand in the shared memory now; a copy is a tuple of str."""

    def __init__(self, space: Words, memory: Any, n: int) -> None:
        self._read = lambda: read_from_shared_memory.dispatch(spaces.Text)(space, memory, n)
        self._n = n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: Any) -> Any:
        return self._read()[index]

    def __deepcopy__(self, memo: dict[int, Any]) -> tuple[str, ...]:
        return tuple(self._read())


@read_from_shared_memory.register(Words)
def _read_words(space: Words, memory: Any, n: int = 1) -> _Shared:
    return _Shared(space, memory, n)


class Tabletop(gymnasium.Env):
    """observation: image uint8 (H, W, 3), state float32 (7,) (see `world.proprioception`), instruction text.
    action: float32 (7,) in the `TABLETOP` convention, in metres and radians; the gripper opens above 0.5.
    info: success, steps, chain, partial. Raises InputError on an unknown task, domain or camera, and on a bad size.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012 (gymnasium's own form)

    def __init__(
        self,
        task: str = "touch",
        domains: tuple[str, ...] = ("A", "B", "C"),
        image_size: int = 112,
        camera: str = "front",
        render_mode: str | None = None,
    ) -> None:
        from vlm4vla_core.sims.tabletop.render import CAMERAS

        for value, known in ((task, (*TASKS, *LONG, CHAIN_TASK)), (camera, CAMERAS), *((d, LOOKS) for d in domains)):
            if value not in known:
                raise InputError(f"the tabletop world has no '{value}'", fix=nearest(value, known))
        if image_size < 16 or not domains:
            raise InputError(f"{len(domains)} domains, {image_size} px", fix="give a domain and at least 16 px")
        self.task, self.domains, self.image_size, self.camera = task, tuple(domains), image_size, camera
        self.render_mode = render_mode
        high = np.array([0.32, 0.32, 0.4, np.pi, np.pi, np.pi, 1], np.float32)
        low = np.where([0, 0, 1, 0, 0, 0, 1], np.float32(0), -high)
        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, (image_size, image_size, 3), np.uint8),
                "state": spaces.Box(low, high),
                "instruction": Words(120, charset="abcdefghijklmnopqrstuvwxyz "),
            }
        )
        limit = np.array([world.MAX_STEP] * 3 + [world.MAX_TURN] * 3, np.float32)  # roll and pitch do nothing
        self.action_space = spaces.Box(np.append(-limit, np.float32(0)), np.append(limit, np.float32(1)))
        self._env: BatchedEnv | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        scene = _PLAY_BIT | int(self.np_random.integers(1 << 48))
        domain = self.domains[int(self.np_random.integers(len(self.domains)))]
        self._env = BatchedEnv([self.task], [scene], [domain], self.image_size)
        return self._observation(), self._env.outcome(0)

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        assert self._env is not None, "reset first"
        done = int(self._env.done[0])
        self._env.step(np.asarray(action, np.float64)[None])
        outcome = self._env.outcome(0)
        ended = not self._env.running[0]
        reward = float(self._env.done[0] > done if self.task == CHAIN_TASK else outcome["success"] and ended)
        success = bool(outcome["success"])
        return self._observation(), reward, ended and success, ended and not success, outcome

    def render(self) -> np.ndarray | None:
        """The camera's picture, uint8 (H, W, 3)."""
        return self._picture() if self.render_mode == "rgb_array" else None

    def expert(self) -> np.ndarray:
        """The scripted expert's action (7,), float32."""
        assert self._env is not None, "reset first"
        return self._env.expert()[0].astype(np.float32)

    def _picture(self) -> np.ndarray:
        assert self._env is not None, "reset first"
        return self._env.observe(camera=self.camera)[0]

    def _observation(self) -> dict[str, Any]:
        assert self._env is not None
        state = world.proprioception(self._env.state)[0]
        return {"image": self._picture(), "state": state, "instruction": self._env.instructions[0]}


gymnasium.register(
    "vlm4vla/Tabletop-v0",
    entry_point="vlm4vla_core.sims.gym:Tabletop",
    max_episode_steps=max(map(step_limit, (*TASKS, *LONG, CHAIN_TASK))),
)
