"""Weight deltas and gradient cosines against closed forms, planted truths, and real checkpoints of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blob_store import SIZE, blob_store
from safetensors.torch import save_file

from probes import divergence, gradients
from probes.divergence import gradient_divergence, weight_divergence
from probes.gradients import cosine_from_gram, gradient_cosines
from probes.weights import network_order, readable_name
from vlm4vla_core.actions import BRIDGE, TABLETOP
from vlm4vla_core.backbone import tiny
from vlm4vla_core.cli import main
from vlm4vla_core.episodes.store import EpisodeStore
from vlm4vla_core.errors import InputError
from vlm4vla_core.policy import PolicyConfig, VLAPolicy


def triple(folder: Path, base: dict, a: dict, c: dict) -> tuple[Path, Path, Path]:
    paths = folder / "b.safetensors", folder / "a.safetensors", folder / "c.safetensors"
    for path, tensors in zip(paths, (base, a, c), strict=True):
        save_file({name: torch.as_tensor(value) for name, value in tensors.items()}, path)
    return paths


# --- weights: closed forms --------------------------------------------------------------------------------


def test_planted_deltas_give_their_norms_and_cosines(tmp_path: Path) -> None:
    """|B| = 10; |A - B| = 1 and |C - B| = 2 at a cosine of 0.6, 1, 0 and -1."""
    rng = np.random.default_rng(0)
    base, a, c = {}, {}, {}
    for layer, cosine in enumerate((0.6, 1.0, 0.0, -1.0)):
        u, v = np.linalg.qr(rng.normal(size=(500, 2)))[0].T
        b = rng.normal(size=500)
        b *= 10 / np.linalg.norm(b)
        name = f"blocks.{layer}.weight"
        base[name], a[name] = b.reshape(20, 25), (b + u).reshape(20, 25)
        c[name] = (b + 2 * (cosine * u + np.sqrt(1 - cosine**2) * v)).reshape(20, 25)
    result = weight_divergence(*triple(tmp_path, base, a, c))
    frame = result.to_frame()
    assert {"group", "rel_norm_a", "rel_norm_c", "cosine"} <= set(frame.columns)
    assert list(frame["group"]) == [f"blocks.{layer}" for layer in range(4)]
    np.testing.assert_allclose(frame["rel_norm_a"], 0.1, rtol=1e-9)
    np.testing.assert_allclose(frame["rel_norm_c"], 0.2, rtol=1e-9)
    np.testing.assert_allclose(frame["cosine"], [0.6, 1, 0, -1], atol=1e-9)
    np.testing.assert_allclose(frame["null_sd"], 1 / np.sqrt(500))
    assert result.total.n == 2000 and result.total.a == pytest.approx(4) and result.total.dot == pytest.approx(1.2)
    assert result.unmatched == () and result.excluded == ()


def test_a_group_adds_up_its_parameters(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    base, a, c = ({f"layers.2.{part}": rng.normal(size=n) for part, n in (("w", 50), ("b", 7))} for _ in range(3))
    result = weight_divergence(*triple(tmp_path, base, a, c))
    b, da, dc = (np.concatenate(list(side.values())) for side in (base, a, c))
    da, dc = da - b, dc - b
    row = result.to_frame().iloc[0]
    assert row["group"] == "layers.2" and row["n_params"] == 57
    assert row["rel_norm_a"] == pytest.approx(np.linalg.norm(da) / np.linalg.norm(b))
    assert row["cosine"] == pytest.approx(da @ dc / np.linalg.norm(da) / np.linalg.norm(dc))
    assert list(result.parameter_frame()["parameter"]) == ["layers.2.b", "layers.2.w"]


def test_identical_checkpoints_have_zero_change_and_no_cosine(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    base = {"blocks.0.w": rng.normal(size=9), "blocks.1.w": np.zeros(3)}
    c = {"blocks.0.w": base["blocks.0.w"] + 1, "blocks.1.w": np.ones(3)}
    frame = weight_divergence(*triple(tmp_path, base, base, c)).to_frame().set_index("group")
    assert frame.loc["blocks.0", "rel_norm_a"] == 0 and frame.loc["blocks.0", "rel_norm_c"] > 0
    assert np.isnan(frame.loc["blocks.0", "cosine"])
    assert np.isnan(frame.loc["blocks.1", "rel_norm_c"])  # no size relative to a base of zeros


def test_random_deltas_lie_within_their_null(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    shape = {f"blocks.{i}.w": (40, 50) for i in range(60)}
    sides = [{name: rng.normal(size=size) for name, size in shape.items()} for _ in range(2)]
    base = {name: np.zeros(size) for name, size in shape.items()}
    frame = weight_divergence(*triple(tmp_path, base, *sides)).to_frame()
    z = frame["cosine"] / frame["null_sd"]
    assert abs(z).max() < 4.5 and 0.75 < z.std() < 1.25


def test_reading_in_pieces_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    paths = triple(tmp_path, *({"w": rng.normal(size=(31, 7)).astype(np.float32)} for _ in range(3)))
    whole = weight_divergence(*paths).total
    monkeypatch.setattr(divergence, "PIECE", 10)
    np.testing.assert_allclose(weight_divergence(*paths).total, whole, rtol=1e-5)  # float32 within a piece


def test_bf16_agrees_with_fp32_to_rounding(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    base = rng.normal(size=4000).astype(np.float32)
    sides = [base, base + rng.normal(size=4000).astype(np.float32), base - rng.normal(size=4000).astype(np.float32)]
    (tmp_path / "half").mkdir()
    exact = weight_divergence(*triple(tmp_path, *({"w": side} for side in sides))).to_frame().iloc[0]
    half = [{"w": torch.as_tensor(side).bfloat16()} for side in sides]
    rounded = weight_divergence(*triple(tmp_path / "half", *half)).to_frame().iloc[0]
    for column in ("rel_norm_a", "rel_norm_c", "cosine"):
        assert rounded[column] == pytest.approx(exact[column], abs=5e-3)


def test_what_does_not_match_is_listed_or_named(tmp_path: Path) -> None:
    ones = {"w": np.ones(3)}
    extra = weight_divergence(*triple(tmp_path, {**ones, "old": np.ones(2)}, {**ones, "old": np.ones(2)}, ones))
    assert extra.unmatched == ("old (only in base and A)",) and extra.total.n == 3
    with pytest.raises(InputError, match=r"shapes differ: base \(3,\), A \(3,\), C \(1, 3\) \[w\]"):
        weight_divergence(*triple(tmp_path, ones, ones, {"w": np.ones((1, 3))}))
    with pytest.raises(InputError, match="no parameter in common"):
        weight_divergence(*triple(tmp_path, ones, ones, {"v": np.ones(3)}))
    with pytest.raises(InputError, match=r"weights are NaN or infinite \[w\]"):
        weight_divergence(*triple(tmp_path, ones, {"w": np.full(3, np.nan)}, ones))
    with pytest.raises(InputError, match="no such checkpoint"):
        weight_divergence(tmp_path / "none", tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-5])
    with pytest.raises(InputError, match=r"not a whole safetensors file .*cut\.safetensors"):
        weight_divergence(tmp_path / "b.safetensors", tmp_path / "cut.safetensors", tmp_path / "c.safetensors")


def test_published_folders_in_shards_and_with_older_names(tmp_path: Path) -> None:
    """A sharded hub folder, and a single file whose decoder lacks the `language_model` level, against each other."""
    rng = np.random.default_rng(6)
    values = {
        part: rng.normal(size=5) for part in ("visual.blocks.1.w", "layers.0.w", "norm.weight", "embed_tokens.weight")
    }

    def write(folder: Path, decoder: str, vision: str, shards: int, shift: float) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
        named = {
            (vision if name.startswith("visual") else decoder) + name: value + shift for name, value in values.items()
        }
        names, files = list(named), {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
            part = {name: torch.as_tensor(named[name]) for name in names[shard::shards]}
            save_file(part, folder / file)
            files |= dict.fromkeys(part, file)
        if shards > 1:
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))

    write(tmp_path / "base", "model.", "", 1, 0.0)
    write(tmp_path / "a", "model.language_model.", "model.", 2, 1.0)
    write(tmp_path / "c", "language_model.", "", 3, 2.0)
    result = weight_divergence(tmp_path / "base", tmp_path / "a", tmp_path / "c")
    frame = result.to_frame()
    assert list(frame["group"]) == ["vision.1", "embeddings", "decoder.0", "decoder.norm"] and result.unmatched == ()
    np.testing.assert_allclose(frame["cosine"], 1.0)
    np.testing.assert_allclose(frame["rel_norm_c"], 2 * frame["rel_norm_a"])
    (tmp_path / "a" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"a weight file is missing .*model-00002-of-00002"):
        weight_divergence(tmp_path / "base", tmp_path / "a", tmp_path / "c")


# --- weights: checkpoints of this project -----------------------------------------------------------------


def test_groups_are_those_of_the_backbone() -> None:
    backbone = tiny(image_size=SIZE)
    for name, group in backbone.groups().items():
        path = readable_name(f"backbone.{name}", backbone.spec)
        assert path == name.removeprefix("base.")
        assert group == "query" or backbone.spec.group_of(path) == group
    in_order = sorted(["decoder.10", "decoder.norm", "vision.embed", "embeddings", "vision.2", "decoder.9", "vision.0"],
                      key=network_order)  # fmt: skip
    assert in_order == ["vision.embed", "vision.0", "vision.2", "embeddings", "decoder.9", "decoder.10", "decoder.norm"]


def config(chunk: int = 3) -> PolicyConfig:
    low, high = (-0.05,) * 6 + (0.0,), (0.05,) * 6 + (1.0,)
    return PolicyConfig(chunk=chunk, convention=TABLETOP, q01=low, q99=high, camera="front", width=16)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store; a policy's start, a language checkpoint and a policy whose weights moved in known ways."""
    folder = tmp_path_factory.mktemp("divergence")
    blob_store(folder / "store", episodes=8, length=5)
    VLAPolicy(tiny(image_size=SIZE), config()).save(folder / "start")
    vlm, vla = tiny(image_size=SIZE), VLAPolicy(tiny(image_size=SIZE), config())
    with torch.no_grad():
        for parameter in vlm.base.parameters():
            parameter.mul_(1.1)
        for name, parameter in vla.backbone.base.named_parameters():
            if name.startswith("visual"):
                parameter.mul_(0.95)
        vla.backbone.query.mul_(3)
    vlm.save(folder / "vlm")
    vla.save(folder / "vla")
    return folder


