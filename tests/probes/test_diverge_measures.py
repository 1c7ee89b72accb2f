"""Spectra, AdamW's steps, interference and interpolation against closed forms; the whole verb on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from blob_store import SIZE, blob_store
from safetensors.torch import save_file

from probes.divergence import weight_divergence
from probes.glance import glance
from probes.gradients import gradient_cosines
from probes.interference import interference
from probes.interpolation import barrier, losses_between, random_ends, shared_weights, task_arithmetic
from probes.losses import measuring, policy_losses
from probes.spectra import overlap, spectral_divergence, spectrum
from probes.trajectories import read_trajectories
from probes.weights import kind_of
from vlm4vla_core.actions import TABLETOP
from vlm4vla_core.backbone import tiny
from vlm4vla_core.cli import main
from vlm4vla_core.episodes.store import EpisodeStore
from vlm4vla_core.errors import InputError
from vlm4vla_core.policy import PolicyConfig, VLAPolicy
from vlm4vla_core.vqa.files import QuestionFile

# --- weights: signs, shares, kinds, spectra ---------------------------------------------------------------


def triple(folder: Path, *sides: dict[str, torch.Tensor]) -> list[Path]:
    for name, tensors in zip("bac", sides, strict=True):
        save_file(tensors, folder / f"{name}.safetensors")
    return [folder / f"{name}.safetensors" for name in "bac"]


def test_signs_shares_and_spread_are_counted(tmp_path: Path) -> None:
    """Of eight weights both move four, three of them to the same side; A moved only layer 0."""
    b = {"layers.0.attn.q": torch.zeros(8), "layers.1.mlp.up": torch.zeros(8)}
    a = {"layers.0.attn.q": torch.tensor([1.0, 1, -1, 1, 1, 0, 0, 0]), "layers.1.mlp.up": torch.zeros(8)}
    c = {"layers.0.attn.q": torch.tensor([2.0, 1, -3, -1, 0, 1, 0, 0]), "layers.1.mlp.up": torch.full((8,), 2.0)}
    result = weight_divergence(*triple(tmp_path, b, a, c))
    frame = result.to_frame().set_index("group")
    assert frame.loc["layers.0", "sign_agreement"] == 0.75 and np.isnan(frame.loc["layers.1", "sign_agreement"])
    assert list(frame["share_a"]) == [1, 0] and list(frame["share_params"]) == [0.5, 0.5]
    assert frame.loc["layers.0", "share_c"] == pytest.approx(16 / 48)
    spread = result.spread()
    assert (
        spread["a"] == 1 and spread["params"] == 2 and spread["c"] == pytest.approx(1 / ((1 / 3) ** 2 + (2 / 3) ** 2))
    )
    assert list(result.kind_frame()["group"]) == ["layers.0 attention", "layers.1 mlp"]
    assert "no ceiling (one seed per arm)" in "".join(glance(result.to_frame()))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("visual.blocks.0.attn.qkv.weight", "attention"), ("layers.3.mlp.down_proj.weight", "mlp"),
     ("layers.3.input_layernorm.weight", "norm"), ("layers.3.self_attn.q_norm.weight", "norm"),
     ("embed_tokens.weight", "embedding"), ("visual.merger.thing.weight", "other")],
)  # fmt: skip
def test_kinds_by_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_spectra_have_the_planted_ranks_and_overlaps(tmp_path: Path) -> None:
    """Orthonormal factors at equal values: rank 5 exactly; half of the directions shared; a random matrix m n/(m+n)."""
    torch.manual_seed(0)
    left = torch.linalg.qr(torch.randn(400, 30)).Q
    right = torch.linalg.qr(torch.randn(300, 30)).Q
    five, ten = left[:, :5] @ right[:, :5].T, left[:, 5:15] @ right[:, :10].T
    found = spectrum(five, rank=40)
    assert found.effective_rank == pytest.approx(5, rel=1e-3) and found.explained == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(found.values[:5], torch.ones(5), atol=1e-4, rtol=0)
    noise = torch.randn(400, 300)
    assert spectrum(noise).effective_rank == pytest.approx(400 * 300 / 700, rel=0.05)
    exact = torch.linalg.svdvals(noise)
    assert spectrum(noise).values[0] == pytest.approx(float(exact[0]), rel=0.05)
    assert overlap(spectrum(five, 5), spectrum(ten, 5), 5) == pytest.approx(0, abs=1e-4)
    mixed = left[:, :10] @ right[:, :10].T
    assert overlap(spectrum(mixed, 10), spectrum(left[:, 5:15] @ right[:, :10].T, 10), 10) == pytest.approx(
        0.5, abs=1e-3
    )
    base = {"layers.0.mlp.w": noise, "layers.0.norm": torch.ones(4)}
    sides = [{"layers.0.mlp.w": noise + 50 * x, "layers.0.norm": torch.ones(4)} for x in (five, ten)]
    frame = spectral_divergence(*triple(tmp_path, base, *sides), rank=10).to_frame()
    assert list(frame["parameter"]) == ["layers.0.mlp.w"] and frame["overlap_null"][0] == 10 / 400
    assert frame["effective_rank_a"][0] == pytest.approx(5, rel=1e-2)
    assert frame["effective_rank_c"][0] == pytest.approx(10, rel=1e-2)


# --- gradients: AdamW, a third loss, interference ---------------------------------------------------------


def test_steps_of_adamw_and_a_third_loss_have_their_known_cosines() -> None:
    """Gradients (1, 4) and (-1, 4) without noise: AdamW's steps are their signs, so a cosine of 15/17 becomes 0."""
    weight = torch.nn.Parameter(torch.zeros(2))
    truth = {"a": torch.tensor([1.0, 4.0]), "c": torch.tensor([-1.0, 4.0]), "f": torch.tensor([0.0, 2.0])}

    def loss(name: str):
        return lambda k, half: (weight * truth[name]).sum()

    result = gradient_cosines({"w": weight}, {"w": "decoder.0"}, loss("a"), loss("c"), loss("f"), batches=3, pilots=1)
    frame = result.long_frame().set_index(["pair", "form", "group"])["corrected"]
    assert frame["A-C", "raw", "all"] == pytest.approx(15 / 17)
    assert frame["A-C", "adamw", "all"] == pytest.approx(0, abs=1e-6)
    assert frame["A-F", "raw", "all"] == pytest.approx(4 / np.sqrt(17))
    assert frame["C-F", "adamw", "decoder.0"] == pytest.approx(1 / np.sqrt(2))
    assert list(result.to_frame()["share_a"]) == [1, 1]


