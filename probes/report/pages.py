"""What the notebooks call: show a figure, show a table, and finish with `results.json`.

Trap: the sentence of answer is built from the run's own numbers by the package, never typed into a notebook.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.numbers import plain
from probes.report.kernel import FOLDER_VARIABLE
from probes.report.params import NotebookParams
from probes.report.runner import RESULTS
from vlm4vla_core import folders
from vlm4vla_core.errors import InputError, nearest

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# How a number was obtained; key -> (label, what it means). Every report carries at least one.
BADGES: dict[str, tuple[str, str]] = {
    "measured": ("measured here", "Computed by this project on the machine that wrote the report."),
    "published": (
        "published numbers",
        "Taken from a publication; the label says of what quality the transcription is.",
    ),
    "tiny-random": (
        "tiny random model",
        "A small model that started from random weights stands in for a pretrained VLM: the pipeline is real, "
        "the result says nothing about any published model.",
    ),
    "nano": (
        "nano VLM",
        "A VLM of less than 5 million parameters, pretrained here on the built-in world, in place of a published one; "
        "the result says nothing about any of those.",
    ),
    "scripted": ("scripted data", "Demonstrations by a scripted expert in the built-in tabletop world."),
    "built-in": ("built-in world", "The project's own small tabletop simulator; not one of the published benchmarks."),
    "given": ("given table", "Read from a table that was handed in; its origin is what that table says."),
    "unstated": ("origin not recorded", "What model or data these numbers come from is not in their manifest."),
    "stand-in": ("stand-in assets", "Replacement objects, scenes or simulators; not the official benchmark."),
}
PIXELS_PER_INCH = 125
_NUMBER = re.compile(r"[+−-]?[\d.,]+|–")


@dataclass(frozen=True)
class Shown:
    """A figure on its way to the page, with the text that stands for it where it cannot be seen."""

    svg: str
    png: bytes
    alt: str
    width: int  # CSS pixels; the page's own width bounds it
    narrow: str = ""  # the SVG for a phone

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        from base64 import b64encode

        about = {"alt": self.alt, "width": self.width}
        data = {"image/svg+xml": self.svg, "image/png": b64encode(self.png).decode(), "text/plain": self.alt}
        return data, {"image/svg+xml": {**about, "narrow": self.narrow}, "image/png": about}


def report_folder(notebook: str) -> Path:
    """Where this run writes: the folder that the runner names, or `drafts/NAME` when the notebook is run by hand."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        return Path(folder)
    root = folders.project_root()
    return (root if (root / "pyproject.toml").is_file() else Path.cwd()) / "reports" / "drafts" / notebook


def show(fig: Figure, alt: str, *, narrow: Figure | None = None) -> Shown:
    """Show a figure in the page. alt: one sentence that says what is to be seen. narrow: the same for a phone.

    Raises ValueError without an alternative text.
    """
    import tempfile

    from probes.style import save_figure

    if not alt.strip():
        raise ValueError("a figure needs an alternative text")
    with tempfile.TemporaryDirectory(prefix="vlm4vla-figure-") as scratch:
        svg, png = save_figure(fig, Path(scratch) / "figure")
        phone = save_figure(narrow, Path(scratch) / "narrow")[0].read_text(encoding="utf-8") if narrow else ""
        return Shown(svg.read_text(encoding="utf-8"), png.read_bytes(), alt, _pixels(fig)[0], phone)


def _pixels(fig: Figure) -> tuple[int, int]:
    """Width and height on a page: larger than on paper, so that the figure's text is about as large as the page's."""
    width, height = (round(PIXELS_PER_INCH * inches) for inches in fig.get_size_inches())
    return width, height


@dataclass(frozen=True)
class Table:
    """A table on its way to the page."""

    html: str
    text: str

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": self.html, "text/plain": self.text}


def table(frame: pd.DataFrame, *, caption: str = "", digits: int = 3) -> Table:
    """Show a data frame without its index: numbers to the right with `digits` decimals, a missing value as a dash."""
    columns = {str(name).replace("_", " "): [_cell(value, digits) for value in frame[name]] for name in frame.columns}
    kinds = {name: _kind(texts) for name, texts in columns.items()}
    head = "".join(f"<th scope=col class={kinds[name]}>{escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>"
        + "".join(f"<td class={kinds[name]}>{escape(texts[i])}</td>" for name, texts in columns.items())
        + "</tr>"
        for i in range(len(frame))
    )
    html = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    html = f"<div class=scroll tabindex=0 role=group>{html}</div>"
    if caption:  # outside the table, so that it wraps at the page's width and not at the table's
        html = f"<figure class=table><figcaption>{escape(caption)}</figcaption>{html}</figure>"
    return Table(html, frame.to_string(index=False))


def statements(items: Iterable[tuple[str, str]]) -> Table:
    """Show (heading, text) pairs one below the other: what in a table would be too long for a phone."""
    pairs = list(items)
    html = "".join(f"<dt>{escape(head)}</dt><dd>{escape(text)}</dd>" for head, text in pairs)
    return Table(f"<dl class=statements>{html}</dl>", "\n".join(f"{head}: {text}" for head, text in pairs))


def _cell(value: Any, digits: int) -> str:
    import numpy as np
    import pandas as pd

    if value is None or value is pd.NA or value != value:
        return "–"
    if isinstance(value, float | np.floating):
        return plain(float(value), digits)
    return str(value)


def _kind(texts: list[str]) -> str:
    """A column's class: numbers stand right, short entries stay on one line, long ones wrap."""
    if all(_NUMBER.fullmatch(text) for text in texts) and any(text != "–" for text in texts):
        return "number"
    return "long" if any(len(text) > 44 for text in texts) else "short"


def finish(
    params: NotebookParams,
    *,
    answer: str,
    badges: Iterable[str],
    numbers: Mapping[str, Any],
    figure: Figure | None = None,
    alt: str = "",
    narrow: Figure | None = None,
) -> None:
    """End a notebook: write its figure (SVG and PNG) and `results.json` into the run's folder.

    answer: one sentence. badges: keys of BADGES, each with an optional detail after a colon
    (`published: exact`). numbers: what the sentence rests on, JSON values. figure, alt: the figure that stands for
    the report on the index, with its alternative text. narrow: the same figure for a phone.
    """
    if not answer.strip() or "\n" in answer:
        raise ValueError("the answer is one sentence on one line")
    folder = report_folder(params.notebook)
    results: dict[str, Any] = {
        "format": "vlm4vla-results",
        "version": 1,
        "notebook": params.notebook,
        "answer": answer.strip(),
        "badges": [_badge(text) for text in badges],
        "figure": None,
        "numbers": dict(numbers),
    }
    if not results["badges"]:
        raise ValueError(f"a report says how its numbers were obtained: {', '.join(BADGES)}")
    if figure is not None:
        from probes.style import save_figure

        if not alt.strip():
            raise ValueError("a figure needs an alternative text")
        svg, png = save_figure(figure, folder / "figure")
        width, height = _pixels(figure)
        results["figure"] = {"svg": svg.name, "png": png.name, "alt": alt, "width": width, "height": height}
        if narrow is not None:
            svg, png = save_figure(narrow, folder / "figure-narrow")
            png.unlink()  # a browser without SVG takes the wide PNG
            results["figure"]["narrow"] = svg.name
    folders.write_json(folder / RESULTS, results)


def _badge(text: str) -> dict[str, str]:
    key, _, detail = text.partition(":")
    if key not in BADGES:
        raise InputError(f"unknown badge '{key}'", fix=nearest(key, BADGES))
    return {"key": key, "label": BADGES[key][0], "detail": detail.strip()}
