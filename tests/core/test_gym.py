"""The gymnasium form of the tabletop world: found by name, accepted by gymnasium's own checker, vectorised."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import vlm4vla_core.sims.gym  # noqa: F401 (the import registers the environment)
from vlm4vla_core.errors import InputError
from vlm4vla_core.sims.benchmarks import is_evaluation_seed

NAME = "vlm4vla/Tabletop-v0"


def test_gymnasium_accepts_it() -> None:
    env = gymnasium.make(NAME, task="pick", image_size=32, render_mode="rgb_array")
    check_env(env.unwrapped, skip_render_check=False)


def test_the_expert_earns_one_reward_and_ends_the_episode() -> None:
    env = gymnasium.make(NAME, task="put", image_size=32)
    seen, _ = env.reset(seed=3)
    assert seen["image"].shape == (32, 32, 3) and "plate" in seen["instruction"]
    rewards, ended = [], False
    while not ended:
        _, reward, terminated, truncated, info = env.step(env.unwrapped.expert())
        rewards.append(reward)
        ended = terminated or truncated
    assert terminated and info["success"] and sum(rewards) == 1 == rewards[-1]
    assert not is_evaluation_seed(env.unwrapped._env.seeds[0])


def test_a_chain_pays_for_every_part_and_a_late_one_is_cut_off() -> None:
    env = gymnasium.make(NAME, task="chain", image_size=32)
    env.reset(seed=1)
    total, ended = 0.0, False
    while not ended:
        action = env.unwrapped.expert() if total < 2 else np.zeros(7, np.float32)
        _, reward, terminated, truncated, info = env.step(action)
        total, ended = total + reward, terminated or truncated
    assert total == info["chain"] and 2 <= total < 5 and truncated and not terminated


def test_the_same_seed_is_the_same_episode_and_it_vectorises() -> None:
    a, b = (gymnasium.make(NAME, task="touch", image_size=32).reset(seed=9)[0] for _ in range(2))
    np.testing.assert_array_equal(a["image"], b["image"])
    envs = gymnasium.make_vec(NAME, num_envs=3, vectorization_mode="sync", task="touch", image_size=32)
    seen, _ = envs.reset(seed=9)
    np.testing.assert_array_equal(seen["image"][0], a["image"])
    seen, reward, *_ = envs.step(envs.action_space.sample())
    assert seen["image"].shape == (3, 32, 32, 3) and reward.shape == (3,)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="no 'tuoch'; did you mean 'touch'"):
        gymnasium.make(NAME, task="tuoch")
