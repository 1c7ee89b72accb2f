"""Reader for LeRobot data sets v2.0, v2.1 and v3.0: parquet tables, videos or encoded images, JSON descriptions.

Traps: a camera may be declared and have no file; timestamps may not begin at 0; of the episodes listed only some may be
there. LeRobot data declare no action convention at all: name one, or it is recorded as unknown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core.actions import ActionConvention
from vlm4vla_core.episodes.checks import check_request, check_splits, numbers, reason
from vlm4vla_core.episodes.lerobot_meta import AGAIN, Description, Listed
from vlm4vla_core.episodes.source import Skipped, Unit
from vlm4vla_core.episodes.video import Frames
from vlm4vla_core.episodes.writer import Episode
from vlm4vla_core.errors import InputError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

STEPS_PER_UNIT = 4000


@dataclass(frozen=True)
class LeRobotSource:
    """An opened data set: a `Source` whose units are runs of episodes of about `STEPS_PER_UNIT` steps.

    Episodes that are listed without a table are skipped and counted. absent: cameras that are declared but have no
    file at all; every episode carries a note of them.
    """

    about: Description
    convention: ActionConvention
    absent: tuple[str, ...]
    format: str = "lerobot"
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    transforms: tuple[str, ...] = ("none",)
    rendered: bool = False

    @property
    def folder(self) -> Path:
        return self.about.folder

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def state_names(self) -> tuple[str, ...]:
        return self.about.state[1]

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(camera for camera in self.about.cameras if camera not in self.absent)

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        return self.about.sizes

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.about.ranges)

    def units(self, splits: tuple[str, ...]) -> list[Unit]:
        """Runs of episodes; their key holds where each is. Raises InputError on an unknown split."""
        check_splits(self, splits)
        meta = sorted(path for path in (self.folder / "meta").rglob("*") if path.is_file() and "stats" not in path.name)
        units: list[Unit] = []
        held: dict[str, list[Listed]] = {split: [] for split in splits}

        def close(split: str) -> None:
            if mine := held[split]:
                told = dict.fromkeys(path for one in mine for path in (one.data, *(v[0] for v in one.videos.values())))
                files = (*meta, *(self.folder / path for path in told if (self.folder / path).is_file()))
                key = tuple(json.dumps(asdict(one)) for one in mine)
                name = f"episodes-{mine[0].index:06d}"
                units.append(Unit(name, "train" if split == "train" else "val", files, key))
            held[split] = []

        for one in self.about.episodes():
            split = next((s for s, (first, end) in self.about.ranges.items() if first <= one.index < end), "train")
            if split in held:
                held[split].append(one)
                if sum(other.length for other in held[split]) >= STEPS_PER_UNIT:
                    close(split)
        for split in splits:
            close(split)
        return sorted(units, key=lambda unit: unit.split != "train")

    def episodes(self, unit: Unit, cameras: tuple[str, ...], transform: str) -> Iterator[Episode | Skipped]:
        """The unit's episodes; videos are decoded while their `Frames` are iterated.

        Raises InputError naming file and episode on tables that are damaged or of another length than listed, on
        NaN or infinite numbers, and on timestamps more than half a frame off the grid.
        """
        check_request(self, cameras, transform)
        tasks = self.about.tasks()
        for key in unit.key:
            one = Listed(**json.loads(str(key)))
            path = self.folder / one.data
            where = f"episode {one.index}"
            if not path.is_file():
                yield Skipped("listed but not there", f"{one.data}, {where}")
                continue
            about = self.about
            pictures = {camera: key for camera in cameras if (key := about.cameras[camera]) not in about.videos}
            table = self._table(path, one, tuple(pictures.values()))
            place = f"{path}, {where}"
            (action_key, _), (state_key, _) = about.action, about.state
            action = numbers(_vectors(table, action_key, place), self.convention.names, action_key, place)
            state = numbers(_vectors(table, state_key, place), self.state_names, state_key, place)
            times = self._times(table, place)
            task = one.task
            several = 0
            if "task_index" in table.column_names:
                indices = _vectors(table, "task_index", place)[:, 0].astype(int)
                if int(indices[0]) not in tasks:
                    raise InputError(f"task {indices[0]} is in no table of tasks", where=place, fix=AGAIN)
                task, several = tasks[int(indices[0])], int(len(set(indices)) > 1)
            if not task:
                yield Skipped("without language", f"{one.data}, {where}")
                continue
            notes = {f"episodes without camera {camera}, which is declared": 1 for camera in self.absent}
            notes |= {"episodes with several tasks, of which the first was kept": 1} if several else {}
            shown: dict[str, Any] = {
                camera: self._pictures(table, pictures[camera], place)
                if camera in pictures
                else self._frames(one, camera, times, place)
                for camera in cameras
            }
            yield Episode(
                instruction=task,
                images=shown,
                state=state,
                action=action,
                split=unit.split,
                source=f"{one.data}, {where}",
                notes=notes,
            )

    def _table(self, path: Path, one: Listed, pictures: tuple[str, ...]) -> pa.Table:
        """The episode's rows and the columns that are needed."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        place = f"{path}, episode {one.index}"
        needed = (self.about.action[0], self.about.state[0], *pictures)
        optional = ("timestamp", "frame_index", "task_index")
        try:
            known = pq.read_schema(path).names
            for name in needed:
                if name not in known:
                    raise InputError(f"no column '{name}'", where=path, fix=nearest(name, known))
            columns = [*needed, *(name for name in optional if name in known)]
            mine = [("episode_index", "=", one.index)] if self.about.major == 3 else None
            table = pq.read_table(path, columns=columns, filters=mine)
            table.validate(full=True)
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise InputError(f"cannot be read ({reason(error)})", where=place, fix=AGAIN) from None
        if table.num_rows != one.length or not one.length:
            what = f"{table.num_rows} steps found, the list of episodes says {one.length}"
            raise InputError(what, where=place, fix=AGAIN)
        return table

    def _times(self, table: pa.Table, place: str) -> np.ndarray:
        """(T,) seconds since the first step, on the grid of frames to within half a frame."""
        steps = np.arange(table.num_rows, dtype=np.float64)
        if "frame_index" in table.column_names:
            index = _vectors(table, "frame_index", place)[:, 0]
            if wrong := np.flatnonzero(index - index[0] != steps).tolist():
                what = f"frame_index {index[wrong[0]]:.0f} where {index[0] + wrong[0]:.0f} belongs"
                raise InputError(what, where=f"{place}, step {wrong[0]}", fix=AGAIN)
        if "timestamp" not in table.column_names:
            return steps / self.about.fps
        times = _vectors(table, "timestamp", place)[:, 0].astype(np.float64)
        away = np.abs(times - times[0] - steps / self.about.fps)
        if not (away < 0.5 / self.about.fps).all():
            step = int(np.flatnonzero(~(away < 0.5 / self.about.fps))[0])
            grid = f"{self.about.fps:g} frames per second from {times[0]:.4f} s"
            what = f"timestamp {times[step]:.4f} s is off the grid of {grid}"
            raise InputError(what, where=f"{place}, step {step}", fix="drop the episode, or mend its timestamps")
        return times - times[0]

    def _frames(self, one: Listed, camera: str, times: np.ndarray, place: str) -> Frames:
        if camera not in one.videos:
            raise InputError(f"no video of camera '{camera}'", where=place, fix="leave the camera out")
        path, start, end = one.videos[camera]
        if not np.isnan(end) and times[-1] + start > end - 0.5 / self.about.fps:
            what = f"{one.length} steps do not fit into {start:.3f} to {end:.3f} s of video"
            raise InputError(what, where=f"{self.folder / path}, episode {one.index}", fix=AGAIN)
        return Frames(self.folder / path, times + (0.0 if np.isnan(start) else start), 0.5 / self.about.fps)

    def _pictures(self, table: pa.Table, feature: str, place: str) -> list[bytes]:
        """Encoded images from the table, or from the files that it names."""
        out = []
        for step, cell in enumerate(table.column(feature).to_pylist()):
            told = cell if isinstance(cell, dict) else {"bytes": cell}
            data = told.get("bytes")
            if data is None and isinstance(told.get("path"), str) and (self.folder / told["path"]).is_file():
                data = (self.folder / told["path"]).read_bytes()
            if not isinstance(data, bytes) or not data:
                raise InputError(f"no image of '{feature}'", where=f"{place}, step {step}", fix="leave the camera out")
            out.append(data)
        return out