def test_pilots_are_other_batches_than_those_measured() -> None:
    weight, seen = torch.nn.Parameter(torch.ones(3)), []

    def loss(k: int, half: int) -> torch.Tensor:
        seen.append((k, half))
        return weight.sum()

    gradient_cosines({"w": weight}, {"w": "x"}, loss, loss, batches=2, pilots=2)
    assert sorted(set(seen)) == [(k, h) for k in range(4) for h in (0, 1)]


def test_interference_is_that_of_a_quadratic_problem() -> None:
    """L1 = |w - u|² / 2, L2 = |w - v|² / 2: a step d changes them by <g, d> + |d|² / 2; weights come back."""
    torch.manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(50), requires_grad=False)
    before, u, v = weight.detach().clone(), torch.randn(50), torch.randn(50)
    losses = {"one": lambda k, h: (weight - u).square().sum() / 2, "two": lambda k, h: (weight - v).square().sum() / 2}
    frame = interference({"w": weight}, losses, batches=3, step=0.01).to_frame()
    length = 0.01 * float(before.norm())
    for form, on, of, change in frame[["form", "step_on", "loss_of", "change"]].itertuples(index=False):
        g = before - (u if on == "one" else v)
        d = -length * (g / g.norm() if form == "raw" else g.sign() / np.sqrt(50))
        wanted = float((before - (u if of == "one" else v)) @ d) + length**2 / 2
        assert change == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    assert torch.equal(weight, before) and not weight.requires_grad and weight.grad is None
    with pytest.raises(InputError, match="a step of 0"):
        interference({"w": weight}, losses, step=0)


# --- lines ------------------------------------------------------------------------------------------------


