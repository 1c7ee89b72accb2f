"""Question-answer data behind one interface: LLaVA-style JSON or JSONL, multiple choice in parquet, a store's own
questions.

A data set is a sequence of `Row`s whose pictures are decoded when asked for. `draw` mixes data sets; its batches are
a function of (seed, step). What is malformed is an InputError with file, row and reason: JSON structure when a file
is opened, pictures (and parquet rows) when they are met, all of them at once with `check`.

Trap: `<image>` markers are counted and taken out of the text, since a backbone puts the pictures first; what a text
said between two pictures is then said after both.
"""

from __future__ import annotations

import ast
import codecs
import json
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vlm4vla_core import images
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from vlm4vla_core.episodes.store import EpisodeStore
    from vlm4vla_core.fast import FastTokenizer
    from vlm4vla_core.vqa.embodied import Question

MARKER = "<image>"
_BLOCK = 1 << 20
_LONGEST = 1 << 26  # characters of one JSON row; what is longer is a missing bracket
_GAP = re.compile(r"[\s,]*")
_NUMBER = r"\s*(-?\d+(?:\.\d*)?|-?\.\d+)\s*"
_PAIR = re.compile(rf"\({_NUMBER},{_NUMBER}\)")
_POINTS = re.compile(r"\[\s*(?:\([^()]*\)[\s,]*)+\]|^\s*\([^()]*\)\s*$")


@dataclass(frozen=True)
class Row:
    """One question with its answer.

    kind: "points", "choice", "text", or the generator's kind. points: (n, 2) fractions of width and height, or None.
    source: file and row. history: earlier questions and answers of the same conversation. load: reads the pictures.
    """

    question: str
    answer: str
    kind: str
    source: str
    load: Callable[[], list[np.ndarray]]
    points: np.ndarray | None = None
    history: tuple[tuple[str, str], ...] = ()

    def images(self, size: int | None = None) -> list[np.ndarray]:
        """The pictures, uint8 (H, W, 3) each, square of `size` when given. Raises InputError on a bad one."""
        pictures = self.load()
        return [images.resize(picture[None], size)[0] for picture in pictures] if size else pictures


class VQAData(Protocol):
    """A sequence of rows."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Row: ...


def draw(
    data: Sequence[VQAData],
    weights: Sequence[float],
    batch_size: int,
    seed: int,
    step: int,
    *,
    rank: int = 0,
    world: int = 1,
) -> list[Row]:
    """The rows of one step out of a weighted mixture (VQA-Mix), process `rank`'s slice; see `sampling.mixed_batch`."""
    from vlm4vla_core.episodes.sampling import mixed_batch

    places = [np.arange(len(one)) for one in data]
    which, rows = mixed_batch(places, weights, batch_size, seed, step, rank=rank, world=world)
    return [data[part][int(row)] for part, row in zip(which, rows, strict=True)]


def check(data: VQAData) -> int:
    """Read every row and decode every picture; returns how many pictures. Raises InputError at the first that fails."""
    return sum(len(data[index].images()) for index in range(len(data)))


def parse_points(answer: str) -> np.ndarray | None:
    """The points (n, 2) that an answer lists, "[(0.461, 0.527), …]" or a single "(0.461, 0.527)", else None.

    Only pairs of fractions from 0 to 1 are points: pixels and boxes of four numbers are not.
    """
    found = _POINTS.search(answer)
    listed = found.group().count("(") if found else 0
    pairs = _PAIR.findall(found.group()) if found else []
    points = np.array(pairs, np.float64).reshape(-1, 2)
    return points if pairs and len(pairs) == listed and ((points >= 0) & (points <= 1)).all() else None


# --- LLaVA-style JSON


class LlavaData:
    """Conversations of a JSON list or a JSONL file about pictures below `root`, one row per question.

    RoboPoint, RefSpatial, RoboBrain2's ShareRobot and multi-frame ViCA rows have this layout: `image` (or `images`) one
    relative path or several, `conversations` of human and gpt in turn, a marker per picture. Only places in the file
    are kept in memory.
    """

    def __init__(self, path: Path | str, root: Path | str) -> None:
        self.path, self.root = Path(path), Path(root)
        self._starts, self._ends, self._before = array("q"), array("q"), array("q")
        self._count = 0
        try:
            for number, (start, end, value) in enumerate(_json_rows(self.path)):
                _, turns = _conversation(value, f"{self.path}, row {number}")
                for kept, place in ((self._starts, start), (self._ends, end), (self._before, self._count)):
                    kept.append(place)
                self._count += len(turns)
        except OSError as error:
            raise InputError(f"cannot be read ({error.strerror})", where=self.path, fix="give a JSON file") from None
        if not self._count:
            raise InputError("no rows", where=self.path, fix="give a JSON list of conversations")

    def __len__(self) -> int:
        return self._count

    @property
    def before(self) -> np.ndarray:
        """(n,) the row of the first question of each conversation."""
        return np.frombuffer(self._before, np.int64)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self._count:
            raise IndexError(f"row {index} of {self._count}")
        number = bisect_right(self._before, index) - 1
        where = f"{self.path}, row {number}"
        try:
            with self.path.open("rb") as handle:
                handle.seek(self._starts[number])
                value = json.loads(handle.read(self._ends[number] - self._starts[number]))
        except (OSError, ValueError):
            raise InputError("the file has changed since it was opened", where=where, fix="open it again") from None
        names, turns = _conversation(value, where)
        turn = index - self._before[number]
        (question, answer), points = turns[turn], parse_points(turns[turn][1])
        load = partial(_load_files, [self.root / name for name in names], where)
        return Row(question, answer, "text" if points is None else "points", where, load, points, tuple(turns[:turn]))


