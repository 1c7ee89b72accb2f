"""The notebooks that ship: thin, in step with their source, and right about what they are given.

Here their cells run in this process, from the folder they lie in, as in JupyterLab; kernels are tested with the
runner.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from blob_store import blob_store
from scipy.stats import ttest_ind
from statsmodels.stats.proportion import proportion_confint

from probes.report.notebook import notebook_names, read_notebook
from probes.report.params import NotebookParams
from probes.report.results_table import plain_rows
from probes.report.runner import plan
from probes.report.site import ORDER
from probes.report.views import benchmark_results, feature_probe
from vlm4vla_core import folders
from vlm4vla_core.errors import InputError
from vlm4vla_core.results import EPISODE_COLUMNS

SOURCES = sorted((folders.project_root() / "notebooks").glob("*.py"))
names = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


# --- what they look like ----------------------------------------------------------------------------------


def test_every_source_has_its_notebook():
    assert [path.stem for path in SOURCES] == notebook_names()
    assert set(ORDER) <= set(notebook_names())


@names
def test_thin(source):
    cells = read_notebook(source.with_suffix(".ipynb")).cells
    code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    assert len(code) <= 12
    for text in code:
        assert len([line for line in text.splitlines() if line.strip()]) <= 10, text
        for node in ast.walk(ast.parse(text)):
            assert not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda), text
            assert not isinstance(node, ast.For | ast.While | ast.If | ast.With | ast.Try), f"logic: {text}"
            assert not (isinstance(node, ast.Attribute) and node.attr == "path" and ast.unparse(node) == "sys.path")
    assert cells[0]["cell_type"] == "markdown"
    assert cells[0]["source"].startswith("# ")
    assert cells[0]["source"].splitlines()[0].endswith("?"), "a report asks a question"
    assert cells[1]["tags"] == ("parameters",)
    assert code[-1].startswith("pages.finish("), "the last cell writes the results"
    assert not any("$" in cell["source"] for cell in cells), "nothing typesets TeX in our pages"


@names
def test_parameters_are_those_of_the_model(source):
    notebook = read_notebook(source.with_suffix(".ipynb"))
    assert set(notebook.defaults) == set(notebook.model.model_fields)
    assert notebook.model.notebook == notebook.name
    for name, field in notebook.model.model_fields.items():
        assert field.description, f"{name} says nothing of itself"
        assert field.is_required(), f"the default of {name} stands in the notebook alone"
    call = next(
        node for cell in notebook.cells if cell["cell_type"] == "code" for node in ast.walk(ast.parse(cell["source"]))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == notebook.model.__name__
    )  # fmt: skip
    assert {word.arg: ast.unparse(word.value) for word in call.keywords} == {name: name for name in notebook.defaults}


@names
def test_source_and_notebook_are_in_step_and_stripped(source):
    import jupytext

    written = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))
    for cell in written["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    told = [(c["cell_type"], "".join(c["source"]), c["metadata"].get("tags", [])) for c in written["cells"]]
    meant = [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in jupytext.read(source).cells]
    assert told == meant, f"run: jupytext --sync notebooks/{source.name}"


# --- what they say ----------------------------------------------------------------------------------------


def play(name: str, out: Path, monkeypatch: pytest.MonkeyPatch, **parameters: Any) -> dict[str, Any]:
    """Run a notebook's cells with other parameters; returns results.json. Every shown value must be showable."""
    notebook = read_notebook(name)
    plan(notebook, parameters)
    monkeypatch.setenv("VLM4VLA_REPORT_FOLDER", str(out))
    monkeypatch.chdir(notebook.path.parent)
    scope: dict[str, Any] = {}
    for cell in notebook.cells:
        if cell["cell_type"] != "code":
            continue
        body = ast.parse(cell["source"]).body
        exec(compile(ast.Module(body[:-1], []), name, "exec"), scope)
        if isinstance(body[-1], ast.Expr):
            value = eval(compile(ast.Expression(body[-1].value), name, "eval"), scope)
            assert value is None or value._repr_mimebundle_()
        else:
            exec(compile(ast.Module(body[-1:], []), name, "exec"), scope)
        if "parameters" in cell["tags"]:
            scope.update(parameters)
    results = folders.read_json(out / "results.json")
    assert (out / "figure.svg").is_file()
    assert results["figure"]["alt"]
    return dict(results)


