"""Results tables for papers: values and intervals against closed forms, and markup that survives what cells hold."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from probes.report.results_table import plain_rows, results_table
from probes.verbs.report import Args, run
from vlm4vla_core.errors import InputError


def rows(policy: str, seed: int, wins: int, n: int = 40, protocol: str = "bench@1", **more: object) -> pd.DataFrame:
    return pd.DataFrame({
        "policy": policy, "seed": seed, "protocol": protocol, "task": "touch", "env_seed": range(n), "execute": 4,
        "success": [i < wins for i in range(n)], "success_rule": "any_step", "chain": None, "partial": None, **more,
    })  # fmt: skip


def test_one_seed_has_wilson_s_interval_and_several_have_student_s():
    table = results_table(pd.concat([rows("a", 0, 1), *(rows("b", s, k) for s, k in enumerate((10, 14, 18)))]))
    assert table.head[0].startswith("policy") and table.head[1] == "bench@1^a"
    # Wilson for 1 of 40, by its closed form
    z, n, p = 1.959964, 40, 1 / 40
    middle, half = (p + z * z / 80) / (1 + z * z / n), z * np.sqrt(p * (1 - p) / n + z * z / 6400) / (1 + z * z / n)
    assert table.rows[0][1] == f"2.5 [{100 * (middle - half):.1f}, {100 * (middle + half):.1f}]"
    rates = np.array([25.0, 35.0, 45.0])
    reach = t.ppf(0.975, 2) * rates.std(ddof=1) / np.sqrt(3)
    assert table.rows[1][1] == f"35.0 [{35 - reach:.1f}, {35 + reach:.1f}] (3)"
    assert "40 episodes per policy and seed, the same initial states for all" in table.notes[0]


def test_chains_count_by_their_length_and_what_was_not_run_is_a_dash():
    chains = rows("a", 0, 0).assign(chain=[1, 3] * 20, protocol="chains@1")
    table = results_table(pd.concat([chains, rows("b", 0, 4)]))
    a, b = table.rows
    assert a[1].startswith("2.00 [") and a[2] == "–" and b[1] == "–" and b[2].startswith("10.0 [")
    assert "mean number of tasks done in a row" in table.notes[0] and "success rate" in table.notes[1]


def test_other_execute_lengths_and_task_sets_get_columns_of_their_own_and_baselines_stand_beside():
    table = results_table(pd.concat([
        rows("a", 0, 3), rows("a", 0, 5, execute=2), rows("c", 0, 5, task="push"), rows("random", 0, 1, execute=1),
        rows("scripted", 0, 40, execute=1),
    ]))  # fmt: skip
    assert len(table.head) == 4
    shown = {row[0].partition("^")[0]: row[1:] for row in table.rows}
    assert [cell != "–" for cell in shown["a"]] == [True, True, False]
    assert [cell != "–" for cell in shown["random"]] == [True, False, False]
    assert any("Reads the simulator's state" in note for note in table.notes)
    other = results_table(pd.concat([rows("a", 0, 3), rows("b", 0, 3).assign(env_seed=range(1, 41))]))
    assert "not all of them from the same initial states" in other.notes[0]


def test_markup_survives_what_names_hold():
    nasty = r"50 % of A_b & {c} <d> $e$ #f ~g ^h \i | j"
    table = results_table(rows(nasty, 0, 3))
    latex = table.latex()
    body = latex.partition("\\midrule")[2].partition("\\bottomrule")[0]
    assert not re.search(r"(?<!\\)[%$#_]", body)
    assert body.count("&") - body.count("\\&") == 1 and body.count("\\\\") == 1
    assert latex.count("{") - latex.count("\\{") == latex.count("}") - latex.count("\\}")
    assert latex.count("\\begin") == latex.count("\\end") == 3
    line = next(line for line in table.markdown().splitlines() if "50 %" in line)
    assert len(re.split(r"(?<!\\)\|", line)) == 4

    class Cells(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.texts: list[str] = []

        def handle_data(self, data: str) -> None:
            self.texts.append(data)

    reader = Cells()
    reader.feed(table.html())
    assert "".join(reader.texts).count(nasty) == 1


def test_the_verb_prints_what_was_evaluated(tmp_path, capsys):
    frame = rows("x", 0, 7).drop(columns=["policy", "seed"]).assign(
        run_id="r", model="m", init="pretrained", freeze="vision", aux="none", train_seed=0, step=5, benchmark="bench",
        episode=range(40),
    )  # fmt: skip
    (tmp_path / "eval").mkdir()
    frame.to_parquet(tmp_path / "eval" / "rows.parquet")
    words = (("rows", str(tmp_path / "*")),)
    assert run(Args("table", words, format="html", json=tmp_path / "t.json")) == 0
    assert "<th scope=row>m, vision frozen</th><td>17.5 [" in capsys.readouterr().out
    assert json.loads((tmp_path / "t.json").read_text())["rows"][0][0] == "m, vision frozen"
    for wrong, said in (
        ((), "a table of what"), ((("rows", "x"), ("study", "y")), "a table of what"),
        ((("rws", "x"),), "no parameter 'rws'"), ((("rows", str(tmp_path / "none*")),), "nothing matches"),
        ((*words, ("level", "2")), "level 2"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=re.escape(said)):
            run(Args("table", wrong))
    assert plain_rows(frame)["seed"].unique().tolist() == [0]
