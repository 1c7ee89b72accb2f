"""The rollout loop on a one-dimensional world whose outcomes can be counted by hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from vlm4vla_core import evaluation
from vlm4vla_core.actions import TABLETOP, ActionConvention
from vlm4vla_core.cli import main
from vlm4vla_core.errors import InputError
from vlm4vla_core.results import EPISODE_COLUMNS

LINE = replace(TABLETOP, frame="line")


@dataclass
class LineEnv:
    """Success while the position, the running sum of the first action number, lies in [goal, goal + 1)."""

    goals: np.ndarray
    instructions: list[str]
    last_step: bool
    limit: int = 6
    position: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        n = len(self.goals)
        self.position, self.steps = np.zeros(n), np.zeros(n, int)
        self.ever, self.running, self.renewed = np.zeros(n, bool), np.ones(n, bool), np.ones(n, bool)

    def observe(self, rows: np.ndarray, camera: str = "front") -> np.ndarray:
        return np.broadcast_to(self.position[rows, None, None, None], (len(rows), 2, 2, 3)).astype(np.uint8)

    def step(self, actions: np.ndarray) -> None:
        self.position += actions[:, 0] * self.running
        self.steps += self.running
        self.ever |= self.success()
        self.renewed = (self.position == 3) & (np.array(self.instructions) == "new")
        self.running &= self.steps < self.limit
        if not self.last_step:
            self.running &= ~self.ever

    def success(self) -> np.ndarray:
        return (self.position >= self.goals) & (self.position < self.goals + 1)

    def outcome(self, row: int) -> dict[str, Any]:
        done = self.success()[row] if self.last_step else self.ever[row]
        return {"success": bool(done), "steps": int(self.steps[row]), "chain": None, "partial": float(done)}


@dataclass(frozen=True)
class LineBenchmark:
    success_rule: str = "any_step"
    name: str = "line"
    protocol: str = "line@1"
    tasks: tuple[str, ...] = ("near", "far")
    convention: ActionConvention = LINE
    action_limit: tuple[float, ...] = (1.0,) * 7
    execute: int | None = None
    cameras: tuple[str, ...] = ("front",)
    kept_for_test: frozenset[str] = frozenset({"D"})
    train_domains: tuple[str, ...] = ("A",)

    def env_seed(self, task: str, episode: int) -> int:
        return {"near": 0, "far": 100}[task] + episode

    def env(self, tasks: list[str], seeds: list[int]) -> LineEnv:
        goals = np.array([seed % 100 + (1 if task == "near" else 4) for task, seed in zip(tasks, seeds, strict=True)])
        return LineEnv(goals.astype(float), list(tasks), self.success_rule == "last_step")

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "success_rule": self.success_rule}

    def chosen(self, words: tuple[str, ...]) -> dict[str, Any]:
        return dict(word.split("=") for word in words)

    def missing(self) -> list[str]:
        return []


@dataclass
class Walker:
    """Predicts chunks of `+1`; counts how often it was asked."""

    execute: int
    chunk: int = 4
    asked: int = 0
    labels: dict[str, Any] = field(default_factory=lambda: {"model": "walker"})

    def act(self, env: LineEnv, rows: np.ndarray, rngs: Any) -> np.ndarray:
        self.asked += 1
        actions = np.zeros((len(rows), self.chunk, 7))
        actions[:, :, 0] = 1
        return actions


CELLS = [(task, episode) for task in ("near", "far") for episode in range(4)]


def test_any_step_stops_at_the_first_success() -> None:
    rows = list(evaluation.rollout(LineBenchmark(), Walker(execute=1), CELLS))
    # Goals are 1..4 (near) and 4..7 (far); six steps of +1 reach goals up to 6.
    assert [row["success"] for row in rows] == [True] * 4 + [True, True, True, False]
    assert [row["steps"] for row in rows] == [1, 2, 3, 4, 4, 5, 6, 6]
    assert all(list(row) == list(EPISODE_COLUMNS) for row in rows)


def test_last_step_counts_only_the_end() -> None:
    rows = list(evaluation.rollout(LineBenchmark("last_step"), Walker(execute=1), CELLS))
    assert [row["success"] for row in rows] == [False] * 4 + [False, False, True, False]  # only goal 6 holds at 6
    assert {row["steps"] for row in rows} == {6}


@pytest.mark.parametrize(("execute", "asked"), [(1, 6), (2, 3), (3, 2), (4, 2)])
def test_replanning_follows_the_execute_length(execute: int, asked: int) -> None:
    walker = Walker(execute=execute)
    list(evaluation.rollout(LineBenchmark("last_step"), walker, CELLS))
    assert walker.asked == asked


def test_new_words_end_a_chunk() -> None:
    """In the world whose instruction changes at position 3, the policy is asked again there; the others play on."""
    asked: list[list[int]] = []

    class Watched(Walker):
        def act(self, env: LineEnv, rows: np.ndarray, rngs: Any) -> np.ndarray:
            asked.append(rows.tolist())
            return super().act(env, rows, rngs)

    bench = LineBenchmark("last_step")
    env = bench.env(["far", "far"], [100, 101])
    env.instructions[1] = "new"
    fixed = replace(bench)
    object.__setattr__(fixed, "env", lambda tasks, seeds: env)
    rows = list(evaluation.rollout(fixed, Watched(execute=4), [("far", 0), ("far", 1)]))
    assert asked == [[0, 1], [1], [0]]  # both; the renewed one after 3 steps; the other after its 4
    assert {row["steps"] for row in rows} == {6}


def test_outcomes_do_not_depend_on_the_batch() -> None:
    together = list(evaluation.rollout(LineBenchmark(), Walker(execute=2), CELLS))
    one_by_one = list(evaluation.rollout(LineBenchmark(), Walker(execute=2), CELLS, parallel=1))
    for a, b in zip(together, one_by_one, strict=True):
        assert {**a, "wall_s": 0} == {**b, "wall_s": 0}


def test_nan_actions_are_refused() -> None:
    class Broken(Walker):
        def act(self, env: LineEnv, rows: np.ndarray, rngs: Any) -> np.ndarray:
            return np.full((len(rows), 1, 7), np.nan)

    with pytest.raises(InputError, match="NaN"):
        list(evaluation.rollout(LineBenchmark(), Broken(execute=1), CELLS))


def test_conventions_must_agree_where_nothing_is_converted() -> None:
    evaluation.check_conventions(LINE, LINE, where="x")
    flipped = replace(LINE, gripper_open=-1.0)
    with pytest.raises(InputError, match=r"gripper_open -1\.0 against 1\.0"):
        evaluation.check_conventions(flipped, LINE, where="x")


@pytest.fixture
def line_world(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The line benchmark behind `evaluate`, and a log of how many episodes each call ran."""
    from vlm4vla_core import sims

    monkeypatch.setattr(sims, "benchmark", lambda name: LineBenchmark())
    ran: list[int] = []
    original = evaluation.rollout

    def counting(bench: Any, actor: Any, cells: Any, **more: Any) -> Any:
        ran.append(len(cells))
        return original(bench, actor, cells, **more)

    monkeypatch.setattr(evaluation, "rollout", counting)
    return ran


