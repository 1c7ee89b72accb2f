"""Several questions in one sequence, stages on cached image tokens, and question files as training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training_options import crash_at, losses
from toys import toy_store

from vlm4vla_core import cached, checkpoint, cli, folders, images
from vlm4vla_core.backbone import IGNORE, Backbone, tiny
from vlm4vla_core.episodes.store import EpisodeStore
from vlm4vla_core.errors import InputError
from vlm4vla_core.presets import TrainConfig
from vlm4vla_core.training import train
from vlm4vla_core.training_data import Data
from vlm4vla_core.vqa import questions, several
from vlm4vla_core.vqa.files import QuestionFile, question_files

SMALL: dict[str, Any] = {
    "image_size": 28, "chunk": 2, "head_width": 16, "max_steps": 6, "batch_size": 4, "lr": 1e-3, "warmup_steps": 2,
    "clip": 1.0, "log_every": 1, "val_rows": 6, "threads": 1, "device": "cpu", "objective": "language",
}  # fmt: skip
TURNS = [
    [("Is the gripper open?", "yes"), ("Which object is nearest to the gripper?", "red cube"), ("Is it low?", "no")],
    [("Which object is nearest to the gripper?", "blue ball"), ("Is the gripper open?", "no")],
]


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**SMALL, **changes})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    return toy_store(tmp_path_factory.mktemp("toys") / "store")


# --- several questions about one picture ----------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5", "paligemma", "gemma3", "kosmos2", "smolvlm"])
def test_a_turn_sees_what_came_before_it_and_nothing_else(family: str):
    backbone = tiny(family, image_size=56, language_head=True)
    pictures = np.random.default_rng(0).integers(0, 255, (2, 56, 56, 3)).astype(np.uint8)

    def logits(turns: list[list[tuple[str, str]]]) -> list[torch.Tensor]:
        batch = backbone.collate_turns(pictures, turns)
        with torch.no_grad():
            found, targets = backbone.answer_logits(batch)
        assert targets.tolist() == batch["labels"][batch["labels"] != IGNORE].tolist()
        return list(found.split((batch["labels"] != IGNORE).sum(1).tolist()))

    def length(turns: list[tuple[str, str]]) -> int:
        return sum(len(backbone.tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1 for _, answer in turns)

    packed, first = logits(TURNS), logits([row[:1] for row in TURNS])
    for row, whole, alone in zip(TURNS, packed, first, strict=True):
        assert len(whole) == length(row) and len(alone) == length(row[:1])  # answers and their ends alone are learnt
        torch.testing.assert_close(whole[: len(alone)], alone, rtol=1e-4, atol=1e-4)
    other = logits([[*TURNS[0][:2], ("Is the ball low?", "yes")], TURNS[1]])[0]
    before = length(TURNS[0][:2])
    torch.testing.assert_close(other[:before], packed[0][:before], rtol=1e-4, atol=1e-4)
    changed = logits([[("Is the gripper open?", "no"), *TURNS[0][1:]], TURNS[1]])[0]
    assert (changed[length(TURNS[0][:1]) :] - packed[0][length(TURNS[0][:1]) :]).abs().max() > 1e-3


def test_one_turn_is_what_collate_answers_makes():
    backbone = tiny(image_size=28)
    pictures = np.zeros((2, 28, 28, 3), np.uint8)
    plain = backbone.collate_answers(pictures, [row[0][0] for row in TURNS], [row[0][1] for row in TURNS])
    turns = backbone.collate_turns(pictures, [row[:1] for row in TURNS])
    assert plain.keys() == turns.keys() and all(torch.equal(value, turns[name]) for name, value in plain.items())
    text = backbone.tokenizer.decode(backbone.collate_turns(pictures, TURNS)["input_ids"][0])
    assert text.endswith(
        "Is the gripper open?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nWhich object is "
        "nearest to the gripper?<|im_end|>\n<|im_start|>assistant\nred cube<|im_end|>\n<|im_start|>user\nIs it low?"
        "<|im_end|>\n<|im_start|>assistant\nno<|im_end|>"
    )


def test_no_question_is_asked_twice_and_the_first_is_the_only_one_of_one(store: EpisodeStore):
    for row in range(0, len(store), 5):
        asked = several(store, row, np.random.default_rng(row), 50)
        assert len({one.question for one in asked}) == len(asked) >= 5
        alone = questions(store, row, np.random.default_rng(row))
        assert several(store, row, np.random.default_rng(row), 1) == [alone] == asked[:1]
    pairs = several(store, 5, np.random.default_rng(0), 9, kinds=("moved", "gripper"))
    assert {one.kind for one in pairs} == {"gripper"}  # two moments are another picture
    assert several(store, 5, np.random.default_rng(0), 9, kinds=("moved",))[0].earlier == 0


# --- cached image tokens --------------------------------------------------------------------------------

FROZEN: dict[str, Any] = {"freeze": ("vision", "projector"), "cache_features": True, "questions_per_picture": 3}


@pytest.mark.parametrize("changes", [
    {}, {"objective": "action", "family": "paligemma"}, {"family": "qwen3_vl"}, {"family": "kosmos2"},
])  # fmt: skip
def test_losses_are_those_of_pictures(store: EpisodeStore, tmp_path: Path, changes: dict[str, Any]):
    runs = []
    for cache in (False, True):
        settings = config(**{**FROZEN, **changes, "cache_features": cache}, max_steps=3)
        out = tmp_path / str(cache)
        metrics = folders.read_manifest(train(settings, store.path, out), "checkpoint")["metrics"]
        runs.append([*losses(out), *losses(out, "grad_norm"), metrics["loss"]])
        assert (out / "features").exists() == cache
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
    backbone = Backbone.load(tmp_path / "True")
    rows, tokens, width = folders.read_json(tmp_path / "True" / "features" / "tokens.json")["shape"]
    assert (rows, tokens) == (len(store), backbone.geometry.tokens)
    size = (tmp_path / "True" / "features" / "tokens.f32").stat().st_size
    assert size == 4 * rows * tokens * width == cached.size_in_bytes(backbone, Data(config(), [store.path]))


def test_a_cached_stage_resumes_exactly(store: EpisodeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = config(**FROZEN, save_every=2)
    train(settings, store.path, tmp_path / "whole")
    image_tokens, calls = cached.image_tokens, []

    def killed(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("killed")
        return image_tokens(*args)

    with monkeypatch.context() as patch:  # in the second of two blocks of frames
        patch.setattr(cached, "image_tokens", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train(settings, store.path, tmp_path / "cut")
    made = (tmp_path / "cut" / "features" / "done").read_bytes()
    assert made == b"\1\0"
    with monkeypatch.context() as patch:
        patch.setattr(cached, "image_tokens", lambda *args: calls.append(1) or image_tokens(*args))
        crash_at(patch, 3)
        with pytest.raises(RuntimeError, match="crash"):
            train(settings, store.path, tmp_path / "cut")
    assert len(calls) == 3  # the second block alone
    train(settings, store.path, tmp_path / "cut")
    a, b = (checkpoint.resolve(tmp_path / run) for run in ("whole", "cut"))
    for file in (checkpoint.WEIGHTS, checkpoint.STATE):
        assert (a / file).read_bytes() == (b / file).read_bytes()
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_tokens_of_another_tower_are_thrown_away(store: EpisodeStore, tmp_path: Path):
    data = Data(config(), [store.path])
    first, second = tiny(image_size=28, seed=0), tiny(image_size=28, seed=1)

    class Alone:
        first = True

        def wait(self) -> None: ...

    def made(backbone: Backbone, **changes: Any) -> bytes:
        settings = config(**{**FROZEN, **changes})
        for parameter in backbone.parameters():
            parameter.requires_grad_(False)
        data.blank = False
        cached.on_cached_features(settings, data, backbone, {}, tmp_path, Alone())  # type: ignore[arg-type]
        return (tmp_path / "features" / "tokens.f32").read_bytes()

    mine, theirs = made(first), made(second)
    assert mine != theirs and made(first) == mine
    file = tmp_path / "features" / "tokens.f32"
    file.write_bytes(bytes(len(mine)))
    assert made(first) == bytes(len(mine))  # what is marked as made is not made again …
    file.write_bytes(mine[:-4])
    assert made(first) == mine  # … unless it is cut short
    first.query.requires_grad_(True)
    made(first)
    next(first.base.visual.parameters()).requires_grad_(True)
    with pytest.raises(InputError, match=r"features cannot be cached while base\.visual"):
        cached.on_cached_features(config(**FROZEN), data, first, {}, tmp_path, Alone())  # type: ignore[arg-type]


@pytest.mark.parametrize(("changes", "message"), [
    ({"freeze": ("vision",)}, "add projector to freeze"), ({"augmentation": "calvin"}, "needs augmentation = none"),
    ({"skip_corrupt": True}, "needs skip_corrupt = False"),
])  # fmt: skip
def test_what_would_change_the_tokens_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config(**{**FROZEN, **changes})


# --- question files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten conversations of two turns about pictures of one colour each, two about two pictures."""
    folder = tmp_path_factory.mktemp("asked")
    rows = []
    for number in range(12):
        names = [f"{number}.jpg"] if number < 10 else ["0.jpg", "1.jpg"]
        if number < 10:
            picture = np.full((40, 30, 3), 20 * number, np.uint8)
            (folder / names[0]).write_bytes(images.encode(picture, full_colour=True))
        said = ["<image>" * len(names) + "\nIs it bright?", "yes" if number > 5 else "no", "And blue?", "no"]
        turns = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(said)]
        rows.append({"image": names, "conversations": turns})
    (folder / "questions.json").write_text(json.dumps(rows))
    return folder / "questions.json"


