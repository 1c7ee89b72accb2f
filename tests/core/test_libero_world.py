"""LIBERO's real physics, in LIBERO's own environment (`make venv-libero`), on assets named by VLM4VLA_SIM_ASSETS.

Run:  .venv-libero/bin/python -m pytest -q -p no:cacheprovider tests/core/test_libero_world.py
"""

from __future__ import annotations

import os
import shutil
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vlm4vla_core.errors import InputError
from vlm4vla_core.sims import simulators

if util.find_spec("libero") is None:
    pytest.skip("libero is not installed here: make venv-libero", allow_module_level=True)
if simulators()["libero-spatial@1"].missing():
    what = "VLM4VLA_SIM_ASSETS names no folder with libero/assets, or there is no renderer"
    pytest.skip(what, allow_module_level=True)

REST = np.array([0.0, 0, 0, 0, 0, 0, -1])


def bench(name: str = "libero-spatial@1") -> Any:
    return simulators()[name]


@pytest.fixture(scope="module")
def sim() -> Any:
    world = bench().make({"antialias": "off", "size": 128})
    yield world
    world.close()


def hand(sim: Any) -> tuple[np.ndarray, np.ndarray]:
    """Position (3,) and rotation matrix of the hand now, by MuJoCo itself (a step leaves them one inner step old)."""
    inner = sim._env.sim
    inner.forward()
    site = inner.model.site_name2id("gripper0_grip_site")
    return np.array(inner.data.site_xpos[site]), np.array(inner.data.site_xmat[site]).reshape(3, 3)


def test_what_an_action_commands_is_what_the_controller_aims_at(sim: Any) -> None:
    """To 1e-6: 0.4 is 2 cm in the base's axes, 0.2 is 0.1 rad about them, turned on the base's side."""
    sim.reset("0", 0)
    for axis in range(6):
        place, turn = hand(sim)
        action = REST.copy()
        action[axis] = 0.4 if axis < 3 else 0.2
        sim.step(action)
        controller, expected = sim._env.robots[0].controller, np.zeros(3)
        expected[axis % 3] = 0.02 if axis < 3 else 0.1
        if axis < 3:
            np.testing.assert_allclose(controller.goal_pos - place, expected, atol=1e-6)
        else:
            aimed = Rotation.from_matrix(controller.goal_ori @ turn.T).as_rotvec()
            np.testing.assert_allclose(aimed, expected, atol=1e-6)


@pytest.mark.parametrize("axis", range(3))
def test_a_commanded_way_of_2_cm_is_gone(sim: Any, axis: int) -> None:
    """Commands of what is left of 2 cm along one axis of the base end 2 cm further along it."""
    sim.reset("0", 0)
    start, _ = hand(sim)
    goal = start + 0.02 * np.eye(3)[axis]
    for _ in range(25):
        seen = sim.step([*((goal - hand(sim)[0]) / 0.05), 0, 0, 0, -1])
    np.testing.assert_allclose(hand(sim)[0] - start, 0.02 * np.eye(3)[axis], atol=1e-3)
    np.testing.assert_allclose(seen.state[:3], hand(sim)[0], atol=1e-3)  # the state is the hand's position


def test_a_commanded_turn_is_made_and_the_state_tells_it(sim: Any) -> None:
    for axis in range(3):
        sim.reset("0", 0)
        before = hand(sim)[1]
        action = REST.copy()
        action[3 + axis] = 0.2
        sim.step(action)
        for _ in range(10):
            seen = sim.step(REST)
        turn = Rotation.from_matrix(hand(sim)[1] @ before.T).as_rotvec()
        np.testing.assert_allclose(turn, 0.1 * np.eye(3)[axis], atol=5e-3)
        told = Rotation.from_rotvec(seen.state[3:6]).as_matrix()
        measured = Rotation.from_quat(sim._seen["robot0_eef_quat"]).as_matrix()
        np.testing.assert_allclose(told, measured, atol=1e-6)


def test_minus_one_opens_and_plus_one_closes(sim: Any) -> None:
    sim.reset("0", 0)
    widths = []
    for grip in (1.0, -1.0):
        for _ in range(15):
            seen = sim.step([0, 0, 0, 0, 0, 0, grip])
        widths.append(seen.state[6] - seen.state[7])
    assert widths[0] < 0.01 and widths[1] > 0.07


def test_pictures_show_the_hand_where_the_camera_sees_it(sim: Any) -> None:
    """What changes when the hand moves lies where a pinhole camera projects the hand; left and right are changed as in
    the data sets (a half turn of a picture that was only upside down)."""
    seen, words = sim.reset("0", 0)
    assert words == "pick up the black bowl between the plate and the ramekin and place it on the plate"
    inner = sim._env.sim
    camera = inner.model.camera_name2id("agentview")
    focal = 64 / np.tan(np.radians(inner.model.cam_fovy[camera]) / 2)
    before, centres = seen.render("agentview_rgb").astype(float), []
    assert before.shape == (128, 128, 3) and before.std() > 20
    for _ in range(12):
        seen = sim.step([0, 1.0, 0, 0, 0, 0, -1])
    place = hand(sim)[0] + [0, 0, 0.08]  # the middle of the hand's body
    x, y, z = np.array(inner.data.cam_xmat[camera]).reshape(3, 3).T @ (place - inner.data.cam_xpos[camera])
    column, row = 64 - focal * x / -z, 64 - focal * y / -z
    changed = np.abs(seen.render("image").astype(float) - before).max(2) > 60
    centres = np.argwhere(changed)
    near = np.hypot(centres[:, 0] - row, centres[:, 1] - column)
    assert len(centres) > 30 and np.quantile(near, 0.25) < 14
    mirrored = np.hypot(centres[:, 0] - row, centres[:, 1] - (127 - column))
    assert np.quantile(mirrored, 0.25) > np.quantile(near, 0.25) + 3
    wrist = seen.render("eye_in_hand_rgb")
    assert wrist.std() > 10 and not np.array_equal(wrist, seen.render("wrist_image")[::-1])