def run(policy: Any, out: Path, *, parallel: int = 64, **plan: Any) -> Any:
    return evaluation.evaluate(evaluation.Plan(policy, "line@1", **plan), out, parallel=parallel)


def test_reissuing_runs_only_the_missing_episodes(tmp_path: Path, line_world: list[int]) -> None:
    first = run("zero", tmp_path / "rows", episodes=2)
    again = run("zero", tmp_path / "rows", episodes=2)
    more = run("zero", tmp_path / "rows", episodes=3)
    assert line_world == [4, 2]
    assert len(first) == len(again) == 4
    assert len(more) == 6
    assert not more.duplicated(["task", "episode"]).any()


def test_killed_evaluation_keeps_finished_episodes(tmp_path: Path, line_world: list[int], monkeypatch) -> None:
    """Stopped by Ctrl-C the rows are there; killed outright (nothing is gathered, the last line is half-written) they
    are found in the journal by the next."""
    from vlm4vla_core import journal

    original, written = journal.Journal.add, []

    def dying(self: Any, row: dict[str, Any]) -> None:
        original(self, row)
        written.append(row)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "add", dying)
    with pytest.raises(KeyboardInterrupt):
        run("zero", tmp_path / "rows", episodes=4, parallel=2)
    assert len(pd.read_parquet(tmp_path / "rows" / "rows.parquet")) == 3
    assert not list(tmp_path.glob(".*"))
    written.clear()
    monkeypatch.setattr(journal, "save", lambda *args: (_ for _ in ()).throw(MemoryError))  # as after kill -9
    with pytest.raises(MemoryError):
        run("zero", tmp_path / "rows", episodes=4, parallel=2)
    (left,) = tmp_path.glob(".rows.rows.jsonl")
    with left.open("a") as file:
        file.write('{"task": "far", "epi')
    monkeypatch.undo()
    monkeypatch.setattr("vlm4vla_core.sims.benchmark", lambda name: LineBenchmark())
    ran: list[Any] = []
    rollout = evaluation.rollout
    monkeypatch.setattr(evaluation, "rollout", lambda b, a, cells, **more: (ran.extend(cells), rollout(b, a, cells))[1])
    rows = run("zero", tmp_path / "rows", episodes=4, parallel=2)
    assert len(ran) == 8 - 3 - 3 and len(rows) == 8 and not rows.duplicated(["task", "episode"]).any()
    assert list(zip(rows["task"], rows["episode"], strict=True)) == CELLS  # in the protocol's order
    whole = run("zero", tmp_path / "undisturbed", episodes=4)
    assert rows.drop(columns="wall_s").equals(whole.drop(columns="wall_s"))