def _vectors(table: pa.Table, name: str, place: str) -> np.ndarray:
    """A number column as (T, D): of lists of one length, or of single numbers."""
    import pyarrow as pa

    column = table.column(name).combine_chunks()
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    flat = column.flatten() if lists else column
    if pa.types.is_boolean(flat.type) or not (pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type)):
        raise InputError(f"column '{name}' holds {kind}, not numbers", where=place, fix=AGAIN)
    if column.null_count or flat.null_count:
        raise InputError(f"column '{name}' has missing values", where=place, fix="drop the episode")
    widths = set(column.value_lengths().to_pylist()) if lists else {1}
    if len(widths) != 1:
        raise InputError(f"column '{name}' has rows of {sorted(widths)} numbers", where=place, fix=AGAIN)
    return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(len(column), widths.pop())


def open_lerobot(source: Path, *, convention: ActionConvention | None = None) -> LeRobotSource:
    """Open a LeRobot data set. convention: what its actions mean; by default recorded as unknown.

    Raises InputError when a description is missing or damaged, when its version is another, and when the convention
    has another number of dimensions.
    """
    about = Description.read(Path(source))
    names = about.action[1]
    convention = convention or ActionConvention.unknown(names, about.fps)
    if convention.size != len(names):
        what = f"the convention has {convention.size} dimensions, the data {len(names)}"
        raise InputError(what, where=source, fix=f"they are named {', '.join(names)}")
    listed = about.episodes()
    if not any((about.folder / one.data).is_file() for one in listed):
        raise InputError("none of the episodes' tables is there", where=about.folder / listed[0].data, fix="fetch them")
    there = {camera for one in listed for camera, span in one.videos.items() if (about.folder / span[0]).is_file()}
    absent = [camera for camera, key in about.cameras.items() if key in about.videos and camera not in there]
    return LeRobotSource(about, convention, tuple(absent))
