"""Figures draw every row of their tables, with what it must be compared with, and take tables read back from JSON."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from probes.figures_probe import MANY, divergence_figure, probe_figure, similarity_figure
from probes.style import save_figure


def probe_rows() -> pd.DataFrame:
    def row(kind: str, layer: str, r2: float, low: float | None, high: float | None, chosen: bool = False) -> dict:
        name = {"features": "vla step 9", "against": "vla step 0"}.get(kind, kind)
        return {"kind": kind, "name": name, "layer": layer, "chosen": chosen, "r2": r2, "low": low, "high": high}

    return pd.DataFrame(
        [
            row("features", "vision.0", 0.41, 0.30, 0.52), row("features", "vision.1", 0.62, 0.5, 0.7, True),
            row("against", "vision.0", 0.23, None, None), row("against", "vision.1", -0.27, -0.5, 0.1, True),
            row("pixels", "", 0.35, 0.2, 0.45), row("shuffled", "vision.1", -0.02, -0.1, 0.01),
            row("mean", "", 0, 0, 0),
        ]
    )  # fmt: skip


def test_probe_bars_show_every_readout_and_baseline() -> None:
    axis = probe_figure(probe_rows()).axes[0]
    widths = [bar.get_width() for bar in axis.patches]
    assert widths == [0.41, 0.23, 0.62, -0.27, 0.35, -0.02]  # by layer, the comparison under each; then the baselines
    assert [label.get_text() for label in axis.get_yticklabels()][2] == "vision.1 ▸"
    assert [text.get_text() for text in axis.texts] == ["0.41", "0.23", "0.62", "−0.27", "0.35", "−0.02"]
    spans = [tuple(line.get_xdata()) for line in axis.lines if line.get_xdata()[0] != line.get_xdata()[1]]
    assert spans == [(0.30, 0.52), (0.5, 0.7), (-0.5, 0.1), (0.2, 0.45), (-0.1, 0.01)]
    low, high = axis.get_xlim()
    assert low < -0.5 and high > 0.7


def test_similarity_puts_what_is_not_above_the_floor_in_brackets() -> None:
    rows = pd.DataFrame({"layer_a": ["v0", "v0", "v1", "v1"], "layer_b": ["v0", "v1"] * 2,
                         "cka": [0.9, 0.02, 0.5, 0.8], "floor": 0.05})  # fmt: skip
    figure = similarity_figure(rows, label_a="trained", label_b="start")
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.texts] == ["0.90", "(0.02)", "0.50", "0.80"]
    assert np.array_equal(axis.images[0].get_array(), [[0.9, 0.02], [0.5, 0.8]])
    assert (axis.get_ylabel(), axis.get_xlabel()) == ("trained", "start")


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