def test_episodes_repeat_in_any_order_and_pictures_change_nothing(sim: Any) -> None:
    def play(episode: int, look: bool) -> np.ndarray:
        rng = np.random.default_rng(episode)
        seen, _ = sim.reset("0", episode)
        for step in range(12):
            if look and step % 5 == 0:
                seen.render("agentview_rgb")
            seen = sim.step(np.append(rng.uniform(-1, 1, 6), -1))
        return sim.snapshot()

    first, other, again = play(0, False), play(1, True), play(0, True)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01
    starts = [sim.reset("0", number, practice=True)[0].state.tolist() and sim.snapshot() for number in (0, 1, 0)]
    np.testing.assert_array_equal(starts[0], starts[2])
    fixed = [state[1:10] for state in sim._states]  # no practice scene is an evaluation's
    assert np.abs(starts[0] - starts[1]).max() > 1e-3
    bowls = [np.linalg.norm(np.array(sim._states)[:, 10:12] - start[10:12], axis=1).min() for start in starts[:2]]
    assert len(fixed) == 50 and min(bowls) > 1e-6


def test_the_policy_may_act_while_the_world_settles(sim: Any) -> None:
    """The authors' loop: five waiting steps among the first ten; 225 steps of the policy's in the limit of 230."""
    acting = bench().make({"settle": "acting", "antialias": "off", "size": 64, "crop": 0.9})
    seen, _ = acting.reset("0", 0)
    assert seen.render("image").shape == (61, 61, 3)  # 0.9 of the area
    calls, original = [], acting._env.step
    acting._env.step = lambda action: (calls.append(bool(np.array_equal(action, REST))), original(action))[1]
    up = np.array([0, 0, 0.1, 0, 0, 0, -1])
    steps = 0
    while acting.running and steps < 7:
        acting.step(up)
        steps += 1
    assert calls == [False, True, False, True, False, True, False, True, False, False, False]
    acting._steps = 224
    acting.step(up)
    assert not acting.running and acting.outcome()["steps"] == 225
    acting.close()


def test_missing_files_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm4vla_core.sims.libero import assets

    real = assets.folder()
    assert real is not None
    place = tmp_path / "libero" / "assets"
    shutil.copytree(real, place, copy_function=os.symlink)
    gone = [next(place.rglob(name)) for name in ("akita_black_bowl_vis.msh", "plate.xml")]
    gone[0].unlink()
    monkeypatch.setenv("VLM4VLA_SIM_ASSETS", str(tmp_path))
    world = bench().make({})
    assert world.note == ""  # no manifest of stand-ins lies beside these
    with pytest.raises(InputError, match=r"1 asset files of task 0 .*visual/akita_black_bowl_vis\.msh"):
        world.reset("0", 0)
    gone[1].unlink()
    with pytest.raises(InputError, match=r"plate\.xml"):
        world.reset("0", 0)


def test_the_expert_does_a_task_and_it_is_recorded_and_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One episode for real, through the verbs: rows, film, and a store of one demonstration."""
    import pandas as pd

    from vlm4vla_core.cli import main
    from vlm4vla_core.episodes.store import EpisodeStore

    words = ["--tasks", "0", "--options", "antialias=off", "size=64", "--workers", "1"]
    out = ["--episodes", "1", "--out", str(tmp_path / "rows")]
    assert main(["evaluate", "scripted", "--benchmark", "libero-spatial@1", *words, *out]) == 0
    told = capfd.readouterr().out
    assert "1 of 50 initial states" in told and "settle=still" in told and "libero-spatial@1, 1 of its 10 tasks" in told
    row = pd.read_parquet(tmp_path / "rows" / "rows.parquet").iloc[0]
    assert row["success"] and row["success_last"] and row["success_ever"] and row["partial"] == 1
    assert 40 < row["steps"] < 200 and row["env_seed"] == 0
    stand_in = "stand-in assets" in row["note"]
    assert stand_in == ("stand-in assets" in told)
    store = tmp_path / "store"
    assert main(["record", "libero-spatial@1", *words, "--episodes", "1", "--out", str(store)]) == 0
    opened = EpisodeStore.open(store)
    assert opened.cameras == ("agentview_rgb",) and len(opened.lengths) == 1 and opened.lengths[0] > 40
    assert opened.episodes["made_by"][0] == "scripted" + "; stand-in assets" * stand_in
    first, last = opened.images("agentview_rgb", [0, len(opened) - 1])
    assert first.shape == (64, 64, 3) and np.abs(first.astype(int) - last).mean() > 1
    assert main(["record", "libero-spatial@1", *words, "--episodes", "1", "--out", str(store)]) == 0
    assert "is up to date" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task", "least"),
    [
        ("libero-spatial@1", "0", 4), ("libero-spatial@1", "2", 4), ("libero-object@1", "1", 3),
        ("libero-10@1", "0", 4), ("libero-10@1", "1", 3), ("libero-10@1", "7", 4),
    ],
)  # fmt: skip
def test_the_expert_succeeds(name: str, task: str, least: int) -> None:
    """Of five fixed initial states."""
    world, reached = bench(name).make({}), 0
    for episode in range(5):
        world.reset(task, episode)
        while world.running:
            world.step(world.expert())
        reached += world.outcome()["success"]
    world.close()
    assert reached >= least
