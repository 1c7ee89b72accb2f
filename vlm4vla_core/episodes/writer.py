"""Writing of episodes: the episode in memory, its checks, and the shards it goes into.

A `Writer` makes one part of a store: some shards and a `Part` that says what is in them. `assemble` joins parts into
a store; `store.write_store` does both for episodes at hand, `conversion` for parts made by many processes.
Trap: the first episode declares cameras, image sizes and further columns, and all others must agree with it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core import folders
from vlm4vla_core.actions import ActionConvention
from vlm4vla_core.episodes import frames
from vlm4vla_core.episodes.checks import numbers, same_length
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

    from vlm4vla_core.episodes.video import Frames

KIND, MANIFEST = "episodes", folders.STORE_MANIFEST
STEPS_PER_SHARD = 4096
BYTES_PER_SHARD = 1 << 26  # of pictures; bounds the memory of a writer
_RESERVED = ("episode", "step", "state", "action")


@dataclass(frozen=True)
class Episode:
    """One episode in memory: what readers yield and `write_store` takes.

    images: camera -> T encoded images, uint8 (T, H, W, 3), or a video's frames, decoded while they are iterated.
    state: (T, S). action: (T, A), transformed, in physical units. columns: further floats (T, k), by declared name.
    depth: camera -> uint16 (T, H, W) in units of `depth_unit` metres, 0 where unknown; segmentation: camera -> uint8
    (T, H, W) labels; both are kept losslessly and never resized. split: "train" or "val". source: file and record.
    info: short texts that become columns of the episode table ("domain" and "seed" also go into the manifest).
    notes: what was mended while reading -> how often, such as {"absent images of image_1 stored black": 3}; the
    store's account adds them up.
    """

    instruction: str
    images: dict[str, Sequence[bytes] | np.ndarray | Frames]
    state: np.ndarray
    action: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    split: str = "train"
    source: str = ""
    info: dict[str, str] = field(default_factory=dict)
    depth: dict[str, np.ndarray] = field(default_factory=dict)
    depth_unit: float = 0.001
    segmentation: dict[str, np.ndarray] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """How episodes are stored. Picklable, and its `to_dict` decides the bytes together with the episodes.

    image_size: square training size in pixels, None keeps the source's. full_colour: JPEG 4:4:4, for renders.
    encoding: "jpeg", or "raw" for uint8 of fixed size. columns: names within each further column.
    """

    convention: ActionConvention
    state_names: tuple[str, ...]
    image_size: int | None = None
    quality: int = 95
    full_colour: bool = False
    encoding: str = "jpeg"
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "convention": self.convention.to_dict()}


@dataclass
class Part:
    """What one writer made, as JSON values: its shards with their rows, its episodes' table and their declarations.

    rows: one dict per episode, with the number of its shard under "shard". layers: "depth" or "segmentation" ->
    camera -> size and unit. left_out, notes: counted reasons.
    """

    shards: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    cameras: dict[str, list[int]] = field(default_factory=dict)
    columns: dict[str, list[str]] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    @property
    def declared(self) -> dict[str, Any]:
        """What all parts of a store must agree on."""
        return {"cameras": self.cameras, "columns": self.columns, **self.layers}


class Writer:
    """Checks and encodes episodes and writes a shard of whole episodes whenever enough of them are there."""

    def __init__(self, folder: Path, recipe: Recipe, prefix: str = "steps-") -> None:
        self.folder, self.recipe, self.prefix = folder, recipe, prefix
        self.part = Part(columns={name: list(names) for name, names in recipe.columns.items()})
        self.pending: list[dict[str, Any]] = []  # per episode: column -> array or list of bytes
        self.steps = self.bytes = 0  # pending ones

    def add(self, episode: Episode) -> None:
        """Check one episode, encode its images and queue its steps. Raises InputError naming episode and step."""
        part = self.part
        where = episode.source or f"episode {len(part.rows)}"
        length = len(episode.action)
        if length == 0:
            raise InputError("an episode without steps", where=where, fix="leave it out")
        if episode.split not in ("train", "val"):
            raise InputError(f"unknown split '{episode.split}'", where=where, fix="use 'train' or 'val'")
        piece: dict[str, Any] = {
            "state": numbers(episode.state, self.recipe.state_names, "state", where),
            "action": numbers(episode.action, self.recipe.convention.names, "action", where),
        }
        if not part.rows:
            self._declare(episode, where)
        _same_names("camera", part.cameras, episode.images, where)
        _same_names("column", part.columns, episode.columns, where)
        for name, names in part.columns.items():
            piece[name] = numbers(episode.columns[name], names, name, where, finite=False)
        same_length(piece, where)
        digest = hashlib.sha256(piece["action"].tobytes() + piece["state"].tobytes())
        for camera in part.cameras:
            piece[f"image/{camera}"] = self._encode(camera, episode.images[camera], length, where)
            digest.update(piece[f"image/{camera}"][0])
        for layer, dtype in frames.LAYERS.items():
            given = getattr(episode, layer)
            _same_names(layer, part.layers[layer], given, where)
            for camera, declared in part.layers[layer].items():
                shape = (length, *declared["size"])
                if given[camera].dtype != dtype or given[camera].shape != shape:
                    what = f"{layer} of camera '{camera}' is {given[camera].dtype} {given[camera].shape}"
                    raise InputError(f"{what}, expected {np.dtype(dtype)} {shape}", where=where)
                if declared["unit"] != (episode.depth_unit if layer == "depth" else 1):
                    raise InputError(f"the unit of depth changes to {episode.depth_unit} m", where=where)
                piece[f"{layer}/{camera}"] = [frames.pack(frame) for frame in given[camera]]
        row = {"shard": len(part.shards), "length": length, "instruction": episode.instruction}
        row |= {"split": episode.split, "source": episode.source, "content": digest.hexdigest()[:16]}
        if clash := sorted({*row, "episode", "start"} & set(episode.info)):
            raise InputError(f"info may not be named {', '.join(clash)}", where=where)
        part.rows.append(row | {key: str(value) for key, value in episode.info.items()})
        for note, count in episode.notes.items():
            part.notes[note] = part.notes.get(note, 0) + count
        self.pending.append(piece)
        self.steps += length
        self.bytes += sum(sum(map(len, value)) for value in piece.values() if isinstance(value, list))
        if self.steps >= STEPS_PER_SHARD or self.bytes >= BYTES_PER_SHARD:
            self._flush()

    def _declare(self, episode: Episode, where: str) -> None:
        """Take cameras, layers and further columns from the first episode."""
        for name, value in episode.columns.items():
            if name in _RESERVED or name.startswith(("image/", *(f"{layer}/" for layer in frames.LAYERS))):
                raise InputError(f"a further column may not be named '{name}'", where=where)
            width = np.shape(value)[1] if np.ndim(value) == 2 else 0
            self.part.columns.setdefault(name, [str(index) for index in range(width)])
        self.part.cameras = {camera: [0, 0] for camera in episode.images}
        for layer in frames.LAYERS:
            unit = episode.depth_unit if layer == "depth" else 1
            given = getattr(episode, layer).items()
            self.part.layers[layer] = {camera: {"size": list(value.shape[1:]), "unit": unit} for camera, value in given}

    def _encode(
        self, camera: str, given: Sequence[bytes] | np.ndarray | Frames, length: int, where: str
    ) -> list[bytes]:
        """T byte strings of one size."""
        if len(given) != length:
            raise InputError(f"{len(given)} images of camera '{camera}' for {length} steps", where=where)
        recipe, cameras = self.recipe, self.part.cameras
        raw, encoded = recipe.encoding == "raw", []
        for step, frame in enumerate(given):
            try:
                data, size = frames.encode(
                    frame, recipe.image_size, raw=raw, quality=recipe.quality, full_colour=recipe.full_colour
                )
            except ValueError as error:
                what = f"image of camera '{camera}' cannot be read ({error})"
                raise InputError(what, where=f"{where}, step {step}", fix="drop the episode or the camera") from None
            if cameras[camera] == [0, 0]:
                cameras[camera] = list(size)
            if list(size) != cameras[camera]:
                raise InputError(
                    f"camera '{camera}' changes its image size from {tuple(cameras[camera])} to {size}",
                    where=f"{where}, step {step}",
                    fix="give all one size when converting (`vlm4vla convert --size`)",
                )
            encoded.append(data)
        return encoded

    def _flush(self) -> None:
        """Write the pending episodes as one shard of one record batch."""
        import pyarrow as pa

        arrays: dict[str, pa.Array] = {}
        for name in list(self.pending[0]):
            values = [piece.pop(name) for piece in self.pending]
            if isinstance(values[0], list):
                raw = self.recipe.encoding == "raw" and name.startswith("image/")
                kind = pa.binary(len(values[0][0])) if raw else pa.large_binary()
                arrays[name] = pa.array(chain.from_iterable(values), kind, size=self.steps)
            else:
                joined = np.concatenate(values)
                arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(joined.reshape(-1)), joined.shape[1])
        name = f"{self.prefix}{len(self.part.shards):05d}.arrow"
        write_arrow(self.folder / name, pa.RecordBatch.from_pydict(arrays))
        self.part.shards.append(name)
        self.pending, self.steps, self.bytes = [], 0, 0

    def close(self) -> Part:
        """Write the last shard; what was made."""
        if self.pending:
            self._flush()
        return self.part


def _same_names(what: str, known: Mapping[str, Any], given: Mapping[str, Any], where: str) -> None:
    if set(known) != set(given):
        raise InputError(f"{what}s are {sorted(given)}, in earlier episodes {sorted(known)}", where=where)


def write_arrow(path: Path, batch: pa.RecordBatch) -> None:
    """Write one Arrow IPC file and flush it to the disk."""
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
