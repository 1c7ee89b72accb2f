"""`vlm4vla import-results`: what each evaluator's file becomes, what is unknown, and what is refused in one line."""

from __future__ import annotations

import json
import pickle
import sqlite3
from contextlib import closing

import numpy as np
import pandas as pd
import pytest
from result_files import (
    dump,
    episode,
    harness_json,
    lerobot_json,
    lmms_results,
    lmms_samples,
    quoted_csv,
    recording,
)  # fmt: skip
from scipy import stats

from vlm4vla_core.cli import main
from vlm4vla_core.results import CAPABILITY_COLUMNS, EPISODE_COLUMNS, PERFORMANCE_COLUMNS


@pytest.fixture
def load(tmp_path, capsys):
    """Imports files and returns (table, printed text); a name that ends in .csv or .parquet may be given as out."""

    def run(*words, out="out.parquet"):
        target = tmp_path / out
        code = main(["import-results", *map(str, words), "--out", str(target)])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        frame = pd.read_parquet(target) if target.suffix == ".parquet" else pd.read_csv(target)
        return frame, printed.out

    return run


@pytest.fixture
def refused(tmp_path, capsys):
    """The one line that an import is refused with; nothing is written."""

    def run(*words):
        target = tmp_path / "refused.parquet"
        code = main(["import-results", *map(str, words), "--out", str(target)])
        printed = capsys.readouterr()
        assert code == 2, printed.out
        assert printed.err.count("\n") == 1 and not target.exists()
        return printed.err

    return run


# --- vla-eval ---------------------------------------------------------------------------------------------


def libero(path, **more):
    outcomes = [("pick", 0, True, 0), ("pick", 1, False, 0), ("put", 0, True, 1), ("put", 1, True, 1)]
    return recording(path, [episode(t, i, s, task_idx=k) for t, i, s, k in outcomes], **more)


def test_a_recording_becomes_rows_as_evaluate_writes_them(tmp_path, load):
    frame, printed = load(libero(tmp_path / "r.sqlite"), "--model", "vla", "--lineage", "Qwen")
    assert tuple(frame.columns) == EPISODE_COLUMNS
    assert frame["task"].tolist() == ["pick", "pick", "put", "put"] and frame["success"].tolist() == [
        True,
        False,
        True,
        True,
    ]
    row = frame.iloc[1]
    assert (row["model"], row["lineage"], row["benchmark"], row["episode"]) == (
        "vla",
        "Qwen",
        "LIBEROBenchmark_libero_10",
        1,
    )
    assert (
        row["protocol"] == "vla-eval 0.8.0: some.module:Benchmark, sync" and row["steps"] == 51 and row["wall_s"] == 1.5
    )
    assert row["success_rule"] == "unknown" and pd.isna(row["env_seed"]) and pd.isna(row["execute"])
    assert (
        "unknown: env_seed, execute, success_rule" in printed and "0.750" in printed
    )  # the rate never without interval
    assert "0.301" in printed  # Wilson's lower end for 3 of 4


def test_of_a_repeated_item_the_last_committed_row_counts(tmp_path, load):
    rows = [episode("pick", 0, False), episode("pick", 1, False), episode("pick", 0, True)]
    frame, _ = load(recording(tmp_path / "r.sqlite", rows), "--model", "vla")
    assert sorted(zip(frame["episode"], frame["success"], strict=True)) == [(0, True), (1, False)]


def test_errors_count_as_failures_and_an_unfinished_run_says_so(tmp_path, load):
    broken = episode("pick", 1, False, status="error", failure_reason="timeout")
    path = recording(tmp_path / "r.sqlite", [episode("pick", 0, True), broken], done=(1, 1, 0))
    frame, printed = load(path, "--model", "vla")
    assert frame["note"].tolist()[1] == "from r.sqlite; error: timeout; evaluation not finished"
    assert "1 of 2 episodes ended in an error" in printed and "the evaluation was not finished" in printed


@pytest.mark.parametrize(("mode", "rule"), [("truncation", "last_step"), ("accumulate", "any_step")])
def test_simplers_success_mode_is_the_success_rule(tmp_path, load, mode, rule):
    path = recording(tmp_path / "r.sqlite", [episode("stack", 0, True)], params={"success_mode": mode})
    frame, _ = load(path, "--model", "vla")
    assert frame["success_rule"].tolist() == [rule]


