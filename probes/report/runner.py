"""Run one parameterised notebook: the only way in which the CLI, the Makefile and the tests run them.

Parameters are checked before a kernel starts; an unchanged report is found out before anything heavy is imported.
A finished run is a folder OUT/NAME with the executed notebook, its HTML page, `results.json`, figures and a
manifest. A failed cell leaves OUT/NAME.failed.ipynb and the older report as it was.

Trap: papermill alone warns of an unknown parameter and runs the default; never call it past this module.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes.report.kernel import NotebookFailed, execute
from probes.report.notebook import Notebook, read_notebook
from probes.report.params import check
from probes.report.worker import unfinished
from vlm4vla_core import folders
from vlm4vla_core.errors import InputError, nearest

RESULTS = "results.json"
CODE = "code of vlm4vla"  # label of the package's own fingerprint among a report's inputs


@dataclass(frozen=True)
class NotebookRun:
    """A finished report. fresh: False when it was up to date and nothing was run."""

    name: str
    folder: Path
    manifest: dict[str, Any]
    fresh: bool

    @property
    def page(self) -> Path:
        return self.folder / f"{self.name}.html"

    @property
    def results(self) -> dict[str, Any]:
        return dict(folders.read_json(self.folder / RESULTS))


def plan(notebook: Notebook, parameters: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Check the parameters; the config and the input fingerprints that decide whether a report is up to date."""
    for name in parameters:
        if name not in notebook.defaults:
            raise InputError(f"unknown parameter '{name}'", where=notebook.name, fix=nearest(name, notebook.defaults))
    values = {**notebook.defaults, **parameters}
    params = check(notebook.model, values, where=notebook.name)
    inputs = {**params.input_fingerprints(), "notebook": notebook.fingerprint, CODE: _code_fingerprint()}
    return {"notebook": notebook.name, "parameters": values}, inputs


def up_to_date(notebook: Notebook, parameters: Mapping[str, Any], out: Path) -> bool:
    """True when OUT/NAME was made from these parameters, inputs, notebook and code."""
    config, inputs = plan(notebook, parameters)
    return folders.current(Path(out) / notebook.name, "report", config=config, inputs=inputs)


def run_notebook(
    name_or_path: str | Path, parameters: Mapping[str, Any] | None = None, out: Path | str = "reports"
) -> NotebookRun:
    """Run a notebook into OUT/NAME, unless it is up to date.

    name_or_path: a shipped notebook's name, or an `.ipynb` or percent `.py`. parameters: name -> value, over the
    notebook's defaults. Raises InputError (unknown notebook or parameter, wrong type, missing input; nothing is
    started then) and NotebookFailed (a cell failed; OUT/NAME.failed.ipynb shows where).
    """
    notebook, given, out = read_notebook(name_or_path), dict(parameters or {}), Path(out)
    config, inputs = plan(notebook, given)
    final = out / notebook.name
    failed = out / f"{notebook.name}.failed.ipynb"
    if folders.current(final, "report", config=config, inputs=inputs):
        return NotebookRun(notebook.name, final, folders.read_manifest(final, "report"), fresh=False)

    from probes.report.export import write_page

    began = time.perf_counter()
    with folders.new_folder(final, "report") as folder, unfinished(folder):
        copy = folder / f"{notebook.name}.ipynb"
        try:
            execute(notebook, given, copy)
            if not (folder / RESULTS).is_file():
                raise NotebookFailed(f"notebook '{notebook.name}' did not end with `pages.finish(…)`")
        except NotebookFailed as error:
            if copy.is_file():
                copy.replace(failed)
            told = ", ".join(f"{name}={value!r}" for name, value in config["parameters"].items())
            raise NotebookFailed(f"{error}; parameters: {told}; executed copy: {failed}") from None
        results = folders.read_json(folder / RESULTS)
        made = {
            "command": _command(notebook, given),
            "parameters": [(name, value, notebook.model.model_fields[name].description or "")
                           for name, value in config["parameters"].items()],
            "inputs": inputs,
            "seconds": round(time.perf_counter() - began, 1),
            **folders.provenance(),
        }  # fmt: skip
        write_page(copy, folder / f"{notebook.name}.html", results=results, made=made)
        manifest = folders.write_manifest(
            folder, "report", config=config, inputs=inputs, question=notebook.question, command=made["command"],
            seed=config["parameters"].get("seed"), seconds=made["seconds"], page=f"{notebook.name}.html",
        )  # fmt: skip
    failed.unlink(missing_ok=True)
    return NotebookRun(notebook.name, final, manifest, fresh=True)


def _command(notebook: Notebook, given: Mapping[str, Any]) -> str:
    import shlex

    ships = notebook.path.parent == folders.shipped("notebooks")
    words = ["vlm4vla", "report", notebook.name if ships else str(notebook.path)]
    for name, value in given.items():
        if value != notebook.defaults[name]:
            words += ["-p", name, value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)


def _code_fingerprint() -> str:
    """Hash of both packages' source files: a report is remade when the code that computes it changed."""
    root = folders.project_root()
    sources = [path for package in ("vlm4vla_core", "probes") for path in (root / package).rglob("*")
               if path.suffix in (".py", ".j2", ".css", ".json") and "_shipped" not in path.parts]  # fmt: skip
    return folders.fingerprint({path.relative_to(root).as_posix(): folders.file_fingerprint(path) for path in sources})
