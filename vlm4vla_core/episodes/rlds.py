"""Reader for RLDS data as TensorFlow Datasets (TFDS) stores it: one record of a tfrecord file is one episode.

A folder has `dataset_info.json` (splits and records per shard), `features.json` (keys and shapes) and the files
NAME-SPLIT.tfrecord-XXXXX-of-YYYYY. Which key means what differs per dataset: one `Layout` per dataset says so.
Traps: splits may repeat each other; `has_image_*` flags may be 0 on real cameras, so they are ignored and what is
black is looked at instead; episodes may lack language.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlm4vla_core import images
from vlm4vla_core.actions import BRIDGE, FRACTAL, LIBERO, ActionConvention
from vlm4vla_core.episodes.checks import check_request, check_splits, choose_splits, numbers, same_length
from vlm4vla_core.episodes.source import Skipped, Unit
from vlm4vla_core.episodes.tfds import Description, describe
from vlm4vla_core.episodes.tfrecord import Feature, parse_example, read_records
from vlm4vla_core.episodes.transforms import Transform, bridge_orig, none
from vlm4vla_core.episodes.writer import Episode
from vlm4vla_core.errors import InputError

__all__ = ["LAYOUTS", "Layout", "RldsSource", "choose_splits", "open_rlds"]


def fractal(action: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fractal's relative gripper commands (1 closes, -1 opens, 0 leaves) made absolute: 1 open, 0 closed.

    action: (T, 7), the command last; smaller than 0.1 counts as 0. Until the first command the gripper is what that
    command changes; without any it is open. All T steps stay.
    Source: openvla/openvla, prismatic/vla/datasets/rlds/oxe (`rt1_dataset_transform`).
    """
    command = np.where(np.abs(action[:, -1]) > 0.1, -np.sign(action[:, -1]), 0)  # 1 opens, -1 closes
    told = np.flatnonzero(command)
    start = -command[told[0]] if len(told) else 1.0
    last = np.maximum.accumulate(np.where(command != 0, np.arange(len(command)), -1))  # the command in force
    opened = (np.where(last < 0, start, command[last]) + 1) / 2
    return np.concatenate([action[:, :-1], opened[:, None]], axis=1, dtype=np.float32), np.arange(len(action))


@dataclass(frozen=True)
class Layout:
    """Which keys of a record mean what. action, state: keys whose numbers are joined in this order. cameras: a prefix;
    every image key under it is a camera of the rest's name. marks: further keys that tell this dataset from others of
    the same shapes. transforms: name -> function, the default first."""

    action: tuple[str, ...]
    state: tuple[str, ...]
    language: str
    marks: tuple[str, ...]
    convention: ActionConvention
    state_names: tuple[str, ...]
    transforms: dict[str, Transform]
    cameras: str = "steps/observation/"
    origin: str = "episode_metadata/file_path"
    rendered: bool = False


_XYZ = ("x", "y", "z")
LAYOUTS: dict[str, Layout] = {
    "bridge_orig": Layout(
        action=("steps/action",),
        state=("steps/observation/state",),
        language="steps/language_instruction",
        marks=("steps/observation/image_0",),
        convention=BRIDGE,
        state_names=(*_XYZ, "roll", "pitch", "yaw", "gripper"),
        transforms={"bridge_orig": bridge_orig, "none": none},
    ),
    "fractal": Layout(  # google-research's RT-1 data, fractal20220817_data
        action=("steps/action/world_vector", "steps/action/rotation_delta", "steps/action/gripper_closedness_action"),
        state=("steps/observation/base_pose_tool_reached", "steps/observation/gripper_closed"),
        language="steps/observation/natural_language_instruction",
        marks=("steps/observation/image",),
        convention=FRACTAL,
        state_names=(*_XYZ, "qx", "qy", "qz", "qw", "gripper_closed"),
        transforms={"fractal": fractal},
    ),
    "libero": Layout(  # OpenVLA's modified_libero_rlds: no-ops dropped and images turned already
        action=("steps/action",),
        state=("steps/observation/state",),
        language="steps/language_instruction",
        marks=("steps/observation/image", "steps/observation/wrist_image", "steps/observation/joint_state"),
        convention=LIBERO,
        state_names=(*_XYZ, "rx", "ry", "rz", "finger_left", "finger_right"),
        transforms={"none": none},
        rendered=True,
    ),
}


