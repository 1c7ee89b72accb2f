"""Training options: mixtures, parts of a batch, FAST, averages, early stops, kept checkpoints, stages, snapshots."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toys import toy_store

from vlm4vla_core import checkpoint, folders, training, trajectory
from vlm4vla_core.backbone import Backbone, tiny
from vlm4vla_core.cli import main
from vlm4vla_core.episodes.augment import CALVIN, augment
from vlm4vla_core.episodes.mixture import mix
from vlm4vla_core.episodes.store import EpisodeStore
from vlm4vla_core.errors import InputError
from vlm4vla_core.fast import FastTokenizer
from vlm4vla_core.policy import VLAPolicy
from vlm4vla_core.presets import TrainConfig, make_config, make_stages
from vlm4vla_core.text_objectives import action_token_ids
from vlm4vla_core.training import train
from vlm4vla_core.training_data import Data

SMALL = {
    "image_size": 28, "chunk": 2, "head_width": 16, "max_steps": 5, "batch_size": 4, "lr": 1e-3, "warmup_steps": 2,
    "clip": 1.0, "weight_decay": 0.01, "log_every": 1, "val_rows": 6, "threads": 1, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_store(tmp_path_factory.mktemp("toys") / "store").path


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_store(tmp_path_factory.mktemp("toys") / "other", seed=5).path


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**SMALL, **changes})


def losses(run: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if key in line]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.resolve(run) / checkpoint.WEIGHTS)


def validations(run: Path) -> list[dict[str, Any]]:
    return [
        {"step": line["step"], **line["validation"]}
        for line in map(json.loads, (run / "log.jsonl").read_text().splitlines())
        if "validation" in line
    ]


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    update = training._Run._update

    def crash(self: Any, *args: Any) -> Any:
        if self.step == step:
            raise RuntimeError("crash")
        return update(self, *args)

    monkeypatch.setattr(training._Run, "_update", crash)


# Everything that adds state or randomness: each must resume exactly.
VARIANTS: dict[str, dict[str, Any]] = {
    "accumulate": {"accumulate": 2, "augmentation": "calvin"},
    "flow": {"head": "flow", "accumulate": 2},
    "language": {"objective": "language"},
    "fast": {"objective": "fast"},
    "auxiliary": {"auxiliary": {"language": 0.5}, "questions": ("gripper",)},
    "ema": {"ema": 0.9, "query_lr": 1e-2, "head_lr": 1e-2, "workers": 3},
    "muon": {"optimizer": "muon", "ema": 0.9, "vision_lr": 1e-4},
    "dropout": {"family": "kosmos2", "dropout": True, "image_size": 56},
    "bf16": {"precision": "bf16", "checkpoint_activations": True},
    "compile": {"compile": True, "pad_to": 48, "precision": "bf16"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_option_resumes_exactly(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    settings, compile_layers = config(**VARIANTS[name], save_every=2), VLAPolicy.compile_layers
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:  # graphs are made and run as they are: a C compiler takes a minute
        graphs.append(graph)
        return graph

    monkeypatch.setattr(VLAPolicy, "compile_layers", lambda self: compile_layers(self, backend=backend))
    train(settings, data, tmp_path / "whole")
    assert bool(graphs) == (name == "compile")
    with monkeypatch.context() as patch:
        crash_at(patch, 3)
        with pytest.raises(RuntimeError, match="crash"):
            train(settings, data, tmp_path / "cut")
    train(settings, data, tmp_path / "cut")
    a, b = (checkpoint.resolve(tmp_path / run) for run in ("whole", "cut"))
    for file in (checkpoint.WEIGHTS, checkpoint.STATE):
        assert (a / file).read_bytes() == (b / file).read_bytes()
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    before = weights(tmp_path / "whole" / "checkpoints" / "step-000000")
    moved = [key for key, value in weights(tmp_path / "whole").items() if not torch.equal(value, before[key])]
    assert len(moved) > 0.9 * len(before)


@pytest.mark.parametrize("objective", [{"head": "flow"}, {"objective": "language"}, {"auxiliary": {"fast": 0.3}}])
def test_parts_add_up_to_the_whole_batch(data: Path, tmp_path: Path, objective: dict[str, Any]):
    """With chunks of 5 in episodes of 6 steps, parts have different numbers of real steps and answer tokens."""
    runs = {}
    for parts in (1, 2, 4):
        settings = config(**objective, accumulate=parts, max_steps=3, chunk=5, lr=1e-4, augmentation="calvin")
        train(settings, data, tmp_path / f"{parts}")
        runs[parts] = losses(tmp_path / f"{parts}")
    assert runs[2] == pytest.approx(runs[1], rel=1e-5) and runs[4] == pytest.approx(runs[1], rel=1e-5)
    norms = [losses(tmp_path / f"{parts}", "grad_norm") for parts in (1, 4)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_a_batch_that_does_not_divide_is_refused(data: Path, tmp_path: Path):
    with pytest.raises(InputError, match="4 samples of a process do not divide into 3 parts"):
        train(config(accumulate=3), data, tmp_path / "run")


# --- data -----------------------------------------------------------------------------------------------


def test_a_mixture_trains_on_both_stores_by_weight(data: Path, other: Path, tmp_path: Path, monkeypatch):
    settings = config(weights=(0.75, 0.25), batch_size=8, max_steps=2)
    seen = []
    images = Data.images
    monkeypatch.setattr(Data, "images", lambda self, draw, size: seen.append(draw) or images(self, draw, size))
    last = train(settings, [data, other], tmp_path / "run")
    stores = [EpisodeStore.open(path) for path in (data, other)]
    expected = mix(stores, (0.75, 0.25))
    for step in range(2):
        which, rows = expected.batch(8, 0, step)
        assert any(np.array_equal(draw.which, which) and np.array_equal(draw.rows, rows) for draw in seen)
    policy = VLAPolicy.load(last)
    both = np.concatenate([store.action for store in stores])
    assert policy.config.q99 == pytest.approx(np.quantile(both, 0.99, axis=0), abs=1e-6)
    manifest = folders.read_manifest(last, "checkpoint")
    assert manifest["inputs"]["data"] == "+".join(store.fingerprint for store in stores)
    with pytest.raises(InputError, match=r"data was .*\+.*, is now"):
        train(settings.model_copy(update={"weights": ()}), data, tmp_path / "run")
    with pytest.raises(InputError, match="2 weights for 1 stores"):
        train(settings, data, tmp_path / "new")


def test_pictures_are_augmented_by_their_place_in_the_global_batch(data: Path, tmp_path: Path, monkeypatch):
    made: list[np.ndarray] = []
    collate = VLAPolicy.collate
    monkeypatch.setattr(
        VLAPolicy, "collate", lambda self, images, *rest: made.append(images) or collate(self, images, *rest)
    )
    settings = config(augmentation="calvin", accumulate=2, max_steps=2, val_fraction=0.0)
    train(settings, data, tmp_path / "run")
    opened = Data(settings, [data])
    for step in range(2):
        plain = opened.images(opened.batch(step), 28)
        assert np.array_equal(np.concatenate(made[2 * step : 2 * step + 2]), augment(plain, CALVIN, 0, step))


def test_what_the_normalisation_cuts_is_told(data: Path, tmp_path: Path, capsys):
    words = ["train", "tiny", "--data", str(data), "--max-steps", "1", "--batch-size", "2", "--val-rows", "4"]
    assert main([*words, "--out", str(tmp_path / "r"), "--normalisation", "quantile_clip"]) == 0
    assert "warning: the normalisation cuts off x 1e+02 %, y 1e+02 %, yaw 1e+02 %" in capsys.readouterr().out
    assert folders.read_json(tmp_path / "r" / "run.json")["data"]["cut"]["z"] == 0


def broken_store(out: Path, row: int) -> Path:
    """A toy store in which one picture's bytes are no JPEG."""
    store = toy_store(out)
    data, shard = store.jpeg("front", row), out / "steps-00000.arrow"
    content = shard.read_bytes()
    assert content.count(data) == 1
    shard.write_bytes(content.replace(data, bytes(len(data))))
    return out