def test_policies_and_backbones_are_compared_without_head_and_query(room: Path) -> None:
    result = weight_divergence(room / "start", room / "vlm", room / "vla")
    assert result.unmatched == ()
    assert "query" in result.excluded and all(name == "query" or name.startswith("head.") for name in result.excluded)
    assert len(result.excluded) > 3
    frame = result.to_frame().set_index("group")
    backbone = tiny(image_size=SIZE)
    sizes: dict[str, int] = {}
    for name, parameter in backbone.named_parameters():
        group = backbone.groups()[name]
        sizes[group] = sizes.get(group, 0) + parameter.numel()
    sizes.pop("query")
    assert dict(frame["n_params"]) == sizes
    np.testing.assert_allclose(frame["rel_norm_a"], 0.1, rtol=1e-5)
    vision = frame.index.str.startswith("vision") | (frame.index == "projector")
    np.testing.assert_allclose(frame.loc[vision, "rel_norm_c"], 0.05, rtol=1e-5)
    np.testing.assert_allclose(frame.loc[vision, "cosine"], -1, rtol=1e-6)
    assert (frame.loc[~vision, "rel_norm_c"] == 0).all() and frame.loc[~vision, "cosine"].isna().all()


# --- gradients: planted truth -----------------------------------------------------------------------------