def test_a_journal_has_one_writer_and_one_evaluation(tmp_path: Path) -> None:
    from vlm4vla_core.journal import Journal

    with Journal(tmp_path / "rows", {"policy": "a"}, {}, ()) as kept:
        with pytest.raises(InputError, match="another evaluation into this folder is running"):
            Journal(tmp_path / "rows", {"policy": "a"}, {}, ()).__enter__()
        kept.add({"task": "near", "episode": 0})
        left = kept._path.read_text()
    (tmp_path / ".other.rows.jsonl").write_text(left)  # what a kill leaves beside a folder that is not there yet
    with pytest.raises(InputError, match="another policy, protocol or execute length was interrupted here"):
        Journal(tmp_path / "other", {"policy": "b"}, {}, ()).__enter__()


def test_shards_are_put_together_and_gaps_and_doubles_refused(tmp_path: Path, line_world: list[int]) -> None:
    import shutil

    plan, out = evaluation.Plan("random", "line@1", episodes=3), tmp_path / "rows"
    for index in (1, 2, 3):
        evaluation.evaluate(plan, out, shard=(index, 3))
        if index < 3:
            with pytest.raises(InputError, match=r"shards .*3/3 are missing"):
                evaluation.merge(plan, out)
    assert line_world == [2, 2, 2] and not out.exists()
    home = tmp_path / "rows-shards"
    with pytest.raises(InputError, match=r"2 episodes are missing \(far:3, near:3\)"):
        evaluation.merge(replace(plan, episodes=4), out)
    with pytest.raises(InputError, match=r"2 episodes were not asked for"):
        evaluation.merge(replace(plan, episodes=2), out)
    merged = evaluation.merge(plan, out)
    whole = run("random", tmp_path / "whole", episodes=3)
    assert merged.drop(columns="wall_s").equals(whole.drop(columns="wall_s"))
    shutil.rmtree(home / "3-of-3")
    shutil.copytree(home / "1-of-3", home / "3-of-3")
    with pytest.raises(InputError, match=r"2 episodes are there twice"):
        evaluation.merge(plan, out)
    shutil.copytree(home / "1-of-3", home / "1-of-4")
    with pytest.raises(InputError, match="shards of 3 and 4 parts lie together"):
        evaluation.merge(plan, out)


