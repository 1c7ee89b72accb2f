"""Policies made of nano VLMs are shipped in fp16 and load; what ships in data/nano_arms is whole and small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vlm4vla_core import checkpoint, folders
from vlm4vla_core.actions import TABLETOP
from vlm4vla_core.backbone import load_backbone
from vlm4vla_core.episodes.store import EpisodeStore
from vlm4vla_core.nano import CARD, fingerprint, nano, ship
from vlm4vla_core.policy import PolicyConfig, VLAPolicy

ARMS = folders.project_root() / "data" / "nano_arms"
POLICIES, VLMS = ("vla", "vla-twin", "scratch"), ("base", "vlm", "spatial", "fast")


@pytest.fixture(scope="module")
def policy() -> VLAPolicy:
    config = PolicyConfig(3, TABLETOP, (-0.05,) * 6 + (0.0,), (0.05,) * 6 + (1.0,), "front", width=16)
    return VLAPolicy(nano("paligemma", "xs"), config).eval()


def test_a_shipped_policy_loads_and_predicts_what_its_rounded_weights_do(policy: VLAPolicy, tmp_path: Path) -> None:
    policy.save(tmp_path / "run")
    ship(tmp_path / "run", tmp_path / "out", {"name": "x", "seeds": (0, 1)})
    stored = load_file(tmp_path / "out" / checkpoint.WEIGHTS)
    assert {value.dtype for value in stored.values()} == {torch.float16}
    loaded = VLAPolicy.load(tmp_path / "out")
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    for name, value in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float()), name
    pictures = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), dtype=np.uint8)
    texts = ["touch the red cube", "pick up the ball"]
    assert np.allclose(loaded.predict(pictures, texts).actions, policy.predict(pictures, texts).actions, atol=1e-3)
    assert torch.equal(load_backbone(tmp_path / "out").query, loaded.backbone.query)
    assert folders.read_json(tmp_path / "out" / CARD)["parameters"] == sum(p.numel() for p in policy.parameters())


def test_shipping_the_same_again_leaves_the_folder_alone(policy: VLAPolicy, tmp_path: Path) -> None:
    policy.save(tmp_path / "run")
    ship(tmp_path / "run", tmp_path / "out", {"name": "x"})
    before = (tmp_path / "out" / folders.MANIFEST).stat().st_mtime_ns
    ship(tmp_path / "run", tmp_path / "out", {"name": "x"})
    assert (tmp_path / "out" / folders.MANIFEST).stat().st_mtime_ns == before
    ship(tmp_path / "run", tmp_path / "out", {"name": "y"})
    assert folders.read_json(tmp_path / "out" / CARD)["name"] == "y"


# --- what ships


def test_the_arms_are_small_and_tell_nothing_of_the_machine() -> None:
    files = [file for file in ARMS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 15e6
    words = [str(Path.home()) + "/", "/tmp/", str(folders.project_root()) + "/"]
    for file in files:
        if file.suffix in (".json", ".jsonl", ".md", ".py"):
            text = file.read_text(encoding="utf-8")
            assert not [word for word in words if word in text], file


@pytest.mark.parametrize("name", [*VLMS, *POLICIES])
def test_an_arm_is_what_its_card_says(name: str) -> None:
    folder, base = ARMS / name, folders.read_json(ARMS / "base" / CARD)
    manifest = folders.read_manifest(folder, checkpoint.KIND, hashes=True)
    card = folders.read_json(folder / CARD)
    stored = load_file(folder / checkpoint.WEIGHTS)
    prefix = "" if name in POLICIES else "backbone."
    assert card["weights"] == fingerprint({key.removeprefix(prefix): value for key, value in stored.items()})
    assert manifest["facts"]["policy"] == (name in POLICIES)
    if name == "base":
        return
    assert (card["base"]["name"], card["base"]["weights"]) == (base["name"], base["weights"])
    assert card["steps"] == manifest["step"] == folders.read_json(ARMS / "vla" / CARD)["steps"]
    assert card["held_out"]["end"]["loss"] < card["held_out"]["start"]["loss"]
    assert card["settings"]["init"] == ("scratch" if name == "scratch" else "pretrained")


def test_the_probe_store_has_what_every_target_is_made_of() -> None:
    from probes.dense import dense_view
    from probes.targets import DENSE, TARGETS, target_of

    store = EpisodeStore.open(ARMS / "probes")
    rows = np.arange(0, len(store), 50)
    for name in TARGETS:
        assert target_of(store, name, rows=rows).defined.any(), name
    for name in DENSE:
        assert len(dense_view(store, name, "front", rows, 8).values) == len(rows)


def test_the_paths_can_be_asked_when_the_arms_part() -> None:
    from probes.trajectories import read_trajectories

    paths = read_trajectories(sorted((ARMS / "trajectories").iterdir()))
    assert sorted(zip(paths.arms, paths.seeds, strict=True)) == [
        (arm, seed) for arm in ("action", "language") for seed in range(4)
    ]
    assert not paths.left_out and {"vision tower", "projector", "decoder"} <= set(paths.modules())
    assert not list((ARMS / "trajectories").rglob("model.safetensors"))
