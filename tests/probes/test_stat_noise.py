"""What noise, lineages and few models do to a correlation: against closed forms, brute force and simulated truth."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from probes import attenuation, homogeneity, intervals, lineages, mixed, paper, power, reliability
from probes.correlation import correlate
from probes.outlook import outlook
from probes.scores import TaskCounts
from vlm4vla_core.errors import InputError

CALVIN, BRIDGE, LIBERO = "CALVIN ABC-D", "SimplerEnv-Bridge", "LIBERO-10"


def tables(x, y, lineage=None, **columns):
    models = [f"m{i}" for i in range(len(x))]
    capability = pd.DataFrame({"model": models, "score": x})
    if lineage is not None:
        capability["lineage"] = list(lineage)
    return capability, pd.DataFrame({"model": models, "benchmark": "b", "value": y}).assign(**columns)


def only(result):
    (pair,) = result.pairs
    return pair


@pytest.fixture(scope="module")
def published():
    return {pair.benchmark: pair for pair in correlate(paper.capability(), paper.performance()).pairs}


# --- correction for attenuation -------------------------------------------------------------------------------


def test_the_papers_corrected_values_and_what_they_rest_on(published):
    bridge, calvin = published[BRIDGE].attenuated, published[CALVIN].attenuated
    assert bridge.source == "stratified" and bridge.reliability_performance == published[BRIDGE].reliability.stratified
    assert bridge.r == pytest.approx(published[BRIDGE].pearson.r / published[BRIDGE].reliability.stratified ** 0.5)
    assert calvin.source == "pooled" and calvin.reliability_capability is None and not calvin.inadmissible
    assert calvin.ci.low < calvin.r < calvin.ci.high <= 1
    # Less reliable, so wider than the uncorrected interval.
    assert np.ptp(bridge.ci) > np.ptp(published[BRIDGE].pearson.ci_fisher)


def test_correction_is_refused_below_one_half_and_inadmissible_above_one():
    refused = attenuation.corrected(0.4, 9, 0.49)
    assert refused.r is None and refused.ci is None and "0.49, below 0.5" in refused.refused
    assert "capability" in attenuation.corrected(0.4, 9, 0.9, 0.3).refused
    assert "not known" in attenuation.corrected(0.4, 9, None).refused
    beyond = attenuation.corrected(0.8, 9, 0.55)
    assert beyond.inadmissible and beyond.r > 1 and beyond.ci.high == 1 and beyond.refused is None


def test_interval_without_noise_is_the_exact_one_of_a_correlation():
    """Exact: rho at which the sample r is the 97.5 % (2.5 %) point of Hotelling's distribution."""
    from scipy.integrate import quad
    from scipy.optimize import brentq

    r, n = 0.6, 12
    found = attenuation.interval(r, n, 1.0)

    def below(rho):
        return quad(lambda v: power.density_of_r(np.array([v]), rho, n)[0], -1, r)[0]

    exact = [brentq(lambda rho, level=level: below(rho) - level, -0.9, 0.95) for level in (0.975, 0.025)]
    assert found == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize(("r", "performance", "capability"), [(0.5, 0.7, None), (-0.6, 0.8, 0.9)])
