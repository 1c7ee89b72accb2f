"""The CALVIN reader on folders written in CALVIN's own layout, on two original frames, and on hostile pickles."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm4vla_core.actions import CALVIN
from vlm4vla_core.episodes import calvin, conversion
from vlm4vla_core.episodes.calvin import CalvinSource, open_calvin, read_npz
from vlm4vla_core.episodes.source import Skipped
from vlm4vla_core.episodes.transforms import calvin_relative
from vlm4vla_core.episodes.unpickle import load_npy
from vlm4vla_core.episodes.writer import Episode
from vlm4vla_core.errors import InputError


def write_frame(part: Path, index: int, **change: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(index)
    frame: dict[str, Any] = {
        "actions": rng.normal(0, 1, 7), "rel_actions": rng.uniform(-1, 1, 7), "robot_obs": rng.normal(0, 1, 15),
        "scene_obs": rng.normal(0, 1, 24), "rgb_static": rng.integers(0, 255, (20, 20, 3), np.uint8),
        "rgb_gripper": rng.integers(0, 255, (8, 8, 3), np.uint8), "depth_gripper": np.full((8, 8), 0.1234, "f4"),
        "depth_static": rng.uniform(3, 6, (20, 20)).astype("f4"),
    }  # fmt: skip
    frame = {key: value for key, value in (frame | change).items() if value is not None}
    np.savez_compressed(part / f"episode_{index:07d}.npz", **frame)
    return frame


def annotations(spans: list[tuple[int, int]], texts: list[str] | None = None) -> dict[str, Any]:
    count = len(spans)
    texts = texts if texts is not None else [f"do thing {i}" for i in range(count)]
    language = {"ann": texts, "task": [f"task_{i}" for i in range(count)], "emb": np.zeros((count, 1, 384), np.float32)}
    return {"language": language, "info": {"episodes": [], "indx": spans}}


def write_calvin(root: Path, spans: list[tuple[int, int]], split: str = "training", **more: Any) -> Path:
    """A split: the frames that the annotations name, the annotations, one recording over all, and scenes if given."""
    part = root / split
    (part / "lang_annotations").mkdir(parents=True, exist_ok=True)
    for index in {i for first, last in spans for i in range(first, last + 1)}:
        write_frame(part, index)
    np.save(part / "lang_annotations" / "auto_lang_ann.npy", annotations(spans, more.get("texts")))
    runs = more.get("runs", [(0, 10**6)])
    np.save(part / "ep_start_end_ids.npy", np.array(runs))
    if "scenes" in more:
        np.save(part / "scene_info.npy", more["scenes"])
    return part


def read(source: CalvinSource, cameras: tuple[str, ...] = ("rgb_static",)) -> list[Episode | Skipped]:
    return [one for unit in source.units(source.splits) for one in source.episodes(unit, cameras, "calvin_rel")]


def kept(source: CalvinSource, cameras: tuple[str, ...] = ("rgb_static",)) -> list[Episode]:
    return [one for one in read(source, cameras) if isinstance(one, Episode)]


def test_one_annotation_is_one_episode_with_its_end(tmp_path: Path):
    write_calvin(tmp_path, [(5, 9), (8, 8)])
    write_calvin(tmp_path, [(40, 42)], "validation")
    source = pickle.loads(pickle.dumps(open_calvin(tmp_path)))
    assert (source.format, source.splits, source.convention, source.rendered) == (
        "calvin",
        ("train", "val"),
        CALVIN,
        True,
    )
    first, second, third = kept(source, ("rgb_gripper", "rgb_static"))
    assert [len(e.action) for e in (first, second, third)] == [5, 1, 3]
    assert [e.split for e in (first, second, third)] == ["train", "train", "val"]
    assert (first.instruction, first.info) == ("do thing 0", {"task": "task_0", "scene": "", "domain": ""})
    assert first.source == "train, annotation 0, frames 5 to 9"
    for step, index in enumerate(range(5, 10)):
        frame = write_frame(tmp_path / "training", index)
        np.testing.assert_array_equal(first.action[step], frame["rel_actions"].astype(np.float32))
        np.testing.assert_array_equal(first.state[step], frame["robot_obs"].astype(np.float32))
        np.testing.assert_array_equal(first.images["rgb_static"][step], frame["rgb_static"])
        np.testing.assert_array_equal(first.images["rgb_gripper"][step], frame["rgb_gripper"])
    assert first.depth == {}
    assert open_calvin(tmp_path / "validation").splits == ("val",)


def test_depth_in_millimetres(tmp_path: Path):
    part = write_calvin(tmp_path, [(0, 1)])
    (episode,) = kept(open_calvin(tmp_path, depth=True), ("rgb_gripper", "rgb_static"))
    metres = np.load(part / "episode_0000001.npz")["depth_static"]
    assert episode.depth["rgb_static"].dtype == np.uint16
    assert np.abs(episode.depth["rgb_static"][1] - metres * 1000.0).max() <= 0.5001
    assert (episode.depth["rgb_gripper"] == 123).all()


def test_scenes(tmp_path: Path):
    scenes = {"calvin_scene_B": [0, 9], "calvin_scene_C": [10, 19]}
    write_calvin(tmp_path, [(0, 2), (8, 9), (10, 12)], scenes=scenes)
    assert [e.info["scene"] for e in kept(open_calvin(tmp_path))] == ["B", "B", "C"]
    assert [e.instruction for e in kept(open_calvin(tmp_path, scenes=("C",)))] == ["do thing 2"]
    with pytest.raises(InputError, match=r"no annotation in scene A"):
        open_calvin(tmp_path, scenes=("A",))
    with pytest.raises(InputError, match=r"no scene 'c'.*known: B, C"):
        open_calvin(tmp_path, scenes=("c",))
    (tmp_path / "training" / "scene_info.npy").unlink()
    with pytest.raises(InputError, match=r"no scene_info\.npy says which scene"):
        open_calvin(tmp_path, scenes=("B",))


def test_units_are_runs_of_annotations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    part = write_calvin(tmp_path, [(i, i + 2) for i in range(7)])
    monkeypatch.setattr(calvin, "STEPS_PER_UNIT", 8)
    source = open_calvin(tmp_path)
    units = source.units(("train",))
    assert [(unit.name, unit.key) for unit in units] == [
        ("training-000000", ("train", 0, 3)),
        ("training-000003", ("train", 3, 6)),
        ("training-000006", ("train", 6, 7)),
    ]
    frames = [part / f"episode_{index:07d}.npz" for index in (6, 7, 8)]
    assert list(units[2].files) == [part / "lang_annotations" / "auto_lang_ann.npy", *frames]
    before = [conversion.stamp(source, unit) for unit in units]
    os.utime(frames[1], ns=(1, 1))  # of no annotation's first frame, and read by two units
    after = [conversion.stamp(source, unit) for unit in units]
    assert [one != other for one, other in zip(before, after, strict=True)] == [False, True, True]
    assert len(kept(source)) == 7


def test_what_is_left_out_is_told(tmp_path: Path):
    write_calvin(tmp_path, [(0, 1), (2, 3), (4, 6)], texts=["", "fine", "two recordings"], runs=[(0, 5), (6, 9)])
    first, second, third = read(open_calvin(tmp_path))
    assert first == Skipped("without language", "train, annotation 0, frames 0 to 1")
    assert isinstance(second, Episode)
    assert third == Skipped("whose frames cross two recordings", "train, annotation 2, frames 4 to 6")


# --- damage ---------------------------------------------------------------------------------------------


def test_missing_frames_are_named(tmp_path: Path):
    part = write_calvin(tmp_path, [(0, 3)])
    for index in (1, 3):
        (part / f"episode_{index:07d}.npz").unlink()
        with pytest.raises(InputError, match=rf"frame missing .*episode_{index:07d}\.npz"):
            kept(open_calvin(tmp_path))


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"rgb_static": None}, "has no 'rgb_static'"),
        (
            {"rgb_static": np.zeros((4, 4, 3), np.uint8)},
            r"'rgb_static' is uint8 \(4, 4, 3\), in earlier .*\(20, 20, 3\)",
        ),
        ({"rel_actions": np.full(7, np.nan)}, r"'rel_actions' is NaN in dimension 0 \(x\).*annotation 0.*step 1"),
        ({"robot_obs": np.full(15, 1e300)}, r"'robot_obs' is infinite .*step 1"),
        ({"rel_actions": np.zeros(6)}, r"'rel_actions' is float64 \(6,\)"),
        ({"rgb_static": np.array([{}], object)}, "'rgb_static' of the frame cannot be read .*allow_pickle"),
    ],
)
def test_wrong_frames_are_named(tmp_path: Path, change: dict[str, Any], pattern: str):
    part = write_calvin(tmp_path, [(0, 2)])
    write_frame(part, 1, **change)
    with pytest.raises(InputError, match=pattern):
        kept(open_calvin(tmp_path))


def test_a_frame_cut_or_changed_anywhere_is_told(tmp_path: Path):
    write_frame(tmp_path, 0, **dict.fromkeys(("rgb_static", "depth_static", "depth_gripper", "scene_obs", "actions")))
    path = tmp_path / "episode_0000000.npz"
    keys = ("rel_actions", "robot_obs", "rgb_gripper")
    whole, good = path.read_bytes(), read_npz(path, keys)
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"cannot be read .*episode_0000000\.npz"):
            read_npz(path, keys)
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x20]) + whole[place + 1 :])
        try:
            found = read_npz(path, keys)
        except InputError as error:
            assert str(path) in str(error)
        else:  # a byte that says nothing about the content, such as a date
            assert all(np.array_equal(found[key], good[key]) for key in keys)


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ({"language": {}}, "not CALVIN's language annotations .*KeyError"),
        (annotations([(0, 1)], ["one", "too many"]), "2 instructions, 1 tasks, 1 runs"),
        (annotations([(3, 1)]), "frames 3 to 1"),
        (annotations([(0, 1, 2)]), "not CALVIN's language annotations"),
        ([1, 2], "not CALVIN's language annotations"),
    ],
)
def test_strange_annotations(tmp_path: Path, content: Any, pattern: str):
    part = write_calvin(tmp_path, [(0, 1)])
    np.save(part / "lang_annotations" / "auto_lang_ann.npy", content)
    with pytest.raises(InputError, match=pattern) as caught:
        open_calvin(tmp_path)
    assert "auto_lang_ann.npy" in str(caught.value)


def test_an_annotation_of_a_billion_frames_is_not_believed(tmp_path: Path):
    part = write_calvin(tmp_path, [(0, 1)], runs=[(0, 10**10)])
    np.save(part / "lang_annotations" / "auto_lang_ann.npy", annotations([(0, 10**9)]))
    with pytest.raises(InputError, match="frame missing"):
        kept(open_calvin(tmp_path))


def test_missing_descriptions(tmp_path: Path):
    part = write_calvin(tmp_path, [(0, 1)])
    (part / "ep_start_end_ids.npy").unlink()
    assert len(kept(open_calvin(tmp_path))) == 1
    (part / "lang_annotations").rename(part / "lang_paraphrase-MiniLM-L3-v2")
    assert len(kept(open_calvin(tmp_path))) == 1
    (part / "lang_paraphrase-MiniLM-L3-v2" / "auto_lang_ann.npy").unlink()
    with pytest.raises(InputError, match=r"no language annotations .*auto_lang_ann\.npy"):
        open_calvin(tmp_path)
    with pytest.raises(InputError, match="no CALVIN data here"):
        open_calvin(tmp_path / "training" / "lang_paraphrase-MiniLM-L3-v2")
    with pytest.raises(InputError, match="no such folder"):
        open_calvin(tmp_path / "gone")


# --- pickles --------------------------------------------------------------------------------------------

PLAIN = {
    "text": ["a", np.str_("b")], "span": [(1, 2)], "number": np.int64(3), "set": {1}, "bytes": b"\xff\x00",
    "array": np.arange(6, dtype=np.float32).reshape(2, 3), "object": np.array(["x", None], dtype=object), "z": 1 + 2j,
}  # fmt: skip


def npy(content: bytes) -> bytes:
    """A .npy file of an object array of shape () around these pickled bytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": ()})
    return buffer.getvalue() + content


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_pickles_of_both_numpys(tmp_path: Path, protocol: int, core: str):
    array = np.empty((), object)
    array[()] = PLAIN
    data = pickle.dumps(array, protocol=protocol)
    if protocol == 4:  # names are counted strings: rebuild the frame without its length
        pieces = []
        for op, arg, at, end in _operations(data):
            if op.name == "SHORT_BINUNICODE":
                text = arg.replace("numpy._core", core).encode()
                pieces.append(pickle.SHORT_BINUNICODE + bytes([len(text)]) + text)
            elif op.name != "FRAME":
                pieces.append(data[at:end])
        data = b"".join(pieces)
    else:
        data = data.replace(b"cnumpy._core.", b"c" + core.encode() + b".")
    assert core.encode() in data
    path = tmp_path / "x.npy"
    path.write_bytes(npy(data))
    found = load_npy(path)
    assert found.keys() == PLAIN.keys()
    for key, value in PLAIN.items():
        np.testing.assert_array_equal(found[key], value)


