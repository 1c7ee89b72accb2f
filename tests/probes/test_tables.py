"""The paper's interventions: differences, intervals from the counts, and what is flagged and bounded, not repaired."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import fisher_exact
from statsmodels.stats.proportion import confint_proportions_2indep

from probes import paper, tables
from probes.reliability import chain_variance
from vlm4vla_core.errors import InputError


def by_label(table: str) -> dict[tuple[str, str], tables.Contrast]:
    return {(row.label, row.benchmark): row for row in tables.contrasts(table).rows}  # type: ignore[arg-type]


def newcombe(k: int, base: int) -> tuple[float, float]:
    low, high = confint_proportions_2indep(k, 96, base, 96, method="newcomb", compare="diff")
    return 100 * low, 100 * high


@pytest.mark.parametrize(
    ("model", "setting", "difference", "k", "base"),
    [
        ("Qwen2.5-VL-3B", "vision encoder frozen", -24.05, 23, 46),
        ("Qwen2.5-VL-3B", "word embeddings frozen", -1.12, 45, 46),
        ("Qwen2.5-VL-7B", "word embeddings frozen", 2.21, 47, 45),
        ("PaliGemma-1", "vision encoder frozen", -42.00, 13, 53),
        ("PaliGemma-1", "word embeddings frozen", -3.00, 50, 53),
    ],
)
def test_freezing_on_bridge(model, setting, difference, k, base):
    row = by_label("freezing")[f"{model}, {setting}", tables.BRIDGE]
    assert row.difference == pytest.approx(difference) and (row.counts, row.baseline_counts) == ((k,), (base,))
    assert row.interval == pytest.approx(newcombe(k, base)) and not row.flag
    assert row.p == pytest.approx(fisher_exact([[k, 96 - k], [base, 96 - base]]).pvalue)


def test_a_value_that_fits_no_count_is_flagged_and_bounded_by_both_neighbours():
    row = by_label("freezing")["Qwen2.5-VL-7B, vision encoder frozen", tables.BRIDGE]
    assert row.value == 25.50 and row.counts == (24, 25) and row.flag == "25.50 fits no count of 96"
    ends = [newcombe(24, 45), newcombe(25, 45)]
    assert row.interval == pytest.approx((min(e[0] for e in ends), max(e[1] for e in ends)))
    assert row.p == pytest.approx(fisher_exact([[25, 71], [45, 51]]).pvalue)
    injected = by_label("injection")[
        "Qwen3-VL-4B, first stage: FAST tokens, vision trained; policy: vision frozen", tables.BRIDGE
    ]
    assert (
        injected.baseline == 27.6
        and injected.baseline_counts == (26, 27)
        and injected.difference == pytest.approx(18.1)
    )
    assert injected.flag == "baseline 27.6 fits no count of 96"
    assert injected.interval == pytest.approx((newcombe(44, 27)[0], newcombe(44, 26)[1]))
    scratch = by_label("scratch")["Qwen2.5-VL-7B, random initialisation", tables.BRIDGE]
    assert scratch.counts == (17, 18) and scratch.flag == "18.20 fits no count of 96"
    flagged = [row.flag for name in ("freezing", "injection", "scratch") for row in by_label(name).values() if row.flag]
    assert len(flagged) == 4  # 27.6 is the baseline of two rows


def test_differences_are_the_printed_ones():
    printed = paper.table("freeze_ablation", "printed")
    deltas = printed[printed["metric"].str.startswith("delta_")]
    ours = by_label("freezing")
    assert len(deltas) == len(ours) == 12
    for row in deltas.itertuples():
        assert ours[f"{row.model}, {row.setting}", row.benchmark].difference == pytest.approx(row.value, abs=1e-9)
    injected = paper.table("vision_injection").query("metric == 'delta_success_pct'")
    for row in injected.itertuples():
        assert by_label("injection")[f"{row.model}, {row.setting}", tables.BRIDGE].difference == pytest.approx(
            row.value
        )


def test_chain_noise():
    """The modelled spread against the true one, from step rates: never too small, at most 15 % too large."""
    rows = paper.performance("openreview")
    both = {
        (model, benchmark): part
        for frame in (rows, paper.performance())
        for (model, benchmark), part in frame.groupby(["model", "benchmark"])
    }
    ratios = []
    for (_, benchmark), part in both.items():
        if benchmark == tables.CALVIN:
            steps = part[part["task"] != ""].sort_values("task")["value"].to_numpy(dtype=float)
            true = chain_variance(steps[None], np.ones(1))[0]
            ratios.append(tables.modelled_chain_variance(float(part[part["task"] == ""]["value"].iloc[0])) / true)
    assert len(ratios) == 10 and min(ratios) >= 1.0 and max(ratios) < 1.15
    # by simulation: chains whose steps succeed with p each
    p = 0.8
    lengths = np.cumprod(np.random.default_rng(0).random((200_000, 5)) < p, axis=1).sum(axis=1)
    assert tables.modelled_chain_variance(sum(p**k for k in range(1, 6))) == pytest.approx(lengths.var(), rel=0.01)
    assert tables.modelled_chain_variance(0) == tables.modelled_chain_variance(5) == 0
    row = by_label("freezing")["Qwen2.5-VL-7B, word embeddings frozen", tables.CALVIN]
    assert row.interval.low < row.difference < row.interval.high < 0 and row.p == pytest.approx(0.015, abs=0.002)


def test_auxiliary_tasks_keep_their_spread():
    table = tables.auxiliary()
    rows = {row.task: row for row in table.rows}
    assert len(rows) == 7 and {row.model for row in table.rows} == {"Qwen2.5-VL-3B", "Qwen2.5-VL-7B"}
    assert (rows["RoboBrain2"].best, rows["RoboBrain2"].median) == (3.887, 3.775)
    assert rows["VQA-Mix"].baseline == (4.068, 4.057, 4.050)
    assert {task: row.verdict for task, row in rows.items() if row.model.endswith("3B")} == {
        "ViCA-332k": "undetermined", "RoboPoint": "undetermined",
        "Robo2VLM": "below the baseline's range", "BridgeVQA": "below the baseline's range",
    }  # fmt: skip
    assert all(row.worst <= row.median <= row.best for row in table.rows)
    assert any("three against three cannot be significant" in note for note in table.notes)
    frame = table.to_frame()
    assert (frame["difference"] == frame["median"] - frame["baseline_median"]).all()


@pytest.mark.parametrize("name", ["freezing", "injection", "scratch"])
def test_tables_are_whole_and_go_into_json(name):
    table = tables.contrasts(name)
    assert len(table.to_frame()) == len(table.rows) == len(table.p_holm)
    assert all(p >= row.p - 1e-12 for p, row in zip(table.p_holm, table.rows, strict=True))
    json.dumps(table.to_dict(), allow_nan=False)
    assert all(row.quality == ("secondary" if name == "scratch" else "exact") for row in table.rows)


def test_another_table_is_an_input_error():
    with pytest.raises(InputError, match="did you mean 'freezing'"):
        tables.contrasts("freezin")  # type: ignore[arg-type]
