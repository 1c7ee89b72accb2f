"""CALVIN in the real simulator, from the checkout that CALVIN_ROOT names: resets, repetition, experts, recordings.

Needs PyBullet: `make venv-calvin`, then run this file in that environment, or in .venv, where it is found too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from vlm4vla_core.errors import InputError
from vlm4vla_core.sims.calvin import PROTOCOLS, chains, expert, layout
from vlm4vla_core.sims.simulator import packages, where

BENCH = PROTOCOLS["calvin-abc-d@1"]
if not os.environ.get("CALVIN_ROOT"):
    pytest.skip("CALVIN_ROOT is not set: it names a checkout of mees/calvin", allow_module_level=True)
if gone := BENCH.missing():
    pytest.skip(f"CALVIN cannot run here: {gone[0]}", allow_module_level=True)
LAYER = ""
if where("pybullet_utils", "calvin") != "here":  # the layer holds nothing that .venv holds too
    LAYER = str(packages("calvin", "pybullet_utils")[0].parent)
    sys.path.append(LAYER)


@pytest.fixture(scope="module")
def world() -> Iterator[Any]:
    made = BENCH.make({"renderer": "tiny"})
    yield made
    made.close()


def chains_that_begin_with(task: str, count: int) -> list[int]:
    return [k for k, chain in enumerate(chains.official_chains()) if chain.tasks[0] == task][:count]


def wander(world: Any, chain: int, steps: int, look: bool = False) -> np.ndarray:
    """States (steps + 1, 39) of a chain under random actions that belong to its number; look: render at each step."""
    rng = np.random.default_rng(chain)
    seen, _ = world.reset("chain", chain)
    states = [np.concatenate([seen.state, world.scene_state()])]
    for _ in range(steps):
        seen = world.step(rng.uniform(-1, 1, 7))
        if look:
            seen.render("rgb_static")
        states.append(np.concatenate([seen.state, world.scene_state()]))
    return np.array(states)


def part(world: Any, most: int = 200) -> int:
    """Lets the expert do the first part of what is asked; the steps that it took."""
    while world.running and world.outcome()["partial"] == 0 and world.outcome()["steps"] < most:
        world.step(world.expert())
    assert world.outcome()["partial"] > 0, world.instruction
    return world.outcome()["steps"]


# --- resets and repetition --------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", [0, 1, 2, 500, 999])
def test_a_reset_comes_back_as_asked(world, chain):
    """Measured on the benchmark itself: robot within 3e-6, scene within 4e-3 (one settling step)."""
    seen, words = world.reset("chain", chain)
    robot, scene = chains.reset_state(chains.official_chains()[chain].state)
    np.testing.assert_allclose(seen.state, robot, atol=1e-5)
    np.testing.assert_allclose(world.scene_state(), scene, atol=5e-3)
    assert words == world.instruction and len(words) > 10 and world.renewed and world.running


def test_the_same_chain_is_bit_identical_in_any_order(world):
    first = wander(world, 3, 60)
    wander(world, 8, 40)
    world.reset("turn_on_led", 0, practice=True)
    part(world)
    again = wander(world, 3, 60)
    assert np.array_equal(first, again)
    assert not np.array_equal(first[:41], wander(world, 8, 40))


def test_looking_changes_nothing(world):
    assert np.array_equal(wander(world, 5, 15), wander(world, 5, 15, look=True))


def test_a_finished_chain_leaves_no_finger_command_behind(world):
    world.reset("chain", 0)
    for _ in range(3):
        world.step(np.array([0.0] * 6 + [-1]))
    seen, _ = world.reset("chain", 1)
    assert seen.state[14] == 1


def test_actions_are_copied_and_the_gripper_goes_by_its_sign(world):
    world.reset("chain", 0)
    action = np.array([0.5, 0, 0, 0, 0, 0.5, 0.01], np.float32)
    kept = action.copy()
    assert world.step(action).state[14] == 1 and np.array_equal(action, kept)
    assert world.step(np.array([0, 0, 0, 0, 0, 0, -0.3])).state[14] == -1
    assert world.step(np.zeros(7)).state[14] == -1


def test_one_unit_of_action_is_two_centimetres_and_a_twentieth_of_a_radian(world):
    before, _ = world.reset("chain", 0)
    for _ in range(5):
        world.step(np.array([0.5, -0.25, 0.5, 0, 0, 1.0, 1]))
    for _ in range(15):
        after = world.step(np.array([0.0] * 6 + [1]))
    np.testing.assert_allclose((after.state - before.state)[:3], [0.05, -0.025, 0.05], atol=3e-3)
    assert (after.state - before.state)[5] == pytest.approx(0.25, abs=0.02)


def test_a_moment_is_recalled_with_its_very_pictures(world):
    world.reset("turn_on_led", 1, practice=True)
    kept = []
    while world.running:
        seen = world.step(world.expert())
        if world.outcome()["steps"] % 8 == 0 or not world.running:
            pictures = {camera: seen.render(camera) for camera in BENCH.cameras}
            kept.append((world.snapshot(), seen.state, pictures))
    for snapshot, state, pictures in kept:
        again = world.recall(snapshot)
        assert np.array_equal(again.state, state)
        for camera, picture in pictures.items():
            assert np.array_equal(again.render(camera), picture), camera
    assert not np.array_equal(kept[0][2]["rgb_static"], kept[-1][2]["rgb_static"])


def test_a_lamp_shows_where_a_pinhole_camera_would_show_it(world):
    """The static camera's pose through the textbook projection: the picture is upright, not mirrored, of its size."""
    world.reset("chain", 0)
    lit, dark = (world.snapshot() for _ in range(2))
    lit[23], dark[23] = 1, 0  # proprioception 15, camera 7, then the bulb and the LED
    shown, other = (world.recall(moment).render("rgb_static").astype(int) for moment in (lit, dark))
    rows, columns = np.nonzero(np.abs(shown - other).sum(2) > 60)
    camera = world._checkout.config("D").cameras.static
    eye, target, up = (np.array(camera[name]) for name in ("look_from", "look_at", "up_vector"))
    ahead = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(ahead, up) / np.linalg.norm(np.cross(ahead, up))
    away = np.array([-0.12, 0.16, 0.656]) - eye  # the middle of the LED in scene D, m
    focal = 100 / np.tan(np.radians(camera.fov) / 2)
    at = 100 + focal * np.array([away @ np.cross(ahead, right), away @ right]) / (away @ ahead)
    np.testing.assert_allclose([rows.mean(), columns.mean()], at, atol=4)
    assert shown[rows, columns, 1].mean() > shown[rows, columns, 0].mean() + 50  # green
    gripper = world.recall(lit).render("rgb_gripper")
    assert (shown.shape, gripper.shape, gripper.dtype) == ((200, 200, 3), (84, 84, 3), np.uint8)


