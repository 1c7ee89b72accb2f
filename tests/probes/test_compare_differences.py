"""Intervals and tests of differences: against R, statsmodels, scipy, published values, enumeration, and definitions."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, permutation_test, ttest_ind
from scipy.stats import bootstrap as scipy_bootstrap
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from probes.differences import bootstrap, letters, newcombe, sign_flip, tango, welch
from probes.permutation import holm
from vlm4vla_core.results import clopper_pearson, wilson

R = json.loads((Path(__file__).parent.parent / "oracles" / "compare.json").read_text())
quick = settings(deadline=None, derandomize=True, max_examples=60)


# --- against R ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", R["mcnemar"], ids=lambda case: str(case["pair"]))
def test_paired_counts_equal_r(case):
    b, c, *rest = case["pair"]
    outcomes = np.r_[np.ones(b), -np.ones(c), np.zeros(sum(rest))]
    p, mid = sign_flip(outcomes)
    assert p == pytest.approx(case["p"], rel=1e-9) and mid == pytest.approx(case["mid_p"], rel=1e-9)
    for level in (0.95, 0.90):
        assert tango(b, c, sum(case["pair"]), level) == pytest.approx(case[f"tango{level * 100:.0f}"], abs=2e-6)


def test_single_rates_equal_r():
    for case in R["single"]:
        k, n = case["counts"]
        assert clopper_pearson(k, n) == pytest.approx(case["clopper_pearson"], rel=1e-9, abs=1e-12)
        assert wilson(k, n) == pytest.approx(case["wilson"], rel=1e-9, abs=1e-12)


def test_unpaired_counts_equal_r():
    from probes.compare import count_difference

    for case in R["unpaired"]:
        told = count_difference("a", "b", *case["counts"])
        assert told.p == pytest.approx(case["fisher"], rel=1e-9)
        assert told.interval == pytest.approx(case["newcombe"], rel=1e-9, abs=1e-12)


def test_sign_flips_equal_enumeration_in_r():
    for case in R["sign_flip"]:
        assert sign_flip(np.array(case["differences"])) == pytest.approx((case["p"], case["mid_p"]), rel=1e-9)


def test_bootstrap_equals_r_within_the_error_of_both():
    for case in R["bootstrap"]:
        strata = [np.array(values, dtype=float) for values in case["values"]]
        ours = bootstrap(strata, seed=3, draws=200_000)
        step = 1 / sum(map(len, strata))  # means lie on a grid
        assert ours == pytest.approx(case["bca"], abs=1.2 * step)


def test_holm_and_welch_equal_r():
    assert holm(R["holm"]["p"]) == pytest.approx(R["holm"]["adjusted"])
    assert welch(R["welch"]["a"], R["welch"]["b"]) == pytest.approx(R["welch"]["interval"])


# --- against Python libraries and published values -------------------------------------------------------------


def test_published_intervals():
    # Newcombe 1998 (unpaired), table II, comparison (a) by method 10
    assert newcombe(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    # Agresti and Min 2005, prime minister approval: 150 and 86 of 1600 changed their mind; 0.04, 0.02 to 0.06
    assert tango(150, 86, 1600) == pytest.approx((0.021, 0.059), abs=5e-4)


@quick
@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 30))
def test_mcnemar_equals_statsmodels_and_scipy(b, c, rest):
    p, mid = sign_flip(np.r_[np.ones(b), -np.ones(c), np.zeros(rest)])
    assert p == pytest.approx(mcnemar([[rest, b], [c, 0]], exact=True).pvalue, rel=1e-9)
    if b + c:
        assert p == pytest.approx(binomtest(b, b + c).pvalue, rel=1e-9)
    assert mid <= p


@quick
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.floats(0, 1))
def test_newcombe_equals_statsmodels(n1, n2, share1, share2):
    k1, k2 = round(share1 * n1), round(share2 * n2)
    assert newcombe(k1, n1, k2, n2) == pytest.approx(
        confint_proportions_2indep(k1, n1, k2, n2, method="newcomb", compare="diff"), abs=1e-9
    )


@quick
@given(st.integers(1, 200), st.floats(0, 1))
def test_single_intervals_equal_statsmodels(n, share):
    k = round(share * n)
    assert wilson(k, n) == pytest.approx(proportion_confint(k, n, method="wilson"), abs=1e-12)
    assert clopper_pearson(k, n) == pytest.approx(proportion_confint(k, n, method="beta"), abs=1e-12)


def test_sign_flip_equals_scipys_paired_permutation():
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 6, 11), rng.integers(0, 5, 11)
    reference = permutation_test(
        (a, b), lambda x, y, axis: np.abs((x - y).mean(axis=axis)), permutation_type="samples", vectorized=True,
        alternative="greater", n_resamples=np.inf,
    )  # fmt: skip
    assert sign_flip(a - b)[0] == pytest.approx(reference.pvalue)


def test_bca_equals_scipys_within_its_noise():
    values = np.random.default_rng(1).choice([0.0, 1, 2, 5], 120, p=[0.2, 0.2, 0.2, 0.4])
    reference = scipy_bootstrap(
        (values,), np.mean, n_resamples=40_000, method="BCa", random_state=np.random.default_rng(0)
    ).confidence_interval
    assert bootstrap([values], draws=40_000) == pytest.approx(tuple(reference), abs=0.015)


def test_welch_against_scipy():
    a, b = [0.5, 0.6, 0.55, 0.52], [0.41, 0.47, 0.40]
    reference = ttest_ind(a, b, equal_var=False).confidence_interval()
    assert welch(a, b) == pytest.approx(tuple(reference))
    assert welch([0.5], b) is None and welch([0.5, 0.5], [0.4, 0.4]) is None


def test_holm_equals_statsmodels():
    rng = np.random.default_rng(0)
    for n in range(1, 13):
        p = rng.choice(rng.uniform(size=n), n)  # with ties
        assert holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1])


# --- properties ---------------------------------------------------------------------------------------------


@quick
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.sampled_from((0.8, 0.9, 0.95, 0.99)))
def test_tango_holds_the_estimate_swaps_with_the_names_and_never_has_no_width(b, c, rest, level):
    if b + c + rest == 0:
        with pytest.raises(ValueError, match="no pairs"):
            tango(b, c, 0, level)
        return
    n = b + c + rest
    low, high = tango(b, c, n, level)
    assert -1 <= low <= (b - c) / n <= high <= 1 and high - low > 1e-3
    assert tango(c, b, n, level) == pytest.approx((-high, -low), abs=1e-9)


@pytest.mark.slow
def test_coverage_of_the_paired_score_interval():
    """Exact coverage over all outcomes of 40 pairs: near 95 % on average, never far below."""
    from scipy.stats import multinomial

    n = 40
    spans = {(b, c): tango(b, c, n) for b in range(n + 1) for c in range(n + 1 - b)}
    covered = []
    for p, q in ((0.05, 0.05), (0.2, 0.1), (0.3, 0.3), (0.5, 0.1), (0.02, 0.0), (0.6, 0.0)):
        mass = 0.0
        for (b, c), (low, high) in spans.items():
            if low <= p - q <= high:
                mass += float(multinomial.pmf([b, c, n - b - c], n, [p, q, 1 - p - q]))
        covered.append(mass)
    assert 0.94 < np.mean(covered) < 0.975 and min(covered) > 0.92, covered


@quick
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=10))
def test_sign_flip_equals_listing_all_signs(differences):
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
            for signs in itertools.product((-1, 1), repeat=len(differences))]  # fmt: skip
    total = abs(sum(differences))
    assert sign_flip(np.array(differences))[0] == pytest.approx(np.mean([value >= total for value in sums]))


def test_bootstrap_says_nothing_where_nothing_varies_and_is_the_same_twice():
    assert bootstrap([np.zeros(30)]) is None and bootstrap([np.ones(3), np.zeros(4)]) is None  # constant in each task
    values = [np.array([0.0, 1, 0, 1, 1]), np.array([1.0, 1, 0])]
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    assert bootstrap(values, seed=1) == bootstrap([values[0][::-1], values[1][::-1]], seed=1)


@quick
@given(
    st.integers(1, 8).flatmap(
        lambda n: st.tuples(st.just(n), st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1))))
    )
)
def test_letters_are_shared_exactly_by_those_not_told_apart(drawn):
    n, pairs = drawn
    apart = {frozenset(pair) for pair in pairs if pair[0] != pair[1]}
    groups = letters(n, lambda i, j: frozenset((i, j)) in apart)
    assert all(groups)
    for i, j in itertools.combinations(range(n), 2):
        assert (not set(groups[i]) & set(groups[j])) == (frozenset((i, j)) in apart)
    assert groups[0].startswith("a")
    every = sorted(set("".join(groups)))
    members = [{i for i in range(n) if letter in groups[i]} for letter in every]
    assert not any(a < b or (a == b and k != m) for k, a in enumerate(members) for m, b in enumerate(members))


def test_letters_of_many_groups_stay_apart():
    groups = letters(30, lambda i, j: True)
    assert len(set(groups)) == 30 and groups[0] == "a" and groups[26] == "a1"