def planted_gram(
    rng: np.random.Generator, *, snr: float, batches: int, size: int, cosine: float = 0.6, own: bool = False
) -> np.ndarray:
    """Products of half-batch gradients around two unit vectors at `cosine`; own: within batches only."""
    truth = np.zeros((2, size))
    truth[0, 0], truth[1, :2] = 1, (cosine, np.sqrt(1 - cosine**2))
    noise = rng.normal(size=(2, 2 * batches, size)) / np.sqrt(snr * size)
    drawn = (truth[:, None] + noise).reshape(4 * batches, size)
    gram = drawn @ drawn.T
    if own:
        batch = np.tile(np.repeat(np.arange(batches), 2), 2)
        gram[batch[:, None] != batch] = np.nan
    return gram


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("snr", "naive"), [(0.1, 0.10), (0.3, 0.225), (1.0, 0.40)])
def test_true_cosine_of_six_tenths_is_recovered_at_every_noise(snr: float, naive: float, own: bool) -> None:
    """The oracle of the reference page; the naive value is 0.6 · 2s / (1 + 2s)."""
    assert naive == pytest.approx(0.6 * 2 * snr / (1 + 2 * snr), abs=0.003)
    gram = planted_gram(np.random.default_rng(7), snr=snr, batches=100, size=1000, own=own)
    row = cosine_from_gram(gram, "g", 1000)
    assert row.naive == pytest.approx(naive, abs=0.01)
    assert row.corrected == pytest.approx(0.6, abs=0.04) and row.verdict == ""
    assert row.interval is not None and row.interval.low < 0.6 < row.interval.high
    assert row.snr_a == pytest.approx(snr, rel=0.1) and row.snr_c == pytest.approx(snr, rel=0.1)
    assert row.norm_a == pytest.approx(1, rel=0.05)