def _json_rows(path: Path) -> Iterator[tuple[int, int, Any]]:
    """First byte, end and value of each element of a JSON list, or of each JSON value of a JSONL file, block by block.

    Bytes are read as Latin-1, so that places in the text are places in the file; values are for their structure only.
    """
    scan, utf8 = json.JSONDecoder().raw_decode, codecs.getincrementaldecoder("utf-8")()
    text, base, at, number, listed = "", 0, 0, 0, None  # text[at] is byte base + at

    def wrong(reason: str) -> InputError:
        return InputError(
            f"malformed JSON ({reason})", where=f"{path}, row {number}", fix="repair or fetch the file again"
        )

    with path.open("rb") as handle:

        def more(size: int) -> bool:
            nonlocal text, base, at
            block = handle.read(size)
            try:
                utf8.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise wrong(f"no UTF-8 text: {error.reason}") from None
            text, base, at = text[at:] + block.decode("latin-1"), base + at, 0
            return bool(block)

        while True:
            at = _GAP.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if at == len(text):
                if more(_BLOCK):
                    continue
                if listed:
                    raise wrong("the list does not end")
                return
            if listed is None:
                listed = text[at] == "["
                at += listed
            elif listed and text[at] == "]":
                if (text[at + 1 :] + handle.read(_BLOCK).decode("latin-1")).strip():
                    raise wrong("something follows the list")
                return
            else:
                try:
                    value, end = scan(text, at)
                except json.JSONDecodeError as error:  # or the row goes on in the next block
                    if len(text) - at < _LONGEST and more(max(_BLOCK, len(text) - at)):
                        continue
                    raise wrong(error.msg) from None
                except (ValueError, RecursionError):
                    raise wrong("nested too deeply, or a number of thousands of digits") from None
                yield base + at, base + end, value
                at, number = end, number + 1


