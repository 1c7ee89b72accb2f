"""tabletop-vqa@1: scores against closed forms, rows of a real model, resuming, refusals, the capability row."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from vlm4vla_core.actions import TABLETOP
from vlm4vla_core.answers import answer
from vlm4vla_core.backbone import Backbone, tiny
from vlm4vla_core.cli import main
from vlm4vla_core.errors import InputError
from vlm4vla_core.policy import PolicyConfig, VLAPolicy
from vlm4vla_core.results import CAPABILITY_COLUMNS, wilson
from vlm4vla_core.tiny import tiny_tokenizer
from vlm4vla_core.vqa import benchmark
from vlm4vla_core.vqa.benchmark import BENCH, COLUMNS, capability, evaluate, item, normalised, score, show
from vlm4vla_core.vqa.general import GENERAL


def rows(right: dict[str, int], n: int, answers: str = "ab") -> pd.DataFrame:
    """n questions of each kind, `right` of them right, the answers in turn."""
    made = [
        {"kind": kind, "answer": answers[i % len(answers)], "correct": i < hits, "model": "m", "family": "f",
         "lineage": "f", "run_id": "r"}
        for kind, hits in right.items()
        for i in range(n)
    ]  # fmt: skip
    return pd.DataFrame(made)


# --- scores


def test_the_score_is_the_clipped_mean_above_the_majority():
    found = score(rows({"x": 75, "y": 40, "z": 100}, 100))
    assert found.table["majority"].tolist() == [0.5, 0.5, 0.5]
    assert found.table["normalised"].tolist() == [0.5, 0.0, 1.0]  # (0.75 - 0.5) / 0.5, clipped, all right
    assert found.score == pytest.approx(0.5) and found.n == 300
    for line in found.table.itertuples():
        assert (line.low, line.high) == wilson(line.correct, 100)


def test_standard_error_and_interval_against_the_closed_form():
    """Where nothing is clipped, the score is a mean of proportions over 1 - majority, with a binomial variance."""
    found = score(rows({"x": 320, "y": 300}, 400))
    variance = sum(p * (1 - p) / 400 / 0.5**2 for p in (0.8, 0.75)) / 4
    assert found.stderr == pytest.approx(np.sqrt(variance), rel=0.05)
    low, high = found.interval
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(variance), rel=0.07)
    assert low < found.score < high


def test_resampling_scenes_one_by_one_gives_the_same_spread():
    table, rng = rows({"x": 66, "y": 52}, 90, "aab"), np.random.default_rng(1)
    majority, means = {"x": 60 / 90, "y": 60 / 90}, []
    parts = {kind: part["correct"].to_numpy() for kind, part in table.groupby("kind")}
    for _ in range(3000):
        again = {kind: part[rng.integers(90, size=90)].mean() for kind, part in parts.items()}
        means.append(np.mean([max(0, (again[k] - majority[k]) / (1 - majority[k])) for k in again]))
    found = score(table)
    assert found.stderr == pytest.approx(np.std(means), rel=0.06)  # y is clipped in most draws
    assert found.interval == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)


def test_one_answer_only_shows_nothing_and_forms_of_an_answer_are_one():
    assert score(rows({"x": 10}, 10, "a")).score == 0
    assert normalised("  Red\n Cube. ") == normalised("red cube") == "red cube"
    assert normalised("red cubes") != "red cube"


# --- a real model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vqa") / "vlm"
    tiny("qwen2_5_vl", seed=3).save(folder)
    return folder


def run(*words: object) -> int:
    return main(["evaluate", *map(str, words)])


def test_rows_of_a_checkpoint_and_resuming(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    out, summary = tmp_path / "out", tmp_path / "summary.json"
    assert run(checkpoint, "--benchmark", BENCH.protocol, "--episodes", 2, "--out", out, "--json", summary) == 0
    table = pd.read_parquet(out / "rows.parquet")
    assert tuple(table.columns) == COLUMNS and len(table) == 2 * len(GENERAL)
    for line in table.itertuples():
        expected = item(line.kind, line.number)
        assert (line.scene_seed, line.domain) == (expected.seed, expected.domain)
        assert (line.question, line.answer) == (expected.question, expected.answer)
        assert line.correct == (normalised(line.given) == normalised(line.answer))
    items = [item(line.kind, line.number) for line in table.itertuples()]
    loaded = Backbone.load(checkpoint)
    assert answer(loaded, show(items), [one.question for one in items], max_tokens=24) == table["given"].tolist()
    told = json.loads(summary.read_text())
    assert told["questions"] == len(table) and told["coverage"] == "8 of 8 kinds of questions"
    (line,) = pd.read_csv(out / "capability.csv").to_dict("records")
    assert tuple(line) == CAPABILITY_COLUMNS
    assert line["model"] == "tiny qwen2_5_vl" and line["score"] == pytest.approx(told["score"]) and line["n"] == 16

    asked = []
    monkeypatch.setattr(benchmark, "item", lambda *cell: asked.append(cell) or item(*cell))
    assert run(checkpoint, "--benchmark", BENCH.protocol, "--episodes", 2, "--out", out) == 0
    assert not asked  # up to date
    assert run(checkpoint, "--benchmark", BENCH.protocol, "--episodes", 3, "--out", out) == 0
    assert asked == [(kind, 2) for kind in GENERAL]
    assert len(pd.read_parquet(out / "rows.parquet")) == 3 * len(GENERAL)
    assert "mean over kinds" in capsys.readouterr().out


def test_a_killed_run_keeps_what_was_answered(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, calls = tmp_path / "out", []
    monkeypatch.setattr(benchmark, "_GROUP", 4)

    def dies(*cell):
        calls.append(cell)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return item(*cell)

    monkeypatch.setattr(benchmark, "item", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, out, kinds=("count", "left"), episodes=5)
    assert len(pd.read_parquet(out / "rows.parquet")) == 4 and not (out / "capability.csv").exists()
    monkeypatch.setattr(benchmark, "item", item)
    whole = evaluate(checkpoint, out, kinds=("count", "left"), episodes=5)
    assert len(whole) == 10 and not whole.duplicated(["kind", "number"]).any()


def test_a_model_that_is_right_scores_one(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The words come from the model alone; put the right ones in its place, and every kind is whole."""
    truth = {
        one.question + str(show([one]).sum()): one.answer for one in (item(k, n) for k in GENERAL for n in range(4))
    }
    monkeypatch.setattr(
        "vlm4vla_core.answers.answer",
        lambda model, images, questions, max_tokens: [
            truth[question + str(image.astype(int).sum())].upper() + "."
            for image, question in zip(images, questions, strict=True)
        ],
    )
    table = evaluate(checkpoint, tmp_path / "out", episodes=4)
    assert table["correct"].all()
    assert capability(table)["score"].iloc[0] == 1.0


