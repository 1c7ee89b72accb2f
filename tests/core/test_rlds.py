"""The RLDS reader on small TFDS folders built byte by byte, and on real BridgeV2 records."""

from __future__ import annotations

import json
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_fuzz import changed
from tfds_bytes import bridge_episode, example, jpeg, record, shape, write_tfds

from vlm4vla_core import images
from vlm4vla_core.actions import BRIDGE, FRACTAL, LIBERO
from vlm4vla_core.episodes.checks import black_cameras
from vlm4vla_core.episodes.rlds import choose_splits, fractal, open_rlds
from vlm4vla_core.episodes.source import Skipped
from vlm4vla_core.episodes.writer import Episode
from vlm4vla_core.errors import InputError


def read_all(
    folder: Path, splits: tuple[str, ...] = (), cameras: tuple[str, ...] = ("image_0",), transform: str = ""
) -> list[Episode | Skipped]:
    source = open_rlds(folder)
    units = source.units(choose_splits(source, splits))
    return [one for unit in units for one in source.episodes(unit, cameras, transform or source.transforms[0])]


def read(folder: Path, splits: tuple[str, ...] = (), cameras: tuple[str, ...] = ("image_0",)) -> list[Episode]:
    return [one for one in read_all(folder, splits, cameras) if isinstance(one, Episode)]


def only(folder: Path, *records: dict[str, Any]) -> Path:
    """A dataset with one shard of these records."""
    return write_tfds(folder, {"train": [list(records)]})


def test_reads_shards_in_order_transformed(tmp_path: Path):
    raw = [bridge_episode(seed, steps=5) for seed in range(3)]
    found = read(write_tfds(tmp_path, {"train": [raw[:2], raw[2:]]}))
    assert [e.source for e in found] == [
        "mini-train.tfrecord-00000-of-00002, record 0",
        "mini-train.tfrecord-00000-of-00002, record 1",
        "mini-train.tfrecord-00001-of-00002, record 0",
    ]
    for episode, features in zip(found, raw, strict=True):
        state = features["steps/observation/state"]
        np.testing.assert_array_equal(episode.action[:, :6], state[2:, :6] - state[1:-1, :6])
        np.testing.assert_array_equal(episode.action[:, 6], features["steps/action"][1:-1, 6])
        np.testing.assert_array_equal(episode.state, state[1:-1])
        assert episode.images == {"image_0": features["steps/observation/image_0"][1:-1]}
        assert episode.instruction == features["steps/language_instruction"][0].decode()
        assert episode.info == {"origin": features["episode_metadata/file_path"][0].decode()}
        assert episode.notes == {}
    plain = [one for one in read_all(tmp_path, transform="none") if isinstance(one, Episode)]
    np.testing.assert_array_equal(plain[0].action, raw[0]["steps/action"])


def test_the_source_describes_itself_and_travels(tmp_path: Path):
    folder = write_tfds(tmp_path, {"train": [[bridge_episode(0)], [bridge_episode(1)]], "val": [[bridge_episode(2)]]})
    source = pickle.loads(pickle.dumps(open_rlds(folder)))
    assert (source.format, source.name, source.convention) == ("rlds", "mini 1.0.0", BRIDGE)
    assert (source.cameras, source.sizes["image_0"]) == (("image_0", "image_1"), (8, 8))
    assert (source.splits, source.transforms, source.rendered) == (("train", "val"), ("bridge_orig", "none"), False)
    units = source.units(("train", "val"))
    assert [(unit.name, unit.split) for unit in units] == [
        ("mini-train.tfrecord-00000-of-00002", "train"), ("mini-train.tfrecord-00001-of-00002", "train"),
        ("mini-val.tfrecord-00000-of-00001", "val"),
    ]  # fmt: skip
    assert units[1].files == (folder / units[1].name, folder / "dataset_info.json", folder / "features.json")
    with pytest.raises(InputError, match=r"transform 'libero' does not belong to this rlds data.*bridge_orig"):
        list(source.episodes(units[0], (), "libero"))


