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


@pytest.mark.parametrize("options", [{"task": "pick"}, {"task": "chain", "camera": "wrist"}, {"task": "two-plates"}])
def test_gymnasium_accepts_it_without_a_warning(options: dict[str, str], recwarn: pytest.WarningsRecorder) -> None:
    env = gymnasium.make(NAME, image_size=32, render_mode="rgb_array", **options)
    check_env(env.unwrapped, skip_render_check=False)
    assert not [str(warning.message) for warning in recwarn if "gymnasium" in str(warning.filename)]


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
    """One after the other, and in processes of their own: pictures, states and, as they change, words."""
    alone = [gymnasium.make(NAME, task="touch", image_size=32) for _ in range(3)]
    vectors = [
        gymnasium.make_vec(NAME, num_envs=3, vectorization_mode=mode, task="touch", image_size=32)
        for mode in ("sync", "async")
    ]
    first = [env.reset(seed=9 + i)[0] for i, env in enumerate(alone)]
    starts = [envs.reset(seed=9)[0] for envs in vectors]
    for seen in starts:
        np.testing.assert_array_equal(seen["image"], [one["image"] for one in first])
        assert tuple(seen["instruction"]) == tuple(one["instruction"] for one in first)
    words = set(starts[0]["instruction"])
    for t in range(25):  # each episode ends and begins anew
        actions = np.random.default_rng(t).uniform(-0.06, 0.06, (3, 7)).astype(np.float32)
        one, other = (envs.step(actions) for envs in vectors)
        for name in ("image", "state"):
            np.testing.assert_array_equal(one[0][name], other[0][name])
        assert tuple(one[0]["instruction"]) == tuple(other[0]["instruction"])
        np.testing.assert_array_equal(one[1:4], other[1:4])
        words |= set(one[0]["instruction"])
    assert len(words) > 3 and one[0]["image"].shape == (3, 32, 32, 3) and one[1].shape == (3,)
    for envs in vectors:
        envs.close()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="no 'tuoch'; did you mean 'touch'"):
        gymnasium.make(NAME, task="tuoch")
    with pytest.raises(InputError, match="0 domains, 8 px"):
        gymnasium.make(NAME, domains=(), image_size=8)
