"""The door to the reports: `index.html`, one question, one sentence and one figure for each finished run.

Reads only what the runs left behind (manifest and `results.json`), so it works for any notebook. Trap: a folder
without a whole manifest is no report and is left out, with a line that says so.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from probes.report.export import TEMPLATES, typeset
from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

INDEX = "index.html"
ORDER = (
    "capability_vs_performance", "benchmark_power", "study_overview", "auxiliary_tasks", "module_ablation",
    "vision_injection", "training_divergence", "feature_probe", "representation_similarity", "attribution",
    "benchmark_results",
)  # fmt: skip


def build_index(out: Path | str) -> Path:
    """Write OUT/index.html from the reports in OUT; returns its path. Raises InputError when OUT is no folder."""
    from jinja2 import Environment, FileSystemLoader

    from probes.report.pages import BADGES

    out = Path(out)
    if not out.is_dir():
        raise InputError("no such folder", where=out, fix="write reports into it with `vlm4vla report all`")
    cards, broken = _cards(out)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    css = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "site.css"))
    legend = [{"key": key, "label": label, "about": about} for key, (label, about) in BADGES.items()]
    page = environment.get_template("site.html.j2").render(cards=cards, broken=broken, css=css, legend=legend)
    temporary = out / f".{INDEX}.{os.getpid()}.tmp"
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(out / INDEX)
    return out / INDEX


def _cards(out: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """One card per whole report, in reading order, and one line per report that failed or is damaged."""
    cards, broken = [], []
    for path in sorted(out.glob("*.failed.ipynb")):
        name = path.name.removesuffix(".failed.ipynb")
        broken.append(
            f"The last run of {name} failed; {path.name} shows where. What is below is from an older run, if any."
        )
    for folder in sorted(path for path in out.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if not (folder / folders.MANIFEST).is_file():
            continue  # someone else's folder, such as the drafts of notebooks run by hand
        try:
            manifest = folders.read_manifest(folder, "report")
            results = folders.read_json(folder / "results.json")
        except InputError as error:
            broken.append(str(error))
            continue
        figure = results["figure"]
        if figure:
            files = {key: f"{folder.name}/{figure[key]}" for key in ("svg", "png", "narrow") if key in figure}
            figure = {**figure, **files}
        cards.append(
            {
                "name": folder.name,
                "folder": folder.name,
                "page": f"{folder.name}/{manifest['page']}",
                "question": manifest["question"],
                "answer": typeset(results["answer"]),
                "badges": results["badges"],
                "figure": figure,
                "command": manifest["command"],
                "created": f"made {manifest['made_by']['created'].replace('T', ' ').replace('Z', ' UTC')} at commit "
                f"{manifest['made_by']['commit'][:12]}, in {manifest['seconds']} s",
            }
        )
    position = {name: i for i, name in enumerate(ORDER)}
    cards.sort(key=lambda card: (position.get(card["name"], len(ORDER)), card["name"]))
    return cards, broken
