"""Training: exact resume whatever kills it, the same start for both objectives, refusals, and that it learns."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import toy_store

from vlm4vla_core import checkpoint, folders, training
from vlm4vla_core.backbone import Backbone
from vlm4vla_core.episodes.store import EpisodeStore
from vlm4vla_core.errors import InputError
from vlm4vla_core.policy import VLAPolicy
from vlm4vla_core.presets import TrainConfig, make_config
from vlm4vla_core.training import learning_rate, train, up_to_date

SMALL = {
    "image_size": 28, "chunk": 2, "head_width": 16, "max_steps": 8, "batch_size": 4, "lr": 1e-3, "warmup_steps": 2,
    "schedule": "cosine", "clip": 1.0, "weight_decay": 0.01, "save_every": 3, "val_every": 0, "log_every": 1,
    "val_rows": 12, "threads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_store(tmp_path_factory.mktemp("toys") / "store").path


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**SMALL, **changes})


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, the reference of the tests below."""
    out = tmp_path_factory.mktemp("reference") / "run"
    train(config(), data, out)
    return out


def bytes_of(run: Path) -> list[bytes]:
    last = checkpoint.resolve(run)
    return [(last / name).read_bytes() for name in (checkpoint.WEIGHTS, checkpoint.STATE)]


def log_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    measured = ("samples_per_s", "waiting", "memory_gb")  # of the machine, not of the run
    return [{key: value for key, value in line.items() if key not in measured} for line in lines]


# --- what a run leaves ----------------------------------------------------------------------------------