def test_what_is_left_out_is_told(tmp_path: Path):
    raw = [bridge_episode(0), bridge_episode(1, language_instruction=[b""] * 4), bridge_episode(2, steps=2)]
    raw += [bridge_episode(3, language_instruction=[b"", b"second step", b"", b""])]
    first, second, third, fourth = read_all(only(tmp_path, *raw))
    assert isinstance(first, Episode)
    assert isinstance(fourth, Episode)
    assert (first.instruction, fourth.instruction) == ("do thing 0", "second step")
    where = "mini-train.tfrecord-00000-of-00001, record "
    assert second == Skipped("without language", f"{where}1")
    assert third == Skipped("too short for the transform", f"{where}2")


def test_cameras(tmp_path: Path):
    late = [jpeg(0), jpeg(0), jpeg(200), jpeg(0)]  # shows something only at the end of the last episode
    folder = only(tmp_path / "late", bridge_episode(0), bridge_episode(1, image_1=late))
    both = ("image_0", "image_1")
    assert black_cameras(open_rlds(folder), ["train"], both) == ()
    assert black_cameras(open_rlds(folder), ["train"], both, episodes=1) == ("image_1",)
    assert list(read(folder, cameras=("image_1",))[0].images) == ["image_1"]
    with pytest.raises(InputError, match=r"no camera 'image_7'.*known: image_0, image_1"):
        read(folder, cameras=("image_7",))
    with pytest.raises(InputError, match="nothing but black images from image_1"):
        black_cameras(open_rlds(only(tmp_path / "black", bridge_episode(0))), ["train"], ("image_1",))
    nothing = only(tmp_path / "nothing", bridge_episode(0, language_instruction=[b""] * 4))
    assert black_cameras(open_rlds(nothing), ["train"], ("image_1",)) == ()  # it has no episode that is kept


def test_black_cameras_are_looked_for_all_over_the_data(tmp_path: Path):
    shards = [[bridge_episode(seed, image_1=[jpeg(90 if seed == 9 else 0)] * 4)] for seed in range(10)]
    folder = write_tfds(tmp_path, {"train": shards})
    assert black_cameras(open_rlds(folder), ["train"], ("image_0", "image_1"), episodes=4) == ()


def test_absent_images_are_stored_black_and_noted(tmp_path: Path):
    half = [b"", b"", jpeg(50, size=12), b""]  # the declared size is 8: what is there counts
    raw = [bridge_episode(0, image_0=[b""] * 4), bridge_episode(1, image_0=half), bridge_episode(2)]
    first, second, third = read(only(tmp_path, *raw))
    assert first.notes == {"absent images of image_0 stored black": 2}
    assert second.notes == {"absent images of image_0 stored black": 1}
    assert third.notes == {}
    for frame in (*first.images["image_0"], second.images["image_0"][0]):
        np.testing.assert_array_equal(images.decode(frame), np.zeros((12, 12, 3)))


def test_the_folder_is_found_from_above(tmp_path: Path):
    folder = only(tmp_path / "data" / "mini" / "1.0.0", bridge_episode(0))
    for source in (folder, folder.parent, folder.parent.parent):
        assert open_rlds(source).folder == folder
    only(tmp_path / "data" / "other" / "1.0.0", bridge_episode(0))
    with pytest.raises(InputError, match=r"several datasets here: mini/1\.0\.0, other/1\.0\.0"):
        open_rlds(tmp_path / "data")
    with pytest.raises(InputError, match=r"no dataset_info\.json"):
        open_rlds(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        open_rlds(tmp_path / "gone")


# --- damage ---------------------------------------------------------------------------------------------


def test_a_cut_at_every_byte_is_one_clear_error(tmp_path: Path):
    tiny = {"image_1": None, "image_0": [b""] * 3}  # keeps the file small
    folder = only(tmp_path, bridge_episode(0, steps=3, **tiny), bridge_episode(1, steps=3, **tiny))
    path = folder / "mini-train.tfrecord-00000-of-00001"
    whole = path.read_bytes()
    source = open_rlds(folder)
    (unit,) = source.units(("train",))
    assert len(list(source.episodes(unit, (), "bridge_orig"))) == 2
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError) as caught:
            list(source.episodes(unit, (), "bridge_orig"))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_record_counts_must_agree(tmp_path: Path):
    for told in (1, 3):
        folder = only(tmp_path, bridge_episode(0), bridge_episode(1))
        info = json.loads((folder / "dataset_info.json").read_text())
        info["splits"][0]["shardLengths"] = [str(told)]
        (folder / "dataset_info.json").write_text(json.dumps(info))
        with pytest.raises(InputError, match=f"records found, dataset_info.json says {told}"):
            read(folder)