def test_bad_input_is_one_line(checkpoint: Path, tmp_path: Path, capsys):
    untied = tiny("qwen2_5_vl", seed=3)
    untied.base.config.tie_word_embeddings = False
    untied.save(tmp_path / "untied")
    tiny("qwen2_5_vl", seed=4).save(tmp_path / "other")
    out = tmp_path / "out"
    evaluate(checkpoint, out, kinds=("count",), episodes=1)
    protocol = BENCH.protocol
    for words, message in [
        ([checkpoint, "--benchmark", "tabletop-vqa@2"], "unknown benchmark 'tabletop-vqa@2'"),
        ([checkpoint, "--benchmark", protocol, "--tasks", "cont"], "no questions of kind 'cont'; did you mean 'count'"),
        ([checkpoint, "--benchmark", protocol, "--execute", 2], "leave --execute, --data and --video out"),
        (["--benchmark", protocol], "no model is given"),
        ([checkpoint, "--benchmark", protocol, "--episodes", 0], "--episodes must be at least 1"),
        ([tmp_path / "untied", "--benchmark", protocol, "--out", tmp_path / "o2"], "no output layer"),
        ([tmp_path / "other", "--benchmark", protocol, "--out", out], "answers of another model"),
        ([tmp_path / "nowhere", "--benchmark", protocol, "--out", tmp_path / "o3"], "no such model folder"),
    ]:
        assert run(*words) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and message in error[0], error
    with pytest.raises(InputError):
        evaluate(checkpoint, tmp_path, episodes=1)  # a folder of the user's own