def test_a_task_named_twice_is_run_once(tmp_path: Path, line_world: list[int]) -> None:
    rows = run("zero", tmp_path / "rows", tasks=["near", "near"], episodes=2)
    assert len(rows) == 2


def test_a_folder_of_something_else_is_refused_before_any_episode(tmp_path: Path, line_world: list[int]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(InputError, match=r"no rollouts folder.*give another --out"):
        run("zero", tmp_path / "run", episodes=1)
    assert line_world == [] and (tmp_path / "run" / "run.json").exists()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vlm4vla_core.backbone import tiny
    from vlm4vla_core.policy import PolicyConfig, VLAPolicy

    config = PolicyConfig(chunk=3, convention=LINE, q01=(0.0,) * 7, q99=(1.0,) * 7, camera="front", width=16)
    folder = tmp_path_factory.mktemp("policy") / "ck"
    VLAPolicy(tiny(image_size=56), config).save(folder)
    return folder


def test_a_policy_s_rows_are_its_own_closed_loop(tmp_path: Path, line_world: list[int], policy: Path) -> None:
    from vlm4vla_core import folders
    from vlm4vla_core.policy import VLAPolicy

    rows = run(policy, tmp_path / "rows", tasks=["near"], episodes=2, execute=2)
    assert list(rows.columns) == list(EPISODE_COLUMNS)
    assert set(rows["execute"]) == {2} and set(rows["note"]) == {"tiny random model"}
    assert set(rows["run_id"]) == {folders.read_manifest(policy, "checkpoint")["fingerprint"]}
    # The slow way: one episode at a time, by hand, through `predict` alone.
    model = VLAPolicy.load(policy)
    for episode in range(2):
        env = LineBenchmark().env(["near"], [episode])
        for step in range(6):
            if step % 2 == 0:
                chunk = model.predict(env.observe(np.array([0])), ["near"]).actions[0]
            env.step(chunk[None, step % 2])
            if env.success()[0]:
                break
        row = rows[rows["episode"] == episode].iloc[0]
        assert (bool(row["success"]), int(row["steps"])) == (bool(env.success()[0]), step + 1)


def test_the_execute_length_is_asked_for_or_the_protocol_s_or_the_chunk(policy: Path) -> None:
    assert evaluation.make_actor(policy, LineBenchmark(), None, None).execute == 3
    assert evaluation.make_actor(policy, LineBenchmark(execute=2), None, None).execute == 2
    assert evaluation.make_actor(policy, LineBenchmark(execute=2), 1, None).execute == 1
    with pytest.raises(InputError, match="between 1 and 3"):
        evaluation.make_actor(policy, LineBenchmark(), 4, None)


def test_rows_of_another_policy_are_not_mixed_in(tmp_path: Path, line_world: list[int]) -> None:
    run("zero", tmp_path / "rows", episodes=1)
    with pytest.raises(InputError, match="another policy"):
        run("random", tmp_path / "rows", episodes=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no/such/run", "--benchmark", "tabletop-abc-d@1"], "no such checkpoint"),
        (["zero", "--benchmark", "tabletop-abc-e@1"], "did you mean 'tabletop-abc-d@1'"),
        (["zero", "--benchmark", "tabletop-tasks@1", "--tasks", "tuoch"], "did you mean 'touch'"),
        (["zero", "--benchmark", "tabletop-abc-d@1", "--episodes", "0"], "at least 1"),
        (["mean-action", "--benchmark", "tabletop-abc-d@1"], "--data STORE"),
        (["zero", "--benchmark", "tabletop-abc-d@1", "--execute", "2"], "one action at a time"),
        (["random", "--benchmark", "tabletop-abc-d@1", "--draw", "2"], "no head that draws"),
        (["random", "--benchmark", "tabletop-vqa@1", "--draw", "2"], "answers in words are not drawn"),
    ],
)
def test_bad_words_exit_2_with_one_line(tmp_path, monkeypatch, capsys, words: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *words]) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vlm4vla_core.backbone import tiny
    from vlm4vla_core.policy import PolicyConfig, VLAPolicy

    bounds = {"q01": (0.0,) * 7, "q99": (1.0,) * 7}
    config = PolicyConfig(chunk=3, convention=LINE, **bounds, camera="front", width=16, head="flow")
    folder = tmp_path_factory.mktemp("flow") / "ck"
    VLAPolicy(tiny(image_size=56), config).save(folder)
    return folder