def test_missing_files(tmp_path: Path):
    folder = write_tfds(tmp_path, {"train": [[bridge_episode(0)], [bridge_episode(1)]]})
    (folder / "mini-train.tfrecord-00001-of-00002").unlink()
    with pytest.raises(InputError, match=r"missing tfrecord file .*00001-of-00002"):
        open_rlds(folder)
    (folder / "features.json").unlink()
    with pytest.raises(InputError, match=r"missing tfrecord|features\.json"):
        open_rlds(folder)


def test_templates_that_do_not_match(tmp_path: Path):
    folder = write_tfds(tmp_path, {"train": [[bridge_episode(0)], [bridge_episode(1)]]})
    info = json.loads((folder / "dataset_info.json").read_text())
    info["name"] = "renamed"  # the files keep the old name
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert len(read(folder)) == 2
    info["name"], info["splits"][0]["filepathTemplate"] = "mini", "{SPLIT}/{SHARD_INDEX}.tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert len(read(folder)) == 2
    (folder / "other-train.tfrecord-00000-of-00002").write_bytes(b"")  # the usual name is there: it counts
    assert len(read(folder)) == 2
    info["name"] = "renamed"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match="2 files could be this tfrecord file"):
        open_rlds(folder)
    info["splits"][0]["filepathTemplate"] = "{NOBODY_KNOWS}"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match=r"not a TFDS description .*NOBODY_KNOWS"):
        open_rlds(folder)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"action": None}, "'steps/action' has 0 values, expected a multiple of 7"),
        ({"state": np.zeros(27, np.float32)}, "'steps/observation/state' has 27 values"),
        ({"state": np.zeros((3, 7), np.float32)}, "unequal length: action 4, state 3"),
        ({"image_0": [jpeg(9)]}, "unequal length: .*image_0 1"),
        ({"image_0": np.zeros(4, np.int64)}, "numbers where bytes belong"),
        ({"action": np.full((4, 7), np.nan, np.float32)}, r"'steps/action' is NaN in dimension 0 \(x\)"),
        ({"state": np.full((4, 7), np.inf, np.float32)}, "'steps/observation/state' is infinite"),
    ],
)
def test_broken_records_name_file_and_record(tmp_path: Path, change: dict[str, Any], pattern: str):
    folder = only(tmp_path, bridge_episode(0), bridge_episode(1, **change))
    with pytest.raises(InputError, match=pattern) as caught:
        read(folder)
    assert f"{tmp_path / 'mini-train.tfrecord-00000-of-00001'}, record 1" in str(caught.value)


def test_a_broken_image_names_file_and_record(tmp_path: Path):
    source = open_rlds(only(tmp_path, bridge_episode(0, image_0=[b"\xff\xd8 broken"] * 4)))
    with pytest.raises(InputError, match=r"image of camera 'image_0' cannot be read .*00001, record 0, step 0"):
        black_cameras(source, ["train"], ("image_0",))


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.data())
def test_damage_below_the_checksums_never_crashes(data: st.DataObject):
    whole = bytearray(example(bridge_episode(0, steps=3)))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as name:
        folder = only(Path(name), bridge_episode(0, steps=3))
        (folder / "mini-train.tfrecord-00000-of-00001").write_bytes(record(bytes(whole)))
        try:
            read(folder)
        except InputError as error:
            assert name in str(error)


