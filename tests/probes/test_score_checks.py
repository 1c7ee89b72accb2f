"""Tables as people make them: what would silently shift, stretch or double a score is refused in words that mend it."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest

from probes import paper
from probes.correlation import correlate
from probes.scores import gather
from vlm4vla_core.cli import main
from vlm4vla_core.errors import InputError
from vlm4vla_core.results import read_table

SCORES = "model,score\na,10\nb,20\nc,35\nd,50\n"
VALUES = "model,benchmark,value\na,B,20\nb,B,25\nc,B,40\nd,B,33\n"
MODELS = ["a", "b", "c", "d"]


def performance(values, **columns) -> pd.DataFrame:
    return pd.DataFrame({"model": MODELS, "benchmark": "B", "value": values, **columns})


def capability(score=(1, 2, 3, 5), **columns) -> pd.DataFrame:
    return pd.DataFrame({"model": MODELS, "score": list(score), **columns})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model,score\na,1,7\nb,2,20\nc,3,35\nd,5,50\n", "line 2 has 3 cells, the header 2"),
        ('model,score\na,"1"\n\n"b\nb",2,20\n', "line 5 has 3 cells"),
        ("model,score,lineage\na,1\n", "line 2 has 2 cells, the header 3"),
        ("model,score,score\na,1,2\n", "two columns are called score"),
        ("model;score\na;1\n", "separated by ';'.*import-results"),
        ("model\tscore\na\t1\n", "separated by tabs"),
        ("mod\u00e8le,score\na,1\n".encode("latin-1"), "CSV in UTF-8"),
        ("Model, Score\na,1\n", "columns 'Model', ' Score' would not be read.*name them model, score"),
        ("model,score,Lineage\na,1,Q\n", "column 'Lineage' would not be read"),
        ("checkpoint,accuracy\na,1\n", "missing columns model, score.*import-results"),
    ],
)
def test_a_csv_that_would_be_misread_is_refused(tmp_path, capsys, text, words) -> None:
    import re

    path, other = tmp_path / "c.csv", tmp_path / "p.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    other.write_text(VALUES)
    assert main(["correlate", "--capability", str(path), "--performance", str(other)]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_csv_as_programs_write_it_is_read(tmp_path) -> None:
    path = tmp_path / "c.csv"
    path.write_bytes(("\ufeffmodel,score,note\r\na,1,\r\n\r\n" + 'b,2,"x, y"\r\n').encode())
    frame = read_table(path)
    assert frame["score"].tolist() == [1, 2] and frame["note"].tolist()[1] == "x, y" and "model" in frame


@pytest.mark.parametrize(
    ("values", "columns", "words"),
    [
        ([0.10, 20, 25, 40], {}, r"a has 0.1 on B, a fraction among percentages \(b has 20\).*successes and episodes"),
        ([0.2, 0.3, 0.25, 48], {}, "a has 0.2 on B, a fraction among percentages"),
        ([0.2, 30, 25, 48], {"metric": ["success_rate", *["success_pct"] * 3]}, "success_rate .a. and success_pct .b."),
        ([20, 30, 25, 48], {"metric": "success_rate"}, "success_rate lies between 0 and 1"),
        ([20, 30, 25, 148], {"metric": "success_pct"}, "d has 148 on B, but success_pct lies between 0 and 100"),
        ([80, 25, 50, 75], {"successes": [10, 24, 48, 72], "episodes": 96}, "a on B: value 80 .* but 10 of 96"),
        ([10, 25, 50, 75], {"episodes": [-5, 96, 96, 96]}, "episodes of a on B is '-5', not a whole number of 1"),
        ([10, 25, 50, 75], {"episodes": ["many", "96", "96", "96"]}, "'many', not a whole number"),
        ([10, 25, 50, 75], {"episodes": [24.5, 96, 96, 96]}, "'24.5', not a whole number"),
        ([10, 25, 50, 75], {"successes": [-1, None, None, None]}, "successes of a on B is '-1.0'"),
        ([True, False, True, False], {}, "value of a on B is 'True', not a finite number"),
        ([1e308, -1e308, 1, 2], {}, "of reasonable size"),
        ([10, 25, 50, 75], {"lineage": ["Qwen", "qwen", "L", "L"]}, r"lineage 'Qwen' \(a\) and 'qwen' \(b\)"),
    ],
)  # fmt: skip
def test_a_performance_that_contradicts_itself_is_refused(values, columns, words) -> None:
    with pytest.raises(InputError, match=words):
        gather(capability(), performance(values, **columns))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (capability([0.48, 52, 33, 50]), "a has 0.48 on capability, a fraction among percentages"),
        (capability(stderr=[-1, 1, 1, 1]), "stderr of a is '-1', not a finite number of 0 or more"),
        (capability([True, False, True, True]), "'True', not a finite number"),
        (capability(unit=["percent", "fraction", "percent", "percent"]), r"unit percent \(a\) and fraction \(b\)"),
        (capability().rename(columns={"model": "Model"}), "column 'Model' would not be read"),
        (pd.DataFrame([["a", 1, 2]], columns=["model", "score", "score"]), "two columns are called score"),
    ],
)
def test_a_capability_that_contradicts_itself_is_refused(table, words) -> None:
    with pytest.raises(InputError, match=words):
        gather(table, performance([10, 25, 50, 75]))


@pytest.mark.parametrize(
    ("values", "columns"),
    [
        ([0.5, 25, 50, 75], {"successes": [1, 50, 100, 150], "episodes": 200}),  # half a per cent, say its counts
        ([0.5, 0.25, 0.1, 0.2], {"metric": "success_pct", "successes": [5, 2, 1, 2], "episodes": [999, 800, 999, 999]}),
        ([0.4, 2.5, 3.1, 4.4], {"metric": "avg_len"}),
        ([0.3, 3.3, 6.3, 12.3], {}),
        ([-0.5, 20, 30, 40], {}),
        ([0, 20, 30, 40], {}),
        ([10, 25, 50, 75], {"episodes": [None, "unknown", "", 96]}),
        ([410, 325, 250, 175], {"metric": "return", "successes": [24, 24, 48, 72], "episodes": 96}),
        ([41, 32, 25, 17], {"successes": [2, 24, 80, 72], "episodes": 96}),  # another measure: nothing fits
    ],
)  # fmt: skip
def test_what_may_be_meant_is_accepted(values, columns) -> None:
    assert gather(capability(), performance(values, **columns)).y[:, 0].tolist() == values


def test_a_mean_over_tasks_of_unequal_size_contradicts_nothing() -> None:
    k = np.array([[9, 5], [2, 20], [5, 30], [1, 45]])
    n = np.array([10, 50])
    total = performance(100 * (k / n).mean(axis=1), task="", successes=k.sum(axis=1), episodes=60)
    tasks = [performance(100 * k[:, i] / n[i], task=f"t{i}", successes=k[:, i], episodes=n[i]) for i in (0, 1)]
    assert gather(capability(), pd.concat([total, *tasks])).task_counts["B"].successes.tolist() == k.tolist()


def test_the_papers_own_tables_pass_with_every_version() -> None:
    for version in ("arxiv", "openreview"):
        gather(paper.capability(version), paper.performance(version))


def test_very_large_and_very_small_scores_change_nothing_and_warn_of_nothing() -> None:
    plain = correlate(capability(), performance([20, 25, 40, 33])).pairs[0].pearson
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scale in (1e90, 1e-90):
            scores = capability(np.array([1.0, 2, 3, 5]) * scale)
            found = correlate(scores, performance([20, 25, 40, 33])).pairs[0].pearson
            assert found.r == pytest.approx(plain.r) and found.p_exact == plain.p_exact


def test_the_report_says_what_an_average_hides() -> None:
    from probes.report.views.capability_vs_performance import verdicts

    told = dict(verdicts(correlate(paper.capability(), paper.performance())))
    assert "carrot_on_plate, eggplant_in_basket and stack_cubes tell them" in told["SimplerEnv-Bridge: undetermined"]
    assert sum("The average hides" in text for text in told.values()) == 1
