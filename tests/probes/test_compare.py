"""Policies compared from their episode rows: pairing, refusals, seeds, chains, groups; and the verb."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from probes.compare import ALL, compare
from probes.differences import tango
from probes.episode_rows import read_rows
from vlm4vla_core.cli import main
from vlm4vla_core.errors import InputError
from vlm4vla_core.results import EPISODE_COLUMNS


def rows(model: str, outcomes: dict[str, Any], kind: str = "success", **more: Any) -> pd.DataFrame:
    """Episode rows of one policy. outcomes: task -> outcome of episode 0, 1, …"""
    told = [
        {**dict.fromkeys(EPISODE_COLUMNS), "run_id": f"run-{model}", "model": model, "benchmark": "bench",
         "protocol": "bench@1", "task": task, "episode": i, "env_seed": 100 + i, "execute": 4, "step": 10,
         "success": bool(value) if kind == "success" else value == 5, "success_rule": "any_step",
         "chain": None if kind == "success" else int(value), **more}
        for task, values in outcomes.items() for i, value in enumerate(values)
    ]  # fmt: skip
    return pd.DataFrame(told, columns=list(EPISODE_COLUMNS)).astype(object)


def joined(*frames: pd.DataFrame) -> pd.DataFrame:
    return pd.concat(frames, ignore_index=True)


A = {"pick": [1, 1, 1, 1, 0, 0, 1, 1], "push": [1, 0, 0, 1]}
B = {"pick": [0, 1, 0, 1, 0, 1, 0, 0], "push": [1, 0, 1, 0]}


def test_two_policies_by_hand():
    result = compare(joined(rows("A", A), rows("B", B)), ["A", "B"])
    (whole,) = result.differences
    # pick: A alone at 0, 2, 6, 7, B alone at 5; push: A alone at 3, B alone at 2
    assert (whole.a_only, whole.b_only, whole.both, whole.neither, whole.n) == (5, 2, 3, 2, 12)
    assert whole.difference == pytest.approx(3 / 12) and whole.test == "McNemar exact"
    assert whole.p == pytest.approx(binomtest(5, 7).pvalue) and whole.score == tango(5, 2, 12)
    assert whole.verdict() == "undetermined" and {one.group for one in result.policies} == {"a"}
    by_task = {one.task: one for one in result.by_task}
    assert (by_task["pick"].a_only, by_task["pick"].b_only, by_task["push"].n) == (4, 1, 4)
    assert by_task["pick"].p_holm == pytest.approx(2 * binomtest(4, 5).pvalue)
    assert [policy.name for policy in result.policies] == ["A", "B"]
    assert (result.policies[0].success.successes, result.policies[0].by_task["push"].episodes) == (8, 4)
    other = compare(joined(rows("A", A), rows("B", B)), ["B", "A"]).differences[0]
    assert other.difference == -whole.difference and other.p == whole.p


@settings(deadline=None, derandomize=True, max_examples=12)
@given(st.integers(0, 10_000))
def test_the_order_of_rows_and_the_numbering_of_seeds_do_not_matter(seed):
    rng = np.random.default_rng(seed)
    values = {task: rng.integers(0, 2, (2, n)) for task, n in (("x", 5), ("y", int(rng.integers(1, 6))))}
    both = joined(*(rows(name, {task: v[i] for task, v in values.items()}) for i, name in enumerate("AB")))
    mixed = both.sample(frac=1, random_state=seed)
    mixed = mixed.assign(env_seed=mixed["env_seed"] * 7)
    one, two = (compare(frame, ["A", "B"]) for frame in (both, mixed))
    tables = [result.to_frame().sort_values("task").reset_index(drop=True) for result in (one, two)]
    pd.testing.assert_frame_equal(*tables)
    won = sum(int((v[0] > v[1]).sum()) for v in values.values())
    assert one.differences[0].a_only == won


def test_what_cannot_be_paired_is_left_out_and_listed():
    longer = {"pick": [*A["pick"], 1, 1], "push": A["push"], "turn": [1, 1]}
    result = compare(joined(rows("A", longer), rows("B", B)), ["A", "B"])
    assert result.unpaired == {"A": {"pick": 2, "turn": 2}}
    assert result.differences[0].n == 12 and result.policies[0].success.episodes == 12
    with pytest.raises(InputError, match=r"A, B have no initial state in common.*--unpaired"):
        compare(joined(rows("A", A), rows("B", B).assign(env_seed=5)), ["A", "B"])
    free = compare(joined(rows("A", longer), rows("B", B).assign(env_seed=5)), ["A", "B"], paired=False)
    assert free.policies[0].success.episodes == 14 and free.differences[0].test == "Fisher exact"
    assert free.unpaired == {"A": {"turn": 2}} and any("different shares" in note for note in free.notes)
    with pytest.raises(InputError, match="no task in common"):
        compare(joined(rows("A", {"x": [1]}), rows("B", {"y": [1]})), paired=False)


def test_a_state_is_known_by_what_all_rows_state():
    """Without env_seed in one table the episode's number pairs them."""
    both = joined(rows("A", A), rows("B", B).assign(env_seed=None))
    assert compare(both, ["A", "B"]).differences[0].n == 12 and not compare(both, ["A", "B"]).unpaired


