"""Two gloo processes under torchrun: the losses of one process, exact resume after kill -9, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys import toy_store

from vlm4vla_core import checkpoint, training
from vlm4vla_core.errors import InputError
from vlm4vla_core.presets import TrainConfig
from vlm4vla_core.training import train

SETTINGS: dict[str, Any] = {
    "image_size": 28, "chunk": 5, "head_width": 16, "max_steps": 6, "batch_size": 4, "lr": 1e-4, "warmup_steps": 0,
    "clip": 1.0, "log_every": 1, "val_rows": 6, "val_every": 3, "threads": 1, "device": "cpu", "save_every": 2,
    "head": "flow", "auxiliary": {"language": 0.5}, "augmentation": "calvin",
}  # fmt: skip
# The second process of the crashing run kills both at step 3.
CODE = """
import json, os, signal, sys, torch
torch.set_num_threads(1)
from vlm4vla_core import training
update = training._Run._update
def killed(self, *args):
    if self.step == 3 and self.devices.rank == 1:
        os.kill(os.getppid(), signal.SIGKILL); os.kill(os.getpid(), signal.SIGKILL)
    return update(self, *args)
if sys.argv[4] == "kill":
    training._Run._update = killed
training.train(training.TrainConfig(**json.loads(sys.argv[1])), sys.argv[2], sys.argv[3])
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_store(tmp_path_factory.mktemp("toys") / "store").path


def two(folder: Path, settings: dict[str, Any], data: Path, out: Path, mode: str = "run") -> Any:
    script = folder / "script.py"
    script.write_text(CODE)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    words += [json.dumps(settings), str(data), str(out), mode]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=150, env=environment)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pair(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    done = two(folder, SETTINGS, data, folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_two_processes_have_the_losses_of_one(data: Path, pair: Path, tmp_path: Path):
    train(TrainConfig(**SETTINGS), data, tmp_path / "one")
    one, both = lines(tmp_path / "one"), lines(pair)
    assert len(one) == len(both)
    for a, b in zip(one, both, strict=True):
        keys = {"loss", "action", "arm", "language", "grad_norm"} & set(a)
        assert {key: b[key] for key in keys} == pytest.approx({key: a[key] for key in keys}, rel=1e-4)
        if "validation" in a:
            assert b["validation"]["loss"] == pytest.approx(a["validation"]["loss"], rel=1e-4)
    ends = [load_file(checkpoint.resolve(run) / checkpoint.WEIGHTS) for run in (tmp_path / "one", pair)]
    close = [torch.allclose(value, ends[1][name], rtol=0, atol=2e-5) for name, value in ends[0].items()]
    assert sum(close) > 0.98 * len(close)  # Adam turns rounding of vanishing gradients into steps of their own sign
    assert json.loads((pair / "run.json").read_text())["devices"] == {"processes": 2, "device": "cpu", "parallel": "ddp"}


def test_two_processes_killed_resume_exactly(data: Path, pair: Path, tmp_path: Path):
    done = two(tmp_path, SETTINGS, data, tmp_path / "run", "kill")
    assert done.returncode != 0 and checkpoint.resolve(tmp_path / "run").name == "step-000002"
    done = two(tmp_path, SETTINGS, data, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    a, b = checkpoint.resolve(pair), checkpoint.resolve(tmp_path / "run")
    for file in (checkpoint.WEIGHTS, checkpoint.STATE):
        assert (a / file).read_bytes() == (b / file).read_bytes()


def test_a_batch_that_two_processes_cannot_share_is_refused():
    second = SimpleNamespace(rank=1, world=2)
    assert training._places(TrainConfig(batch_size=8, accumulate=2), second) == [slice(4, 6), slice(6, 8)]
    with pytest.raises(InputError, match="a global batch of 3 does not divide among 2 processes"):
        training._places(TrainConfig(batch_size=3), second)
