"""The statistics against scipy, statsmodels, closed forms, brute force and the paper's own numbers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from probes import homogeneity, intervals, paper, power, reliability
from probes.correlation import correlate, holm
from probes.permutation import permutation_table, permutation_test
from probes.scores import TaskCounts
from vlm4vla_core.errors import InputError

ORACLE = json.loads((Path(__file__).parent.parent / "oracles" / "nine_models.json").read_text())
CALVIN, BRIDGE, LIBERO = "CALVIN ABC-D", "SimplerEnv-Bridge", "LIBERO-10"


def tables(x, y, lineages=None, **columns):
    """Tidy tables of one score x and benchmarks y (a dict of lists, None where unknown)."""
    models = [f"m{i}" for i in range(len(x))]
    capability = pd.DataFrame({"model": models, "score": x})
    if lineages is not None:
        capability["lineage"] = lineages
    rows = [
        (model, name, value)
        for name, values in y.items()
        for model, value in zip(models, values, strict=True)
        if value is not None
    ]
    return capability, pd.DataFrame(rows, columns=["model", "benchmark", "value"]).assign(**columns)


def only(result):
    (pair,) = result.pairs
    return pair


@pytest.fixture(scope="module")
def published():
    return correlate(paper.capability(), paper.performance())


def by_benchmark(result):
    return {pair.benchmark: pair for pair in result.pairs}


# --- the paper's numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [CALVIN, BRIDGE, LIBERO])
def test_the_papers_pairs_equal_brute_force_in_exact_arithmetic(published, name):
    pair, oracle = by_benchmark(published)[name], ORACLE[name]
    found = {
        "p_exact": pair.pearson.p_exact,
        "p_max_r": pair.p_max_r,
        "p_spearman": pair.spearman.p_exact,
        "p_within_lineage": pair.p_within_lineage,
    }
    for key, p in found.items():
        hits, total = oracle[key]
        assert round(p * total) == hits and p == pytest.approx(hits / total, abs=1e-12), key
    assert pair.pearson.r == pytest.approx(oracle["r"], abs=1e-12)
    assert pair.p_method == "exact" and pair.p_stderr == 0 and pair.n == 9


def test_the_papers_headline_numbers(published):
    pairs = by_benchmark(published)
    calvin, bridge, libero = pairs[CALVIN], pairs[BRIDGE], pairs[LIBERO]
    assert round(calvin.pearson.r, 3) == 0.839 and round(calvin.pearson.p_exact, 4) == 0.0045
    assert [round(end, 2) for end in calvin.pearson.ci_fisher] == [0.39, 0.97]
    lowest, _ = calvin.leave_one_out_range()
    assert lowest[0] == "Kosmos-2" and round(lowest[1], 3) == 0.771
    assert calvin.within_lineage["Qwen"]["n"] == 6 and calvin.within_lineage["Qwen"]["r"] == pytest.approx(
        0.35, abs=5e-3
    )
    assert round(bridge.pearson.r, 3) == -0.357 and round(libero.pearson.r, 3) == -0.194
    assert round(libero.leave_one_out["Kosmos-2"], 3) == 0.197
    assert {name: pair.verdict for name, pair in pairs.items()} == {
        CALVIN: "positive between lineages, undetermined within",
        BRIDGE: "undetermined",
        LIBERO: "undetermined",
    }
    assert "turns without Kosmos-2" in libero.why and "0.26" in calvin.why


def test_the_papers_benchmarks_can_hardly_or_well_tell_models_apart(published):
    pairs = by_benchmark(published)
    bridge = pairs[BRIDGE]
    assert bridge.homogeneity.chi2 == pytest.approx(10.18, abs=5e-3) and bridge.homogeneity.df == 8
    assert bridge.homogeneity.p == pytest.approx(0.252, abs=5e-4)
    assert bridge.homogeneity.p_stratified == pytest.approx(0.013, abs=2e-3)
    assert bridge.homogeneity.per_task == pytest.approx(
        {"carrot_on_plate": 3e-5, "eggplant_in_basket": 0.012, "spoon_on_towel": 1.0, "stack_cubes": 4e-8}, rel=0.05
    )
    assert round(bridge.reliability.pooled, 2) == 0.22 and round(bridge.reliability.stratified, 2) == 0.61
    assert round(pairs[CALVIN].reliability.pooled, 2) == 0.98 and round(pairs[LIBERO].reliability.pooled, 2) == 0.78
    assert bridge.to_dict()["ceiling"]["pooled"] == pytest.approx(bridge.reliability.pooled**0.5)


def test_json_has_the_agreed_keys_and_is_json(published):
    values = json.loads(json.dumps(published.to_dict(), allow_nan=False))
    wanted = {
        "capability", "benchmark", "n", "pearson", "spearman", "p_within_lineage", "leave_one_out",
        "leave_one_lineage_out", "reliability", "ceiling", "homogeneity", "min_detectable_rho", "p_holm", "p_max_r",
        "verdict", "why", "attenuated", "mixed", "equivalence", "power", "within_lineage_centred", "false_alarms",
    }  # fmt: skip
    for pair in values["pairs"]:
        assert wanted <= set(pair)
        assert set(pair["pearson"]) == set(pair["spearman"]) == {"r", "p_exact", "ci_fisher", "ci_bca"}
        assert len(pair["pearson"]["ci_fisher"]) == 2 and len(pair["leave_one_out"]) == 9
        assert {cell["n"] for cell in pair["leave_one_lineage_out"].values()} == {8, 7, 3}
        assert {"pooled", "stratified", "ci"} <= set(pair["reliability"])
        assert {"chi2", "df", "p", "p_stratified", "per_task", "per_task_holm"} <= set(pair["homogeneity"])
        assert {"r", "ci", "source", "refused", "inadmissible"} <= set(pair["attenuated"])
        assert {"slope", "ci", "p"} <= set(pair["mixed"]["pooled"])
        assert set(pair["equivalence"]) == {"margin", "p", "n_for_80_power", "cannot_succeed_below"}
    frame = published.to_frame()
    assert list(frame["benchmark"]) == [CALVIN, BRIDGE, LIBERO] and frame["verdict"].notna().all()


# --- permutation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6])
def test_permutation_table_is_every_permutation_once(n):
    assert {tuple(row) for row in permutation_table(n).tolist()} == set(itertools.permutations(range(n)))


def brute_force(x, y, blocks=None):
    """p of |r*| >= |r| by itertools and numpy.corrcoef."""
    goal, hits, total = abs(np.corrcoef(x, y)[0, 1]), 0, 0
    for order in itertools.permutations(range(len(x))):
        if blocks and any(blocks[i] != blocks[j] for i, j in enumerate(order)):
            continue
        hits += abs(np.corrcoef(np.asarray(x)[list(order)], y)[0, 1]) >= goal - 1e-12
        total += 1
    return hits / total


@pytest.mark.parametrize("seed", range(4))
def test_exact_p_equals_brute_force_with_ties_and_blocks(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 4, 6).astype(float), rng.integers(0, 5, 6).astype(float)
    x[0], y[1] = x[0] + 0.5, y[1] + 0.5  # not constant
    test = permutation_test(x[:, None], y[:, None])
    assert test.exact and test.arrangements == 720 and test.p[0, 0] == pytest.approx(brute_force(x, y), abs=1e-12)
    groups = ["a", "a", "b", "b", "b", "c"]
    blocked = permutation_test(x[:, None], y[:, None], blocks=[[0, 1], [2, 3, 4], [5]])
    assert blocked.arrangements == 12 and blocked.p[0, 0] == pytest.approx(brute_force(x, y, groups), abs=1e-12)


def test_exact_p_equals_scipys_enumeration_of_the_same_rule():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=6), rng.normal(size=6)
    done = stats.permutation_test(
        (x,),
        lambda a: abs(stats.pearsonr(a, y)[0]),
        permutation_type="pairings",
        alternative="greater",
        n_resamples=np.inf,
    )
    assert permutation_test(x[:, None], y[:, None]).p[0, 0] == pytest.approx(done.pvalue, abs=1e-12)


def test_max_r_and_missing_values_equal_brute_force():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(6, 2)), rng.normal(size=(6, 2))
    x[4, 1], y[0, 1] = np.nan, np.nan

    def each(order):
        out, scaled = np.zeros((2, 2)), np.zeros((2, 2))
        for c, b in itertools.product(range(2), range(2)):
            a, v = x[list(order), c], y[:, b]
            both = np.isfinite(a) & np.isfinite(v)
            out[c, b] = abs(np.corrcoef(a[both], v[both])[0, 1])
            scaled[c, b] = np.arctanh(out[c, b]) * np.sqrt(both.sum() - 3)
        return out, scaled

    null, null_scaled = np.array([each(order) for order in itertools.permutations(range(6))]).swapaxes(0, 1)
    observed, scaled = each(range(6))
    test = permutation_test(x, y)
    assert np.allclose(np.abs(test.r), observed)
    assert np.allclose(test.p, (null >= observed - 1e-12).mean(axis=0))
    # Pairs of 5, 4 and 6 models: the largest is taken where they are comparable, on the scale |z| sqrt(n - 3).
    assert np.allclose(test.p_max, (null_scaled.max(axis=(1, 2))[:, None, None] >= scaled - 1e-12).mean(axis=0))


def test_monte_carlo_is_seeded_and_within_its_own_error():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 1)), rng.normal(size=(8, 2))
    exact = permutation_test(x, y)
    drawn = [permutation_test(x, y, enumerate_up_to=1, draws=20_000, seed=seed) for seed in (1, 1, 2)]
    assert not drawn[0].exact and np.array_equal(drawn[0].p, drawn[1].p) and not np.array_equal(drawn[0].p, drawn[2].p)
    assert (np.abs(drawn[0].p - exact.p) < 4 * drawn[0].p_stderr).all()
    assert np.allclose(drawn[0].p_stderr, np.sqrt(exact.p * (1 - exact.p) / 20_000), rtol=0.1)


def test_above_ten_models_p_is_drawn_and_says_so():
    rng = np.random.default_rng(0)
    x = rng.normal(size=12)
    pair = only(correlate(*tables(x, {"b": x + 0.8 * rng.normal(size=12)})))
    assert pair.p_method == "monte-carlo" and 0 < pair.p_stderr < 1e-3
    assert pair.pearson.p_exact == pytest.approx(stats.pearsonr(x, [p.y for p in pair.points])[1], abs=0.01)


# --- coefficients and intervals ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_coefficients_and_intervals_equal_scipy(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 6, 8) + 0.0, rng.normal(size=8)
    pair = only(correlate(*tables(x, {"b": y})))
    reference = stats.pearsonr(x, y)
    assert pair.pearson.r == pytest.approx(reference[0], abs=1e-12)
    assert pair.pearson.ci_fisher == pytest.approx(tuple(reference.confidence_interval()), abs=1e-9)
    rho = stats.spearmanr(x, y)[0]
    assert pair.spearman.r == pytest.approx(rho, abs=1e-12)
    half = 1.959963985 * np.sqrt((1 + rho**2 / 2) / 5)  # Bonett and Wright (2000), n = 8
    assert pair.spearman.ci_fisher == pytest.approx(tuple(np.tanh(np.arctanh(rho) + np.array([-half, half]))), abs=1e-6)


def test_bca_equals_scipys_bootstrap_within_resampling_error():
    rng = np.random.default_rng(3)
    x = rng.normal(size=20)
    y = 0.6 * x + rng.normal(size=20)
    ours = intervals.bca(x, y, draws=20_000)
    reference = stats.bootstrap(
        (x, y), lambda a, b, axis=-1: intervals.pearson(a, b), paired=True, vectorized=True, method="BCa",
        n_resamples=20_000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert ours == pytest.approx(tuple(reference), abs=0.02)
    assert intervals.bca(np.arange(4.0), np.arange(4.0)) is None  # |r| = 1 everywhere


def test_holm_equals_statsmodels():
    from statsmodels.stats.multitest import multipletests

    for p in ([0.01, 0.04, 0.03], [0.5, 0.5, 0.001, 0.02], [0.9]):
        assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])


# --- power ------------------------------------------------------------------------------------------------


def test_critical_r_is_where_scipys_p_is_alpha():
    assert power.critical_r(9) == pytest.approx(0.666, abs=5e-4)
    assert power.critical_r(9, 0.05 / 3) == pytest.approx(0.763, abs=2e-3)
    edge = power.critical_r(12)
    t = edge * np.sqrt(10 / (1 - edge**2))
    assert 2 * stats.t.sf(t, 10) == pytest.approx(0.05)


def test_power_is_alpha_without_correlation_and_matches_simulation_with_it():
    assert power.power_of_r(0.0, 9) == pytest.approx(0.05, abs=1e-9)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40_000, 9))
    y = 0.8 * x + 0.6 * rng.normal(size=x.shape)
    seen = (np.abs(intervals.pearson(x, y)) > power.critical_r(9)).mean()
    assert power.power_of_r(0.8, 9) == pytest.approx(seen, abs=4 * np.sqrt(0.82 * 0.18 / 40_000))


def test_detectable_rho_has_the_stated_power():
    for n in (4, 9, 30, 500):
        assert power.power_of_r(power.detectable_rho(n), n) == pytest.approx(0.8, abs=1e-4)
    assert power.detectable_rho(9) == pytest.approx(0.79, abs=5e-3) and power.detectable_rho(3) == 1.0


# --- noise of a benchmark ---------------------------------------------------------------------------------


def test_chain_variance_is_the_variance_of_the_chains():
    lengths = np.random.default_rng(0).integers(0, 6, size=(3, 400))
    steps = np.array([[(row >= k).mean() for k in range(1, 6)] for row in lengths])
    expected = lengths.var(axis=1, ddof=0) / 400
    assert np.allclose(reliability.chain_variance(steps, np.full(3, 400.0)), expected)


def test_homogeneity_equals_scipys_contingency_table_and_shuffling():
    k, n = np.array([[3.0, 9], [7, 8], [1, 6], [5, 9]]), np.full((4, 2), 10.0)
    found = homogeneity.homogeneity(k.sum(1), n.sum(1), TaskCounts(("a", "b"), k, n), draws=20_000)
    for ours, successes, size in ((found.p, k.sum(1), 20), (found.per_task["a"], k[:, 0], 10)):
        assert ours == pytest.approx(
            stats.chi2_contingency(np.c_[successes, size - successes], correction=False).pvalue
        )
    rng, hits = np.random.default_rng(1), 0  # slow reference: shuffle outcomes across models within each task
    pools = [np.repeat([1, 0], [int(c), int(40 - c)]) for c in k.sum(0)]
    for _ in range(2000):
        totals = sum(rng.permutation(pool).reshape(4, 10).sum(1) for pool in pools)
        hits += totals.var() >= k.sum(1).var() - 1e-9
    assert found.p_stratified == pytest.approx(hits / 2000, abs=4 * np.sqrt(0.25 / 2000) * 0.7)


def test_reliability_recovers_the_share_of_true_variance():
    rng = np.random.default_rng(0)
    rates = rng.beta(12, 12, size=400)  # variance 0.01; 96 episodes add about 0.0025
    k = rng.binomial(96, rates)
    found = reliability.reliability(k / 96, reliability.pooled_variance(k, np.full(400, 96)))
    assert found.pooled == pytest.approx(0.01 / (0.01 + 0.24 / 96), abs=0.04)
    assert found.ci.low < found.pooled < found.ci.high
    same = rng.binomial(96, 0.5, size=400)
    assert reliability.reliability(same / 96, reliability.pooled_variance(same, np.full(400, 96))).pooled < 0.15


def test_episode_rows_give_the_same_noise_as_counts(published):
    performance = paper.performance()
    counts = performance[(performance["benchmark"] == BRIDGE) & (performance["task"] != "")]
    rows = [
        (row.model, BRIDGE, row.task, outcome)
        for row in counts.itertuples()
        for outcome in [True] * int(row.successes) + [False] * int(row.episodes - row.successes)
    ]
    episodes = pd.DataFrame(rows, columns=["model", "benchmark", "task", "success"])
    bare = performance[performance["task"] == ""][["model", "benchmark", "value"]]
    ours = by_benchmark(correlate(paper.capability(), bare, episodes))[BRIDGE]
    theirs = by_benchmark(published)[BRIDGE]
    assert ours.reliability.stratified == pytest.approx(theirs.reliability.stratified)
    assert ours.homogeneity.per_task == pytest.approx(theirs.homogeneity.per_task)


# --- invariances ------------------------------------------------------------------------------------------

VALUES = st.lists(st.integers(-50, 50), min_size=5, max_size=6, unique=True)


@settings(deadline=None, derandomize=True, max_examples=12)
@given(x=VALUES, data=st.data(), scale=st.sampled_from([0.01, 3.0, 1e6]), shift=st.sampled_from([-1e4, -0.3, 1e3]))
def test_order_scale_and_shift_change_nothing(x, data, scale, shift):
    y = data.draw(st.lists(st.integers(0, 9), min_size=len(x), max_size=len(x)).filter(lambda v: len(set(v)) > 1))
    lineages = data.draw(st.lists(st.sampled_from("ab"), min_size=len(x), max_size=len(x)))
    first = correlate(*tables(x, {"b": y}, lineages))
    capability, performance = tables([shift + scale * v for v in x], {"b": [shift + scale * v for v in y]}, lineages)
    order = data.draw(st.permutations(range(len(x))))
    second = correlate(capability.iloc[list(order)], performance.iloc[list(order)[::-1]])
    one, two = only(first), only(second)
    assert two.pearson.r == pytest.approx(one.pearson.r, abs=1e-9)
    assert two.pearson.p_exact == one.pearson.p_exact and two.spearman.p_exact == one.spearman.p_exact
    assert two.p_within_lineage == one.p_within_lineage and two.p_max_r == one.p_max_r
    assert two.verdict == one.verdict
    assert two.leave_one_out.keys() == one.leave_one_out.keys()


@settings(deadline=None, derandomize=True, max_examples=8)
@given(x=VALUES, data=st.data())
def test_mirroring_a_score_mirrors_r_and_keeps_every_p(x, data):
    y = data.draw(st.lists(st.integers(0, 9), min_size=len(x), max_size=len(x)).filter(lambda v: len(set(v)) > 1))
    one, two = (only(correlate(*tables(side, {"b": y}))) for side in (x, [-v for v in x]))
    assert two.pearson.r == pytest.approx(-one.pearson.r) and two.pearson.p_exact == one.pearson.p_exact
    assert two.pearson.ci_fisher == pytest.approx((-one.pearson.ci_fisher.high, -one.pearson.ci_fisher.low))


# --- verdicts ---------------------------------------------------------------------------------------------


def test_firm_within_lineages_is_plainly_positive_or_negative():
    x = np.arange(8.0)
    y = x + np.array([0.1, -0.1, 0.05, 0.0, 0.1, -0.1, 0.1, 0.0])
    lineages = list("aaaabbbb")
    assert only(correlate(*tables(x, {"b": y}, lineages))).verdict == "positive"
    assert only(correlate(*tables(x, {"b": -y}, lineages))).verdict == "negative"


def test_a_contrast_of_lineages_is_called_that():
    x = [0, 0.2, 0.1, 0.3, 5, 5.1, 5.2, 5.3]
    y = [1, 0.9, 1.1, 0.8, 9, 9.1, 8.9, 9.0]
    pair = only(correlate(*tables(x, {"b": y}, list("aaaabbbb"))))
    assert pair.verdict == "positive between lineages, undetermined within"
    assert "contrast of 2 lineages" in pair.why
    unstated = only(correlate(*tables(x, {"b": y})))
    assert (
        unstated.verdict == "positive"
        and "Lineages are not stated" in unstated.why
        and unstated.p_within_lineage is None
    )


def test_one_model_that_turns_the_sign_forbids_a_verdict():
    x = [0, 1, 2, 3, 4, 5, 6, 60]
    y = [6, 5, 4, 3, 2, 1, 0, 60]
    pair = only(correlate(*tables(x, {"b": y})))
    assert pair.pearson.r > 0.9 and pair.pearson.ci_fisher.low > 0
    assert pair.verdict == "undetermined" and "m7" in pair.why


def test_looking_at_many_benchmarks_costs_certainty():
    x = [1.0, 2, 3, 4, 5, 6]
    good = [1.0, 2.5, 2, 4.2, 4, 6.5]
    rng = np.random.default_rng(0)
    alone = only(correlate(*tables(x, {"b": good})))
    many = correlate(*tables(x, {"b": good, **{f"n{i}": rng.normal(size=6).tolist() for i in range(30)}}))
    pair = by_benchmark(many)["b"]
    assert alone.verdict == "positive" and alone.p_max_r == alone.pearson.p_exact == alone.p_holm
    assert pair.pearson.p_exact == alone.pearson.p_exact and pair.verdict == "undetermined"
    assert pair.p_holm == pytest.approx(31 * pair.pearson.p_exact) and pair.p_max_r > 0.05


def test_practically_none_takes_an_equivalence_test():
    def pair_of(n):
        x = np.tile([0.0, 0, 1, 1], n // 4)
        return only(correlate(*tables(x, {"b": np.tile([0.0, 1, 0, 1], n // 4)})))  # r exactly 0

    assert pair_of(28).verdict == "undetermined"  # cannot succeed below 32 models
    done = pair_of(32)
    assert done.pearson.r == pytest.approx(0, abs=1e-12) and done.verdict == "practically none"
    assert "equivalence" in done.why


def test_three_models_are_described_and_nothing_is_concluded():
    pair = only(correlate(*tables([1, 2, 3], {"b": [1, 2, 4]})))
    assert pair.pearson.ci_fisher == (-1, 1) and pair.verdict == "undetermined"
    assert pair.pearson.p_exact == pytest.approx(2 / 6) and set(pair.leave_one_out.values()) == {None}
    json.dumps(pair.to_dict(), default=float)


# --- tables -----------------------------------------------------------------------------------------------


def test_models_in_one_table_only_are_listed_and_the_rest_is_used():
    capability, performance = tables([1, 2, 3, 4, 5], {"b": [1, 3, 2, 5, None], "c": [1, None, 2, 5, None]})
    performance.loc[len(performance)] = ["other", "b", 3.0]
    result = correlate(capability, performance)
    assert result.unmatched == {"m1": "no c", "m4": "no performance", "other": "no capability score"}
    assert {pair.benchmark: pair.n for pair in result.pairs} == {"b": 4, "c": 3}
    assert set(result.not_stated) == {"lineage", "successes", "episodes", "selection", "stderr", "evaluator"}
    with_all = correlate(*tables([1, 2, 3, 4], {"b": [1, 3, 2, 5]}))
    assert by_benchmark(result)["b"].pearson == only(with_all).pearson


def test_several_scores_make_several_pairs_and_a_primary_one():
    capability, performance = tables([1, 2, 3, 4], {"b": [1, 3, 2, 5]})
    second = capability.assign(benchmark="mmbench", score=[4, 1, 2, 2])
    both = pd.concat([capability.assign(benchmark="gqa"), second])
    result = correlate(both, performance, primary="gqa:b")
    assert [(pair.capability, pair.role) for pair in result.pairs] == [("gqa", "primary"), ("mmbench", "exploratory")]
    assert correlate(capability, performance, primary="b").primary == "capability:b"


def test_a_benchmarks_tasks_are_no_models_results():
    capability, performance = tables([1, 2, 3, 4], {"b": [10, 30, 20, 50]})
    more = pd.concat([performance, performance.assign(task="t", value=0.0)])
    assert only(correlate(capability, more)).pearson == only(correlate(capability, performance)).pearson


def bad(**changes):
    x, y = changes.pop("x", [1, 2, 3, 4]), changes.pop("y", {"b": [10.0, 30, 20, 50]})
    return tables(x, y, changes.pop("lineages", None), **changes)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (bad(x=[1, 2, np.nan, 4]), "score of m2 is 'nan'"),
        (bad(y={"b": [10, np.inf, 20, 50]}), "value of m1 on b is 'inf'"),
        (bad(y={"b": [10, "many", 20, 50]}), "value of m1 on b is 'many'"),
        (bad(x=[2, 2, 2, 2]), "all 4 models have the same value 2"),
        (bad(y={"b": [1, 1, 1, 1]}), "all 4 models have the same value 1"),
        (bad(x=[1, 2], y={"b": [1, 2]}), "2 models in both tables"),
        (bad(y={"b": [1, 2, 4, 3], "c": [1, 2, None, None]}), "2 models with both"),
        (bad(successes=[1, 2, 3, 60], episodes=50), "60 successes of 50 episodes"),
        (bad(successes=[1, 2, 3, 4.5], episodes=50), "successes of m3 on b is '4.5'"),
        (bad(successes=["few", 2, 3, 4], episodes=50), "successes of m0 on b is 'few'"),
        (bad(y={"b": [0.1, 0.3, 0.2, 0.5]}, metric="success_pct"), "fractions, not per cent"),
        (bad(y={"b": [10, 30, 0.2, 50]}, successes=[5, 15, 10, 25], episodes=50), "a fraction among percentages"),
        (bad(task="t"), "no benchmark has a total"),
    ],
)
def test_bad_tables_are_one_clear_line(inputs, message):
    with pytest.raises(InputError, match=message) as caught:
        correlate(*inputs)
    assert "\n" not in str(caught.value)


def test_missing_columns_duplicates_names_and_lineages_are_named():
    capability, performance = tables([1, 2, 3, 4], {"b": [1, 3, 2, 5]}, lineages=list("aabb"))
    cases = [
        (capability.drop(columns="score"), performance, "missing column score"),
        (capability, performance.drop(columns="benchmark"), "missing column benchmark"),
        (pd.concat([capability, capability.head(1)]), performance, "m0 stands 2 times under capability"),
        (
            capability,
            pd.concat([performance, performance.head(1).assign(value=7)]),
            r"m0 stands 2 times under b \(1, 7\)",
        ),
        (capability.assign(model=["M-0", "M-1", "M-2", "M-3"]), performance, "0 models in both tables"),
        (capability, performance.assign(lineage=list("aabc")), "lineage of m3 is 'b' and 'c'"),
        (capability.assign(model=["m0", None, "m2", "m3"]), performance, "row 2 has no model"),
    ]
    for left, right, message in cases:
        with pytest.raises(InputError, match=message):
            correlate(left, right)
    with pytest.raises(InputError, match=r"no pair 'capability:d'.*known: capability:b"):
        correlate(capability, performance, primary="capability:d")


def test_a_chain_position_that_stands_twice_is_named():
    capability, performance = tables([1, 2, 3, 4], {"b": [1, 3, 2, 5]})
    steps = performance.assign(task="1 in a row", metric="step_rate", value=0.5)
    both = pd.concat([performance.assign(task="", metric="avg_len"), steps, steps.head(1)])
    with pytest.raises(InputError, match="m0 has task 1 in a row of b twice"):
        correlate(capability, both)


def test_episode_rows_of_other_benchmarks_are_refused():
    rows = pd.DataFrame({"model": ["m0"], "benchmark": ["z"], "task": ["t"], "success": [True]})
    with pytest.raises(InputError, match="episodes of z, but performance on b"):
        correlate(*tables([1, 2, 3, 4], {"b": [1, 3, 2, 5]}), rows)
    with pytest.raises(InputError, match="neither true nor false"):
        correlate(*tables([1, 2, 3, 4], {"b": [1, 3, 2, 5]}), rows.assign(success=0.5))