def test_a_run_keeps_its_start_its_end_and_a_log(finished: Path):
    steps = [path.name for path in checkpoint.complete(finished)]
    assert steps == ["step-000000", "step-000003", "step-000006", "step-000008"]
    lines = [line for line in log_of(finished) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert {"loss", "arm", "gripper", "lr", "grad_norm"} <= set(lines[0])
    for line in lines:
        assert line["loss"] == pytest.approx(line["arm"] + 0.01 * line["gripper"], rel=1e-5)
    validations = [line["validation"] for line in log_of(finished) if "validation" in line]
    assert len(validations) == 2 and validations[-1]["rows"] == 6  # one of twelve episodes held out
    run = folders.read_json(finished / "run.json")
    assert run["parameters"]["trained"] == run["parameters"]["total"] > run["parameters"]["new"] > 0
    assert folders.read_manifest(checkpoint.resolve(finished), "checkpoint")["metrics"] == validations[-1]


def test_a_repeat_is_bit_identical_and_another_seed_is_not(data: Path, finished: Path, tmp_path: Path):
    train(config(), data, tmp_path / "again")
    train(config(seed=1), data, tmp_path / "other")
    assert bytes_of(tmp_path / "again") == bytes_of(finished) != bytes_of(tmp_path / "other")
    assert log_of(tmp_path / "again") == log_of(finished)


def test_both_objectives_start_from_the_same_backbone(data: Path, finished: Path, tmp_path: Path):
    last = train(config(objective="language", max_steps=2), data, tmp_path / "vlm")
    starts = [Backbone.load(run / "checkpoints" / "step-000000") for run in (finished, tmp_path / "vlm")]
    pairs = zip(starts[0].state_dict().values(), starts[1].state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not (starts[0].state_dict()["query"] == VLAPolicy.load(finished).backbone.query).all()
    metrics = folders.read_manifest(last, "checkpoint")["metrics"]
    assert {"loss", "token_accuracy", "answer_accuracy", "majority"} <= set(metrics)


def test_a_run_goes_on_from_another_runs_backbone(data: Path, finished: Path, tmp_path: Path):
    settings = config(backbone=str(finished), objective="language", max_steps=2)
    train(settings, data, tmp_path / "next")
    start = Backbone.load(tmp_path / "next" / "checkpoints" / "step-000000")
    pairs = zip(start.state_dict().values(), Backbone.load(finished).state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert start.lineage["stages"] == ["action", "language"]
    inputs = folders.read_manifest(checkpoint.resolve(tmp_path / "next"), "checkpoint")["inputs"]
    assert inputs["backbone"] == folders.read_manifest(checkpoint.resolve(finished), "checkpoint")["fingerprint"]


def test_what_is_frozen_does_not_move_and_the_rest_does(data: Path, tmp_path: Path):
    train(config(freeze=("vision", "word_embeddings")), data, tmp_path / "run")
    start, end = (Backbone.load(tmp_path / "run" / "checkpoints" / f"step-{n:06d}") for n in (0, 8))
    groups = start.groups()
    for name, value in start.state_dict().items():
        frozen = groups[name].startswith("vision.") or groups[name] == "embeddings"
        assert torch.equal(value, end.state_dict()[name]) == frozen or "k_proj.bias" in name, name
    run = folders.read_json(tmp_path / "run" / "run.json")
    assert run["parameters"]["trained"] < run["parameters"]["total"]


def test_it_learns_picture_and_instruction(data: Path, tmp_path: Path):
    recipe = config(max_steps=250, batch_size=8, lr=2e-3, warmup_steps=10, save_every=0, head_width=128)
    last = train(recipe, data, tmp_path / "run")
    metrics = folders.read_manifest(last, "checkpoint")["metrics"]
    assert metrics["error"]["x"] < 0.01 and metrics["error"]["y"] < 0.01  # of 0.05 and 0.04
    assert metrics["gripper_accuracy"] == 1.0
    store = EpisodeStore.open(data)
    rows = store.starts[:4]
    chunk = VLAPolicy.load(last).predict(store.images("front", rows), [store.instructions[i] for i in range(4)])
    assert np.array_equal(np.sign(chunk.actions[:, 0, :2]), np.sign(store.action[rows][:, :2]))
    assert np.array_equal(chunk.actions[:, 0, 6], store.action[rows][:, 6])


# --- resuming -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps_before", [0, 2, 5, 7])
def test_a_crash_in_any_step_resumes_exactly(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_before: int
):
    update = training._Run._update

    def crash(self: Any, *args: Any) -> Any:
        if self.step == steps_before:
            raise RuntimeError("crash")
        return update(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_update", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train(config(), data, tmp_path / "run")
    train(config(), data, tmp_path / "run")
    assert bytes_of(tmp_path / "run") == bytes_of(finished)
    assert log_of(tmp_path / "run") == log_of(finished)


def test_a_crash_while_a_checkpoint_is_written_resumes_exactly(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write = folders.write_manifest

    def crash(folder: Path, kind: str, **options: Any) -> Any:
        if options.get("step") == 6:
            raise RuntimeError("crash")
        return write(folder, kind, **options)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "write_manifest", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train(config(), data, tmp_path / "run")
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"step-000000", "step-000003"}
    train(config(), data, tmp_path / "run")
    assert bytes_of(tmp_path / "run") == bytes_of(finished)


def test_kill_9_resumes_exactly(data: Path, finished: Path, tmp_path: Path):
    out = tmp_path / "run"
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from vlm4vla_core import training\n"
        "update = training._Run._update\n"
        "def slow(self, *args):\n"
        "    import time\n"
        "    if self.step == 5: time.sleep(60)\n"  # holds the process between two checkpoints until it is killed
        "    return update(self, *args)\n"
        "training._Run._update = slow\n"
        f"training.train(training.TrainConfig(**{SMALL!r}), {str(data)!r}, {str(out)!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 90
    log = out / "log.jsonl"
    while time.monotonic() < deadline and not (log.exists() and '"step": 5,' in log.read_text()):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    assert checkpoint.resolve(out).name == "step-000003"
    train(config(), data, out)
    assert bytes_of(out) == bytes_of(finished) and log_of(out) == log_of(finished)


def test_ctrl_c_saves_the_step_and_goes_on(data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    update = training._Run._update

    def interrupted(self: Any, *args: Any) -> Any:
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config(), data, tmp_path / "run")
    assert checkpoint.resolve(tmp_path / "run").name == "step-000005"
    train(config(), data, tmp_path / "run")
    assert bytes_of(tmp_path / "run") == bytes_of(finished)


def test_a_finished_run_is_left_alone(data: Path, finished: Path):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert train(config(), data, finished) == up_to_date(config(), data, finished) == checkpoint.resolve(finished)
    assert train(config(save_every=1, threads=2), data, finished)  # not what decides a result
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}


# --- refusals -------------------------------------------------------------------------------------------


def test_changed_settings_and_data_are_refused_and_named(data: Path, finished: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"lr was 0\.001, is now 0\.002 .*give another --out"):
        train(config(lr=2e-3), data, finished)
    other = toy_store(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=f"data was .*, is now {other.fingerprint}"):
        train(config(), other.path, finished)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and holds no run"):
        train(config(), data, tmp_path / "full")


def test_a_locked_folder_is_refused(data: Path, tmp_path: Path):
    out = tmp_path / "run"
    out.mkdir()
    with (out / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is training"):
            train(config(), data, out)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_divergence_stops_names_the_batch_and_keeps_the_last_good_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str
):
    forward = VLAPolicy.forward

    def diverge(self: VLAPolicy, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        losses = forward(self, batch)
        run_step = diverge.calls
        diverge.calls += 1
        if run_step == 4:
            factor = math.nan if bad == "loss" else (losses["loss"] - losses["loss"].detach()).sqrt()
            losses["loss"] = losses["loss"] + (factor if bad == "loss" else 0 * factor)
        return losses

    diverge.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(VLAPolicy, "forward", diverge)
    with pytest.raises(
        InputError, match=r"at step 4, on rows \d+, .*the last good checkpoint is step-000003"
    ) as caught:
        train(config(), data, tmp_path / "run")
    assert ("loss is nan" if bad == "loss" else "gradient norm is nan") in str(caught.value)
    assert checkpoint.resolve(tmp_path / "run").name == "step-000003"


def test_an_unknown_camera_is_refused(data: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"no camera 'fron'.*did you mean 'front'"):
        train(config(camera="fron"), data, tmp_path / "run")


# --- settings -------------------------------------------------------------------------------------------


def test_the_rate_follows_its_closed_form():
    cosine = config(max_steps=100, warmup_steps=10, lr=1.0)
    rates = [learning_rate(cosine, step) for step in range(100)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and 0 < rates[99] < 1e-3
    constant = config(max_steps=100, warmup_steps=0, lr=1.0, schedule="constant")
    assert {learning_rate(constant, step) for step in range(100)} == {1.0}


def test_settings_come_from_presets_files_and_overrides(tmp_path: Path):
    assert make_config("tiny").backbone == "tiny"
    assert make_config("tiny", {"seed": 3}).seed == 3
    path = tmp_path / "recipe.toml"
    path.write_text('preset = "tiny"\nlr = 0.5\nfreeze = ["vision"]\n')
    made = make_config(str(path), {"batch_size": 2})
    assert (made.lr, made.freeze, made.batch_size) == (0.5, ("vision",), 2)
    assert made.head_width == make_config("tiny").head_width


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat = 1", r"unknown setting 'learning_rat'"),
        ("batchsize = 1", r"unknown setting 'batchsize'.*did you mean 'batch_size'"),
        ("batch_size = 0", r"setting batch_size = 0: .*greater than or equal to 1"),
        ('preset = "tinny"', r"unknown preset 'tinny'.*did you mean 'tiny'"),
        ("lr = ", "not a valid TOML file"),
        ('freeze = ["vison"]', r"setting freeze\.0 = 'vison'"),
    ],
)
def test_bad_settings_are_told_in_one_line(tmp_path: Path, text: str, message: str):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        make_config(str(tmp_path / "r.toml"))


def test_unknown_presets_and_missing_files(tmp_path: Path):
    with pytest.raises(InputError, match=r"unknown preset 'tyny'; did you mean 'tiny'"):
        make_config("tyny")
    with pytest.raises(InputError, match="no such settings file"):
        make_config(str(tmp_path / "none.toml"))


def test_nan_in_a_store_is_named_before_training(tmp_path: Path) -> None:
    store = toy_store(tmp_path / "store")
    shard = store.path / "steps-00000.arrow"
    actions = np.array(store.action)
    data = shard.read_bytes()
    assert data.count(actions.tobytes()) == 1
    broken = actions.copy()
    broken[7] = np.nan  # edited in place: size and manifest stay as they were
    shard.write_bytes(data.replace(actions.tobytes(), broken.tobytes()))
    with pytest.raises(InputError, match="1 actions are NaN or infinite, the first in row 7"):
        train(config(), tmp_path / "store", tmp_path / "run")
    assert not (tmp_path / "run").exists()
