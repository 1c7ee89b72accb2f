"""The episode store: robot data as one folder of memory-mapped Arrow files, one row per time step.

Layout: `dataset.json` (the manifest, written last), `stats.json`, `episodes.arrow` (one row per episode) and
`steps-00000.arrow`… of `STEPS_PER_SHARD` rows each: episode, step, state, action, further declared columns
(fixed-size float32 lists) and `image/<camera>` (JPEG bytes, already at the training size).
Equal episodes give equal bytes, so the fingerprint in the manifest names the content.

Trap: images are JPEG and so not exactly what the source held, unless the source's own JPEG bytes were copied
(they are, wherever the size already fits).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlm4vla_core import folders, images
from vlm4vla_core.actions import ActionConvention
from vlm4vla_core.errors import InputError, nearest

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

KIND, MANIFEST = "episodes", "dataset.json"
STEPS_PER_SHARD = 4096
REMAKE = "make the store again with `vlm4vla convert` or `vlm4vla record`"
_EPISODE_COLUMNS = ("episode", "start", "length", "instruction", "split", "source", "content")
_STEP_COLUMNS = ("episode", "step", "state", "action")


@dataclass(frozen=True)
class Episode:
    """One episode in memory: what readers yield and `write_store` takes.

    images: camera -> T encoded images, or uint8 (T, H, W, 3). state: (T, S). action: (T, A), already
    transformed, in physical units. columns: declared further floats, each (T, k), such as "truth/objects".
    split: "train" or "val". source: file and record. info: short texts that become columns of the episode table.
    """

    instruction: str
    images: dict[str, list[bytes] | np.ndarray]
    state: np.ndarray
    action: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    split: str = "train"
    source: str = ""
    info: dict[str, str] = field(default_factory=dict)


# --- writing --------------------------------------------------------------------------------------------


def write_store(
    out: Path,
    episodes: Iterable[Episode],
    *,
    source: str,
    convention: ActionConvention,
    state_names: tuple[str, ...],
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    transform: str = "none",
    image_size: int | None = None,
    jpeg_quality: int = 95,
    jpeg_444: bool = False,
    column_names: Mapping[str, tuple[str, ...]] | None = None,
    provenance_note: str = "",
    progress: Callable[[int], Any] | None = None,
    account: Callable[[], Mapping[str, Any]] | None = None,
) -> EpisodeStore:
    """Write episodes, consumed one at a time, into a store folder that appears whole or not at all.

    config, inputs: what decides the content (see `folders.current`). image_size: square training size; None
    keeps the source's. column_names: the names within each further column. progress: called with the number of
    steps of each episode written, such as a bar's `update`. account: called after the last episode; what it
    returns (what the reader left out, say) goes into the manifest. Raises InputError on no episodes, on an episode
    that is empty, has NaN or infinite state or action, or does not have the shapes of the first one, and when `out`
    holds something that is no store.
    """
    out = Path(out)
    if out.exists() and not (out / MANIFEST).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError("already holds something that is no episode store", where=out, fix="give another --out")
    with folders.new_folder(out) as folder:
        writer = _Writer(folder, convention, state_names, image_size, jpeg_quality, jpeg_444, dict(column_names or {}))
        for episode in episodes:
            writer.add(episode)
            if progress:
                progress(len(episode.action))
        facts = {"source": source, "transform": transform, "provenance_note": provenance_note}
        writer.finish(config=config, inputs=inputs, **facts, account=dict(account()) if account else {})
    return EpisodeStore.open(out)


class _Writer:
    """Collects steps and writes a shard whenever `STEPS_PER_SHARD` of them are there."""

    def __init__(
        self,
        folder: Path,
        convention: ActionConvention,
        state_names: tuple[str, ...],
        image_size: int | None,
        quality: int,
        full_colour: bool,
        column_names: dict[str, tuple[str, ...]],
    ) -> None:
        self.folder, self.convention, self.state_names = folder, convention, tuple(state_names)
        self.image_size, self.quality, self.full_colour = image_size, quality, full_colour
        self.columns = {name: list(names) for name, names in column_names.items()}
        self.cameras: dict[str, tuple[int, int]] = {}  # camera -> height, width; set by the first episode
        self.table: list[dict[str, Any]] = []
        self.pending: list[dict[str, Any]] = []  # per episode piece: column -> array or list of bytes
        self.held = self.steps = self.shards = 0
        self.values: dict[str, list[np.ndarray]] = {"action": [], "state": []}

    def add(self, episode: Episode) -> None:
        """Check one episode, encode its images and queue its steps."""
        where = episode.source or f"episode {len(self.table)}"
        length = len(episode.action)
        if length == 0:
            raise InputError("an episode without steps", where=where, fix="leave it out")
        if episode.split not in ("train", "val"):
            raise InputError(f"unknown split '{episode.split}'", where=where, fix="use 'train' or 'val'")
        piece: dict[str, Any] = {
            "episode": np.full(length, len(self.table), np.int32),
            "step": np.arange(length, dtype=np.int32),
            "state": _floats("state", episode.state, length, self.state_names, where, finite=True),
            "action": _floats("action", episode.action, length, self.convention.names, where, finite=True),
        }
        if not self.table:
            self._declare(episode, where)
        _same_names("camera", self.cameras, episode.images, where)
        _same_names("column", self.columns, episode.columns, where)
        for name, names in self.columns.items():
            piece[name] = _floats(name, episode.columns[name], length, tuple(names), where, finite=False)
        digest = hashlib.sha256(piece["action"].tobytes() + piece["state"].tobytes())
        for camera in self.cameras:
            frames = self._encode(camera, episode.images[camera], length, where)
            digest.update(frames[0])
            piece[f"image/{camera}"] = frames
        row = {"episode": len(self.table), "start": self.steps, "length": length, "instruction": episode.instruction}
        row |= {"split": episode.split, "source": episode.source, "content": digest.hexdigest()[:16]}
        if clash := sorted(set(row) & set(episode.info)):
            raise InputError(f"info may not be named {', '.join(clash)}", where=where)
        self.table.append(row | {key: str(value) for key, value in episode.info.items()})
        for name, kept in self.values.items():
            kept.append(piece[name])
        self.pending.append(piece)
        self.held += length
        self.steps += length
        while self.held >= STEPS_PER_SHARD:
            self._flush(STEPS_PER_SHARD)

    def _declare(self, episode: Episode, where: str) -> None:
        """Take cameras and further columns from the first episode."""
        for name, value in episode.columns.items():
            if name in _STEP_COLUMNS or name.startswith("image/"):
                raise InputError(f"a further column may not be named '{name}'", where=where)
            shape = np.shape(value)
            width = shape[1] if len(shape) == 2 else 0
            self.columns.setdefault(name, [str(index) for index in range(width)])
        self.cameras = dict.fromkeys(episode.images, (0, 0))

    def _encode(self, camera: str, frames: list[bytes] | np.ndarray, length: int, where: str) -> list[bytes]:
        """T JPEG byte strings at the training size; the source's own bytes wherever they already fit."""
        if len(frames) != length:
            raise InputError(f"{len(frames)} images of camera '{camera}' for {length} steps", where=where)
        encoded = []
        for step, frame in enumerate(frames):
            try:
                data, size = self._encode_one(frame)
            except ValueError as error:
                what = f"image of camera '{camera}' cannot be read ({error})"
                raise InputError(what, where=f"{where}, step {step}", fix="drop the episode or the camera") from None
            if self.cameras[camera] == (0, 0):
                self.cameras[camera] = size
            if size != self.cameras[camera]:
                raise InputError(
                    f"camera '{camera}' changes its image size from {self.cameras[camera]} to {size}",
                    where=f"{where}, step {step}",
                    fix="give one image size for all",
                )
            encoded.append(data)
        return encoded

    def _encode_one(self, frame: bytes | np.ndarray) -> tuple[bytes, tuple[int, int]]:
        import simplejpeg

        if isinstance(frame, bytes):
            if frame[:2] == images.JPEG_MAGIC:
                height, width, *_ = simplejpeg.decode_jpeg_header(frame)
                if self.image_size is None or (height, width) == (self.image_size, self.image_size):
                    return frame, (height, width)
            frame = images.decode(frame)
        if frame.ndim != 3:
            raise ValueError(f"expected (H, W, 3), got {frame.shape}")
        frame = images.resize(frame[None], self.image_size or frame.shape[0])[0] if self.image_size else frame
        if frame.dtype != np.uint8 or frame.shape[-1] != 3:
            raise ValueError(f"expected uint8 (H, W, 3), got {frame.dtype} {frame.shape}")
        return images.encode(frame, quality=self.quality, full_colour=self.full_colour), frame.shape[:2]

    def _flush(self, rows: int) -> None:
        """Write the first `rows` pending steps as one shard of one record batch."""
        import pyarrow as pa

        joined: dict[str, Any] = {}
        for name in self.pending[0]:
            parts = [piece[name] for piece in self.pending]
            joined[name] = list(chain.from_iterable(parts)) if name.startswith("image/") else np.concatenate(parts)
        self.pending = [{name: value[rows:] for name, value in joined.items()}]
        self.held -= rows
        arrays: dict[str, pa.Array] = {}
        for name, value in joined.items():
            if name.startswith("image/"):
                arrays[name] = pa.array(value[:rows], pa.large_binary())
            elif value.ndim == 1:
                arrays[name] = pa.array(value[:rows])
            else:
                flat = pa.array(np.ascontiguousarray(value[:rows]).reshape(-1))
                arrays[name] = pa.FixedSizeListArray.from_arrays(flat, value.shape[1])
        _write_arrow(self.folder / f"steps-{self.shards:05d}.arrow", pa.RecordBatch.from_pydict(arrays))
        self.shards += 1

    def finish(self, *, config: Mapping[str, Any], inputs: Mapping[str, str], **facts: Any) -> None:
        """Write the last shard, the episode table, the statistics and, last, the manifest."""
        import pyarrow as pa

        if not self.table:
            raise InputError("no episodes", where=facts["source"], fix="nothing was written")
        if self.held:
            self._flush(self.held)
        keys = list(dict.fromkeys(key for row in self.table for key in row))
        kinds = {"episode": pa.int32(), "start": pa.int64(), "length": pa.int32()}
        arrays = {key: pa.array([row.get(key, "") for row in self.table], kinds.get(key, pa.string())) for key in keys}
        _write_arrow(self.folder / "episodes.arrow", pa.RecordBatch.from_pydict(arrays))
        stats = {name: statistics(np.concatenate(kept)) for name, kept in self.values.items()}
        counts = {
            "episodes": len(self.table),
            "steps": self.steps,
            "instructions": len({row["instruction"] for row in self.table}),
        }
        folders.write_json(self.folder / "stats.json", {**stats, "count": self.steps, **counts})
        folders.write_manifest(
            self.folder,
            KIND,
            name=MANIFEST,
            config=config,
            inputs=inputs,
            **facts,
            convention=self.convention.to_dict(),
            state_names=list(self.state_names),
            cameras={camera: list(size) for camera, size in self.cameras.items()},
            columns=self.columns,
            counts=counts,
            images={"size": self.image_size, "quality": self.quality, "colour": "444" if self.full_colour else "420"},
        )


