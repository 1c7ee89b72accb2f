"""The look that all figures share: one palette, one set of sizes, one way to save.

    with figure_style():
        fig, axes = new_figure(columns=2, width=TWO_COLUMN)   # axes: (rows, columns) array
        axes[0, 0].plot(x, y, color=PALETTE[0])
    save_figure(fig, folder / "name")                         # name.svg and name.png, byte for byte the same twice

Figures are drawn at the width at which they are read (inches of a printed column), so a font size here is a
font size on the page. Trap: matplotlib reads its settings when an artist is made; draw inside `figure_style()`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

ONE_COLUMN, TWO_COLUMN = 3.3, 7.2  # inches: a journal's column, and its page

# Okabe and Ito (2008), apart under all three kinds of dichromacy; their yellow is left out, too pale for thin lines.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B5B5B")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SMALL = 6.4  # font size of what is written inside a panel or in a figure's legend: values, names, notes
INK, MUTED, GRID = "#1F2430", "#626975", "#E3E5E9"


class Mark(NamedTuple):
    """How one group is drawn; the marker repeats what the colour says, for readers and printers without colour."""

    colour: str
    marker: str


# Known lineages keep their mark from figure to figure; `lineage_marks` gives new ones the marks that are left.
_LINEAGES = {
    "Qwen": Mark(PALETTE[0], "o"),
    "PaliGemma": Mark(PALETTE[1], "s"),
    "Kosmos": Mark(PALETTE[2], "^"),
    "InternVL": Mark(PALETTE[3], "D"),
}
UNSTATED = Mark(PALETTE[6], "o")

RC: Any = {  # Any: matplotlib types the keys as one literal per setting, and differently from version to version
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same glyphs on every machine
    "font.size": 7.5,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "image.cmap": "cividis",  # perceptually even, and safe without red-green vision
    "svg.fonttype": "path",  # looks the same where DejaVu Sans is not installed
    "svg.hashsalt": "vlm4vla",  # element ids come from the content, not from a random salt
}


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw in the shared style; outside the block matplotlib's settings are what they were.

    The palette is the colour cycle. Usable as a decorator too: `@figure_style()`.
    """
    import matplotlib as mpl
    from cycler import cycler

    with mpl.rc_context({**RC, "axes.prop_cycle": cycler(color=PALETTE)}):
        yield


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = ONE_COLUMN, height: float | None = None, **subplots: Any
) -> tuple[Figure, np.ndarray]:
    """A figure outside pyplot's registry (nothing to close) with constrained layout, and its axes (rows, columns).

    width, height: inches; the default height gives panels of about 4:3. subplots: passed to `Figure.subplots`
    (sharex, sharey, width_ratios…).
    """
    from matplotlib.figure import Figure

    tall = height if height is not None else rows * (0.75 * width / columns + 0.2)
    fig = Figure(figsize=(width, tall), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False, **subplots)


def lineage_marks(lineages: Iterable[str]) -> dict[str, Mark]:
    """lineage -> Mark, in order of first appearance; an empty name (lineage not stated) is grey.

    Beyond seven lineages, colours and markers are combined anew, so that no two marks are equal up to 49.
    """
    names = [name for name in dict.fromkeys(lineages) if name]
    taken = {_LINEAGES[name] for name in names if name in _LINEAGES}
    spare = (
        mark
        for shift in range(len(MARKERS))
        for i, colour in enumerate(PALETTE)
        if (mark := Mark(colour, MARKERS[(i + shift) % len(MARKERS)])) not in taken and mark != UNSTATED
    )
    marks = {name: _LINEAGES.get(name) or next(spare, UNSTATED) for name in names}
    return {**marks, "": UNSTATED}


def check_plot(path: Path | None) -> None:
    """Raise InputError for a --plot that is no .png, .svg or .pdf, before the work and not after it."""
    if path is not None and path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"a plot is .png, .svg or .pdf, not '{path.suffix}'", where=path)


def save_plot(fig: Figure, path: Path) -> tuple[Path, ...]:
    """Write what --plot names: .png and .svg both, and .pdf too when the name ends so; returns the paths."""
    if path.suffix == ".pdf":
        return (_save(fig, path.with_suffix(""), "pdf", 220), *save_figure(fig, path.with_suffix("")))
    return save_figure(fig, path.with_suffix(""))[::-1]


def save_figure(fig: Figure, path_stem: Path | str, *, dpi: int = 220) -> tuple[Path, Path]:
    """Write `<path_stem>.svg` and `<path_stem>.png` without dates or random ids; returns both paths.

    The same figure gives the same bytes on the same machine. Each file is written beside its name and renamed, so
    a killed run leaves no half figure. dpi: of the PNG (3.3 inches at 220 are 726 pixels).
    """
    return _save(fig, Path(path_stem), "svg", dpi), _save(fig, Path(path_stem), "png", dpi)


# What each format would otherwise write of date, program and chance.
_KEEP_OUT: dict[str, Any] = {
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def _save(fig: Figure, stem: Path, kind: str, dpi: int) -> Path:
    import matplotlib as mpl

    stem.parent.mkdir(parents=True, exist_ok=True)
    path = stem.with_name(f"{stem.name}.{kind}")
    temporary = stem.with_name(f".{stem.name}.{os.getpid()}.{kind}")
    try:
        with mpl.rc_context(RC):
            fig.savefig(temporary, format=kind, dpi=dpi, metadata=_KEEP_OUT[kind])
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