def test_a_state_that_one_training_seed_lacks_is_left_out():
    one, two = (rows("A", {"x": [1, 1, 0]}, train_seed=seed, run_id=str(seed)) for seed in (0, 1))
    result = compare(joined(one, two.iloc[:2], rows("B", {"x": [0, 1, 0]})), ["A", "B"])
    assert result.differences[0].n == 2 and result.differences[0].difference == pytest.approx(0.5)
    assert result.unpaired == {"A": {"x": 1}, "B": {"x": 1}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "bench@2"}, "ran under different protocols (A: bench@1, B: bench@2)"),
        ({"success_rule": "last_step"}, "different success rules"),
        ({"execute": 1}, "different numbers of actions before looking again (A: 4, B: 1)"),
        ({"benchmark": "other"}, "rows of 2 benchmarks: bench, other"),
        ({"success": 2}, "success is 2 in some episode"),
        ({"success": None}, "some episodes state no success"),
    ],
)
def test_what_must_not_be_compared_is_refused(change, message):
    with pytest.raises(InputError) as caught:
        compare(joined(rows("A", A), rows("B", B, **change) if "success" not in change
                       else rows("B", B).assign(**change)), ["A", "B"])  # fmt: skip
    assert message in str(caught.value)


def test_a_baseline_that_never_looks_has_no_execute_length_to_hold_against_it():
    both = joined(rows("A", A), rows("random", B, execute=1))
    assert compare(both, ["A", "random"]).execute == "4"
    other = joined(rows("A", A), rows("B", B, execute=1))
    assert compare(other, ["A", "B"], any_execute=True).execute == "A: 4, B: 1"


def test_names_folder_model_step_and_run(tmp_path):
    for name, step, values in (("early", 10, B), ("late", 20, A)):
        (tmp_path / name).mkdir()
        frame = rows("vlm", values, step=step, run_id=f"{step}abcdef012345")
        frame.to_parquet(tmp_path / name / "rows.parquet")
    both = read_rows([tmp_path / "early", tmp_path / "late"])
    for names in (["late", "early"], ["vlm@20", "vlm@10"], ["20abcdef", "10abcdef"]):
        assert compare(both, names).differences[0].difference == pytest.approx(3 / 12)
    assert [policy.name for policy in compare(both).policies] == ["vlm@10", "vlm@20"]
    with pytest.raises(
        InputError, match=r"'vlm' is more than one policy: its rows have step 10, 20; name it MODEL@STEP"
    ):
        compare(both, ["vlm", "early"])
    with pytest.raises(InputError, match="no rows of a policy 'latr'; did you mean 'late'"):
        compare(both, ["latr", "early"])
    with pytest.raises(InputError, match="'vlm@20' and 'late' name the same episodes"):
        compare(both, ["late", "vlm@20"])
    with pytest.raises(InputError, match="late is named twice"):
        compare(both, ["late", "late"])
    with pytest.raises(InputError, match="1 policy to compare"):
        compare(both, ["late"])


