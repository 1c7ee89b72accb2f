"""`vlm4vla record tabletop`: what is in the store, what the labels mean, re-issuing, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from vlm4vla_core.actions import TABLETOP
from vlm4vla_core.cli import main
from vlm4vla_core.episodes.store import EpisodeStore
from vlm4vla_core.sims.benchmarks import is_evaluation_seed
from vlm4vla_core.sims.tabletop import demos, scenes, tasks, world
from vlm4vla_core.sims.tabletop.expert import expert
from vlm4vla_core.sims.tabletop.render import render

EPISODES = 42


def record(out: Path, *more: str) -> int:
    return main(["record", "tabletop", "--episodes", str(EPISODES), "--size", "48", "--out", str(out), *more])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    out = tmp_path_factory.mktemp("record") / "store"
    assert record(out, "--json", str(out.parent / "summary.json")) == 0
    return EpisodeStore.open(out)


def test_the_store_holds_what_was_asked_for(store: EpisodeStore) -> None:
    table = store.episodes
    assert len(table) == EPISODES and store.cameras == ("front",) and store.convention == TABLETOP
    assert store.state_names == ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    assert set(table.groupby(["task", "domain"]).size()) == {2}  # seven tasks by three domains
    assert not any(is_evaluation_seed(int(seed)) for seed in table["seed"])
    assert (table["success"] == "true").mean() > 0.9
    assert (table["length"] <= table["task"].map({name: f.step_limit for name, f in tasks.FAMILIES.items()})).all()
    summary = json.loads((store.path.parent / "summary.json").read_text())
    assert summary["counts"]["steps"] == len(store) and summary["frames_per_s"] > 0
    assert summary["account"]["demonstrations"] == dict.fromkeys(tasks.TASKS, 6)
    assert store.manifest["domains"] == ["A", "B", "C"]  # evaluation refuses a domain that was trained on
    assert store.manifest["seeds"] == sorted(table["seed"], key=int)
    for row in (0, len(store) - 1):
        assert simplejpeg.decode_jpeg_header(store.jpeg("front", row))[3] == "444"  # colour at full resolution


def test_first_steps_are_the_seed_s_start_and_the_expert_s_clean_action(store: EpisodeStore) -> None:
    for row in store.episodes.itertuples():
        start = scenes.start(row.task, int(row.seed))
        assert row.instruction == start.instruction
        assert row.objects.split(";") == tasks.object_names(start.state, 0)
        np.testing.assert_array_equal(store.state[row.start], world.proprioception(start.state)[0])
        objects = start.state.objects.reshape(-1).astype(np.float32)
        np.testing.assert_array_equal(store.column("truth/objects")[row.start], objects)
        assert (store.column("truth/objects")[row.start].reshape(-1, 3)[len(row.objects.split(";")) :] == -1).all()
        label = expert(start.state, tasks.goals(start.state, start.asks))[0].astype(np.float32)
        np.testing.assert_array_equal(store.action[row.start], label)
        # Through JPEG, quality 95 and full colour: close to the render, and far from another domain's.
        seen = store.images("front", np.array([row.start]))[0].astype(int)
        rendered = render(start.state, [row.domain], 48).rgb[0].astype(int)
        assert np.abs(seen - rendered).mean() < 3
        other = "B" if row.domain == "A" else "A"
        assert np.abs(seen - render(start.state, [other], 48).rgb[0].astype(int)).mean() > 8


def test_labels_are_clean_and_execution_is_noisy(store: EpisodeStore, tmp_path: Path) -> None:
    """With noise the hand does not go where the label says; without noise it does, and gets there in fewer steps."""
    assert record(tmp_path / "clean", "--noise", "0") == 0
    clean = EpisodeStore.open(tmp_path / "clean")
    errors = []
    for made in (store, clean):
        inside = made.episode_of[1:] == made.episode_of[:-1]
        moved = np.diff(made.state[:, :3], axis=0)[inside]
        errors.append(np.abs(moved - made.action[:-1, :3][inside]))
        assert np.linalg.norm(made.action[:, :3], axis=1).max() <= world.MAX_STEP + 1e-6
        assert (made.action[:, 3:5] == 0).all()
        assert set(np.unique(made.action[:, 6])) == {0.0, 1.0}
    assert np.median(errors[1]) < 1e-6 and np.median(errors[0]) > 0.003
    assert len(clean) < len(store) and (clean.episodes["success"] == "true").all()


def test_noise_has_the_declared_size() -> None:
    drawn = np.stack([demos._noise(seed, 40, 0.3) for seed in range(300)])  # (E, T, 7)
    expected = np.array([0.3 * world.MAX_STEP] * 3 + [0, 0, 0.3 * world.MAX_TURN])
    np.testing.assert_allclose(drawn[..., :6].std((0, 1)), expected, rtol=0.05)
    neighbours = np.corrcoef(drawn[:, :-1, 0].ravel(), drawn[:, 1:, 0].ravel())[0, 1]
    assert neighbours == pytest.approx(0.8 / 2, abs=0.03)  # half of the variance is slow
    assert drawn[..., 6].mean() == pytest.approx(0.009, rel=0.3)


def test_an_episode_depends_on_its_plan_only(store: EpisodeStore) -> None:
    plans = demos.plan(EPISODES, tasks.TASKS, ("A", "B", "C"), 0)
    for index in (0, 7, 40):
        (alone,) = demos.demonstrations([plans[index]], size=48, noise=0.3)
        rows = np.flatnonzero(store.episode_of == index)
        np.testing.assert_array_equal(alone.action, store.action[rows])
        np.testing.assert_array_equal(alone.state, store.state[rows])


def test_ground_truth_for_probes(tmp_path: Path) -> None:
    """Depth, segmentation, contacts and poses of two cameras, against the world stepped by hand."""
    from vlm4vla_core.sims.tabletop import render as renderer

    out = tmp_path / "truth"
    more = ("--cameras", "front", "wrist", "--geometry", "--noise", "0", "--tasks", "pick", "switch", "--size", "56")
    assert main(["record", "tabletop", "--episodes", "4", "--out", str(out), *more]) == 0
    made = EpisodeStore.open(out)
    assert made.cameras == ("front", "wrist")
    for row in made.episodes.itertuples():
        start = scenes.start(row.task, int(row.seed))
        state, goal = start.state, tasks.goals(start.state, start.asks)
        for t in range(row.length):
            here = row.start + t
            picture = renderer.render(state, [row.domain], 56, camera="wrist", geometry=True)
            assert picture.depth is not None and picture.segmentation is not None
            np.testing.assert_array_equal(made.segmentation("wrist", [here])[0], picture.segmentation[0])
            np.testing.assert_allclose(made.depth("wrist", [here])[0] / 1000, picture.depth[0], atol=0.00051)
            assert (made.column("truth/contact")[here] == world.contacts(state)[0]).all()
            assert made.column("truth/switch")[here, 1] == world.switched_on(state)[0]
            assert (made.column("truth/on")[here] == state.on[0]).all()
            state = world.step(state, expert(state, goal))
        assert row.target == (tasks.describe_object(start.state, 0, start.asks[0].slot) if row.task == "pick" else "")
    assert made.column("truth/contact").any() and len(set(made.column("truth/switch")[:, 1])) == 2


def test_a_chain_gives_an_episode_for_every_part(tmp_path: Path) -> None:
    out, film = tmp_path / "chains", tmp_path / "chains.mp4"
    words = ["--episodes", "4", "--tasks", "chain", "tower", "--noise", "0", "--size", "48", "--video", str(film)]
    assert main(["record", "tabletop", "--out", str(out), *words]) == 0
    made = EpisodeStore.open(out)
    table = made.episodes
    assert dict(table["task"].value_counts()) == {"chain": 10, "tower": 2} and (table["success"] == "true").all()
    first = table[table["task"] == "chain"].iloc[:5]
    assert first["seed"].nunique() == 1 and first["source"].nunique() == 5
    for earlier, later in zip(first["start"] + first["length"] - 1, first["start"].iloc[1:], strict=False):
        after = made.state[later] - made.state[earlier]  # one step apart: the parts are one continuous episode
        assert np.abs(after[:3]).max() <= world.MAX_STEP + 1e-6
    import av

    with av.open(str(film)) as opened:
        frames = sum(1 for _ in opened.decode(video=0))
    assert frames > len(made)  # every step, and a pause after each episode


def test_reissuing_does_nothing_and_changes_are_noticed(
    store: EpisodeStore, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (store.path / "dataset.json").stat().st_mtime_ns
    assert record(store.path) == 0
    assert capsys.readouterr().out == f"{store.path} is up to date\n"
    assert (store.path / "dataset.json").stat().st_mtime_ns == before


def test_the_same_seed_gives_the_same_store_another_seed_does_not(store: EpisodeStore, tmp_path: Path) -> None:
    assert record(tmp_path / "again") == 0
    assert record(tmp_path / "other", "--seed", "1") == 0
    assert EpisodeStore.open(tmp_path / "again").fingerprint == store.fingerprint
    other = EpisodeStore.open(tmp_path / "other")
    assert not set(other.episodes["seed"]) & set(store.episodes["seed"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--episodes", "0"], "--episodes must be at least 1"),
        (["--tasks", "push", "pikc"], "no task 'pikc'; did you mean 'pick'?"),
        (["--domains", "A", "E"], "no domain 'E'"),
        (["--domains", "A", "A"], "take different names"),
        (["--size", "4"], "--size 4"),
        (["--noise", "-1"], "--noise -1"),
        (["--seed", "-1"], "--seed must not be negative"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert record(tmp_path / "store", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("vlm4vla record: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert record(tmp_path / "mine") == 2
    assert "no episode store" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
