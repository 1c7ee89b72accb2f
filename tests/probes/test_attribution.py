"""Attribution against closed forms, literal loops and captum's own layer methods, over the families."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from blob_store import SIZE, blob_store

from probes.attribution import (
    METHODS,
    Attribution,
    Lens,
    Target,
    explain,
    faithfulness,
    hide,
    randomised,
    rank_correlation,
    sanity_frame,
    target_of,
)
from vlm4vla_core.actions import TABLETOP
from vlm4vla_core.backbone import tiny
from vlm4vla_core.cli import main
from vlm4vla_core.episodes.store import EpisodeStore
from vlm4vla_core.errors import InputError
from vlm4vla_core.families import families
from vlm4vla_core.lora import add_lora
from vlm4vla_core.policy import PolicyConfig, VLAPolicy

CONFIG = PolicyConfig(3, TABLETOP, (-0.05,) * 6 + (0.0,), (0.05,) * 6 + (1.0,), "front", width=16)
TEXT = "push the red cube"
QUICK = ("internvl", "kosmos2", "llava_onevision", "paligemma", "qwen2_5_vl", "qwen3_vl")
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in families()]


@lru_cache
def lens(name: str, size: int = SIZE, target: str = "x") -> Lens:
    image = np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8)
    policy = VLAPolicy(tiny(name, image_size=size), CONFIG)
    return Lens(policy, image, TEXT, target_of(CONFIG, target, 1))


class Linear:
    """A model whose attributions are known: a weighted sum of its input."""

    def __init__(self, side: int = 4, cell: int = 3, width: int = 5) -> None:
        draw = torch.Generator().manual_seed(0)
        self.side = side
        self.pixels = torch.randn(1, 3, side * cell, side * cell, generator=draw)
        self.tokens = torch.randn(1, side**2, width, generator=draw)
        self.on_pixels, self.on_tokens = (torch.randn(x.shape[1:], generator=draw) for x in (self.pixels, self.tokens))
        line = torch.arange(side * cell) // cell
        self.pixel_places = line[:, None] * side + line[None]
        self.token_places = torch.randperm(side**2, generator=draw)

    def from_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels * self.on_pixels).flatten(1).sum(1) + 2

    def from_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        return (tokens * self.on_tokens).flatten(1).sum(1) + 2

    def truth(self, method: str) -> np.ndarray:
        """Weight times (input - mean), summed place by place; gradient x activation has no baseline."""
        out = np.zeros(self.side**2)
        if method in ("ig-pixels", "occlusion"):
            each = ((self.pixels - self.pixels.mean((2, 3), keepdim=True)) * self.on_pixels)[0].sum(0)
            for place, value in zip(self.pixel_places.flatten(), each.flatten(), strict=True):
                out[place] += float(value)
        else:
            base = 0 if method == "gradxact" else self.tokens.mean(1, keepdim=True)
            for place, value in zip(self.token_places, ((self.tokens - base) * self.on_tokens)[0].sum(-1), strict=True):
                out[place] += float(value)
        return out.reshape(self.side, self.side)


# --- closed forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_model_has_the_scores_of_the_closed_form(method: str) -> None:
    model = Linear()
    found = explain(model, method)
    np.testing.assert_allclose(found.cells, model.truth(method), atol=2e-5)
    if method.startswith("ig"):
        assert found.complete and found.n_steps == 32 and abs(found.delta) < 1e-4


def test_faithfulness_of_a_linear_model_is_the_sum_of_sorted_scores() -> None:
    model = Linear()
    found = explain(model, "ig")
    curves = faithfulness(model, found, seed=0, orders=200)
    sign = 1 if found.value > found.baseline else -1
    scores = np.sort(sign * model.truth("ig").ravel())[::-1]
    left = scores.sum() - np.concatenate([[0], np.cumsum(scores)])
    np.testing.assert_allclose(curves.hidden, np.arange(17) / 16)
    np.testing.assert_allclose(curves.deletion, left, atol=2e-5)
    np.testing.assert_allclose(curves.insertion, np.concatenate([[0], np.cumsum(scores)])[::-1], atol=2e-5)
    areas = curves.areas()
    # A straight line on average: half of the difference; both curves beat every random order.
    assert areas["random"] == pytest.approx(scores.sum() / 2, abs=0.3 * np.sqrt((scores**2).sum() / 16))
    assert areas["deletion_p"] == areas["insertion_p"] == pytest.approx(1 / 201)
    shuffled = Attribution("ig", -found.cells, None, found.value, found.baseline)
    assert faithfulness(model, shuffled, seed=0).areas()["deletion_p"] == 1


def test_scores_that_never_become_complete_are_refused() -> None:
    """A jump on the path, as mixtures of experts have: no number of steps finds its height."""
    model = Linear()
    smooth, start, end = model.from_tokens, model.tokens.mean(1, keepdim=True), model.tokens
    half = float((end - start).abs().sum()) / 2

    def jumping(tokens: torch.Tensor) -> torch.Tensor:
        return smooth(tokens) + 50 * ((tokens - start).abs().sum((1, 2)) > half)

    model.from_tokens = jumping  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"not complete after 512 steps.*--method occlusion"):
        explain(model, "ig")
    assert explain(model, "ig", strict=False, max_steps=64).complete is False


# --- the families ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_every_family_is_explained_through_the_whole_policy(name: str) -> None:
    """The function is the policy's own prediction; scores add up; hiding all is the baseline."""
    look = lens(name)
    image = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), np.uint8)
    answer = look.policy.predict(image[None], [TEXT]).actions[0, 1, 0] / CONFIG.unit()[0]
    if name == "kosmos2":
        with pytest.raises(InputError, match=r"lie on no grid; attribute on pixels"):
            explain(look, "ig")
    for method in ("ig-pixels",) if name == "kosmos2" else ("ig", "gradxact"):
        found = explain(look, method, strict=not name.endswith("moe"), max_steps=512)
        assert found.value == pytest.approx(answer, abs=1e-5)
        assert found.cells.shape == (look.side, look.side) and np.ptp(found.cells) > 0
        if found.delta is not None and not name.endswith("moe"):
            assert found.cells.sum() == pytest.approx(found.value - found.baseline + found.delta, abs=1e-5)
        ends = hide(look, method, np.array([[True] * look.side**2, [False] * look.side**2]))
        np.testing.assert_allclose(ends, [found.value, found.baseline], atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "paligemma", "llava_onevision"])
