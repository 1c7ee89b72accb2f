"""The descriptions of a LeRobot data set: features, episodes, tasks, and where the files of each episode are.

v2 lists episodes in `meta/episodes.jsonl`, one parquet and one mp4 each; v3 in `meta/episodes/**.parquet`, with the
file and the times of each. Traps: path templates may not match the files; v3 keeps the tasks' texts in a pandas index.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm4vla_core import folders
from vlm4vla_core.episodes.checks import reason
from vlm4vla_core.errors import InputError, nearest

AGAIN = "fetch the file again"
_DATA = {
    2: "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    3: "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
}
_VIDEO = {
    2: "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    3: "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}
_SPAN = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
_WRONG = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)


@dataclass(frozen=True)
class Listed:
    """One episode as listed; paths relative to the data set. task: for tables without task_index. videos: camera ->
    file, and from when to when in it (NaN for all of it)."""

    index: int
    length: int
    task: str
    data: str
    videos: dict[str, tuple[str, float, float]]


@dataclass(frozen=True)
class Description:
    """`meta/info.json`. ranges: split -> first episode and the one after its last. cameras: name -> feature; those of
    the features in `videos` are videos, others encoded images. action, state: feature and names. total: episodes."""

    folder: Path
    major: int
    fps: float
    total: int
    chunk: int
    templates: tuple[str, str]
    ranges: dict[str, tuple[int, int]]
    cameras: dict[str, str]
    sizes: dict[str, tuple[int, int]]
    videos: tuple[str, ...]
    action: tuple[str, tuple[str, ...]]
    state: tuple[str, tuple[str, ...]]

    @classmethod
    def read(cls, folder: Path) -> Description:
        """Raises InputError when info.json is missing, damaged or of another version."""
        path = folder / "meta" / "info.json"
        info = folders.read_json(path, fix="give the folder that holds meta/info.json")
        try:
            version = str(info["codebase_version"]).removeprefix("v")
            if version not in ("2.0", "2.1", "3.0"):
                what = f"LeRobot version '{info['codebase_version']}', only v2.0, v2.1 and v3.0 are read"
                raise InputError(what, where=path, fix="convert it with lerobot's own tools")
            major, fps, features = int(version[0]), float(info["fps"]), info["features"]
            if not 0 < fps < 1e5:
                raise ValueError(f"{fps} frames per second")
            seen = {key: about for key, about in features.items() if about["dtype"] in ("video", "image")}
            cameras = _short_names(list(seen))
            splits = {name: str(told).split(":") for name, told in info.get("splits", {}).items()}
            return cls(
                folder=folder,
                major=major,
                fps=fps,
                total=int(info["total_episodes"]),
                chunk=max(1, int(info.get("chunks_size") or 1000)),
                templates=(str(info.get("data_path") or _DATA[major]), str(info.get("video_path") or _VIDEO[major])),
                ranges={name: (int(told[0]), int(told[1])) for name, told in splits.items()} or {"train": (0, 1 << 62)},
                cameras=cameras,
                sizes={camera: _size(seen[key]["shape"]) for camera, key in cameras.items()},
                videos=tuple(key for key, about in seen.items() if about["dtype"] == "video"),
                action=_vector_feature(features, ("action", "actions")),
                state=_vector_feature(features, ("observation.state", "state")),
            )
        except _WRONG as error:
            what = f"not a LeRobot description ({type(error).__name__}: {error})"
            raise InputError(what, where=path, fix=AGAIN) from None

    def episodes(self) -> list[Listed]:
        """Every episode listed, in order. Raises InputError when they are not as many as info.json says."""
        listed = sorted(self._v2() if self.major == 2 else self._v3(), key=lambda one: one.index)
        if len(listed) != self.total or len({one.index for one in listed}) != self.total:
            what = f"{len(listed)} episodes listed, info.json says {self.total}"
            raise InputError(what, where=self.folder / "meta", fix="fetch the descriptions again")
        if not listed:
            raise InputError("no episodes", where=self.folder / "meta" / "info.json")
        return listed

    def _v2(self) -> Iterator[Listed]:
        for where, row in _json_lines(self.folder / "meta" / "episodes.jsonl"):
            try:
                index = int(row["episode_index"])
                values = {"episode_index": index, "episode_chunk": index // self.chunk}
                videos = {
                    camera: (self._path(1, {**values, "video_key": key}), np.nan, np.nan)
                    for camera, key in self.cameras.items()
                    if key in self.videos
                }
                yield Listed(index, int(row["length"]), _first(row), self._path(0, values), videos)
            except _WRONG as error:
                raise _no_episode(error, where) from None

    def _v3(self) -> Iterator[Listed]:
        spans = {camera: f"videos/{key}/" for camera, key in self.cameras.items() if key in self.videos}
        columns = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
        columns += [span + end for span in spans.values() for end in _SPAN]
        for path in sorted((self.folder / "meta" / "episodes").rglob("*.parquet")):
            for row in _read_rows(path, columns):
                try:
                    videos: dict[str, tuple[str, float, float]] = {}
                    for camera, span in spans.items():
                        told: list[Any] = [row.get(span + name) for name in _SPAN]
                        if told[0] is not None:
                            key = {"video_key": self.cameras[camera]}
                            place = {"chunk_index": int(told[0]), "file_index": int(told[1]), **key}
                            videos[camera] = (self._path(1, place), float(told[2]), float(told[3]))
                    place = {name: int(row[f"data/{name}"]) for name in _SPAN[:2]}
                    index, length = int(row["episode_index"]), int(row["length"])
                    yield Listed(index, length, _first(row), self._path(0, place), videos)
                except _WRONG as error:
                    raise _no_episode(error, path) from None

    def _path(self, which: int, values: dict[str, Any]) -> str:
        """A file's path from its template (0: table, 1: video); where no such file is, from what it likely means."""
        template = self.templates[which]
        meant = template.replace("chunk-{episode_index", "chunk-{episode_chunk")  # seen in the wild
        tried = [_fill(text, values) for text in (template, meant, (_DATA, _VIDEO)[which][self.major])]
        return next((path for path in tried if (self.folder / path).is_file()), tried[0])

    def tasks(self) -> dict[int, str]:
        """task_index -> text. Raises InputError when the table is missing or damaged."""
        path = self.folder / "meta" / ("tasks.jsonl" if self.major == 2 else "tasks.parquet")
        rows = [row for _, row in _json_lines(path)] if self.major == 2 else _read_rows(path)
        try:  # v3 has the text in whatever column pandas made of the index
            return {
                int(row["task_index"]): next(str(text).strip() for key, text in row.items() if key != "task_index")
                for row in rows
            }
        except (*_WRONG, StopIteration) as error:
            what = f"not a table of tasks ({type(error).__name__}: {error})"
            raise InputError(what, where=path, fix=AGAIN) from None