def test_several_training_seeds_are_one_policy_and_said_so():
    seeds = [
        rows("A", {"pick": values}, train_seed=seed, run_id=f"a{seed}")
        for seed, values in enumerate(([1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0]))
    ]
    others = [rows("B", {"pick": v}, train_seed=s, run_id=f"b{s}") for s, v in enumerate(([0, 0, 1, 0], [1, 0, 0, 0]))]
    for names in (["A", "B"], []):
        result = compare(joined(*seeds, *others), names)
        assert {p.name: p.by_seed for p in result.policies} == {
            "A": {"0": 0.75, "1": 0.5, "2": 0.5}, "B": {"0": 0.25, "1": 0.25},
        }  # fmt: skip
        (whole,) = result.differences
        assert whole.n == 4 and whole.difference == pytest.approx(7 / 12 - 1 / 4)
        # by state: 1 - 1/2, 2/3 - 0, 2/3 - 1/2, 0: in sixths 3, 4, 1, 0; all eight signs of three
        assert whole.p == pytest.approx(2 / 8) and whole.test.startswith("sign flips") and whole.score is None
        assert whole.training is not None and whole.bootstrap is not None
        assert any("several training seeds: A (0, 1, 2), B (0, 1)" in note for note in result.notes)
    again = joined(*seeds, rows("A", {"pick": [1]}, train_seed=0, run_id="a9"), *others)
    with pytest.raises(InputError, match=r"an episode of 'A' stands more than once \(task pick, episode 0"):
        compare(again, ["A", "B"])


def test_tables_with_gaps_and_unknowns(tmp_path):
    """CSV writes no difference between an empty task and none, and 10.0 where some step is missing."""
    a = rows("A", {"": [5, 4, 2]}, "chain", step=10, train_seed=3)
    b = rows("B", {"": [5, 1, 2]}, "chain", step=None)
    joined(a, b, rows("C", {"": [5, 1, 2]}, "chain", step="unknown")).to_csv(tmp_path / "r.csv", index=False)
    table = read_rows([tmp_path / "r.csv"])
    result = compare(table, ["A@10", "B"])
    assert result.differences[0].n == 3 and result.differences[0].difference == pytest.approx(1)
    joined(a, b).to_csv(tmp_path / "s.csv", index=False)
    assert compare(read_rows([tmp_path / "s.csv"]), ["A@10", "B"]).policies[0].by_seed == {"3": pytest.approx(11 / 3)}


def test_chains():
    rng = np.random.default_rng(0)
    a, b = rng.choice(6, 150, p=[0.05, 0.05, 0.1, 0.1, 0.2, 0.5]), rng.choice(6, 150, p=[0.1, 0.1, 0.2, 0.2, 0.2, 0.2])
    result = compare(joined(rows("A", {"": a}, "chain"), rows("B", {"": b}, "chain")), ["A", "B"])
    first, (whole,) = result.policies[0], result.differences
    assert result.metric == "chain" and first.mean == pytest.approx(a.mean())
    assert [step.rate for step in first.step_rates] == pytest.approx([(a >= k).mean() for k in range(1, 6)])
    assert sum(step.rate for step in first.step_rates) == pytest.approx(first.mean)
    half = 1.96 * a.std(ddof=1) / 150**0.5
    assert first.mean_interval == pytest.approx((a.mean() - half, a.mean() + half), abs=0.05)
    d = a - b
    assert whole.difference == pytest.approx(d.mean()) and whole.score is None and whole.a_only is None
    spread = 1.96 * d.std(ddof=1) / 150**0.5
    assert whole.bootstrap == pytest.approx((d.mean() - spread, d.mean() + spread), abs=0.07)
    # success of a chain: all five; asked for by name
    assert compare(joined(rows("A", {"": a}, "chain"), rows("B", {"": b}, "chain")), metric="success").policies[
        0
    ].success.successes == int((a == 5).sum())
    with pytest.raises(InputError, match="chain is 6 in some episode"):
        compare(joined(rows("A", {"": [6, 1]}, "chain"), rows("B", {"": [1, 1]}, "chain")))
    with pytest.raises(InputError, match="some episodes state no chain"):
        compare(joined(rows("A", A), rows("B", B)), metric="chain")


