"""The episode store: robot data as one folder of memory-mapped Arrow files, one row per time step.

Layout: `dataset.json` (the manifest, written last), `stats.json`, `episodes.arrow` (one row per episode) and
`steps-….arrow` (shards of whole episodes, in the order that the manifest lists): state, action, further declared
columns (fixed-size float32 lists), `image/<camera>` (JPEG or raw bytes, already at the training size),
`depth/<camera>` and `segmentation/<camera>` (packed without loss). docs/episodes.md describes it in full.
Equal episodes give equal bytes, so the fingerprint in the manifest names the content.

Trap: images are JPEG and so not exactly what the source held, unless the source's own JPEG bytes were copied
(they are, wherever the size already fits) or the encoding is raw.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlm4vla_core import folders, images
from vlm4vla_core.actions import ActionConvention
from vlm4vla_core.episodes.assemble import finish, statistics
from vlm4vla_core.episodes.checks import reason
from vlm4vla_core.episodes.frames import LAYERS, unpack
from vlm4vla_core.episodes.writer import KIND, MANIFEST, Episode, Recipe, Writer
from vlm4vla_core.errors import InputError, nearest

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

__all__ = ["Episode", "EpisodeStore", "statistics", "write_store"]
REMAKE = "make the store with `vlm4vla convert` or `vlm4vla record`"


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
    jpeg_444: bool = False,
    encoding: str = "jpeg",
    column_names: Mapping[str, tuple[str, ...]] | None = None,
) -> EpisodeStore:
    """Write episodes, consumed one at a time, into a store folder that appears whole or not at all.

    config, inputs: what decides the content (see `folders.current`). image_size: square training size; None
    keeps the source's. encoding: "jpeg" or "raw". column_names: the names within each further column. Raises
    InputError on no episodes, on an episode that is empty, has NaN or infinite state or action, or does not have the
    shapes of the first one, and when `out` holds something that is no store.
    """
    out = Path(out)
    recipe = Recipe(
        convention,
        tuple(state_names),
        image_size=image_size,
        full_colour=jpeg_444,
        encoding=encoding,
        columns=dict(column_names or {}),
    )
    with folders.new_folder(out, KIND) as folder:
        writer = Writer(folder, recipe)
        for episode in episodes:
            writer.add(episode)
        part = writer.close()
        told = {"notes": part.notes} if part.notes else {}
        finish(folder, [part], recipe, config=config, inputs=inputs, account=told, source=source, transform=transform)
    return EpisodeStore.open(out)


class _Shard(NamedTuple):
    table: pa.Table
    frames: dict[str, tuple[np.ndarray, memoryview]]  # column -> offsets (n + 1,), all bytes


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
        self.raw = manifest.get("images", {}).get("encoding") == "raw"
        names = manifest.get("shards") or sorted(name for name in manifest["files"] if name.startswith("steps-"))
        self._shards = [_open_shard(path / name) for name in names]
        self._starts = [0, *accumulate(len(shard.table) for shard in self._shards)]  # a list: bisect beats searchsorted

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
            raise InputError(f"damaged episode store ({reason(error)})", where=path, fix=REMAKE) from None
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        return EpisodeStore.open, (self.path,)

    def __len__(self) -> int:
        return self._starts[-1]

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
        if name in ("episode", "step"):  # of the table, not of the shards: a shard does not know its place
            return self.episode_of if name == "episode" else self.step_of
        known = [key for key in self._shards[0].table.column_names if key not in self._shards[0].frames]
        if name not in known:
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
        rows = np.repeat(np.arange(len(self.lengths), dtype=np.int32), self.lengths)
        rows.flags.writeable = False
        return rows

    @cached_property
    def step_of(self) -> np.ndarray:
        """(N,) int32: the step within its episode."""
        rows = (np.arange(len(self)) - np.repeat(self.starts, self.lengths)).astype(np.int32)
        rows.flags.writeable = False
        return rows

    # --- images

    def _view(self, kind: str, camera: str, row: int) -> memoryview:
        declared = self.manifest.get("cameras" if kind == "image" else kind, {})
        if camera not in declared:
            what = f"no {'camera' if kind == 'image' else kind + ' of camera'} '{camera}' in the store"
            raise InputError(what, where=self.path, fix=nearest(camera, declared))
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a store with {len(self)} steps")
        index = bisect_right(self._starts, row) - 1
        offsets, data = self._shards[index].frames[f"{kind}/{camera}"]
        place = row - self._starts[index]
        return data[offsets[place] : offsets[place + 1]]

    def jpeg(self, camera: str, row: int) -> bytes:
        """The image of one camera at one row as JPEG: the stored bytes, or made of them in a raw store.

        Raises InputError on an unknown camera.
        """
        if self.raw:
            return images.encode(self.images(camera, [row])[0], full_colour=True)
        return bytes(self._view("image", camera, int(row)))

    def images(self, camera: str, rows: Iterable[int] | np.ndarray, size: int | None = None) -> np.ndarray:
        """Decoded images of one camera: uint8 (len(rows), H, W, 3), resized to `size` when given.

        Raises InputError on an unknown camera and on bytes that are no image of the declared size.
        """
        rows = [int(row) for row in rows]
        views = [self._view("image", camera, row) for row in rows]
        out = np.empty((len(views), *self.manifest["cameras"].get(camera, (0, 0)), 3), np.uint8)
        for place, (row, view) in enumerate(zip(rows, views, strict=True)):
            try:
                if self.raw:
                    out[place] = np.frombuffer(view, np.uint8).reshape(out.shape[1:])
                else:
                    images.decode_into(view, out[place])
            except ValueError as error:
                what = f"damaged image of camera '{camera}' at row {row} ({error})"
                raise InputError(what, where=self.path, fix=REMAKE) from None
        return images.resize(out, size) if size else out

    def depth(self, camera: str, rows: Iterable[int] | np.ndarray) -> np.ndarray:
        """Depth of one camera: uint16 (len(rows), H, W) in units of `manifest["depth"][camera]["unit"]` metres.

        Raises InputError on a camera without depth and on damaged bytes.
        """
        return self._layer("depth", camera, rows)

    def segmentation(self, camera: str, rows: Iterable[int] | np.ndarray) -> np.ndarray:
        """Segmentation of one camera: uint8 (len(rows), H, W) labels. Raises InputError as `depth`."""
        return self._layer("segmentation", camera, rows)

    def _layer(self, kind: str, camera: str, rows: Iterable[int] | np.ndarray) -> np.ndarray:
        rows = [int(row) for row in rows]
        views = [self._view(kind, camera, row) for row in rows]
        shape = tuple(self.manifest.get(kind, {}).get(camera, {}).get("size", (0, 0)))
        out = np.empty((len(views), *shape), LAYERS[kind])
        for place, (row, view) in enumerate(zip(rows, views, strict=True)):
            try:
                out[place] = unpack(view, LAYERS[kind], shape)
            except ValueError as error:
                what = f"damaged {kind} of camera '{camera}' at row {row} ({error})"
                raise InputError(what, where=self.path, fix=REMAKE) from None
        return out


def _open_shard(path: Path) -> _Shard:
    """Map one shard; the bytes of its frames are reached without Arrow, which costs more than looking them up."""
    import pyarrow as pa

    table = _read_arrow(path)
    found = {}
    for name in table.column_names:
        array = table.column(name).chunk(0)
        if pa.types.is_large_binary(array.type):
            _, offsets, data = array.buffers()
            found[name] = (np.frombuffer(offsets, np.int64)[: len(array) + 1], memoryview(data).cast("B"))
        elif pa.types.is_fixed_size_binary(array.type):
            offsets = np.arange(len(array) + 1, dtype=np.int64) * array.type.byte_width
            found[name] = (offsets, memoryview(array.buffers()[1]).cast("B"))
    return _Shard(table, found)


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
        raise InputError(f"damaged or cut short ({reason(error)})", where=path, fix=REMAKE) from None
    return table
