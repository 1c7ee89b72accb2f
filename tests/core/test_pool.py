"""The worker pool on the tabletop world: rows depend on nothing but task, episode and policy, whatever fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from flaky_world import FlakyBenchmark

from vlm4vla_core import evaluation
from vlm4vla_core.actors import Driver, make_actor
from vlm4vla_core.errors import InputError
from vlm4vla_core.sims import benchmark, pool, worker

CELLS = [("pick", episode) for episode in range(4)] + [("touch", episode) for episode in range(2)]

MOVES = [("move", episode) for episode in range(3)]


def plain(rows: Any) -> list[dict[str, Any]]:
    """Rows without their duration, by task and episode."""
    return sorted(({**row, "wall_s": 0} for row in rows), key=lambda row: (row["task"], row["episode"]))


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vlm4vla_core.actions import TABLETOP
    from vlm4vla_core.backbone import tiny
    from vlm4vla_core.policy import PolicyConfig, VLAPolicy

    span = (0.02,) * 7
    config = PolicyConfig(3, TABLETOP, tuple(-one for one in span), span, camera="front", width=16)
    folder = tmp_path_factory.mktemp("policy") / "ck"
    VLAPolicy(tiny(image_size=56), config).save(folder)
    return folder


@pytest.mark.parametrize("name", ["scripted", "random"])
def test_rows_do_not_depend_on_processes_or_order(name: str) -> None:
    bench = benchmark("tabletop-tasks@1")
    actor = make_actor(name, bench)
    here = plain(evaluation.rollout(bench, actor, CELLS))
    order = [CELLS[i] for i in np.random.default_rng(0).permutation(len(CELLS))]
    assert plain(pool.rollout(bench, actor, order, workers=2)) == here
    assert len({tuple(row[key] for key in ("steps", "partial", "success")) for row in here}) > 1  # not all the same


def test_a_learned_policy_s_rows_do_not_either_when_it_predicts_one_by_one(policy: Path) -> None:
    bench = benchmark("tabletop-tasks@1")
    actor = make_actor(policy, bench, 2, deterministic=True)
    here = plain(evaluation.rollout(bench, actor, MOVES))
    for workers in (1, 3):
        assert plain(pool.rollout(bench, actor, MOVES, workers=workers)) == here


def test_everybody_who_waits_is_answered_at_once(policy: Path) -> None:
    """Batches are as large as there are workers waiting, and a chunk goes to the one who asked."""
    bench = benchmark("tabletop-tasks@1")
    actor = make_actor(policy, bench, 3)
    sizes: list[int] = []
    original = type(actor).plan

    class Slow(type(actor)):  # type: ignore[misc]
        def plan(self, pictures: Any, instructions: Any) -> np.ndarray:
            sizes.append(len(pictures))
            time.sleep(0.3)
            return original(self, pictures, instructions)

    slow = Slow(**{**vars(actor), "batch_size": 64})
    rows = plain(pool.rollout(bench, slow, MOVES, workers=3))
    assert max(sizes) > 1  # while one is answered, the others ask
    assert [row["steps"] for row in rows] == [row["steps"] for row in plain(evaluation.rollout(bench, actor, MOVES))]


@pytest.mark.parametrize("fault", ["die", "hang", "blind"])
def test_a_worker_that_fails_is_replaced_and_only_its_episode_repeated(
    tmp_path: Path, fault: str, policy: Path
) -> None:
    bench = FlakyBenchmark(tmp_path, {1: fault})
    actor = make_actor(policy, bench, 3, deterministic=True)
    cells = [("move", episode) for episode in range(3)]
    rows = plain(pool.rollout(bench, actor, cells, workers=2, timeout=15 if fault == "hang" else 300))
    assert rows == plain(evaluation.rollout(bench.inner, actor, cells))
    begun = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(int(episode) for _, _, episode in begun) == [0, 1, 1, 2]
    first, second = (pid for pid, _, episode in begun if episode == "1")
    assert first != second


def test_what_never_works_is_told_with_its_reason_and_the_rest_is_kept(tmp_path: Path) -> None:
    actor = make_actor("zero", benchmark("tabletop-tasks@1"))
    dying = FlakyBenchmark(tmp_path, {2: "die"}, always=True)
    rows = []
    with pytest.raises(
        InputError, match=r"task move, episode 2 failed 3 times \(exit code -9.*finished episodes are kept"
    ):
        rows.extend(pool.rollout(dying, actor, [("move", 0), ("move", 1), ("move", 2)], workers=1))
    assert [row["episode"] for row in rows] == [0, 1]
    closed = FlakyBenchmark(tmp_path, {2: "refuse"}, always=True)
    with pytest.raises(InputError, match="this world is closed; come back later"):
        list(pool.rollout(closed, actor, [("move", 2)], workers=1))


def test_a_worker_that_cannot_start_is_told_with_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = make_actor("zero", benchmark("tabletop-tasks@1"))
    monkeypatch.setattr(pool, "interpreter", lambda bench: sys.executable)
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(
        InputError, match=r"starting a worker failed 3 times \(exit code 1.*No module named 'flaky_world'"
    ):
        list(pool.rollout(FlakyBenchmark(Path(), {}), actor, [("move", 0)], workers=1))


def running(pids: list[int]) -> list[int]:
    return [
        pid
        for pid in pids
        if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    ]


def test_killed_outright_and_issued_again(tmp_path: Path) -> None:
    """kill -9 of the whole run: its workers go with it, finished rows are kept, and in the end every episode is there
    once, exactly as undisturbed."""
    words = ["evaluate", "scripted", "--benchmark", "tabletop-tasks@1", "--tasks", "move", "touch", "--episodes", "12"]
    code = "import sys; from vlm4vla_core.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *words, "--workers", "2", "--out", str(tmp_path / "rows")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    journal, until = tmp_path / ".rows.rows.jsonl", time.monotonic() + 120
    while not journal.exists() or journal.read_text().count("\n") < 4:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(children) == 2
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    while running(children):
        assert time.monotonic() < until
        time.sleep(0.1)
    kept = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert len(kept) >= 3 and not (tmp_path / "rows").exists()
    plan = evaluation.Plan("scripted", "tabletop-tasks@1", ("move", "touch"), 12)
    rows = evaluation.evaluate(plan, tmp_path / "rows")
    whole = evaluation.evaluate(plan, tmp_path / "whole")
    assert len(rows) == 24 and rows.drop(columns="wall_s").equals(whole.drop(columns="wall_s"))
    walls = set(pd.read_parquet(tmp_path / "rows" / "rows.parquet")["wall_s"])
    assert {row["wall_s"] for row in kept} <= walls  # kept, not run again


def test_a_film_is_made_while_the_episode_runs(tmp_path: Path) -> None:
    import av

    from vlm4vla_core.actions import TABLETOP

    bench = benchmark("tabletop-tasks@1")
    driver = Driver(TABLETOP, 1, "none", "front", make_actor("scripted", bench))  # type: ignore[arg-type]
    film = tmp_path / "films" / "move-001.mp4"
    played = [
        worker.play(bench.make({}), worker.Order("move", 1, 7, path), driver, lambda *_: np.zeros(0))
        for path in (film, None)
    ]
    assert played[0] == played[1]  # a film changes nothing
    with av.open(str(film)) as opened:
        count = sum(1 for _ in opened.decode(video=0))
    assert count == played[0]["steps"] + round(TABLETOP.control_hz)
