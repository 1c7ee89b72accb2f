"""The authors' choices as presets, against the paper's tables; settings that reach backbone, head and verb."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from toys import toy_store

from vlm4vla_core import checkpoint, folders
from vlm4vla_core.cli import main
from vlm4vla_core.errors import InputError
from vlm4vla_core.options import PAPER, BackboneOptions
from vlm4vla_core.policy import VLAPolicy
from vlm4vla_core.presets import PRESETS, SOURCES, make_config
from vlm4vla_core.training import train

BENCHMARKS = {"paper/calvin": "CALVIN ABC-D", "paper/bridge": "SimplerEnv-Bridge", "paper/libero10": "LIBERO-10"}
SHORT = {"max_steps": 2, "batch_size": 2, "val_rows": 4, "threads": 1, "head_width": 16, "warmup_steps": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_store(tmp_path_factory.mktemp("toys") / "store").path


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_presets_are_the_released_configurations(name: str):
    """Qwen3-VL-4B's file of each benchmark; clipping is what their entry script makes of the files' value."""
    with folders.shipped("data/paper/training_configs.csv").open() as handle:
        rows = [row for row in csv.DictReader(handle) if row["benchmark"] == BENCHMARKS[name]]
    row = next(row for row in rows if row["model"] == "Qwen3-VL-4B" and row["head"] == "FCDecoder")
    made = make_config(name)
    assert made.lr == float(row["lr"]) and made.weight_decay == float(row["weight_decay"])
    assert made.batch_size == int(row["global_batch_on_8_gpus"]) and made.chunk == int(row["chunk"])
    assert made.gripper_weight == float(row["gripper_loss_weight"]) and made.seed == int(row["seed"])
    assert made.image_size == int(row["image_size"]) and made.clip_actions == float(row["norm_max"])
    assert made.clip == 0 and made.schedule == "constant" and made.freeze == made.lora == ()
    steps = {"paper/calvin": 30_000}.get(name) or int(row["max_steps"])
    assert made.max_steps == steps
    assert made.normalisation == ("clip" if name == "paper/calvin" else "quantile_clip")
    assert made.options() == PAPER and not made.default_options()
    assert made.augmentation == {"paper/calvin": "calvin", "paper/bridge": "bridge", "paper/libero10": "libero"}[name]


HUB = {
    "Qwen3-VL-4B": "Qwen/Qwen3-VL-4B-Instruct", "InternVL3.5-4B": "OpenGVLab/InternVL3_5-4B-HF",
    "PaliGemma-1": "google/paligemma-3b-pt-224", "Kosmos-2": "microsoft/kosmos-2-patch14-224",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_rates_are_those_of_each_family(name: str):
    with folders.shipped("data/paper/training_configs.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    for model, hub in HUB.items():
        rates = {
            float(row["lr"]) for row in rows
            if (row["benchmark"], row["model"], row["head"]) == (BENCHMARKS[name], model, "FCDecoder")
        }  # fmt: skip
        assert {make_config(name, {"backbone": hub}).lr} == rates
    assert make_config(name, {"family": "kosmos2"}).lr == make_config(name, {"backbone": HUB["Kosmos-2"]}).lr
    assert make_config(name, {"backbone": HUB["Kosmos-2"], "lr": 1e-4}).lr == 1e-4


def test_every_value_of_the_authors_presets_has_a_source():
    unsourced = set(PRESETS["paper/bridge"]) - set(SOURCES) - set(PAPER.to_dict())
    assert not unsourced


def test_what_is_not_said_is_the_default():
    made = make_config("tiny")
    assert made.default_options() and made.options() == BackboneOptions()
    assert (made.head, made.arm_loss, made.normalisation, made.pad_to, made.compile) == (
        "fc", "huber", "quantile", None, False,
    )  # fmt: skip


def test_the_authors_choices_reach_the_checkpoint(data: Path, tmp_path: Path):
    config = make_config("paper/calvin", {**SHORT, "precision": "fp32", "image_size": 28, "save_every": 0})
    last = train(config, data, tmp_path / "run")
    policy = VLAPolicy.load(last)
    assert policy.backbone.options.to_dict() == {**PAPER.to_dict(), "image_size": 28}
    assert policy.config.normalisation == "clip" and policy.config.chunk == 10
    start = VLAPolicy.load(last.parent / "step-000000")
    assert not start.backbone.query.any() and policy.backbone.query.any()
    go_on = make_config("tiny", {**SHORT, "backbone": str(last), "query_init": "zeros"})
    with pytest.raises(InputError, match="keeps its own options"):
        train(go_on, data, tmp_path / "next")


def test_head_lora_and_freeze_from_the_command_line(data: Path, tmp_path: Path, capsys):
    words = ["train", "tiny", "--data", str(data), "--out", str(tmp_path / "run"), "--max-steps", "2"]
    words += ["--batch-size", "2", "--head", "flow", "--lora", "decoder", "--freeze", "vision", "projector"]
    assert main([*words, "--json", str(tmp_path / "r.json")]) == 0
    assert "the adaptation adds" in capsys.readouterr().out
    last = checkpoint.resolve(tmp_path / "run")
    policy = VLAPolicy.load(last)
    assert policy.config.head == "flow" and policy.backbone.lineage["lora"]["parts"] == ["decoder"]
    assert checkpoint.row_labels(last)["freeze"] == "vision+projector+lora(decoder)"
    sizes = json.loads((tmp_path / "r.json").read_text())["parameters"]
    assert sizes["new"] == policy.new_parameters()[0] and sizes["trained"] < sizes["total"]
