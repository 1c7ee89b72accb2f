"""The notebook `benchmark_power` says what `power` and the paper's tables say."""

from __future__ import annotations

import pytest
from test_notebooks import play

from probes import tables
from probes.power import plan, reference
from probes.report.views import benchmark_power as view


def test_benchmark_power(tmp_path, monkeypatch):
    results = play("benchmark_power", tmp_path, monkeypatch)
    found = plan(9, 96, reference=reference("bridge"))
    assert results["numbers"]["plan"]["power"] == pytest.approx(found.power)
    told = results["answer"]
    assert told.startswith("On a benchmark like SimplerEnv-Bridge, 9 models with 96 episodes each show a true")
    assert "with probability 0.47 (0.82 with endless episodes); 17 models or 2,355 episodes each would lift" in told
    assert told.endswith("7 of 12 for freezing, 0 of 4 for injection, 5 of 5 for scratch.")
    assert {badge["key"] for badge in results["badges"]} == {"published"}
    assert (tmp_path / results["figure"]["narrow"]).is_file()


def test_other_designs_are_told_as_they_are():
    shown = {"freezing": tables.contrasts("freezing")}
    told = []
    for models, episodes, rho in ((40, 2000, 0.9), (4, 96, 0.5)):
        params = view_params(models, episodes, rho)
        told.append(view.answer(params, view.design(params), shown))
    assert "which is enough" in told[0]
    assert (
        "models would lift that to 0.80" in told[1] and "episodes each would lift" not in told[1]
    )  # four never show it


def view_params(models: int, episodes: int, rho: float):
    from probes.report.params import BenchmarkPowerParams

    return BenchmarkPowerParams(models=models, episodes=episodes, rho=rho, like="libero")


def test_reliability_of_the_papers_benchmarks():
    """The interval of the reliability is that of the spread, and holds it."""
    known = view.references()
    for like, (one, found) in known.items():
        low, high = view._reliabilities(like, one)
        assert low < found.reliability < high
    assert view.reference_table(known)["reliability"].tolist() == ["0.98", "0.61", "0.78"]
