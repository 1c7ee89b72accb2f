"""Pages of a study: planted effects are told apart, others not; an unlearnt stage tests nothing; gaps are said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_notebooks import play

from probes.report.study_params import StudyInput, study_fingerprint
from probes.report.views import module_ablation, study_overview, vision_injection
from probes.report.views import study as shared
from vlm4vla_core.errors import InputError
from vlm4vla_core.study import expand, read_study
from vlm4vla_core.study.collect import Tables, collect

STUDY = """
name = "pages"
deviations = "Small on purpose."
[[data]]
name = "demos"
world = "tabletop"
options = { tasks = ["move"], episodes = 4 }
[[backbone]]
name = "qwen"
[[stage]]
name = "spoken"
preset = "tiny"
data = "demos"
set = { objective = "language" }
[[stage]]
name = "mumbled"
preset = "tiny"
data = "demos"
set = { objective = "language", max_steps = 2 }
[[stage]]
name = "fast"
preset = "tiny"
data = "demos"
set = { objective = "fast" }
[[benchmark]]
protocol = "tabletop-abc-d@1"
preset = "tiny"
data = "demos"
[[arm]]
name = "full"
axis = ["capability"]
seeds = [0, 1, 2]
[[arm]]
name = "spoken-first"
axis = ["auxiliary"]
against = "full"
stages = ["spoken"]
seeds = [0, 1, 2]
[[arm]]
name = "mumbled-first"
axis = ["auxiliary"]
against = "full"
stages = ["mumbled"]
seeds = [0, 1, 2]
[[arm]]
name = "alike"
axis = ["auxiliary"]
against = "full"
seeds = [0, 1, 2]
set = { max_steps = 410 }
[[arm]]
name = "frozen"
axis = ["freezing", "injection"]
against = "full"
seeds = [0, 1]
set = { freeze = ["vision"] }
[[arm]]
name = "fast-then-frozen"
title = "FAST, then frozen"
axis = ["injection"]
against = "frozen"
stages = ["fast"]
set = { freeze = ["vision"] }
"""
PLANTED = {"full": 0.3, "spoken-first": 0.8, "mumbled-first": 0.8, "alike": 0.3, "frozen": 0.05}
PAGES = ("study_overview", "auxiliary_tasks", "module_ablation", "vision_injection")


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> tuple[Path, Tables]:
    folder = tmp_path_factory.mktemp("pages")
    (folder / "study.toml").write_text(STUDY)
    plan = expand(read_study(folder / "study.toml"))
    return folder / "study.toml", collect(plan, folder / "none")


@pytest.fixture(scope="module")
def filled(empty) -> shared.StudyTables:
    """Chains of five from planted success rates, the same states for all; `spoken` learnt its task, `mumbled` not."""
    path, tables = empty
    cells, rows, stages = tables.cells.copy(), [], []
    rng = np.random.default_rng(0)
    for place, cell in tables.cells.iterrows():
        if cell["arm"] not in PLANTED:
            continue
        cells.loc[place, "state"] = "shipped"
        lengths = np.minimum(rng.geometric(1 - PLANTED[cell["arm"]], 80) - 1, 5)
        for episode, length in enumerate(lengths):
            rows.append({
                "model": "m", "run_id": cell["cell"], "init": "pretrained", "freeze": cell["freeze"], "aux": "none",
                "family": "f", "lineage": "l", "train_seed": cell["seed"], "step": 400, "benchmark": "tabletop-abc-d",
                "protocol": cell["protocol"], "task": "chain", "episode": episode, "env_seed": episode, "execute": 4,
                "success": length == 5, "success_rule": "any_step", "chain": float(length), "partial": None,
                "arm": cell["arm"], "backbone": cell["backbone"], "cell_seed": cell["seed"], "provenance": "shipped",
            })  # fmt: skip
        for job in str(cell["earlier"]).split():
            good = cell["arm"] == "spoken-first"
            for when, right in (("start", 0.2), ("end", 0.6 if good else 0.22)):
                stages.append({"id": job, "when": when, "objective": "language", "answer_accuracy": right,
                               "majority": 0.25, "rows": 200, "loss": 1.0})  # fmt: skip
    made = Tables(pd.DataFrame(rows), cells, tables.capability, pd.DataFrame(stages), tables.jobs, tables.study)
    made.write(path.parent / "done" / "tables")
    return shared.open_study(path.parent / "done")


def test_a_planted_difference_is_told_apart_and_none_is_not(filled):
    found = {one.arm: one for one in shared.contrasts(filled, "auxiliary")}
    one = found["spoken-first"]
    assert one.verdict == "higher" and one.metric == "chain" and one.seeds == (3, 3) and one.episodes == 80
    rows = filled.episodes
    means = [rows.loc[rows["arm"] == arm, "chain"].astype(float).mean() for arm in ("spoken-first", "full")]
    assert one.difference == pytest.approx(means[0] - means[1])
    assert found["alike"].verdict == "undetermined"
    assert found["mumbled-first"].verdict == "not tested" and found["mumbled-first"].difference > 1
    assert found["mumbled-first"].learnt.startswith("no, answers right 0.20 to 0.22")
    assert found["spoken-first"].learnt == "yes, answers right 0.20 to 0.60, 3 seeds"
    assert [one.p_holm >= one.p for one in found.values()] == [True] * 3


def test_two_seeds_conclude_nothing_and_rows_that_are_missing_are_said(filled):
    (frozen,) = shared.contrasts(filled, "freezing")
    assert frozen.verdict == "undetermined (2 of 3 seeds)" and frozen.difference < 0
    found = vision_injection.found(filled)
    assert [one.verdict for one in found] == [shared.NOT_RUN] and not found[0].run
    square = vision_injection.square(filled)
    assert square["first stage"].tolist() == ["none", "FAST"]
    assert "2 seeds" in square["encoder frozen"][0] and square["encoder frozen"][1] == shared.NOT_RUN


def test_half_the_episodes_of_an_arm_are_compared_on_the_states_that_both_ran(filled):
    rows = filled.episodes
    half = rows[(rows["arm"] != "spoken-first") | (rows["episode"] < 40)]
    one = next(
        one for one in shared.contrasts(replace(filled, episodes=half), "auxiliary") if one.arm == "spoken-first"
    )
    kept = half[half["episode"] < 40]
    means = [kept.loc[kept["arm"] == arm, "chain"].astype(float).mean() for arm in ("spoken-first", "full")]
    assert one.episodes == 40 and one.difference == pytest.approx(means[0] - means[1])


def test_repeats_are_kept_apart_and_their_spread_is_counted(filled, empty):
    one = filled.episodes[(filled.episodes["arm"] == "full") & (filled.episodes["cell_seed"] == 1)]
    chains = {0: [5, 0, 2], 1: [5, 1, 2], 2: [5, 0, 2]}
    again = [one.iloc[:3].assign(draw=draw, chain=lengths) for draw, lengths in chains.items()]
    tables = empty[1]
    rows = pd.concat([filled.episodes.assign(draw=pd.NA), *again])
    study = shared._made(tables.study, filled.cells, rows, filled.capability, filled.performance, filled.stages)
    assert len(study.episodes) == len(filled.episodes) and len(study.repeats) == 9
    (line,) = module_ablation.repeat_table(study).to_dict("records")
    assert (line["draws"], line["training seed"], line["episodes that differ"]) == (3, 1, "1 of 3")
    assert (line["lowest"], line["highest"], line["SD over draws"]) == ("2.33", "2.67", "0.19")
    assert module_ablation.repeat_table(filled)["draws"].tolist() == [shared.NOT_RUN]


def test_the_file_that_fills_a_study_is_what_its_pages_name(empty):
    path, tables = empty
    parts = (tables.cells, tables.episodes, tables.capability, tables.capability, tables.stages)
    assert shared.open_study(path).command() == f"vlm4vla study run {path}"
    (path.parent / "small.toml").write_text(f'include = ["{path.name}"]\nfilled_by = "{path.name}"\nname = "small"\n')
    assert shared.open_study(path.parent / "small.toml").command("heads") == f"vlm4vla study run {path} --only heads"
    assert shared._made(tables.study, *parts).file == "studies/pages.toml"
    (path.parent / "small.toml").write_text(f'include = ["{path.name}"]\nfilled_by = "none.toml"\n')
    with pytest.raises(InputError, match="no study file 'none"):
        shared.open_study(path.parent / "small.toml")


def test_coverage_counts_cells_and_the_correlation_needs_five_models(filled):
    table = study_overview.coverage(filled).set_index("axis")
    assert table.loc["auxiliary", ["cells", "shipped", "not run"]].tolist() == [9, 9, 0]
    assert table.loc["injection", ["cells", "shipped", "not run"]].tolist() == [3, 2, 1]
    assert study_overview.correlation(filled) is None
    scores = pd.DataFrame({
        "model": list("abcdef"), "lineage": "l", "benchmark": "vqa", "score": np.arange(6) / 10, "stderr": 0.01,
    })  # fmt: skip
    values = pd.DataFrame({
        "model": list("abcdef"), "lineage": "l", "benchmark": "tabletop-abc-d@1", "metric": "avg_len",
        "value": [1.0, 1.2, 1.1, 1.5, 1.4, 1.9], "episodes": 600, "successes": None,
    })  # fmt: skip
    result = study_overview.correlation(replace(filled, capability=scores, performance=values))
    assert result.pairs[0].pearson.r == pytest.approx(np.corrcoef(scores["score"], values["value"])[0, 1])


def test_a_study_is_a_file_a_folder_or_a_bundle_and_its_fingerprint_knows_what_is_done(empty, filled, tmp_path):
    path, _ = empty
    assert StudyInput().resolve(str(path)) == path
    before = study_fingerprint(path.parent / "done")
    (path.parent / "done" / "jobs").mkdir(exist_ok=True)
    (path.parent / "done" / "jobs" / "weights").write_bytes(b"x")
    assert study_fingerprint(path.parent / "done") == before  # only tables count
    with pytest.raises(InputError, match="neither a study's folder with tables nor a bundle"):
        StudyInput().resolve(str(tmp_path))
    other = tmp_path / "study.toml"
    other.write_text(STUDY.replace("seeds = [0, 1]", "seeds = [0, 1, 2]"))
    assert study_fingerprint(other) != study_fingerprint(path)


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_written_before_anything_was_run_and_afterwards(page, empty, filled, tmp_path, monkeypatch):
    path, _ = empty
    nothing = play(page, tmp_path / "nothing", monkeypatch, study=str(path))
    assert "not run yet" in nothing["answer"] or "None of the" in nothing["answer"]
    assert "vlm4vla study run" in nothing["answer"]
    done = play(page, tmp_path / "done", monkeypatch, study=str(path.parent / "done"))
    assert done["figure"]["alt"] and "shipped" not in done["answer"]
    if page == "auxiliary_tasks":
        assert "1 undetermined; 1 not tested" in done["answer"] and "spoken-first" in done["answer"]
        assert "measured" in [badge["key"] for badge in done["badges"]]