def test_estimates_equal_literal_sums() -> None:
    """Means over all pairs of different half-batches, and over whole batches, by loops."""
    batches, rng = 3, np.random.default_rng(8)
    g = rng.normal(size=(2, batches, 2, 5)) + np.ones(5)
    flat = [(k, h) for k in range(batches) for h in (0, 1)]
    cross = np.mean([g[0, k, h] @ g[1, m, j] for k, h in flat for m, j in flat])
    own = [np.mean([g[s, k, h] @ g[s, m, j] for k, h in flat for m, j in flat if (k, h) != (m, j)]) for s in (0, 1)]
    full = [np.mean([np.sum(g[s, k].mean(0) ** 2) for k in range(batches)]) for s in (0, 1)]
    row = cosine_from_gram(np.einsum("id,jd->ij", g.reshape(12, 5), g.reshape(12, 5)), resamples=10)
    assert row.corrected == pytest.approx(cross / np.sqrt(own[0] * own[1]))
    assert row.naive == pytest.approx(cross / np.sqrt(full[0] * full[1]))
    halves = np.mean([np.sum(g[0, k, h] ** 2) for k, h in flat])
    assert row.snr_a == pytest.approx(own[0] / (halves - own[0]))


def test_noise_alone_is_below_noise_and_never_a_number() -> None:
    rng, verdicts = np.random.default_rng(9), []
    for _ in range(40):
        noise = rng.normal(size=(32, 200))
        row = cosine_from_gram(noise @ noise.T, resamples=200)
        verdicts.append(row.verdict)
        assert (row.corrected is None) == (row.verdict == "below noise") and row.interval is None
        assert row.corrected is not None or (row.norm_a is None or row.norm_c is None)
    assert verdicts.count("below noise") > 20 and set(verdicts) <= {"below noise", "too noisy for an interval"}


def test_a_loss_that_does_not_reach_a_group_has_no_cosine() -> None:
    vectors = np.random.default_rng(10).normal(size=(16, 30)) + 1
    vectors[8:] = 0
    row = cosine_from_gram(vectors @ vectors.T, resamples=10)
    assert row.corrected is None and row.naive is None and row.verdict == "no gradient"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("snr", "size", "own"), [(0.3, 50, False), (0.3, 2000, True), (1.0, 50, False), (1.0, 50, True)]
)
def test_interval_over_batches_covers_the_truth(snr: float, size: int, own: bool) -> None:
    rng, hits = np.random.default_rng(11), 0
    for trial in range(400):
        row = cosine_from_gram(planted_gram(rng, snr=snr, batches=16, size=size, own=own), resamples=400, seed=trial)
        hits += row.interval is not None and row.interval.low <= 0.6 <= row.interval.high
    assert 0.90 <= hits / 400 <= 0.99, hits / 400


