"""Intervals against statsmodels, and the success table that every report prints."""

from __future__ import annotations

import hypothesis.strategies as st
import pandas as pd
import pytest
from hypothesis import given, settings
from statsmodels.stats.proportion import proportion_confint

from vlm4vla_core.errors import InputError
from vlm4vla_core.results import clopper_pearson, read_table, success_table, wilson

counts = st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@settings(deadline=None, derandomize=True)
@given(counts, st.sampled_from([0.8, 0.95, 0.99]))
def test_intervals_agree_with_statsmodels(pair: tuple[int, int], level: float) -> None:
    k, n = pair
    assert wilson(k, n, level) == pytest.approx(proportion_confint(k, n, 1 - level, "wilson"), abs=1e-12)
    exact = proportion_confint(k, n, 1 - level, "beta")
    assert clopper_pearson(k, n, level) == pytest.approx(exact, abs=1e-12)
    assert 0 <= wilson(k, n).low <= k / n <= wilson(k, n).high <= 1


@pytest.mark.parametrize(("k", "n"), [(1, 0), (3, 2), (-1, 4)])
def test_impossible_counts_are_refused(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        wilson(k, n)


def test_success_table_counts_by_group() -> None:
    rows = pd.DataFrame({"task": ["b", "a", "b", "a", "a"], "success": [True, False, True, True, False]})
    table = success_table(rows, ["task"])
    assert table["task"].tolist() == ["b", "a"]
    assert table["successes"].tolist() == [2, 1]
    assert table["episodes"].tolist() == [2, 3]
    assert table["low"][1] == pytest.approx(proportion_confint(1, 3, method="wilson")[0])


def test_read_table_names_what_is_wrong(tmp_path) -> None:
    with pytest.raises(InputError, match="no such table"):
        read_table(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("model,score\nx,1\n")
    assert read_table(tmp_path / "a.csv", required=("model",))["score"].tolist() == [1]
    with pytest.raises(InputError, match=r"missing column value.*the table has: model, score"):
        read_table(tmp_path / "a.csv", required=("model", "value"))
    (tmp_path / "b.csv").write_text("model,score\n")
    with pytest.raises(InputError, match="no rows"):
        read_table(tmp_path / "b.csv")
    (tmp_path / "c.parquet").write_text("no parquet")
    with pytest.raises(InputError, match="cannot be read"):
        read_table(tmp_path / "c.parquet")