def test_chains_become_lengths_and_step_rates(tmp_path, load):
    lengths = [5, 2, 0, 3]
    rows = [
        episode(f"seq_{i:04d}", 0, k == 5, task_idx=i, metrics={"success": k == 5, "completed_subtasks": k})
        for i, k in enumerate(lengths)
    ]
    path = recording(tmp_path / "r.sqlite", rows, benchmark="CALVINBenchmark")
    frame, _ = load(path, "--model", "vla")
    assert (
        frame["chain"].tolist() == lengths
        and set(frame["task"]) == {"chain"}
        and frame["episode"].tolist() == [0, 1, 2, 3]
    )
    counted, _ = load(path, "--model", "vla", "--as", "performance", out="p.parquet")
    total = counted[counted["task"] == ""].iloc[0]
    assert total["metric"] == "avg_len" and total["value"] == np.mean(lengths) and total["episodes"] == 4
    steps = counted[counted["metric"] == "step_rate"].set_index("task")["value"]
    assert [steps[f"{k} in a row"] for k in range(1, 6)] == [0.75, 0.75, 0.5, 0.25, 0.25]


def test_episodes_count_up_to_a_total_and_to_tasks(tmp_path, load):
    frame, _ = load(libero(tmp_path / "r.sqlite"), "--model", "vla", "--as", "performance", "--benchmark", "LIBERO-10")
    assert tuple(frame.columns[: len(PERFORMANCE_COLUMNS)]) == PERFORMANCE_COLUMNS
    found = frame.set_index("task")[["value", "successes", "episodes"]].to_dict("index")
    assert found[""] == {"value": 75.0, "successes": 3, "episodes": 4}
    assert found["pick"] == {"value": 50.0, "successes": 1, "episodes": 2}
    assert set(frame["metric"]) == {"success_pct"} and set(frame["unit"]) == {"per cent"}
    assert set(frame["benchmark"]) == {"LIBERO-10"} and set(frame["source"]) == {"r.sqlite"}


def test_a_recording_and_its_export_are_the_same_episodes(tmp_path, load):
    exported = harness_json(tmp_path / "a.json", {"pick": [True, False], "put": [True, True]}, mean_success=0.75)
    frame, printed = load(libero(tmp_path / "r.sqlite"), exported, "--model", "vla")
    assert len(frame) == 4 and "4 episodes said what another row says, merged" in printed


def test_the_same_episode_with_two_outcomes_names_both_files(tmp_path, refused):
    other = harness_json(tmp_path / "a.json", {"pick": [True, True]})
    line = refused(libero(tmp_path / "r.sqlite"), other, "--model", "vla")
    assert "success of vla on LIBEROBenchmark_libero_10" in line and "is False and True" in line
    assert "r.sqlite, pick episode 1 |" in line and "a.json, pick episode 1]" in line and "--run-id" in line


def test_a_repeated_evaluation_is_kept_apart_by_its_run(tmp_path, load):
    first = harness_json(tmp_path / "a.json", {"pick": [True, False]}, eval_id=None)
    second = harness_json(tmp_path / "b.json", {"pick": [True, True]}, eval_id=None)
    load(first, "--model", "vla")
    load(second, "--model", "vla", "--run-id", "again", out="again.parquet")
    both, _ = load(tmp_path / "out.parquet", tmp_path / "again.parquet", out="both.parquet")
    assert len(both) == 4
    counted, printed = load(tmp_path / "both.parquet", "--as", "performance", out="p.csv")
    assert counted["successes"].tolist() == [3] and "2 runs counted together" in printed


# --- LeRobot ----------------------------------------------------------------------------------------------


def test_lerobots_tasks_and_groups(tmp_path, load):
    path = lerobot_json(tmp_path / "x.json", {"libero_10": {0: [True, False], 1: [True]}, "libero_goal": {0: [False]}})
    frame, _ = load(path, "--model", "smolvla")
    assert frame["benchmark"].tolist() == ["libero_10"] * 3 + ["libero_goal"]
    assert frame["task"].tolist() == ["task 0", "task 0", "task 1", "task 0"] and frame["success"].tolist() == [
        True,
        False,
        True,
        False,
    ]
    one_name, _ = load(path, "--model", "smolvla", "--benchmark", "LIBERO", out="o.parquet")
    assert set(one_name["benchmark"]) == {"LIBERO"} and one_name["task"].nunique() == 3


