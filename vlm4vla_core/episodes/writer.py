"""Writing of episode stores: the episode in memory, its checks, and the shards it goes into.

Use `store.write_store`; this file is its inside.
Trap: the first episode declares cameras, image sizes and further columns, and all others must agree with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core import folders, images
from vlm4vla_core.actions import ActionConvention
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

KIND, MANIFEST = "episodes", folders.STORE_MANIFEST
STEPS_PER_SHARD = 4096
_STEP_COLUMNS = ("episode", "step", "state", "action")


@dataclass(frozen=True)
class Episode:
    """One episode in memory: what readers yield and `write_store` takes.

    images: camera -> T encoded images, or uint8 (T, H, W, 3). state: (T, S). action: (T, A), already
    transformed, in physical units. columns: declared further floats, each (T, k), such as "truth/objects".
    depth: camera -> uint16 (T, H, W) in units of `depth_unit` metres, 0 where unknown; segmentation: camera -> uint8
    (T, H, W) labels; both are kept losslessly and never resized. split: "train" or "val". source: file and record.
    info: short texts that become columns of the episode table ("domain" and "seed" also go into the manifest).
    notes: what was mended while reading -> how often, such as {"absent images of image_1 stored black": 3}; the
    store's account adds them up.
    """

    instruction: str
    images: dict[str, list[bytes] | np.ndarray]
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


class Writer:
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
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
            raise ValueError(f"expected uint8 (H, W, 3), got {frame.dtype} {frame.shape}")
        picture = images.resize(frame[None], self.image_size)[0] if self.image_size else frame
        return images.encode(picture, quality=self.quality, full_colour=self.full_colour), picture.shape[:2]

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
