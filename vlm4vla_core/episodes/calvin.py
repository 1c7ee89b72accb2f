"""Reader for CALVIN: one compressed npz per time step, and language annotations that name runs of them.

`training/` and `validation/` hold `episode_0000000.npz`…, `lang_annotations/auto_lang_ann.npy` (a pickle, read
through a restricted unpickler), `ep_start_end_ids.npy` (recordings) and `scene_info.npy` (which frames show which
of the tables A to D). One annotation is one episode; frames without language are not read.
Traps: an annotation's end is inclusive; numbers are float64 whatever CALVIN's own description says; of ABC→D the
validation split shows another scene (D) than training; a frame may belong to several annotations.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlm4vla_core.actions import CALVIN, ActionConvention
from vlm4vla_core.episodes.checks import check_request, check_splits, numbers, reason
from vlm4vla_core.episodes.source import Skipped, Unit
from vlm4vla_core.episodes.unpickle import load_npy
from vlm4vla_core.episodes.writer import Episode
from vlm4vla_core.errors import InputError, nearest

STEPS_PER_UNIT = 4000
STATE = (
    "x",
    "y",
    "z",
    "roll",
    "pitch",
    "yaw",
    "gripper_width",
    *(f"joint_{i}" for i in range(1, 8)),
    "gripper_command",
)
_FOLDERS = {"train": "training", "val": "validation"}
_NO_LANGUAGE = "only annotated frames are converted: fetch lang_annotations/auto_lang_ann.npy of this split"


class Annotation(NamedTuple):
    """One instruction and its frames first…last, both included. task: CALVIN's name of it. scene: "A" to "D" or ""."""

    first: int
    last: int
    text: str
    task: str
    scene: str


@dataclass(frozen=True)
class _Files:
    """Descriptions and the frames of some spans, each once; named when iterated: a released split has a million."""

    described: tuple[Path, ...]
    part: Path
    spans: tuple[tuple[int, int], ...]

    def __iter__(self) -> Iterator[Path]:
        yield from self.described
        seen = set[int]()
        for first, last in self.spans:
            for index in range(first, last + 1):
                if index not in seen:
                    seen.add(index)
                    yield _frame(self.part, index)