def test_losses_of_a_linear_model_on_lines_and_on_the_plane() -> None:
    """|w - target|² / 2 on a line is a parabola: no barrier; its negative has one of |end - start|² / 8."""
    torch.manual_seed(2)
    weight, ends = torch.nn.Parameter(torch.zeros(6)), [{"w": torch.randn(6)} for _ in range(3)]
    b, a, c = (end["w"] for end in ends)
    losses = {
        "bowl": lambda k, half: weight.square().sum() / 2,
        "hill": lambda k, half: k - weight.square().sum() / 2,
    }
    found = losses_between({"w": weight}, ends, losses, points=5, batches=3)
    table = found.barriers().set_index(["loss", "line"])
    for line, distance in (("B→A", a - b), ("B→C", c - b), ("A→C", c - a)):
        assert table.loc[("bowl", line), "barrier"] == pytest.approx(0, abs=1e-6)
        row = table.loc[("hill", line)]
        assert row["barrier"] == pytest.approx(float(distance.square().sum()) / 8, rel=1e-4) and row["at"] == 0.5
        assert row["low"] == pytest.approx(row["high"])  # batches shift the whole line
    plane = task_arithmetic({"w": weight}, ends, losses, shares=(0.0, 2.0), batches=2).to_frame()
    both = plane[(plane["loss"] == "bowl") & (plane["a"] == 2) & (plane["c"] == 2)]["value"].item()
    assert both == pytest.approx(float((b + 2 * (a - b) + 2 * (c - b)).square().sum()) / 2, rel=1e-5)
    assert torch.equal(weight, torch.zeros(6))
    null = losses_between({"w": weight}, random_ends(ends, seed=1), losses, points=3, batches=2)
    drawn = random_ends(ends, seed=1)
    for one, end in zip(drawn[1:], ends[1:], strict=True):
        assert float((one["w"] - b).norm()) == pytest.approx(float((end["w"] - b).norm()), rel=1e-5)
        assert abs(torch.cosine_similarity(one["w"] - b, end["w"] - b, dim=0)) < 0.99
    assert null.values["bowl"][2, 0] == pytest.approx(float(drawn[1]["w"].square().sum()) / 2, rel=1e-5)
    with pytest.raises(InputError, match="2 points on a line"):
        losses_between({"w": weight}, ends, losses, points=2)


def test_a_barriers_interval_covers_the_truth() -> None:
    rng, hits = np.random.default_rng(0), 0
    shares = np.linspace(0, 1, 5)
    for trial in range(100):
        values = (4 * shares * (1 - shares))[:, None] + rng.normal(size=12) + 0.3 * rng.normal(size=(5, 12))
        low, high = barrier(values, shares, resamples=300, seed=trial).interval
        hits += low <= 1 <= high
    assert hits >= 82  # percentile bootstrap over 12 batches


# --- a real model -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measures")
    blob_store(folder / "store", episodes=6, length=4)
    convention = PolicyConfig(2, TABLETOP, (-0.05,) * 6 + (0.0,), (0.05,) * 6 + (1.0,), "front", width=8)
    for number, name in enumerate(("base", "vlm", "vla")):
        policy, drawn = VLAPolicy(tiny(image_size=SIZE), convention), torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in policy.backbone.base.parameters() if number else ():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=drawn))
        policy.save(folder / name)
    return folder


def test_ends_of_the_lines_are_the_checkpoints(room: Path) -> None:
    """Losses at both ends of B→C equal those of the loaded policies, with C's query and head."""
    policy, store = VLAPolicy.load(room / "vla"), EpisodeStore.open(room / "store")
    losses = policy_losses(policy, store, store, batch_size=4, fast=True)
    every = {"language": losses.language, "action": losses.action, "fast": losses.fast}
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    with measuring(policy), shared_weights(policy.backbone, room / "base", room / "vlm", room / "vla") as ends:
        assert set(ends[0]) == set(losses.groups)
        found = losses_between(losses.parameters, ends, every, points=3, batches=2)
        own = {name: [loss(k, 0).item() for k in range(2)] for name, loss in every.items()}
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    places = found.lines["B→C"][0]
    for name, values in own.items():
        np.testing.assert_allclose(found.values[name][places[-1]], values, rtol=1e-5)
        assert found.values[name].std() > 0


def test_question_files_and_chosen_kinds_are_asked(room: Path, tmp_path: Path) -> None:
    """The language loss of a conversation from a file equals the backbone's own on that picture and answer."""
    from PIL import Image

    policy, store = VLAPolicy.load(room / "vla"), EpisodeStore.open(room / "store")
    picture = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    talk = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "(0.5, 0.25)"}]
    rows = [{"image": "a.png", "conversations": talk}] * 3
    (tmp_path / "asked.json").write_text(json.dumps(rows))
    losses = policy_losses(policy, QuestionFile.open(tmp_path / "asked.json"), store, batch_size=4)
    with measuring(policy), torch.no_grad():
        wanted = policy.backbone.language_loss(np.stack([picture] * 2), ["Where?"] * 2, ["(0.5, 0.25)"] * 2)
        torch.testing.assert_close(losses.language(0, 0), wanted)
        one, other = (
            policy_losses(policy, store, store, batch_size=4, kinds=kinds).language(0, 0)
            for kinds in (("gripper",), ("next action",))
        )
    assert not torch.equal(one, other)