def test_a_draw_gives_every_look_noise_of_its_own_and_none_leaves_rows_as_they_were(flow: Path, policy: Path) -> None:
    from vlm4vla_core.policy import VLAPolicy

    model = VLAPolicy.load(flow)

    def actions(draw: int | None, cell: tuple[str, int], parallel: int = 1) -> np.ndarray:
        seen: list[np.ndarray] = []
        actor = evaluation.make_actor(flow, LineBenchmark(), 2, None, draw=draw)
        cells = [cell, ("far", 2)] if parallel > 1 else [cell]
        watch = lambda env, taken: seen.append(taken[0].copy()) if taken is not None and env.running[0] else None  # noqa: E731
        list(evaluation.rollout(LineBenchmark(), actor, cells, parallel=parallel, watch=watch))
        return np.array(seen)

    def by_hand(draw: int | None, episode: int) -> np.ndarray:
        env, taken = LineBenchmark().env(["far"], [100 + episode]), []
        rng = np.random.default_rng([100 + episode, 1])  # the episode's own stream
        for step in range(6):
            if step % 2 == 0:
                number = np.random.SeedSequence([draw or 0, int(rng.integers(1 << 62))]).generate_state(1, np.uint64)[0]
                more = {} if draw is None else {"seed": int(number >> 1)}
                chunk = model.predict(env.observe(np.array([0])), ["far"], **more).actions[0]
            taken.append(chunk[step % 2])
            env.step(chunk[None, step % 2])
            if env.success()[0]:
                break
        return np.array(taken)

    for draw in (None, 0, 3):
        assert np.array_equal(actions(draw, ("far", 1)), by_hand(draw, 1))
        np.testing.assert_allclose(actions(draw, ("far", 1), parallel=2), by_hand(draw, 1), atol=1e-5)
    first, again = by_hand(3, 1), by_hand(4, 1)
    assert not np.array_equal(first[0], again[0]) and not np.array_equal(first[0], by_hand(3, 2)[0])
    assert not np.array_equal(first[0], first[2])  # the same picture a look later


def test_another_draw_is_another_evaluation_and_a_head_that_draws_nothing_says_so(
    tmp_path: Path, line_world: list[int], flow: Path, policy: Path
) -> None:
    from vlm4vla_core import folders

    rows = run(flow, tmp_path / "rows", episodes=1, draw=3)
    assert list(rows.columns) == [*EPISODE_COLUMNS, "draw"] and set(rows["draw"]) == {3}
    assert folders.read_manifest(tmp_path / "rows", "rollouts")["config"]["draw"] == 3
    assert len(run(flow, tmp_path / "rows", episodes=2, draw=3)) == 4 and line_world == [2, 2]
    with pytest.raises(InputError, match="another policy, protocol"):
        run(flow, tmp_path / "rows", episodes=1, draw=4)
    assert list(run(flow, tmp_path / "plain", episodes=1).columns) == list(EPISODE_COLUMNS)
    assert "draw" not in folders.read_manifest(tmp_path / "plain", "rollouts")["config"]
    with pytest.raises(InputError, match="head 'fc' draws nothing"):
        run(policy, tmp_path / "none", episodes=1, draw=0)
    with pytest.raises(InputError, match="--workers"):
        evaluation.evaluate(evaluation.Plan(flow, "line@1", draw=0), tmp_path / "none", workers=1)
    assert not (tmp_path / "none").exists()


def test_a_look_kept_for_the_test_and_an_unknown_camera_are_refused(policy: Path, tmp_path: Path) -> None:
    from vlm4vla_core.policy import VLAPolicy

    model = VLAPolicy.load(policy)
    model.backbone.lineage["domains"] = ["A", "D"]
    model.save(tmp_path / "seen")
    with pytest.raises(InputError, match=r"trained in look D, which line@1 keeps for the test.*demonstrations in A"):
        evaluation.make_actor(tmp_path / "seen", LineBenchmark(), None, None)
    evaluation.make_actor(tmp_path / "seen", LineBenchmark(kept_for_test=frozenset()), None, None)
    with pytest.raises(InputError, match=r"camera 'front', and line@1 has none of that name.*--camera wrist"):
        evaluation.make_actor(policy, LineBenchmark(cameras=("wrist",)), None, None)