def test_a_corrupt_sample_stops_and_is_named_or_is_skipped_and_counted(tmp_path: Path):
    store = broken_store(tmp_path / "store", 3)
    settings = config(val_fraction=0.0, max_steps=18)  # one epoch of 72 rows
    with pytest.raises(InputError, match="damaged image of camera 'front' at row 3"):
        train(settings, store, tmp_path / "run")
    train(settings.model_copy(update={"skip_corrupt": True}), store, tmp_path / "skip")
    assert losses(tmp_path / "skip", "skipped")[-1] == 1


# --- FAST -----------------------------------------------------------------------------------------------


def test_questions_about_two_moments_show_both_and_rows_without_one_get_another(tmp_path: Path):
    from vlm4vla_core.text_objectives import language_objective
    from vlm4vla_core.training_data import Draw
    from vlm4vla_core.vqa.embodied import beside

    words = ["record", "tabletop", "--episodes", "6", "--tasks", "pick", "--size", "56"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    settings = config(objective="language", questions=("moved",), image_size=56, val_fraction=0)
    stores = Data(settings, [tmp_path])
    store, backbone = stores.stores[0], tiny(image_size=56)
    seen: list[np.ndarray] = []
    collate = backbone.collate_turns
    backbone.collate_turns = lambda images, *rest: seen.append(images) or collate(images, *rest)  # type: ignore
    rows = np.array([store.starts[0], store.starts[0] + store.lengths[0] - 1])  # the first moment has no earlier one
    pictures = store.images("front", rows, 56)
    kept = pictures.copy()
    objective = language_objective(settings, stores, backbone)
    objective.make(pictures, Draw(np.zeros(2, int), rows), np.random.default_rng(0), slice(0, 2))
    np.testing.assert_array_equal(seen[0][0], kept[0])
    earlier = [beside(before, kept[1]) for before in store.images("front", np.arange(rows[0], rows[1]), 56)]
    assert any((seen[0][1] == one).all() for one in earlier)
    np.testing.assert_array_equal(pictures, kept)


def test_a_policy_that_saw_the_test_look_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["record", "tabletop", "--episodes", "6", "--tasks", "touch", "--size", "56", "--domains", "A", "D"]
    assert main([*words, "--out", str(tmp_path / "demos")]) == 0
    run = ["train", "tiny", "--data", str(tmp_path / "demos"), "--out", str(tmp_path / "run")]
    assert main([*run, "--max-steps", "1", "--batch-size", "2", "--image-size", "56"]) == 0
    capsys.readouterr()
    for protocol, code in (("tabletop-tasks@1", 2), ("tabletop-tasks-abc@1", 0)):
        asked = ["evaluate", str(tmp_path / "run"), "--benchmark", protocol, "--tasks", "touch", "--episodes", "1"]
        assert main(asked) == code
    assert "look" in capsys.readouterr().err


def test_fast_learns_to_write_chunks_and_keeps_its_tokenizer(data: Path, tmp_path: Path):
    settings = config(objective="fast", max_steps=120, batch_size=8, lr=3e-3, fast_vocab=128)
    last = train(settings, data, tmp_path / "run")
    kept = folders.read_json(last / "fast.json")
    ids = kept.pop("word_ids")
    tokenizer = FastTokenizer.from_dict(kept)
    assert len(ids) == len(set(ids)) == tokenizer.vocab_size <= 128
    start, end = validations(tmp_path / "run")
    assert end["loss"] < 0.3 * start["loss"] and end["decoded"] == 1.0
    assert end["error"]["x"] < 0.01  # of 0.05
    store = EpisodeStore.open(data)
    chunk = np.array([store.action[:2]])
    assert np.abs(tokenizer.decode(tokenizer.encode(chunk)).actions - chunk).max() < 0.05


def test_action_tokens_take_spare_rows_first_and_no_reserved_word():
    backbone = tiny("paligemma")
    ids = action_token_ids(backbone, 1000)
    rows = backbone.base.get_submodule(backbone.spec.embeddings).num_embeddings
    spare = list(range(len(backbone.tokenizer), rows))
    assert ids[: len(spare)] == spare and not set(ids) & {*backbone.reserved, backbone.query_id, backbone.pad_id}
    assert len(ids) < rows / 2 + len(spare)


def test_an_auxiliary_loss_is_weighted_and_named(data: Path, tmp_path: Path):
    train(config(auxiliary={"language": 0.25}, max_steps=2), data, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for line in (line for line in lines if "loss" in line):
        assert line["loss"] == pytest.approx(line["action"] + 0.25 * line["language"], rel=1e-6)
    assert checkpoint.row_labels(checkpoint.resolve(tmp_path / "run"))["aux"] == "action+language"
    with pytest.raises(InputError, match="auxiliary objectives are language, fast and dense"):
        make_config("tiny", {"auxiliary": {"action": 1.0}})


# --- optimisation ---------------------------------------------------------------------------------------


def test_query_and_head_have_their_own_rates(data: Path, tmp_path: Path):
    train(config(query_lr=0.0, head_lr=0.0), data, tmp_path / "run")
    before = weights(tmp_path / "run" / "checkpoints" / "step-000000")
    for name, value in weights(tmp_path / "run").items():
        if name.startswith("head.") or name.endswith("query"):
            assert torch.equal(value, before[name]), name
    assert not torch.equal(weights(tmp_path / "run")["backbone.base.language_model.norm.weight"],
                           before["backbone.base.language_model.norm.weight"])  # fmt: skip


def test_the_average_is_that_of_the_weights_after_every_step(data: Path, tmp_path: Path):
    train(config(ema=0.5, save_every=1, max_steps=4), data, tmp_path / "run")
    steps = [load_file(folder / checkpoint.WEIGHTS) for folder in checkpoint.complete(tmp_path / "run")][1:]
    average = steps[0]
    for step in steps[1:]:
        average = {name: 0.5 * average[name] + 0.5 * value for name, value in step.items()}
    found = load_file(tmp_path / "run" / "ema" / "step-000004" / checkpoint.WEIGHTS)
    for name, value in average.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    VLAPolicy.load(tmp_path / "run" / "ema" / "step-000004")
    assert "ema_loss" in validations(tmp_path / "run")[-1]


def test_it_stops_early_keeps_the_best_and_stays_finished(data: Path, tmp_path: Path):
    """A rate that makes the loss grow: after the first validations nothing is better."""
    settings = config(
        max_steps=40, lr=3e-2, clip=0.0, warmup_steps=0, val_every=2, patience=2, keep_last=1, save_every=3
    )
    last = train(settings, data, tmp_path / "run")
    measured = validations(tmp_path / "run")
    best = min(measured, key=lambda value: value["loss"])["step"]
    stopped = int(last.name.removeprefix("step-"))
    assert stopped == measured[-1]["step"] < 40
    after = [value["loss"] for value in measured if value["step"] > best]
    assert len(after) >= 2 or best == 0
    names = [path.name for path in checkpoint.complete(tmp_path / "run")]
    assert set(names) == {"step-000000", f"step-{best:06d}", last.name}
    stamp = (last / "manifest.json").stat().st_mtime_ns
    assert train(settings, data, tmp_path / "run") == last and (last / "manifest.json").stat().st_mtime_ns == stamp


def test_out_of_memory_says_what_to_lower(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(VLAPolicy, "forward", lambda self, batch: {"loss": torch.empty(1 << 60)})
    with pytest.raises(InputError, match=r"out of memory at step 0 with 4 samples at once.*--accumulate 2"):
        train(config(), data, tmp_path / "run")


def test_validation_errors_are_in_physical_units(data: Path, tmp_path: Path, capsys):
    """Against the errors of the saved policy's own predictions, in metres and radians, and as millimetres and degrees
    in the table that people see."""
    words = ["train", "tiny", "--data", str(data), "--max-steps", "8", "--batch-size", "4", "--val-fraction", "0.3"]
    assert main([*words, "--out", str(tmp_path / "run"), "--json", str(tmp_path / "r.json")]) == 0
    found, shown = json.loads((tmp_path / "r.json").read_text())["end"], capsys.readouterr().out
    policy, store = VLAPolicy.load(tmp_path / "run"), EpisodeStore.open(data)
    rows = Data(make_config("tiny", {"val_fraction": 0.3}), [data]).val.rows
    assert found["rows"] == len(rows) > 6
    errors, right = [], []
    for row in rows:
        text = store.instructions[store.episode_of[row]]
        chunk = policy.predict(store.images("front", np.array([row]), 112), [text]).actions[0]
        for step, action in enumerate(chunk):
            if row + step < len(store.action) and store.episode_of[row + step] == store.episode_of[row]:
                true = policy.config.denormalise(policy.config.normalise(store.action[[row + step]]))[0]
                errors.append(np.abs(action - true)[:6])
                right.append(action[6] == store.action[row + step, 6])
    mean = np.mean(errors, axis=0)
    assert [found["error"][name] for name in ("x", "y", "z", "roll", "pitch", "yaw")] == pytest.approx(mean, rel=1e-4)
    assert found["gripper_accuracy"] == pytest.approx(np.mean(right))
    table = {line.split("  ")[0]: line.split()[-1] for line in shown.splitlines() if line.startswith("mean error")}
    assert float(table["mean error x [mm]"]) == pytest.approx(1000 * mean[0], abs=1e-3)
    assert float(table["mean error yaw [degrees]"]) == pytest.approx(np.degrees(mean[5]), abs=1e-3)


# --- stages, snapshots, plan ----------------------------------------------------------------------------


def test_stages_follow_one_another_and_record_their_ancestry(data: Path, tmp_path: Path, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'preset = "tiny"\nmax_steps = 2\nbatch_size = 2\nval_rows = 4\nquery_init = "zeros"\n'
        '[[stages]]\nname = "fast"\nobjective = "fast"\nfreeze = ["vision"]\n[[stages]]\nname = "vla"\nlr = 0.1\n'
    )
    assert [name for name, _ in make_stages(str(recipe))] == ["fast", "vla"]
    words = ["train", str(recipe), "--data", str(data), "--out", str(tmp_path / "runs")]
    assert main([*words, "--dry-run"]) == 0
    assert not (tmp_path / "runs").exists() and "memory" in capsys.readouterr().out
    assert main(words) == 0
    first = folders.read_manifest(checkpoint.resolve(tmp_path / "runs" / "fast"), "checkpoint")
    policy = VLAPolicy.load(tmp_path / "runs" / "vla")
    assert policy.backbone.lineage["stages"] == ["fast", "action"]
    assert policy.backbone.lineage["ancestors"] == [first["fingerprint"]]
    start = Backbone.load(tmp_path / "runs" / "vla" / "checkpoints" / "step-000000").state_dict()
    end = Backbone.load(tmp_path / "runs" / "fast").state_dict()
    assert all(torch.equal(value, end[name]) for name, value in start.items())
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().out.count("is up to date") == 2
    with pytest.raises(InputError, match="a file of 2 stages"):
        make_config(str(recipe))


def test_snapshots_are_linear_shared_by_arms_and_change_nothing(data: Path, tmp_path: Path):
    train(config(snapshots="weights"), data, tmp_path / "vla")
    train(config(), data, tmp_path / "plain")
    a, b = weights(tmp_path / "vla"), weights(tmp_path / "plain")
    assert all(torch.equal(a[name], b[name]) for name in a)
    train(config(objective="language", snapshots="sketch"), data, tmp_path / "vlm")
    taken = sorted(path.name for path in (tmp_path / "vla" / "trajectory").iterdir())
    assert taken == ["step-000000", "step-000001", "step-000002", "step-000004"]
    sketches = {run: load_file(tmp_path / run / "trajectory" / "step-000000" / "sketch.safetensors")
                for run in ("vla", "vlm")}  # fmt: skip
    assert set(sketches["vla"]) == set(sketches["vlm"]) | {"head"}
    assert all(torch.equal(value, sketches["vla"][name]) for name, value in sketches["vlm"].items())
    assert {"vision.0", "decoder.0", "query", "head"} <= set(losses(tmp_path / "vla", "gradient_norms")[0])
    kept = load_file(tmp_path / "vla" / "trajectory" / "step-000004" / "weights.safetensors")
    assert set(kept) == {name.removeprefix("backbone.") for name in weights(tmp_path / "vla")}


def test_sketches_estimate_inner_products():
    """Over many names (as many draws of signs and places) the estimate is unbiased, its spread as stated; also where
    all that is large stands in one column of a matrix, or in one row."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 12, 256, generator=generator)
    y = y + 0.5 * x
    column, row = torch.full((12, 256), 1e-3), torch.full((12, 256), 1e-3)
    column[:, 7], row[3] = 1.0, 1.0
    for a, b in ((x, y), (column, x + column), (row, x + row)):
        found = [float(trajectory.sketch(f"{n}", a) @ trajectory.sketch(f"{n}", b)) for n in range(300)]
        bound = math.sqrt(2 / trajectory.SIZE) * float(a.norm() * b.norm())
        assert abs(np.mean(found) - float((a * b).sum())) < 4 * bound / math.sqrt(300)
        assert np.std(found) < 1.1 * bound


def test_a_sketch_is_a_signed_sum_in_which_places_meet_as_often_as_by_chance():
    """Its matrix, read out column by column: one entry of size 1 each, and linear beyond a part's end."""
    size = 2 * trajectory.SIZE + 100
    matrix = torch.stack([trajectory.sketch("w", one) for one in torch.eye(size)])
    assert ((matrix != 0).sum(1) == 1).all() and set(matrix[matrix != 0].tolist()) == {1.0, -1.0}
    assert abs(float(matrix.sum())) < 4 * math.sqrt(size)
    x = torch.randn(size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(trajectory.sketch("w", x), x @ matrix)
    long = torch.zeros((1 << 18) + 700)
    long[: 1 << 18] = 1.0
    rest = torch.zeros_like(long)
    rest[1 << 18 :] = 2.0
    both = trajectory.sketch("w", long) + trajectory.sketch("w", rest)
    torch.testing.assert_close(trajectory.sketch("w", long + rest), both, rtol=1e-5, atol=1e-3)
    places = [[int(trajectory.sketch(f"{n}", one).abs().argmax()) for one in torch.eye(2 * trajectory.SIZE)[[0, 300]]]
              for n in range(2000)]  # fmt: skip
    met = sum(a == b for a, b in places)
    assert abs(met - 2000 / trajectory.SIZE) < 4 * math.sqrt(2000 / trajectory.SIZE)


def test_snapshots_name_groups_as_the_probes_do(data: Path, tmp_path: Path):
    """The divergence probe names its rows after the same groups of modules."""
    from probes.divergence import weight_divergence

    train(config(snapshots="sketch", max_steps=2), data, tmp_path / "vla")
    taken = load_file(tmp_path / "vla" / "trajectory" / "step-000002" / "sketch.safetensors")
    start, end = (checkpoint.step_folder(tmp_path / "vla", step) for step in (0, 2))
    told = set(weight_divergence(start, end, end).to_frame()["group"])
    assert told <= set(taken) | {"all"} and {"vision.0", "projector", "decoder.0", "embeddings"} <= told


def test_the_plan_counts_what_training_makes(data: Path, tmp_path: Path, capsys):
    words = ["train", "tiny", "--data", str(data), "--max-steps", "2", "--batch-size", "2", "--val-rows", "4"]
    words += ["--freeze", "vision", "--save-every", "1", "--family", "qwen2_vl"]
    words += ["--out", str(tmp_path / "run"), "--json", str(tmp_path / "r.json")]
    assert main([*words, "--dry-run"]) == 0
    plan = json.loads((tmp_path / "r.json").read_text())
    assert main(words) == 0
    made = json.loads((tmp_path / "r.json").read_text())["parameters"]
    assert (plan["parameters"], plan["trained"]) == (made["total"], made["trained"])
    policy = VLAPolicy.load(tmp_path / "run")
    store = EpisodeStore.open(data)
    lengths = {policy.backbone.collate(np.zeros((1, 28, 28, 3), np.uint8), [text])["input_ids"].shape[1]
               for text in store.instructions}  # fmt: skip
    assert plan["tokens_per_sample"].startswith(f"{min(lengths)} to {max(lengths)},")
    written = checkpoint.complete(tmp_path / "run")
    assert plan["checkpoints"].startswith(f"{len(written)} written (steps 0, 1, 2), 3 kept")
    told = [float(size) for size in re.findall(r"([\d.]+) GB", plan["checkpoints"])]
    files = [sum(file.stat().st_size for file in (path / checkpoint.WEIGHTS, path / checkpoint.STATE)) / 1e9
             for path in (written[0], written[-1])]  # fmt: skip
    assert told == pytest.approx(files, rel=0.02)  # headers and names come on top
    total, trained = made["total"], made["trained"]
    assert float(plan["memory"].split()[0]) == pytest.approx((16 * trained + 4 * (total - trained)) / 1e9, rel=0.01)
    assert (plan["steps"], plan["samples_per_step"], policy.backbone.spec.name) == (2, 2, "qwen2_vl")
    capsys.readouterr()
    assert main(["train", "paper/bridge", "--data", str(data), "--out", str(tmp_path / "x"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "5e-5 for PaliGemma" in shown and not (tmp_path / "x").exists()
    large = ["train", "paper/bridge", "--data", str(data), "--out", str(tmp_path / "x"), "--dry-run"]
    assert main([*large, "--backbone", "Qwen/Qwen3-VL-30B-A3B-Instruct", "--parallel", "fsdp"]) == 0
    assert "492 GB of weights, gradients and optimizer in fp32, shared among all processes (61.5 GB in each of 8" in (
        capsys.readouterr().out
    )  # 61.5: an independent count of this model (the facts of the stack's page)


def test_a_gpu_that_is_not_there_and_an_unknown_tracker_are_refused(data: Path, tmp_path: Path):
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device"):
            train(config(device="cuda"), data, tmp_path / "run")
    with pytest.raises(InputError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        train(config(trackers=("tensorbord",)), data, tmp_path / "other")
