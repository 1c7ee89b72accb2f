"""The LeRobot reader on data sets written in the exact layouts, with the traps seen in the wild, and on real ones."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_fuzz import changed
from lerobot_files import AV1, FPS, NAMES, SIZE, grey, info, numbers, png, table, video, write_v2, write_v3

from vlm4vla_core import images
from vlm4vla_core.actions import BRIDGE, ActionConvention
from vlm4vla_core.episodes import lerobot
from vlm4vla_core.episodes.checks import black_cameras
from vlm4vla_core.episodes.lerobot import LeRobotSource, open_lerobot
from vlm4vla_core.episodes.source import Skipped
from vlm4vla_core.episodes.video import Frames, video_fingerprint
from vlm4vla_core.episodes.writer import Episode
from vlm4vla_core.errors import InputError


def read(source: LeRobotSource, cameras: tuple[str, ...] | None = None) -> list[Any]:
    wanted = source.cameras if cameras is None else cameras
    return [one for unit in source.units(source.splits) for one in source.episodes(unit, wanted, "none")]


def whole(folder: Path) -> list[Episode]:
    """Everything, frames decoded."""
    found = [one for one in read(open_lerobot(folder)) if isinstance(one, Episode)]
    return [replace(one, images={camera: np.asarray(f) for camera, f in one.images.items()}) for one in found]


def check(found: list[Episode], lengths: list[int]) -> None:
    """Episodes equal what was written, every frame in its place."""
    assert [len(one.action) for one in found] == lengths
    for episode, (one, steps) in enumerate(zip(found, lengths, strict=True)):
        action, state = numbers(episode, steps)
        np.testing.assert_array_equal(one.action, action.astype(np.float32))
        np.testing.assert_array_equal(one.state, state.astype(np.float32))
        assert one.instruction == f"do {episode % 2}"
        shown = np.asarray(one.images["top"])
        assert shown.shape == (steps, SIZE, SIZE, 3)
        expected = [grey(episode, step) for step in range(steps)]
        assert np.abs(shown.mean((1, 2, 3)) - expected).max() < 3  # neighbours differ by 7


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_every_version_reads_alike(tmp_path: Path, version: str):
    lengths = [7, 12, 5]
    write = write_v3 if version == "v3.0" else write_v2
    folder = write(tmp_path, lengths, **({} if version == "v3.0" else {"version": version}))
    check(whole(folder), lengths)
    source = pickle.loads(pickle.dumps(open_lerobot(folder)))
    assert (source.format, source.cameras, source.sizes) == ("lerobot", ("top",), {"top": (SIZE, SIZE)})
    assert (source.state_names, source.convention.names, source.splits) == (("a", "b"), tuple(NAMES), ("train",))
    (unit,) = source.units(("train",))
    assert all(path.is_file() for path in unit.files)
    assert {path.suffix for path in unit.files} == {".json", ".parquet", ".mp4"} | (
        {".jsonl"} if version < "v3" else set()
    )
    assert black_cameras(source, ("train",), ("top",)) == ()


def test_units_are_runs_of_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lerobot, "STEPS_PER_UNIT", 8)
    folder = write_v3(tmp_path, [5, 5, 5, 5], splits={"val": "0:1", "train": "1:4"})
    source = open_lerobot(folder)
    assert [(unit.name, unit.split, len(unit.key)) for unit in source.units(source.splits)] == [
        ("episodes-000001", "train", 2), ("episodes-000003", "train", 1), ("episodes-000000", "val", 1),
    ]  # fmt: skip
    assert [one.source for one in read(source)] == [
        f"data/chunk-000/file-000.parquet, episode {index}" for index in (1, 2, 3, 0)
    ]
    with pytest.raises(InputError, match="no split 'test'"):
        source.units(("test",))


def test_no_convention_is_guessed(tmp_path: Path):
    folder = write_v2(tmp_path, [3])
    unknown = open_lerobot(folder).convention
    assert (unknown.units, unknown.frame, unknown.rotation) == (("unknown",) * 3, "unknown", "unknown")
    assert (unknown.relative, unknown.control_hz, unknown.scaling) == (None, FPS, "unknown")
    assert math.isnan(unknown.gripper_open)
    again = ActionConvention.from_dict(json.loads(json.dumps(unknown.to_dict(), allow_nan=False)))
    assert again.differences(unknown) == []
    assert math.isnan(again.gripper_closed)
    named = replace(BRIDGE, names=tuple(NAMES), units=("m", "m", "1"))
    assert open_lerobot(folder, convention=named).convention is named
    with pytest.raises(InputError, match=r"the convention has 7 dimensions, the data 3.*named x, y, gripper"):
        open_lerobot(folder, convention=BRIDGE)


# --- traps seen in the wild -----------------------------------------------------------------------------


def test_the_traps_of_gr1(tmp_path: Path):
    """A wrong path template, a camera without files, float64, no frame_index, time not from 0, one keyframe."""
    lengths = [6, 9]
    told = info("v2.0", lengths)
    wrong = {
        "data_path": "data/chunk-{episode_index:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_index:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": told["features"] | {"observation.images.gone": told["features"]["observation.images.top"]},
    }
    folder = write_v2(tmp_path, lengths, version="v2.0", **wrong)
    for episode, steps in enumerate(lengths):
        action, state = numbers(episode, steps)
        times = np.arange(steps) / FPS + 0.05
        columns: dict[str, Any] = {"action": list(action), "observation.state": list(state), "frame_index": None}
        rows = table(episode, steps, timestamp=times, **columns)
        pq.write_table(rows, folder / f"data/chunk-000/episode_{episode:06d}.parquet")
    check(whole(folder), lengths)
    source = open_lerobot(folder)
    assert (source.cameras, source.absent) == (("top",), ("gone",))
    assert [one.notes for one in read(source)] == [{"episodes without camera gone, which is declared": 1}] * 2
    with pytest.raises(InputError, match="no camera 'gone' in the data"):
        read(source, ("gone",))


def test_templates_that_nothing_matches(tmp_path: Path):
    folder = write_v2(tmp_path, [3], data_path="elsewhere/{episode_index}.parquet")  # the usual place is tried
    check(whole(folder), [3])
    (folder / "data/chunk-000/episode_000000.parquet").unlink()
    with pytest.raises(InputError, match=r"none of the episodes' tables is there .*elsewhere/0\.parquet"):
        open_lerobot(folder)
    write_v2(tmp_path, [3], data_path="data/{nobody}.parquet")
    with pytest.raises(InputError, match=r"path template 'data/\{nobody\}\.parquet' names an unknown 'nobody'"):
        open_lerobot(folder)


def test_episodes_that_are_not_there_are_counted(tmp_path: Path):
    folder = write_v2(tmp_path, [3, 4, 5])
    (folder / "data/chunk-000/episode_000001.parquet").unlink()
    first, second, third = read(open_lerobot(folder))
    assert second == Skipped("listed but not there", "data/chunk-000/episode_000001.parquet, episode 1")
    assert (len(first.action), len(third.action)) == (3, 5)


def test_encoded_images_in_the_table(tmp_path: Path):
    steps = 4
    told = info("v2.0", [steps])
    camera = {"dtype": "image", "shape": [3, 16, SIZE], "names": ["channel", "height", "width"]}
    told["features"] = {k: v for k, v in told["features"].items() if "images" not in k} | {"image": camera}
    cells: list[dict[str, Any]] = [{"bytes": png(grey(0, step)), "path": None} for step in range(steps)]
    folder = write_v2(tmp_path, [steps], features=told["features"], columns={"image": cells})
    source = open_lerobot(folder)
    assert (source.cameras, source.sizes) == (("image",), {"image": (16, SIZE)})
    (one,) = read(source)
    assert [int(images.decode(frame).mean()) for frame in one.images["image"]] == [grey(0, s) for s in range(steps)]
    (folder / "pictures").mkdir()
    cells[2] = {"bytes": None, "path": "pictures/2.png"}
    write_v2(tmp_path, [steps], features=told["features"], columns={"image": cells})
    with pytest.raises(InputError, match=r"no image of 'image' .*episode 0, step 2"):
        read(open_lerobot(folder))
    (folder / "pictures/2.png").write_bytes(png(99))
    (one,) = read(open_lerobot(folder))
    assert int(images.decode(one.images["image"][2]).mean()) == 99


def test_tasks(tmp_path: Path):
    folder = write_v2(tmp_path, [3, 3], columns={"task_index": None})  # then the list of episodes tells
    assert [one.instruction for one in read(open_lerobot(folder))] == ["do 0", "do 1"]
    write_v2(tmp_path, [3, 3], columns={"task_index": [1, 0, 0]})
    assert [one.instruction for one in read(open_lerobot(folder))] == ["do 1", "do 1"]
    note = "episodes with several tasks, of which the first was kept"
    assert read(open_lerobot(folder))[0].notes == {note: 1}
    write_v2(tmp_path, [3, 3], columns={"task_index": [7, 7, 7]})
    with pytest.raises(InputError, match=r"task 7 is in no table of tasks .*episode_000000\.parquet, episode 0"):
        read(open_lerobot(folder))
    write_v2(tmp_path, [3, 3])
    (folder / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": " "}\n{"task_index": 1, "task": "x"}\n')
    first, second = read(open_lerobot(folder))
    assert first == Skipped("without language", "data/chunk-000/episode_000000.parquet, episode 0")
    assert second.instruction == "x"


def test_names_in_every_form(tmp_path: Path):
    for names, expected in (
        (["p", "q", "r"], ("p", "q", "r")),
        ([["p", "q", "r"]], ("p", "q", "r")),
        ({"axes": ["p", "q", "r"]}, ("p", "q", "r")),
        (None, ("0", "1", "2")),
        (["p", "q"], ("0", "1", "2")),
    ):
        features = info("v2.1", [3])["features"]
        features["action"]["names"] = names
        assert open_lerobot(write_v2(tmp_path, [3], features=features)).convention.names == expected


# --- damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "pattern"),
    [
        ({"action": None}, "no column 'action'.*known"),
        ({"action": list(np.zeros((4, 2)))}, r"'action' has shape \(4, 2\), expected \(T, 3\)"),
        ({"action": [[0.0] * 3, [0.0] * 2, [0.0] * 3, [0.0] * 3]}, r"'action' has rows of \[2, 3\] numbers"),
        ({"action": [[0.0] * 3, None, [0.0] * 3, [0.0] * 3]}, "'action' has missing values"),
        ({"action": [[0.0] * 3, [0.0, None, 0.0], [0.0] * 3, [0.0] * 3]}, "'action' has missing values"),
        ({"action": [["x"]] * 4}, "'action' holds list<.*string>, not numbers"),
        ({"action": list(np.full((4, 3), np.nan))}, r"'action' is NaN in dimension 0 \(x\).*step 0"),
        ({"observation.state": list(np.full((4, 2), 1e300))}, "'observation.state' is infinite"),
        ({"timestamp": [0.0, 0.1, 0.26, 0.3]}, r"timestamp 0\.2600 s is off the grid of 10 frames per second.*step 2"),
        ({"timestamp": [0.0, 0.1, 0.2, 0.4]}, r"timestamp 0\.4000 s is off the grid"),
        ({"timestamp": [0.0, 0.1, math.nan, 0.3]}, "timestamp nan s is off the grid"),
        ({"frame_index": [0, 1, 3, 4]}, "frame_index 3 where 2 belongs .*step 2"),
    ],
)
def test_broken_tables_name_file_and_episode(tmp_path: Path, columns: dict[str, Any], pattern: str):
    folder = write_v2(tmp_path, [4], columns=columns)
    with pytest.raises(InputError, match=pattern) as caught:
        read(open_lerobot(folder))
    assert str(folder / "data/chunk-000/episode_000000.parquet") in str(caught.value)


def test_timestamps_need_not_be_exact(tmp_path: Path):
    times = np.arange(6) / FPS + np.array([0, 0.04, -0.04, 0.02, 0, -0.03])
    check(whole(write_v2(tmp_path, [6], columns={"timestamp": times})), [6])


def test_lengths_must_agree(tmp_path: Path):
    folder = write_v2(tmp_path, [4])
    for told, pattern in ((5, "4 steps found, the list of episodes says 5"), (0, "says 0")):
        (folder / "meta/episodes.jsonl").write_text(json.dumps({"episode_index": 0, "tasks": ["a"], "length": told}))
        with pytest.raises(InputError, match=pattern):
            read(open_lerobot(folder))
    (folder / "meta/episodes.jsonl").write_text("")
    with pytest.raises(InputError, match=r"0 episodes listed, info\.json says 1"):
        open_lerobot(folder)
    pq.write_table(table(0, 0), folder / "data/chunk-000/episode_000000.parquet")  # an episode without steps
    (folder / "meta/episodes.jsonl").write_text(json.dumps({"episode_index": 0, "tasks": ["a"], "length": 0}))
    with pytest.raises(InputError, match="0 steps found"):
        read(open_lerobot(folder))


def test_videos_that_do_not_fit(tmp_path: Path):
    folder = write_v2(tmp_path, [5, 5])
    path = folder / "videos/chunk-000/observation.images.top/episode_000001.mp4"
    video(path, [50] * 3)
    with pytest.raises(InputError, match=r"no frame within 50\.0 ms of 0\.300 s .*episode_000001\.mp4"):
        whole(folder)
    video(path, [50] * 5, fps=7)
    with pytest.raises(InputError, match="no frame within"):
        whole(folder)
    path.unlink()
    with pytest.raises(InputError, match=r"video file missing .*episode_000001\.mp4"):
        whole(folder)
    path.write_bytes(b"no video")
    with pytest.raises(InputError, match=r"cannot be decoded .*episode_000001\.mp4"):
        whole(folder)
    assert len(read(open_lerobot(folder), ())) == 2  # without the camera all is well


def test_an_episode_does_not_reach_into_the_next(tmp_path: Path):
    folder = write_v3(tmp_path, [5, 5])
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0]["videos/observation.images.top/to_timestamp"] = 0.4
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(
        InputError, match=r"5 steps do not fit into 0\.000 to 0\.400 s of video .*file-000\.mp4, episode 0"
    ):
        whole(folder)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"codebase_version": "v1.6"}, r"LeRobot version 'v1\.6', only v2\.0, v2\.1 and v3\.0"),
        ({"codebase_version": "v4.0"}, r"LeRobot version 'v4\.0'"),
        ({"fps": 0}, "not a LeRobot description .*0.0 frames per second"),
        ({"fps": "fast"}, "not a LeRobot description"),
        ({"features": {}}, "no feature action or actions"),
        ({"features": []}, "not a LeRobot description"),
        ({"splits": {"train": "all"}}, "not a LeRobot description"),
        ({"total_episodes": 7}, r"1 episodes listed, info\.json says 7"),
    ],
)
def test_strange_descriptions(tmp_path: Path, change: dict[str, Any], pattern: str):
    with pytest.raises(InputError, match=pattern):
        open_lerobot(write_v2(tmp_path, [3], **change))


def test_missing_descriptions(tmp_path: Path):
    with pytest.raises(InputError, match=r"file not found .*info\.json"):
        open_lerobot(tmp_path)
    for write, name in (
        (write_v2, "meta/tasks.jsonl"),
        (write_v3, "meta/tasks.parquet"),
        (write_v2, "meta/episodes.jsonl"),
    ):
        folder = write(tmp_path / name.replace("/", "_"), [3])
        (folder / name).unlink()
        with pytest.raises(InputError, match=Path(name).name):
            read(open_lerobot(folder))


# --- fuzz -----------------------------------------------------------------------------------------------


def same_or_told(folder: Path, lengths: list[int], damaged: Path) -> None:
    """Reading gives everything, or one line that names the damaged file (or the folder of descriptions)."""
    try:
        check(whole(folder), lengths)
    except InputError as error:
        assert str(damaged.parent if damaged.suffix == ".jsonl" else damaged) in str(error) or "episode_" in str(error)
        assert "\n" not in str(error)


def cut_everywhere(folder: Path, lengths: list[int], name: str, step: int) -> None:
    path = folder / name
    content = path.read_bytes()
    for end in range(0, len(content), step):
        path.write_bytes(content[:end])
        same_or_told(folder, lengths, path)
    path.write_bytes(content)


def flip_everywhere(folder: Path, lengths: list[int], name: str, step: int) -> None:
    """A changed byte gives an error, or all frames and steps (of other content, where a format has no checksums)."""
    path = folder / name
    content = path.read_bytes()
    for place in range(0, len(content), step):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            found = whole(folder)
        except InputError as error:
            assert str(folder) in str(error)
            assert "\n" not in str(error)
        else:
            assert [len(one.action) for one in found] == lengths
            for one, steps in zip(found, lengths, strict=True):  # a renamed column is a camera without files: noted
                assert one.notes if not one.images else len(one.images["top"]) == steps
    path.write_bytes(content)


DESCRIPTIONS = ("meta/info.json", "meta/episodes.jsonl", "meta/tasks.jsonl")
V2_VIDEO = "videos/chunk-000/observation.images.top/episode_000000.mp4"
V3_VIDEO = "videos/observation.images.top/chunk-000/file-000.mp4"
BINARY = [
    ("v2.1", "data/chunk-000/episode_000000.parquet", "mpeg4"),
    ("v2.1", V2_VIDEO, "libx264"),
    ("v2.1", V2_VIDEO, AV1),
    ("v3.0", "meta/episodes/chunk-000/file-000.parquet", "mpeg4"),
    ("v3.0", "meta/tasks.parquet", "mpeg4"),
    ("v3.0", "data/chunk-000/file-000.parquet", "mpeg4"),
    ("v3.0", V3_VIDEO, "libx264"),
    ("v3.0", V3_VIDEO, AV1),
]


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_descriptions_cut_at_every_byte(tmp_path: Path, name: str):
    folder = write_v2(tmp_path, [2], codec="mpeg4")
    cut_everywhere(folder, [2], name, 1)


def damage_everywhere(folder: Path, version: str, name: str, codec: str, step: int) -> None:
    write_v3(folder, [2], codec=codec) if version == "v3.0" else write_v2(folder, [2], codec=codec)
    cut_everywhere(folder, [2], name, step)
    flip_everywhere(folder, [2], name, step)


@pytest.mark.parametrize(("version", "name", "codec"), BINARY)
def test_files_cut_or_changed_here_and_there(tmp_path: Path, version: str, name: str, codec: str):
    damage_everywhere(tmp_path, version, name, codec, 61)


@pytest.mark.slow
@pytest.mark.parametrize(("version", "name", "codec"), BINARY)
def test_files_cut_and_changed_at_every_byte(tmp_path: Path, version: str, name: str, codec: str):
    damage_everywhere(tmp_path, version, name, codec, 1)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(data=st.data())
def test_no_description_crashes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    if not folder.is_dir():
        write_v2(folder, [2], codec="mpeg4")
    (folder / "meta/info.json").write_text(json.dumps(changed(info("v2.1", [2]), data)))
    row = {"episode_index": 0, "tasks": ["do 0"], "length": 2}
    (folder / "meta/episodes.jsonl").write_text(json.dumps(changed(row, data) if data.draw(st.booleans()) else row))
    try:
        for one in read(open_lerobot(folder)):
            assert isinstance(one, Skipped) or all(len(np.asarray(f)) == 2 for f in one.images.values())
    except InputError as error:
        assert "\n" not in str(error)


# --- real ones ------------------------------------------------------------------------------------------


@pytest.mark.samples
def test_v21_and_v30_of_the_same_episodes(samples: Path):
    old, new = (open_lerobot(samples / f"lerobot_{v}_unitree_g1") for v in ("v21", "v30"))
    listed = read(old)
    assert sum(isinstance(one, Skipped) for one in listed) == 97
    first = [one for one in listed if isinstance(one, Episode)]
    second = read(new)
    assert [len(one.action) for one in first] == [221, 277, 280]
    assert old.convention.names[0] == "kLeftShoulderPitch"
    for a, b in zip(first, second, strict=True):
        assert a.instruction == b.instruction == "Pick up the yellow bottle on the table."
        np.testing.assert_array_equal(a.action, b.action)
        np.testing.assert_array_equal(a.state, b.state)
        assert len(a.images["cam_high"]) == len(b.images["cam_high"]) == len(a.action)
        for x, y in zip(a.images["cam_high"], b.images["cam_high"], strict=True):
            assert (x == y).all()


@pytest.mark.samples
def test_decoded_frames_are_the_expected(samples: Path):
    for name, expected in json.loads((samples / "video_expected.json").read_text()).items():
        found = video_fingerprint(samples / name)
        assert found == {key: expected[key] for key in found}
        first = next(iter(Frames(samples / name, np.zeros(1), 0.01)))
        np.testing.assert_allclose(first.mean((0, 1)), expected["first_rgb_mean"], atol=0.006)
