"""Two gloo processes under torchrun, DDP and FSDP2: the losses of one process, exact resume, faults of one of them."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys import toy_store

from vlm4vla_core import checkpoint, training
from vlm4vla_core.errors import InputError
from vlm4vla_core.policy import VLAPolicy
from vlm4vla_core.presets import TrainConfig
from vlm4vla_core.sharding import check_sharded
from vlm4vla_core.training import train

SETTINGS: dict[str, Any] = {
    "image_size": 28, "chunk": 5, "head_width": 16, "max_steps": 6, "batch_size": 4, "lr": 1e-4, "warmup_steps": 0,
    "clip": 1.0, "log_every": 1, "val_rows": 6, "val_every": 3, "threads": 1, "device": "cpu", "save_every": 2,
    "head": "flow", "auxiliary": {"language": 0.5, "dense": 0.3}, "augmentation": "calvin",
}  # fmt: skip
# At step 5: "kill", the second process kills both. At step 3: "die", it kills itself; "nan", its loss is no number;
# "torn", its data cannot be read; "stop", both wait for a signal.
CODE = """
import os, signal, sys, time, torch
torch.set_num_threads(1)
from pathlib import Path
from vlm4vla_core import cli, training
from vlm4vla_core.errors import InputError
update, prepare, mode = training._Run._update, training._Run._prepare, sys.argv[4]
def broken(self, draw, parts):
    if self.step == 5 and self.devices.rank == 1 and mode == "kill":
        os.kill(os.getppid(), signal.SIGKILL); os.kill(os.getpid(), signal.SIGKILL)
    if self.step == 3 and self.devices.rank == 1 and mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if self.step == 3 and self.devices.rank == 1 and mode == "nan":
        parts[0]["action"]["arm_targets"][:] = float("nan")
    if self.step == 3 and mode == "stop":
        Path(str(self.out) + f".waits{self.devices.rank}").touch()
        time.sleep(3)  # the signal comes meanwhile; the handler sets a flag
    return update(self, draw, parts)
def torn(self, step):
    if step == 3 and self.devices.rank == 1 and mode == "torn":
        raise InputError("damaged image of camera 'front' at row 7")
    return prepare(self, step)
training._Run._update, training._Run._prepare = broken, torn
sys.exit(cli.main(["train", sys.argv[1], "--data", sys.argv[2], "--out", sys.argv[3]]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_store(tmp_path_factory.mktemp("toys") / "store").path


def begin(folder: Path, settings: dict[str, Any], data: Path, out: Path, mode: str = "run") -> Any:
    script = folder / "script.py"
    script.write_text(CODE)
    recipe = folder / "recipe.toml"
    told = {name: json.dumps(value).replace('":', '" =') for name, value in settings.items()}
    recipe.write_text("".join(f"{name} = {value}\n" for name, value in told.items()))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    words += [str(recipe), str(data), str(out), mode]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *words], env=environment, start_new_session=True, **pipes)


def ended(process: Any) -> Any:
    """Its exit code and stderr, within a time; nothing of it may be left."""
    try:
        _, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return SimpleNamespace(returncode=process.returncode, stderr=errors)