# --- gradients: of losses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_gb", [2.0, 0.0])
def test_gradients_of_known_losses_leave_the_parameters_alone(memory_gb: float) -> None:
    """Linear losses <w, g + noise>: gradients are known. One parameter is frozen, one is out of reach of C."""
    torch.manual_seed(0)
    weights = {name: torch.nn.Parameter(torch.randn(200)) for name in ("one", "two", "lone", "new")}
    weights["two"].requires_grad_(False)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    u, v = torch.eye(200)[:2]
    rng = np.random.default_rng(12)

    def noisy(truth: torch.Tensor, side: int, k: int, half: int) -> torch.Tensor:
        drawn = np.random.default_rng([side, k, half]).normal(size=200) * 0.07
        return truth + torch.as_tensor(drawn, dtype=torch.float32)

    def loss_a(k: int, half: int) -> torch.Tensor:
        return sum((weights[name] * noisy(u, 0, k, half)).sum() for name in ("one", "two", "lone"))  # type: ignore[return-value]

    def loss_c(k: int, half: int) -> torch.Tensor:
        truth = 0.6 * u + 0.8 * v
        return (weights["one"] * noisy(truth, 1, k, half)).sum() + (weights["two"] * noisy(v, 1, k, half)).sum()

    groups = {"one": "vision.0", "two": "decoder.0", "lone": "lm_head"}
    result = gradient_cosines(weights, groups, loss_a, loss_c, batches=12, memory_gb=memory_gb)
    assert result.all_pairs == (memory_gb > 0)
    rows = {row.group: row for row in result.rows}
    assert list(rows) == ["vision.0", "decoder.0", "lm_head", "all"] and rows["all"].n_params == 600
    assert rows["vision.0"].corrected == pytest.approx(0.6, abs=0.1)
    assert rows["vision.0"].naive is not None and rows["vision.0"].naive < 0.5  # SNR 1: the naive one reads 0.4
    assert rows["decoder.0"].corrected == pytest.approx(0, abs=0.12) and rows["lm_head"].verdict == "no gradient"
    assert rows["all"].corrected == pytest.approx(0.6 / np.sqrt(3 * 2), abs=0.08)
    frame = result.to_frame()
    assert frame["corrected"].dtype == float and np.isnan(frame.set_index("group").loc["lm_head", "corrected"])
    for name, weight in weights.items():
        assert torch.equal(weight.detach(), before[name]) and weight.grad is None
    assert not weights["two"].requires_grad and weights["one"].requires_grad
    assert rng.normal() == np.random.default_rng(12).normal()
    with pytest.raises(InputError, match="1 batch cannot"):
        gradient_cosines(weights, groups, loss_a, loss_c, batches=1)
    with pytest.raises(InputError, match="loss C is nan"):
        gradient_cosines(weights, groups, loss_a, lambda k, half: loss_c(k, half) * float("nan"), batches=2)


def test_measuring_a_policy_leaves_it_as_it_was(room: Path) -> None:
    policy, store = VLAPolicy.load(room / "start"), EpisodeStore.open(room / "store")
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    hooks = sum(len(module._forward_hooks) for module in policy.modules())
    random = torch.get_rng_state()
    seen: list[int] = []
    first = gradient_divergence(policy, store, store, batches=2, batch_size=4, seed=1, progress=seen.append)
    assert sum(seen) == 8
    for name, value in policy.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in policy.parameters())
    assert sum(len(module._forward_hooks) for module in policy.modules()) == hooks and not policy.training
    assert torch.equal(torch.get_rng_state(), random)
    groups = [row.group for row in first.rows]
    assert set(groups) == {group for group in policy.backbone.groups().values() if group != "query"} | {"all"}
    assert groups[0] == "vision.embed" and groups[-1] == "all"
    again = gradient_divergence(policy, store, store, batches=2, batch_size=4, seed=1)
    assert again.rows == first.rows
    other = gradient_divergence(policy, store, store, batches=2, batch_size=4, seed=2)
    assert other.rows != first.rows