# --- chains -----------------------------------------------------------------------------------------------


def test_a_chain_goes_on_after_success_and_ends_at_the_first_failure(world):
    chain = next(k for k, one in enumerate(chains.official_chains()) if one.tasks[0] == "open_drawer" and
                 one.tasks[1] not in expert.TASKS)  # fmt: skip
    _, words = world.reset("chain", chain)
    assert words == "pull the handle to open the drawer"
    took = part(world)
    assert world.renewed and world.running and world.instruction != words
    world.step(np.array([0.0] * 6 + [1]))
    assert not world.renewed
    while world.running:
        world.step(np.array([0.0] * 6 + [1]))
    told = world.outcome()
    assert (told["chain"], told["partial"], told["success"]) == (1, 0.2, False) and told["steps"] == took + 360
    assert "tiny renderer" in told["note"] and len(told["note"].split()[1]) >= 7


def test_what_is_not_there_is_refused(world):
    with pytest.raises(InputError, match="no chain number 1000"):
        world.reset("chain", 1000)
    with pytest.raises(InputError, match="stack_block"):
        world.reset("stack_block", 0, practice=True)
    with pytest.raises(InputError, match="no task 'open_drawer'"):
        world.reset("open_drawer", 0)


# --- experts and recordings -------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "steps"), [("turn_on_led", 30), ("open_drawer", 60), ("close_drawer", 80)])
def test_led_and_drawer_experts_five_of_five_in_scene_d(world, task, steps):
    for chain in chains_that_begin_with(task, 5):
        world.reset("chain", chain)
        assert part(world) <= steps


