"""Question-answer files: what is read, what is refused with file, row and reason, and mixtures of them."""

from __future__ import annotations

import contextlib
import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import toy_store

from vlm4vla_core import fast, images
from vlm4vla_core.errors import InputError
from vlm4vla_core.vqa import data as module
from vlm4vla_core.vqa import questions
from vlm4vla_core.vqa.data import ChoiceData, EmbodiedData, LlavaData, check, draw, parse_points

PICTURES = {name: np.full((20, 30, 3), value, np.uint8) for name, value in (("a.jpg", 40), ("sub/b.jpg", 200))}


def talk(*turns: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(turns)]


ROWS: list[dict[str, Any]] = [
    {
        "id": "p",
        "image": "a.jpg",
        "conversations": talk("<image>\nWhere is it free? é", "[(0.461, 0.527), (0.5, 1.0)]"),
    },
    {
        "id": 2,
        "image": ["a.jpg", "sub/b.jpg"],
        "conversations": talk("<image>\n<image>\nWhich frame is brighter?", "B"),
    },
    {"image": "sub/b.jpg", "thinking": "…", "conversations": talk("<image>Bright?", "yes", "And dark?", "no")},
    {"conversations": talk("What does a gripper do?", "It grips [things].")},
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for name, picture in PICTURES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(images.encode(picture))
    return folder


def write(path: Path, rows: list[Any], indent: int | None = 1) -> Path:
    lines = path.suffix == ".jsonl"
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) if lines else None
    path.write_text(text if text is not None else json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_rows_of_a_list_and_of_lines(root: Path, tmp_path: Path, name: str):
    data = LlavaData(write(tmp_path / name, ROWS), root)
    assert len(data) == 5  # one per question
    rows = [data[index] for index in range(5)]
    assert [row.question for row in rows] == [
        "Where is it free? é", "Which frame is brighter?", "Bright?", "And dark?", "What does a gripper do?",
    ]  # fmt: skip
    assert [row.kind for row in rows] == ["points", "text", "text", "text", "text"]
    np.testing.assert_array_equal(rows[0].points, [[0.461, 0.527], [0.5, 1.0]])
    assert rows[3].history == (("Bright?", "yes"),)
    assert rows[3].answer == "no"
    assert [len(row.images()) for row in rows] == [1, 2, 1, 1, 0]
    for found, expected in zip(rows[1].images(), PICTURES.values(), strict=True):
        assert found.shape == (20, 30, 3)
        assert np.abs(found.astype(int) - expected).max() <= 1
    assert rows[1].images(8)[0].shape == (8, 8, 3)
    assert rows[1].source == f"{tmp_path / name}, row 1"
    assert check(data) == 5
    again = pickle.loads(pickle.dumps(data))
    assert again[3].history == rows[3].history
    with pytest.raises(IndexError):
        data[5]


def test_places_in_a_file_larger_than_a_block(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rows are found wherever the blocks end, between the bytes of one character too."""
    expected = [row.question for row in map(LlavaData(write(tmp_path / "r.json", ROWS), root).__getitem__, range(5))]
    size = (tmp_path / "r.json").stat().st_size
    for block in [*range(1, 60), size - 1, size, size + 1]:
        monkeypatch.setattr(module, "_BLOCK", block)
        data = LlavaData(tmp_path / "r.json", root)
        assert [data[index].question for index in range(len(data))] == expected


@pytest.mark.samples
def test_a_real_row_of_robopoint(samples: Path):
    folder = samples / "vlm_robopoint"
    data = LlavaData(folder / "example.json", folder)
    (row,) = [data[0]]
    assert row.kind == "points"
    np.testing.assert_array_equal(row.points, [[0.461, 0.527], [0.498, 0.521], [0.481, 0.521], [0.445, 0.529]])
    assert row.question.startswith("In the image, there is an item encased within a red rectangle.")
    with pytest.raises(InputError, match=r"region_ref/.*\.png is missing \[.*example.json, row 0\]"):
        row.images()  # the picture is not among the samples


@pytest.mark.samples
def test_real_photos_under_rows_of_ours(samples: Path, tmp_path: Path):
    rows = [{"image": ["sink.jpg", "stair.jpg"], "conversations": talk("<image><image>Where?", "(0.5, 0.25)")}]
    row = LlavaData(write(tmp_path / "r.json", rows), samples / "vlm_robopoint")[0]
    assert [picture.shape for picture in row.images()] == [(480, 640, 3)] * 2
    np.testing.assert_array_equal(row.points, [[0.5, 0.25]])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[(0.461, 0.527), (0.498, 0.521)]", [[0.461, 0.527], [0.498, 0.521]]),
        ("The points are [(0, 1), (.5,1.)].", [[0, 1], [0.5, 1]]),
        ("(0.3, 0.4)", [[0.3, 0.4]]),
        ("[(120, 340)]", None),  # pixels
        ("[(0.1, 0.2, 0.3, 0.4)]", None),  # a box
        ("[(0.1, 0.2), (0.1, 0.2, 0.3, 0.4)]", None),
        ("[(0.1, 0.2), (1.1, 0.3)]", None),
        ("[(0.1, -0.2)]", None),
        ("in the middle (0.5, 0.5) of it", None),  # said in passing
        ("[]", None),
        ("yes", None),
    ],
)
def test_points_are_pairs_of_fractions(answer: str, expected: list[list[float]] | None):
    found = parse_points(answer)
    assert found is None if expected is None else np.array_equal(found, expected)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.text(alphabet="[](),. 0159", max_size=60))
def test_no_answer_breaks_the_parser(answer: str):
    found = parse_points(answer)
    assert found is None or (found.ndim == 2 and found.shape[1] == 2 and found.min() >= 0 and found.max() <= 1)


def test_a_long_list_that_is_none_takes_no_time():
    """Once a pattern with two ways to split each blank would try 4**40 of them."""
    assert parse_points("[" + "(0.5, 0.5)   " * 40 + "x") is None
    assert len(parse_points("[" + "(0.5, 0.5),   " * 40 + "]")) == 40


GOOD = ROWS[0]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "not an object but list"),
        ({**GOOD, "image": "../secret.jpg"}, r"image path '../secret.jpg' leaves the image root"),
        ({**GOOD, "image": "sub/../../secret.jpg"}, "leaves the image root"),
        ({**GOOD, "image": "/etc/secret.jpg"}, "leaves the image root"),
        ({**GOOD, "image": "a\0.jpg"}, "leaves the image root"),
        ({**GOOD, "image": 3}, "neither a path nor a list"),
        ({**GOOD, "image": ["a.jpg", "a.jpg"]}, "1 <image> markers for 2 images"),
        ({**GOOD, "image": []}, "1 <image> markers for 0 images"),
        ({**GOOD, "video": "a.mp4"}, "names a video"),
        ({"image": "a.jpg"}, "'conversations' is not a list"),
        (
            {**GOOD, "conversations": GOOD["conversations"][:1]},
            "'conversations' is not a list of questions and answers",
        ),
        ({**GOOD, "conversations": GOOD["conversations"][::-1]}, "a turn is not from 'human'"),
        ({**GOOD, "conversations": [*talk("<image>", "x")[:1], {"from": "gpt"}]}, "a turn is not from 'gpt'"),
    ],
)
def test_malformed_rows_name_file_row_and_reason(root: Path, tmp_path: Path, row: Any, reason: str):
    for name in ("r.json", "r.jsonl"):
        path = write(tmp_path / name, [GOOD, row])
        with pytest.raises(InputError, match=reason) as caught:
            LlavaData(path, root)
        assert f"{path}, row 1" in str(caught.value)


def test_damaged_files_and_pictures(root: Path, tmp_path: Path):
    path = tmp_path / "r.json"
    for content, match in [
        (b"", "no rows"), (b"[]", "no rows"), (b"[" * 100_000, r"nested too deeply"), (b'[{"a": }]', "Expecting value"),
        (b'[{"a": ' + b"1" * 5000 + b"}]", "thousands of digits"),
        (b'[{"a": "\xff"}]', "no UTF-8 text"), (b'["\xc3', "no UTF-8|Unterminated"),
    ]:  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(InputError, match=match) as caught:
            LlavaData(path, root)
        assert str(path) in str(caught.value)
    path.write_text(json.dumps([GOOD]) + "\n" + json.dumps([GOOD]))
    with pytest.raises(InputError, match="something follows the list"):
        LlavaData(path, root)
    with pytest.raises(InputError, match=r"cannot be read \(No such file"):
        LlavaData(tmp_path / "none.json", root)
    data = LlavaData(write(path, [GOOD]), root)
    (root / "a.jpg").write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(InputError, match=r"a\.jpg cannot be read.*row 0"):
        check(data)
    path.write_text("[]")
    with pytest.raises(InputError, match=r"changed since it was opened.*row 0"):
        data[0]


@pytest.mark.parametrize("name", ["r.json", "r.jsonl"])
def test_a_file_cut_anywhere_is_refused_or_read_up_to_there(root: Path, tmp_path: Path, name: str):
    whole = write(tmp_path / name, ROWS[:2], indent=None).read_bytes()
    for end in range(len(whole)):
        (tmp_path / name).write_bytes(whole[:end])
        first_line = name.endswith("l") and end in (whole.index(b"\n"), whole.index(b"\n") + 1)
        if first_line:  # lines do not say how many there should be
            assert len(LlavaData(tmp_path / name, root)) == 1
        else:
            with pytest.raises(InputError, match=r"r\.json"):
                LlavaData(tmp_path / name, root)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=3), st.booleans())
def test_changed_bytes_are_refused_or_read(changes: list[tuple[int, int]], lines: bool):
    """Whatever the bytes: an InputError with file and row, or rows that can all be read."""
    with tempfile.TemporaryDirectory() as name:
        path = write(Path(name) / ("r.jsonl" if lines else "r.json"), ROWS[:3])
        content = bytearray(path.read_bytes())
        for place, value in changes:
            content[place % len(content)] = value
        path.write_bytes(content)
        try:
            data = LlavaData(path, Path(name))
            rows = [data[index] for index in range(len(data))]
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            return
        assert rows
        for row in rows:
            with contextlib.suppress(InputError):  # there are no pictures
                row.images()


# --- parquet


def choice(**change: Any) -> dict[str, Any]:
    picture = {"bytes": images.encode(PICTURES["a.jpg"]), "path": None}
    row = {"id": "x", "question": "Is it open?", "choices": "['Yes', 'No']", "correct_answer": 1, "image": picture}
    return row | change


def parquet(path: Path, rows: list[dict[str, Any]], group: int = 2) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def test_multiple_choice_over_row_groups_and_files(tmp_path: Path):
    rows = [choice(question=f"{number}?", correct_answer=number % 2) for number in range(5)]
    parquet(tmp_path / "1.parquet", rows[:3])
    parquet(tmp_path / "2.parquet", [*rows[3:], choice(choices='["a", "b", "it\'s"]', correct_answer=2)])
    data = ChoiceData(tmp_path)
    assert len(data) == 6
    for index in (5, 0, 3, 2, 4, 1):
        row = data[index]
        expected = "?\nA. a\nB. b\nC. it's" if index == 5 else f"{index}?\nA. Yes\nB. No"
        assert expected in row.question
        assert row.answer == ("C" if index == 5 else "AB"[index % 2])
        assert row.kind == "choice" and row.points is None
        assert np.abs(row.images()[0].astype(int) - 40).max() <= 1
    assert "1.parquet, row group 1, row 0" in data[2].source
    assert check(pickle.loads(pickle.dumps(data))) == 6


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"choices": "['only']"}, "'choices' is not a list"),
        ({"choices": "__import__('os')"}, "'choices' is not a list"),
        ({"choices": "[1, 2]"}, "'choices' is not a list"), ({"correct_answer": 2}, "correct_answer is 2"),
        ({"correct_answer": -1}, "correct_answer is -1"), ({"correct_answer": None}, "correct_answer is None"),
        ({"image": {"bytes": None, "path": "p"}}, "no image bytes"), ({"question": ""}, "no question"),
        ({"image": {"bytes": b"zz", "path": None}}, "image cannot be read"),
    ],
)  # fmt: skip
def test_malformed_choices_name_file_row_and_reason(tmp_path: Path, change: dict[str, Any], reason: str):
    path = parquet(tmp_path / "r.parquet", [choice(), choice(), choice(), choice(**change)])
    with pytest.raises(InputError, match=reason) as caught:
        check(ChoiceData(path))
    assert f"{path}, row group 1, row 1" in str(caught.value)


def test_damaged_parquet(tmp_path: Path):
    path = parquet(tmp_path / "r.parquet", [choice()])
    whole = path.read_bytes()
    (tmp_path / "none.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="no parquet file"):
        len(ChoiceData(tmp_path / "none.parquet"))
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    path.write_bytes(whole[:4] + bytes(footer - 4) + whole[footer:])  # all pages gone
    with pytest.raises(InputError, match=r"r\.parquet"):
        check(ChoiceData(path))
    pq.write_table(pa.table({"question": ["a"]}), path)
    with pytest.raises(InputError, match="no column choices, correct_answer, image"):
        len(ChoiceData(path))
    (tmp_path / "sub").mkdir()
    with pytest.raises(InputError, match="no rows"):
        len(ChoiceData(tmp_path / "sub"))


# --- mixtures


def test_a_mixture_is_a_function_of_seed_and_step(root: Path, tmp_path: Path):
    store = toy_store(tmp_path / "toys")
    generated = EmbodiedData(store, "front", ("position", "action tokens"), seed=4, fast=fast.fit_store(store, 4))
    data = [
        LlavaData(write(tmp_path / "r.json", ROWS), root),
        ChoiceData(parquet(tmp_path / "r.parquet", [choice()])),
        generated,
    ]
    rows = draw(data, [2, 1, 1], 64, seed=0, step=5)
    again = draw(data, [2, 1, 1], 64, seed=0, step=5)
    assert [(row.source, row.question, row.answer) for row in rows] == [(r.source, r.question, r.answer) for r in again]
    halves = [draw(data, [2, 1, 1], 64, 0, 5, rank=rank, world=2) for rank in range(2)]
    assert [row.source for row in halves[0] + halves[1]] == [row.source for row in rows]
    assert {row.kind for row in rows} == {"points", "text", "choice", "position", "action tokens"}
    assert [row.source for row in draw(data, [2, 1, 1], 64, 0, 6)] != [row.source for row in rows]
    made = next(row for row in rows if row.kind == "action tokens")
    number = int(made.source.rsplit(" ", 1)[1])
    np.testing.assert_array_equal(made.images()[0], store.images("front", [number])[0])
    asked = questions(
        store, number, np.random.default_rng([4, number]), kinds=("position", "action tokens"), fast=generated.fast
    )
    assert (made.question, made.answer) == (asked.question, asked.answer)
    assert len(EmbodiedData(store, "front", ("position",), rows=np.arange(3))) == 3