@dataclass(frozen=True)
class CalvinSource:
    """An opened CALVIN data set: a `Source` whose units are runs of annotations of about `STEPS_PER_UNIT` steps.

    parts: split -> folder of its frames. annotations: split -> all of them, in order. runs: split -> first and last
    frame of each recording.
    """

    folder: Path
    name: str
    parts: dict[str, Path]
    annotations: dict[str, tuple[Annotation, ...]]
    runs: dict[str, tuple[tuple[int, int], ...]]
    depth: bool
    format: str = "calvin"
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    convention: ActionConvention = CALVIN
    state_names: tuple[str, ...] = STATE
    cameras: tuple[str, ...] = ("rgb_static", "rgb_gripper")
    transforms: tuple[str, ...] = ("calvin_rel",)
    rendered: bool = True

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.parts)

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        return {"rgb_static": (200, 200), "rgb_gripper": (84, 84)}

    def units(self, splits: tuple[str, ...]) -> list[Unit]:
        """Runs of annotations, with the descriptions and all the frames that are read. Raises InputError on an unknown
        split."""
        check_splits(self, splits)
        units = []
        for split in splits:
            part, annotations = self.parts[split], self.annotations[split]
            described = tuple(path for path in (_language(part), part / "scene_info.npy") if path.is_file())
            for first, last in _runs([a.last - a.first + 1 for a in annotations]):
                spans = [(a.first, a.last) for a in annotations[first:last] if a.text and self._within(split, a)]
                files = _Files(described, part, tuple(spans))
                units.append(Unit(f"{part.name}-{first:06d}", split, files, (split, first, last)))
        return units

    def episodes(self, unit: Unit, cameras: tuple[str, ...], transform: str) -> Iterator[Episode | Skipped]:
        """One episode per annotation, with the relative actions that the files hold (see `calvin_relative`).

        Raises InputError naming the frame's file when it is missing, damaged or of another shape than the first.
        """
        check_request(self, cameras, transform)
        split, first, last = str(unit.key[0]), int(unit.key[1]), int(unit.key[2])
        for number in range(first, last):
            annotation = self.annotations[split][number]
            where = f"{unit.split}, annotation {number}, frames {annotation.first} to {annotation.last}"
            if not annotation.text:
                yield Skipped("without language", where)
            elif not self._within(split, annotation):
                yield Skipped("whose frames cross two recordings", where)
            else:
                yield self._episode(unit.split, self.parts[split], annotation, cameras, where)

    def _within(self, split: str, annotation: Annotation) -> bool:
        runs = self.runs[split]
        return not runs or any(start <= annotation.first and annotation.last <= end for start, end in runs)

    def _episode(self, split: str, part: Path, annotation: Annotation, cameras: tuple[str, ...], where: str) -> Episode:
        depths = {camera: camera.replace("rgb", "depth") for camera in cameras} if self.depth else {}
        keys = ("rel_actions", "robot_obs", *cameras, *depths.values())
        if not (end := _frame(part, annotation.last)).is_file():  # before anything is made of that many steps
            raise InputError("frame missing", where=end, fix="fetch the file, an annotation names it")
        paths = [_frame(part, index) for index in range(annotation.first, annotation.last + 1)]
        read: dict[str, np.ndarray] = {}
        for step, path in enumerate(paths):
            for key, value in read_npz(path, keys).items():
                if step == 0:
                    read[key] = np.empty((len(paths), *value.shape), value.dtype)
                if read[key].shape[1:] != value.shape or read[key].dtype != value.dtype:
                    what = f"'{key}' is {value.dtype} {value.shape}, in earlier frames {read[key].dtype}"
                    raise InputError(f"{what} {read[key].shape[1:]}", where=path, fix="fetch the file again")
                read[key][step] = value
        return Episode(
            instruction=annotation.text,
            images={camera: read[camera] for camera in cameras},
            state=numbers(read["robot_obs"], STATE, "robot_obs", f"{part / 'episode_*.npz'}, {where}"),
            action=numbers(read["rel_actions"], CALVIN.names, "rel_actions", f"{part / 'episode_*.npz'}, {where}"),
            split=split,
            source=where,
            info={"task": annotation.task, "scene": annotation.scene, "domain": annotation.scene},
            depth={camera: _millimetres(read[key]) for camera, key in depths.items()},
        )


def open_calvin(source: Path, *, scenes: Sequence[str] = (), depth: bool = False) -> CalvinSource:
    """Open a CALVIN folder, or one of its splits. scenes: keep only these, such as ("A", "B"). depth: read it too, as
    millimetres in 16 bits.

    Raises InputError when there is no annotated split, on damaged descriptions, and on an unknown scene.
    """
    source = Path(source)
    parts = {split: source / name for split, name in _FOLDERS.items() if (source / name).is_dir()}
    if not parts and source.is_dir() and next(source.glob("episode_*.npz"), None):
        parts = {"val" if source.name == "validation" else "train": source}
    if not parts:
        fix = "give the folder that holds training/ and validation/"
        raise InputError("no CALVIN data here" if source.is_dir() else "no such folder", where=source, fix=fix)
    annotations = {split: _annotations(part) for split, part in parts.items()}
    if scenes:
        annotations = {split: _of_scenes(kept, scenes, parts[split]) for split, kept in annotations.items()}
        if not any(annotations.values()):
            raise InputError(f"no annotation in scene {', '.join(scenes)}", where=source)
    runs = {split: _recordings(part / "ep_start_end_ids.npy") for split, part in parts.items()}
    return CalvinSource(source, source.name, parts, annotations, runs, depth)


def _of_scenes(annotations: tuple[Annotation, ...], scenes: Iterable[str], part: Path) -> tuple[Annotation, ...]:
    known = {annotation.scene for annotation in annotations}
    if "" in known:
        what = "no scene_info.npy says" if known == {""} else "scene_info.npy does not say for all frames"
        fix = "fetch it, or give the other split alone"
        raise InputError(f"{what} which scene they show", where=part / "scene_info.npy", fix=fix)
    for scene in scenes:
        if scene not in ("A", "B", "C", "D"):
            raise InputError(f"no scene '{scene}'", where=part, fix=nearest(scene, known))
    return tuple(annotation for annotation in annotations if annotation.scene in set(scenes))