@pytest.mark.parametrize(
    ("a", "b"), [([1], [1]), ([1], [0]), ([1] * 9, [1] * 9), ([0] * 9, [0] * 9), ([1] * 9, [0] * 9)]
)
@pytest.mark.parametrize("paired", [True, False])
def test_all_or_nothing_and_a_single_episode(a, b, paired):
    result = compare(joined(rows("A", {"x": a}), rows("B", {"x": b})), paired=paired)
    (whole,) = result.differences
    low, high = whole.interval
    assert -1 <= low <= whole.difference <= high <= 1 and high > low and 0 < whole.p <= 1
    assert whole.bootstrap is None
    assert (whole.verdict() != "undetermined") == (len(a) == 9 and a != b)
    json.dumps(result.to_dict(), allow_nan=False)


def test_unpaired_chains_and_constant_chains():
    result = compare(joined(rows("A", {"": [5] * 8}, "chain"), rows("B", {"": [5] * 9}, "chain")), paired=False)
    assert result.differences[0].p == 1 and result.differences[0].interval is None
    result = compare(joined(rows("A", {"": [5, 4] * 8}, "chain"), rows("B", {"": [1, 2] * 9}, "chain")), paired=False)
    assert result.differences[0].verdict() == "higher"


def test_many_policies_are_ranked_and_grouped():
    rng = np.random.default_rng(2)
    states = rng.uniform(size=120)
    rates = {"best": 0.95, "good": 0.9, "fair": 0.55, "poor": 0.5, "none": 0.0}
    result = compare(joined(*(rows(name, {"x": states < rate}) for name, rate in reversed(rates.items()))))
    assert [policy.name for policy in result.policies] == list(rates)
    assert len(result.differences) == 10
    groups = {policy.name: policy.group for policy in result.policies}
    raw = {(one.a, one.b): one for one in result.differences}
    for (a, b), one in raw.items():
        assert (not set(groups[a]) & set(groups[b])) == (one.p_holm < 0.05)
    assert groups["none"] not in (groups["poor"], groups["fair"])
    assert max(one.p_holm for one in raw.values()) >= max(one.p for one in raw.values())


@pytest.mark.slow
def test_family_wise_error_of_equal_policies():
    """Five equally good policies: in at most 5 % of studies some pair is called different."""
    rng, wrong, studies = np.random.default_rng(0), 0, 150
    for _ in range(studies):
        chance = rng.uniform(size=50)
        told = compare(joined(*(rows(n, {"x": rng.uniform(size=50) < chance}) for n in "ABCDE")))
        wrong += any(one.verdict() != "undetermined" for one in told.differences)
    assert wrong / studies < 0.05 + 3 * (0.05 * 0.95 / studies) ** 0.5


# --- files and the verb -----------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    joined(rows("A", A), rows("B", B)).to_parquet(tmp_path / "two.parquet")
    rows("C", {"pick": [0] * 8, "push": [0] * 4}).to_csv(tmp_path / "c.csv", index=False)
    return [str(tmp_path / "two.parquet"), str(tmp_path / "c.csv")]


def test_verb_two_policies(capsys, files, tmp_path):
    out = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "f.pdf")]
    assert main(["compare", "A", "B", "--episodes", files[0], *out]) == 0
    text = capsys.readouterr().out
    assert "2 policies on bench@1, success at any step, 12 episodes: the same initial states" in text
    assert "undetermined: A and B are not told apart" in text and "Tango's score interval" in text
    assert "all tasks  12  5       2       3     2" in text
    values = json.loads((tmp_path / "r.json").read_text())
    assert values["format"] == "vlm4vla-comparison" and values["differences"][0]["task"] == ALL
    assert values["differences"][0]["verdict"] == "undetermined" and len(values["inputs"]) == 1
    assert {path.name for path in tmp_path.iterdir()} >= {"f.pdf", "f.svg", "f.png", "r.json"}