def rollouts(folder: Path, model: str, successes: dict[str, int], n: int, **more: Any) -> Path:
    rows = [
        {**dict.fromkeys(EPISODE_COLUMNS), "run_id": model, "model": model, "benchmark": "tabletop-abc-d",
         "protocol": "tabletop-tasks@1", "task": task, "episode": i, "env_seed": i, "execute": 1, "success": i < k,
         "success_rule": "any_step", "steps": 9, "wall_s": 0.1, **more}
        for task, k in successes.items() for i in range(n)
    ]  # fmt: skip
    with folders.new_folder(folder, "rollouts") as made:
        pd.DataFrame(rows, columns=list(EPISODE_COLUMNS)).to_parquet(made / "rows.parquet")
        folders.write_manifest(made, "rollouts", config={"model": model}, inputs={})
    return folder


def test_benchmark_results(tmp_path, monkeypatch):
    rollouts(tmp_path / "eval" / "vla", "tiny x", {"touch": 15, "push": 3}, 20, step=400, note="tiny random model")
    rollouts(tmp_path / "eval" / "start", "tiny x", {"touch": 1, "push": 0}, 20, step=0, note="tiny random model")
    rollouts(tmp_path / "eval" / "random", "random", {"touch": 2, "push": 0}, 20)
    rollouts(tmp_path / "eval" / "zero", "zero", {"touch": 0, "push": 0}, 20)
    rollouts(tmp_path / "eval" / "scripted", "scripted", {"touch": 20, "push": 20}, 20)
    results = play("benchmark_results", tmp_path / "out", monkeypatch, rows=[str(tmp_path / "eval" / "*")])
    overall = {row["policy"]: row for row in results["numbers"]["overall"]}
    assert list(overall) == ["scripted", "tiny x, step 400", "tiny x, step 0", "random", "zero"]
    assert {name: row["kind"] for name, row in overall.items()} == dict(
        zip(overall, ("expert", "learned", "untrained", "blind", "blind"), strict=True)
    )
    best = overall["tiny x, step 400"]
    assert (best["successes"], best["episodes"]) == (18, 40)
    assert (best["low"], best["high"]) == pytest.approx(proportion_confint(18, 40, method="wilson"))
    part = "On tabletop-tasks@1 (2 of its 7 tasks: touch, push), "  # never the protocol's name alone
    assert results["answer"].startswith(part + "tiny x, step 400 succeeds in 18 of 40 episodes (45.0 %, ")
    assert "better than the best baseline without sight, random (2 of 40" in results["answer"]
    assert results["answer"].endswith("touch 15 of 20 (random: 2 of 20), push 3 of 20 (random: 0 of 20).")
    assert [badge["key"] for badge in results["badges"]] == ["measured", "built-in", "tiny-random"]
    assert len(results["numbers"]["by_task"]) == 10


def test_chains_show_their_mean_length_and_the_five_step_rates(tmp_path):
    lengths = {"mine": [0, 1, 1, 3, 5, 5, 2, 4], "random": [0, 0, 1, 0, 0, 0, 0, 0]}
    paths = []
    for name, own in lengths.items():
        paths.append(rollouts(tmp_path / name, name, {"chain": 0}, 8, protocol="tabletop-abc-d@1"))
        rows = pd.read_parquet(paths[-1] / "rows.parquet")
        rows.assign(chain=own, success=[n == 5 for n in own]).to_parquet(paths[-1] / "rows.parquet")
    rows = benchmark_results.episode_rows(paths)
    table = benchmark_results.success(rows)
    chain = table.set_index("policy").at["mine", "chain"]
    assert chain["mean"] == 21 / 8 and chain["rates"] == [7 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8]
    assert chain["low"] < 21 / 8 < chain["high"]
    shown = benchmark_results.readable(table).set_index("policy").loc["mine"]
    assert shown["in a row, 95 %"].startswith("2.62 (") and shown.iloc[-2] == "88 / 62 / 50 / 38 / 25"
    assert "2 of 8 episodes" in (told := benchmark_results.answer(table, rows)) and "2.62 of 5 instructions" in told
    span = ttest_ind(lengths["mine"], lengths["random"], equal_var=False).confidence_interval()  # not of whole chains
    assert (
        f"better than the best baseline without sight, random (0 of 8; the difference lies between +{span.low:.2f} "
        in told
    )


