"""`vlm4vla correlate`: what it prints, writes and refuses, and that its figure shows what was computed."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from scipy import stats

from probes import figures, paper, style
from probes.correlation import correlate
from probes.labels import _crossings, _distance, _overlap
from vlm4vla_core.cli import main

SMALL_CAPABILITY = "model,score\nA,1\nB,2\nC,3.5\nD,2.2\nE,9\n"
SMALL_PERFORMANCE = "model,benchmark,value\nA,pick,10\nB,pick,20\nC,pick,25\nD,pick,40\nF,pick,3\n"


@pytest.fixture
def small(tmp_path):
    (tmp_path / "cap.csv").write_text(SMALL_CAPABILITY)
    (tmp_path / "perf.csv").write_text(SMALL_PERFORMANCE)
    return ["--capability", str(tmp_path / "cap.csv"), "--performance", str(tmp_path / "perf.csv")]


def test_without_tables_it_reads_the_paper_and_says_so(capsys, tmp_path):
    assert main(["correlate", "--json", str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("9 models of 3 lineages") and "the paper's published numbers" in out.replace("\n ", "")
    plain = " ".join(out.split())
    told = (
        "(by task: carrot_on_plate 24,",
        "not stated: the capability score's own error (stderr)",
        "Can the benchmark tell these models apart?",
        "SimplerEnv-Bridge chi2 10.18 on 8 df 0.2525 0.0145",
        "0.22 (0.61 by task)",
        "yet carrot_on_plate, eggplant_in_basket and stack_cubes tell them apart (Holm)",
        "differences in opposite directions cancel in the average",
        "outcomes change hands between models within task",
        "It is an upper bound",
        "CALVIN ABC-D 9 +0.839 +0.39 to +0.97 0.0045",
        "SimplerEnv-Bridge 9 -0.357",
        "LIBERO-10 9 -0.194",
        "Who decides it?",
        "+0.771 Kosmos-2",
        "+0.197 Kosmos-2",
        "CALVIN ABC-D 0.2583 +0.29 (p 0.5201) 1440 Qwen +0.35 (n 6)",
        "p over all models falls below 0.05 in 8%, 14% and 32% of such studies",
        "Noise carried through",
        "Only the performance's noise is corrected for",
        "stack_cubes -6.68",
        "3 pairs looked at",
        "CALVIN ABC-D 0.0045 0.0135 0.0142",
        "What these models could have shown",
        "takes about 93 models for 80 % power and cannot succeed below 32",
        "CALVIN ABC-D: POSITIVE BETWEEN LINEAGES, UNDETERMINED WITHIN",
        "this is a contrast of 3 lineages",
        "SimplerEnv-Bridge: UNDETERMINED",
        "LIBERO-10: UNDETERMINED",
        "2 of 3 verdicts are undetermined",
    )
    places = [plain.find(line) for line in told]
    assert -1 not in places, told[places.index(-1)]
    assert places == sorted(places)  # in the order in which the numbers should be read
    values = json.loads((tmp_path / "r.json").read_text())
    assert values["inputs"] == {"capability": "published (data/paper)", "performance": "published (data/paper)"}
    assert {pair["benchmark"]: round(pair["pearson"]["r"], 3) for pair in values["pairs"]} == {
        "CALVIN ABC-D": 0.839,
        "SimplerEnv-Bridge": -0.357,
        "LIBERO-10": -0.194,
    }


def test_own_tables_with_the_least_columns(capsys, small, tmp_path):
    assert main(["correlate", *small, "--primary", "capability:pick", "--json", str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr().out
    assert "4 models" in out and "pick (primary): UNDETERMINED" in out and "not stated" in out
    assert "left out: E (no performance); F (no capability score)" in out
    (pair,) = json.loads((tmp_path / "r.json").read_text())["pairs"]
    reference = stats.pearsonr([1, 2, 3.5, 2.2], [10, 20, 25, 40])
    assert pair["pearson"]["r"] == pytest.approx(reference[0]) and pair["role"] == "primary"
    assert pair["reliability"] is None and pair["p_within_lineage"] is None


def test_parquet_and_episode_rows(capsys, small, tmp_path):
    pd.read_csv(tmp_path / "cap.csv").to_parquet(tmp_path / "cap.parquet")
    outcomes = {"A": (1, 4), "B": (4, 4), "C": (5, 5), "D": (8, 8)}
    rows = [
        (model, "pick", task, i < k)
        for model, wins in outcomes.items()
        for task, k in zip(("near", "far"), wins, strict=True)
        for i in range(20)
    ]
    pd.DataFrame(rows, columns=["model", "benchmark", "task", "success"]).to_csv(tmp_path / "rows.csv", index=False)
    words = ["correlate", "--capability", str(tmp_path / "cap.parquet"), *small[2:]]
    assert main([*words, "--episodes", str(tmp_path / "rows.csv")]) == 0
    out = capsys.readouterr().out
    assert "pick by task" in out and "chi2" in out and "shuffled p" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--capability", "absent.csv"], "no such table [absent.csv]"),
        (["--primary", "VLM capability:CALVIN"], "did you mean 'VLM capability:CALVIN ABC-D'?"),
        (["--plot", "figure.jpg"], "a plot is .png, .svg or .pdf, not '.jpg'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, words, message):
    assert main(["correlate", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and err.startswith("vlm4vla correlate: ")


@pytest.mark.parametrize(
    ("table", "text", "message"),
    [
        ("cap", "", "cannot be read"),
        ("cap", "model,score\n", "no rows"),
        ("cap", "model,points\nA,1\n", "missing column score"),
        ("cap", "model,score\nA,1\nB,\nC,3\n", "score of B is 'nan'"),
        ("cap", "model,score\nA,1\nB,1\nC,1\n", "all 3 models have the same value"),
        ("cap", "model,score\nA,1\nA,2\nB,1\n", "A stands 2 times"),
        ("cap", "model,score\nA,1\nB,2\n", "2 models in both tables"),
        ("perf", "model,value\nA,1\n", "missing column benchmark"),
        (
            "perf",
            "model,benchmark,value,successes,episodes\nA,b,1,30,20\nB,b,2,1,20\nC,b,3,1,20\n",
            "30 successes of 20",
        ),
    ],
)
def test_bad_tables_name_the_file_and_write_nothing(capsys, small, tmp_path, table, text, message):
    (tmp_path / f"{table}.csv").write_text(text)
    outputs = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "f.png")]
    assert main(["correlate", *small, *outputs]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cap.csv", "perf.csv"]


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = (
        "import sys; from vlm4vla_core.cli import main; code = main(['correlate', '--help']);"
        "assert code == 0; heavy = {'pandas', 'scipy', 'matplotlib', 'torch'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Example: vlm4vla correlate" in done.stdout


# --- the figure -------------------------------------------------------------------------------------------


def test_plot_writes_both_formats(capsys, small, tmp_path):
    assert main(["correlate", *small, "--plot", str(tmp_path / "out" / "f.svg")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"f.svg", "f.png"}
    assert "f.png" in capsys.readouterr().out


@pytest.fixture(scope="module")
def drawn():
    return figures.capability_scatter(correlate(paper.capability(), paper.performance()))


def test_figure_shows_every_model_once_with_its_interval_and_the_verdict(drawn):
    rows = paper.performance(tasks=False)
    for ax in drawn.axes:
        benchmark = ax.get_title(loc="left")
        texts = [text.get_text() for text in ax.texts]
        values = rows[rows["benchmark"] == benchmark]
        for model in values["model"]:
            assert texts.count(model.replace("-VL-", " ")) == 1
        points = {tuple(line.get_xydata()[0]) for line in ax.lines if len(line.get_xydata()) == 1}
        assert sorted(y for _, y in points) == sorted(values["value"])
        assert len(ax.collections) == 1 + 9  # the band and an interval per model
        assert any("determined" in text for text in texts) and any(text.startswith("r ") for text in texts)
    assert "absolute scale unknown" in drawn.get_supxlabel()


def test_no_two_names_of_the_figure_overlap(drawn):
    drawn.draw_without_rendering()
    for ax in drawn.axes:
        names = {model.replace("-VL-", " ") for model in paper.VLMS}
        boxes = [Text.get_window_extent(text) for text in ax.texts if text.get_text() in names]  # without leaders
        frame = ax.get_window_extent()
        assert len(boxes) == 9
        for i, box in enumerate(boxes):
            assert frame.x0 - 2 < box.x0 and box.x1 < frame.x1 + 2
            assert not any(box.overlaps(other) for other in boxes[:i])


def test_figure_is_the_same_twice(small, tmp_path):
    result = correlate(pd.read_csv(tmp_path / "cap.csv"), pd.read_csv(tmp_path / "perf.csv"))
    one, two = (
        style.save_figure(figures.capability_scatter(result, width=style.ONE_COLUMN), tmp_path / n) for n in "ab"
    )
    assert one[0].read_bytes() == two[0].read_bytes()


def test_fit_and_band_equal_statsmodels():
    import statsmodels.api as sm

    rng = np.random.default_rng(0)
    x, at = rng.normal(size=9), np.linspace(-1, 1, 5)
    y = 0.5 * x + rng.normal(size=9)
    line, half = figures.least_squares(x, y, at)
    frame = sm.OLS(y, sm.add_constant(x)).fit().get_prediction(sm.add_constant(at)).summary_frame()
    assert np.allclose(line, frame["mean"]) and np.allclose(line + half, frame["mean_ci_upper"])


def test_geometry_of_labels():
    box = np.array([[0.0, 0, 2, 2]])
    assert _overlap(box, np.array([[1.0, 1, 3, 3], [2, 2, 3, 3]])).tolist() == [[1.0, 0.0]]
    a, b = np.array([[0.0, 0]]), np.array([[2.0, 2]])
    assert _crossings(a, b, np.array([[0.0, 2], [3, 0]]), np.array([[2.0, 0], [3, 5]])).tolist() == [[True, False]]
    assert _distance(np.zeros(2), b, np.array([[2.0, 0], [4, 2]]))[0] == pytest.approx([2**0.5, 2.0])