def _operations(data: bytes) -> list[tuple[Any, Any, int, int]]:
    found = [(op, arg, at) for op, arg, at in pickletools.genops(data)]
    ends = [*(at for _, _, at in found[1:]), len(data)]
    return [(op, arg, at, end) for (op, arg, at), end in zip(found, ends, strict=True)]


def test_plain_arrays_need_no_pickle(tmp_path: Path):
    np.save(tmp_path / "x.npy", np.arange(4).reshape(2, 2))
    np.testing.assert_array_equal(load_npy(tmp_path / "x.npy"), [[0, 1], [2, 3]])
    np.save(tmp_path / "y.npy", PLAIN)  # as this numpy writes it
    assert load_npy(tmp_path / "y.npy")["span"] == [(1, 2)]


class Hostile:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.reduced = (call, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_foreign_classes_are_refused_by_name_and_nothing_runs(tmp_path: Path, protocol: int):
    witness = tmp_path / "ran"
    cases = [
        (Hostile(os.system, f"touch {witness}"), r"(posix|nt)\.system"),
        (Hostile(eval, f"open({str(witness)!r}, 'w')"), r"(builtins|__builtin__)\.eval"),
        (Hostile(getattr, {}, "items"), r"(builtins|__builtin__)\.getattr"),
        (Hostile(Path, str(witness)), r"pathlib"),
    ]
    for number, (content, name) in enumerate(cases):
        path = tmp_path / f"{number}.npy"
        path.write_bytes(npy(pickle.dumps({"a": content}, protocol=protocol)))
        with pytest.raises(InputError, match=rf"it names '{name}.*only numpy arrays.*{number}\.npy"):
            load_npy(path)
    assert not witness.exists()


def test_modules_are_not_even_imported(tmp_path: Path):
    (tmp_path / "x.npy").write_bytes(npy(b"cvlm4vla_no_such_module\nthing\n."))
    with pytest.raises(InputError, match=r"it names 'vlm4vla_no_such_module\.thing'"):
        load_npy(tmp_path / "x.npy")
    (tmp_path / "x.npy").write_bytes(npy(b"X\x04\x00\x00\x00abcdQ."))  # a persistent id
    with pytest.raises(InputError, match="outside itself"):
        load_npy(tmp_path / "x.npy")


def test_a_pickle_cut_anywhere_is_one_clear_error(tmp_path: Path):
    path = tmp_path / "x.npy"
    np.save(path, annotations([(0, 1), (2, 5)]) | {"language": {"ann": ["a"], "emb": np.zeros((2, 1, 3))}})
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"not a readable \.npy file .*x\.npy") as caught:
            load_npy(path)
        assert "\n" not in str(caught.value)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.data())
