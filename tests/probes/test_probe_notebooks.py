"""The notebooks about representations and attributions, run on small inputs with a known answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from blob_store import SIZE, blob_store
from test_notebooks import play, write_features

from vlm4vla_core.actions import TABLETOP
from vlm4vla_core.backbone import tiny
from vlm4vla_core.policy import PolicyConfig, VLAPolicy


def test_representation_similarity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that were only turned are the same by every measure; unrelated ones are not above shuffled images."""
    store = blob_store(tmp_path / "store", episodes=40, length=3)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(len(store), 6))
    turned = 3 * x @ np.linalg.qr(rng.normal(size=(6, 6)))[0] + 1
    a = write_features(tmp_path / "a", store, x, "net a")
    a_twin = write_features(tmp_path / "twin", store, -2 * turned, "net a again")
    for name, other in (("turned", turned), ("noise", rng.normal(size=(len(store), 6)))):
        b = write_features(tmp_path / name, store, other, name)
        results = play(
            "representation_similarity", tmp_path / f"out-{name}", monkeypatch, checkpoint=str(a), reference=str(b),
            twin=[str(a_twin)] if name == "noise" else [], data=str(store.path), resamples=20, neighbours=5,
        )  # fmt: skip
        (cka,), (others,) = results["numbers"]["cka"], results["numbers"]["other"]
        if name == "turned":
            assert [cka["cka"], others["mutual_knn"], others["cknna"]] == pytest.approx([1, 1, 1])
            assert "On 120 frames of 40 episodes the representations of net a and turned" in results["answer"]
            assert results["answer"].endswith("above what shuffled images give.")
        else:
            assert abs(cka["cka"]) < 0.2 and others["mutual_knn"] < 0.3
            assert cka["ceiling"] == pytest.approx(1) and cka["ceiling_high"] == pytest.approx(1)
            assert results["answer"].endswith("net a again, another seed of net a, has 1.00 in vision.0.")


def test_attribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = blob_store(tmp_path / "store", episodes=3, length=4)
    config = PolicyConfig(3, TABLETOP, (-0.05,) * 6 + (0.0,), (0.05,) * 6 + (1.0,), "front", width=16)
    for seed in (0, 1):
        VLAPolicy(tiny("paligemma", seed=seed, image_size=SIZE), config, seed=seed).save(tmp_path / f"vla{seed}")
    results = play(
        "attribution", tmp_path / "out", monkeypatch, checkpoint=str(tmp_path / "vla0"), data=str(store.path),
        reference=str(tmp_path / "vla1"), episode=1, frames=2, orders=4,
    )  # fmt: skip
    frames, reference = results["numbers"]["frames"], results["numbers"]["reference"]
    assert [row["step"] for row in frames] == [0, 3]
    for row in frames:
        allowed = max(0.02 * abs(row["answer"] - row["baseline"]), 1e-3)
        assert abs(row["sum of scores"] - (row["answer"] - row["baseline"])) <= allowed + 1e-6
        assert 0.2 <= row["p, deletion"] <= 1
    assert all(abs(row["rank correlation"]) < 1 for row in reference)
    assert "x of vla0 in 2 frames of “push the cup right”" in results["answer"]