def test_token_scores_stand_at_the_place_of_the_picture(name: str) -> None:
    """Where a token lies in the raster of `vision_features`, there its score stands (windows, two views)."""
    look = lens(name, 112)
    image = np.random.default_rng(0).integers(0, 255, (112, 112, 3), np.uint8)
    raster = look.policy.backbone.vision_features(image[None])["projector"][0]
    for native, place in enumerate(look.token_places):
        assert torch.allclose(look.tokens[0, native], raster[place], atol=1e-5)
    assert sorted(set(look.token_places.tolist())) == list(range(look.side**2))
    if name == "qwen2_5_vl":
        assert look.token_places.tolist() != list(range(16))  # two windows of two tokens


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
def test_occlusion_agrees_with_a_literal_loop_and_with_captums_own(name: str) -> None:
    from captum.attr import Occlusion

    look = lens(name, target="gripper")
    found = explain(look, "occlusion", batch_size=3)
    x, cell = look.pixels, SIZE // look.side
    grey = x.mean((2, 3), keepdim=True)
    with torch.no_grad():
        for row, column in np.ndindex(look.side, look.side):
            covered = x.clone()
            covered[..., row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = grey
            literal = float(look.from_pixels(x) - look.from_pixels(covered))
            assert found.cells[row, column] == pytest.approx(literal, abs=1e-6)
        windows = {"sliding_window_shapes": (3, cell, cell), "strides": (3, cell, cell)}
        captum = Occlusion(look.from_pixels).attribute(x, baselines=grey.expand_as(x), **windows)
    np.testing.assert_allclose(found.cells, captum[0, 0, ::cell, ::cell], atol=1e-6)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "paligemma", "qwen3_vl", "internvl"])