def test_lerobots_older_layout_has_seeds_and_no_benchmark(tmp_path, load, refused):
    episodes = [{"episode_ix": i, "sum_reward": 0.0, "success": i == 1, "seed": 1000 + i} for i in range(3)]
    path = dump(tmp_path / "x.json", {"per_episode": episodes, "aggregated": {"pc_success": 100 / 3}})
    frame, _ = load(path, "--model", "act", "--benchmark", "pusht")
    assert frame["env_seed"].tolist() == [1000, 1001, 1002] and frame["success"].tolist() == [False, True, False]
    assert "add --benchmark NAME" in refused(path, "--model", "act")


def test_lerobots_totals_alone_are_performance(tmp_path, load):
    body = {
        "per_task": [],
        "per_group": {"libero_10": {"pc_success": 62.5, "n_episodes": 8}},
        "overall": {"pc_success": 62.5},
    }
    frame, _ = load(dump(tmp_path / "x.json", body), "--model", "smolvla")
    assert (frame["value"][0], frame["successes"][0], frame["episodes"][0], frame["unit"][0]) == (
        62.5,
        5,
        8,
        "per cent",
    )


# --- lmms-eval --------------------------------------------------------------------------------------------


def test_lmms_scores_carry_their_provenance(tmp_path, load):
    path = lmms_results(tmp_path / "x.json", {"mmmu_val": {"mmmu_acc": 0.42, "mmmu_acc_stderr": 0.01}}, n=60)
    frame, printed = load(path, out="c.csv")
    assert tuple(frame.columns[: len(CAPABILITY_COLUMNS)]) == CAPABILITY_COLUMNS
    row = frame.iloc[0]
    assert (row["model"], row["benchmark"], row["score"], row["stderr"], row["n"]) == (
        "org/VLM",
        "mmmu_val/mmmu_acc",
        0.42,
        0.01,
        60,
    )
    assert row["evaluator"] == "lmms-eval" and row["version"] == "main@abcd1234; task 1.0" and row["unit"] == "unknown"
    assert json.loads(row["prompt"]) == {"post_prompt": "Answer briefly.", "shots": 0}
    assert row["quality"] == "measured on 60 of 100 questions" and "unknown: unit, lineage" in printed


@pytest.mark.parametrize(
    ("score", "kinds", "wanted"),
    [
        (0.4, {"_stderr": 0.03, "_stderr_clt": 0.02}, 0.03),
        (0.4, {"_stderr": "N/A", "_stderr_clt": 0.02}, 0.02),
        (0.4, {"_stderr": "N/A", "_stderr_clt": 0.02, "_stderr_clustered": 0.04}, 0.04),
        (40.0, {"_stderr": "N/A", "_stderr_clt": 0.02}, None),  # of the samples' mean, which the task has scaled
        (0.4, {"_stderr": "N/A", "_stderr_clt": 0.4}, None),  # no fraction of 100 questions is that uncertain
        (0.4, {"_stderr": []}, None),
    ],
)
def test_only_an_error_on_the_scores_own_scale_is_taken(tmp_path, load, score, kinds, wanted):
    metrics = {"m": score, **{f"m{kind}": value for kind, value in kinds.items()}}
    frame, _ = load(lmms_results(tmp_path / "x.json", {"t": metrics}))
    assert (frame["stderr"][0] == wanted) if wanted else pd.isna(frame["stderr"][0])


def test_samples_give_mean_and_error_and_fill_what_the_results_leave_open(tmp_path, load):
    values = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    results = lmms_results(
        tmp_path / "m" / "D_results.json", {"t": {"acc": float(np.mean(values)), "acc_stderr": "N/A"}}, n=7
    )
    samples = lmms_samples(tmp_path / "m" / "D_samples_t.jsonl", "acc", values)
    frame, _ = load(samples)
    assert frame["score"][0] == pytest.approx(np.mean(values)) and frame["stderr"][0] == pytest.approx(
        stats.sem(values)
    )
    assert (frame["n"][0], frame["model"][0], frame["benchmark"][0]) == (7, "org/VLM", "t/acc")
    both, printed = load(results, samples, out="both.parquet")
    assert len(both) == 1 and both["stderr"][0] == pytest.approx(stats.sem(values)) and "1 score said" in printed
    assert both["source"][0] == "D_results.json + D_samples_t.jsonl"


