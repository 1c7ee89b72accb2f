"""The report on divergence: what its sentence may say, and the notebook run on three tiny checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from blob_store import SIZE, blob_store
from test_notebooks import play

from probes.report.views import training_divergence as view
from vlm4vla_core import folders
from vlm4vla_core.actions import TABLETOP
from vlm4vla_core.backbone import tiny
from vlm4vla_core.errors import InputError
from vlm4vla_core.policy import PolicyConfig, VLAPolicy


def divergence(folder: Path, cosine: float | None, gradient: tuple[float, float, float] | None) -> Path:
    nan = float("nan")
    weights = pd.DataFrame(
        {"group": ["vision.0", "decoder.0"], "n_params": [100, 300], "rel_norm_a": [0.1, nan], "rel_norm_c": [0.2, 0.3],
         "cosine": [0.5, nan], "null_sd": [0.1, 0.0577]}
    )  # fmt: skip
    total = {"n_params": 400, "rel_norm_a": 0.123, "rel_norm_c": 0.456, "cosine": cosine, "null_sd": 0.05}
    told = {"config": {"batches": 4, "batch_size": 16}, "total": total, "weights": [], "gradients": [],
            "head": "own head", "unmatched": [], "excluded": []}  # fmt: skip
    with folders.new_folder(folder, "divergence") as made:
        weights.to_parquet(made / "weights.parquet")
        if gradient is not None:
            value, low, high = gradient
            row = {"group": "all", "n_params": 400, "naive": 0.1, "corrected": value, "low": low, "high": high,
                   "snr_a": 1.0, "snr_c": 0.2, "norm_a": 1.0, "norm_c": 1.0, "verdict": ""}  # fmt: skip
            pd.DataFrame([{**row, "group": "vision.0"}, row]).to_parquet(made / "gradients.parquet")
        folders.write_json(made / "divergence.json", told)
        origin = {"model": "tiny x", "data": ["tabletop"]}
        folders.write_manifest(made, "divergence", config={}, inputs={}, origin=origin)
    return folder


def test_the_sentence(tmp_path: Path) -> None:
    found = view.read_folder(divergence(tmp_path / "divergence", 0.31, (-0.4, -0.6, -0.2)))
    assert view.answer(found) == (
        "From one base, VLM training moved the weights by 12.3 % of their norm and VLA training by 45.6 % (most in "
        "decoder.0, 30.0 %), in directions with cosine +0.310 (outside the ±0.100 of random changes); when the arms "
        "part was not measured; at the base the noise-corrected cosine of the two losses' gradients is −0.40 (95 % "
        "−0.60 to −0.20): they oppose each other."
    )
    assert view.badges(found) == ["measured", "scripted", "tiny-random"]


@pytest.mark.parametrize(
    ("cosine", "gradient", "words"),
    [
        (0.05, (0.2, -0.1, 0.5), ["within the ±0.100", "the sign is undetermined"]),
        (0.05, (0.2, 0.1, 0.5), ["they pull together"]),
        (0.05, (float("nan"),) * 3, ["below the noise of the batches"]),
        (0.05, (0.2, float("nan"), float("nan")), ["no interval", "the sign is undetermined"]),
        (None, None, ["one of them is zero", "gradients were not measured"]),
    ],
)
def test_no_more_is_said_than_the_intervals_allow(
    tmp_path: Path, cosine: float | None, gradient: tuple[float, float, float] | None, words: list[str]
) -> None:
    found = view.read_folder(divergence(tmp_path / "d", cosine, gradient))
    answer = view.answer(found)
    assert all(word in answer for word in words), answer
    view.gradient_table(found)


def test_the_sentence_names_the_groups_behind_an_average() -> None:
    def row(group: str, a: float, c: float, cosine: float) -> dict[str, Any]:
        return {"group": group, "rel_norm_a": a, "rel_norm_c": c, "cosine": cosine, "null_sd": 0.01}

    weights = [row("vision.0", 0.1, 0.4, -0.5), row("embeddings", 0.8, 0.02, 0.029), row("decoder.0", 0.2, 0.2, 0.031)]
    total = {"rel_norm_a": 0.6, "rel_norm_c": 0.1, "cosine": 0.001, "null_sd": 0.004}
    answer = view.answer(view.Divergence({"total": total}, {"weights": pd.DataFrame(weights)}))
    assert "60.0 % of their norm (most in embeddings, 80.0 %)" in answer
    assert "VLA training by 10.0 % (most in vision.0, 40.0 %)" in answer
    assert "beyond 3 sd of random changes in 2 of 3 module groups (vision.0 −0.50 most)" in answer


def test_groups_may_be_chosen(tmp_path: Path) -> None:
    made = divergence(tmp_path / "d", 0.3, (0.1, 0.0, 0.2))
    assert list(view.read_folder(made, ["vision"]).tables["weights"]["group"]) == ["vision.0"]
    assert list(view.read_folder(made, ["vision"]).tables["gradients"]["group"]) == ["vision.0", "all"]
    with pytest.raises(InputError, match=r"no module group 'visio'.*vision"):
        view.read_folder(made, ["visio"])


def test_the_notebook_on_three_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VLM training grew every weight by a tenth; VLA training shrank the vision tower by a twentieth."""
    blob_store(tmp_path / "store", episodes=6, length=4)
    config = PolicyConfig(2, TABLETOP, (-0.05,) * 6 + (0.0,), (0.05,) * 6 + (1.0,), "front", width=8)
    for name in ("base", "vlm", "vlm-twin", "vla"):
        policy = VLAPolicy(tiny("paligemma", image_size=SIZE), config)
        with torch.no_grad():
            for path, weight in policy.backbone.base.named_parameters() if name != "base" else ():
                weight.mul_(1.1 if "vlm" in name else 0.95 if "vision" in path else 1.0)
        policy.save(tmp_path / name)
    paths = {name: str(tmp_path / name) for name in ("base", "vlm", "vla")}
    results = play(
        "training_divergence", tmp_path / "out", monkeypatch, base=paths["base"],
        vlm=[paths["vlm"], f"{paths['vlm']}-twin"], vla=[paths["vla"]], trajectories=[], data=str(tmp_path / "store"),
        layers=["vision.0", "projector"], frames=0, batches=2, groups=["vision", "projector"],
    )  # fmt: skip
    numbers = results["numbers"]
    moved = {row["group"]: row for row in numbers["weights"]}
    known = [row["rel_norm_a"] for row in moved.values() if row["rel_norm_a"] is not None]  # a bias of zero has none
    assert len(known) > 3
    np.testing.assert_allclose(known, 0.1, rtol=1e-4)
    assert moved["vision.0"]["cosine"] == pytest.approx(-1) and moved["vision.0"]["ceiling_a"] == pytest.approx(1)
    assert moved["decoder.0"]["cosine"] is None and moved["vision.0"]["ceiling_c"] is None
    assert numbers["ceilings"] == "A: vlm-twin; C: missing, a single seed"
    alike = {(row["a"], row["b"], row["layer"]): row["cka"] for row in numbers["cka"]}
    assert alike["A", "A, other seed", "projector"] == pytest.approx(1) and ("A", "C", "vision.0") in alike
    assert "when the arms part was not measured" in results["answer"]
    assert {row["line"] for row in numbers["barriers"]} == {"B→A", "B→C", "A→C", "B→random A", "B→random C", "A→A'"}