def test_gradient_x_activation_is_taken_at_the_projector_since_the_last_block_gives_nothing(name: str) -> None:
    """The last block feeds only a norm, whose gradient is orthogonal to its input; captum's layer method agrees on the
    projector, in every token."""
    from captum.attr import LayerGradientXActivation

    look = lens(name)
    base = look.policy.backbone.base
    pixels = look.pixels.clone().requires_grad_()
    layers = [base.get_submodule(look.spec.projector[0]), base.get_submodule(look.spec.blocks)[-1]]
    projector, last = (LayerGradientXActivation(look.from_pixels, layer).attribute(pixels) for layer in layers)
    last = last[0] if isinstance(last, tuple) else last
    channels = projector.detach().reshape(look.tokens.shape)[0].sum(-1)
    wanted = np.zeros(look.side**2)
    for place, value in zip(look.token_places, channels, strict=True):
        wanted[place] += float(value)
    np.testing.assert_allclose(explain(look, "gradxact").cells.ravel(), wanted, atol=1e-7)
    patches = last.detach().reshape(-1, last.shape[-1])
    if name != "internvl":  # its class token and pixel shuffle come before any norm of the tower
        assert patches.sum(-1).abs().max() < 1e-3 * patches.abs().sum(-1).max()
    assert channels.abs().max() > 0.02 * projector.detach().abs().sum(-1).max()


def test_token_methods_run_the_vision_blocks_once() -> None:
    look = Lens(lens("paligemma").policy, np.zeros((SIZE, SIZE, 3), np.uint8), TEXT, target_of(CONFIG, "y"))
    block, calls = look.policy.backbone.base.get_submodule(look.spec.blocks)[0], []
    inner = block.layer_norm1.register_forward_hook(lambda *_: calls.append(1))
    explain(look, "ig")
    inner.remove()
    assert len(calls) == 1 and "forward" not in block.__dict__


@pytest.mark.parametrize(("name", "method"), [("qwen2_5_vl", "ig-pixels"), ("qwen3_vl", "ig"), ("paligemma", "ig")])
def test_scores_do_not_depend_on_how_steps_are_batched(name: str, method: str) -> None:
    """Qwen's patches lie flat, without a batch axis: cut wrongly, a chunk of steps would be one large picture."""
    one, many = (explain(lens(name), method, batch_size=size, max_steps=32, strict=False) for size in (1, 7))
    np.testing.assert_allclose(one.cells, many.cells, atol=1e-6 + 1e-3 * np.abs(one.cells).max())


def test_captums_own_grad_cam_has_no_score_per_token() -> None:
    """Why there is no such method: on (B, N, C) it averages over tokens and returns one score per channel."""
    from captum.attr import LayerGradCam

    look = lens("paligemma")
    pixels = look.pixels.clone().requires_grad_()
    layer = look.policy.backbone.base.get_submodule(look.spec.projector[0])
    assert LayerGradCam(look.from_pixels, layer).attribute(pixels).shape == (1, 1, look.tokens.shape[2])


def test_zero_baselines_are_not_what_is_used() -> None:
    """The trap itself: from zero pixels the scores of a bias-free patch embedding miss the difference."""
    from captum.attr import IntegratedGradients

    look = lens("qwen2_5_vl", target="z")
    zero = torch.zeros_like(look.pixels)
    with torch.no_grad():
        whole = float(look.from_pixels(look.pixels) - look.from_pixels(zero))
    scores = IntegratedGradients(look.from_pixels).attribute(look.pixels, baselines=zero, n_steps=32)
    missed = abs(float(scores.sum()) - whole) / abs(whole)
    found = explain(look, "ig-pixels")
    assert found.complete and missed > 5 * abs(found.delta) / abs(found.value - found.baseline)