def test_what_is_better_lower_is_said(tmp_path, load):
    path = lmms_results(tmp_path / "x.json", {"t": {"error": 0.2}}, higher_is_better={"t": {"error": False}})
    assert load(path)[0]["unit"][0] == "unknown, lower is better"


# --- VLMEvalKit -------------------------------------------------------------------------------------------


def kit(folder, hits=(1, 0, 1, 1)):
    """status.json, score table and judged answers of one run of VLMEvalKit."""
    overall = float(np.mean(hits))
    run = folder / "MyVLM" / "T20260101-000000"
    metrics = {"split=none|Overall": overall, "split=none|colour": 0.5}
    body = {"schema_version": "1.0", "eval_id": run.name, "model_name": "MyVLM", "commit": "e8e78f05",
            "datasets": {"BLINK": {"status": "done", "metrics": metrics, "judge_model": "exact_matching"},
                         "MMStar": {"status": "infer", "error_message": "boom"}}}  # fmt: skip
    return (
        dump(run / "status.json", body),
        quoted_csv(run / "MyVLM_BLINK_acc.csv", ["split", "Overall", "colour"], [["none", overall, 0.5]]),
        quoted_csv(
            run / "MyVLM_BLINK_exact_matching_result.tsv", ["index", "question", "prediction", "hit"],
            [[i, 'a, "b"?', "A", hit] for i, hit in enumerate(hits)], delimiter="\t",
        ),
    )  # fmt: skip


def test_the_kits_three_files_are_one_score(tmp_path, load):
    hits = (1, 0, 1, 1)
    frame, printed = load(*kit(tmp_path, hits), out="c.csv")
    assert len(frame) == 1 and "2 scores said what another row says" in printed
    row = frame.iloc[0]
    assert (row["model"], row["benchmark"], row["score"], row["n"]) == ("MyVLM", "BLINK/Overall", 0.75, 4)
    assert row["stderr"] == pytest.approx(stats.sem(hits))
    assert (row["version"], row["prompt"]) == ("commit e8e78f05", "judge exact_matching")
    assert "MMStar: no scores (boom)" in printed and "left out: score BLINK/colour" in printed


def test_sub_scores_are_taken_when_named(tmp_path, load):
    frame, _ = load(kit(tmp_path)[0], "--only", "BLINK/c*")
    assert frame["benchmark"].tolist() == ["BLINK/colour"]


def test_a_score_table_without_its_folders_needs_both_names(tmp_path, load, refused):
    path = quoted_csv(tmp_path / "acc.csv", ["split", "Overall"], [["dev", 0.5], ["test", 0.25]])
    assert "add --model NAME" in refused(path)
    assert "add --benchmark NAME" in refused(path, "--model", "m")
    frame, _ = load(path, "--model", "m", "--benchmark", "MMBench")
    assert dict(zip(frame["benchmark"], frame["score"], strict=True)) == {
        "MMBench/split=dev|Overall": 0.5, "MMBench/split=test|Overall": 0.25,
    }  # fmt: skip


def test_a_conflict_between_scores_names_both_records(tmp_path, refused):
    status, table, _ = kit(tmp_path)
    table.write_text(table.read_text().replace("0.75", "0.76"))
    line = refused(status, table)
    assert (
        "score of MyVLM on BLINK/Overall is 0.75 and 0.76" in line
        and "status.json, BLINK" in line
        and "_acc.csv" in line
    )


# --- tables -----------------------------------------------------------------------------------------------


def write(path, text):
    path.write_text(text)
    return path