def _first(row: dict[str, Any]) -> str:
    return str((row.get("tasks") or [""])[0]).strip()


def _no_episode(error: Exception, where: object) -> InputError:
    return InputError(f"not an episode's description ({type(error).__name__}: {error})", where=where, fix=AGAIN)


def _fill(template: str, values: dict[str, Any]) -> str:
    """A path template filled in. Not `str.format`, which would follow attributes and make strings of any width."""

    def value(match: re.Match[str]) -> str:
        return str(values[match[1]]).zfill(int(match[2] or 0))

    try:
        return re.sub(r"\{(\w+)(?::(\d{1,2})d)?\}", value, template)
    except KeyError as error:
        raise InputError(f"path template '{template}' names an unknown {error}", fix=nearest("", values)) from None


def _vector_feature(features: dict[str, Any], candidates: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    key = next((key for key in candidates if key in features), None)
    if key is None:
        raise ValueError(f"no feature {' or '.join(candidates)}")
    (size,) = features[key]["shape"]
    names: list[str] = []

    def walk(node: Any) -> None:  # a list, a list of lists, or a dictionary of lists
        for child in node.values() if isinstance(node, dict) else node:
            walk(child) if isinstance(child, list | dict) else names.append(str(child))

    walk(features[key].get("names") or [])
    return key, tuple(names) if len(names) == size else tuple(str(index) for index in range(int(size)))


def _short_names(keys: list[str]) -> dict[str, str]:
    """Camera -> feature: names without the usual prefixes, where they stay apart."""
    short = [re.sub(r"^observation\.(images\.)?", "", key) for key in keys]
    return dict(zip(short if len(set(short)) == len(keys) else keys, keys, strict=True))


def _size(shape: list[int]) -> tuple[int, int]:
    height, width = shape[1:] if shape[0] in (1, 3) and shape[2] not in (1, 3) else shape[:2]
    return int(height), int(width)


def _read_rows(path: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        known = pq.read_schema(path).names
        table = pq.read_table(path, columns=[name for name in columns if name in known] if columns else None)
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise InputError(f"cannot be read ({reason(error)})", where=path, fix=AGAIN) from None


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and content of every line. Raises InputError when the file is missing or a line is no JSON object."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=path, fix=AGAIN) from None
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            raise InputError(f"not valid JSON ({error})", where=where, fix=AGAIN) from None
        if row is not None:
            if not isinstance(row, dict):
                raise InputError(f"a {type(row).__name__} where an object belongs", where=where, fix=AGAIN)
            yield where, row
