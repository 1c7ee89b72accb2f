"""The one runner: parameters are refused before a kernel starts, a run is whole, an unchanged one is not repeated."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from small_notebook import TABLE, write_small

from probes.report import runner
from probes.report.kernel import NotebookFailed
from probes.report.notebook import read_notebook
from probes.report.params import (
    BenchmarkResultsParams,
    NotebookParams,
    find_path,
    find_paths,
    from_text,
    input_fingerprint,
)
from probes.report.runner import run_notebook, up_to_date
from vlm4vla_core import folders
from vlm4vla_core.errors import InputError


@pytest.fixture(autouse=True)
def fresh_model(monkeypatch):
    """Every test's small_params.py is another file under the same name."""
    sys.modules.pop("small_params", None)


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_small(tmp_path)


@pytest.fixture
def no_kernel(monkeypatch):
    """Fails the test when a kernel would be started."""

    def refuse(*_, **__):
        raise AssertionError("a kernel was started")

    monkeypatch.setattr(runner, "execute", refuse)


def test_a_run_is_whole_and_an_unchanged_one_is_not_repeated(small, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))  # neither kernels nor startup files of a user are needed
    Path("out").mkdir()
    Path("out/small.failed.ipynb").touch()  # of an earlier run
    signals: list[int] = []

    async def note(self, signum):
        signals.append(signum)

    monkeypatch.setattr("jupyter_client.manager.KernelManager._async_signal_kernel", note)
    done = run_notebook(small, {"factor": 3.0}, "out")
    assert done.fresh
    assert signals == []  # the kernel is asked to end; an interrupt would make it complain on stderr
    assert [path.name for path in Path("out").iterdir()] == ["small"]
    assert {path.name for path in done.folder.iterdir()} == {
        "small.ipynb", "small.html", "results.json", "manifest.json", "figure.svg", "figure.png",
    }  # fmt: skip
    manifest = folders.read_manifest(done.folder, "report", hashes=True)
    assert manifest["config"]["parameters"] == {"table": "table.csv", "factor": 3.0, "label": "sum <of> y", "seed": 3}
    assert manifest["inputs"]["table: table.csv"] == folders.file_fingerprint(tmp_path / "table.csv")
    assert (manifest["question"], manifest["seed"]) == ("How large is the sum?", 3)
    assert manifest["command"] == f"vlm4vla report {small} -p factor 3.0"
    assert {"versions", "commit", "hardware"} <= set(manifest["made_by"])
    assert done.results["numbers"]["total"] == pytest.approx(3 * (2 + 4.5 - 1.25))
    assert done.results["answer"] == "The sum <of> y is 15.75."
    executed = json.loads((done.folder / "small.ipynb").read_text())
    assert "papermill" not in executed["metadata"]
    assert any("checked 5.25" in str(cell.get("outputs")) for cell in executed["cells"])

    def refuse(*_, **__):
        raise AssertionError("run again")

    monkeypatch.setattr(runner, "execute", refuse)
    again = run_notebook(small, {"factor": 3.0}, "out")
    assert not again.fresh
    assert again.manifest == manifest
    notebook = read_notebook(small)
    assert not up_to_date(notebook, {"factor": 4.0}, Path("out"))
    (tmp_path / "table.csv").write_text(TABLE + "7,1\n")
    assert not up_to_date(notebook, {"factor": 3.0}, Path("out"))
    (tmp_path / "table.csv").write_text(TABLE)
    assert up_to_date(notebook, {"factor": 3.0}, Path("out"))
    write_small(tmp_path, last="pass")
    assert not up_to_date(read_notebook(small), {"factor": 3.0}, Path("out"))
    write_small(tmp_path)
    monkeypatch.setattr(runner, "_code_fingerprint", lambda: "another version")
    assert not up_to_date(read_notebook(small), {"factor": 3.0}, Path("out"))


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"fctor": 3.0}, ["unknown parameter 'fctor'", "did you mean 'factor'?"]),
        ({"factor": "three"}, ["parameter 'factor'", "'three'", "multiplies the values"]),
        ({"factor": -1.0}, ["parameter 'factor'", "greater than 0", "-1.0"]),
        ({"factor": float("nan")}, ["parameter 'factor'", "nan"]),
        ({"seed": 1.5}, ["parameter 'seed'", "1.5"]),
        ({"seed": True}, ["parameter 'seed'", "True"]),
        ({"label": 3}, ["parameter 'label'", "string", "3"]),
        ({"table": "missing.csv"}, ["no such file or folder", "missing.csv", "vlm4vla evaluate"]),
        ({"table": 3}, ["parameter 'table'", "path", "3"]),
    ],
)
def test_bad_parameters_are_told_before_a_kernel_starts(small, no_kernel, parameters, words):
    with pytest.raises(InputError) as caught:
        run_notebook(small, parameters, "out")
    line = str(caught.value)
    assert "\n" not in line
    assert all(word in line for word in words), line
    assert not Path("out").exists()