def test_verb_tells_chains_seeds_and_what_is_left_out(capsys, tmp_path):
    parts = [rows("A", {"": [5, 4, 5, 3]}, "chain", train_seed=seed, run_id=f"a{seed}") for seed in (0, 1)]
    parts += [rows("B", {"": [1, 0, 2, 3, 5]}, "chain", train_seed=seed, run_id=f"b{seed}") for seed in (0, 1)]
    joined(*parts).to_csv(tmp_path / "r.csv", index=False)
    assert main(["compare", "A", "B", "--episodes", str(tmp_path / "r.csv")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "4 chains: the same initial states",
        "not paired, and left out: 2 episodes of B",
        "A 4.250",
        "share of chains with at least so many tasks done",
        "as these checkpoints go (difference +2.750",
        "A by training seed: seed 0 4.250, seed 1 4.250",
    ):
        assert words in text, words


def test_verb_many_policies_from_parquet_and_csv(capsys, files, tmp_path):
    assert main(["compare", "--all", "--episodes", *files, "--plot", str(tmp_path / "f.png")]) == 0
    text = capsys.readouterr().out
    assert "3 policies" in text and "Holm over all 3" in text and "share a letter" in text
    assert main(["compare", "A", "C", "--episodes", *files, "--unpaired"]) == 0
    assert "Fisher exact" in capsys.readouterr().out


def test_least_columns_are_enough(capsys, tmp_path):
    (tmp_path / "least.csv").write_text("model,task,episode,success\nA,x,0,1\nA,x,1,1\nB,x,0,0\nB,x,1,1\n")
    assert main(["compare", "A", "B", "--episodes", str(tmp_path / "least.csv")]) == 0
    assert "not stated: protocol, execute" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["A", "B"], "no episode rows; give --episodes FILE"),
        (["A", "X", "--episodes", "{two}"], "no rows of a policy 'X'"),
        (["A", "--all", "--episodes", "{two}"], "--all ranks every policy"),
        (["A", "B", "--episodes", "{two}", "{two}"], "stands more than once"),
        (["A", "B", "--episodes", "absent.parquet"], "no such table"),
        (["A", "B", "--episodes", "{bad}"], "no column says whose episodes"),
        (["A", "B", "--episodes", "{anonymous}"], "do not say which initial state"),
        (["A", "B", "--episodes", "{two}", "--plot", "f.jpg"], "a plot is .png, .svg or .pdf, not '.jpg'"),
        (["A", "B", "--episodes", "{two}", "--level", "95"], "between 0.5 and 1"),
        (["A", "B", "--episodes", "{two}", "--benchmark", "bench@3"], "did you mean 'bench@1'"),
        (["A", "--paper", "freezing"], "--paper compares what the paper compared"),
        (["--episodes", "{two}", "--seed", "-1"], "seed -1"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(capsys, files, tmp_path, words, message):
    (tmp_path / "bad.csv").write_text("task,success\nx,1\n")
    (tmp_path / "anonymous.csv").write_text("model,task,success\nA,x,1\nB,x,1\n")
    names = {"two": files[0], "bad": tmp_path / "bad.csv", "anonymous": tmp_path / "anonymous.csv"}
    words = [word.format(**names) for word in words]
    before = sorted(tmp_path.iterdir())
    assert main(["compare", *words, "--json", str(tmp_path / "r.json")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and err.startswith("vlm4vla compare: ")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("verb", ["compare", "power"])
def test_help_is_quick_because_nothing_heavy_is_imported(verb):
    code = (
        f"import sys; from vlm4vla_core.cli import main; assert main(['{verb}', '--help']) == 0;"
        "heavy = {'pandas', 'scipy', 'matplotlib', 'torch', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"Example: vlm4vla {verb}" in done.stdout


@pytest.mark.parametrize("table", ["freezing", "injection", "auxiliary", "scratch"])
def test_verb_on_the_papers_tables(capsys, tmp_path, table):
    out = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "f.svg")]
    assert main(["compare", "--paper", table, *out]) == 0
    assert "published numbers" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["table"] == table and (tmp_path / "f.png").is_file()
