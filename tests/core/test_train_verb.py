"""`vlm4vla train` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from toys import toy_store

from vlm4vla_core.cli import main


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_store(tmp_path_factory.mktemp("toys") / "store").path


def words(data: Path, out: Path, *more: str) -> list[str]:
    return ["train", "tiny", "--data", str(data), "--out", str(out), "--max-steps", "3", "--batch-size", "2", *more]


@pytest.mark.parametrize("objective", ["action", "language"])
def test_train_prints_a_table_and_writes_json(data: Path, tmp_path: Path, capsys, objective: str):
    report = tmp_path / "r.json"
    beside = ["--auxiliary", "dense", "0.5"] if objective == "action" else []
    assert main([*words(data, tmp_path / "run", "--objective", objective, *beside), "--json", str(report)]) == 0
    shown = capsys.readouterr().out
    assert "3 steps" in shown and "held-out" in shown and "step-000003" in shown
    summary = json.loads(report.read_text())
    assert summary["objective"] == objective and summary["steps"] == 3
    assert summary["end"]["loss"] != summary["start"]["loss"]
    assert ("adaptation adds" in shown) == (objective == "action")
    assert ("dense, beside it" in shown and "gripper position error [cm]" in shown) == bool(beside)


def test_a_finished_run_is_up_to_date_without_torch(data: Path, tmp_path: Path, capsys):
    assert main(words(data, tmp_path / "run")) == 0
    code = (
        "import sys; from vlm4vla_core.cli import main\n"
        f"assert main({words(data, tmp_path / 'run')!r}) == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "is up to date" in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "nowhere"], "no such folder"),
        (["--camera", "wrist"], "no camera 'wrist'"),
        (["--backbone", "./nowhere"], "no such model folder"),
        (["--batch-size", "0"], "setting batch_size = 0"),
        (["--lr", "nan"], "setting lr"),
        (["--betas", "0.9", "1.5"], "betas must be at least 0 and below 1"),
        (["--weights", "0"], "weights of stores must be positive"),
        (["--data", "none.json", "--objective", "language"], "no such question file"),
        (["--freeze", "vision", "projector", "decoder", "word_embeddings", "--objective", "fast"], "nothing is left"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(data: Path, tmp_path: Path, capsys, change: list[str], message: str):
    assert main(words(data, tmp_path / "run", *change)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "run").exists()


def test_an_unknown_preset_names_the_nearest(data: Path, tmp_path: Path, capsys):
    assert main(["train", "tinyy", "--data", str(data), "--out", str(tmp_path / "run")]) == 2
    assert "did you mean 'tiny'" in capsys.readouterr().err


@pytest.mark.samples
def test_it_trains_on_the_real_bridge_sample(samples: Path, tmp_path: Path, capsys):
    store = tmp_path / "bridge"
    source = samples / "bridge_rlds_octo"
    assert main(["convert", "rlds", str(source), "--out", str(store)]) == 0
    assert main(words(store, tmp_path / "run")) == 0
    assert "held-out" in capsys.readouterr().out
