"""Run parameterised notebooks and build the report site: one page per notebook, and an index over them.

NOTEBOOK is a notebook that ships, the path of one of your own, `all` (every one that ships, then the index), `study`
(the four that show a study), `index` (only the index), or `table`: a results table for a paper, of a study or of
episode rows, as LaTeX, markdown or HTML. A report whose parameters, inputs, notebook and code are unchanged is not run
again.

A table: vlm4vla report table -p study studies/nano.toml --format latex

Example: vlm4vla report benchmark_results -p rows runs/walk/eval/vla -p level 0.9 --out reports
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError
from vlm4vla_core.progress import progress

STUDY_PAGES = ("study_overview", "auxiliary_tasks", "module_ablation", "vision_injection")


@dataclass(frozen=True)
class Args:
    notebook: Positional[str]
    """A notebook's name or path, or `all`, `study`, `index` or `table`."""
    parameter: Annotated[UseAppendAction[tuple[tuple[str, str], ...]], arg(aliases=["-p"], metavar="NAME VALUE")] = ()
    """Set a parameter of the notebook; may be given several times."""
    file: Annotated[Path | None, arg(aliases=["-f"])] = None
    """YAML file of parameters; `-p` goes over it. With `all`: one section per notebook."""
    out: Path = Path("reports")
    """Folder of the reports."""
    format: Literal["markdown", "latex", "html"] = "markdown"
    """With `table`: how it is written, to the screen. `-p study PATH` or `-p rows PATH` (episode rows, or a pattern of
    their folders) says of what."""
    jobs: int = 2
    """Notebooks run at the same time, with `all`."""
    json: Path | None = None
    """Also write what was run, and each report's numbers, as JSON."""


@dataclass(frozen=True)
class Outcome:
    """What became of one notebook; plain values, since it crosses a process boundary."""

    name: str
    code: int  # as the process exit codes: 0 done, 1 a cell failed, 2 bad input
    line: str
    fresh: bool = False


def run(args: Args) -> int:
    from probes.report.notebook import notebook_names
    from probes.report.site import build_index

    if args.jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {args.jobs}")
    given = _from_file(args.file)
    if args.notebook == "index":
        if given or args.parameter:
            raise InputError("the index takes no parameters", fix="leave -p and -f out")
        print(build_index(args.out))
        return 0
    if args.notebook == "table":
        return _table(args, given)
    if args.notebook == "all":
        if args.parameter:
            raise InputError(
                "-p sets one notebook's parameter", fix="use -f with a section per notebook, or name the notebook"
            )
        jobs = _sections(given, notebook_names())
    elif args.notebook == "study":
        jobs = {name: {**given, **_from_words(replace(args, notebook=name))} for name in STUDY_PAGES}
    else:
        jobs = {args.notebook: {**given, **_from_words(args)}}
    outcomes = sorted(_run_all(jobs, args.out, args.jobs), key=lambda done: list(jobs).index(done.name))
    for done in outcomes:
        print(
            done.line if done.code == 0 else f"vlm4vla report: {done.line}",
            file=sys.stderr if done.code else sys.stdout,
        )
    if args.out.is_dir():  # nothing was ever written when the only input was bad
        print(f"index: {build_index(args.out)}")
    if args.json:
        folders.write_json(args.json, [_record(done, args.out) for done in outcomes])
    codes = {done.code for done in outcomes}
    return 1 if 1 in codes else max(codes)


def _table(args: Args, given: dict[str, Any]) -> int:
    """A results table for a paper, on the screen."""
    from probes.report.params import find_paths
    from probes.report.results_table import plain_rows, results_table, study_rows

    wanted = {**given, **dict(args.parameter)}
    if unknown := set(wanted) - {"study", "rows", "level"}:
        raise InputError(f"a table has no parameter '{min(unknown)}'", fix="use study or rows, and level")
    if ("study" in wanted) == ("rows" in wanted):
        raise InputError("a table of what?", fix="add -p study studies/nano.toml, or -p rows runs/walk/eval/*")
    try:
        level = float(wanted.get("level", 0.95))
    except ValueError:
        raise InputError(f"level {wanted['level']!r} is no number") from None
    if not 0.5 < level < 1:
        raise InputError(f"level {level:g}", fix="use a number between 0.5 and 1, such as 0.95")
    if "study" in wanted:
        from probes.report.study_params import StudyInput
        from probes.report.views.study import open_study

        rows = study_rows(open_study(StudyInput().resolve(wanted["study"])))
    else:
        from probes.episode_rows import read_rows

        rows = plain_rows(read_rows(find_paths(str(wanted["rows"]), fix="make rows with `vlm4vla evaluate`")))
    made = results_table(rows, level=level)
    print(made.write(args.format), end="")
    if args.json:
        told = {"format": "vlm4vla-results-table", "version": 1, "head": made.head, "rows": made.rows}
        folders.write_json(args.json, {**told, "notes": made.notes})
    return 0


