"""Every family through the probes, and the whole way from `train` to `features`: nothing is made for one alone."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from blob_store import SIZE, blob_store
from hub_layouts import published

from probes.divergence import gradient_divergence, weight_divergence
from probes.features import Features, extract
from probes.weights import readable_name
from vlm4vla_core.actions import TABLETOP
from vlm4vla_core.backbone import Backbone, tiny
from vlm4vla_core.cli import main
from vlm4vla_core.episodes.store import EpisodeStore
from vlm4vla_core.errors import InputError
from vlm4vla_core.families import families
from vlm4vla_core.lora import add_lora
from vlm4vla_core.policy import PolicyConfig, VLAPolicy

FAMILIES = families()
TIED = "; tied to the word embeddings, or left out, elsewhere"
CONFIG = PolicyConfig(3, TABLETOP, (-0.05,) * 6 + (0.0,), (0.05,) * 6 + (1.0,), "front", width=16)


@lru_cache
def member(name: str) -> Backbone:
    return tiny(name, image_size=SIZE, language_head=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    return blob_store(tmp_path_factory.mktemp("families") / "store", episodes=6, length=4)


# --- weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_compared_across_the_layouts_of_every_family(name: str, tmp_path: Path) -> None:
    """The hub's names, those of a headless save, and a policy's checkpoint; deltas of a tenth and a twentieth."""
    model = tiny(name, image_size=SIZE, language_head=True)
    base = published(tmp_path / "base", model, model.lm_head)
    with torch.no_grad():
        for parameter in model.base.parameters():
            parameter.mul_(1.1)
        model.base.save_pretrained(tmp_path / "a")
        for parameter in model.base.parameters():
            parameter.mul_(0.95 / 1.1)
    policy = VLAPolicy(model, CONFIG)
    policy.save(tmp_path / "c")
    result = weight_divergence(base, tmp_path / "a", tmp_path / "c")
    assert result.unmatched == (() if model.lm_head is None else (f"lm_head.weight (only in base and C{TIED})",))
    assert {path for path in result.excluded if not path.startswith("head.")} == {"query"}
    counts: dict[str, int] = {}
    for path, group in model.groups().items():
        counts[group] = counts.get(group, 0) + model.get_parameter(path).numel()
    counts.pop("lm_head", 0)
    assert counts.pop("query") == 64
    frame = result.to_frame().set_index("group")
    assert dict(frame["n_params"]) == counts
    moved = frame[frame["rel_norm_a"].notna()]  # a bias that is zero stays so
    np.testing.assert_allclose(moved["rel_norm_a"], 0.1, rtol=1e-5)
    np.testing.assert_allclose(moved["rel_norm_c"], 0.05, rtol=1e-5)
    np.testing.assert_allclose(moved["cosine"], -1, rtol=1e-6)
    assert list(frame.index)[:2] == ["vision.embed", "vision.0"]


@pytest.mark.parametrize("name", FAMILIES)
def test_headless_names_are_left_as_they_are(name: str) -> None:
    model = member(name)
    for path, _ in model.base.named_parameters():
        assert readable_name(path, model.spec) == readable_name(f"backbone.base.{path}", model.spec) == path


def test_adapters_that_stand_apart_are_refused(tmp_path: Path) -> None:
    model = tiny("internvl", image_size=SIZE)
    model.save(tmp_path / "base")
    add_lora(model, ["decoder"], rank=2)
    model.save(tmp_path / "adapted")
    with pytest.raises(InputError, match=r"has adapters.*export_merged"):
        weight_divergence(tmp_path / "base", tmp_path / "adapted", tmp_path / "base")


# --- features and gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_features_of_every_family_are_patches_in_their_places(name: str, store: EpisodeStore, tmp_path: Path) -> None:
    """No class token, no second tile: as many tokens as the grid has, from the first block to the projector."""
    model = member(name)
    made = extract(
        model, store, tmp_path / "f", layers=["vision.0..-1", "projector"], pool="none", camera="front", max_frames=3,
        config={"pool": "none", "camera": "front"}, inputs={"store": "s", "checkpoint": "x"},
    )  # fmt: skip
    blocks = len(model.base.get_submodule(model.spec.blocks))
    assert made.layers == (*(f"vision.{i}" for i in range(blocks)), "projector")
    grid = model.geometry.grid
    assert all(made.layer(f"vision.{i}").shape[:2] == (3, grid**2) for i in range(blocks))
    tokens = 8 if name == "kosmos2" else (grid // model.geometry.merge) ** 2
    assert made.layer("projector").shape == (3, tokens, 64)


def test_latents_of_no_grid_are_not_pooled_by_place(store: EpisodeStore, tmp_path: Path) -> None:
    """Kosmos-2 has 64 of them at full size, which would pass for a square."""
    for layers, allowed in ((["vision.0"], True), (["vision.0", "projector"], False)):
        options = {"layers": layers, "pool": "grid", "camera": "front", "max_frames": 2}
        facts = {"config": {"pool": "grid", "camera": "front"}, "inputs": {"store": "s", "checkpoint": "x"}}
        if allowed:
            assert extract(member("kosmos2"), store, tmp_path / "f", **options, **facts).layers == ("vision.0",)
            continue
        with pytest.raises(InputError, match="projector of kosmos2 lie on no grid"):
            extract(member("kosmos2"), store, tmp_path / "g", **options, **facts)


@pytest.mark.parametrize("name", FAMILIES)
def test_both_losses_have_gradients_in_every_group_they_reach(name: str, store: EpisodeStore) -> None:
    policy = VLAPolicy(member(name), CONFIG)
    frame = gradient_divergence(policy, store, store, batches=2, batch_size=2).to_frame().set_index("group")
    groups = {group for group in policy.backbone.groups().values() if group != "query"}
    assert set(frame.index) == {*groups, "all"}
    silent = {"lm_head"} | ({"vision.norm"} if name == "llava_onevision" else set())  # see its no_gradient
    for group in groups:
        assert (frame.loc[group, "verdict"] == "no gradient") == (group in silent), group
        assert group in silent or np.isfinite(frame.loc[group, "naive"]), group


# --- the whole way --------------------------------------------------------------------------------------

QUICK = ("kosmos2", "paligemma2", "qwen3_vl_moe", "smolvlm")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_train_evaluate_and_look_inside(name: str, tmp_path: Path) -> None:
    (tmp_path / "quick.toml").write_text(
        f'preset = "tiny"\nfamily = "{name}"\nimage_size = 56\nmax_steps = 2\nbatch_size = 2\nval_every = 0\n'
    )
    assert main(f"record tabletop --episodes 4 --out {tmp_path}/store".split()) == 0
    common = f"train {tmp_path}/quick.toml --data {tmp_path}/store --out {tmp_path}"
    assert main(f"{common}/vla".split()) == 0
    assert main(f"{common}/vlm --objective language".split()) == 0
    play = f"evaluate {tmp_path}/vla --benchmark tabletop-tasks@1 --tasks move --episodes 1 --out {tmp_path}/e"
    assert main(play.split()) == 0
    assert len(pd.read_parquet(tmp_path / "e" / "rows.parquet")) == 1
    for run in ("vla", "vlm"):
        look = f"features {tmp_path}/{run} --data {tmp_path}/store --layers vision.-1 --out {tmp_path}/f-{run}"
        assert main(f"{look} --device cpu".split()) == 0
    one, other = (Features.open(tmp_path / f"f-{run}").layer("vision.-1") for run in ("vla", "vlm"))
    assert one.shape == other.shape and not np.array_equal(one, other)
    part = f"diverge --base {tmp_path}/vlm/checkpoints/step-000000 --vlm {tmp_path}/vlm --vla {tmp_path}/vla"
    assert main(f"{part} --out {tmp_path}/d --device cpu".split()) == 0
