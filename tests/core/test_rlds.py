"""The RLDS reader on small TFDS folders built byte by byte, and on real BridgeV2 records."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tfds_bytes import bridge_episode, example, jpeg, record, write_tfds

from vlm4vla_core.episodes.rlds import Report, choose_splits, episodes, open_rlds, seen_cameras
from vlm4vla_core.episodes.store import Episode
from vlm4vla_core.errors import InputError


def read(folder: Path, splits: tuple[str, ...] = (), cameras: tuple[str, ...] = ()) -> tuple[list[Episode], Report]:
    dataset, report = open_rlds(folder), Report()
    chosen = choose_splits(dataset, splits)
    seen, report.black_cameras = seen_cameras(dataset, chosen, cameras)
    return list(episodes(dataset, chosen, seen, report)), report


def only(folder: Path, *records: dict[str, Any]) -> Path:
    """A dataset with one shard of these records."""
    return write_tfds(folder, {"train": [list(records)]})


def test_reads_shards_in_order_transformed(tmp_path: Path):
    raw = [bridge_episode(seed, steps=5) for seed in range(3)]
    found, report = read(write_tfds(tmp_path, {"train": [raw[:2], raw[2:]]}))
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
    assert report == Report(read=3, kept=3, black_cameras=("image_1",))  # and the flag has_image_0 = 0 did not matter


def test_what_is_left_out_is_counted(tmp_path: Path):
    raw = [bridge_episode(0), bridge_episode(1, language_instruction=[b""] * 4), bridge_episode(2, steps=2)]
    raw += [bridge_episode(3, language_instruction=[b"", b"second step", b"", b""])]
    found, report = read(only(tmp_path, *raw))
    assert [e.instruction for e in found] == ["do thing 0", "second step"]
    assert (report.read, report.kept, report.no_language, report.too_short) == (4, 2, 1, 1)
    assert any("without language" in line for line in report.lines())


def test_episodes_that_train_has_too_are_left_out_of_val(tmp_path: Path):
    a, b, c = (bridge_episode(seed) for seed in range(3))
    folder = write_tfds(tmp_path / "some", {"val": [[b, c]], "train": [[a, b]], "test": [[c]]})
    found, report = read(folder)
    assert [(e.split, e.info["origin"]) for e in found] == [
        ("train", "/origin/0.npy"), ("train", "/origin/1.npy"), ("val", "/origin/2.npy"),
    ]  # fmt: skip
    assert report.duplicates == {"val": 1}
    found, report = read(write_tfds(tmp_path / "all", {"train": [[a, b]], "val": [[b, a]]}))
    assert [e.split for e in found] == ["train", "train"]
    assert report.duplicates == {"val": 2}
    assert [e.split for e in read(folder, ("val",))[0]] == ["val", "val"]  # asked for alone, nothing is a copy
    assert [e.split for e in read(folder, ("test",))[0]] == ["val"]


def test_cameras(tmp_path: Path):
    late = [jpeg(0), jpeg(0), jpeg(0), jpeg(200)]  # shows something only at the end of the last episode
    folder = only(tmp_path / "late", bridge_episode(0), bridge_episode(1, image_1=late))
    assert seen_cameras(open_rlds(folder), ["train"]) == ({"image_0": (8, 8), "image_1": (8, 8)}, ())
    assert list(read(folder, cameras=("image_1",))[0][0].images) == ["image_1"]
    with pytest.raises(InputError, match=r"no camera 'image_7'.*known: image_0, image_1"):
        read(folder, cameras=("image_7",))
    with pytest.raises(InputError, match="nothing but black images from image_1"):
        read(only(tmp_path / "black", bridge_episode(0)), cameras=("image_1",))


def test_absent_images_are_stored_black_and_reported(tmp_path: Path):
    found, report = read(only(tmp_path, bridge_episode(0), bridge_episode(1, image_0=[b""] * 4)))
    assert report.missing_images == {"image_0": 2}
    assert len(set(found[1].images["image_0"])) == 1
    assert found[1].images["image_0"][0][:2] == b"\xff\xd8"


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
    dataset, report = open_rlds(folder), Report()
    assert len(list(episodes(dataset, ["train"], {}, report))) == 2
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError) as caught:
            list(episodes(dataset, ["train"], {}, report))
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
    dataset = open_rlds(only(tmp_path, bridge_episode(0), bridge_episode(1, **change)))
    with pytest.raises(InputError, match=pattern) as caught:
        list(episodes(dataset, ["train"], {"image_0": (8, 8)}, Report()))
    assert f"{tmp_path / 'mini-train.tfrecord-00000-of-00001'}, record 1" in str(caught.value)


def test_a_broken_image_names_file_and_record(tmp_path: Path):
    dataset = open_rlds(only(tmp_path, bridge_episode(0, image_0=[b"\xff\xd8 broken"] * 4)))
    with pytest.raises(InputError, match=r"image of camera 'image_0' cannot be read .*00001, record 0"):
        seen_cameras(dataset, ["train"])


@settings(deadline=None, derandomize=True, max_examples=150)
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


def test_splits(tmp_path: Path):
    dataset = open_rlds(write_tfds(tmp_path, {"val": [[bridge_episode(0)]], "train": [[bridge_episode(1)]], "x": []}))
    assert choose_splits(dataset) == ("train", "val")
    assert choose_splits(dataset, ("val", "val")) == ("val",)
    with pytest.raises(InputError, match=r"no split 'trian'; did you mean|no split 'trian'"):
        choose_splits(dataset, ("trian",))


@pytest.mark.samples
def test_bridge_sample(samples: Path):
    found, report = read(samples / "bridge_rlds_octo")
    assert report == Report(read=50, kept=25, duplicates={"val": 25}, black_cameras=("image_3",))
    assert {len(e.action) for e in found} == {8}
    assert {tuple(e.images) for e in found} == {("image_0", "image_1", "image_2")}
    assert len({e.instruction for e in found}) == 4
    expected = np.load(samples / "bridge_rlds_octo" / "openvla_bridge_orig_expected.npz")
    for number, episode in enumerate(found):
        np.testing.assert_array_equal(episode.action, expected[f"action_{number:02d}"])