def test_a_difference_that_may_be_zero_is_undetermined(tmp_path):
    paths = [rollouts(tmp_path / name, name, {"touch": k}, 20) for name, k in (("mine", 5), ("random", 3))]
    rows = benchmark_results.episode_rows(paths)
    assert "undetermined against" in benchmark_results.answer(benchmark_results.success(rows), rows)
    paths.append(rollouts(tmp_path / "other", "other", {"touch": 20}, 20))
    rows = benchmark_results.episode_rows(paths)
    told = benchmark_results.answer(benchmark_results.success(rows), rows)
    assert "other (the best of 2, chosen on these very episodes) succeeds in 20 of 20" in told


def test_policies_that_ran_other_episodes_are_not_compared(tmp_path):
    mine = rollouts(tmp_path / "mine", "mine", {"touch": 20}, 20)
    blind = rollouts(tmp_path / "zero", "zero", {"touch": 0, "push": 0}, 20)
    rows = benchmark_results.episode_rows([mine, blind])
    told = benchmark_results.answer(benchmark_results.success(rows), rows)
    assert told.endswith("; the best baseline without sight, zero, ran other episodes and is not compared.")
    assert "better" not in told


def test_shortcut_checks_and_draws_stand_beside_their_policy(tmp_path):
    """The same run, kept from reading or seeing, or with another draw of its head's noise, is a line of its own."""
    notes = {"seeing": "stand-in assets", "deaf": "without language; stand-in assets", "blind": "without image"}
    paths = [
        rollouts(tmp_path / name, "mine", {"touch": k}, 20, note=notes[name])
        for name, k in (("seeing", 14), ("deaf", 3), ("blind", 0))
    ]
    paths.append(rollouts(tmp_path / "random", "random", {"touch": 1}, 20))
    rows = benchmark_results.episode_rows(paths)
    table = benchmark_results.success(rows)
    assert dict(zip(table["policy"], table["kind"], strict=True)) == {
        "mine": "learned", "mine, without language": "shortcut", "mine, without image": "shortcut", "random": "blind"
    }  # fmt: skip
    told = benchmark_results.answer(table, rows)
    assert "mine succeeds in 14 of 20" in told and "random (1 of 20" in told
    assert told.endswith(" Shortcut checks: mine, without language 3 of 20; mine, without image 0 of 20.")
    assert set(plain_rows(rows)["policy"]) == set(table["policy"])
    second = pd.read_parquet(paths[0] / "rows.parquet").assign(draw=1)
    second.to_parquet(paths[1] / "rows.parquet")
    rows = benchmark_results.episode_rows(paths[:2])
    assert list(benchmark_results.success(rows)["policy"]) == ["mine", "mine, draw 1"]
    assert set(plain_rows(rows)["policy"]) == {"mine", "mine, draw 1"}


def test_rows_that_must_not_be_pooled_are_refused(tmp_path):
    one = rollouts(tmp_path / "one", "mine", {"touch": 5}, 8)
    with pytest.raises(InputError, match="stands more than once"):
        benchmark_results.episode_rows([one, rollouts(tmp_path / "again", "mine", {"touch": 4}, 8)])
    with pytest.raises(InputError, match="rows of 2 protocols"):
        benchmark_results.episode_rows([one, rollouts(tmp_path / "two", "mine", {"push": 4}, 8, protocol="other@1")])


def test_capability_vs_performance_tells_the_published_correlations(tmp_path, monkeypatch):
    results = play("capability_vs_performance", tmp_path, monkeypatch)
    r = {pair["benchmark"]: pair["pearson"]["r"] for pair in results["numbers"]["pairs"]}
    assert r == pytest.approx({"CALVIN ABC-D": 0.839, "SimplerEnv-Bridge": -0.357, "LIBERO-10": -0.194}, abs=5e-4)
    for words in ("Over 9 models of 3 lineages", "r +0.84", "r −0.36", "r −0.19", "undetermined"):
        assert words in results["answer"]
    assert [(badge["key"], badge["detail"]) for badge in results["badges"]] == [
        ("published", "capability, figure-approx-0.003"), ("published", "performance, exact"),
    ]  # fmt: skip
    assert (tmp_path / results["figure"]["narrow"]).is_file()