def test_a_published_folder_with_its_own_output_layer_and_a_policy_s_backbone(tmp_path: Path):
    """The library's own class, untied, in Hugging Face's layout; and a checkpoint of a policy."""
    small = tiny("qwen2_5_vl", seed=5)
    config = copy.deepcopy(small.base.config)
    config.tie_word_embeddings = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2_5_VLForConditionalGeneration(config).save_pretrained(tmp_path / "hf")
    tiny_tokenizer().save_pretrained(tmp_path / "hf")
    table = evaluate(tmp_path / "hf", tmp_path / "a", kinds=("left",), episodes=2)
    assert set(table["model"]) == {"hf"} and set(table["family"]) == {"qwen2_5_vl"}

    policy = VLAPolicy(small, PolicyConfig(4, TABLETOP, (-1.0,) * 7, (1.0,) * 7, "front", width=16), seed=0)
    policy.save(tmp_path / "vla")
    small.save(tmp_path / "vlm")
    given = [evaluate(tmp_path / name, tmp_path / f"{name}-out", kinds=("left",), episodes=2)["given"].tolist()
             for name in ("vla", "vlm")]  # fmt: skip
    assert given[0] == given[1]


def test_any_family_with_its_own_language_head_answers_and_its_score_feeds_correlate(tmp_path: Path):
    """Families that differ in image tokens, attention and language model; correlate takes their rows as they are."""
    made = []
    for name in ("qwen3_vl", "paligemma", "smolvlm", "kosmos2"):
        tiny(name, seed=1, language_head=True).save(tmp_path / name)
        table = evaluate(tmp_path / name, tmp_path / f"{name}-out", episodes=1)
        assert set(table["family"]) == {name} and set(table["kind"]) == set(GENERAL)
        made.append(pd.read_csv(tmp_path / f"{name}-out" / "capability.csv"))
        made[-1]["score"] += len(made) / 10  # fresh models all know nothing
    capability_rows = pd.concat(made)
    assert set(capability_rows["evaluator"]) == {"vlm4vla"} and set(capability_rows["version"]) == {BENCH.protocol}
    capability_rows.to_csv(tmp_path / "capability.csv", index=False)
    performance = capability_rows[["model", "family", "lineage"]].assign(
        benchmark="tabletop-tasks-abc@1", task="", metric="success", value=[0.2, 0.1, 0.4, 0.3], successes=pd.NA,
        episodes=200, source="made up", quality="made up",
    )  # fmt: skip
    performance.to_csv(tmp_path / "performance.csv", index=False)
    words = ["--capability", tmp_path / "capability.csv", "--performance", tmp_path / "performance.csv"]
    assert main(["correlate", *map(str, words), "--json", str(tmp_path / "told.json")]) == 0
    assert BENCH.name in (tmp_path / "told.json").read_text()


@pytest.mark.slow
def test_answers_can_be_learnt_by_heart_and_are_then_generated():
    """From scenes to words: 24 questions about 24 pictures, among them equal questions with different answers."""
    items = [item(kind, number) for kind in ("colour", "shape", "closest", "where") for number in range(6)]
    images, asked, answers = show(items), [one.question for one in items], [one.answer for one in items]
    assert len(set(asked)) < len(asked)
    model = tiny("gemma3", seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.98))
    for _ in range(250):
        optimizer.zero_grad()
        model.language_loss(images, asked, answers).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    given = answer(model.eval(), images, asked, max_tokens=24)
    assert np.mean([normalised(a) == normalised(b) for a, b in zip(given, answers, strict=True)]) > 0.9
    dark = answer(model, np.zeros_like(images), asked, max_tokens=24)
    assert np.mean([a == b for a, b in zip(dark, answers, strict=True)]) < 0.8  # it was looking
