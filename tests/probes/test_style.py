"""Figures are saved whole, twice the same, and lineages keep apart."""

from __future__ import annotations

import matplotlib as mpl
import pytest

from probes import style
from vlm4vla_core.errors import InputError


def _drawing():
    with style.figure_style():
        fig, axes = style.new_figure(columns=2, width=style.TWO_COLUMN)
        axes[0, 0].plot([0, 1, 2], [1, 3, 2], label="a")
        axes[0, 0].legend()
        axes[0, 1].fill_between([0, 1], [0, 1], [1, 2], clip_on=True)
    return fig


def test_saving_twice_gives_the_same_bytes_and_no_leftovers(tmp_path):
    first = style.save_figure(_drawing(), tmp_path / "one" / "a.b")
    second = style.save_figure(_drawing(), tmp_path / "two" / "a.b")
    assert [path.name for path in first] == ["a.b.svg", "a.b.png"]
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()
    assert "<dc:date>" not in first[0].read_text()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["a.b.png", "a.b.svg"]


def test_a_plot_asked_for_as_pdf_comes_in_all_three_and_the_same_twice(tmp_path):
    first = style.save_plot(_drawing(), tmp_path / "a.pdf")
    second = style._save(_drawing(), tmp_path / "b", "pdf", 220)
    assert sorted(path.name for path in first) == ["a.pdf", "a.png", "a.svg"]
    assert first[0].read_bytes() == second.read_bytes() and second.read_bytes().startswith(b"%PDF")
    style.check_plot(None)
    with pytest.raises(InputError, match=r"a plot is \.png, \.svg or \.pdf, not '\.jpg'"):
        style.check_plot(tmp_path / "a.jpg")


def test_png_has_the_stated_width(tmp_path):
    from PIL import Image

    _, png = style.save_figure(_drawing(), tmp_path / "f", dpi=100)
    assert Image.open(png).size[0] == pytest.approx(100 * style.TWO_COLUMN, abs=1)


def test_style_does_not_leak():
    before = dict(mpl.rcParams)
    with style.figure_style():
        assert mpl.rcParams["font.size"] == style.RC["font.size"]
    assert dict(mpl.rcParams) == before


def test_known_lineages_keep_their_mark_and_new_ones_get_their_own():
    known = style.lineage_marks(["Qwen", "Kosmos"])
    many = style.lineage_marks(["A", "Qwen", "B", "Kosmos", *map(str, range(30))])
    assert many["Qwen"] == known["Qwen"] and many["Kosmos"] == known["Kosmos"]
    assert len(set(many.values())) == len(many) == 35


def test_no_two_lines_of_the_palette_look_alike_without_red_green_vision():
    """Viénot, Brettel and Mollon (1999): the palette's colours stay apart when seen without the red or green cones."""
    import numpy as np

    srgb = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in style.PALETTE])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    protan = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
    deutan = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])
    for seen in (protan, deutan):
        light = np.clip(linear @ seen.T, 0, 1) ** (1 / 2.2)
        gaps = np.linalg.norm(light[:, None] - light[None], axis=-1)[np.triu_indices(len(light), 1)]
        assert gaps.min() > 0.05