def test_interval_equals_a_literal_draw_of_covariance_matrices(r, performance, capability):
    """Matrix by matrix: S = K K', Wishart = T T', Sigma = (K T^-1)(K T^-1)', noise off its diagonal, then r of that."""
    n = 20
    scatter = np.linalg.cholesky((n - 1) * np.array([[1, r], [r, 1]]))
    wishart = stats.wishart(n - 1, np.eye(2)).rvs(40_000, random_state=5)
    factor = scatter @ np.linalg.inv(np.linalg.cholesky(wishart))
    clean = factor @ factor.swapaxes(1, 2) - np.diag([1 - performance, 0 if capability is None else 1 - capability])
    kept = (clean[:, 0, 0] > 0) & (clean[:, 1, 1] > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = np.where(kept, clean[:, 0, 1] / np.sqrt(clean[:, 0, 0] * clean[:, 1, 1]), np.sign(clean[:, 0, 1]) * 9)
    expected = np.clip(np.quantile(draws, [0.025, 0.975]), -1, 1)
    assert attenuation.interval(r, n, performance, capability) == pytest.approx(expected, abs=0.015)


def test_capability_stderr_corrects_both_sides():
    rng = np.random.default_rng(0)
    x = rng.normal(size=12)
    y = 50 + 20 * x + rng.normal(size=12)
    capability, performance = tables(x, y)
    one = only(correlate(capability, performance.assign(successes=np.round(y * 5), episodes=500)))
    both = only(correlate(capability.assign(stderr=0.3), performance.assign(successes=np.round(y * 5), episodes=500)))
    assert one.attenuated.reliability_capability is None
    assert both.attenuated.reliability_capability == pytest.approx(1 - 0.09 / x.var(ddof=1))
    assert both.attenuated.r == pytest.approx(one.attenuated.r / (1 - 0.09 / x.var(ddof=1)) ** 0.5)
    some = correlate(capability.assign(stderr=[0.3, *[None] * 11]), performance)
    assert only(some).attenuated.reliability_capability is None


# --- reliability that looks perfect -------------------------------------------------------------------------


def test_rates_of_zero_and_one_only_are_no_perfect_reliability():
    k, n = np.array([0.0, 0, 5, 5]), np.full(4, 5.0)
    assert (reliability.pooled_variance(k, n) > 0).all()
    found = reliability.reliability(k / n, reliability.pooled_variance(k, n))
    assert found.pooled < 0.97 and found.ci.low < 0.9
    few = reliability.reliability(k / n, reliability.pooled_variance(k / 5, n / 5))
    assert few.pooled < found.pooled  # one episode says less than five
    cells = np.array([[0.0, 5], [0, 0], [5, 5], [5, 0]])
    assert (reliability.stratified_variance(cells, np.full((4, 2), 5.0)) > 0).all()
    # Where anything varies at all, the estimate is the plain one.
    assert reliability.pooled_variance(np.array([0.0, 2]), np.full(2, 5.0))[0] == 0


def test_chains_that_all_end_alike_have_no_known_reliability():
    steps = pd.DataFrame(
        [(f"m{i}", "b", f"{k} in a row", "step_rate", float(i > 1)) for i in range(4) for k in range(1, 6)],
        columns=["model", "benchmark", "task", "metric", "value"],
    )
    capability, performance = tables([1, 2, 3, 5], [0.0, 0, 5, 5], metric="avg_len", episodes=20)
    pair = only(correlate(capability, pd.concat([performance, steps])))
    assert pair.reliability is None and pair.homogeneity is None and "not known" in pair.attenuated.refused


# --- homogeneity ----------------------------------------------------------------------------------------------


def states_table(seed, models=4, states=12, effect=0.0):
    """Outcomes whose success depends on the initial state a lot and on the model by `effect`."""
    rng = np.random.default_rng(seed)
    easy = rng.normal(0, 3, size=states)
    chance = 1 / (1 + np.exp(-(easy + effect * np.arange(models)[:, None])))
    return (rng.random((models, states)) < chance).astype(float)[..., None]  # (models, states, repeats)


def test_shuffling_within_states_equals_enumeration():
    outcomes = states_table(0, models=3, states=5, effect=1.5)[..., 0]
    observed, hits, total = outcomes.sum(axis=1).var(), 0, 0
    for orders in itertools.product(itertools.permutations(range(3)), repeat=5):
        mixed_up = np.array([outcomes[list(order), state] for state, order in enumerate(orders)])
        hits += mixed_up.sum(axis=0).var() >= observed - 1e-9
        total += 1
    found = homogeneity._shuffled_within_states([outcomes[..., None]], seed=0)
    assert 0.02 < hits / total < 0.7  # neither end would show whether anything was shuffled
    assert found == pytest.approx(hits / total, abs=4 * np.sqrt(0.25 / 10_000))


def test_initial_states_that_every_model_ran_make_the_sharper_test():
    outcomes = states_table(3, models=4, states=60, effect=0.8)
    rows = [(f"m{m}", "b", "t", state, outcomes[m, state, 0]) for m in range(4) for state in range(outcomes.shape[1])]
    episodes = pd.DataFrame(rows, columns=["model", "benchmark", "task", "env_seed", "success"])
    value = 100 * outcomes.mean(axis=(1, 2))
    inputs = tables([1, 2, 3, 5], value, metric="success_pct")
    paired = only(correlate(*inputs, episodes)).homogeneity
    unpaired = only(correlate(*inputs, episodes.drop(columns="env_seed"))).homogeneity
    assert paired.null == "within task and initial state" and unpaired.null == "within task"
    assert paired.p_stratified < unpaired.p_stratified / 2
    assert paired.per_task == unpaired.per_task
    # Each model on states of its own: nothing can change hands within a state.
    own = episodes.assign(env_seed=episodes["env_seed"] + 100 * episodes["model"].str[1].astype(int))
    assert only(correlate(*inputs, own)).homogeneity.null == "within task"


def test_tasks_that_cancel_are_found_by_holm_and_interaction(published):
    found = published[BRIDGE].homogeneity
    assert found.p > 0.05 and found.interaction.p < 0.01 and found.interaction.p_chi2 < 1e-4
    telling = {task for task, p in found.per_task_holm.items() if p < 0.05}
    assert telling == {"carrot_on_plate", "eggplant_in_basket", "stack_cubes"}
    alone = list(found.per_task.values())
    from statsmodels.stats.multitest import multipletests

    assert list(found.per_task_holm.values()) == pytest.approx(multipletests(alone, method="holm")[1])
    assert found.per_task_permutation["eggplant_in_basket"] == pytest.approx(0.012, abs=0.004)
    assert found.null == "within task" and found.p_stratified_stderr < 5e-4


def test_shuffled_p_of_a_task_equals_scipys_fisher_test():
    k, n = np.array([[1.0], [6.0]]), np.full((2, 1), 8.0)
    found = homogeneity.homogeneity(k[:, 0], n[:, 0], TaskCounts(("t",), k, n), draws=40_000)
    exact = stats.fisher_exact([[1, 7], [6, 2]]).pvalue  # equal margins: the same tables count
    assert found.per_task_permutation["t"] == pytest.approx(exact, abs=0.004)


# --- lineages ------------------------------------------------------------------------------------------------


def test_centred_test_equals_brute_force_and_the_papers_value(published):
    own = published[CALVIN].within_lineage_centred
    assert own.arrangements == 1440 and own.p == pytest.approx(0.52, abs=5e-3)
    x, y = np.array([0.0, 1, 4, 2, 7, 3]), np.array([5.0, 2, 8, 8, 1, 9])
    kin = list("aabbbc")
    groups = [[0, 1], [2, 3, 4], [5]]

    def r(order):
        a, b = x[list(order)].copy(), y.copy()
        for group in groups:
            a[group] -= a[group].mean()
            b[group] -= b[group].mean()
        return np.corrcoef(a, b)[0, 1]

    every = [
        [*first, *second, 5] for first in itertools.permutations([0, 1]) for second in itertools.permutations([2, 3, 4])
    ]
    null = np.abs([r(order) for order in every])
    found = lineages.centred_test(x, y, kin)
    assert found.r == pytest.approx(r(range(6))) and found.arrangements == 12
    assert found.p == pytest.approx((null >= abs(found.r) - 1e-12).mean())
    assert lineages.centred_test(x, y, list("abcdef")) is None


def test_partial_correlation_given_lineage_is_what_the_centred_r_is(published):
    import statsmodels.api as sm

    pair = published[CALVIN]
    x, y = (np.array([getattr(point, side) for point in pair.points]) for side in "xy")
    dummies = pd.get_dummies([point.lineage for point in pair.points]).to_numpy(float)
    left, right = (sm.OLS(side, dummies).fit().resid for side in (x, y))
    assert pair.within_lineage_centred.r == pytest.approx(np.corrcoef(left, right)[0, 1])


def test_false_alarms_grow_with_what_lineages_share(published):
    rates = published[CALVIN].false_alarms
    assert list(rates) == ["0.5", "0.7", "0.9"]
    for share, low, high in (("0.5", 0.07, 0.10), ("0.7", 0.12, 0.16), ("0.9", 0.24, 0.35)):
        assert low < rates[share] < high  # independently simulated: 8-9, 13-15, 24-32 %
    assert lineages.false_alarms(list("abcd")) is None and lineages.false_alarms(["a", "a", "b"]) is None


# --- verdicts that few models allow ----------------------------------------------------------------------------


def test_four_models_allow_no_verdict_and_five_do():
    x = np.array([0.0, 1, 3, 9, 20])  # no mirror image of itself, so that one arrangement of 24 reaches |r|
    y = x + np.array([0, 0.2, 0.1, 0.3, 0])
    four = only(correlate(*tables(x[:4], y[:4])))
    assert four.pearson.p_exact < 0.05 and four.pearson.ci_fisher.low > 0
    assert four.verdict == "undetermined" and "4 models are too few" in four.why
    assert only(correlate(*tables(x, y))).verdict == "positive"


def test_a_sign_that_turns_without_a_lineage_is_no_verdict():
    x = [0, 1, 2, 3, 4, 20, 21, 22, 23]
    y = [4, 3, 2, 1, 0, 30, 31, 32, 33.5]
    pair = only(correlate(*tables(x, y, "aaaaabbbb")))
    assert pair.pearson.r > 0.9 and pair.leave_one_lineage_out["b"]["r"] < -0.9
    assert pair.verdict == "undetermined" and "without the b lineage (n 5)" in pair.why
    fewer = only(correlate(*tables(x[1:], y[1:], "aaaabbbb")))  # leaves four: no verdict uses it
    assert "lineage (n" not in fewer.why and fewer.verdict != "undetermined"


def test_pairs_of_few_models_do_not_decide_for_the_others():
    rng = np.random.default_rng(1)
    x = np.arange(8.0)
    good = x + rng.normal(0, 1.0, 8)
    models = [f"m{i}" for i in range(8)]
    few = [(models[i], f"few{j}", v) for j in range(6) for i, v in enumerate(rng.normal(size=4))]
    rows = [(model, "good", value) for model, value in zip(models, good, strict=True)] + few
    performance = pd.DataFrame(rows, columns=["model", "benchmark", "value"])
    result = correlate(pd.DataFrame({"model": models, "score": x}), performance)
    pair = next(pair for pair in result.pairs if pair.benchmark == "good")
    assert pair.p_holm < 0.05 and pair.p_max_r < 0.05 and pair.verdict == "positive"


# --- equivalence and outlook ----------------------------------------------------------------------------------


def test_equivalence_needs_93_models_and_fails_below_32(published):
    assert (power.equivalence_floor(0.3), power.equivalence_n(0.3)) == (32, 93)
    for pair in published.values():
        found = pair.equivalence
        assert (found.margin, found.n_for_80_power, found.cannot_succeed_below) == (0.3, 93, 32) and found.p > 0.05
    rng = np.random.default_rng(0)
    r = intervals.pearson(rng.normal(size=(20_000, 93)), rng.normal(size=(20_000, 93)))
    succeeded = np.mean([intervals.equivalence_p(one, 93, 0.3) < 0.05 for one in r[:4000]])
    assert power.equivalence_power(93) == pytest.approx(succeeded, abs=4 * np.sqrt(0.16 / 4000))


def test_outlook_follows_spearman_brown(published):
    found = published[BRIDGE].power
    share = published[BRIDGE].reliability.stratified
    assert found.episodes == 96 and found.chances[1].power_true == pytest.approx(power.power_of_r(0.8, 9))
    assert found.chances[1].power == pytest.approx(power.power_of_r(0.8 * share**0.5, 9))
    for more in found.over_episodes:  # Spearman-Brown: m rho / (1 + (m - 1) rho)
        m = more.episodes / 96
        assert more.reliability == pytest.approx(m * share / (1 + (m - 1) * share))
    m = found.episodes_for_reliability / 96
    assert m * share / (1 + (m - 1) * share) == pytest.approx(0.8, abs=2e-3)
    unknown = outlook(9, None, None)
    assert unknown.over_episodes == () and unknown.chances[0].power is None
    json.dumps(only(correlate(*tables([1, 2, 3], [1, 3, 2]))).to_dict(), default=str)


# --- the mixed model among its pairs -----------------------------------------------------------------------------


def test_mixed_model_says_what_it_cannot_estimate():
    x = np.array([-1.5, -0.5, 0.5, 1.5])
    n = np.full((4, 1), 20.0)
    assert "separated" in mixed.fit(np.array([[0.0], [0], [20], [20]]), n, x)
    assert "alike" in mixed.fit(np.zeros((4, 1)), n, x)
    assert "too few" in mixed.fit(np.array([[1.0], [2], [3]]), n[:3], x[:3])
    none = only(correlate(*tables([1, 2, 3, 4], [1, 3, 2, 5]))).mixed
    assert none.pooled is None and "no counts" in none.refused["pooled"]


def test_chain_positions_are_conditional_binomials(published):
    found = published[CALVIN].mixed
    assert found.counts == "positions in the chain" and list(found.per_task) == [f"{k} in a row" for k in range(1, 6)]
    assert found.pooled.slope > 0 and found.pooled.ci.low > 0  # agrees with r


# --- totals against what stands below -----------------------------------------------------------------------------


def episodes_of(successes, number=20):
    rows = [(f"m{m}", "b", "t", e, e < k) for m, k in enumerate(successes) for e in range(number)]
    return pd.DataFrame(rows, columns=["model", "benchmark", "task", "episode", "success"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"successes": [5, 10, 8, 16], "episodes": 20}, "8 successes of 20 episodes in perf.csv, but 9 of 20 in rows"),
        ({"episodes": 30}, "a total of 30 episodes in perf.csv, but 5 of 20 in rows"),
        ({"metric": "success_pct"}, "m2 on b: success_pct 40 in perf.csv, but 9 of 20 episodes in rows.parquet"),
    ],
)
def test_totals_that_contradict_the_episodes_name_both(columns, message):
    inputs = tables([1, 2, 3, 5], [25.0, 50, 40, 80], **columns)
    with pytest.raises(InputError, match=message):
        correlate(*inputs, episodes_of([5, 10, 9, 16]), names=("cap.csv", "perf.csv", "rows.parquet"))
    correlate(*tables([1, 2, 3, 5], [25.0, 50, 45, 80], successes=[5, 10, 9, 16]), episodes_of([5, 10, 9, 16]))


def test_a_total_that_contradicts_its_tasks_names_both():
    capability, performance = tables([1, 2, 3, 5], [25.0, 50, 40, 80], successes=[5, 10, 8, 16], episodes=20)
    below = [performance.assign(task=name, successes=[2, 5, 4, 8], episodes=10) for name in ("near", "far")]
    with pytest.raises(InputError, match=r"m0 on b: 5 successes of 20 episodes in perf.csv, but 4 of 20 in its tasks"):
        correlate(capability, pd.concat([performance, *below]), names=("cap.csv", "perf.csv", ""))
    correlate(capability, pd.concat([performance, below[0]]))  # one task of several: nothing to compare with