def test_synonyms_fractions_and_counts_of_a_hand_made_table(tmp_path, load):
    text = "Model Name,Dataset,Success Rate,Trials,colour\nA,LIBERO-10,0.5,100,red\nB,LIBERO-10,0.25,100,blue\n"
    frame, printed = load(write(tmp_path / "t.csv", text), out="p.csv")
    assert frame["value"].tolist() == [50, 25] and frame["successes"].tolist() == [50, 25]
    assert set(frame["metric"]) == {"success_pct"} and "2 fractions written in per cent" in printed
    assert "left out: column colour" in printed and "2 counts of successes follow" in printed
    assert set(frame["source"]) == {"t.csv"} and set(frame["evaluator"]) == {"unknown"}


def test_fractions_and_per_cents_that_are_stated_are_brought_together(tmp_path, load):
    text = "model,benchmark,score,stderr,unit\nA,x,0.5,0.02,fraction\nB,x,40,1.5,%\nC,x,30%,,\n"
    frame, _ = load(write(tmp_path / "t.csv", text))
    assert frame["score"].tolist() == [50, 40, 30] and frame["stderr"].tolist()[:2] == [2, 1.5]
    assert set(frame["unit"]) == {"per cent"}


def test_our_own_rows_come_through_unchanged(tmp_path, load):
    first, _ = load(libero(tmp_path / "r.sqlite"), "--model", "vla")
    again, _ = load(tmp_path / "out.parquet", out="again.parquet")
    pd.testing.assert_frame_equal(first, again)
    load(tmp_path / "out.parquet", out="again.csv")
    pd.testing.assert_frame_equal(load(tmp_path / "again.csv", out="third.parquet")[0], first)


def test_a_table_is_appended_to_and_never_lost(tmp_path, load, capsys):
    one = write(tmp_path / "1.csv", "model,benchmark,score\nA,x,10\n")
    two = write(tmp_path / "2.csv", "model,benchmark,score\nB,x,20\n")
    out = tmp_path / "out.parquet"
    load(one)
    assert main(["import-results", str(two), "--out", str(out)]) == 2
    assert "holds something else" in capsys.readouterr().err and pd.read_parquet(out)["model"].tolist() == ["A"]
    before = out.stat().st_mtime_ns
    assert "unchanged" in load(one)[1] and out.stat().st_mtime_ns == before
    frame, _ = load(out, two)
    assert frame["model"].tolist() == ["A", "B"] and frame["source"].tolist() == ["1.csv", "2.csv"]
    assert not list(tmp_path.glob(".*.tmp"))


def test_what_is_stated_about_a_file_does_not_relabel_the_table_it_is_added_to(tmp_path, load):
    old = write(tmp_path / "old.csv", "model,benchmark,value,successes,episodes\nA,LIBERO-10,40,4,10\n")
    new = harness_json(tmp_path / "a.json", {"pick": [True, False]})
    words = [
        "--model",
        "B",
        "--lineage",
        "Qwen",
        "--benchmark",
        "LIBERO-10",
        "--as",
        "performance",
        "--kind",
        "vla-eval",
    ]
    frame, _ = load(old, new, *words, out="p.csv")
    assert dict(zip(frame["model"], frame["lineage"].fillna(""), strict=True)) == {"B": "Qwen", "A": ""}


def test_a_table_without_models_takes_the_stated_one(tmp_path, load, refused):
    path = write(tmp_path / "t.csv", "benchmark,score\nx,1\ny,2\n")
    assert load(path, "--model", "A")[0]["model"].tolist() == ["A", "A"]
    assert "add --model NAME" in refused(path)


def test_one_name_for_two_models_is_refused(tmp_path, refused):
    paths = [lmms_results(tmp_path / f"{m}.json", {"t": {"m": 0.5}}, model=m) for m in ("one", "two")]
    assert "would give one name to one and two" in refused(*paths, "--model", "X")


def test_a_value_without_a_metric_is_held_against_the_rates(tmp_path, refused, load):
    rates = write(tmp_path / "1.csv", "model,benchmark,success_pct\nA,x,48\nB,x,30\n")
    bare = write(tmp_path / "2.csv", "model,benchmark,value\nC,x,0.4\n")
    assert "C has 0.4 and A 48 on x" in refused(rates, bare)
    same = write(tmp_path / "3.csv", "model,benchmark,value\nA,x,48\nB,x,31\n")
    assert "value of B on x is 30 and 31" in refused(rates, same)
    lengths = write(tmp_path / "4.csv", "model,benchmark,avg_len\nA,x,0.4\nB,x,3.5\n")
    assert load(lengths)[0]["value"].tolist() == [0.4, 3.5]  # mean chain lengths are no fractions