def test_foreign_descriptions(tmp_path: Path):
    with pytest.raises(InputError, match=r"no known dataset layout, it has .*known layouts are bridge_orig"):
        open_rlds(write_tfds(tmp_path / "state", {"train": [[bridge_episode(0)]]}, state_size=8))
    folder = only(tmp_path / "x", bridge_episode(0))
    for text, pattern in (("[]", "not a TFDS description"), ('{"name": "x"}', "not a TFDS"), ("{", "not valid JSON")):
        (folder / "dataset_info.json").write_text(text)
        with pytest.raises(InputError, match=pattern):
            open_rlds(folder)
    only(tmp_path / "x", bridge_episode(0))
    (folder / "features.json").write_text('{"featuresDict": 3}')
    with pytest.raises(InputError, match="not a TFDS feature description"):
        open_rlds(folder)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_descriptions_cut_at_every_byte(tmp_path: Path, name: str):
    folder = only(tmp_path, bridge_episode(0))
    whole = (folder / name).read_bytes()
    for cut in range(len(whole)):
        (folder / name).write_bytes(whole[:cut])
        with pytest.raises(InputError, match=rf"not valid JSON .*{name}"):
            open_rlds(folder)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(data=st.data())
def test_no_description_crashes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    whole, folder = (tmp_path_factory.getbasetemp() / name for name in ("rlds_whole", "rlds_fuzz"))
    if not whole.is_dir():
        shutil.copytree(only(whole, bridge_episode(0)), folder)
    name = data.draw(st.sampled_from(["dataset_info.json", "features.json"]))
    for other in ("dataset_info.json", "features.json"):
        shutil.copy(whole / other, folder)
    (folder / name).write_text(json.dumps(changed(json.loads((whole / name).read_text()), data)))
    try:
        found = read_all(folder)
    except InputError as error:
        assert str(folder) in str(error) or "split" in str(error)
        assert "\n" not in str(error)
    else:
        assert len(found) == 1


def test_splits(tmp_path: Path):
    dataset = open_rlds(write_tfds(tmp_path, {"val": [[bridge_episode(0)]], "train": [[bridge_episode(1)]], "x": []}))
    assert choose_splits(dataset) == ("train", "val")
    assert choose_splits(dataset, ("val", "val")) == ("val",)
    with pytest.raises(InputError, match=r"no split 'trian'; did you mean|no split 'trian'"):
        choose_splits(dataset, ("trian",))


# --- other layouts --------------------------------------------------------------------------------------


def fractal_like(folder: Path, steps: int = 6) -> tuple[Path, dict[str, Any]]:
    """RT-1 data in fractal20220817_data's layout: the action in parts, the language among the observations."""
    rng = np.random.default_rng(0)
    numbers = {
        "steps/action/world_vector": 3, "steps/action/rotation_delta": 3, "steps/action/gripper_closedness_action": 1,
        "steps/action/base_displacement_vector": 2, "steps/observation/base_pose_tool_reached": 7,
        "steps/observation/gripper_closed": 1,
    }  # fmt: skip
    features: dict[str, Any] = {key: rng.normal(0, 0.1, (steps, w)).astype(np.float32) for key, w in numbers.items()}
    features["steps/action/gripper_closedness_action"] = np.array([0, 0, 1, 0, -1, 0.05], np.float32)
    features["steps/observation/image"] = [jpeg(10 * step) for step in range(steps)]
    features["steps/observation/natural_language_instruction"] = [b"pick coke can"] * steps
    leaves = {key: {"tensor": {"shape": shape(width)}} for key, width in numbers.items()}
    leaves["steps/observation/image"] = {"image": {"shape": shape(8, 8, 3)}}
    leaves["steps/observation/natural_language_instruction"] = {"text": {}}
    return write_tfds(folder, {"train": [[features]]}, leaves=leaves, name="fractal20220817_data"), features


