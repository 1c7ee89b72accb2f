"""The paper's numbers: what is loaded, what is flagged, and that the tables agree with themselves."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from probes import paper
from vlm4vla_core.errors import InputError
from vlm4vla_core.folders import shipped
from vlm4vla_core.results import CAPABILITY_COLUMNS, PERFORMANCE_COLUMNS

MEASURED = [name for name in paper._TABLES if name not in ("training_configs", "protocol")]


def test_nine_vlms_of_three_lineages_on_three_benchmarks():
    rows, scores = paper.performance(tasks=False), paper.capability()
    assert list(scores["model"]) == list(dict.fromkeys(rows["model"])) and len(scores) == 9
    assert rows.groupby("benchmark").size().to_dict() == {"CALVIN ABC-D": 9, "LIBERO-10": 9, "SimplerEnv-Bridge": 9}
    assert scores["lineage"].value_counts().to_dict() == {"Qwen": 6, "PaliGemma": 2, "Kosmos": 1}
    assert "InternVL3.5-4B" not in set(rows["model"])
    assert tuple(rows.columns[: len(PERFORMANCE_COLUMNS)]) == PERFORMANCE_COLUMNS
    assert tuple(scores.columns[: len(CAPABILITY_COLUMNS)]) == CAPABILITY_COLUMNS
    assert set(rows["quality"]) == {"exact"} and (rows["flag"] == "").all()


def test_openreview_version_has_its_own_seven_and_flags_what_is_odd():
    rows = paper.performance("openreview", tasks=False)
    assert len(set(rows["model"])) == 7
    flags = rows[rows["flag"] != ""].groupby("model")["flag"].first().to_dict()
    assert flags == {
        "InternVL3.5-4B": "OpenReview version only",
        "Qwen3-VL-4B": "drawn at 54.2 in this version's figure",
    }


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        (False, {"CALVIN ABC-D": 0.919, "SimplerEnv-Bridge": -0.316, "LIBERO-10": 0.139}),
        (True, {"CALVIN ABC-D": 0.919, "SimplerEnv-Bridge": -0.316, "LIBERO-10": 0.379}),
    ],
)
def test_both_versions_give_the_correlations_recorded_with_the_tables(drawn, expected):
    rows = paper.performance("openreview", tasks=False).set_index(["benchmark", "model"])["value"]
    x = paper.capability("openreview").set_index("model")["score"]
    for benchmark, r in expected.items():
        y = rows[benchmark].copy()
        if drawn and benchmark == "LIBERO-10":
            y["Qwen3-VL-4B"] = 54.2
        assert np.corrcoef(x, y[x.index])[0, 1] == pytest.approx(r, abs=6e-4)


def test_scenes_add_up_to_the_counts_and_chains_to_the_length():
    rows = paper.performance()
    for model, group in rows.groupby("model"):
        bridge = group[group["benchmark"] == "SimplerEnv-Bridge"].set_index("task")
        scenes = bridge.drop("")
        assert scenes["successes"].sum() == bridge.at["", "successes"], model
        assert scenes["episodes"].sum() == bridge.at["", "episodes"] == 96
        assert np.allclose(scenes["value"], 100 * scenes["successes"] / 24, atol=0.05)
        assert paper.fits_count(str(bridge.at["", "value"]), 4, 24)
        calvin = group[group["benchmark"] == "CALVIN ABC-D"].set_index("task")
        steps = calvin.drop("").sort_index()["value"].to_numpy()
        assert len(steps) == 5 and (np.diff(steps) < 0).all()
        assert steps.sum() == pytest.approx(calvin.at["", "value"], abs=0.0016), model
        libero = group[group["benchmark"] == "LIBERO-10"].iloc[0]
        assert 100 * libero["successes"] / libero["episodes"] == pytest.approx(libero["value"], abs=1e-9)


def test_exactly_the_values_that_fit_no_count_are_flagged_and_none_is_repaired():
    flagged = {
        (name, row.model, row.printed)
        for name in MEASURED
        for row in paper.table(name, "all").itertuples()
        if row.flag.startswith("fits no count") and row.benchmark == "SimplerEnv-Bridge"
    }
    assert flagged == {
        ("freeze_ablation", "Qwen2.5-VL-7B", "25.50"),
        ("vision_injection", "Qwen3-VL-4B", "27.6"),
        ("from_scratch", "Qwen2.5-VL-7B", "18.20"),
        ("from_scratch", "Qwen2.5-VL-7B", "6.10"),  # quality: rejected
    }
    assert paper.performance(experts=True).query("flag != ''")["value"].tolist() == [53.7]  # OpenVLA: 268.5 of 500


def test_fits_count_by_listing_every_outcome_of_a_small_benchmark():
    """2 tasks of 3 episodes: k/6, or the mean of two of {0, 33, 67, 100}; rounded or cut to one decimal."""
    values = {Fraction(100 * k, 6) for k in range(7)}
    values |= {Fraction(a + b, 2) for a in (0, 33, 67, 100) for b in (0, 33, 67, 100)}
    fitting = set()
    for value in values:
        tenths = value * 10
        fitting |= {int(tenths), round(tenths), int(tenths + Fraction(1, 2))}
    for tenths in range(1001):
        assert paper.fits_count(f"{tenths / 10:.1f}", 2, 3) == (tenths in fitting), tenths


def test_counts_in_the_tables_print_the_values_beside_them():
    checked = 0
    for name in MEASURED:
        rows = paper.table(name)
        for row in rows[rows["successes"].notna() & ~rows["metric"].str.startswith("delta")].itertuples():
            rate = 100 * row.successes / row.episodes
            assert abs(row.value - rate) < 0.35, (name, row)  # whole-number scenes move a mean by up to 0.35 here
            checked += 1
    assert checked > 60


def test_printed_differences_are_differences_of_printed_values():
    rows = paper.table("freeze_ablation", "printed").query("benchmark != ''")
    values = rows.set_index(["model", "benchmark", "setting", "metric"])["value"]
    for (model, benchmark, setting, metric), delta in values.items():
        if metric.startswith("delta_"):
            plain = metric.removeprefix("delta_")
            full = values[model, benchmark, "full fine-tuning", plain]
            assert delta == pytest.approx(values[model, benchmark, setting, plain] - full, abs=1e-9)


def test_quality_filters_nest_and_keep_out_what_must_not_be_used():
    for name in MEASURED:
        sizes = [len(paper.table(name, quality)) for quality in ("printed", "usable", "all")]
        assert sizes == sorted(sizes)
        assert not set(paper.table(name)["quality"]) & {"rejected", "secondary-low", "secondary-conflict"}
    assert set(paper.table("from_scratch", "all")["quality"]) == {"secondary", "secondary-low", "rejected"}
    assert paper.table("from_scratch", "printed").empty


def test_readme_explains_every_quality_that_occurs():
    readme = (shipped("data/paper") / "README.md").read_text()
    for name in MEASURED:
        for quality in set(paper.table(name, "all")["quality"]):
            base = "figure-approx-E" if quality.startswith("figure-approx-") else quality
            assert f"`{base}`" in readme, quality


def test_no_machine_path_in_the_tables():
    for path in shipped("data/paper").iterdir():
        text = path.read_text()
        assert not any(word in text for word in ("/work", "/root", "/tmp", "/home")), path.name


def test_a_copy_is_returned_not_the_cache():
    frame = paper.table("main_results")
    frame["value"] = 0.0
    assert paper.table("main_results")["value"].max() > 1


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: paper.table("main_result"), "did you mean 'main_results'"),
        (lambda: paper.table("main_results", "exactly"), "no quality filter"),
        (lambda: paper.performance("neurips"), "no version 'neurips'"),
        (lambda: paper.capability("neurips"), "no version 'neurips'"),
    ],
)
def test_unknown_names_are_one_clear_line(call, word):
    with pytest.raises(InputError, match=word):
        call()
