"""Questions: answers against the state they were made from, for every kind, and their absence where unknown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from toys import toy_store

from vlm4vla_core.actions import BRIDGE
from vlm4vla_core.episodes.store import Episode, EpisodeStore, write_store
from vlm4vla_core.errors import InputError
from vlm4vla_core.vqa import CLEARLY, questions


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    return toy_store(tmp_path_factory.mktemp("toys") / "store", episodes=9)


def third(value: float, values: np.ndarray, words: tuple[str, str, str]) -> str:
    """The slow way: how many of the store's values lie below."""
    low, high = np.quantile(values, [1 / 3, 2 / 3])
    return words[0] if value < low else words[1] if value < high else words[2]


def expected(store: EpisodeStore, row: int, question: str) -> str:
    state = store.state[row]
    axes = {"left, middle": ("x", 0, ("left", "middle", "right")), "near, middle": ("y", 1, ("near", "middle", "far")),
            "low, middle": ("z", 2, ("low", "middle", "high"))}  # fmt: skip
    for start, (_, column, words) in axes.items():
        if question.startswith(f"Is the gripper {start}"):
            return third(state[column], store.state[:, column], words)
    if question == "Is the gripper open?":
        return "yes" if state[6] > 0.5 else "no"
    names = store.episodes["objects"][store.episode_of[row]].split(";")
    objects = store.column("truth/objects")[row].reshape(-1, 3)[: len(names)]
    if question == "Which object is nearest to the gripper?":
        return names[int(np.argmin([np.sum((place - state[:3]) ** 2) for place in objects]))]
    name = question.removeprefix("Is the ").removesuffix(" left or right of the gripper?")
    offset = objects[names.index(name), 0] - state[0]
    assert abs(offset) > CLEARLY
    return "left" if offset < 0 else "right"


def test_answers_follow_from_the_state(store: EpisodeStore):
    rng, kinds = np.random.default_rng(0), set()
    for row in np.tile(np.arange(len(store)), 6):
        asked = questions(store, int(row), rng)
        assert asked.answer == expected(store, int(row), asked.question)
        kinds.add(asked.question)
    assert len(kinds) == 3 + 1 + 1 + 2  # three axes, open, nearest, and one side question per object


def test_an_absent_object_is_never_asked_about(store: EpisodeStore):
    rng = np.random.default_rng(1)
    absent = np.flatnonzero((store.column("truth/objects")[:, 3:] == -1).all(1))
    texts = [" ".join(questions(store, int(row), rng)) for row in np.tile(absent, 8)]
    assert len(absent) and not any("blue ball" in text for text in texts)


def test_a_question_is_a_function_of_row_and_generator(store: EpisodeStore):
    drawn = [[questions(store, row, np.random.default_rng([7, row])) for row in range(20)] for _ in range(2)]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 3


def write(out: Path, names: tuple[str, ...], gripper: np.ndarray) -> EpisodeStore:
    steps = len(gripper)
    state = np.random.default_rng(0).normal(size=(steps, len(names))).astype(np.float32)
    state[:, -1] = gripper
    episode = Episode(
        "go", {"image_0": np.zeros((steps, 16, 16, 3), np.uint8)}, state, np.zeros((steps, 7), np.float32)
    )
    return write_store(out, [episode], source="m", convention=BRIDGE, state_names=names, config={}, inputs={})


def test_a_robot_frame_names_axes_and_a_gripper_that_never_moves_is_not_asked(tmp_path: Path):
    store = write(tmp_path / "s", ("x", "y", "z", "gripper"), np.ones(30))
    rng = np.random.default_rng(0)
    texts = {questions(store, row % 30, rng).question for row in range(200)}
    assert texts == {f"Is the gripper low, middle or high along {axis}?" for axis in "xyz"}


def test_a_store_without_a_named_gripper_is_refused(tmp_path: Path):
    store = write(tmp_path / "s", ("a", "b", "z", "gripper"), np.arange(5))
    with pytest.raises(InputError, match=r"does not name x, y.*its state is named a, b, z, gripper"):
        questions(store, 0, np.random.default_rng(0))