def test_no_damage_to_a_pickle_crashes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    buffer = io.BytesIO()
    np.save(buffer, annotations([(0, 1)]) | {"language": {"ann": ["a"], "emb": np.zeros((1, 1, 2))}})
    whole = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "fuzz.npy"
    path.write_bytes(bytes(whole))
    try:
        load_npy(path)
    except InputError as error:
        assert str(path) in str(error)


# --- originals ------------------------------------------------------------------------------------------


@pytest.mark.samples
def test_original_frames(samples: Path, tmp_path: Path):
    for number, frame in enumerate(("0358482", "0359423")):
        path = samples / "calvin_npz" / f"episode_{frame}.npz"
        with np.load(path) as raw:
            np.testing.assert_allclose(
                calvin_relative(raw["actions"][None], raw["robot_obs"][None])[0], raw["rel_actions"], atol=1e-9
            )
        part = tmp_path / str(number) / "training"
        (part / "lang_annotations").mkdir(parents=True)
        shutil.copy(path, part)
        spans = [(int(frame), int(frame))]
        np.save(part / "lang_annotations" / "auto_lang_ann.npy", annotations(spans))
        (episode,) = kept(open_calvin(part.parent, depth=True), ("rgb_static", "rgb_gripper"))
        with np.load(path) as raw:
            np.testing.assert_array_equal(episode.action[0], raw["rel_actions"].astype(np.float32))
            np.testing.assert_array_equal(episode.images["rgb_static"][0], raw["rgb_static"])
        assert episode.images["rgb_static"].shape == (1, 200, 200, 3)
        assert episode.images["rgb_gripper"].shape == (1, 84, 84, 3)
        assert episode.state.shape == (1, 15)
        assert episode.action[0, 6] == (1, -1)[number]  # open, then closed
        assert (episode.depth["rgb_static"].min(), episode.depth["rgb_static"].max()) == ((3732, 6202), (3724, 6202))[
            number
        ]