def test_the_whole_verb(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = room / "out"
    command = ["diverge", "--base", str(room / "base"), "--vlm", str(room / "vlm"), "--vla", str(room / "vla"),
               "--vla-data", str(room / "store"), "--out", str(out), "--batches", "2", "--batch-size", "2",
               "--pilots", "1", "--interfere", "2", "--fast", "--interpolate", "3", "--spectra",
               "--features", "--layers", "vision.0", "--vla-twin", str(room / "base"),
               "--at", str(room / "vla"), "--device", "cpu"]  # fmt: skip
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "at a glance" in text and "vision tower: cosine of the changes" in text and "barriers on the lines" in text
    assert "ceilings (cosine of the changes by two seeds of one training): A: missing, a single seed" in text
    assert "representations, C at vision.0: CKA with the base" in text and "(no ceiling: a single seed)" in text
    told = json.loads((out / "divergence.json").read_text())
    assert {row["pair"] for row in told["gradients_all"]} == {"A-C", "A-F", "C-F"}
    assert {row["at"] for row in told["gradients_all"]} == {"base", "vla"} and len(told["plane"]) == 2 * 25
    assert {(row["a"], row["b"]) for row in told["cka"]} == {
        ("base", "A"), ("base", "C"), ("base", "vla"), ("base", "untrained"), ("base", "C, other seed"), ("A", "C"),
        ("C", "C, other seed"),
    }  # fmt: skip
    same = {row["model"]: row["score"] for row in told["readouts"] if row["readout"] == "transferred"}
    assert same["base"] == same["C, other seed"] and same["C"] == same["vla"] != same["A"]
    lines = {(row["loss"], row["line"]): row for row in told["barriers"]}
    assert {line for _, line in lines} == {"B→A", "B→C", "A→C", "B→random A", "B→random C", "C→C'"}
    assert {"representations.png", "plane.svg", "cka.parquet", "readouts.parquet"} <= {p.name for p in out.iterdir()}
    assert {"kinds.parquet", "spectra.parquet", "lines.png", "gradients.svg"} <= {path.name for path in out.iterdir()}
    assert main(["diverge", *command[1:7], "--out", str(out), "--interpolate", "3"]) == 2
    assert "--interpolate without --vla-data" in capsys.readouterr().err


@pytest.mark.slow
def test_recorded_runs_of_two_arms_and_four_seeds(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eight real trainings from one checkpoint; displacements by sketches are as long as those of the weights."""
    base, runs = room / "base", []
    for objective in ("language", "action"):
        for seed in range(4):
            runs.append(room / f"{objective}-{seed}")
            recipe = room / f"{objective}-{seed}.toml"
            recipe.write_text(
                f'backbone = "{base}"\nobjective = "{objective}"\nseed = {seed}\nmax_steps = 8\nbatch_size = 4\n'
                'val_rows = 4\nsnapshots = "sketch"\nlr = 0.001\nwarmup_steps = 0\n'
            )
            assert main(["train", str(recipe), "--data", str(room / "store"), "--out", str(runs[-1])]) == 0
    capsys.readouterr()
    ends = ["--base", str(base), "--vlm", str(runs[0]), "--vla", str(runs[-1])]
    assert main(["diverge", *ends, "--trajectory", *map(str, runs), "--out", str(room / "paths")]) == 0
    print(capsys.readouterr().out)
    told = json.loads((room / "paths" / "divergence.json").read_text())
    weights = weight_divergence(base, runs[0], runs[-1])
    paths = read_trajectories(runs)
    assert list(paths.steps) == [1, 2, 4, 8]
    by_group = weights.groups
    for group in ("vision.0", "decoder.0"):
        assert np.linalg.norm(paths.moved[group][0, -1]) == pytest.approx(np.sqrt(by_group[group].a), rel=0.25)
        assert np.linalg.norm(paths.moved[group][-1, -1]) == pytest.approx(np.sqrt(by_group[group].c), rel=0.25)
    assert {row["module"] for row in told["parting"]} >= {"vision tower", "decoder", "all"}
    assert not any("head" in group or "query" in group for group in paths.moved)
