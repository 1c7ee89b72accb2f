"""What stops a run from outside: a full disk, a worker that fails, a tracker that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate import tracking
from toys import toy_store

from vlm4vla_core import checkpoint
from vlm4vla_core.cli import main
from vlm4vla_core.presets import TrainConfig
from vlm4vla_core.run_log import RunLog, flat
from vlm4vla_core.training import train
from vlm4vla_core.training_data import Data

SETTINGS: dict[str, Any] = {
    "image_size": 28, "chunk": 2, "head_width": 16, "max_steps": 5, "batch_size": 4, "lr": 1e-3, "warmup_steps": 2,
    "log_every": 1, "val_rows": 6, "threads": 1, "device": "cpu", "save_every": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_store(tmp_path_factory.mktemp("toys") / "store").path


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(TrainConfig(**SETTINGS), data, out)
    return out


def content(run: Path) -> list[bytes]:
    return [(checkpoint.resolve(run) / name).read_bytes() for name in (checkpoint.WEIGHTS, checkpoint.STATE)]


# --- a full disk

# From step 3 on, "limit": no file may grow beyond a megabyte; "disk": what the disk has left is taken up.
CODE = """
import resource, sys, torch
from pathlib import Path
from vlm4vla_core import cli, training
update = training._Run._update
def full(self, *args):
    if self.step == 3 and sys.argv[4] == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    if self.step == 3 and sys.argv[4] == "disk":
        with (self.out.parent / "filler").open("wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                pass
    return update(self, *args)
training._Run._update = full
sys.exit(cli.main(["train", sys.argv[1], "--data", sys.argv[2], "--out", sys.argv[3]]))
"""


def train_until_full(folder: Path, data: Path, out: Path, how: str) -> Any:
    recipe = folder / "recipe.toml"
    recipe.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in SETTINGS.items()))
    words = [sys.executable, "-c", CODE, str(recipe), str(data), str(out), how]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, timeout=150, env=environment)


def assert_told_and_goes_on(done: Any, data: Path, out: Path, whole: Path, reason: str) -> None:
    assert done.returncode == 1
    said = done.stderr.strip()
    assert reason in said and said.startswith("vlm4vla train: the run could not be written") and "\n" not in said
    assert "it goes on from step-000002" in said
    assert [path.name for path in checkpoint.complete(out)] == ["step-000000", "step-000002"]
    left = {path.name for path in (out / "checkpoints").iterdir()}
    assert left == {"step-000000", "step-000002"}  # nothing half-written takes up room
    train(TrainConfig(**SETTINGS), data, out)
    assert content(out) == content(whole)
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4, 5, 5]


def test_a_file_that_may_not_grow(data: Path, whole: Path, tmp_path: Path):
    """The write of the checkpoint itself fails, with EFBIG."""
    done = train_until_full(tmp_path, data, tmp_path / "run", "limit")
    assert_told_and_goes_on(done, data, tmp_path / "run", whole, "the file would be larger than is allowed")


def test_a_full_disk(data: Path, whole: Path, tmp_path: Path):
    """A small file system of its own, filled to the last byte: ENOSPC."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        done = train_until_full(tmp_path, data, disk / "run", "disk")
        (disk / "filler").unlink()
        assert_told_and_goes_on(done, data, disk / "run", whole, "no space left on the disk")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# --- workers


def test_a_worker_that_fails_ends_the_run_and_it_goes_on(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    images = Data.images

    def failing(self: Data, draw: Any, size: int) -> Any:
        if failing.calls == 6:  # some batches ahead of the step
            raise MemoryError("no room for a picture")
        failing.calls += 1
        return images(self, draw, size)

    failing.calls = 0  # type: ignore[attr-defined]
    settings = TrainConfig(**SETTINGS, workers=3)
    with monkeypatch.context() as patch:
        patch.setattr(Data, "images", failing)
        with pytest.raises(MemoryError, match="no room for a picture"):
            train(settings, data, tmp_path / "run")
    train(settings, data, tmp_path / "run")
    assert content(tmp_path / "run") == content(whole)


# --- trackers


class Kept(tracking.GeneralTracker):
    """A tracker as accelerate wants them."""

    name = "kept"
    requires_logging_directory = True
    lines: ClassVar[list[tuple[int, dict[str, float]]]] = []
    ended = False

    def __init__(self, run_name: str, logging_dir: Path) -> None:
        super().__init__()
        Kept.where = (run_name, logging_dir)

    @property
    def tracker(self) -> Any:
        return self

    def log(self, values: dict[str, float], step: int | None = None, **rest: Any) -> None:
        Kept.lines.append((step or 0, values))

    def finish(self) -> None:
        Kept.ended = True


def test_a_tracker_gets_every_number_of_the_log(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "kept", Kept)
    monkeypatch.setattr(tracking, "_available_trackers", ["kept"])
    run = tmp_path / "run"
    train(TrainConfig(**SETTINGS, trackers=("kept",)), data, run)
    written = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [step for step, _ in Kept.lines] == [line["step"] for line in written]
    for (_, values), line in zip(Kept.lines, written, strict=True):
        if "validation" in line:
            assert values["validation/error/x"] == line["validation"]["error"]["x"]
        else:
            assert values["loss"] == line["loss"] and values["grad_norm"] == line["grad_norm"]
    assert Kept.where == ("run", run) and Kept.ended


def test_tensorboard_writes_what_its_reader_reads(data: Path, tmp_path: Path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train(TrainConfig(**SETTINGS, trackers=("tensorboard",)), data, run)
    events = EventAccumulator(str(run / "run"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    written = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert losses == pytest.approx({line["step"]: line["loss"] for line in written if "loss" in line}, rel=1e-6)
    assert [event.step for event in events.Scalars("validation/gripper_accuracy")] == [0, 5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "unknown tracker 'tensorbord'; did you mean 'tensorboard'?"),
        ("dvclive", "no tracker 'dvclive' is installed; pip install dvclive"),
        ("broken", "tracker 'broken' does not start (no account)"),
    ],
)
def test_a_tracker_that_is_not_there_is_one_line_before_training(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, name: str, message: str
):
    def broken(run_name: str) -> None:
        raise RuntimeError("no account")

    broken.requires_logging_directory = False  # type: ignore[attr-defined]
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "broken", broken)
    monkeypatch.setattr(tracking, "_available_trackers", ["broken"])
    words = ["train", "tiny", "--data", str(data), "--out", str(tmp_path / "run"), "--trackers", name]
    assert main(words) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "run").exists()


def test_numbers_of_a_line_are_named_by_their_place():
    assert flat({"a": 1, "b": {"c": 2.5, "d": {"e": 3}}, "s": "text", "t": True, "l": [1]}) == {
        "a": 1.0, "b/c": 2.5, "b/d/e": 3.0,
    }  # fmt: skip


def test_a_log_is_never_cut_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Going on rewrites the log aside; a disk that is full by then leaves the old one whole."""
    log = RunLog(tmp_path, (), first=True)
    log.line(1, loss=0.5)
    before = log.path.read_bytes()

    def full(self: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            log.restart(log.read(1))
    assert log.path.read_bytes() == before
    assert log.read(0) == [] and log.read(1) == [{"step": 1, "loss": 0.5}]
