"""The LIBERO reader on files written in the original layout, and on a file of the simulator."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from vlm4vla_core.actions import LIBERO
from vlm4vla_core.episodes.libero import LiberoSource, open_libero
from vlm4vla_core.episodes.source import Skipped
from vlm4vla_core.episodes.transforms import no_ops
from vlm4vla_core.episodes.writer import Episode
from vlm4vla_core.errors import InputError

CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")
BOTH = ("after_action", "before_action")


def write_libero(
    path: Path,
    lengths: list[int],
    *,
    regenerated: bool = False,
    text: Any = "put it there",
    size: int = 8,
    **change: Any,
) -> Path:
    """A task file in the layout of LIBERO's create_dataset, or of OpenVLA's regeneration (no attributes).

    change: key -> array that replaces this part of the last demonstration, None drops it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if not regenerated:
            data.attrs["problem_info"] = json.dumps({"language_instruction": text, "domain_name": "robosuite"})
            data.attrs["num_demos"], data.attrs["total"] = len(lengths), sum(lengths)
        for number, steps in enumerate(lengths):
            rng = np.random.default_rng(number)
            actions = rng.normal(0, 0.3, (steps, 7))
            actions[:, 6] = np.sign(actions[:, 6])
            actions[2:4, :6] = 0  # stand still
            if steps > 3:
                actions[2:4, 6] = actions[1, 6], -actions[1, 6]  # a no-op, then a gripper command
            parts: dict[str, Any] = {
                "actions": actions, "states": rng.normal(size=(steps, 47)), "robot_states": rng.normal(size=(steps, 9)),
                "rewards": np.eye(1, steps, steps - 1, dtype=np.uint8)[0], "dones": np.zeros(steps, np.uint8),
                "obs/agentview_rgb": rng.integers(0, 255, (steps, size, size, 3), np.uint8),
                "obs/eye_in_hand_rgb": rng.integers(0, 255, (steps, size, size, 3), np.uint8),
                "obs/ee_states": rng.normal(size=(steps, 6)), "obs/gripper_states": rng.normal(size=(steps, 2)),
                "obs/joint_states": rng.normal(size=(steps, 7)),
            }  # fmt: skip
            if number == len(lengths) - 1:
                parts |= {next(key for key in parts if key.endswith(name)): value for name, value in change.items()}
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = steps
            for key, value in parts.items():
                if value is not None:
                    demo.create_dataset(key, data=value)
    return path


def read(source: LiberoSource, transform: str = "", cameras: tuple[str, ...] = CAMERAS) -> list[Any]:
    units = source.units(("train",))
    return [one for unit in units for one in source.episodes(unit, cameras, transform or source.transforms[0])]


def test_observations_after_the_action_are_paired_with_the_next(tmp_path: Path):
    path = write_libero(tmp_path / "suite" / "task_demo.hdf5", [6])
    (shifted,), (stored,) = (read(open_libero(path, observations=o), "none") for o in BOTH)
    assert open_libero(path).observations == "after_action"
    with h5py.File(path) as file:
        demo = file["data/demo_0"]
        actions, picture = demo["actions"][()].astype(np.float32), demo["obs/agentview_rgb"][()]
        state = np.concatenate([demo["obs/ee_states"][()], demo["obs/gripper_states"][()]], 1).astype(np.float32)
    np.testing.assert_array_equal(shifted.action, actions[1:])
    np.testing.assert_array_equal(shifted.state, state[:-1])
    np.testing.assert_array_equal(shifted.images["agentview_rgb"], picture[:-1])
    np.testing.assert_array_equal(stored.action, actions)
    np.testing.assert_array_equal(stored.state, state)
    np.testing.assert_array_equal(stored.images["agentview_rgb"], picture)


def test_transforms(tmp_path: Path):
    path = write_libero(tmp_path / "task_demo.hdf5", [6])
    source = pickle.loads(pickle.dumps(open_libero(path)))
    (plain,), (turned,), (moving,) = (read(source, name) for name in ("none", "libero", "libero_no_noops"))
    np.testing.assert_array_equal(turned.action, plain.action)
    for camera in CAMERAS:
        for one, two in zip(turned.images[camera], plain.images[camera], strict=True):
            assert (one[0, 0] == two[-1, -1]).all()
            np.testing.assert_array_equal(one, np.rot90(two, 2))
    # raw action 2 is the no-op: paired with observation 1; action 3 closes or opens and stays
    np.testing.assert_array_equal(moving.action, plain.action[[0, 2, 3, 4]])
    np.testing.assert_array_equal(moving.state, plain.state[[0, 2, 3, 4]])
    np.testing.assert_array_equal(moving.images["agentview_rgb"], turned.images["agentview_rgb"][[0, 2, 3, 4]])


def test_the_source_describes_itself(tmp_path: Path):
    write_libero(tmp_path / "libero_10" / "b_demo.hdf5", [4])
    write_libero(tmp_path / "libero_10" / "a_demo.hdf5", [5] * 12)
    source = open_libero(tmp_path)
    assert (source.format, source.convention, source.rendered, source.splits) == ("libero", LIBERO, True, ("train",))
    assert (source.cameras, source.sizes["agentview_rgb"]) == (CAMERAS, (8, 8))
    assert [unit.name for unit in source.units(("train",))] == ["libero_10/a_demo.hdf5", "libero_10/b_demo.hdf5"]
    found = read(source, cameras=("eye_in_hand_rgb",))
    assert [one.source for one in found][9:] == [
        "a_demo.hdf5, demo_9", "a_demo.hdf5, demo_10", "a_demo.hdf5, demo_11", "b_demo.hdf5, demo_0",
    ]  # fmt: skip
    assert found[0].info == {"task": "a"}
    assert list(found[0].images) == ["eye_in_hand_rgb"]
    assert open_libero(tmp_path / "libero_10").name == "libero_10, observations after action"
    with pytest.raises(InputError, match="unknown observations 'before'; did you mean 'before_action'"):
        open_libero(tmp_path, observations="before")


