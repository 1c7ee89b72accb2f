"""What models and episodes can show: against R's noncentral t, simulation with known truth, and published anchors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from probes import paper
from probes.correlation import correlate
from probes.power import (
    Reference,
    critical_r,
    density_of_r,
    detectable_rho,
    equivalence_floor,
    equivalence_n,
    equivalence_power,
    expected_r,
    models_for_power,
    plan,
    power_of_r,
    reference,
    reliability_of,
)
from vlm4vla_core.cli import main

R = json.loads((Path(__file__).parent.parent / "oracles" / "compare.json").read_text())
quick = settings(deadline=None, derandomize=True, max_examples=40)


def test_power_equals_r():
    for case in R["power"]:
        assert power_of_r(case["rho"], case["n"]) == pytest.approx(case["power"], abs=2e-7), case


def test_power_of_many_models_equals_the_limit_of_fisher():
    from scipy.stats import norm

    for rho, n in ((0.5, 500), (0.1, 1000), (0.05, 5000), (-0.05, 5000), (0.02, 20_000)):
        shift = np.arctanh(rho) * np.sqrt(n - 3)
        assert power_of_r(rho, n) == pytest.approx(norm.sf(1.96 - shift) + norm.cdf(-1.96 - shift), abs=0.006)


def test_expected_r_equals_r_and_the_density():
    for case in R["expected_r"]:
        assert expected_r(case["rho"], case["n"]) == pytest.approx(case["r"], abs=1e-5)
    for rho, n in ((0.5, 9), (-0.3, 6), (0.9, 30)):
        whole, mean = (
            integrate.quad(lambda r, k=k, rho=rho, n=n: float(r**k * density_of_r(np.array(r), rho, n)), -1, 1)[0]
            for k in (0, 1)
        )
        assert whole == pytest.approx(1, abs=1e-7) and expected_r(rho, n) == pytest.approx(mean, abs=1e-7)


def test_anchors_at_nine_models():
    """Critical |r| 0.666; power 28, 62, 82, 97 % at rho 0.5, 0.7, 0.8, 0.9; about 29 models for 0.5."""
    assert critical_r(9) == pytest.approx(0.666, abs=5e-4)
    assert [power_of_r(rho, 9) for rho in (0.5, 0.7, 0.8, 0.9)] == pytest.approx([0.28, 0.62, 0.82, 0.97], abs=0.012)
    assert models_for_power(0.5) == 29
    assert power_of_r(detectable_rho(9), 9) == pytest.approx(0.8, abs=1e-5)


@quick
@given(st.floats(0.03, 0.97), st.floats(0.2, 0.95))
def test_models_for_power_is_the_least_that_does(rho, power):
    n = models_for_power(rho, power)
    assert power_of_r(rho, n) >= power and (n == 3 or power_of_r(rho, n - 1) < power)
    assert models_for_power(-rho, power) == n


def test_models_for_no_correlation_are_none():
    assert models_for_power(0.0) is None and models_for_power(1e-5) is None


def test_equivalence():
    assert equivalence_floor() == 32 and equivalence_power(31) == 0 < equivalence_power(32)
    assert abs(equivalence_n() - 93) <= 1


@quick
@given(st.floats(0.01, 0.2), st.floats(0.05, 0.25), st.integers(1, 5000), st.integers(4, 40), st.floats(0.1, 0.95))
def test_more_episodes_models_and_correlation_never_hurt(spread, noise, episodes, models, rho):
    like = Reference("mine", 9, 0.5, spread, None, noise, None, 1)  # type: ignore[arg-type]
    told = plan(models, episodes, rho=rho, reference=like, grid=((4, 12), (10, 1000)))
    assert 0 < told.reliability < 1 and told.power <= told.power_true + 1e-9
    assert told.episodes_for_reliability is not None
    assert reliability_of(spread, noise, told.episodes_for_reliability) >= 0.8 - 1e-9
    if told.episodes_for_reliability > 1:
        assert reliability_of(spread, noise, told.episodes_for_reliability - 1) < 0.8
    if told.episodes_needed is not None:
        seen = rho * reliability_of(spread, noise, told.episodes_needed) ** 0.5
        assert power_of_r(seen, models) >= 0.8 - 1e-6
    else:
        assert told.power_true <= 0.8 + 1e-6
    frame = told.to_frame()
    assert (np.diff(frame.to_numpy(), axis=0) > -1e-9).all() and (np.diff(frame.to_numpy(), axis=1) > -1e-9).all()
    assert frame.loc[models, episodes] == pytest.approx(told.power)


# --- the reference and the paper ---------------------------------------------------------------------------------


def test_reference_has_the_reliability_that_correlate_reports():
    pairs = {pair.benchmark: pair for pair in correlate(paper.capability(), paper.performance()).pairs}
    for like, episodes in (("bridge", 96), ("libero", 500), ("calvin", 1000)):
        ours = reference(like)  # type: ignore[arg-type]
        told = pairs[ours.name].reliability
        assert plan(9, episodes, reference=ours).reliability == pytest.approx(told.best, rel=1e-6)


def test_bridge_by_hand():
    counts = np.array([[12, 22, 18, 1], [18, 18, 19, 0], [9, 24, 18, 7], [5, 22, 19, 0], [3, 24, 18, 0],
                       [5, 23, 19, 0], [13, 23, 18, 0], [14, 23, 19, 0], [7, 19, 17, 0]])  # fmt: skip
    like, rates = reference("bridge"), counts / 24
    noise = (rates * (1 - rates) / 23).sum(axis=1).mean() / 16
    assert like.mean == pytest.approx(rates.mean()) and like.tasks == 4
    assert like.spread == pytest.approx((rates.mean(axis=1).var(ddof=1) - noise) ** 0.5)
    assert like.within_task == pytest.approx(96 * noise)
    # episodes pooled at one rate, as in the anchors: reliability about 0.22, power 17 %, some 1,300 episodes for 0.8
    pooled = (rates.mean(axis=1) * (1 - rates.mean(axis=1)) / 96).mean()
    spread = (rates.mean(axis=1).var(ddof=1) - pooled) ** 0.5
    told = plan(9, 96, tasks=1, spread=spread, reference=like)
    assert told.reliability == pytest.approx(0.22, abs=0.005) and told.power == pytest.approx(0.17, abs=0.005)
    assert told.episodes_for_reliability == pytest.approx(1334, abs=10)


# --- simulation with known truth ----------------------------------------------------------------------------------

TASKS = np.array([0.25, 0.75, 0.45, 0.65])


def simulate(models: int, episodes: int, rho: float, spread: float, studies: int, seed: int) -> tuple[float, float]:
    """(share of significant studies, mean r) over binomial outcomes of models whose true rates differ in all tasks."""
    rng = np.random.default_rng(seed)
    better = rng.normal(size=(studies, models))
    capability = rho * better + (1 - rho**2) ** 0.5 * rng.normal(size=better.shape)
    rates = np.clip(TASKS + spread * better[..., None], 0, 1)  # (studies, models, tasks)
    scores = rng.binomial(episodes // len(TASKS), rates).sum(axis=-1) / episodes
    x, y = (v - v.mean(axis=1, keepdims=True) for v in (capability, scores))
    r = (x * y).sum(axis=1) / np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    return float((np.abs(r) >= critical_r(models)).mean()), float(r.mean())


def check_against_simulation(models: int, episodes: int, rho: float, spread: float, studies: int) -> None:
    within = float((TASKS * (1 - TASKS)).mean() - spread**2)  # E[p(1-p)] of a rate that spreads
    like = Reference("simulated", 9, 0.5, spread, None, 0.25, within, 4)  # type: ignore[arg-type]
    told = plan(models, episodes, rho=rho, reference=like, grid=((), ()))
    power, r = simulate(models, episodes, rho, spread, studies, seed=models * episodes)
    error = (told.power * (1 - told.power) / studies) ** 0.5
    assert power == pytest.approx(told.power, abs=4 * error + 0.003), (models, episodes, rho, spread)
    assert r == pytest.approx(told.expected, abs=4 * (1 / (models * studies)) ** 0.5 + 0.003)


@pytest.mark.parametrize(("models", "episodes"), [(9, 96), (20, 96), (9, 400)])
def test_power_agrees_with_simulation(models, episodes):
    check_against_simulation(models, episodes, 0.8, 0.05, 8_000)


@pytest.mark.slow
@pytest.mark.parametrize("models", [6, 9, 15, 30])
@pytest.mark.parametrize("rho", [0.0001, 0.5, 0.8, -0.9])
def test_power_agrees_with_long_simulations(models, rho):
    for episodes in (48, 96, 500):
        for spread in (0.02, 0.06):
            check_against_simulation(models, episodes, rho, spread, 40_000)


# --- the verb -----------------------------------------------------------------------------------------------------


def test_verb_prints_writes_and_draws(capsys, tmp_path):
    out = ["--json", str(tmp_path / "p.json"), "--plot", str(tmp_path / "p.png")]
    assert main(["power", "--models", "9", "--episodes", "96", *out]) == 0
    text = capsys.readouterr().out
    for words in ("9 models, 96 episodes each in 4 tasks", "the paper's 9 models on SimplerEnv-Bridge", "upper bounds"):
        assert words.lower() in text.lower().replace("\n ", ""), words
    values = json.loads((tmp_path / "p.json").read_text())
    assert values["power"] == pytest.approx(0.4715, abs=1e-4) and values["reliability"] == pytest.approx(
        0.607, abs=1e-3
    )
    assert {"models": 9, "episodes": 96, "power": pytest.approx(values["power"])} in values["grid"]
    assert values["spread_from"].startswith("the paper's 9 models") and values["equivalence"]["floor"] == 32
    assert {path.name for path in tmp_path.iterdir()} == {"p.json", "p.png", "p.svg"}


@pytest.mark.parametrize("like", ["libero", "calvin"])
def test_other_references_and_no_spread(capsys, like):
    assert main(["power", "--like", like, "--episodes", "500", "--rho", "-0.6"]) == 0
    assert main(["power", "--like", like, "--spread", "0"]) == 0
    assert "no spread, none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "3"], "--models 3"),
        (["--episodes", "0"], "--episodes 0"),
        (["--tasks", "0"], "--tasks 0"),
        (["--tasks", "9", "--episodes", "4"], "4 episodes for 9 tasks"),
        (["--rho", "1"], "--rho 1"),
        (["--rho", "0"], "--rho 0"),
        (["--spread", "5"], "not per cent"),
        (["--power", "1.2"], "--power 1.2"),
        (["--power", "0.04"], "no more than --alpha"),
        (["--models", "20000"], "at most 10000"),
        (["--plot", "x.gif"], "a plot is"),
    ],
)
def test_bad_input_is_one_line(capsys, words, message):
    assert main(["power", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
