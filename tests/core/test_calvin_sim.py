"""CALVIN without its simulator: seeds, both published fingerprints, symbolic states, way-points, what is missing."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from vlm4vla_core.errors import InputError
from vlm4vla_core.sims.calvin import PROTOCOLS, chains, checkout, expert, layout

BENCH = PROTOCOLS["calvin-abc-d@1"]


@pytest.fixture(scope="module")
def drawn() -> list[chains.Chain]:
    return chains.draw_chains()


# --- chains and initial states ----------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "value"), [("a", 1627429043), ("hello world", 3799943344), ("", 0)])
def test_fnv1_32_gives_what_pyhash_gives(text, value):
    """The first two were computed by pyhash 0.9.3."""
    assert chains.fnv1_32(text) == value


def test_the_1000_chains_are_the_published_ones(drawn):
    """Fingerprint of the list that RoboFlamingo's repository publishes."""
    assert chains.chains_sha256(drawn) == "13bc4fad80a302e6405e5f4f800cc028789a245409cd12df39b783099ad4860f"
    first = "rotate_blue_block_right move_slider_right lift_red_block_slider place_in_slider turn_off_lightbulb"
    assert drawn[0].tasks == tuple(first.split())


def test_the_initial_states_are_the_published_ones(drawn):
    assert chains.states_sha256(tuple(drawn)) == "0789732599c9f93d6506018704c1717b42d9ce8921a430403964813f3c1ebd71"


def test_chains_have_the_published_counts(drawn):
    """Counts measured on the benchmark's own list (152 states start five chains, 40 start six)."""
    starts = Counter(str(chain.state) for chain in drawn)
    assert Counter(starts.values()) == {5: 152, 6: 40}
    tasks, first = Counter(task for chain in drawn for task in chain.tasks), Counter(chain.tasks[0] for chain in drawn)
    assert (tasks["place_in_slider"], tasks["open_drawer"], tasks["move_slider_right"]) == (398, 379, 317)
    assert (first["open_drawer"], first["move_slider_right"]) == (115, 87)
    assert len(tasks) == 34 and set(tasks) == set(chains.TASKS)


