"""The statistics against R: base R, boot and lme4 (tests/oracles/*.R made the numbers; no R is needed here)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from probes import homogeneity, intervals, mixed, paper
from probes.correlation import correlate
from probes.permutation import holm, permutation_test
from vlm4vla_core.results import clopper_pearson, wilson

FOLDER = Path(__file__).parent.parent / "oracles"
R = json.loads((FOLDER / "statistics.json").read_text())
MIXED = json.loads((FOLDER / "mixed.json").read_text())
BRIDGE = {  # successes of 24, models in the paper's order
    "carrot": [9, 12, 18, 5, 3, 5, 13, 14, 7],
    "eggplant": [24, 22, 18, 22, 24, 23, 23, 23, 19],
    "spoon": [18, 18, 19, 19, 18, 19, 18, 19, 17],
    "cubes": [7, 1, 0, 0, 0, 0, 0, 0, 0],
}
TASKS = {
    "carrot": "carrot_on_plate",
    "eggplant": "eggplant_in_basket",
    "spoon": "spoon_on_towel",
    "cubes": "stack_cubes",
}
LIBERO = [275, 221, 231, 215, 225, 279, 222, 231, 234]


@pytest.fixture(scope="module")
def published():
    return {pair.benchmark: pair for pair in correlate(paper.capability(), paper.performance()).pairs}


@pytest.mark.parametrize("name", list(R["pairs"]))
def test_coefficients_and_intervals_equal_r(published, name):
    pair, reference = published[name], R["pairs"][name]
    assert pair.pearson.r == pytest.approx(reference["pearson"], abs=1e-10)
    assert pair.spearman.r == pytest.approx(reference["spearman"], abs=1e-10)
    assert pair.pearson.ci_fisher == pytest.approx(reference["fisher"], abs=1e-9)
    # Two bootstraps of their own draws: R's with 40,000, ours with 10,000.
    assert pair.pearson.ci_bca == pytest.approx(reference["bca"], abs=0.03)
    assert pair.spearman.ci_bca == pytest.approx(reference["bca_spearman"], abs=0.05)


@pytest.mark.parametrize("name", list(R["exact_of_first_seven"]))
def test_exact_p_equals_rs_enumeration(published, name):
    from scipy.stats import rankdata

    points = published[name].points[:7]
    x, y = (np.array([getattr(point, side) for point in points]) for side in "xy")
    reference = R["exact_of_first_seven"][name]
    assert permutation_test(x[:, None], y[:, None]).p[0, 0] == pytest.approx(reference["pearson"], abs=1e-12)
    ranks = permutation_test(rankdata(x)[:, None], rankdata(y)[:, None])
    assert ranks.p[0, 0] == pytest.approx(reference["spearman"], abs=1e-12)


def test_holm_and_intervals_of_proportions_equal_r():
    assert holm(R["holm"]["p"]) == pytest.approx(R["holm"]["adjusted"])
    for case in R["proportions"]:
        assert clopper_pearson(case["k"], case["n"]) == pytest.approx(case["clopper_pearson"], abs=1e-9)
        assert wilson(case["k"], case["n"]) == pytest.approx(case["wilson"], abs=1e-9)


def test_homogeneity_and_interaction_equal_r(published):
    found, reference = published["SimplerEnv-Bridge"].homogeneity, R["homogeneity"]
    assert (found.chi2, found.p) == pytest.approx((reference["pooled"]["statistic"], reference["pooled"]["p.value"]))
    for task, p in reference["per_task"].items():
        assert found.per_task[TASKS[task]] == pytest.approx(p)
    both = found.interaction
    expected = reference["interaction"]
    assert (both.deviance, both.df, both.p_chi2) == pytest.approx((expected["deviance"], expected["df"], expected["p"]))


# --- the mixed model --------------------------------------------------------------------------------------


def standard(x):
    x = np.asarray(x, dtype=float)
    return (x - x.mean()) / x.std(ddof=1)


def data(name):
    """(successes, episodes, x) of a fit of mixed.json."""
    if name.startswith("random_"):
        return np.array(MIXED["random"]["abcd".index(name[-1])]), 30, standard(MIXED["random_x"])
    x = standard(paper.capability()["score"])
    return (np.array(LIBERO), 500, x) if name == "libero" else (np.array(BRIDGE[name]), 24, x)


@pytest.mark.parametrize("nodes", [1, 9, 25])
@pytest.mark.parametrize("name", list(MIXED["nodes_1"]))
def test_mixed_model_of_one_task_equals_glmer(name, nodes):
    k, n, x = data(name)
    found, reference = mixed.fit(k[:, None], np.full((len(k), 1), n), x, nodes), MIXED[f"nodes_{nodes}"][name]
    assert found.slope == pytest.approx(reference["slope"], rel=1e-3, abs=2e-4)
    assert found.stderr == pytest.approx(reference["stderr"], rel=3e-3)
    assert found.sd_model == pytest.approx(reference["sd"]["model"], abs=1e-3)
    if nodes == 1:  # with more nodes glmer counts its log-likelihood from another zero
        assert found.log_likelihood == pytest.approx(reference["loglik"], abs=1e-4)


@pytest.mark.parametrize("name", ["bridge", "random"])
def test_mixed_model_over_tasks_equals_glmer(name):
    if name == "bridge":
        k, n, x = np.array(list(BRIDGE.values())).T, 24, standard(paper.capability()["score"])
    else:
        k, n, x = np.array(MIXED["random"]).T, 30, standard(MIXED["random_x"])
    found, reference = mixed.fit(k, np.full(k.shape, n), x), MIXED["pooled"][name]
    assert found.slope == pytest.approx(reference["slope"], rel=1e-3)
    assert found.stderr == pytest.approx(reference["stderr"], rel=1e-3)
    assert found.log_likelihood == pytest.approx(reference["loglik"], abs=1e-3)
    assert found.sd_model == pytest.approx(reference["sd"]["model"], abs=1e-3)
    assert found.sd_model_task == pytest.approx(reference["sd"]["model:task"], abs=1e-3)


def test_published_pairs_carry_these_fits(published):
    bridge = published["SimplerEnv-Bridge"].mixed
    assert bridge.pooled.slope == pytest.approx(MIXED["pooled"]["bridge"]["slope"], rel=1e-3)
    for task, name in TASKS.items():
        assert bridge.per_task[name].slope == pytest.approx(MIXED["nodes_9"][task]["slope"], rel=1e-3)
    assert published["LIBERO-10"].mixed.pooled.slope == pytest.approx(MIXED["nodes_9"]["libero"]["slope"], rel=1e-3)
    assert bridge.counts == "tasks" and published["LIBERO-10"].mixed.counts == "totals"


def test_without_differences_between_models_it_is_logistic_regression():
    import statsmodels.api as sm

    rng = np.random.default_rng(0)
    x = standard(rng.normal(size=8))
    n = np.full((8, 1), 50)
    k = np.round(n / (1 + np.exp(-0.3 - 0.7 * x[:, None])))  # no more spread than the binomial has
    found = mixed.fit(k, n, x)
    reference = sm.GLM(np.column_stack([k, n - k]), sm.add_constant(x), family=sm.families.Binomial()).fit()
    assert found.sd_model == 0
    assert (found.slope, found.stderr) == pytest.approx((reference.params[1], reference.bse[1]), rel=1e-4)
    half = 2.4469119 * found.stderr * np.sqrt(8 / 6)  # t on 6 df
    assert found.ci == pytest.approx((found.slope - half, found.slope + half), rel=1e-6)


def test_interaction_is_none_of_additive_and_all_of_crossed_tables():
    n = np.full((4, 2), 40.0)
    additive = homogeneity.interaction(np.array([[8.0, 16], [12, 21], [16, 26], [21, 30]]), n, draws=300)
    crossed = homogeneity.interaction(np.array([[4.0, 36], [36, 4], [4, 36], [36, 4]]), n, draws=300)
    assert additive.deviance < 1 and additive.p > 0.5 and crossed.p == pytest.approx(1 / 301)
    # A task that nobody does and a model that always succeeds say nothing and carry no degrees of freedom.
    k = np.array([[8.0, 16, 0], [12, 21, 0], [16, 26, 0], [40, 40, 0]])
    assert homogeneity.interaction(k, np.full((4, 3), 40.0), draws=50).df == (3 - 1) * (2 - 1)


def test_equivalence_p_is_the_90_percent_fisher_interval():
    for r, n in ((0.05, 40), (0.1, 93), (-0.2, 60), (0.0, 32), (0.0, 31)):
        narrow = intervals.fisher(r, n, 0.90)
        assert (intervals.equivalence_p(r, n, 0.3) < 0.05) == (max(-narrow.low, narrow.high) < 0.3)