def _conversation(value: Any, where: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Picture names and (question, answer) turns of one row. Raises InputError with the reason."""

    def wrong(reason: str) -> InputError:
        return InputError(f"malformed row: {reason}", where=where, fix="repair or remove it")

    if not isinstance(value, dict):
        raise wrong(f"not an object but {type(value).__name__}")
    if "video" in value:
        raise wrong("it names a video; extract its frames and list them under 'image'")
    names = value.get("image", value.get("images")) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise wrong("'image' is neither a path nor a list of paths")
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise wrong(f"image path {name!r} leaves the image root")
    said = value.get("conversations")
    if not isinstance(said, list) or not said or len(said) % 2:
        raise wrong("'conversations' is not a list of questions and answers")
    texts = []
    for turn, speakers in zip(said, [("human", "user"), ("gpt", "assistant")] * (len(said) // 2), strict=True):
        if not isinstance(turn, dict) or turn.get("from") not in speakers or not isinstance(turn.get("value"), str):
            raise wrong(f"a turn is not from '{speakers[0]}' with a text 'value'")
        texts.append(turn["value"])
    markers = sum(text.count(MARKER) for text in texts[::2])
    if markers != len(names):
        raise wrong(f"{markers} {MARKER} markers for {len(names)} images")
    asked = [text.replace(MARKER, "").strip() for text in texts[::2]]
    return names, list(zip(asked, texts[1::2], strict=True))


def _load_files(paths: Sequence[Path], where: str) -> list[np.ndarray]:
    pictures = []
    for path in paths:
        try:
            pictures.append(images.decode(path.read_bytes()))
        except (OSError, ValueError) as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            raise InputError(f"image {path} {reason}", where=where, fix="fetch it, or correct the image root") from None
    return pictures


# --- multiple choice in parquet


@dataclass(frozen=True)
class ChoiceData:
    """Multiple choice in parquet files with the pictures inside, as Robo2VLM: question, choices, correct_answer, image.

    path: a file, or a folder of them, read in order of name. The answer is the letter of the right choice, and
    the question lists the choices by letter (our wording). A row group is read whole to get one of its rows.
    """

    path: Path
    _last: dict[tuple[int, int], list[dict[str, Any]]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def _groups(self) -> tuple[list[tuple[Path, int]], np.ndarray]:
        """(file, row group) of each group, and where its rows begin (n + 1,)."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        files = sorted(Path(self.path).glob("*.parquet")) if Path(self.path).is_dir() else [Path(self.path)]
        groups, sizes = [], [0]
        for file in files:
            try:
                metadata = pq.read_metadata(file)
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"no parquet file ({str(error).splitlines()[0]})", where=file) from None
            if missing := sorted(
                {"question", "choices", "correct_answer", "image"} - set(metadata.schema.to_arrow_schema().names)
            ):
                raise InputError(f"no column {', '.join(missing)}", where=file, fix="give multiple choice with images")
            groups += [(file, index) for index in range(metadata.num_row_groups)]
            sizes += [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        if not sum(sizes):
            raise InputError("no rows", where=self.path, fix="give parquet files with rows")
        return groups, np.cumsum(sizes)

    def __len__(self) -> int:
        return int(self._groups[1][-1])

    def __getitem__(self, index: int) -> Row:
        import pyarrow as pa
        import pyarrow.parquet as pq

        groups, starts = self._groups
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(np.searchsorted(starts, index, side="right")) - 1
        file, group = groups[number]
        where = f"{file}, row group {group}, row {index - starts[number]}"
        rows = self._last.get((number, group))
        if rows is None:
            try:
                table = pq.ParquetFile(file).read_row_group(group, ["question", "choices", "correct_answer", "image"])
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"damaged ({str(error).splitlines()[0]})", where=where, fix="fetch it again") from None
            rows = table.to_pylist()
            self._last.clear()
            self._last[number, group] = rows
        row = rows[index - int(starts[number])]
        choices, right, image = _choices(row["choices"]), row["correct_answer"], row["image"]
        data = bytes((image.get("bytes") if isinstance(image, dict) else image) or b"")
        for bad, reason in [
            (not isinstance(row["question"], str) or not row["question"], "no question"),
            (not 2 <= len(choices) <= 26, "'choices' is not a list of 2 to 26 texts"),
            (
                not isinstance(right, int) or not 0 <= right < len(choices),
                f"correct_answer is {right!r}, not a choice's number",
            ),
            (not data, "no image bytes"),
        ]:
            if bad:
                raise InputError(f"malformed row: {reason}", where=where, fix="repair or remove it")
        letters = [chr(ord("A") + place) for place in range(len(choices))]
        listing = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
        question = f"{row['question'].replace(MARKER, '').strip()}\n{listing}\nAnswer with a letter."
        return Row(question, letters[right], "choice", where, partial(_load_bytes, data, where))


def _choices(value: Any) -> list[str]:
    """A list of texts, written as such, in Python or in JSON; empty when it is none."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return []
    return value if isinstance(value, list) and all(isinstance(choice, str) for choice in value) else []


def _load_bytes(data: bytes, where: str) -> list[np.ndarray]:
    try:
        return [images.decode(data)]
    except ValueError as error:
        raise InputError(f"image cannot be read ({error})", where=where, fix="repair or remove the row") from None


# --- questions generated from a store


@dataclass(frozen=True)
class EmbodiedData:
    """One generated question per row of an episode store, drawn by (seed, row); see `embodied.questions`.

    A row of which these kinds ask nothing is stood in for by the next one. rows: which (default: all). fast: the
    tokenizer of "action tokens" answers.
    """

    store: EpisodeStore
    camera: str
    kinds: tuple[str, ...]
    seed: int = 0
    rows: np.ndarray | None = None
    fast: FastTokenizer | None = None

    def __len__(self) -> int:
        return len(self.store) if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> Row:
        from vlm4vla_core.vqa.embodied import NothingToAsk, questions

        for place in (np.arange(len(self)) + index) % len(self):
            row = int(place if self.rows is None else self.rows[place])
            rng = np.random.default_rng([self.seed, row])
            try:
                asked = questions(self.store, row, rng, kinds=self.kinds, camera=self.camera, fast=self.fast)
            except NothingToAsk:
                continue
            load, source = partial(_load_store, self.store, self.camera, row, asked), f"{self.store.path}, row {row}"
            return Row(asked.question, asked.answer, asked.kind, source, load, parse_points(asked.answer))
        raise InputError(f"no row has a question of kind {', '.join(self.kinds)}", where=self.store.path)


def _load_store(store: EpisodeStore, camera: str, row: int, asked: Question) -> list[np.ndarray]:
    from vlm4vla_core.vqa.embodied import pictures

    return list(pictures(store, camera, [row], [asked]))