def libero_like(folder: Path, steps: int = 4) -> tuple[Path, dict[str, Any]]:
    """LIBERO in modified_libero_rlds' layout."""
    rng = np.random.default_rng(0)
    numbers = {"steps/action": 7, "steps/observation/state": 8, "steps/observation/joint_state": 7}
    features: dict[str, Any] = {key: rng.normal(0, 1, (steps, w)).astype(np.float32) for key, w in numbers.items()}
    features["steps/observation/image"] = [jpeg(10 + step) for step in range(steps)]
    features["steps/observation/wrist_image"] = [jpeg(100 + step) for step in range(steps)]
    features["steps/language_instruction"] = [b"turn on the stove"] * steps
    features["episode_metadata/file_path"] = [b"/demo.hdf5"]
    leaves = {key: {"tensor": {"shape": shape(width)}} for key, width in numbers.items()}
    leaves |= {f"steps/observation/{name}": {"image": {"shape": shape(8, 8, 3)}} for name in ("image", "wrist_image")}
    leaves |= {"steps/language_instruction": {"text": {}}, "episode_metadata/file_path": {"text": {}}}
    return write_tfds(folder, {"train": [[features]]}, leaves=leaves, name="libero_10_no_noops"), features


def test_fractal_layout(tmp_path: Path):
    folder, raw = fractal_like(tmp_path)
    source = open_rlds(folder)
    assert (source.convention, source.cameras, source.transforms) == (FRACTAL, ("image",), ("fractal",))
    (episode,) = read(folder, cameras=("image",))
    np.testing.assert_array_equal(episode.action[:, :3], raw["steps/action/world_vector"])
    np.testing.assert_array_equal(episode.action[:, 3:6], raw["steps/action/rotation_delta"])
    np.testing.assert_array_equal(episode.action[:, 6], [1, 1, 0, 0, 1, 1])  # open until told to close, then open
    np.testing.assert_array_equal(episode.state[:, :7], raw["steps/observation/base_pose_tool_reached"])
    np.testing.assert_array_equal(episode.state[:, 7:], raw["steps/observation/gripper_closed"])
    assert (episode.instruction, len(episode.images["image"])) == ("pick coke can", 6)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.sampled_from([-1.0, -0.5, -0.05, 0.0, 0.1, 0.2, 1.0]), min_size=1, max_size=12))
def test_fractal_gripper_against_a_state_machine(commands: list[float]):
    told = [0 if abs(c) <= np.float32(0.1) else (-1 if c > 0 else 1) for c in commands]
    state = next((-t for t in told if t), 1)
    expected = []
    for t in told:
        state = t or state
        expected.append((state + 1) / 2)
    action = np.zeros((len(commands), 7), np.float32)
    action[:, 6] = commands
    np.testing.assert_array_equal(fractal(action, action)[0][:, 6], expected)


def test_libero_layout(tmp_path: Path):
    folder, raw = libero_like(tmp_path)
    source = open_rlds(folder)
    assert (source.convention, source.cameras, source.rendered) == (LIBERO, ("image", "wrist_image"), True)
    (episode,) = read(folder, cameras=("wrist_image", "image"))
    np.testing.assert_array_equal(episode.action, raw["steps/action"])
    np.testing.assert_array_equal(episode.state, raw["steps/observation/state"])
    assert episode.images["wrist_image"] == raw["steps/observation/wrist_image"]
    assert (len(source.state_names), episode.info["origin"]) == (8, "/demo.hdf5")


@pytest.mark.samples
def test_bridge_sample(samples: Path):
    source = open_rlds(samples / "bridge_rlds_octo")
    assert black_cameras(source, source.splits, source.cameras) == ("image_3",)
    found = read(samples / "bridge_rlds_octo", ("train",), ("image_0", "image_1", "image_2"))
    assert {len(e.action) for e in found} == {8}
    assert len({e.instruction for e in found}) == 4
    expected = np.load(samples / "bridge_rlds_octo" / "openvla_bridge_orig_expected.npz")
    assert len(found) == 25
    for number, episode in enumerate(found):
        np.testing.assert_array_equal(episode.action, expected[f"action_{number:02d}"])
    copies = {e.action.tobytes() for e in read(samples / "bridge_rlds_octo", ("val",))}
    assert copies == {e.action.tobytes() for e in found}