def test_a_conversation_is_a_sample(asked: Path):
    file = QuestionFile.open(asked)
    assert len(file) == 12 and question_files(asked.parent) == question_files(asked) == [asked]
    assert file.turns(7) == [("Is it bright?", "yes"), ("And blue?", "no")]
    assert abs(file.picture(7, 28).astype(int) - 140).max() < 3
    both = file.picture(10, 28).astype(int)  # side by side, each narrowed
    assert both[:, :12].max() < 4 and abs(both[:, 16:] - 20).max() < 4
    parts, held_out = file.split(0.25)
    assert len(held_out) == 3 and sorted([*parts, *held_out]) == list(range(12))


def test_question_files_are_trained_on_alone_and_beside_a_store(asked: Path, store: EpisodeStore, tmp_path: Path):
    last = train(config(), asked, tmp_path / "alone")
    assert folders.read_manifest(last, "checkpoint")["metrics"]["rows"] == 1
    settings = config(weights=(3.0, 1.0), batch_size=64)
    data = Data(settings, [asked, store.path])  # the store comes first, with its own weight
    draws = [data.batch(step) for step in range(40)]
    share = np.mean([draw.which == 0 for draw in draws])
    assert len(data.stores) == 1 and share == pytest.approx(0.25, abs=0.03)
    assert {int(row) for draw in draws for row in draw.rows[draw.which == 1]} == set(data.mixture.train[1].tolist())
    shown = data.images(draws[0].part(slice(None)), 28)
    place = int(np.flatnonzero(draws[0].which == 1)[0])
    assert (shown[place] == data.files[0].picture(draws[0].rows[place], 28)).all()
    train(config(), [asked, store.path], tmp_path / "both")
    with pytest.raises(InputError, match="other settings or data: data was"):
        train(config(), asked, tmp_path / "both")