def test_a_kit_table_with_an_overall_row_gives_its_accuracy(tmp_path, load):
    path = quoted_csv(tmp_path / "s.csv", ["Skill", "tot", "acc"], [["Overall", 100, 48.5], ["colour", 50, 40]])
    frame, printed = load(path, "--model", "m", "--benchmark", "MathVista")
    assert frame["benchmark"].tolist() == ["MathVista/Skill=Overall|acc"] and frame["score"].tolist() == [48.5]
    assert "MathVista/Skill=Overall|tot" in printed


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("model,benchmark,accuracy\nA,x,0.5\n", [], "could hold performance or capability"),
        ("model,benchmark,score,value\nA,x,1,2\n", [], "add --as performance or --as capability"),
        ("a,b\n1,2\n", [], "no result file of a known kind"),
        ("model,benchmark\nA,x\n", [], "no column holds a result"),
        ("model,benchmark,score\nA,x,NaN\n", [], 'score is "NaN", not a finite number'),
        ("model,benchmark,score\nA,x,\n", [], 'score is "", not a finite number'),
        ("model,benchmark,score\nA,x,inf\n", [], "not a finite number"),
        ("model,benchmark,score\nA,x,good\n", [], 'row 2, A on x]'),
        ("model,benchmark,value\nA,,1\n", [], "no benchmark [") ,
        ("model,policy,score\nA,B,1\n", [], "columns model and policy both mean model"),
        ("model,benchmark,score\nA,x,0.5\nB,x,50\n", [], "A has 0.5 and B 50 on x: one may be a fraction"),
        ("model,benchmark,success_rate\nA,x,0.5\nB,x,50\n", [], "one may be a fraction"),
        ("model,benchmark,score\nA,x,150%\n", [], "150 as a per cent"),
        ("model,benchmark,score\nA,x,1\nA,x,2\n", [], "score of A on x is 1 and 2"),
        ("model,benchmark,success_rate,successes,episodes\nA,x,0.5,10,96\n", [], "50 % is not 10 of 96 episodes"),
        ("model,benchmark,task,episode,success\nA,x,t,0,maybe\n", [], "neither true nor false"),
        ("model,Overall\nA,3\n", [], "could be a file of vlmevalkit or of csv"),
        ("model,benchmark,score\nA,x,1\n", ["--kind", "lerobot"], "no file of lerobot; it looks like csv"),
        ("model,benchmark,score\nA,x,1\n", ["--as", "episodes"], "holds capability, not episodes"),
        ("model,benchmark,score\nA,x,1\n", ["--only", "y"], "no benchmark matches"),
        ("model,benchmark,score\n", [], "no rows"),
        ("model,benchmark,score\nA,x,1,2,3\n", [], "row 2 has 5 cells, the header 3"),
        ("", [], "the file is empty"),
    ],
)  # fmt: skip
def test_a_table_that_says_too_little_is_refused(tmp_path, refused, text, words, said):
    assert said in refused(write(tmp_path / "t.csv", text), *words)


# --- files that are not what they seem --------------------------------------------------------------------


