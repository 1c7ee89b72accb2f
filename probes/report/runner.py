"""Run one parameterised notebook: the only way in which the CLI, the Makefile and the tests run them.

Parameters are checked before a kernel starts; an unchanged report is found out before anything heavy is imported.
A finished run is a folder OUT/NAME with the executed notebook, its HTML page, `results.json`, figures and a
manifest. A failed cell leaves OUT/NAME.failed.ipynb and the older report as it was.

Trap: Jupyter looks kernels up by name in the user's home first, and may find another environment's Python; the
kernel here is always the interpreter that runs this code.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes.report.params import NotebookParams, check
from vlm4vla_core import folders
from vlm4vla_core.errors import InputError, nearest

FOLDER_VARIABLE = "VLM4VLA_REPORT_FOLDER"  # tells `pages.finish` in the kernel where the run's folder is
RESULTS = "results.json"
CODE = "code of vlm4vla"  # label of the package's own fingerprint among a report's inputs


class NotebookFailed(Exception):
    """A cell failed (not the user's input): told in one line, exit code 1."""


@dataclass(frozen=True)
class Notebook:
    """A notebook as it is written: its cells, the defaults of its `parameters` cell, and its parameter model."""

    name: str
    path: Path
    cells: tuple[dict[str, Any], ...]  # cell_type, source, tags
    defaults: dict[str, Any]
    model: type[NotebookParams]

    @property
    def question(self) -> str:
        """The first heading: the question that the report answers."""
        for cell in self.cells:
            for line in cell["source"].splitlines() if cell["cell_type"] == "markdown" else ():
                if line.startswith("#"):
                    return str(line.lstrip("#").strip())
        return self.name

    @property
    def fingerprint(self) -> str:
        return folders.fingerprint([[cell["cell_type"], cell["source"]] for cell in self.cells])


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


# --- finding and reading ----------------------------------------------------------------------------------


def notebook_names() -> list[str]:
    """The notebooks that ship, in the order in which a reader meets them."""
    return sorted(path.stem for path in folders.shipped("notebooks").glob("*.ipynb"))


def find_notebook(name_or_path: str | Path) -> Path:
    """The notebook's file: a shipped notebook's name, or the path of an `.ipynb` or percent `.py`."""
    path = Path(name_or_path)
    if path.suffix in (".ipynb", ".py"):
        if not path.is_file():
            raise InputError("no such notebook", where=path)
        return path
    if str(name_or_path) not in notebook_names():
        raise InputError(f"unknown notebook '{name_or_path}'", fix=nearest(str(name_or_path), notebook_names()))
    return folders.shipped(f"notebooks/{name_or_path}.ipynb")


def read_notebook(name_or_path: str | Path) -> Notebook:
    """Read a notebook without running it. Raises InputError when it does not declare and check its parameters."""
    path = find_notebook(name_or_path)
    try:
        if path.suffix == ".py":
            import jupytext

            cells = jupytext.read(path)["cells"]
        else:  # plain JSON: nbformat's import would cost more than the whole check
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        plain = tuple(
            {
                "cell_type": cell["cell_type"],
                "source": "".join(cell["source"]),
                "tags": tuple(cell.get("metadata", {}).get("tags", ())),
            }
            for cell in cells
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot be read as a notebook ({error})", where=path) from None
    code = [cell for cell in plain if cell["cell_type"] == "code"]
    where = [i for i, cell in enumerate(code) if "parameters" in cell["tags"]]
    if len(where) != 1 or where[0] + 1 >= len(code):
        raise InputError(
            f"a notebook needs one cell tagged `parameters` and one after it that checks them, found {len(where)}",
            where=path,
            fix="notebooks/benchmark_results.py shows the pattern",
        )
    defaults = _literals(code[where[0]]["source"], path)
    return Notebook(path.stem, path, plain, defaults, _model(code[: where[0] + 2], path))


def _literals(source: str, path: Path) -> dict[str, Any]:
    """name -> value of a cell of plain assignments of literals."""
    values: dict[str, Any] = {}
    try:
        for line in ast.parse(source).body:
            if not isinstance(line, ast.Assign) or not isinstance(line.targets[0], ast.Name):
                raise ValueError(f"line {line.lineno} is no `name = literal`")
            values[line.targets[0].id] = ast.literal_eval(line.value)
    except (SyntaxError, ValueError) as error:
        raise InputError(f"the `parameters` cell must hold literals only ({error})", where=path) from None
    return values


def _model(cells: list[dict[str, Any]], path: Path) -> type[NotebookParams]:
    """The class that the cell after `parameters` calls, imported there or before: `params = XxxParams(…)`."""
    fix = "write `from MODULE import XxxParams` and `params = XxxParams(…)` there"
    try:
        trees = [node for cell in cells for node in ast.walk(ast.parse(cell["source"]))]
        calls = [node.func.id for node in ast.walk(ast.parse(cells[-1]["source"]))
                 if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]  # fmt: skip
    except SyntaxError as error:
        raise InputError(f"the notebook's code cannot be parsed ({error})", where=path) from None
    for node in trees:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) in calls:
                    found = _import(node.module, alias.name, path, fix)
                    if isinstance(found, type) and issubclass(found, NotebookParams):
                        return found
    raise InputError("the cell after `parameters` does not check them", where=path, fix=fix)


def _import(module: str, name: str, path: Path, fix: str) -> Any:
    """`from module import name`, with the notebook's own folder on the path as it is in the kernel."""
    sys.path.insert(0, str(path.resolve().parent))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"cannot import {name} ({error})", where=path, fix=fix) from None
    finally:
        sys.path.pop(0)