def test_capability_vs_performance_takes_tables_of_your_own(tmp_path, monkeypatch):
    models = [f"m{i}" for i in range(6)]
    x = np.arange(6.0)
    pd.DataFrame({"model": models, "score": x}).to_csv(tmp_path / "c.csv", index=False)
    pd.DataFrame({"model": models, "benchmark": "mine", "value": 10 + 3 * x}).to_csv(tmp_path / "p.csv", index=False)
    tables = {"capability": str(tmp_path / "c.csv"), "performance": str(tmp_path / "p.csv")}
    results = play("capability_vs_performance", tmp_path / "out", monkeypatch, **tables)
    assert results["numbers"]["pairs"][0]["pearson"]["r"] == pytest.approx(1)
    assert [badge["key"] for badge in results["badges"]] == ["given", "given"]


def write_features(folder: Path, store: Any, layer: np.ndarray, label: str, **more: Any) -> Path:
    from safetensors.numpy import save_file

    n = len(store)
    with folders.new_folder(folder, "features") as made:
        save_file({"vision.0": layer.astype(np.float32)}, made / "features-00000.safetensors")
        index = {"row": np.arange(n), "episode": store.episode_of, "step": store.step_of, "split": ["train"] * n}
        pd.DataFrame(index).to_parquet(made / "index.parquet")
        folders.write_manifest(
            made, "features", config={"pool": "mean", "camera": "front"}, layers=["vision.0"],
            inputs={"store": store.fingerprint, "checkpoint": label}, model_layers=["vision.0"], frames=n, label=label,
            **more,
        )  # fmt: skip
    return folder


def test_feature_probe(tmp_path, monkeypatch):
    """Features that hold the place exactly, against features of noise: found, and more than the others have."""
    store = blob_store(tmp_path / "store", episodes=20)
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(3, 8))
    origin = {"origin": {"model": "tiny qwen2_5_vl"}}
    known = store.state[:, :3] @ mixing
    trained = write_features(tmp_path / "trained", store, known, "vla step 9", **origin)
    start = write_features(tmp_path / "start", store, rng.normal(size=(len(store), 8)), "vla step 0", **origin)
    other = write_features(tmp_path / "other", store, known @ rng.normal(size=(8, 8)), "vlm", **origin)
    results = play(
        "feature_probe", tmp_path / "out", monkeypatch, checkpoint=str(trained), reference=str(start),
        others=[str(other)], data=str(tmp_path / "store"), targets=["gripper_xyz", "gripper_xy"],
    )  # fmt: skip
    readouts = {(row["kind"], row["name"]): row["r2"] for row in results["numbers"]["readouts"]}
    assert readouts["features", "vla step 9"] > 0.99
    assert readouts["against", "vla step 0"] < 0.3
    assert "with R² 1.00" in results["answer"]
    assert "better than vla step 0 at the same layer" in results["answer"]
    assert results["answer"].endswith("each at its own best layer: gained in gripper xyz, gripper xy.")
    changes = {(row["name"], row["target"], row["best"]): row for row in results["numbers"]["changes"]}
    assert len(changes) == 8 and {row["reference"] for row in changes.values()} == {"vla step 0"}
    assert changes["vlm", "gripper_xyz", False]["verdict"] == "gained"
    gain = readouts["against", "vlm"] - readouts["against", "vla step 0"]
    assert gain < 0 or changes["vlm", "gripper_xy", True]["value"] > 0.7
    assert [badge["key"] for badge in results["badges"]] == ["measured", "tiny-random"]


def test_a_checkpoint_alone_is_probed_without_a_reference(tmp_path, monkeypatch):
    store = blob_store(tmp_path / "store", episodes=20)
    mine = write_features(tmp_path / "mine", store, np.random.default_rng(0).normal(size=(len(store), 8)), "vla")
    results = play(
        "feature_probe", tmp_path / "out", monkeypatch, checkpoint=str(mine), reference=str(mine), others=[],
        data=str(tmp_path / "store"), targets=["gripper_xyz"],
    )  # fmt: skip
    assert results["numbers"]["changes"] == [] and "worse than raw pixels" in results["answer"]


def test_where_the_weights_come_from_is_told_or_said_to_be_missing():
    assert feature_probe.model_badges({"origin": {"model": "tiny x"}}, {"origin": {"model": "Qwen"}}) == ["tiny-random"]
    assert feature_probe.model_badges({"origin": {"model": "nano paligemma s"}}) == ["nano"]
    assert feature_probe.model_badges({"origin": {"model": "Qwen"}}) == []
    assert feature_probe.model_badges({}) == ["unstated: model"]
    assert feature_probe.data_badges("tabletop") == ["scripted"]


def test_the_base_model_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="extra_forbidden"):
        NotebookParams(anything=1)