def test_the_papers_auxiliary_arm_is_one_command(asked: Path, store: EpisodeStore, tmp_path: Path, capsys):
    recipe = tmp_path / "aux.toml"
    plain = "\n".join(f"{name} = {json.dumps(value)}" for name, value in SMALL.items() if name != "objective")
    recipe.write_text(
        f'{plain}\n[[stages]]\nname = "sft"\nobjective = "language"\nsources = "files"\n'
        '[[stages]]\nname = "vla"\nsources = "stores"\n'
    )
    command = ["train", str(recipe), "--data", str(asked.parent), str(store.path), "--out", str(tmp_path / "run")]
    assert cli.main([*command, "--dry-run"]) == 0 and cli.main(command) == 0
    assert Backbone.load(tmp_path / "run" / "vla").lineage["stages"] == ["language", "action"]
    capsys.readouterr()
    assert cli.main(["train", "tiny", "--data", str(asked), str(store.path), "--out", str(tmp_path / "no")]) == 2
    assert "question files are for the language objective alone" in capsys.readouterr().err


def test_a_missing_picture_stops_and_is_named_or_is_skipped(asked: Path, tmp_path: Path):
    broken = tmp_path / "questions.json"
    broken.write_text(asked.read_text())
    with pytest.raises(InputError, match=r"image .*\.jpg is missing"):
        train(config(), broken, tmp_path / "none")
    train(config(image_root=str(asked.parent), max_steps=1), broken, tmp_path / "elsewhere")
    text = broken.read_text().replace("3.jpg", "gone.jpg")
    broken.write_text(text)
    settings = config(image_root=str(asked.parent), skip_corrupt=True, max_steps=4, val_fraction=0.0)
    train(settings, broken, tmp_path / "skipped")
    assert losses(tmp_path / "skipped", "skipped")[-1] > 0


@pytest.mark.samples
def test_the_real_sample_is_read(samples: Path):
    file = QuestionFile.open(samples / "vlm_robopoint" / "example.json")
    assert len(file) == 1 and file.turns(0)[0][1].startswith("[(0.461, 0.527)")