def test_drawing_leaves_numpys_global_generator_alone():
    np.random.seed(7)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    chains.reset_state(chains.initial_states()[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_a_damaged_cache_is_drawn_again_and_mended(tmp_path, monkeypatch, drawn):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    draws: list[int] = []
    monkeypatch.setattr(chains, "draw_chains", lambda: draws.append(1) or drawn)
    for content in (None, "[[1, 2", "[[1, 2]]", json.dumps([[drawn[0].state, ["open_drawer"]]])):
        if content is not None:
            chains.cache_file().write_text(content)
        chains.official_chains.cache_clear()
        assert chains.chains_sha256(list(chains.official_chains())) == chains.CHAINS_SHA256
    assert len(draws) == 4
    chains.official_chains.cache_clear()
    assert chains.official_chains()[999] == drawn[999] and len(draws) == 4  # from the cache now
    chains.official_chains.cache_clear()


def test_chains_that_are_not_calvins_are_refused(tmp_path, monkeypatch, drawn):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(chains, "draw_chains", lambda: [drawn[1], *drawn[1:]])
    chains.official_chains.cache_clear()
    with pytest.raises(RuntimeError, match="not CALVIN's"):
        chains.official_chains()
    chains.official_chains.cache_clear()


def test_what_can_be_asked_of_a_scene():
    state = next(s for s in chains.initial_states() if list(s.values())[:4] == [0, 1, "right", "open"])
    state |= {"red_block": "table", "blue_block": "slider_left", "pink_block": "slider_right"}

    def asked(task: str, **changes: object) -> int:
        return len(chains.successors({**state, **changes}, task))

    assert asked("turn_on_led") and not asked("turn_off_led") and asked("turn_off_lightbulb")
    assert asked("close_drawer") and not asked("open_drawer")
    assert asked("lift_blue_block_slider") and not asked("lift_pink_block_slider")  # the door stands before pink
    assert asked("lift_red_block_table") and not asked("lift_red_block_table", grasped=1)
    assert asked("push_into_drawer") and not asked("push_into_drawer", pink_block="table", blue_block="table")
    held = {"red_block": "grasped", "grasped": 1}
    assert asked("stack_block", **held, pink_block="table") == 1
    assert asked("stack_block", **held, pink_block="table", blue_block="table") == 2  # not told which: no chain has it
    assert not asked("stack_block") and not asked("open_drawer", **held, drawer="closed")
    after = chains.successors({**state, **held}, "place_in_slider")[0]
    assert (after["red_block"], after["grasped"]) == ("slider_right", 0)


def test_a_block_on_the_table_starts_on_one_of_two_spots(drawn):
    for chain in drawn[:60]:
        _, scene = chains.reset_state(chain.state)
        for k, colour in enumerate(chains.COLOURS):
            x, y, z, roll, pitch, yaw = scene[6 + 6 * k : 12 + 6 * k]
            if chain.state[f"{colour}_block"] == "table":
                assert min(abs(x - 0.05), abs(x - 0.23)) < 1e-3 and y == pytest.approx(-0.12, abs=1e-3)
            else:
                assert y == pytest.approx(0.0924, abs=1e-4)
            assert (roll, pitch) == (0, 0) and abs(yaw - np.pi / 2) <= np.pi / 8 and z == pytest.approx(0.46, abs=0.01)


# --- the expert's way-points ------------------------------------------------------------------------------

NEUTRAL = np.array([0.0259, -0.2313, 0.5713])
# Boxes of scene D's bodies, in m: button, drawer and slider closed.
SCENE_D = expert.Layout(
    NEUTRAL,
    np.array([[-0.155, -0.155, 0.457], [-0.085, -0.085, 0.487]]),
    np.array([[-0.045, -0.265, 0.295], [0.405, 0.065, 0.405]]),
    np.array([[-0.105, -0.060, 0.425], [0.185, 0.141, 0.685]]),
    {"red": np.array([0.05, -0.12, 0.46, 1.2]), "blue": np.array([0.23, -0.12, 0.46, 1.5 - np.pi])},
)


def test_way_points_in_scene_d_are_the_measured_ones():
    """Places found by hand in scene D: handle at (0.18, -0.222), button at (-0.12, -0.12), slider from 0.12 on."""
    pull = expert.waypoints("open_drawer", SCENE_D)
    np.testing.assert_allclose([p.at[:2] for p in pull[-3:-1]], [(0.18, -0.222)] * 2, atol=1e-3)
    assert pull[-1].at[1] < -0.222 - 0.15  # the drawer counts as open after 0.12 m
    press = expert.waypoints("turn_on_led", SCENE_D)
    np.testing.assert_allclose(press[-2].at, (-0.12, -0.12, 0.44), atol=1e-3)
    push = expert.waypoints("move_slider_left", SCENE_D)
    np.testing.assert_allclose([p.at for p in push[-2:]], [(0.12, -0.02, 0.50), (-0.24, -0.02, 0.50)], atol=1e-3)
    assert all(not p.is_open for p in (*pull, *press, *push))


def test_a_block_is_grasped_across_the_nearest_of_two_equal_yaws():
    for colour, yaw in (("red", 1.2), ("blue", 1.5)):
        way = expert.waypoints(f"lift_{colour}_block_table", SCENE_D)
        grasp = next(p for p in way if p.stay)
        assert grasp.yaw == pytest.approx(yaw) and not grasp.is_open and grasp.stay == 10
        assert way[0].is_open and way[-1].at[2] - grasp.at[2] > 0.05


def test_the_expert_reaches_its_way_points_in_half_speed():
    """An ideal arm, which is where it was told to be: 0.01 m and 0.025 rad a step at most, and the last point last."""
    way = expert.waypoints("lift_red_block_table", SCENE_D)
    guide, pose = expert.Expert(list(way)), np.array([*NEUTRAL, np.pi, 0.0, 1.5])
    fingers = []
    for _ in range(200):
        action = guide.act(pose, pose[:3])
        assert np.abs(action[:6]).max() <= 0.5 + 1e-12 and action[6] in (-1, 1) and not action[3:5].any()
        pose[:3] += action[:3] * 0.02
        pose[5] += action[5] * 0.05
        fingers.append(action[6])
    np.testing.assert_allclose(pose[[0, 1, 2, 5]], [*way[-1].at, 1.2], atol=1e-3)
    assert fingers[0] == 1 and fingers[-1] == -1 and np.count_nonzero(np.diff(fingers)) == 1 and guide.finished


def test_an_arm_that_is_stuck_goes_on_after_a_while():
    guide = expert.Expert([expert.Waypoint((0, 0, 0.5)), expert.Waypoint((0, 0, 0.6))])
    commanded, stuck = np.array([0, 0, 0.5, np.pi, 0, 1.5]), np.array([0, 0, 0.55])
    moved = [guide.act(commanded, stuck)[2] for _ in range(30)]
    assert moved[0] == 0 and moved[-1] > 0


def test_tasks_without_an_expert_are_named():
    with pytest.raises(KeyError, match="stack_block"):
        expert.waypoints("stack_block", SCENE_D)


def test_recordings_take_scenes_in_order_and_tasks_in_turn():
    made = layout.plans(12, ("a", "b"), ("A", "B", "C"), seed=0, split=0)
    assert "".join(plan.scene for plan in made) == "AAAABBBBCCCC" and [p.task for p in made[:3]] == ["a", "b", "a"]
    other = layout.plans(12, ("a", "b"), ("A", "B", "C"), seed=0, split=1)
    assert not {plan.seed for plan in made} & {plan.seed for plan in other}


# --- the protocol, and what is missing --------------------------------------------------------------------


def test_the_protocol_says_what_it_is(monkeypatch):
    monkeypatch.delenv("CALVIN_ROOT", raising=False)
    monkeypatch.delenv("VLM4VLA_SIM_ASSETS", raising=False)
    told = json.loads(json.dumps(BENCH.describe()))
    assert told["steps_per_part"] == 360 and told["calvin_env"] == "unknown" and told["episodes"] == 1000
    assert BENCH.kept_for_test == {"D"} and BENCH.train_domains == ("A", "B", "C")
    assert BENCH.portion(1000) == "" and BENCH.portion(20) == "the first 20 of 1,000 chains"
    assert BENCH.chosen(("renderer=egl",)) == {"renderer": "egl"}
    with pytest.raises(InputError, match="renderer"):
        BENCH.chosen(("renderer=vulkan",))


def test_a_missing_checkout_is_told_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("VLM4VLA_SIM_ASSETS", raising=False)
    monkeypatch.delenv("CALVIN_ROOT", raising=False)
    assert "CALVIN_ROOT" in checkout.missing()[0]
    monkeypatch.setenv("CALVIN_ROOT", str(tmp_path))
    assert "git clone --recurse-submodules" in checkout.missing()[0]
    phrases = tmp_path / "calvin_models/conf/annotations/new_playtable_validation.yaml"
    phrases.parent.mkdir(parents=True)
    phrases.write_text("")
    assert "git submodule update --init" in checkout.missing()[0]
    with pytest.raises(InputError, match="submodule"):
        checkout.open_checkout()
    code = tmp_path / "calvin_env/calvin_env/envs/play_table_env.py"
    code.parent.mkdir(parents=True)
    code.write_text("")
    assert checkout.missing() == [] and checkout.find() == tmp_path.resolve()
    monkeypatch.delenv("CALVIN_ROOT")
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "calvin").symlink_to(tmp_path)
    monkeypatch.setenv("VLM4VLA_SIM_ASSETS", str(tmp_path / "assets"))
    assert checkout.missing() == []


def test_the_commit_is_that_of_the_checkout_and_marks_changes(tmp_path):
    import subprocess

    def git(*words: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", *who, "-C", str(tmp_path), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()

    assert checkout.commit(tmp_path) == "unknown"
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "one")
    assert checkout.commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("2")
    assert checkout.commit(tmp_path) == git("rev-parse", "HEAD") + "+"
    (tmp_path / "inner").mkdir()
    assert checkout.commit(tmp_path / "inner") == "unknown"  # not the outer one's


def test_stand_ins_are_there_for_what_is_missing_and_for_the_import_only():
    import sys

    held = {name: sys.modules.get(name) for name in ("gym", "hydra", "git", "quaternion", "cv2", "rich")}
    with checkout._stand_ins():
        import gym

        generator, seed = gym.utils.seeding.np_random(3)
        assert seed == 3 and generator.random() == np.random.Generator(np.random.PCG64(3)).random()
    assert {name: sys.modules.get(name) for name in held} == held


def test_importing_the_protocol_imports_no_simulator():
    import subprocess
    import sys

    code = "import sys, vlm4vla_core.sims.calvin as c; c.PROTOCOLS['calvin-abc-d@1'].missing(); print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert not {"pybullet", "omegaconf", "torch", "scipy", "pandas"} & set(ran.stdout.split())


# --- the split ------------------------------------------------------------------------------------------------


def test_a_policy_trained_on_a_b_c_and_watched_on_d_has_not_seen_d(tmp_path):
    """The layout's descriptions around made-up frames, through the reader, the store and one step of training."""
    from vlm4vla_core.checkpoint import resolve
    from vlm4vla_core.cli import main
    from vlm4vla_core.folders import read_json

    rng = np.random.default_rng(0)
    for split, scenes in (("training", "ABC"), ("validation", "D")):
        folder = tmp_path / "made-up" / split
        folder.mkdir(parents=True)
        for plan in layout.plans(len(scenes), ("open_drawer",), tuple(scenes), 0, 0):
            for k in range(12):
                np.savez(
                    folder / f"episode_{plan.number * layout.GAP + k:07d}.npz",
                    rgb_static=rng.integers(0, 256, (32, 32, 3), np.uint8), rel_actions=rng.uniform(-1, 1, 7),
                    robot_obs=rng.uniform(-1, 1, 15),
                )  # fmt: skip
            told = {"task": plan.task, "scene": plan.scene, "words": f"open it in {plan.scene}", "frames": 12}
            layout._marker(folder, plan).write_text(json.dumps(told))
        layout._describe(folder, len(scenes))
    store, run = tmp_path / "store", tmp_path / "run"
    assert main(["convert", "calvin", str(tmp_path / "made-up"), "--out", str(store), "--cameras", "rgb_static"]) == 0
    assert (
        main(["train", "tiny", "--data", str(store), "--out", str(run), "--max-steps", "1", "--batch-size", "2"]) == 0
    )
    config = read_json(resolve(run) / "config.json")
    found = json.dumps(config)
    assert '"domains": ["A", "B", "C"]' in found


def test_a_checkout_can_be_named_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CALVIN_ROOT", str(tmp_path / "elsewhere"))
    from vlm4vla_core.verbs.evaluate import Args
    from vlm4vla_core.verbs.evaluate import run as evaluate

    with pytest.raises(InputError, match="mine has no calvin_env"):
        evaluate(Args("calvin-abc-d@1", "scripted", episodes=1, calvin_root=tmp_path / "mine", out=tmp_path / "rows"))
