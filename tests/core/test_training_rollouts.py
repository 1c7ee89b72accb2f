"""Rollouts while training: validation episodes of their own, and not a bit of the training changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm4vla_core import checkpoint
from vlm4vla_core.cli import main
from vlm4vla_core.errors import InputError
from vlm4vla_core.policy import VLAPolicy
from vlm4vla_core.presets import TrainConfig, make_config
from vlm4vla_core.results import wilson
from vlm4vla_core.rollouts import validation_of
from vlm4vla_core.sims import PROTOCOLS, Benchmark, benchmark
from vlm4vla_core.sims.benchmarks import is_evaluation_seed, recording_seed
from vlm4vla_core.training import train

SETTINGS: dict[str, Any] = {
    "image_size": 56, "chunk": 4, "head_width": 16, "max_steps": 4, "batch_size": 2, "lr": 1e-3, "warmup_steps": 2,
    "log_every": 1, "val_rows": 4, "threads": 1, "device": "cpu", "save_every": 2, "head": "flow",
}  # fmt: skip
ROLLOUTS = {"rollout_every": 2, "rollout_tasks": ("touch", "pick"), "rollout_episodes": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demos") / "store"
    assert main(["record", "tabletop", "--tasks", "touch", "--episodes", "6", "--size", "56", "--out", str(out)]) == 0
    return out


def rollouts(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [{"step": line["step"], **line["rollouts"]} for line in lines if "rollouts" in line]


def test_they_are_logged_with_n_and_interval_and_change_no_bit(data: Path, tmp_path: Path):
    state = torch.random.get_rng_state()
    train(TrainConfig(**SETTINGS, **ROLLOUTS), data, tmp_path / "with")
    assert torch.equal(state, torch.random.get_rng_state())
    train(TrainConfig(**SETTINGS), data, tmp_path / "without")
    for name in (checkpoint.WEIGHTS, checkpoint.STATE):
        a, b = ((checkpoint.resolve(tmp_path / run) / name).read_bytes() for run in ("with", "without"))
        assert a == b
    found = rollouts(tmp_path / "with")
    assert [one["step"] for one in found] == [2, 4] and rollouts(tmp_path / "without") == []
    for one in found:
        assert one["n"] == 4 and set(one["tasks"]) == {"touch", "pick"}
        assert sum(task["successes"] for task in one["tasks"].values()) == one["successes"]
        assert (one["low"], one["high"]) == tuple(wilson(one["successes"], 4))
        assert one["benchmark"] == "tabletop-tasks-abc@1 validation"


def test_a_resumed_run_logs_them_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from vlm4vla_core import training

    update = training._Run._update

    def crash(self: Any, *args: Any) -> Any:
        if self.step == 3:
            raise RuntimeError("crash")
        return update(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_update", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train(TrainConfig(**SETTINGS, **ROLLOUTS), data, tmp_path / "run")
    train(TrainConfig(**SETTINGS, **ROLLOUTS), data, tmp_path / "run")
    assert [one["step"] for one in rollouts(tmp_path / "run")] == [2, 4]


def test_a_success_is_counted(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With the scripted expert in the policy's place, nearly all succeed."""
    from vlm4vla_core import actors
    from vlm4vla_core import rollouts as module
    from vlm4vla_core.backbone import tiny
    from vlm4vla_core.policy import PolicyConfig

    bench = benchmark("tabletop-abc@1")
    settings = PolicyConfig(4, bench.convention, (-1.0,) * 7, (1.0,) * 7, "front", width=16)
    policy = VLAPolicy(tiny(image_size=56), settings)
    config = TrainConfig(rollout_every=1, rollout_benchmark="tabletop-abc@1", rollout_episodes=4)
    made = module.Rollouts(config, policy)
    made.actor = actors.BaselineActor("scripted", bench.convention, bench.action_limit)  # type: ignore[assignment]
    found = made.run()
    assert found["n"] == 4 and found["successes"] >= 2
    assert found["chain"]["mean"] >= 3 and found["chain"]["low"] < found["chain"]["mean"]


@pytest.mark.parametrize("protocol", sorted(p for p, bench in PROTOCOLS.items() if type(bench) is Benchmark))
def test_validation_shares_no_world_look_or_words_with_the_test(protocol: str):
    test, validation = benchmark(protocol), validation_of(protocol)
    tasks = [(task, episode) for task in test.tasks for episode in range(50)]
    seeds = {validation.env_seed(*cell) for cell in tasks}
    assert len(seeds) == len(tasks) and max(seeds) < 1 << 53  # exact in JSON
    assert not any(is_evaluation_seed(seed) for seed in seeds)
    assert not seeds & {test.env_seed(*cell) for cell in tasks}
    assert not seeds & {recording_seed(task, seed, episode) for task, episode in tasks for seed in (0, 1)}
    assert set(validation.domains) == set(test.train_domains) and not validation.kept_for_test
    assert validation.held_out is False and validation.protocol != test.protocol


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollout_tasks": ("tuch",)}, "has no task 'tuch'.*did you mean 'touch'"),
        ({"rollout_benchmark": "tabletop-vqa@1"}, "unknown benchmark 'tabletop-vqa@1'"),
    ],
)
def test_what_cannot_be_rolled_out_is_refused_before_training(
    data: Path, tmp_path: Path, change: dict[str, Any], message: str
):
    with pytest.raises(InputError, match=message):
        train(TrainConfig(**{**SETTINGS, **ROLLOUTS, **change}), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings_that_do_not_go_together_are_refused():
    for settings, message in (
        ({"objective": "language"}, "rollout_every needs the action objective"),
        ({"parallel": "fsdp"}, "rollouts need the whole model in one process"),
    ):
        with pytest.raises(InputError, match=message):
            make_config("tiny", {"rollout_every": 1, **settings})