def test_the_content_decides_not_the_name(tmp_path, load):
    recorded = libero(tmp_path / "eval_info.json")
    assert "eval_info.json: vla-eval" in load(recorded, "--model", "v")[1]
    lerobot = lerobot_json(tmp_path / "x.csv", {"g": {0: [True]}})
    assert "x.csv: lerobot" in load(lerobot, "--model", "v", out="l.parquet")[1]
    scores = lmms_results(tmp_path / "recording.sqlite", {"t": {"m": 0.5}})
    assert "recording.sqlite: lmms-eval" in load(scores, out="s.parquet")[1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"results": {"t": {"a,none": 0.5', "cut short"),
        (b'{"doc_id": 0, "target": "A", "doc_hash": "h", "m": 1}\n{"doc_id": 1, "tar', "line 2 is not valid JSON"),
        (b"[]", "no result file of a known kind"),
        (b"{}", "no result file of a known kind"),
        (pickle.dumps({"model": "x"}), "never opened"),
        (b"\xff\xfe\x00\x01binary", "neither UTF-8 text nor"),
        (b"PAR1 but nothing else", "cannot be read as a table"),
        (b"SQLite format 3\0" + b"\0" * 200, "database"),
    ],
)
def test_damaged_and_foreign_files_are_refused(tmp_path, refused, content, said):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert said in refused(path, "--model", "m")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"benchmark": "b", "tasks": []}, "the file holds no results"),
        ({"benchmark": "b", "tasks": [{"task": "t"}]}, "without its list of episodes"),
        ({"benchmark": "b", "tasks": [{"task": "t", "episodes": [{"episode_id": 0, "metrics": {}}]}]},
         "neither true nor false"),
        ({"benchmark": "b", "tasks": [{"task": "t", "episodes": [{"episode_id": 0, "metrics": {"success": True}}]}],
          "mean_success": 0.5}, "states a mean success of 0.5, but its 1 episodes give 1.0000"),
        ({"per_task": [{"task_group": "g", "task_id": 0, "metrics": {"successes": [True]}}], "per_group": {},
          "overall": {"pc_success": 50.0}}, "states 50 % success, but its 1 episodes give 100 %"),
        ({"per_task": [], "per_group": {"g": {"pc_success": float("nan")}}, "overall": {}}, "pc_success is NaN"),
        ({"results": {}, "configs": {}}, "the file holds no results"),
        ({"results": {"t": {"m,none": float("nan")}}, "configs": {}}, "m is NaN, not a finite number"),
        ({"results": {"t": {"submission,none": None}}, "configs": {}}, "the file holds no results (t/submission)"),
        ({"schema_version": "1.0", "model_name": "m", "datasets": {"d": {"status": "infer"}}},
         "no dataset of this run has scores"),
        ({"benchmark": "b", "tasks": [], "results": {}, "configs": {}}, "could be a file of vla-eval or of lmms-eval"),
    ],
)  # fmt: skip
def test_results_that_say_nothing_or_contradict_themselves(tmp_path, refused, body, said):
    assert said in refused(dump(tmp_path / "x.json", body), "--model", "m")


@pytest.mark.parametrize("make", ["recording", "lerobot", "lmms"])
def test_a_file_that_names_no_model_needs_one(tmp_path, refused, make):
    path = {
        "recording": lambda: libero(tmp_path / "x"),
        "lerobot": lambda: lerobot_json(tmp_path / "x", {"g": {0: [True]}}),
        "lmms": lambda: lmms_results(tmp_path / "x", {"t": {"m": 0.5}}, config={"model": "adapter"}),
    }[make]()
    assert "add --model NAME" in refused(path)


def test_a_database_in_use_or_damaged_is_refused(tmp_path, refused):
    path = libero(tmp_path / "r.sqlite")
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        assert "the database is locked" in refused(path, "--model", "m")
    journal = tmp_path / "r.sqlite-wal"
    journal.write_bytes(b"pages")
    assert "r.sqlite-wal lies beside it" in refused(path, "--model", "m")
    journal.unlink()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "the database is damaged" in refused(path, "--model", "m")
    foreign = tmp_path / "f.sqlite"
    with closing(sqlite3.connect(foreign)) as database:
        database.execute("CREATE TABLE songs (name TEXT)")
        database.commit()
    assert "no result file of a known kind" in refused(foreign, "--model", "m")


@pytest.mark.slow
def test_damaged_files_end_in_rows_or_in_one_line(tmp_path, capsys):
    """Cut short, flipped bytes, JSON values replaced: 600 files, never a traceback."""
    rng = np.random.default_rng(0)
    status, table, answers = kit(tmp_path)
    scores = lmms_results(tmp_path / "l.json", {"t": {"m": 0.5, "m_stderr": 0.1}})
    made = [libero(tmp_path / "r.sqlite"), harness_json(tmp_path / "h.json", {"pick": [True, False]}), scores, status,
            table, answers, lerobot_json(tmp_path / "e.json", {"g": {0: [True, False]}})]  # fmt: skip
    for _ in range(600):
        path = made[rng.integers(len(made))]
        data = bytearray(path.read_bytes())
        if rng.random() < 0.3:
            del data[rng.integers(len(data)) :]
        else:
            for place in rng.integers(len(data), size=rng.integers(1, 20)):
                data[place] = rng.integers(256)
        (tmp_path / "damaged").write_bytes(bytes(data))
        out = tmp_path / "out.csv"
        out.unlink(missing_ok=True)
        words = ["--model", "m", "--benchmark", "b"][: rng.choice([2, 4])]
        code = main(["import-results", str(tmp_path / "damaged"), *words, "--out", str(out)])
        assert code == 0 or (code == 2 and capsys.readouterr().err.count("\n") == 1)
        assert out.exists() == (code == 0)
        capsys.readouterr()


