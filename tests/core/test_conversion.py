"""Conversion unit by unit: equal bytes however it was done, nothing lost or done twice, one line when it cannot go."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_source import ToySource, made, write_toy

from vlm4vla_core import folders
from vlm4vla_core.episodes import assemble, conversion, writer
from vlm4vla_core.episodes.source import Unit
from vlm4vla_core.episodes.store import EpisodeStore, write_store
from vlm4vla_core.episodes.writer import Recipe
from vlm4vla_core.errors import InputError

TRAIN, VAL = [[0, 1, 2], [3], [4, 5]], [[6, 1], [7]]  # the episode of seed 1 is in both splits


@pytest.fixture
def source(tmp_path: Path) -> ToySource:
    return write_toy(tmp_path / "data", TRAIN, VAL)


def convert(source: ToySource, out: Path, **more: Any) -> dict[str, Any] | None:
    recipe = Recipe(source.convention, source.state_names, image_size=8, columns=source.columns)
    settings: dict[str, Any] = {"cameras": source.cameras, "transform": "none", "config": {"size": 8}}
    return conversion.convert(out, source, source.units(source.splits), recipe, **(settings | more))[0]


def everything(out: Path) -> dict[str, bytes]:
    """Name -> bytes of all files, the manifest without the time that it was written."""
    found = {path.name: path.read_bytes() for path in out.iterdir()}
    manifest = json.loads(found.pop("dataset.json"))
    return found | {"dataset.json": json.dumps({**manifest, "made_by": 0}).encode()}


def test_a_store_holds_the_episodes_in_order_and_no_repeats(source: ToySource, tmp_path: Path):
    account = convert(source, tmp_path / "s")
    store = EpisodeStore.open(tmp_path / "s", hashes=True)
    assert store.episodes["seed"].tolist() == [str(seed) for seed in (0, 1, 2, 3, 4, 5, 6, 7)]
    assert store.splits == ["train"] * 6 + ["val"] * 2
    assert account == store.manifest["account"]
    assert account == {
        "read": 9, "kept": 8, "left_out": {}, "duplicates": {"val": 1}, "black_cameras": [],
        "notes": {"pictures drawn anew": 2},
    }  # fmt: skip
    assert store.manifest["domains"] == ["A", "B"] and store.manifest["seeds"] == [str(n) for n in range(8)]
    # the same episodes through the other way in: same rows, pictures, statistics
    whole = [made(seed, source.cameras, "train" if seed < 6 else "val", "") for seed in range(8)]
    again = write_store(
        tmp_path / "w", whole, source="toy", convention=source.convention, state_names=source.state_names, config={},
        inputs={}, image_size=8, column_names=source.columns,
    )  # fmt: skip
    for name in ("state", "action", "episode_of", "step_of", "starts", "content", "instructions", "stats"):
        np.testing.assert_array_equal(getattr(store, name), getattr(again, name))
    np.testing.assert_array_equal(store.column("truth"), again.column("truth"))
    rows = range(len(store))
    assert [store.jpeg("wrist", row) for row in rows] == [again.jpeg("wrist", row) for row in rows]
    assert not conversion.partial_folder(tmp_path / "s").exists()


def test_equal_bytes_for_workers_and_machines(source: ToySource, tmp_path: Path):
    convert(source, tmp_path / "one")
    convert(source, tmp_path / "two", workers=2)
    assert convert(source, tmp_path / "many", shard=(2, 2)) is None
    assert convert(source, tmp_path / "many", shard=(1, 2)) is None
    assert not (tmp_path / "many").exists()
    convert(source, tmp_path / "many")
    expected = everything(tmp_path / "one")
    assert everything(tmp_path / "two") == expected == everything(tmp_path / "many")


def killed_at(call: int, where: str, run: Callable[[], Any]) -> int:
    """Run in a process of its own, which kills itself at the given call of `where`; its exit code."""

    def child() -> None:
        owner, name = {
            "write_arrow": (writer, "write_arrow"), "write_json": (folders, "write_json"), "replace": (Path, "replace"),
            "unlink": (Path, "unlink"), "finish_arrow": (assemble, "write_arrow"),
        }[where]  # fmt: skip
        original, calls = getattr(owner, name), 0

        def deadly(*args: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **more)

        setattr(owner, name, deadly)
        run()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.parametrize(
    ("where", "call"),
    [("write_arrow", 1), ("write_arrow", 4), ("write_json", 2), ("write_json", 4), ("write_json", 6),
     ("write_json", 7), ("write_json", 8), ("write_json", 9), ("replace", 3), ("replace", 8), ("replace", 13),
     ("replace", 14), ("unlink", 8), ("finish_arrow", 1), ("finish_arrow", 2)],
)  # fmt: skip
def test_killed_anywhere_the_next_run_gives_the_same_bytes(
    source: ToySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, call: int
):
    convert(source, tmp_path / "whole")
    expected = everything(tmp_path / "whole")
    out = tmp_path / "s"
    assert killed_at(call, where, lambda: convert(source, out)) == -signal.SIGKILL
    assert not out.exists() or len(EpisodeStore.open(out)) > 0
    before = len(list(conversion.partial_folder(out).glob("parts/*.json")))
    converted = []
    original = conversion.convert_unit
    monkeypatch.setattr(conversion, "convert_unit", lambda *a: converted.append(a[1]) or original(*a))
    convert(source, out)
    assert len(converted) == 5 - before  # finished units are kept
    assert everything(out) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "s", "whole"]


def test_a_killed_worker_is_told_in_one_line_and_the_rest_is_kept(source: ToySource, tmp_path: Path):
    (source.folder / "val-1.json.deadly").touch()
    with pytest.raises(InputError, match=r"a worker process was killed .*; issue the same command again") as told:
        convert(source, tmp_path / "s", workers=2)
    assert "\n" not in str(told.value)
    (source.folder / "val-1.json.deadly").unlink()
    convert(source, tmp_path / "s", workers=2)
    convert(source, tmp_path / "one")
    assert everything(tmp_path / "s") == everything(tmp_path / "one")


@pytest.mark.parametrize("call", [1, 4, 6])  # the first shard, a later one, the episode table
def test_a_full_disk_is_told_in_one_line_and_the_rest_is_kept(
    source: ToySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
):
    original, calls = writer.write_arrow, []

    def full(*args: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_arrow", full)
        patch.setattr(assemble, "write_arrow", full)
        with pytest.raises(InputError, match=r"the disk is full \[.*\.s\.partial\]; make room") as told:
            convert(source, tmp_path / "s")
    assert f"{min(call - 1, 5)} of 5 parts are kept" in str(told.value) and "\n" not in str(told.value)
    convert(source, tmp_path / "s")
    convert(source, tmp_path / "one")
    assert everything(tmp_path / "s") == everything(tmp_path / "one")


def test_what_is_unfinished_belongs_to_its_settings_and_files(
    source: ToySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, converted = tmp_path / "s", []
    convert(source, out, shard=(1, 2))
    with pytest.raises(InputError, match="unfinished conversion with other settings"):
        convert(source, out, config={"size": 9})
    (source.folder / "train-2.json").write_text(json.dumps({"seeds": [9]}))  # a unit of the part that is there
    original = conversion.convert_unit
    monkeypatch.setattr(conversion, "convert_unit", lambda *a: converted.append(a[2].name) or original(*a))
    convert(source, out)
    assert converted == ["train-1.json", "train-2.json", "val-0.json"]
    assert EpisodeStore.open(out, hashes=True).episodes["seed"].tolist() == ["0", "1", "2", "3", "9", "6", "7"]


def test_only_one_conversion_at_a_time(source: ToySource, tmp_path: Path):
    convert(source, tmp_path / "s", shard=(1, 2))
    with (conversion.partial_folder(tmp_path / "s") / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as another machine that does its part
        with pytest.raises(InputError, match="another conversion into this store is running"):
            convert(source, tmp_path / "s")
        assert convert(source, tmp_path / "s", shard=(2, 2)) is None


def test_files_are_hashed_again_only_when_they_look_changed(
    source: ToySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    convert(source, tmp_path / "s")
    units, hashed = source.units(source.splits), []
    original = folders.file_fingerprint
    monkeypatch.setattr(folders, "file_fingerprint", lambda path: hashed.append(path.name) or original(path))

    def current(config: dict[str, Any]) -> bool:
        return conversion.up_to_date(tmp_path / "s", source, source.units(source.splits), config)

    assert current({"size": 8}) and not hashed
    assert not current({"size": 9}) and not hashed
    os.utime(units[1].files[0], ns=(1, 1))
    assert current({"size": 8}) and hashed == ["train-1.json"]
    text = units[1].files[0].read_text()
    units[1].files[0].write_text(text.replace("3", "4"))  # as long as before
    assert not current({"size": 8})
    units[1].files[0].write_text(text)
    assert current({"size": 8})
    (source.folder / "val-2.json").write_text(json.dumps({"seeds": [11]}))
    assert not current({"size": 8})


def test_parts_that_do_not_fit_together_are_refused(source: ToySource, tmp_path: Path):
    (source.folder / "val-1.json").write_text(json.dumps({"seeds": [7], "size": 20}))
    convert(source, tmp_path / "s")  # all resized to one size
    recipe = Recipe(source.convention, source.state_names, columns=source.columns)
    for workers in (1, 2):
        with pytest.raises(
            InputError, match=r"cameras are .*\[20, 20\].*in .* \[16, 16\].* \[val-1.json\].*--size"
        ) as e:
            conversion.convert(
                tmp_path / "o", source, source.units(source.splits), recipe, cameras=source.cameras, transform="none",
                config={}, workers=workers,
            )  # fmt: skip
        assert "\n" not in str(e.value)


def test_nothing_to_convert_says_why_and_leaves_nothing(tmp_path: Path):
    source = write_toy(tmp_path / "data", [[]], silent=3)
    with pytest.raises(InputError, match=r"no episodes to convert .*; 3 episodes without language left out"):
        convert(source, tmp_path / "s")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_no_more_processes_than_there_is_work_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conversion, "cores", lambda: 4)
    recorded = [Unit(str(index), "train", ()) for index in range(100)]
    assert [conversion.enough(recorded[:n]) for n in (1, 3, 4, 8, 100)] == [1, 1, 2, 3, 4]
    with (tmp_path / "large").open("wb") as handle:
        handle.truncate(20 << 20)
    assert conversion.enough([Unit("a", "train", (tmp_path / "large",))]) == 3