def _from_file(path: Path | None) -> dict[str, Any]:
    """The mapping in a YAML file. Raises InputError when there is none."""
    if path is None:
        return {}
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("no such parameter file", where=path) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"not valid YAML ({' '.join(str(error).split())})", where=path) from None
    if not isinstance(values, dict):
        raise InputError("a parameter file holds `name: value` lines", where=path)
    return {str(name): value for name, value in values.items()}


def _from_words(args: Args) -> dict[str, Any]:
    """The `-p NAME VALUE` pairs, as the types that the notebook's model wants."""
    from probes.report.notebook import read_notebook
    from probes.report.params import from_text

    model = read_notebook(args.notebook).model
    return {name: from_text(model, name, text) for name, text in args.parameter}


def _sections(given: dict[str, Any], names: list[str]) -> dict[str, dict[str, Any]]:
    """notebook -> parameters, of a file with one section per notebook."""
    from vlm4vla_core.errors import nearest

    for name, section in given.items():
        if name not in names:
            raise InputError(f"unknown notebook '{name}' in the parameter file", fix=nearest(name, names))
        if not isinstance(section, dict):
            raise InputError("a section of the parameter file holds `name: value` lines", where=name)
    return {name: given.get(name, {}) for name in names}


def _run_all(jobs: dict[str, dict[str, Any]], out: Path, parallel: int) -> Iterator[Outcome]:
    """Run what is not up to date, in processes that a Ctrl-C ends at once, whatever a cell is doing."""
    from probes.report.notebook import read_notebook
    from probes.report.runner import up_to_date

    missing = {}
    for name, parameters in jobs.items():
        try:
            if up_to_date(notebook := read_notebook(name), parameters, out):
                yield Outcome(name, 0, f"{out / notebook.name} is up to date")
                continue
        except InputError as error:
            if len(jobs) == 1:
                raise
            yield Outcome(name, 2, f"{name}: {error}")
            continue
        missing[name] = parameters
    if not missing:
        return
    from concurrent.futures import as_completed
    from concurrent.futures.process import BrokenProcessPool

    from probes.report.worker import unseen_interrupt, worker_pool

    with worker_pool(min(parallel, len(missing))) as pool:
        with unseen_interrupt():
            waiting = {pool.submit(_run_one, name, parameters, out): name for name, parameters in missing.items()}
        ready = as_completed(waiting)
        if len(waiting) > 1:
            ready = progress(ready, total=len(waiting), what="reports", unit="notebook")
        for done in ready:
            try:
                yield done.result()
            except BrokenProcessPool:
                yield Outcome(waiting[done], 1, f"{waiting[done]}: its process was killed (out of memory?)")


def _run_one(name: str, parameters: dict[str, Any], out: Path) -> Outcome:
    from probes.report.kernel import NotebookFailed
    from probes.report.runner import run_notebook

    try:
        done = run_notebook(name, parameters, out)
    except InputError as error:
        return Outcome(name, 2, f"{name}: {error}")
    except NotebookFailed as error:
        return Outcome(name, 1, str(error))
    return Outcome(name, 0, f"{done.page}  ({done.manifest['seconds']} s)\n  {done.results['answer']}", fresh=True)


def _record(done: Outcome, out: Path) -> dict[str, Any]:
    record: dict[str, Any] = {"notebook": done.name, "code": done.code, "fresh": done.fresh}
    if done.code:
        return {**record, "error": done.line}
    folder = out / Path(done.name).stem
    return {**record, "folder": str(folder), "results": folders.read_json(folder / "results.json")}
