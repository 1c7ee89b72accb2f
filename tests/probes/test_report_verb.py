"""`vlm4vla report`: parameters from the command line and from files, exit codes, parallel runs, the index."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small_notebook import write_small

from probes.verbs import report
from vlm4vla_core.cli import main
from vlm4vla_core.folders import project_root


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("small_params", None)
    write_small(tmp_path)
    return tmp_path


def test_a_report_from_the_command_line(here, capsys):
    (here / "params.yaml").write_text("factor: 4\nlabel: '7'\n")
    words = ["report", "small.ipynb", "-p", "factor", "0.5", "-f", "params.yaml", "--out", "out", "--json", "done.json"]
    assert main(words) == 0
    first = capsys.readouterr()
    assert "The 7 is 2.625." in first.out
    assert "index: out/index.html" in first.out
    assert first.err == ""
    (record,) = json.loads(Path("done.json").read_text())
    assert (record["code"], record["fresh"], record["results"]["numbers"]["total"]) == (0, True, 2.625)
    assert main(words) == 0
    assert "out/small is up to date" in capsys.readouterr().out
    assert json.loads(Path("done.json").read_text())[0]["fresh"] is False
    Path("out/index.html").unlink()
    assert main(["report", "index", "--out", "out"]) == 0
    assert "The 7 is 2.625." in Path("out/index.html").read_text()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["benchmark_result"], "unknown notebook 'benchmark_result'; did you mean 'benchmark_results'?"),
        (["small.ipynb", "-p", "fctor", "3"], "unknown parameter 'fctor' [small]; did you mean 'factor'?"),
        (["small.ipynb", "-p", "factor", "x"], "parameter 'factor': input should be a valid number, got 'x' [small]"),
        (["small.ipynb", "-p", "table", "no.csv"], "no such file or folder [no.csv]"),
        (["small.ipynb", "-f", "none.yaml"], "no such parameter file [none.yaml]"),
        (["small.ipynb", "-f", "table.csv"], "a parameter file holds `name: value` lines [table.csv]"),
        (["small.ipynb", "-f", "broken.yaml"], "not valid YAML"),
        (["all", "-p", "factor", "3"], "-p sets one notebook's parameter"),
        (["all", "-f", "sections.yaml"], "unknown notebook 'benchmark_resuts' in the parameter file; did you mean"),
        (["index"], "no such folder [out]"),
        (["index", "-p", "a", "1"], "the index takes no parameters"),
        (["all", "--jobs", "0"], "--jobs must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line(here, capsys, words, line):
    (here / "broken.yaml").write_text("a: [1\n")
    (here / "sections.yaml").write_text("benchmark_resuts: {level: 0.9}\n")
    assert main(["report", *words, "--out", "out"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"vlm4vla report: {line}"), told.err
    assert told.err.count("\n") == 1
    assert not Path("out").exists()


def test_a_failing_cell_is_one_line_and_exit_1(here, capsys):
    write_small(here, last="raise RuntimeError('first line\\nsecond line')")
    assert main(["report", "small.ipynb", "--out", "out"]) == 1
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert "RuntimeError: first line second line" in told.err
    assert Path("out/small.failed.ipynb").is_file()
    assert "small failed" in Path("out/index.html").read_text()


def test_several_notebooks_run_in_processes_of_their_own(here):
    """As `report all` does: one is fine, one fails in a cell, one lacks its input; each is told, the others go on."""
    write_small(here, last="1 / 0").rename(here / "fails.ipynb")
    write_small(here)
    jobs: dict = {"small.ipynb": {}, "fails.ipynb": {}, str(here / "small.ipynb"): {"table": "missing.csv"}}
    outcomes = {done.name: done for done in report._run_all(jobs, Path("out"), 2)}
    assert {name: done.code for name, done in outcomes.items()} == dict(zip(jobs, (0, 1, 2), strict=True))
    assert "The sum <of> y is 10.5." in outcomes["small.ipynb"].line
    assert "ZeroDivisionError" in outcomes["fails.ipynb"].line
    assert "missing.csv" in outcomes[str(here / "small.ipynb")].line


def test_all_runs_what_ships_and_tells_of_each_missing_input(here, capsys, monkeypatch):
    """Where the walk has not been walked, only what rests on shipped tables is run; the rest says what it lacks."""
    from probes.report.notebook import notebook_names

    ran = {}

    def pretend(name, parameters, out):
        ran[name] = parameters
        return report.Outcome(name, 0, f"{name} done", fresh=True)

    root = project_root()
    monkeypatch.setattr(report, "_run_one", pretend)
    monkeypatch.setattr("probes.report.worker.worker_pool", lambda workers: ThreadPoolExecutor(workers))
    monkeypatch.setattr("vlm4vla_core.folders.project_root", lambda: here)
    monkeypatch.setattr("vlm4vla_core.folders.shipped", lambda path: root / path)
    monkeypatch.setattr("probes.report.runner._code_fingerprint", lambda: "code")
    (here / "data").symlink_to(root / "data")
    (here / "sections.yaml").write_text("capability_vs_performance: {seed: 5}\n")
    assert main(["report", "all", "-f", "sections.yaml", "--out", "out", "--jobs", "1"]) == 2
    told = capsys.readouterr()
    shipped = ("attribution", "benchmark_power", "feature_probe", "representation_similarity", "training_divergence")
    assert ran == {**{name: {} for name in shipped}, "capability_vs_performance": {"seed": 5}}
    assert sorted(told.out.splitlines()) == sorted(f"{name} done" for name in ran)
    for name in set(notebook_names()) - set(ran):
        assert f"vlm4vla report: {name}: no such" in told.err or f"vlm4vla report: {name}: nothing matches" in told.err
        assert "make it with `vlm4vla " in told.err


def _gone(process: int) -> bool:
    try:  # a zombie that nobody has waited for is gone as well
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks processes up in /proc")
@pytest.mark.parametrize(
    ("how", "to"), [(signal.SIGINT, "group"), (signal.SIGINT, "parent"), (signal.SIGKILL, "parent")]
)
def test_an_interrupted_report_ends_at_once_and_leaves_nothing(here, how, to):
    """In the middle of a cell: one line, exit 130, no kernel, worker or half-written folder left."""
    write_small(
        here,
        last="import os, pathlib, time\n"
        f"pathlib.Path({str(here / 'ids')!r}).write_text(f'{{os.getpid()}} {{os.getppid()}}\\n')\n"
        "time.sleep(60)",
    )
    command = [sys.executable, "-m", "vlm4vla_core.cli", "report", "small.ipynb", "--out", "out"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    ids, until = here / "ids", time.monotonic() + 60
    while not (ids.is_file() and ids.read_text().endswith("\n")):
        assert run.poll() is None and time.monotonic() < until, "the cell was never reached"
        time.sleep(0.02)
    kernel, worker = map(int, ids.read_text().split())
    assert worker != run.pid and not _gone(kernel) and not _gone(worker)
    began = time.monotonic()
    (os.killpg if to == "group" else os.kill)(run.pid, how)
    told = run.communicate(timeout=20)[1]
    while not (_gone(kernel) and _gone(worker)):
        assert time.monotonic() - began < 5
        time.sleep(0.02)
    assert time.monotonic() - began < 5
    assert list(Path("out").iterdir()) == []
    if how == signal.SIGINT:
        assert run.returncode == 130
        assert told == "vlm4vla report: interrupted; issue the same command again to go on\n"
