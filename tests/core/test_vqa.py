"""Questions: answers against the state they were made from, for every kind, and their absence where unknown."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from test_vqa_general import look, truth
from toys import OBJECTS, STATE, toy_store

from vlm4vla_core import fast
from vlm4vla_core.actions import BRIDGE, TABLETOP
from vlm4vla_core.cli import main
from vlm4vla_core.episodes.store import Episode, EpisodeStore, write_store
from vlm4vla_core.errors import InputError
from vlm4vla_core.sims.tabletop import demos, scenes
from vlm4vla_core.sims.tabletop.looks import PALETTE
from vlm4vla_core.sims.tabletop.world import COLOURS
from vlm4vla_core.tiny import tiny_tokenizer
from vlm4vla_core.vqa import CLEARLY, KINDS, MIXES, Question, availability, pictures, questions
from vlm4vla_core.vqa.data import EmbodiedData, parse_points
from vlm4vla_core.vqa.general import GENERAL


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
    texts = [" ".join(questions(store, int(row), rng)[:2]) for row in np.tile(absent, 8)]
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


# --- kinds that are asked for by name


@pytest.fixture(scope="module")
def tabletop(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    """Real demonstrations of the tabletop world in all of its training domains."""
    plans = demos.plan(9, ("move", "touch", "pick"), ("A", "B", "C"), seed=0)
    return write_store(
        tmp_path_factory.mktemp("tabletop") / "store", demos.demonstrations(plans, size=112, noise=0.2),
        source="tabletop", convention=TABLETOP, state_names=demos.STATE_NAMES, column_names=demos.COLUMN_NAMES,
        config={}, inputs={}, jpeg_444=True,
    )  # fmt: skip


def ask(store: EpisodeStore, kind: str, repeats: int = 3, **options) -> list[tuple[int, str, str]]:
    rng, asked = np.random.default_rng(0), []
    for row in np.tile(np.arange(len(store)), repeats):
        found = questions(store, int(row), rng, kinds=(kind,), **options)
        assert found.kind == kind
        asked.append((int(row), found.question, found.answer))
    return asked


def test_the_pixel_pointed_at_has_the_colour_that_was_asked_for(tabletop: EpisodeStore):
    """The picture is the witness: its pixel at the answer is nearest to the named colour of the palette."""
    right, seen = [], 0
    for row, question, answer in ask(tabletop, "pointing"):
        ((x, y),) = parse_points(answer)
        if "gripper" in question:
            continue
        seen += 1
        name = re.match("Point to the (\\w+) ", question)[1]
        pixel = tabletop.images("front", [row])[0][int(y * 112), int(x * 112)] / 255
        direction = PALETTE / np.linalg.norm(PALETTE, axis=1, keepdims=True)
        right.append(COLOURS[int((direction @ (pixel / np.linalg.norm(pixel))).argmax())] == name)
    assert seen > 100
    assert np.mean(right) > 0.9  # the gripper now and then hides an object


def test_relative_position_follows_from_the_recorded_places(tabletop: EpisodeStore):
    answers = set()
    for row, question, answer in ask(tabletop, "relative"):
        name, first, other = re.match(
            r"Is the (.+) (left or right of|in front of or behind) the (.+)\?", question
        ).groups()
        names = tabletop.episodes["objects"][tabletop.episode_of[row]].split(";")
        places = tabletop.column("truth/objects")[row].reshape(-1, 3)
        axis, words = (0, ("left", "right")) if first.startswith("left") else (1, ("in front", "behind"))
        offset = places[names.index(name), axis] - places[names.index(other), axis]
        assert abs(offset) > CLEARLY
        assert answer == words[int(offset > 0)]
        answers.add(answer)
    assert answers == {"left", "right", "in front", "behind"}


def test_the_way_from_the_gripper_goes_to_the_object(tabletop: EpisodeStore):
    """Every word bounds one coordinate of the way: near |d| < 3 cm, slightly < 8 cm, plain < 16 cm, far beyond."""
    lowest = {"near": 0.0, "slightly": 0.03, "": 0.08, "far": 0.16}
    highest = {"near": 0.03, "slightly": 0.08, "": 0.16, "far": np.inf}
    towards = {"right": (0, 1), "left": (0, -1), "forward": (1, 1), "back": (1, -1), "up": (2, 1), "down": (2, -1)}
    seen = set()
    for row, question, answer in ask(tabletop, "offset"):
        name = re.match(r"Which way is the (.+) from the gripper\?", question)[1]
        names = tabletop.episodes["objects"][tabletop.episode_of[row]].split(";")
        way = tabletop.column("truth/objects")[row].reshape(-1, 3)[names.index(name)] - tabletop.state[row, :3]
        for axis, words in enumerate(answer.split(", ")):
            degree, _, direction = words.rpartition(" ") if words != "near" else ("near", "", "")
            assert lowest[degree] - 1e-6 <= abs(way[axis]) <= highest[degree] + 1e-6, (words, way)
            assert not direction or towards[direction] == (axis, np.sign(way[axis]))
            seen.add((axis, words))
    assert len(seen) > 14


def test_next_action_by_hand(tmp_path: Path):
    """Two steps right, seven still with the gripper opening in the last, then up to the end."""
    action = np.zeros((15, 7), np.float32)
    action[:2, 0], action[9:, 2] = 0.05, 0.05
    action[8:, 6] = 1
    state = np.zeros((15, 7), np.float32)
    state[10:, 6] = 1
    episode = Episode(
        "lift it",
        {"front": np.zeros((15, 16, 16, 3), np.uint8)},
        state,
        action,
        columns={"truth/objects": state[:, :6]},
    )
    options = {"state_names": STATE, "column_names": {"truth/objects": OBJECTS}, "config": {}, "inputs": {}}
    expected = ["move right"] * 2 + ["stay"] * 4 + ["move up"] * 2 + ["open the gripper"] * 2 + ["move up"] * 5
    for convention, words in (
        (TABLETOP, expected),
        (BRIDGE, [w.replace("right", "along +x").replace("up", "along +z") for w in expected]),
    ):
        store = write_store(tmp_path / convention.frame[:5], [episode], source="m", convention=convention, **options)
        assert [answer for _, _, answer in ask(store, "next action", 1)] == words
    assert ask(store, "next action", 1)[0][1] == 'The task is "lift it". What does the robot do next?'


def test_action_tokens_decode_to_the_stored_chunk(tabletop: EpisodeStore):
    tokenizer = fast.fit_store(tabletop, 4)
    for row, _, answer in ask(tabletop, "action tokens", 1, fast=tokenizer):
        decoded = tokenizer.decode([fast.from_text(answer)])
        assert decoded.ok.all()
        end = tabletop.starts[tabletop.episode_of[row]] + tabletop.lengths[tabletop.episode_of[row]] - 1
        chunk = tabletop.action[np.minimum(row + np.arange(4), end)]
        half = (np.array(tokenizer.q99) - np.array(tokenizer.q01)) / 2
        error = np.abs(decoded.actions[0] - np.clip(chunk, tokenizer.q01, tokenizer.q99))
        assert (error <= tokenizer.error_bound * half + 1e-6).all()


def test_what_cannot_be_asked_is_passed_over_with_its_reason(
    store: EpisodeStore, tabletop: EpisodeStore, tmp_path: Path
):
    assert {kind: bool(reason) for kind, reason in availability(tabletop).items() if reason} == {"action tokens": True}
    assert availability(store)["pointing"] == "the camera's projection is not known"
    plain = write(tmp_path / "s", ("x", "y", "z", "gripper"), np.arange(5) % 2)
    reasons = availability(plain)
    assert reasons["nearest"] == "the store does not record where objects are"
    assert not reasons["next action"] and not reasons["position"]
    rng = np.random.default_rng(0)
    assert {questions(plain, 0, rng, kinds=("pointing", "gripper")).kind for _ in range(9)} == {"gripper"}
    with pytest.raises(InputError, match=r"no questions of kind pointing: the store does not record where objects are"):
        questions(plain, 0, rng, kinds=("pointing",))
    with pytest.raises(InputError, match=r"the FAST tokenizer is for 7 numbers|no FAST tokenizer is given"):
        questions(plain, 0, rng, kinds=("action tokens",))
    with pytest.raises(InputError, match="no questions of kind 'pointin'; did you mean 'pointing'"):
        questions(plain, 0, rng, kinds=("pointin",))


def test_questions_drawn_by_training_stay_what_they_were(store: EpisodeStore):
    """Stored from the first version: a run that is resumed must be asked what it would have been asked."""
    rng = np.random.default_rng(11)
    assert [questions(store, row, rng)[:2] for row in range(0, 54, 9)] == [
        ("Is the gripper left, middle or right?", "middle"),
        ("Is the gripper left, middle or right?", "left"),
        ("Which object is nearest to the gripper?", "red cube"),
        ("Is the gripper low, middle or high?", "middle"),
        ("Is the gripper open?", "yes"),
        ("Is the gripper open?", "yes"),
    ]


def test_generated_questions_as_a_data_set(tabletop: EpisodeStore):
    data = EmbodiedData(tabletop, "front", ("pointing", "position"), seed=1)
    assert len(data) == len(tabletop)
    rows = [data[index] for index in range(40)]
    assert {row.kind for row in rows} == {"pointing", "position"}
    assert all((row.points is not None) == (row.kind == "pointing") for row in rows)
    assert [data[index].answer for index in range(40)] == [row.answer for row in rows]


def test_a_row_without_a_question_is_stood_in_for_by_the_next(tmp_path: Path):
    state, objects = np.zeros((4, 7), np.float32), np.zeros((4, 6), np.float32)
    objects[[1, 3], 0], objects[:, 3:] = 0.2, -1  # in rows 0 and 2 the only object is where the gripper is
    episode = Episode(
        "go", {"front": np.zeros((4, 16, 16, 3), np.uint8)}, state, np.zeros((4, 7), np.float32),
        columns={"truth/objects": objects}, info={"objects": "red cube"},
    )  # fmt: skip
    options = {"state_names": STATE, "column_names": {"truth/objects": OBJECTS}, "config": {}, "inputs": {}}
    store = write_store(tmp_path / "s", [episode], source="m", convention=TABLETOP, **options)
    data = EmbodiedData(store, "front", ("side",))
    assert [data[index].source[-1] for index in range(4)] == ["1", "1", "3", "3"]
    with pytest.raises(InputError, match="row 2 has no question of kind side"):
        questions(store, 2, np.random.default_rng(0), kinds=("side",))
    with pytest.raises(InputError, match="no row has a question of kind side"):
        EmbodiedData(store, "front", ("side",), rows=np.array([0, 2]))[1]


# --- embodied kinds after the paper's auxiliary tasks, and mixes


@pytest.fixture(scope="module")
def robot(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    """Demonstrations that take things up and put them somewhere."""
    plans = demos.plan(9, ("pick", "put", "stack"), ("A", "B", "C"), seed=1)
    return write_store(
        tmp_path_factory.mktemp("robot") / "store", demos.demonstrations(plans, size=48, noise=0.2),
        source="tabletop", convention=TABLETOP, state_names=demos.STATE_NAMES, column_names=demos.COLUMN_NAMES,
        config={}, inputs={}, jpeg_444=True,
    )  # fmt: skip


def rows_of(store: EpisodeStore, row: int) -> range:
    episode = store.episode_of[row]
    return range(store.starts[episode], store.starts[episode] + store.lengths[episode])


def ask_all(store: EpisodeStore, kind: str, repeats: int = 1) -> list[tuple[int, Question]]:
    rng, asked = np.random.default_rng(0), []
    for row in np.tile(np.arange(len(store)), repeats):
        try:
            asked.append((int(row), questions(store, int(row), rng, kinds=(kind,))))
        except InputError as error:
            assert "has no question" in str(error)
    return asked


def test_motion_between_two_pictures(robot: EpisodeStore):
    asked, answers = ask_all(robot, "moved", 3), set()
    ways = {"left": (0, -1), "right": (0, 1), "forward": (1, 1), "back": (1, -1), "up": (2, 1), "down": (2, -1)}
    for row, question in asked:
        assert question.earlier == max(rows_of(robot, row)[0], row - 6)
        if found := re.match(r"The left picture is earlier. Did the (.+) move, yes or no\?", question.question):
            slot = robot.episodes["objects"][robot.episode_of[row]].split(";").index(found[1])
            places = robot.column("truth/objects")[[question.earlier, row], 3 * slot : 3 * slot + 3]
            distance = float(np.sqrt(((places[1] - places[0]) ** 2).sum()))
            assert distance > 0.03 if question.answer == "yes" else distance < 0.001
        else:
            axis, sign = ways[question.answer]
            offset = (robot.state[row] - robot.state[question.earlier])[:3]
            assert offset[axis] * sign > CLEARLY and all(abs(value) <= abs(offset[axis]) for value in offset)
        answers.add(question.answer)
    assert len(asked) > 200 and answers >= {"yes", "no", "up", "down", "left", "right"}


def test_pictures_of_two_moments_stand_side_by_side(robot: EpisodeStore):
    (row, moved), plain = ask_all(robot, "moved")[12], Question("", "", "gripper")
    both, alone = pictures(robot, "front", [row, row], [moved, plain], 48)
    np.testing.assert_array_equal(alone, robot.images("front", [row])[0])
    for half, source in ((both[:, :24], moved.earlier), (both[:, 24:], row)):
        narrowed = robot.images("front", [source])[0].astype(float).reshape(48, 24, 2, 3).mean(2)
        assert np.abs(half - narrowed).mean() < 3 < np.abs(both[:, ::-1][:, :24] - narrowed).mean()


def test_choices_hold_the_right_action_once_and_letters_are_even(robot: EpisodeStore):
    letters = []
    for row, question in ask_all(robot, "choice", 4):
        listed = dict(re.findall(r"^([A-D])\. (.+)$", question.question, re.MULTILINE))
        (right,) = {one.answer for r, one in ask_all_at(robot, "next action", row)}
        assert sorted(listed) == list("ABCD") and len(set(listed.values())) == 4
        assert listed[question.answer] == right
        letters.append(question.answer)
    shares = [letters.count(letter) / len(letters) for letter in "ABCD"]
    assert len(letters) > 300 and max(shares) < 0.33


def ask_all_at(store: EpisodeStore, kind: str, row: int) -> list[tuple[int, Question]]:
    return [(row, questions(store, row, np.random.default_rng(seed), kinds=(kind,))) for seed in range(2)]


def test_plans_say_what_the_demonstration_then_does(robot: EpisodeStore):
    """The rest of the recording is the witness: grasped later exactly when the plan begins with it."""
    asked, held, right = ask_all(robot, "plan"), robot.column("truth/held")[:, 0], []
    assert len(asked) > 100
    for row, question in asked:
        names = robot.episodes["objects"][robot.episode_of[row]].split(";")
        target = robot.episodes["target"][robot.episode_of[row]]
        steps = question.answer.split(", ")
        lift = robot.episodes["family"][robot.episode_of[row]] == "pick"
        assert steps[-1] == ("lift it" if lift else "let it go") and ("carry it" in steps) == (not lift)
        now = names[int(held[row])] if held[row] >= 0 else ""
        assert (f"grasp the {target}" in steps) == (now != target)
        if now != target and robot.episodes["success"][robot.episode_of[row]] == "true":
            later = {names[int(slot)] for slot in held[row : rows_of(robot, row)[-1] + 1] if slot >= 0}
            right.append(target in later)
    assert np.mean(right) == 1.0


def test_trajectory_points_are_where_the_gripper_is_later(robot: EpisodeStore):
    """Its state a few steps on, through the camera by turn and tilt; all points but those after the end."""
    asked = ask_all(robot, "trajectory")
    assert len(asked) > 80
    for row, question in asked:
        domain, steps = robot.episodes["domain"][robot.episode_of[row]], rows_of(robot, row)
        later = [step for step in (row + 4, row + 8, row + 12, row + 16) if step in steps]
        points = parse_points(question.answer)
        assert len(points) == len(later) > 0
        for point, step in zip(points, later, strict=True):
            np.testing.assert_allclose(point, look(domain, robot.state[step][:3].astype(float))[:2], atol=6e-4)


def test_mixes_are_names_for_kinds_and_scenes_have_the_general_one(robot: EpisodeStore, tmp_path: Path):
    assert set(MIXES["all"]) == {*MIXES["general"], *MIXES["embodied"]} == set(KINDS) - {"action tokens"}
    rng = np.random.default_rng(0)
    for mix in MIXES:
        kinds = {questions(robot, int(row), rng, kinds=(mix,)).kind for row in rng.integers(len(robot), size=150)}
        assert kinds <= set(MIXES[mix]) and len(kinds) > 1
    assert main(["record", "tabletop", "--episodes", "30", "--tasks", "scene", "--size", "48", "--geometry",
                 "--out", str(tmp_path / "s"), "--workers", "1"]) == 0  # fmt: skip
    store = EpisodeStore.open(tmp_path / "s")
    assert set(store.episodes["domain"]) == {"U", "V", "W"} and set(store.lengths) == {1}
    reasons = availability(store)
    assert {kind for kind, reason in reasons.items() if not reason} == set(GENERAL)
    assert reasons["side"] == reasons["pointing"] == "its pictures show no gripper"
    seen = set()
    for row in np.tile(np.arange(30), 8):
        asked = questions(store, int(row), rng)
        state = scenes.scene(int(store.episodes["seed"][row]))
        assert asked.answer == truth(state, store.episodes["domain"][row], asked.question)
        seen.add(asked.kind)
    assert seen == set(GENERAL)
    with pytest.raises(InputError, match="no questions of kind position: its pictures show no gripper"):
        questions(store, 0, rng, kinds=("position",))
    with pytest.raises(InputError, match="'generl'; did you mean 'general'"):
        questions(store, 0, rng, kinds=("generl",))


def test_embodied_words_are_single_tokens_of_the_tiny_tokenizer(robot: EpisodeStore):
    tokenizer = tiny_tokenizer()
    texts = {text for kind in MIXES["embodied"] for _, asked in ask_all(robot, kind) for text in asked[:2]}
    for word in {word for text in texts for word in re.findall(r" ?[A-Za-z]+", text)}:
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word