@dataclass(frozen=True)
class RldsSource:
    """An opened TFDS folder: a `Source` whose units are its tfrecord files.

    shapes: key -> shape of one step; shards: split -> (file, records) in order.
    """

    folder: Path
    name: str
    layout: Layout
    convention: ActionConvention
    state_names: tuple[str, ...]
    transforms: tuple[str, ...]
    rendered: bool
    shapes: dict[str, tuple[int, ...]]
    cameras: tuple[str, ...]
    shards: dict[str, tuple[tuple[Path, int], ...]]
    format: str = "rlds"
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        return {camera: _size(self.shapes[self.layout.cameras + camera]) for camera in self.cameras}

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.shards)

    def units(self, splits: tuple[str, ...]) -> list[Unit]:
        """One unit per tfrecord file. Raises InputError on an unknown split."""
        check_splits(self, splits)
        described = (self.folder / "dataset_info.json", self.folder / "features.json")
        return [
            Unit(path.name, "train" if split == "train" else "val", (path, *described), (split, index))
            for split in splits
            for index, (path, _) in enumerate(self.shards[split])
        ]

    def episodes(self, unit: Unit, cameras: tuple[str, ...], transform: str) -> Iterator[Episode | Skipped]:
        """The file's episodes in order; without language, or too short for the transform, one is skipped.

        Raises InputError on damaged files, on features of the wrong length and on NaN or infinite actions or states,
        naming file and record.
        """
        check_request(self, cameras, transform)
        layout, apply = self.layout, self.layout.transforms[transform]
        for example, place, short in self._examples(unit):
            action = self._joined(example, layout.action, layout.convention.names, place)  # (T, A)
            state = self._joined(example, layout.state, layout.state_names, place)  # (T, S)
            frames = {camera: _bytes(example, layout.cameras + camera, place) for camera in cameras}
            same_length({"action": action, "state": state, **frames}, place)
            texts = [text.decode("utf-8", "replace").strip() for text in _bytes(example, layout.language, place)]
            instruction = next(filter(None, texts), "")
            transformed, steps = apply(action, state)
            if not instruction:
                yield Skipped("without language", short)
                continue
            if not len(steps):
                yield Skipped("too short for the transform", short)
                continue
            notes: dict[str, int] = {}
            kept = {camera: [frames[camera][step] for step in steps] for camera in cameras}
            for camera, shown in kept.items():
                if absent := shown.count(b""):
                    notes[f"absent images of {camera} stored black"] = absent
                    black = images.encode(np.zeros((*self._seen_size(unit, camera, frames[camera]), 3), np.uint8))
                    kept[camera] = [frame or black for frame in shown]
            origin = _bytes(example, layout.origin, place) if layout.origin in example else []
            yield Episode(
                instruction=instruction,
                images=dict(kept),
                state=state[steps],
                action=transformed,
                split=unit.split,
                source=short,
                info={"origin": origin[0].decode("utf-8", "replace") if origin else ""},
                notes=notes,
            )

    def _examples(self, unit: Unit) -> Iterator[tuple[dict[str, Feature], str, str]]:
        """Every record of a file, parsed; with its full place (for errors) and its short one (for the store)."""
        split, index = unit.key
        path, expected = self.shards[str(split)][int(index)]
        count = 0
        for count, data in enumerate(read_records(path), start=1):
            if count > expected:
                break
            place = f", record {count - 1}"
            yield parse_example(data, f"{path}{place}"), f"{path}{place}", f"{path.name}{place}"
        if count != expected:
            found = f"{count}" if count < expected else f"more than {expected}"
            what = f"{found} records found, dataset_info.json says {expected}"
            raise InputError(what, where=path, fix="fetch the file again")

    def _joined(self, example: dict[str, Feature], keys: tuple[str, ...], names: tuple[str, ...], place: str) -> Any:
        """Number features side by side as (T, D); records hold each flat."""
        parts: dict[str, np.ndarray] = {}
        for key in keys:
            value, width = example.get(key), (*self.shapes[key], 1)[0]
            if not isinstance(value, np.ndarray) or value.size == 0 or value.size % width:
                size = len(value) if value is not None else 0
                raise InputError(f"'{key}' has {size} values, expected a multiple of {width}", where=place)
            parts[key] = value.reshape(-1, width)
        same_length(parts, place)
        return numbers(np.concatenate(list(parts.values()), axis=1), names, " + ".join(keys), place)

    def _seen_size(self, unit: Unit, camera: str, frames: list[bytes]) -> tuple[int, int]:
        """Height and width of the camera: of an image beside the absent one, in the same file, or as declared."""
        for shown in (frames, *(example.get(self.layout.cameras + camera, []) for example, *_ in self._examples(unit))):
            for data in filter(None, shown) if isinstance(shown, list) else ():
                try:
                    height, width = images.decode(data).shape[:2]
                except ValueError:
                    continue  # told when its own episode is read
                return height, width
        return self.sizes[camera]


def _size(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], shape[1]) if len(shape) == 3 and min(shape) > 0 else (1, 1)


def open_rlds(source: Path) -> RldsSource:
    """Open a TFDS folder and find its layout. Raises InputError when a file is missing, damaged or of no known kind."""
    described = describe(source)
    layout = _layout_of(described)
    prefix = layout.cameras
    cameras = tuple(sorted(key.removeprefix(prefix) for key in described.pictures if key.startswith(prefix)))
    meaning = (layout.convention, layout.state_names, tuple(layout.transforms), layout.rendered)
    return RldsSource(described.folder, described.name, layout, *meaning, described.shapes, cameras, described.shards)


def _layout_of(described: Description) -> Layout:
    shapes = described.shapes

    def width(keys: tuple[str, ...]) -> int:
        """Numbers per step of these keys together; 0 when one is missing or no vector."""
        found = [shapes.get(key, (0, 0)) for key in keys]
        return (
            sum((*shape, 1)[0] for shape in found) if all(len(shape) < 2 and 0 not in shape for shape in found) else 0
        )

    for layout in LAYOUTS.values():
        sizes = (width(layout.action), width(layout.state))
        named = {layout.language, *layout.marks} <= shapes.keys()
        if named and sizes == (layout.convention.size, len(layout.state_names)):
            return layout
    keys = ", ".join(f"{key}{list(shape)}" for key, shape in shapes.items() if key.startswith("steps/"))
    known = "; ".join(
        f"{name}: {' + '.join(spec.action)}[{spec.convention.size}], {' + '.join(spec.state)}"
        f"[{len(spec.state_names)}], {spec.language}, {', '.join(spec.marks)}"
        for name, spec in LAYOUTS.items()
    )
    raise InputError(
        f"no known dataset layout, it has {keys}", where=described.folder, fix=f"known layouts are {known}"
    )


def _bytes(example: dict[str, Feature], key: str, place: str) -> list[bytes]:
    value = example.get(key, [])
    if isinstance(value, np.ndarray):
        raise InputError(f"'{key}' holds numbers where bytes belong", where=place)
    return value
