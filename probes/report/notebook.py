"""A notebook as it is written: finding it, its cells, the defaults of its parameters, the model that checks them.

Nothing is run here, and nothing heavy imported: this is what decides whether a report is up to date. Trap: the defaults
are read from the `parameters` cell as literals, so an expression there is refused.
"""

from __future__ import annotations

import ast
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes.report.params import NotebookParams
from vlm4vla_core import folders
from vlm4vla_core.errors import InputError, nearest


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