def two(folder: Path, settings: dict[str, Any], data: Path, out: Path, mode: str = "run") -> Any:
    return ended(begin(folder, settings, data, out, mode))


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pair(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    done = two(folder, SETTINGS, data, folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def one(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    train(TrainConfig(**SETTINGS), data, out)
    return out


def assert_alike(one: Path, other: Path) -> None:
    """The same losses and errors to fp32 rounding; and weights, where gradients do not vanish."""
    assert len(lines(one)) == len(lines(other))
    for a, b in zip(lines(one), lines(other), strict=True):
        keys = {"loss", "action", "arm", "language", "dense", "grad_norm"} & set(a)
        assert {key: b[key] for key in keys} == pytest.approx({key: a[key] for key in keys}, rel=1e-4)
        if "validation" in a:
            assert b["validation"]["loss"] == pytest.approx(a["validation"]["loss"], rel=1e-4)
            assert b["validation"]["error"] == pytest.approx(a["validation"]["error"], rel=1e-3)
            dense = a["validation"]["dense"]
            assert b["validation"]["dense"] == pytest.approx(dense, rel=1e-3) and dense["gripper_cm"] > 0
        if "gradient_norms" in a:
            assert b["gradient_norms"] == pytest.approx(a["gradient_norms"], rel=1e-3, abs=1e-6)
    ends = [load_file(checkpoint.resolve(run) / checkpoint.WEIGHTS) for run in (one, other)]
    assert set(ends[0]) == set(ends[1])
    close = [torch.allclose(value, ends[1][name], rtol=0, atol=2e-5) for name, value in ends[0].items()]
    assert sum(close) > 0.98 * len(close)  # Adam turns rounding of vanishing gradients into steps of their own sign


def assert_identical(a: Path, b: Path) -> None:
    for file in (checkpoint.WEIGHTS, checkpoint.STATE):
        assert (checkpoint.resolve(a) / file).read_bytes() == (checkpoint.resolve(b) / file).read_bytes()


def test_two_processes_have_the_losses_of_one(one: Path, pair: Path):
    assert_alike(one, pair)
    assert json.loads((pair / "run.json").read_text())["devices"] == {
        "processes": 2,
        "device": "cpu",
        "parallel": "ddp",
    }


def test_ctrl_c_saves_and_ends_all_and_both_killed_resume_exactly(data: Path, pair: Path, tmp_path: Path):
    """The terminal's Ctrl-C reaches torchrun and both processes. The run is issued again, killed, and issued again."""
    running = begin(tmp_path, SETTINGS, data, tmp_path / "run", "stop")
    flags, deadline = [tmp_path / f"run.waits{rank}" for rank in (0, 1)], time.monotonic() + 90
    while not all(flag.exists() for flag in flags):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)
    done = ended(running)
    assert done.returncode != 0 and "interrupted; issue the same command again" in done.stderr
    assert checkpoint.resolve(tmp_path / "run").name == "step-000004"
    done = two(tmp_path, SETTINGS, data, tmp_path / "run", "kill")
    assert done.returncode != 0 and checkpoint.resolve(tmp_path / "run").name == "step-000004"
    done = two(tmp_path, SETTINGS, data, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert_identical(pair, tmp_path / "run")


# --- FSDP2

SHARDED = {**SETTINGS, "parallel": "fsdp", "ema": 0.5, "snapshots": "weights", "accumulate": 2}


def test_stages_follow_one_another_in_two_processes_and_one_of_them_speaks(data: Path, tmp_path: Path):
    """Two runs in one torchrun, sharded: the second starts from the first one's last checkpoint."""
    recipe = tmp_path / "stages.toml"
    rest = "".join(
        f"{name} = {json.dumps(SETTINGS[name])}\n" for name in ("image_size", "chunk", "head_width", "device")
    )
    rest += 'preset = "tiny"\nmax_steps = 2\nbatch_size = 4\nval_rows = 2\nval_every = 0\nparallel = "fsdp"\n'
    recipe.write_text(
        rest + '[[stages]]\nname = "fast"\nobjective = "fast"\n[[stages]]\nname = "vla"\nprecision = "bf16"\n'
    )
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vlm4vla_core.cli"]
    words += ["train", str(recipe), "--data", str(data), "--out", str(tmp_path / "runs")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stage 2 of 2: vla") == 1 and done.stdout.count("held-out") == 2
    policy = VLAPolicy.load(tmp_path / "runs" / "vla")
    assert policy.backbone.lineage["stages"] == ["fast", "action"]
    end = load_file(checkpoint.resolve(tmp_path / "runs" / "fast") / checkpoint.WEIGHTS)
    start = load_file(checkpoint.step_folder(tmp_path / "runs" / "vla", 0) / checkpoint.WEIGHTS)
    assert all(torch.equal(value, start[name]) for name, value in end.items())


@pytest.fixture(scope="module")
def sharded(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that lost its second process at step 3 and was issued again."""
    folder = tmp_path_factory.mktemp("sharded")
    done = two(folder, SHARDED, data, folder / "run", "die")
    assert done.returncode != 0 and checkpoint.resolve(folder / "run").name == "step-000002"
    done = two(folder, SHARDED, data, folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_sharded_run_has_the_losses_and_files_of_one_process(data: Path, sharded: Path, tmp_path: Path):
    """Weights, averages, optimizer state, snapshots and gradient norms, all whole again in the ordinary files."""
    one = tmp_path / "one"
    train(TrainConfig(**{**SHARDED, "parallel": "ddp"}), data, one)
    assert_alike(one, sharded)
    assert json.loads((sharded / "run.json").read_text())["devices"]["parallel"] == "fsdp"
    for name in (checkpoint.STATE, f"../../ema/step-000006/{checkpoint.WEIGHTS}"):
        a, b = (load_file(checkpoint.resolve(run) / name) for run in (one, sharded))
        assert set(a) == set(b)
        assert all(value.shape == b[key].shape for key, value in a.items())
        assert sum(torch.allclose(value, b[key], rtol=1e-3, atol=2e-5) for key, value in a.items()) > 0.98 * len(a)
    for name in ("sketch", "weights"):
        start = [load_file(run / "trajectory" / "step-000000" / f"{name}.safetensors") for run in (one, sharded)]
        assert all(torch.equal(value, start[1][key]) for key, value in start[0].items()) and len(start[0]) > 4
    VLAPolicy.load(sharded)


def test_a_sharded_run_resumes_exactly(data: Path, sharded: Path, tmp_path: Path):
    done = two(tmp_path, SHARDED, data, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert_identical(sharded, tmp_path / "run")


def test_one_process_goes_on_from_a_sharded_checkpoint(data: Path, sharded: Path, tmp_path: Path):
    """To rounding, not exactly: one process sums in another order."""
    shutil.copytree(sharded, tmp_path / "run")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:06d}")
    train(TrainConfig(**{**SHARDED, "parallel": "ddp"}), data, tmp_path / "run")
    assert_alike(sharded, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "rel"),
    [
        ({"checkpoint_activations": True}, 1e-4),
        ({"checkpoint_activations": True, "precision": "bf16"}, 1e-2),
        ({"compile": True, "pad_to": 64}, 1e-4),
    ],
)
def test_sharding_goes_with_what_saves_memory_and_time(data: Path, tmp_path: Path, more: dict[str, Any], rel: float):
    plain = {**SETTINGS, "auxiliary": {}, "head": "fc", "max_steps": 3, **more}
    train(TrainConfig(**plain), data, tmp_path / "one")
    done = two(tmp_path, {**plain, "parallel": "fsdp"}, data, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    found = [[line["loss"] for line in lines(tmp_path / run) if "loss" in line] for run in ("one", "two")]
    assert len(found[0]) == 3 and found[1] == pytest.approx(found[0], rel=rel)


def test_what_was_asked_for_is_what_runs(data: Path, tmp_path: Path):
    with pytest.raises(InputError, match="shares the model among processes, and there is one; start it with torchrun"):
        train(TrainConfig(**SHARDED), data, tmp_path / "run")
    with pytest.raises(RuntimeError, match="FSDP over 2 processes was asked for, but weight is a Parameter"):
        check_sharded(torch.nn.Linear(2, 2), 2)


# --- faults


@pytest.mark.slow
def test_a_second_torchrun_in_the_folder_is_refused_and_does_not_hang(data: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as handle:  # as it is while the first one runs
        fcntl.flock(handle, fcntl.LOCK_EX)
        done = two(tmp_path, SETTINGS, data, tmp_path / "run")
    assert done.returncode != 0 and "another process is training in this folder" in done.stderr
    assert two(tmp_path, SETTINGS, data, tmp_path / "run").returncode == 0  # the file that is left locks nothing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("nan", r"the loss is nan at step 3, on rows \d+, .*the last good checkpoint is step-000002"),
        ("torn", "damaged image of camera 'front' at row 7"),
    ],
)
def test_a_fault_of_one_process_is_told_and_ends_both(data: Path, tmp_path: Path, mode: str, message: str):
    done = two(tmp_path, SETTINGS, data, tmp_path / "run", mode)
    assert done.returncode != 0 and re.search(message, done.stderr), done.stderr
    if mode == "nan":  # known to both; of the other fault the first process learns when the second is gone
        assert not re.search(r'File ".*vlm4vla_core', done.stderr)  # the traceback is torchrun's own
    assert checkpoint.resolve(tmp_path / "run").name == "step-000002"


def test_a_batch_that_two_processes_cannot_share_is_refused():
    second = SimpleNamespace(rank=1, world=2)
    assert training._places(TrainConfig(batch_size=8, accumulate=2), second) == [slice(4, 6), slice(6, 8)]
    with pytest.raises(InputError, match="a global batch of 3 does not divide among 2 processes"):
        training._places(TrainConfig(batch_size=3), second)
