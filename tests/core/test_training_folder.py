"""What a training run does to its folder and log when it is refused or cut short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toys import toy_store

from vlm4vla_core import checkpoint, training
from vlm4vla_core.errors import InputError
from vlm4vla_core.presets import TrainConfig

CONFIG = TrainConfig(
    image_size=56, chunk=2, head_width=16, max_steps=3, batch_size=2, lr=1e-3, warmup_steps=1, save_every=2,
    log_every=1, val_rows=4, threads=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_store(tmp_path_factory.mktemp("toys") / "store").path


def steps_of(run: Path) -> list[tuple[int, bool]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], "validation" in line) for line in lines]


WHOLE = [(0, True), (1, False), (2, False), (3, False), (3, True)]


def test_a_crash_before_the_first_checkpoint_leaves_no_second_start_in_the_log(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*args: Any, **options: Any) -> None:
        raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", crash)
        with pytest.raises(RuntimeError, match="crash"):
            training.train(CONFIG, data, tmp_path / "run")
    assert steps_of(tmp_path / "run") == [(0, True)]
    training.train(CONFIG, data, tmp_path / "run")
    assert steps_of(tmp_path / "run") == WHOLE


@pytest.mark.parametrize("torn", ['{"step": 3, "val', '{"step": 3, "validation": {"error": {"x": 0.1}'])
def test_a_line_cut_short_by_a_kill_is_dropped(data: Path, tmp_path: Path, torn: str) -> None:
    run = tmp_path / "run"
    last = training.train(CONFIG, data, run)
    (last / "manifest.json").unlink()
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    log = run / "log.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(keepends=True)[:3]) + torn)
    training.train(CONFIG, data, run)
    assert steps_of(run) == WHOLE


def test_a_refused_run_leaves_nothing_behind(data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds no run"):
        training.train(CONFIG, data, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="no such model folder"):
        training.train(CONFIG.model_copy(update={"backbone": "./nowhere"}), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
