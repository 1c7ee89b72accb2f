"""A remote policy is the policy: equal actions, equal rows; and the verbs `serve` and `evaluate --remote`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from serving import serving

from vlm4vla_core import evaluation
from vlm4vla_core.actions import BRIDGE, TABLETOP
from vlm4vla_core.cli import main
from vlm4vla_core.client import RemotePolicy
from vlm4vla_core.errors import InputError
from vlm4vla_core.remote import Remote
from vlm4vla_core.sims import benchmark
from vlm4vla_core.verbs.serve import describe

TASKS = ["move", "touch"]


def save(folder: Path, **changes: Any) -> Path:
    from vlm4vla_core.backbone import tiny
    from vlm4vla_core.policy import PolicyConfig, VLAPolicy

    settings = {"chunk": 4, "convention": TABLETOP, "camera": "front", "width": 16, **changes}
    low, high = (-0.05,) * 5 + (-0.2, 0.0), (0.05,) * 5 + (0.2, 1.0)
    VLAPolicy(tiny(image_size=56), PolicyConfig(q01=low, q99=high, **settings)).save(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("policy") / "ck")


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> Any:
    from vlm4vla_core.policy import VLAPolicy

    return VLAPolicy.load(checkpoint)


def pictures(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 64, 64, 3), np.uint8)


def test_batched_answers_equal_single_predictions(policy: Any, checkpoint: Path) -> None:
    words = ["move the gripper left", "touch the red cube, which stands behind the green plate", "go"]
    alone = [policy.predict(pictures(1, k), [words[k % 3]]).actions for k in range(6)]
    with serving(policy, describe(policy, checkpoint)) as server:

        def one(k: int) -> tuple[np.ndarray, np.ndarray]:
            with RemotePolicy(server.address) as remote:
                given = pictures(1, k), [words[k % 3]]
                return remote.predict(*given), remote.predict(*given, alone=True)

        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(one, range(6), timeout=60))
    for expected, (together, by_itself) in zip(alone, answers, strict=True):
        np.testing.assert_allclose(together, expected, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(by_itself, expected)


def played(policy: Any, deterministic: bool) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Rows without times, and every state of the world on the way."""
    bench, states = benchmark("tabletop-tasks@1"), []
    actor = evaluation.make_actor(policy, bench, deterministic=deterministic)
    cells = [(task, episode) for task in TASKS for episode in range(3)]
    rows = evaluation.rollout(bench, actor, cells, watch=lambda env, _: states.append(env.state.gripper.tobytes()))
    return [{**row, "wall_s": None} for row in rows], states


def test_remote_and_local_evaluation_are_identical(policy: Any, checkpoint: Path) -> None:
    local = played(checkpoint, True)
    with serving(policy, describe(policy, checkpoint)) as server:
        remote = played(Remote(server.address, alone=True), True)
    assert local == remote
    assert len(set(local[1])) > 10  # something moves


def test_evaluate_remote_writes_the_rows_of_evaluate(policy: Any, checkpoint: Path, tmp_path: Path) -> None:
    ask = ["--benchmark", "tabletop-tasks@1", "--tasks", *TASKS, "--episodes", "2", "--deterministic"]
    (tmp_path / "token").write_text("right\n")
    assert main(["evaluate", str(checkpoint), *ask, "--out", str(tmp_path / "local")]) == 0
    with serving(policy, describe(policy, checkpoint), token="right") as server:
        remote = ["evaluate", "--remote", server.address, "--token-file", str(tmp_path / "token"), *ask]
        assert main([*remote, "--out", str(tmp_path / "remote"), "--json", str(tmp_path / "found.json")]) == 0
    local, there = (pd.read_parquet(tmp_path / name / "rows.parquet") for name in ("local", "remote"))
    pd.testing.assert_frame_equal(local.drop(columns="wall_s"), there.drop(columns="wall_s"))
    assert json.loads((tmp_path / "found.json").read_text())["policy"] == server.address
    # They are rows of the same checkpoint under the same settings: the local command finds nothing left to do.
    assert main(["evaluate", str(checkpoint), *ask, "--out", str(tmp_path / "remote")]) == 0


def refused(policy: Any, told: dict[str, Any], words: str) -> None:
    with serving(policy, told) as server, pytest.raises(InputError, match=words):
        evaluation.make_actor(Remote(server.address), benchmark("tabletop-tasks@1"), None, None)


def test_a_remote_policy_is_checked_as_a_local_one(policy: Any, checkpoint: Path) -> None:
    told = describe(policy, checkpoint)
    refused(policy, {**told, "convention": BRIDGE.to_dict()}, "do not mean what the benchmark expects")
    refused(policy, {**told, "camera": "elsewhere"}, "looks through camera 'elsewhere'")
    refused(policy, {**told, "domains": ["D"]}, "trained in look D")


def test_bad_commands_are_one_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_text("")
    ask = ["--benchmark", "tabletop-tasks@1"]
    for words, said in [
        (["evaluate", *ask], "give either a POLICY or --remote"),
        (["evaluate", "zero", "--remote", "127.0.0.1:1", *ask], "give either a POLICY or --remote"),
        (["evaluate", "--remote", "127.0.0.1:1", *ask], "no policy server answers at ws://127.0.0.1:1"),
        (["evaluate", "--remote", "not an address", *ask], "no policy server answers"),
        (["evaluate", "--remote", "127.0.0.1:1", "--benchmark", "tabletop-vqa@1"], "not with words"),
        (["serve", str(checkpoint), "--host", "0.0.0.0"], "others could connect without a token"),
        (["serve", str(checkpoint), "--token-file", str(tmp_path / "none")], "cannot be read"),
        (["serve", str(checkpoint), "--token-file", str(tmp_path / "empty")], "empty"),
        (["serve", str(checkpoint), "--execute", "5"], "does not fit the policy's chunk of 4"),
        (["serve", str(checkpoint), "--rate", "0"], "--rate has to be positive"),
        (["serve", str(tmp_path)], "no finished checkpoint"),
        (["serve", str(checkpoint), "--device", "cuda:99"], "cannot be moved to 'cuda:99'"),
    ]:
        assert main(words) == 2, words
        told = capsys.readouterr().err
        assert said in told and told.count("\n") == 1, told


def test_the_verb_serves_until_it_is_told_to_stop(checkpoint: Path, tmp_path: Path) -> None:
    where = tmp_path / "address.json"
    command = [sys.executable, "-m", "vlm4vla_core.cli", "serve", str(checkpoint), "--port", "0", "--json", str(where)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as run:
        try:
            deadline = time.monotonic() + 60
            while not where.exists() and time.monotonic() < deadline and run.poll() is None:
                time.sleep(0.05)
            address = f"127.0.0.1:{json.loads(where.read_text())['port']}"
            with RemotePolicy(address) as remote:
                assert remote.predict(pictures(2, 0), ["go", "left"]).shape == (2, 4, 7)
                assert remote.policy["labels"]["note"] == "tiny random model"
                run.send_signal(signal.SIGTERM)
                assert run.wait(20) == 0
            assert run.stdout is not None
            assert run.stdout.read().endswith("stopped\n")
        finally:
            run.kill()