def _floats(what: str, value: Any, length: int, names: tuple[str, ...], where: str, *, finite: bool) -> np.ndarray:
    """`value` as float32 (T, len(names)), checked."""
    with np.errstate(over="ignore"):  # a float64 too large becomes infinite and is then refused by name
        array = np.ascontiguousarray(value, dtype=np.float32)
    if array.shape != (length, len(names)) or not names:
        expected = f"({length}, {len(names)}) for {', '.join(names) or 'no names'}"
        raise InputError(f"{what} has shape {array.shape}, expected {expected}", where=where)
    if finite and not np.isfinite(array).all():
        step, index = np.argwhere(~np.isfinite(array))[0]
        value = "NaN" if np.isnan(array[step, index]) else "infinite"
        raise InputError(
            f"{what} is {value} in dimension {index} ({names[index]})",
            where=f"{where}, step {step}",
            fix="repair or drop the episode",
        )
    return array


def _same_names(what: str, known: Mapping[str, Any], given: Mapping[str, Any], where: str) -> None:
    if set(known) != set(given):
        raise InputError(f"{what}s are {sorted(given)}, in earlier episodes {sorted(known)}", where=where)


def _write_arrow(path: Path, batch: pa.RecordBatch) -> None:
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def statistics(values: np.ndarray) -> dict[str, Any]:
    """Per-dimension statistics of (N, D) values in float64, as lists of D numbers, and the count N.

    Quantiles interpolate linearly (numpy's default), as in OpenVLA's dataset statistics; std is the population's.
    """
    values = np.asarray(values, np.float64)
    q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)
    numbers = {"q01": q01, "q99": q99, "mean": values.mean(0), "std": values.std(0)}
    numbers |= {"min": values.min(0), "max": values.max(0)}
    return {name: value.tolist() for name, value in numbers.items()} | {"count": len(values)}