def test_instructions(tmp_path: Path):
    assert (
        read(open_libero(write_libero(tmp_path / "x_demo.hdf5", [4], text=' "open it" ')))[0].instruction == "open it"
    )
    assert (
        read(open_libero(write_libero(tmp_path / "x_demo.hdf5", [4], text=["open", "it"])))[0].instruction == "open it"
    )
    assert read(open_libero(write_libero(tmp_path / "x_demo.hdf5", [4], text=""))) == [
        Skipped("without language", "x_demo.hdf5, demo_0")
    ]
    path = write_libero(tmp_path / "KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5", [4], regenerated=True)
    assert read(open_libero(path, observations="before_action"))[0].instruction == "turn on the stove"


def test_short_episodes_are_left_out_and_told(tmp_path: Path):
    still = np.zeros((5, 7))
    source = open_libero(write_libero(tmp_path / "x_demo.hdf5", [5, 1, 5], actions=still))
    first, second, third = read(source)
    assert isinstance(first, Episode)
    assert second == Skipped("too short for the transform", "x_demo.hdf5, demo_1")
    assert third == Skipped("too short for the transform", "x_demo.hdf5, demo_2")


# --- damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"actions": None}, "actions.*doesn't exist"),
        ({"agentview_rgb": None}, "agentview_rgb.*doesn't exist"),
        ({"actions": np.zeros((5, 7))}, "unequal length: actions 5, obs/ee_states 4"),
        ({"actions": np.zeros((4, 6))}, r"'actions' has shape \(4, 6\), expected \(T, 7\)"),
        ({"actions": np.full((4, 7), np.nan)}, r"'actions' is NaN in dimension 0 \(x\)"),
        ({"gripper_states": np.zeros((4, 3))}, r"'ee_states \+ gripper_states' has shape \(4, 9\)"),
        ({"gripper_states": np.zeros(4)}, "cannot be read"),
        ({"actions": np.array(["x"] * 4, "S1")}, "cannot be read"),
    ],
)
def test_broken_demonstrations_are_named(tmp_path: Path, change: dict[str, Any], pattern: str):
    path = write_libero(tmp_path / "x_demo.hdf5", [4, 4], **change)
    with pytest.raises(InputError, match=pattern) as caught:
        read(open_libero(path))
    assert f"{path}, demo_1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_whole(tmp_path: Path):
    path = write_libero(tmp_path / "x_demo.hdf5", [3])
    whole = path.read_bytes()
    for cut in range(0, len(whole) - 1, 499):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"x_demo\.hdf5") as caught:
            read(open_libero(path))
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    with h5py.File(path, "a") as file:
        file["data"].attrs["num_demos"] = 50
    with pytest.raises(InputError, match="1 demonstrations found, its num_demos says 50"):
        open_libero(path)
    with h5py.File(path, "a") as file:
        file["data"].attrs["problem_info"] = "{"
    with pytest.raises(InputError, match="not a LIBERO file"):
        open_libero(path)
    with h5py.File(path, "w") as file:
        file.create_group("other")
    with pytest.raises(InputError, match="not a LIBERO file"):
        open_libero(path)
    with h5py.File(path, "w") as file:
        file.create_group("data")
    with pytest.raises(InputError, match="no demonstration with images"):
        open_libero(path)
    with pytest.raises(InputError, match="no such file or folder"):
        open_libero(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no hdf5 files"):
        open_libero(tmp_path / "empty")


# --- the simulator's file -------------------------------------------------------------------------------


@pytest.mark.samples
def test_simulator_file(samples: Path):
    source = open_libero(samples / "libero_hdf5_sim")
    assert source.sizes == dict.fromkeys(CAMERAS, (128, 128))
    found = read(source, "libero")
    assert [len(one.action) for one in found] == [19, 24]
    assert {one.instruction for one in found} == {"turn on the stove and put the moka pot on it"}
    # Causal: the motion from one observation to the next depends on the action paired with the first (and, the arm
    # being slow, on earlier ones), not on the one after. Paired as stored, it would seem to depend on the next.
    for observations, expected in (("after_action", [False, True]), ("before_action", [True, True])):
        rows, motions = [], []
        for one in read(open_libero(samples / "libero_hdf5_sim", observations=observations), "libero"):
            moved = np.diff(one.state[:, :3], axis=0)
            for t in range(2, len(moved) - 1):
                rows += [one.action[[t + 1, t, t - 1, t - 2], k] for k in range(3)]  # next, paired, and two before
                motions += list(moved[t])
        design, motion = np.array(rows, np.float64), np.array(motions, np.float64)
        weights, (squares,), *_ = np.linalg.lstsq(design, motion)
        errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * squares / (len(motion) - 4))
        assert [bool(abs(t) > 4) for t in weights[:2] / errors[:2]] == expected
    with h5py.File(source.files[0]) as file:
        actions = file["data/demo_0/actions"][()]
        first = file["data/demo_0/obs/agentview_rgb"][0]
    assert len(read(source, "libero_no_noops")[0].action) == int((~no_ops(actions)[1:]).sum())
    np.testing.assert_array_equal(found[0].images["agentview_rgb"][0], first[::-1, ::-1])