def test_chain_summary() -> None:
    found = evaluation.chain_summary(np.array([0, 5, 2, 2, 1]))
    assert (found.n, found.mean) == (5, 2.0)
    assert [rate["rate"] for rate in found.rates] == [0.8, 0.6, 0.2, 0.2, 0.2]
    assert found.rates[1]["low"] == pytest.approx(0.2307, abs=1e-4)  # Wilson, 3 of 5
    # For 0 and 1 it is the "plus four" interval of Agresti and Coull: 7 of 10 gives (9 of 14) 0.392 to 0.894.
    assert evaluation.bounded_mean(np.repeat([1.0, 0.0], [7, 3]), 1) == pytest.approx((0.3919, 0.8939), abs=1e-4)
    low, high = evaluation.bounded_mean(np.full(20, 5.0), 5.0)
    assert 3.5 < low < 4.5 and high == 5.0


@pytest.mark.parametrize(
    "shares", [(0.9, 0.05, 0.05, 0, 0, 0), (0.3, 0.3, 0.2, 0.1, 0.05, 0.05), (0, 0, 0, 0, 0.05, 0.95)]
)
def test_the_interval_of_a_mean_length_covers(shares: tuple[float, ...]) -> None:
    rng = np.random.default_rng(0)
    truth = np.dot(shares, np.arange(6))
    drawn = rng.choice(6, size=(2000, 40), p=shares)
    covered = [low <= truth <= high for low, high in (evaluation.bounded_mean(values, 5.0) for values in drawn)]
    assert np.mean(covered) > 0.93


@pytest.mark.parametrize(
    ("benchmark", "task", "words"),
    [
        (
            "tabletop-abc-d@1",
            "chain",
            ("mean length 5.00 of 5 [", "  5 or more: 1.000 [", "looks D (training: A, B, C)"),
        ),
        ("tabletop-long@1", "two-plates", ("partial_low", "share of what was asked: 1.000 [")),
    ],
)
def test_the_verb_tells_and_films(tmp_path: Path, capsys, benchmark: str, task: str, words: tuple[str, ...]) -> None:
    import json

    from PIL import Image

    film = tmp_path / "film.gif"
    asked = ["--episodes", "2", "--out", str(tmp_path / "e"), "--json", str(tmp_path / "e.json"), "--video", str(film)]
    assert main(["evaluate", "scripted", "--benchmark", benchmark, "--tasks", task, *asked, "--filmed", "1"]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in words), told
    found = json.loads((tmp_path / "e.json").read_text())
    if task == "chain":
        assert set(found["chains"]) == {"n", "mean", "interval", "rates"} and len(found["chains"]["rates"]) == 5
    else:
        assert found["partial"]["mean"] == 1.0 and found["tasks"][0]["partial"] == 1.0
    with Image.open(film) as pages:
        assert pages.n_frames > 10
        pages.seek(pages.n_frames - 1)
        corner = np.asarray(pages.convert("RGB"))[-20:, :60]
    assert (corner.max(2) < 40).mean() > 0.5 and (corner.min(2) > 200).any()  # the outcome, white on black
    assert main(["evaluate", "scripted", "--benchmark", benchmark, "--tasks", task, "--video", "film.avi"]) == 2


def test_a_part_of_a_protocol_never_bears_its_name_alone() -> None:
    from vlm4vla_core.sims import coverage

    assert coverage("tabletop-shift@1", ["touch", "pick", "touch"]) == "2 of its 6 tasks: touch, pick"
    assert coverage("tabletop-shift@1", ["pick", "push", "touch", "put", "stack", "switch"]) == "all 6 tasks"
    assert coverage("elsewhere@3", ["b", "a", "b"]) == "tasks b, a"