def test_rank_correlation_agrees_with_scipy() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (4, 4)), rng.normal(size=(4, 4))
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a.ravel(), b.ravel()).statistic)
    assert np.isnan(rank_correlation(np.ones((2, 2)), b[:2, :2]))


# --- the verb -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attribution")
    blob_store(folder / "store", episodes=3, length=4)
    for name in ("qwen2_5_vl", "kosmos2"):
        VLAPolicy(tiny(name, image_size=SIZE), CONFIG).save(folder / name)
    tiny(image_size=SIZE).save(folder / "headless")
    return folder


def words(room: Path, model: str, *more: object) -> list[str]:
    given = dict(zip(map(str, more[::2]), map(str, more[1::2]), strict=True))
    defaults = {"--data": room / "store", "--episode": 1, "--target": "x", "--out": room / "out", "--orders": 4}
    return ["attribute", str(room / model), "--device", "cpu"] + [
        str(word) for pair in {**defaults, **given}.items() for word in pair
    ]


def test_the_verb_writes_maps_curves_and_the_check_and_then_nothing(
    room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--method", "gradxact", "--steps", 2)
    command = words(room, "qwen2_5_vl", *options, "--json", room / "a.json")
    assert main(command) == 0
    first = (room / "out" / "maps.safetensors").read_bytes()
    told = json.loads((room / "a.json").read_text())
    assert told["method"] == "gradxact" and told["target"]["unit"] == "normalised action, 1 is 0.05 m"
    assert [row["step"] for row in told["pictures"]] == [2]
    assert list(pd.read_parquet(room / "out" / "sanity.parquet")["randomised"]) == [
        "head", "decoder", "projector", "vision",
    ]  # fmt: skip
    for name in ("sheet.png", "faithfulness.svg", "sanity.svg", "overlays/step-0002.png"):
        assert (room / "out" / name).is_file(), name
    capsys.readouterr()
    assert main(command) == 0
    assert "is up to date" in capsys.readouterr().out
    again = words(room, "qwen2_5_vl", *options, "--out", room / "twice")
    assert main(again) == 0
    assert (room / "twice" / "maps.safetensors").read_bytes() == first
    assert (room / "twice" / "sheet.png").read_bytes() == (room / "out" / "sheet.png").read_bytes()
    assert not list(room.glob(".*work"))


def test_what_was_finished_before_a_kill_is_not_made_again(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import probes.attribution as module

    whole, seen = module.explain, []

    def stopping(look: Lens, *rest: object, **options: object) -> Attribution:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return whole(look, *rest, **options)

    monkeypatch.setattr(module, "explain", stopping)
    options = ("--method", "gradxact", "--orders", 0, "--out")
    command, other = ([*words(room, "qwen2_5_vl", *options, room / name), "--no-sanity"] for name in ("cut", "uncut"))
    assert main(command) == 130 and not (room / "cut").exists()
    assert main(command) == 0
    assert len(seen) == 3 + 2  # of four pictures, two were kept
    assert main(other) == 0
    tables = [pd.read_parquet(room / name / "pictures.parquet") for name in ("cut", "uncut")]
    pd.testing.assert_frame_equal(*tables)


def test_adapters_and_a_flow_head_are_attributed_too(room: Path) -> None:
    backbone = tiny("internvl", image_size=SIZE)
    add_lora(backbone, ["decoder"], rank=2)
    with torch.no_grad():
        for name, value in backbone.named_parameters():
            if "lora" in name:
                value.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    policy = VLAPolicy(backbone, replace(CONFIG, head="flow"))
    policy.save(room / "flow")
    assert main(words(room, "flow", "--method", "ablation", "--steps", 1, "--out", room / "f", "--orders", 0)) == 0
    store = EpisodeStore.open(room / "store")
    image = store.images("front", [store.starts[1] + 1], SIZE)
    wanted = policy.predict(image, [store.instructions[1]]).actions[0, 0, 0] / CONFIG.unit()[0]
    assert pd.read_parquet(room / "f" / "pictures.parquet")["value"][0] == pytest.approx(wanted, abs=1e-5)


def test_weights_are_drawn_anew_from_the_answer_to_the_picture() -> None:
    policy, fresh = (VLAPolicy(tiny("qwen3_vl", image_size=SIZE, seed=seed), CONFIG, seed=seed) for seed in (0, 1))
    start = {name: value.clone() for name, value in policy.named_parameters()}
    new, moved = dict(fresh.named_parameters()), []
    for _, changed in randomised(policy, fresh):
        parts = {name: value for name, value in changed.named_parameters() if not torch.equal(value, start[name])}
        assert all(torch.equal(value, new[name]) for name, value in parts.items())
        moved.append({".".join(name.split(".")[:4]) if "visual" in name else name.split(".")[0] for name in parts})
    assert moved[0] == {"head"} and moved[1] == {"head", "backbone"}
    assert moved[2] - moved[1] == {"backbone.base.visual.merger", "backbone.base.visual.deepstack_merger_list"}
    assert moved[3] - moved[2] >= {"backbone.base.visual.blocks", "backbone.base.visual.patch_embed"}
    same = [Attribution("ig", np.arange(16.0).reshape(4, 4) ** 2 - 40, None, 1.0, 0.0)] * 2
    frame = sanity_frame(same, {"head": same})
    assert frame["signed"][0] == frame["absolute"][0] == pytest.approx(1)
    assert (frame["pictures"][0], frame["places"][0]) == (2, 16)


def test_kosmos_is_looked_at_on_its_pixels_and_says_so(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = words(room, "kosmos2", "--method", "ablation", "--steps", 2, "--out", room / "k", "--target", "gripper")
    assert main(command) == 0
    assert "occlusion instead of ablation" in capsys.readouterr().out
    assert json.loads((room / "k" / "attribution.json").read_text())["method"] == "occlusion"


@pytest.mark.parametrize(
    ("model", "change", "line"),
    [
        ("qwen2_5_vl", ("--episode", 3), "no episode 3 .*this store has episodes 0 to 2"),
        ("qwen2_5_vl", ("--steps", 4), "no step 4 in episode 1; it has steps 0 to 3"),
        ("qwen2_5_vl", ("--target", "elbow"), "no action dimension 'elbow'; .*known: gripper, pitch, roll, x, y"),
        ("qwen2_5_vl", ("--chunk-step", 3), "no chunk step 3; this policy predicts steps 0 to 2"),
        ("qwen2_5_vl", ("--camera", "wrist"), "no camera 'wrist' .*known: front"),
        ("kosmos2", ("--method", "gradxact"), "latents that lie on no grid; use --method ig-pixels"),
        ("headless", (), "backbone without a policy head"),
        ("nothing", (), "no such checkpoint or run"),
    ],
)
def test_bad_input_is_one_line(
    model: str, change: tuple[object, ...], line: str, room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert main(words(room, model, *change, "--out", room / "bad")) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and re.search(line, told), told
    assert not (room / "bad").exists()


def test_targets_are_one_number_of_the_chunk() -> None:
    assert target_of(CONFIG, "yaw", 2) == Target("yaw", 5, 2, "normalised action, 1 is 0.05 rad")
    assert target_of(CONFIG, "gripper").dim is None
    look = lens("internvl", target="gripper")
    batch = look.policy.backbone.collate(
        np.random.default_rng(0).integers(0, 255, (1, SIZE, SIZE, 3), np.uint8), [TEXT]
    )
    with torch.no_grad():
        assert float(look.from_pixels(look.pixels)) == pytest.approx(
            float(look.policy.outputs(batch)[1][0, 1]), abs=1e-6
        )