def _language(part: Path) -> Path:
    usual = part / "lang_annotations" / "auto_lang_ann.npy"
    found = sorted(part.glob("lang_*/auto_lang_ann.npy"))  # some releases name the folder by the language model
    return found[0] if len(found) == 1 else usual


def _annotations(part: Path) -> tuple[Annotation, ...]:
    path = _language(part)
    if not path.is_file():
        raise InputError("no language annotations", where=path, fix=_NO_LANGUAGE)
    content, scenes = load_npy(path), _scenes(part / "scene_info.npy")
    try:
        texts, tasks, spans = content["language"]["ann"], content["language"]["task"], content["info"]["indx"]
        if not len(texts) == len(tasks) == len(spans):
            raise ValueError(f"{len(texts)} instructions, {len(tasks)} tasks, {len(spans)} runs of frames")
        out = []
        for text, task, (first, last) in zip(texts, tasks, spans, strict=True):
            if not 0 <= int(first) <= int(last):
                raise ValueError(f"frames {first} to {last}")
            scene = next((name for name, (start, end) in scenes.items() if start <= first and last <= end), "")
            out.append(Annotation(int(first), int(last), str(text).strip(), str(task), scene))
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        what = f"not CALVIN's language annotations ({type(error).__name__}: {error})"
        raise InputError(what, where=path, fix="fetch the file again") from None
    return tuple(out)


def _scenes(path: Path) -> dict[str, tuple[int, int]]:
    """Scene letter -> first and last frame, both included; none when there is no such file."""
    if not path.is_file():
        return {}
    content = load_npy(path)
    try:
        return {str(name)[-1]: (int(start), int(end)) for name, (start, end) in content.items()}
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        what = f"not CALVIN's scene_info ({type(error).__name__}: {error})"
        raise InputError(what, where=path, fix="fetch the file again") from None


def _recordings(path: Path) -> tuple[tuple[int, int], ...]:
    if not path.is_file():
        return ()
    content = np.asarray(load_npy(path))
    if content.ndim != 2 or content.shape[1] != 2 or content.dtype.kind not in "iu":
        what = f"recordings are {content.dtype} {content.shape}, expected integers (N, 2)"
        raise InputError(what, where=path, fix="fetch the file again")
    return tuple((int(start), int(end)) for start, end in content)


def _runs(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of about `STEPS_PER_UNIT` steps together."""
    first = steps = 0
    for index, length in enumerate(lengths):
        steps += length
        if steps >= STEPS_PER_UNIT or index + 1 == len(lengths):
            yield first, index + 1
            first, steps = index + 1, 0


def _frame(part: Path, index: int) -> Path:
    return part / f"episode_{index:07d}.npz"


def _millimetres(metres: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(np.nan_to_num(metres, posinf=0) * 1000), 0, 65535).astype(np.uint16)


def read_npz(path: Path, keys: Iterable[str]) -> dict[str, np.ndarray]:
    """These arrays of an npz file, every checksum verified. Raises InputError naming the file and the key."""
    key = ""
    try:
        with zipfile.ZipFile(path) as archive:
            out = {}
            for key in keys:
                data = io.BytesIO(archive.read(f"{key}.npy"))  # whole: the checksum is only verified at the end
                out[key] = np.lib.format.read_array(data, allow_pickle=False)
            return out
    except FileNotFoundError:
        raise InputError("frame missing", where=path, fix="fetch the file, an annotation names it") from None
    except KeyError:
        raise InputError(f"the frame has no '{key}'", where=path, fix="choose other cameras") from None
    except Exception as error:  # a damaged archive raises nearly anything
        place = f"'{key}' of the frame" if key else "the frame"
        raise InputError(f"{place} cannot be read ({reason(error)})", where=path, fix="fetch the file again") from None