def test_a_failing_cell_leaves_its_copy_and_the_older_report(small, tmp_path):
    with folders.new_folder(Path("out/small"), "report") as folder:  # an older report, of whatever
        (folder / "small.html").write_text("old")
        before = folders.write_manifest(folder, "report", config={}, inputs={})["fingerprint"]
    broken = write_small(tmp_path, last="limit = len(frame)\nframe.loc[limit + 39]")
    with pytest.raises(NotebookFailed) as caught:
        run_notebook(broken, {"factor": 7.0}, "out")
    line = str(caught.value)
    assert "\n" not in line
    for word in ("notebook 'small' failed", "`limit = len(frame)`", "KeyError: 42", "factor=7.0", "small.failed.ipynb"):
        assert word in line
    copy = json.loads(Path("out/small.failed.ipynb").read_text())
    assert any(output.get("ename") == "KeyError" for cell in copy["cells"] for output in cell.get("outputs", ()))
    assert folders.read_manifest(Path("out/small"), "report")["fingerprint"] == before
    assert sorted(path.name for path in Path("out").iterdir()) == ["small", "small.failed.ipynb"]


def test_a_notebook_must_end_with_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import jupytext
    from small_notebook import NOTEBOOK

    write_small(tmp_path)
    cut = NOTEBOOK[: NOTEBOOK.index("# %%\nimport pandas")]
    jupytext.write(jupytext.reads(cut, fmt="py:percent"), "small.ipynb")
    with pytest.raises(NotebookFailed, match="did not end with"):
        run_notebook("small.ipynb", {}, "out")
    assert not Path("out/small").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "params = SmallParams(table=table, factor=factor, label=label, seed=seed)",
            "params = 3",
            "does not check them",
        ),
        ("factor = 2.0", "factor = 1 + 1", "literals only"),
        ('tags=["parameters"]', "", "tagged `parameters`"),
        ("from small_params import SmallParams", "from small_params import SmalParams as SmallParams", "cannot import"),
    ],
)
def test_a_notebook_that_does_not_check_its_parameters_is_refused(tmp_path, no_kernel, old, new, words):
    import jupytext
    from small_notebook import NOTEBOOK

    path = write_small(tmp_path)
    assert old in NOTEBOOK
    jupytext.write(jupytext.reads(NOTEBOOK.replace(old, new, 1), fmt="py:percent"), path)
    with pytest.raises(InputError, match=words):
        run_notebook(path, {}, tmp_path / "out")


def test_unknown_damaged_and_missing_notebooks(tmp_path):
    with pytest.raises(InputError, match="did you mean 'benchmark_results'"):
        run_notebook("benchmark_result", {}, tmp_path)
    with pytest.raises(InputError, match="no such notebook"):
        run_notebook(tmp_path / "none.ipynb", {}, tmp_path)
    (tmp_path / "bad.ipynb").write_text('{"cells": [')
    with pytest.raises(InputError, match="cannot be read as a notebook"):
        run_notebook(tmp_path / "bad.ipynb", {}, tmp_path)


def test_paths_are_found_from_here_and_from_the_project_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_path("notebooks/benchmark_results.py") == folders.project_root() / "notebooks/benchmark_results.py"
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/benchmark_results.py").touch()
    assert find_path("notebooks/benchmark_results.py") == tmp_path / "notebooks/benchmark_results.py"
    for name in ("b", "a", ".a.12.tmp"):
        (tmp_path / "eval" / name).mkdir(parents=True)
    assert [path.name for path in find_paths("eval/*")] == ["a", "b"]
    with pytest.raises(InputError, match="nothing matches"):
        find_paths("evl/*")


def test_folder_inputs_are_read_through_their_manifest(tmp_path, monkeypatch):
    with folders.new_folder(tmp_path / "rows", "rollouts") as folder:
        (folder / "rows.parquet").write_bytes(b"1234")
        manifest = folders.write_manifest(folder, "rollouts", config={}, inputs={})
    assert input_fingerprint(tmp_path / "rows") == manifest["fingerprint"]
    params = BenchmarkResultsParams(rows=[str(tmp_path / "rows")], level=0.9)
    assert list(params.input_fingerprints().values()) == [manifest["fingerprint"]]
    (tmp_path / "rows" / "rows.parquet").write_bytes(b"123")
    with pytest.raises(InputError, match="3 bytes, the manifest says 4"):
        BenchmarkResultsParams(rows=[str(tmp_path / "rows")], level=0.9)
    with folders.new_folder(tmp_path / "store", "features") as folder:
        folders.write_manifest(folder, "features", config={}, inputs={})
    with pytest.raises(InputError, match="expected a rollouts"):
        BenchmarkResultsParams(rows=[str(tmp_path / "store")], level=0.9)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.csv").write_text("a")
    before = input_fingerprint(tmp_path / "plain")
    (tmp_path / "plain" / "a.csv").write_text("b")
    assert input_fingerprint(tmp_path / "plain") != before


def test_command_line_text_becomes_the_type_that_is_meant():
    assert from_text(BenchmarkResultsParams, "level", "0.9") == 0.9
    assert from_text(BenchmarkResultsParams, "level", "high") == "high"
    assert from_text(BenchmarkResultsParams, "rows", "runs/eval/*") == "runs/eval/*"
    assert from_text(BenchmarkResultsParams, "rows", '["a", "b"]') == ["a", "b"]
    assert from_text(BenchmarkResultsParams, "rows", "2024") == "2024"

    class Named(NotebookParams):
        label: str

    assert from_text(Named, "label", "7") == "7"
