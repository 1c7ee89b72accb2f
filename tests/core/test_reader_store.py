"""Episode stores read as sources: nothing changes on the way through, several join, others are refused."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm4vla_core import images
from vlm4vla_core.actions import BRIDGE
from vlm4vla_core.episodes import restore
from vlm4vla_core.episodes.formats import FORMATS, detect, open_source
from vlm4vla_core.episodes.source import Source
from vlm4vla_core.episodes.store import write_store
from vlm4vla_core.episodes.writer import Episode
from vlm4vla_core.errors import InputError


def episode(seed: int, steps: int = 5, size: int = 12) -> Episode:
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 255, (steps, size, size, 3), np.uint8)
    return Episode(
        instruction=f"do {seed}",
        images={"front": frames, "wrist": frames[:, ::-1]},
        state=rng.normal(size=(steps, 2)).astype(np.float32),
        action=rng.normal(size=(steps, 7)).astype(np.float32),
        columns={"truth": rng.normal(size=(steps, 3)).astype(np.float32)},
        split="val" if seed % 3 == 2 else "train",
        source=f"origin {seed}",
        info={"task": f"task {seed}"},
        depth={"front": rng.integers(0, 9000, (steps, size, size)).astype(np.uint16)},
        segmentation={"front": rng.integers(0, 9, (steps, size, size)).astype(np.uint8)},
    )


def make(out: Path, seeds: list[int], *, steps: int = 5, size: int = 12, **more: Any) -> Path:
    settings: dict[str, Any] = {"source": "made up", "convention": BRIDGE, "state_names": ("a", "b"), "config": {}}
    settings |= {"inputs": {}, "transform": "bridge_orig", "column_names": {"truth": ("p", "q", "r")}, **more}
    write_store(out, [episode(seed, steps, size) for seed in seeds], **settings)
    return out


def read(source: Source, cameras: tuple[str, ...] = ("front", "wrist")) -> list[Episode]:
    found = [one for u in source.units(source.splits) for one in source.episodes(u, cameras, source.transforms[0])]
    assert all(isinstance(one, Episode) for one in found)
    return [one for one in found if isinstance(one, Episode)]


@pytest.mark.parametrize("encoding", ["jpeg", "raw"])
def test_nothing_changes_on_the_way_through(tmp_path: Path, encoding: str):
    source = pickle.loads(pickle.dumps(open_source("store", make(tmp_path / "s", [0, 1, 2], encoding=encoding))))
    assert (source.name, source.convention, source.transforms) == ("made up", BRIDGE, ("bridge_orig",))
    assert (source.cameras, source.splits, source.columns) == (
        ("front", "wrist"), ("train", "val"), {"truth": ("p", "q", "r")},
    )  # fmt: skip
    for found, seed in zip(read(source), (0, 1, 2), strict=True):
        given = episode(seed)
        for name in ("instruction", "split", "source", "info", "depth_unit"):
            assert getattr(found, name) == getattr(given, name)
        for name in ("state", "action"):
            np.testing.assert_array_equal(getattr(found, name), getattr(given, name))
        np.testing.assert_array_equal(found.columns["truth"], given.columns["truth"])
        np.testing.assert_array_equal(found.depth["front"], given.depth["front"])
        np.testing.assert_array_equal(found.segmentation["front"], given.segmentation["front"])
        shown = given.images["front"]
        assert isinstance(shown, np.ndarray)
        if encoding == "raw":
            np.testing.assert_array_equal(found.images["front"], shown)
        else:
            assert found.images["front"] == [images.encode(frame) for frame in shown]


def test_several_stores_join_in_the_order_of_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(restore, "STEPS_PER_UNIT", 10)
    make(tmp_path / "b", [0, 1, 3])
    make(tmp_path / "a", [4, 2])
    source = open_source("store", tmp_path)
    assert [(unit.name, unit.split) for unit in source.units(("train", "val"))] == [
        ("a-0-train-000000", "train"), ("b-1-train-000000", "train"), ("b-1-train-000002", "train"),
        ("a-0-val-000001", "val"),
    ]  # fmt: skip
    assert [one.instruction for one in read(source, ("wrist",))] == ["do 4", "do 0", "do 1", "do 3", "do 2"]
    assert list(read(source, ("wrist",))[0].images) == ["wrist"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"convention": replace(BRIDGE, control_hz=10.0)}, r"another action convention: control_hz 10\.0 against 5\.0"),
        ({"state_names": ("a", "c")}, r"state_names \('a', 'c'\) against \('a', 'b'\)"),
        ({"image_size": 8}, "sizes"),
        ({"column_names": {"truth": ("p", "q", "x")}}, "columns"),
        ({"transform": "none"}, "transforms"),
    ],
)
def test_what_cannot_be_joined_is_told(tmp_path: Path, change: dict[str, Any], told: str):
    make(tmp_path / "a", [0])
    make(tmp_path / "b", [1], **change)
    with pytest.raises(InputError, match=f"cannot be joined: {told}") as caught:
        open_source("store", tmp_path)
    assert str(tmp_path / "b") in str(caught.value)


def test_damage_is_told(tmp_path: Path):
    with pytest.raises(InputError, match="no such folder"):
        open_source("store", tmp_path / "gone")
    path = make(tmp_path / "s", [0])
    shard = next(path.glob("steps-*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(InputError, match="bytes, the manifest says"):
        open_source("store", path)


def test_formats_are_told_by_their_landmarks(tmp_path: Path):
    marks = {
        "lerobot": "meta/info.json", "rlds": "x/1.0.0/dataset_info.json", "calvin": "training/episode_0000001.npz",
        "libero": "suite/task_demo.hdf5",
    }  # fmt: skip
    assert {*marks, "store"} == set(FORMATS)
    for name, mark in marks.items():
        path = tmp_path / name / mark
        path.parent.mkdir(parents=True)
        path.touch()
        assert detect(tmp_path / name) == name
    assert detect(tmp_path / "libero" / "suite" / "task_demo.hdf5") == "libero"
    assert detect(make(tmp_path / "s", [0])) == "store"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no known format of robot data .*lerobot: meta/info\.json"):
        detect(tmp_path / "empty")
    with pytest.raises(InputError, match=r"rlds data have no option 'depth'.*known: none"):
        open_source("rlds", tmp_path, depth=True)
    with pytest.raises(InputError, match=r"calvin data have no option 'scene'; did you mean 'scenes'"):
        open_source("calvin", tmp_path, scene="A")
    with pytest.raises(InputError, match="unknown format 'rdls'; did you mean 'rlds'"):
        open_source("rdls", tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        detect(tmp_path / "gone")
