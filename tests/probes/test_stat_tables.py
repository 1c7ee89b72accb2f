"""Properties of `correlate` over tables of any sort (hypothesis): what must not matter, and what must be refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from probes import paper
from probes.correlation import correlate
from probes.permutation import permutation_test
from probes.scores import gather
from vlm4vla_core.errors import InputError

EXAMPLES = settings(deadline=None, derandomize=True, max_examples=10)
FEW = settings(
    deadline=None, derandomize=True, max_examples=4, phases=(Phase.explicit, Phase.generate)
)  # slow to shrink
COUNTS = st.lists(st.integers(3, 24), min_size=4, max_size=6).filter(lambda k: len(set(k)) > 1)


def tables(x, successes, episodes=24, scale=100.0, **columns):
    models = [f"m{i}" for i in range(len(x))]
    counts = np.asarray(successes, dtype=float)
    performance = {"model": models, "benchmark": "b", "value": scale * counts / episodes, "successes": counts}
    return pd.DataFrame({"model": models, "score": x}), pd.DataFrame(performance).assign(episodes=episodes, **columns)


def plain(result):
    """The JSON of the only pair, without its points."""
    (pair,) = json.loads(json.dumps(result.to_dict()))["pairs"]
    return {key: value for key, value in pair.items() if key != "points"}


def same(one, two, path=""):
    """Equal up to rounding, all the way down."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            same(one[key], two[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), path
        for a, b in zip(one, two, strict=True):
            same(a, b, path)
    elif isinstance(one, float) and isinstance(two, float):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5), path
    else:
        assert one == two, path


@FEW
@given(successes=COUNTS, data=st.data())
def test_everything_about_a_pair_survives_order_unit_and_scale(successes, data):
    """Percentages or fractions, capability in any unit, rows in any order: noise, mixed model and verdict too."""
    x = data.draw(st.lists(st.integers(-9, 9), min_size=len(successes), max_size=len(successes), unique=True))
    one = plain(correlate(*tables(x, successes)))
    capability, performance = tables([3.0 + 0.5 * v for v in x], successes, scale=1.0)
    order = list(data.draw(st.permutations(range(len(x)))))
    two = plain(correlate(capability, performance.iloc[order]))
    same(one, two)


@EXAMPLES
@given(data=st.data(), n=st.integers(4, 6))
def test_ties_cost_resolution_but_never_validity(data, n):
    """p is a multiple of 1/n!, at least 1/n!, and with ties at least as many arrangements as tie with the given one."""
    x = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n).filter(lambda v: len(set(v)) > 1))
    y = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n).filter(lambda v: len(set(v)) > 1))
    test = permutation_test(np.array(x, float)[:, None], np.array(y, float)[:, None])
    total = test.arrangements
    ties = np.prod([float(np.prod(range(1, x.count(v) + 1))) for v in set(x)])
    assert test.p[0, 0] * total == pytest.approx(round(test.p[0, 0] * total))
    assert ties / total - 1e-12 <= test.p[0, 0] <= 1


@EXAMPLES
@given(x=st.lists(st.floats(-1e6, 1e6).map(lambda v: round(v, 3)), min_size=3, max_size=3, unique=True), data=st.data())
def test_three_models_are_described_and_never_judged(x, data):
    y = data.draw(st.lists(st.integers(-50, 50), min_size=3, max_size=3).filter(lambda v: len(set(v)) > 1))
    models = ["a", "b", "c"]
    performance = pd.DataFrame({"model": models, "benchmark": "b", "value": y})
    result = correlate(pd.DataFrame({"model": models, "score": x}), performance)
    (pair,) = result.pairs
    assert pair.verdict == "undetermined" and pair.pearson.p_exact >= 1 / 6 and tuple(pair.pearson.ci_fisher) == (-1, 1)
    assert pair.attenuated.refused and pair.mixed.pooled is None
    json.dumps(result.to_dict(), allow_nan=False)


@EXAMPLES
@given(successes=COUNTS, row=st.integers(0, 3))
def test_one_fraction_among_percentages_is_refused_with_advice(successes, row):
    capability, performance = tables(range(len(successes)), successes)
    performance.loc[row, "value"] /= 100
    with pytest.raises(InputError, match="a fraction among percentages") as caught:
        correlate(capability, performance)
    assert "same unit" in str(caught.value)


@EXAMPLES
@given(successes=COUNTS)
def test_fractions_under_the_name_of_percentages_are_refused_with_advice(successes):
    with pytest.raises(InputError, match=r"not per cent.*multiply by 100, or name the metric success_rate"):
        correlate(*tables(range(len(successes)), successes, scale=1.0, metric="success_pct"))


@EXAMPLES
@given(successes=COUNTS, row=st.integers(0, 3), extra=st.integers(1, 50))
def test_more_successes_than_episodes_are_refused(successes, row, extra):
    capability, performance = tables(range(len(successes)), successes)
    performance.loc[row, "successes"] = 24 + extra
    with pytest.raises(InputError, match=f"m{row} on b"):
        correlate(capability, performance)


@EXAMPLES
@given(
    successes=COUNTS,
    row=st.integers(0, 3),
    side=st.sampled_from(["score", "value"]),
    bad=st.sampled_from(["nan", "-inf"]),
)
def test_what_is_no_finite_number_is_named(successes, row, side, bad):
    capability, performance = tables(range(len(successes)), successes)
    table = capability if side == "score" else performance
    table[side] = table[side].astype(float)
    table.loc[row, side] = float(bad)
    with pytest.raises(InputError, match=f"{side} of m{row}.*not a finite number"):
        correlate(capability, performance)