# --- reading --------------------------------------------------------------------------------------------


class _Shard(NamedTuple):
    table: pa.Table
    images: dict[str, tuple[np.ndarray, memoryview]]  # camera -> offsets (n + 1,), all JPEG bytes


class EpisodeStore:
    """An opened store; images stay on disk until asked for. `len(store)` is its number of steps.

    Rows count steps over the whole store, episode after episode. Arrays are read-only. A store may be sent to
    another process: it is opened anew there.
    """

    path: Path
    manifest: dict[str, Any]
    convention: ActionConvention
    state_names: tuple[str, ...]
    cameras: tuple[str, ...]
    fingerprint: str
    stats: dict[str, Any]

    def __init__(self, path: Path, manifest: dict[str, Any], stats: dict[str, Any]) -> None:
        self.path, self.manifest, self.stats = path, manifest, stats
        self.convention = ActionConvention.from_dict(manifest["convention"])
        self.state_names = tuple(manifest["state_names"])
        self.cameras = tuple(manifest["cameras"])
        self.fingerprint = manifest["fingerprint"]
        self._table = _read_arrow(path / "episodes.arrow")
        names = sorted(name for name in manifest["files"] if name.startswith("steps-"))
        self._shards = [self._shard(path / name) for name in names]
        self._starts = np.cumsum([0, *(len(shard.table) for shard in self._shards)])  # (shards + 1,)

    @classmethod
    def open(cls, path: Path | str, *, hashes: bool = False) -> EpisodeStore:
        """Open a store folder; hashes=True also compares every file's SHA-256 with the manifest.

        Raises InputError when it is missing, unfinished, empty, damaged or written by a newer version.
        """
        path = Path(path)
        manifest = folders.read_manifest(path, KIND, name=MANIFEST, fix=REMAKE, hashes=hashes)
        stats = folders.read_json(path / "stats.json", fix=REMAKE)
        try:
            if not manifest["counts"]["steps"]:
                raise InputError("the store is empty", where=path, fix=REMAKE)
            store = cls(path, manifest, stats)
            steps, expected = len(store), manifest["counts"]["steps"]
            lengths = store.lengths
            if steps != expected or lengths.sum() != steps or (store.starts != np.cumsum(lengths) - lengths).any():
                raise InputError(f"{steps} steps found, the manifest says {expected}", where=path, fix=REMAKE)
        except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:  # ArrowInvalid is a ValueError
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"damaged episode store ({reason})", where=path, fix=REMAKE) from None
        return store

    def _shard(self, path: Path) -> _Shard:
        table = _read_arrow(path)
        views = {}
        for camera in self.cameras:
            array = table.column(f"image/{camera}").chunk(0)
            _, offsets, data = array.buffers()
            views[camera] = (np.frombuffer(offsets, np.int64)[: len(array) + 1], memoryview(data).cast("B"))
        return _Shard(table, views)

    def __reduce__(self) -> tuple[Any, ...]:
        return EpisodeStore.open, (self.path,)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"EpisodeStore({str(self.path)!r}, {len(self.lengths)} episodes, {len(self)} steps)"

    # --- per episode

    @cached_property
    def episodes(self) -> pd.DataFrame:
        """One row per episode: episode, start, length, instruction, split, source, content, then the info keys."""
        return self._table.to_pandas()

    @cached_property
    def starts(self) -> np.ndarray:
        """(E,) first row of each episode."""
        return self._table.column("start").to_numpy()

    @cached_property
    def lengths(self) -> np.ndarray:
        """(E,) steps of each episode."""
        return self._table.column("length").to_numpy()

    @cached_property
    def instructions(self) -> list[str]:
        """(E,) instruction of each episode."""
        return self._table.column("instruction").to_pylist()

    @cached_property
    def splits(self) -> list[str]:
        """(E,) declared split of each episode, "train" or "val"."""
        return self._table.column("split").to_pylist()

    @cached_property
    def content(self) -> list[str]:
        """(E,) hash of each episode's actions, states and first images: equal for copies of one episode."""
        return self._table.column("content").to_pylist()

    # --- per step

    def column(self, name: str) -> np.ndarray:
        """A numeric column of the step table: (N,) for episode and step, else (N, k) float32.

        Raises InputError when the store has no such column.
        """
        if name not in self._shards[0].table.column_names or name.startswith("image/"):
            known = [column for column in self._shards[0].table.column_names if not column.startswith("image/")]
            raise InputError(f"no column '{name}' in the store", where=self.path, fix=nearest(name, known))
        parts = [_numpy(shard.table.column(name).chunk(0)) for shard in self._shards]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)  # one shard: a view of the mapped file
        whole.flags.writeable = False
        return whole

    def column_names(self, name: str) -> tuple[str, ...]:
        """The names within a further column, such as ("red_cube/x", …). Raises InputError as `column`."""
        if name in ("state", "action"):
            return self.state_names if name == "state" else self.convention.names
        if name not in self.manifest["columns"]:
            fix = nearest(name, self.manifest["columns"])
            raise InputError(f"no column '{name}' in the store", where=self.path, fix=fix)
        return tuple(self.manifest["columns"][name])

    @cached_property
    def state(self) -> np.ndarray:
        """(N, S) float32, named by `state_names`."""
        return self.column("state")

    @cached_property
    def action(self) -> np.ndarray:
        """(N, A) float32 in the units of `convention`."""
        return self.column("action")

    @cached_property
    def episode_of(self) -> np.ndarray:
        """(N,) int32: the episode each row belongs to."""
        return self.column("episode")

    @cached_property
    def step_of(self) -> np.ndarray:
        """(N,) int32: the step within its episode."""
        return self.column("step")

    # --- images

    def _view(self, camera: str, row: int) -> memoryview:
        if camera not in self.cameras:
            raise InputError(f"no camera '{camera}' in the store", where=self.path, fix=nearest(camera, self.cameras))
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a store with {len(self)} steps")
        index = int(np.searchsorted(self._starts, row, side="right")) - 1
        offsets, data = self._shards[index].images[camera]
        place = row - int(self._starts[index])
        return data[offsets[place] : offsets[place + 1]]

    def jpeg(self, camera: str, row: int) -> bytes:
        """The encoded image of one camera at one row. Raises InputError on an unknown camera."""
        return bytes(self._view(camera, int(row)))

    def images(self, camera: str, rows: Iterable[int] | np.ndarray, size: int | None = None) -> np.ndarray:
        """Decoded images of one camera: uint8 (len(rows), H, W, 3), resized to `size` when given.

        Raises InputError on an unknown camera and on bytes that are no image.
        """
        views = [self._view(camera, int(row)) for row in rows]
        height, width = self.manifest["cameras"].get(camera, (0, 0))
        out = np.empty((len(views), height, width, 3), np.uint8)
        for place, (row, view) in enumerate(zip(rows, views, strict=True)):
            try:
                out[place] = images.decode(view)
            except ValueError as error:
                what = f"damaged image of camera '{camera}' at row {int(row)} ({error})"
                raise InputError(what, where=self.path, fix=REMAKE) from None
        return images.resize(out, size) if size else out


def _numpy(array: pa.Array) -> np.ndarray:
    """An Arrow column without copying: (n,) or, for fixed-size lists, (n, k)."""
    import pyarrow as pa

    if pa.types.is_fixed_size_list(array.type):
        return array.flatten().to_numpy(zero_copy_only=True).reshape(len(array), array.type.list_size)
    return array.to_numpy(zero_copy_only=True)


def _read_arrow(path: Path) -> pa.Table:
    """Map one Arrow file. Raises InputError when it is not whole."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all().unify_dictionaries()
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"damaged or cut short ({reason})", where=path, fix=REMAKE) from None
    return table
