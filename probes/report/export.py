"""Write an executed notebook as one HTML page that is whole without a network.

nbconvert's stock templates load MathJax, require.js and mermaid from the web, so the page is a template of our own
(`templates/report`): answer and provenance first, results without their code, then how the page was made, with the
code behind a toggle. Trap: nothing here typesets TeX; write formulas in Unicode.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"


def write_page(notebook: Path, page: Path, *, results: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """Render an executed `.ipynb` as `page`.

    results: what `pages.finish` wrote (answer, badges). made: command, parameters [(name, value, meaning)], inputs,
    versions, commit, hardware, created, seconds.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter
    from traitlets.config import Config

    nb = nbformat.read(notebook, as_version=4)
    exporter = HTMLExporter(
        config=Config({"HTMLExporter": {"preprocessors": []}}),
        template_name="report",
        extra_template_basedirs=[str(TEMPLATES)],
        exclude_anchor_links=True,
    )
    report = {
        "name": notebook.stem,
        "title": _title(nb, notebook.stem),
        "results": {**results, "answer": typeset(results["answer"])},
        "made": made,
        "css": (TEMPLATES / "report.css").read_text(encoding="utf-8"),
        "code_css": HtmlFormatter(style="default").get_style_defs(".highlight"),
    }
    body, _ = exporter.from_notebook_node(nb, resources={"report": report})
    page.write_text(body, encoding="utf-8")


def typeset(text: str) -> str:
    """Text whose numbers stay with their sign, symbol or unit at the end of a line."""
    text = re.sub(r"(?<=\d) (?=%|mm\b)", "\u00a0", text)
    return re.sub(r"\b(r|R²) (?=[+−]?\d)", "\\1\u00a0", text)


def _title(nb: Any, otherwise: str) -> str:
    """The first markdown heading."""
    for cell in nb.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            return str(cell.source.splitlines()[0].lstrip("#").strip())
    return otherwise