@pytest.mark.slow
@pytest.mark.parametrize("task", expert.TASKS)
def test_experts_five_of_five_in_scene_d(world, task):
    for chain in chains_that_begin_with(task, 5):
        world.reset("chain", chain)
        part(world)


@pytest.mark.slow
@pytest.mark.parametrize("scene", ["A", "B", "C"])
def test_experts_five_of_five_in_the_training_scenes(world, scene):
    for task in expert.TASKS:
        for seed in range(5):
            world.practise(task, seed, scene)
            assert world.domain == scene
            part(world)


def test_a_recording_in_calvins_layout_is_read_back(tmp_path, world):
    """Written by a simulation of its own here; every number that the reader gives is CALVIN's relation of the poses."""
    from vlm4vla_core.episodes.calvin import open_calvin

    world.close()  # one simulation per process; it opens again when it is needed
    tasks = ("turn_on_led", "turn_off_led")
    args = layout.Args(tmp_path, training=3, validation=1, tasks=tasks, depth=True)
    frames = layout.record(args)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/episode_*.npz")}
    assert layout.record(args) == frames == len(before)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # issued again: nothing is made twice
    source = open_calvin(tmp_path, depth=True)
    assert source.splits == ("train", "val")
    read = [one for unit in source.units(source.splits) for one in source.episodes(unit, source.cameras, "calvin_rel")]
    assert [one.info["scene"] for one in read] == ["A", "B", "C", "D"]
    assert [one.info["task"] for one in read] == [*tasks, "turn_on_led", "turn_on_led"]
    assert [one.split for one in read] == ["train", "train", "train", "val"]
    assert sum(len(one.action) for one in read) == frames
    for one in read:
        moved = one.state[1:, :3] - one.state[:-1, :3]
        np.testing.assert_allclose(one.action[:-1, :3] * 0.02, np.clip(moved, -0.02, 0.02), atol=1e-7)
        assert set(np.unique(one.action[:, 6])) == {-1.0} and one.images["rgb_static"].std() > 10
        assert 2000 < np.median(one.depth["rgb_static"]) < 6000  # mm: the camera stands 4 m away
    with pytest.raises(InputError, match="other settings"):
        layout.record(layout.Args(tmp_path, training=3, validation=1, tasks=tasks[:1]))


# --- through the pool -------------------------------------------------------------------------------------


def test_two_chains_are_the_same_rows_with_one_worker_and_with_two(tmp_path, monkeypatch):
    from vlm4vla_core.evaluation import Plan, evaluate

    if LAYER:  # it is on this process's path, so the workers are started with this Python
        monkeypatch.setenv("PYTHONPATH", LAYER)
    rows = []
    for workers in (1, 2):
        plan = Plan("random", "calvin-abc-d@1", episodes=2)
        found = evaluate(plan, tmp_path / str(workers), workers=workers)
        rows.append(found.sort_values("episode").drop(columns="wall_s").reset_index(drop=True))
    assert rows[0].equals(rows[1]) and rows[0]["steps"].min() >= 360
    assert list(rows[0]["episode"]) == [0, 1] and set(rows[0]["protocol"]) == {"calvin-abc-d@1"}
    assert rows[0]["note"].str.contains("tiny renderer").all()
