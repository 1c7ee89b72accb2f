"""Figures draw every row of their tables, with what it must be compared with, and take tables read back from JSON."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from probes.figures_divergence import divergence_figure
from probes.figures_layers import layers_figure
from probes.figures_probe import MANY, similarity_figure
from probes.style import save_figure


def test_layers_show_every_checkpoint_and_hollow_where_nothing_is_told_apart() -> None:
    def row(kind: str, name: str, layer: str, r2: float, low: float | None = None, high: float | None = None) -> dict:
        return {"target": "grasp", "kind": kind, "name": name, "layer": layer, "r2": r2, "low": low, "high": high,
                "selected": r2 if kind in ("features", "against") else None}  # fmt: skip

    rows = pd.DataFrame(
        [
            row("features", "vla", "vision.0", 0.41, 0.30, 0.52), row("features", "vla", "vision.1", 0.62, 0.5, 0.7),
            row("against", "base", "vision.0", 0.23), row("against", "base", "vision.1", -0.27, -0.5, 0.1),
            row("pixels", "pixels", "", 0.35, 0.2, 0.45), row("shuffled", "x", "vision.1", -0.02, -0.1, 0.01),
            row("mean", "mean predictor", "", 0, 0, 0),
        ]
    )  # fmt: skip
    changes = pd.DataFrame(
        [("grasp", "linear", "base", "vla", "vision.0", 0.18, -0.1, 0.4, False),
         ("grasp", "linear", "base", "vla", "vision.1", 0.89, 0.5, 1.2, False),
         ("grasp", "linear", "base", "vla", "vision.1", 0.39, -0.5, 1.2, True)],
        columns=["target", "readout", "reference", "name", "layer", "value", "low", "high", "best"],
    )  # fmt: skip
    figure = layers_figure(rows, changes)
    axis = figure.axes[0]
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["base", "vla"]  # the reference first
    lone = [line for line in axis.lines if line.get_linestyle() == "None" and line.get_marker() != "None"]
    points = [(line.get_markerfacecolor(), y) for line in lone if line.get_markersize() < 8 for y in line.get_ydata()]
    assert sorted(y for _, y in points) == [-0.27, 0.23, 0.41, 0.62]
    assert [y for face, y in points if face == "white"] == [0.41]
    rings = [float(line.get_ydata()[0]) for line in lone if line.get_markersize() > 8]
    assert sorted(rings) == [0.23, 0.62]
    low, high = axis.get_ylim()
    assert -0.5 < low < -0.4 and 0.7 < high < 0.8  # what is far below nothing is cut off


def test_similarity_puts_what_is_not_above_the_floor_in_brackets() -> None:
    rows = pd.DataFrame({"layer_a": ["v0", "v0", "v1", "v1"], "layer_b": ["v0", "v1"] * 2,
                         "cka": [0.9, 0.02, 0.5, 0.8], "floor": 0.05})  # fmt: skip
    figure = similarity_figure(rows, label_a="trained", label_b="start")
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.texts] == ["0.90", "(0.02)", "0.50", "0.80"]
    assert np.array_equal(axis.images[0].get_array(), [[0.9, 0.02], [0.5, 0.8]])
    assert (axis.get_ylabel(), axis.get_xlabel()) == ("trained", "start")
    rows = rows.assign(layer_b=["v0", "v1"] * 2, ceiling=[0.95, 0.95, 0.9, 0.9])
    _, beside, *_ = similarity_figure(rows, label_a="trained", label_b="start", twin="seed 1").axes
    ceiling, own = (line.get_ydata().tolist() for line in beside.lines)
    assert (ceiling, own) == ([0.95, 0.9], [0.9, 0.8])


def weights(groups: list[str]) -> pd.DataFrame:
    n = len(groups)
    return pd.DataFrame({"group": groups, "n_params": 100, "rel_norm_a": np.linspace(0.1, 0.2, n), "rel_norm_c": 0.05,
                         "cosine": [None, *[0.3] * (n - 1)], "null_sd": 0.1})  # fmt: skip


def test_divergence_draws_nulls_and_says_where_it_is_too_noisy() -> None:
    groups = ["vision.0", "projector", "decoder.0"]
    gradients = pd.DataFrame(
        {"group": [*groups, "all"], "naive": [0.1, 0.05, None, 0.1], "corrected": [0.6, None, None, 0.5],
         "low": [0.4, None, None, 0.4], "high": [0.8, None, None, 0.6],
         "verdict": ["", "below noise", "no gradient", ""]}
    )  # fmt: skip
    sizes, cosines, angles = divergence_figure(weights(groups), gradients).axes
    np.testing.assert_allclose([line.get_ydata() for line in sizes.lines], [[0.1, 0.15, 0.2], [0.05] * 3])
    assert [(bar.get_y(), bar.get_height()) for bar in cosines.patches] == [(-0.2, 0.4)] * 3
    marks = {
        line.get_label(): float(line.get_xdata()[0]) for line in angles.lines if not line.get_label().startswith("_")
    }
    assert marks == {"noise-corrected": 0.0, "naive": 0.0, "too noisy to say": 1.0}
    assert not any(
        2.0 in line.get_xdata() for line in angles.lines if len(line.get_xdata()) == 1
    )  # no gradient: nothing


@pytest.mark.parametrize("count", [3, 3 * MANY])
def test_many_groups_keep_readable_ticks_and_files_are_written(count: int, tmp_path: Path) -> None:
    figure = divergence_figure(weights([f"decoder.{i}" for i in range(count)]))
    shown = [label.get_text() for label in figure.axes[-1].get_xticklabels() if label.get_text()]
    assert len(figure.axes) == 2 and len(shown) <= MANY and shown[0] == "decoder.0"
    svg, png = save_figure(figure, tmp_path / "divergence")
    assert svg.stat().st_size > 1000 and png.stat().st_size > 1000