def test_gradients_are_those_of_the_two_losses(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the estimator equals `.backward()` on the same losses."""
    policy, store = VLAPolicy.load(room / "start"), EpisodeStore.open(room / "store")
    caught: dict[str, Any] = {}

    def catch(parameters: Any, groups: Any, loss_a: Any, loss_c: Any, **options: Any) -> None:
        caught.update(parameters=parameters, groups=groups, loss_a=loss_a, loss_c=loss_c)

    monkeypatch.setattr(gradients, "gradient_cosines", catch)
    gradient_divergence(policy, store, store, batches=2, batch_size=4)
    assert "query" not in caught["groups"] and set(caught["groups"]) < set(caught["parameters"])
    for side in ("loss_a", "loss_c"):
        one, two = (caught[side](0, half).item() for half in (0, 1))
        assert one != two and caught[side](0, 0).item() == one  # halves differ, a draw can be repeated
    weights = [caught["parameters"][name] for name in caught["groups"]]
    members = {"x": list(range(len(weights)))}
    vector = gradients._gradient(caught["loss_c"](1, 0), weights, members, "C")["x"]
    caught["loss_c"](1, 0).backward()
    wanted = torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).reshape(-1) for w in weights])
    torch.testing.assert_close(vector, wanted)
    assert vector.abs().max() > 0


def test_other_action_conventions_and_tiny_batches_are_refused(room: Path) -> None:
    store = EpisodeStore.open(room / "store")
    foreign = PolicyConfig(chunk=2, convention=BRIDGE, q01=(0.0,) * 7, q99=(1.0,) * 7, camera="front", width=8)
    with pytest.raises(InputError, match="the policy's actions mean something else: frame"):
        gradient_divergence(VLAPolicy(tiny(image_size=SIZE), foreign), store, store)
    with pytest.raises(InputError, match="a batch of 1 has no two halves"):
        gradient_divergence(VLAPolicy(tiny(image_size=SIZE), config()), store, store, batch_size=1)


# --- the verb ---------------------------------------------------------------------------------------------


def test_diverge_writes_tables_and_figure_once(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, copy = room / "out", room / "copy.json"
    command = ["diverge", "--base", str(room / "start"), "--vlm", str(room / "vlm"), "--vla", str(room / "vla")]
    command += ["--vla-data", str(room / "store"), "--out", str(out), "--batches", "2", "--batch-size", "4"]
    assert main([*command, "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "vision.embed" in text and "through the base's own head" in text and "new in the policy" in text
    names = {path.name for path in out.iterdir()}
    assert names == {
        "weights.parquet", "kinds.parquet", "parameters.parquet", "gradients.parquet", "gradients_all.parquet",
        "interference.parquet", "divergence.json", "divergence.svg", "divergence.png", "gradients.svg", "gradients.png",
        "manifest.json",
    }  # fmt: skip
    result = json.loads((out / "divergence.json").read_text())
    assert {row["group"] for row in result["gradients"]} == {row["group"] for row in result["weights"]} | {"all"}
    assert next(row for row in result["weights"] if row["group"] == "embeddings")["cosine"] is None  # C did not move
    assert main([*command, "--json", str(copy)]) == 0
    assert "is up to date" in capsys.readouterr().out
    assert json.loads(copy.read_text()) == result


def test_diverge_without_data_and_from_a_base_without_a_head(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--vlm", str(room / "vlm"), "--vla", str(room / "vla")]
    assert main(["diverge", "--base", str(room / "vlm"), *common, "--out", str(room / "weights-only")]) == 0
    text = capsys.readouterr().out
    assert "A is equal to the base" in text and "--vla-data was not given" in text
    command = ["diverge", "--base", str(room / "vlm"), *common, "--out", str(room / "fresh"), "--batches", "2"]
    assert main([*command, "--batch-size", "2", "--vla-data", str(room / "store"), "--device", "cpu"]) == 0
    assert "fresh head, drawn from seed 0" in capsys.readouterr().out


def test_bad_input_of_the_diverge_verb(room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--vla", str(room / "vla"), "--out", str(tmp_path / "out")]
    for words, told in (
        (["--base", str(tmp_path / "none"), "--vlm", str(room / "vlm")], "no such checkpoint"),
        (["--base", str(room), "--vlm", str(room / "vlm")], "no safetensors weights in this folder"),
        (["--base", str(room / "start"), "--vlm", str(room / "vlm"), "--vlm-data", str(room / "store")], "--vla-data"),
        (["--base", str(room / "start"), "--vlm", str(room / "vlm"), "--vla-data", str(tmp_path)], "dataset.json"),
    ):
        assert main(["diverge", *common, *words]) == 2
        line = capsys.readouterr().err
        assert told in line and line.count("\n") == 1, line
    assert list(tmp_path.iterdir()) == []


def test_heads_of_the_dense_objective_are_no_part_of_what_is_compared(tmp_path: Path) -> None:
    from probes.weights import open_weights

    names = ("base.layer.weight", "dense.heads.presence.weight", "query", "denser.weight")
    save_file({f"backbone.{name}": torch.ones(2, 2) for name in names}, tmp_path / "model.safetensors")
    with open_weights(tmp_path / "model.safetensors") as weights:
        assert set(weights.excluded) == {"dense.heads.presence.weight", "query"}
        assert set(weights.names) - weights.excluded == {"layer.weight", "denser.weight"}


def test_another_number_of_layers_is_another_architecture(tmp_path):
    from vlm4vla_core.nano import nano

    for size in ("s", "m"):
        nano("paligemma", size).save(tmp_path / size)
    with pytest.raises(InputError, match="vision layers: 2 in base, 3 in A, 2 in C"):
        weight_divergence(tmp_path / "s", tmp_path / "m", tmp_path / "s")