@EXAMPLES
@given(successes=COUNTS, row=st.integers(0, 3), first=st.booleans())
def test_a_model_given_twice_is_refused_by_name(successes, row, first):
    inputs = list(tables(range(len(successes)), successes))
    table = inputs[0 if first else 1]
    inputs[0 if first else 1] = pd.concat([table, table.iloc[[row]]])
    with pytest.raises(InputError, match=f"m{row} stands 2 times"):
        correlate(*inputs)


@EXAMPLES
@given(
    successes=COUNTS,
    left=st.lists(st.sampled_from("pqrs"), unique=True),
    right=st.lists(st.sampled_from("tuvw"), unique=True),
)
def test_models_of_one_table_only_are_listed_and_change_nothing(successes, left, right):
    capability, performance = tables(range(len(successes)), successes)
    first = gather(capability, performance)
    more = pd.DataFrame({"model": left, "score": 99.0}), pd.DataFrame({"model": right, "benchmark": "b", "value": 1.0})
    second = gather(*(pd.concat(pair) for pair in zip((capability, performance), more, strict=True)))
    assert second.unmatched == dict.fromkeys(left, "no performance") | dict.fromkeys(right, "no capability score")
    assert first.models == second.models and np.array_equal(first.x, second.x) and np.array_equal(first.y, second.y)


@pytest.mark.parametrize("side", ["score", "value"])
def test_constant_columns_are_refused_by_name(side):
    capability, performance = tables([1, 2, 3, 4], [5, 6, 7, 8])
    (capability if side == "score" else performance)[side] = 7.0
    with pytest.raises(InputError, match="all 4 models have the same value 7"):
        correlate(capability, performance)


OPTIONAL = ["family", "lineage", "metric", "task", "successes", "episodes", "source", "quality", "selection", "flag"]


@pytest.mark.parametrize("missing", [*OPTIONAL, OPTIONAL])
def test_no_optional_column_of_the_papers_tables_is_needed(missing):
    gone = [missing] if isinstance(missing, str) else missing
    performance = paper.performance()
    if "task" in gone:  # the column that tells totals from what stands below them
        performance = performance[performance["task"] == ""]
    capability = paper.capability()[["model", "score"]] if gone == OPTIONAL else paper.capability()
    capability = capability.drop(columns=[c for c in gone if c in capability], errors="ignore")
    scores = gather(capability, performance.drop(columns=gone))
    stated = {"lineage", "successes", "episodes", "selection"}
    assert set(gone) & stated <= set(scores.not_stated)
    found = [round(float(np.corrcoef(scores.x[:, 0], scores.y[:, b])[0, 1]), 3) for b in range(3)]
    assert found == [0.839, -0.357, -0.194]
    if gone == OPTIONAL:
        assert [pair.verdict for pair in correlate(capability, performance.drop(columns=gone)).pairs] == [
            "positive", "undetermined", "undetermined",
        ]  # fmt: skip


# --- the page and the tables behind it ------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent.parent


def test_the_page_shows_the_simulations_that_were_run():
    rows = json.loads((ROOT / "benchmarks" / "results" / "coverage.json").read_text())["rows"]
    page = (ROOT / "docs" / "statistics.md").read_text()
    for row in rows:
        assert f"| {row['what']} | {row['setting']} | {row['goal']} | {100 * row['value']:.1f} % " in page
    for row in rows:
        if row["goal"] == "93 to 97 %":
            assert 0.93 < row["value"] < 0.97 and row["studies"] >= 10_000
        elif row["goal"] == "95 %":
            assert abs(row["value"] - 0.95) < 0.025
        elif row["goal"] == "95 % or more":
            assert row["value"] > 0.95 - 3 * max(row["stderr"], 0.01)
        elif row["goal"] in ("5 %", "at most 5 %"):
            assert row["value"] < 0.05 + 3 * row["stderr"]


def test_the_pages_numbers_are_those_of_the_report():
    page = (ROOT / "docs" / "statistics.md").read_text().replace("\n", " ")
    for pair in correlate(paper.capability(), paper.performance()).pairs:
        found, bca = pair.pearson, pair.pearson.ci_bca
        line = f"| {pair.benchmark} | {found.r:+.3f} | {found.p_exact:.2{'g' if found.p_exact < 0.01 else 'f'}} | "
        line += f"{found.ci_fisher.low:+.2f} to {found.ci_fisher.high:+.2f} | {bca.low:+.2f} to {bca.high:+.2f} |"
        assert line in page, line


@pytest.mark.slow
def test_a_smaller_simulation_agrees_with_the_committed_one():
    import importlib.util

    spec = importlib.util.spec_from_file_location("coverage_simulations", ROOT / "benchmarks" / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    committed = json.loads((ROOT / "benchmarks" / "results" / "coverage.json").read_text())["rows"]
    fresh = module.simulate(scale=0.1, seed=7)
    assert len(fresh) == len(committed)
    for one, other in zip(fresh, committed, strict=True):
        assert (one.what, one.setting) == (other["what"], other["setting"])
        error = np.hypot(max(one.stderr, 1 / one.studies), max(other["stderr"], 1 / other["studies"]))
        assert abs(one.value - other["value"]) < 4 * error, (one, other)