# --- running ----------------------------------------------------------------------------------------------


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
    with folders.new_folder(final) as folder:
        copy = folder / f"{notebook.name}.ipynb"
        try:
            _execute(notebook, given, copy)
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

    words = ["vlm4vla", "report", notebook.name if notebook.name in notebook_names() else str(notebook.path)]
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


def _execute(notebook: Notebook, given: Mapping[str, Any], copy: Path) -> None:
    """Run the cells in a fresh kernel and write the executed notebook to `copy`, also when a cell fails."""
    import jupytext
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    source = jupytext.read(notebook.path, as_version=4)  # reads .ipynb and percent .py alike
    source.cells = [cell for cell in source.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for cell in source.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    with tempfile.TemporaryDirectory(prefix="vlm4vla-kernel-") as scratch:
        try:
            papermill.execute_notebook(
                source,
                str(copy.resolve()).replace("{", "{{").replace("}", "}}"),  # papermill formats its path
                parameters=dict(given),
                kernel_name="python3",
                language="python",
                progress_bar=sys.stderr.isatty(),
                start_timeout=180,
                kernel_manager_class=_own_kernel(copy.resolve().parent, Path(scratch), notebook.path.resolve().parent),
            )
        except PapermillExecutionError as error:
            raise NotebookFailed(_cell_failure(notebook, error)) from None
        except (DeadKernelError, RuntimeError) as error:
            raise NotebookFailed(f"the kernel of notebook '{notebook.name}' died ({error})") from None
    done = nbformat.read(copy, as_version=4)
    done.metadata.pop("papermill", None)  # temporary paths, no use to a reader
    nbformat.write(done, copy)


def _own_kernel(folder: Path, scratch: Path, beside: Path) -> type:
    """A kernel manager for this very interpreter, blind to kernels and startup files in the user's home.

    folder: where the run writes. scratch: connection files. beside: the notebook's folder, importable from.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    spec = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--HistoryManager.enabled=False"],
        language="python",
        display_name="Python 3",
        env={
            FOLDER_VARIABLE: str(folder),
            "IPYTHONDIR": str(scratch),
            "MPLBACKEND": "Agg",  # figures are shown by `pages.show`, never by themselves
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # small models are slower on many threads
            "PYTHONPATH": os.pathsep.join([str(beside), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        },
    )

    # Sockets in a folder: no ports that two kernels could race for, and nothing for others on the machine to read.
    # A socket's path must fit 104 characters (macOS); Windows has none.
    short = os.name == "posix" and len(str(scratch)) < 85
    transport = {"transport": "ipc"} if short else {}

    class OwnKernel(AsyncKernelManager):
        kernel_spec = spec

        def __init__(self, **settings: Any) -> None:
            super().__init__(connection_file=str(scratch / "kernel.json"), **transport, **settings)

    return OwnKernel


def _cell_failure(notebook: Notebook, error: Any) -> str:
    """`notebook 'x' failed at In [3] (`table = …`): ValueError: …`, on one line."""
    first = next((line for line in error.source.splitlines() if line.strip()), "")
    why = " ".join(str(error.evalue).split())
    return f"notebook '{notebook.name}' failed at In [{error.exec_count}] (`{first.strip()}`): {error.ename}: {why}"