def test_reading_a_recording_leaves_it_and_its_folder_as_they_were(tmp_path, load):
    folder = tmp_path / "run"
    folder.mkdir()
    path = libero(folder / "r.sqlite")
    before = path.read_bytes()
    load(path, "--model", "m")
    assert path.read_bytes() == before and [one.name for one in folder.iterdir()] == ["r.sqlite"]


def test_files_of_different_kinds_do_not_share_a_table(tmp_path, refused):
    line = refused(libero(tmp_path / "r.sqlite"), lmms_results(tmp_path / "x.json", {"t": {"m": 0.5}}), "--model", "m")
    assert "different kinds of rows" in line and "r.sqlite" in line and "x.json" in line


# --- end to end -------------------------------------------------------------------------------------------


def test_imported_tables_feed_correlate(tmp_path, load, capsys):
    rng = np.random.default_rng(0)
    capability = []
    for i, rate in enumerate([0.2, 0.4, 0.5, 0.7]):
        name = f"model-{i}"
        capability.append(lmms_results(tmp_path / f"c{i}.json", {"mmmu_val": {"acc": 0.3 + 0.1 * i}}, model=name))
        outcomes = {task: [bool(one) for one in rng.random(20) < rate] for task in ("pick", "put")}
        path = harness_json(tmp_path / f"p{i}.json", outcomes, eval_id=f"e{i}")
        table = [tmp_path / "perf.parquet"] if i else []
        words = ["--model", name, "--as", "performance", "--benchmark", "LIBERO-10"]
        load(path, *table, *words, out="perf.parquet")  # every policy by itself, appended to those before
    load(*capability, out="cap.csv")
    result = tmp_path / "r.json"
    tables = ["--capability", str(tmp_path / "cap.csv"), "--performance", str(tmp_path / "perf.parquet")]
    assert main(["correlate", *tables, "--json", str(result)]) == 0
    out = capsys.readouterr().out
    assert "4 models" in out and "how many episodes succeeded" not in out  # the counts came through
    pair = json.loads(result.read_text())["pairs"][0]
    totals = pd.read_parquet(tmp_path / "perf.parquet").query("task == ''").sort_values("model")
    values = totals["value"].astype(float)
    assert pair["pearson"]["r"] == pytest.approx(stats.pearsonr([0.3, 0.4, 0.5, 0.6], values)[0])
    assert pair["homogeneity"]["per_task"].keys() == {"pick", "put"}


def test_imported_episodes_feed_compare(tmp_path, load, capsys):
    for name, outcomes in (("a", [True] * 9 + [False]), ("b", [False] * 8 + [True] * 2)):
        load(
            harness_json(tmp_path / f"{name}.json", {"pick": outcomes}, eval_id=name),
            "--model",
            name,
            out=f"{name}.parquet",
        )
    rows = [str(tmp_path / f"{name}.parquet") for name in "ab"]
    assert main(["compare", "a", "b", "--episodes", *rows, "--json", str(tmp_path / "c.json")]) == 0, (
        capsys.readouterr().err
    )
    # 8 pairs won by a, 1 by b: McNemar's exact p is the binomial test's.
    assert f"{stats.binomtest(8, 9).pvalue:.4f}" in capsys.readouterr().out


def test_the_json_says_what_was_read_and_left_open(tmp_path, load):
    load(*kit(tmp_path), "--json", tmp_path / "i.json")
    report = json.loads((tmp_path / "i.json").read_text())
    assert report["format"] == "vlm4vla-import" and report["written"] == 1 and report["duplicates"] == 2
    assert report["unknown"] == {"unit": 1, "lineage": 1}
    assert report["files"][0]["left_out"] == ["score BLINK/colour"] and len(report["inputs"]) == 3
