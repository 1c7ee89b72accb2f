"""Reader for LIBERO's demonstrations: one HDF5 file per task, `data/demo_0`… in it.

Traps: LIBERO stores at index t the observation AFTER action t, so the observation that action t+1 was chosen on;
OpenVLA's regenerated files (`no_noops`) store the one before. Images are upside down (OpenGL). The gripper is -1 open,
+1 closed, opposite to CALVIN. Arrays have no checksums: a changed byte inside them shows
nowhere. The reward is 1 at the end of every demonstration, whatever happened in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core import images
from vlm4vla_core.actions import LIBERO, ActionConvention
from vlm4vla_core.episodes.checks import check_request, check_splits, numbers, reason, same_length
from vlm4vla_core.episodes.source import Skipped, Unit
from vlm4vla_core.episodes.transforms import no_ops
from vlm4vla_core.episodes.writer import Episode
from vlm4vla_core.errors import InputError, nearest

if TYPE_CHECKING:
    import h5py

STATE = ("x", "y", "z", "rx", "ry", "rz", "finger_left", "finger_right")  # as OpenVLA's RLDS has it
OBSERVATIONS = ("after_action", "before_action")
_AGAIN = "fetch the file again"


@dataclass(frozen=True)
class LiberoSource:
    """Opened demonstrations: a `Source` whose units are files.

    observations: what the files hold at index t, "after_action" (LIBERO's own: then observation t is paired with action
    t+1 and the first action goes) or "before_action" (regenerated files: paired as stored).
    transforms: "libero_no_noops" turns images and drops steps that do nothing, "libero" turns images only, "none"
    leaves all as stored.
    """

    folder: Path
    files: tuple[Path, ...]
    observations: str
    sizes: dict[str, tuple[int, int]]
    format: str = "libero"
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    convention: ActionConvention = LIBERO
    state_names: tuple[str, ...] = STATE
    splits: tuple[str, ...] = ("train",)
    transforms: tuple[str, ...] = ("libero_no_noops", "libero", "none")
    rendered: bool = True

    @property
    def name(self) -> str:
        return f"{self.folder.stem}, observations {self.observations.replace('_', ' ')}"

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    def units(self, splits: tuple[str, ...]) -> list[Unit]:
        """One unit per file. Raises InputError on an unknown split."""
        check_splits(self, splits)
        root = self.folder if self.folder.is_dir() else self.folder.parent
        names = [path.relative_to(root).as_posix() for path in self.files]
        return [Unit(name, "train", (path,)) for _ in splits for name, path in zip(names, self.files, strict=True)]

    def episodes(self, unit: Unit, cameras: tuple[str, ...], transform: str) -> Iterator[Episode | Skipped]:
        """The file's demonstrations in the order of their numbers.

        Raises InputError naming file and demonstration on anything missing, damaged or of unequal length.
        """
        check_request(self, cameras, transform)
        (path,) = unit.files
        for demo, group, instruction in _demos(path):
            where = f"{path.name}, {demo}"
            try:
                parts = {name: group[name] for name in ("actions", "obs/ee_states", "obs/gripper_states")}
                parts |= {camera: group[f"obs/{camera}"] for camera in cameras}
                length = same_length(parts, f"{path}, {demo}")
                action = numbers(parts["actions"][()], LIBERO.names, "actions", f"{path}, {demo}")
                state = np.concatenate([parts["obs/ee_states"][()], parts["obs/gripper_states"][()]], axis=-1)
                state = numbers(state, STATE, "ee_states + gripper_states", f"{path}, {demo}")
                late = int(self.observations == "after_action")
                kept = np.arange(max(length - late, 0))  # observations; the action of step t is action[t + late]
                if transform == "libero_no_noops" and length:
                    kept = kept[~no_ops(action)[late:]]
                shown = {camera: parts[camera][()][kept] for camera in cameras}
            except (KeyError, OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
                raise InputError(f"cannot be read ({reason(error)})", where=f"{path}, {demo}", fix=_AGAIN) from None
            if not instruction:
                yield Skipped("without language", where)
            elif not len(kept):
                yield Skipped("too short for the transform", where)
            else:
                if transform != "none":
                    shown = {camera: images.rotate_180(frames) for camera, frames in shown.items()}
                yield Episode(
                    instruction=instruction,
                    images=dict(shown),
                    state=state[kept],
                    action=action[kept + late],
                    source=where,
                    info={"task": path.stem.removesuffix("_demo")},
                )


def open_libero(source: Path, *, observations: str = "after_action") -> LiberoSource:
    """Open one HDF5 file, a suite of them, or a folder of suites. observations: see `LiberoSource`.

    Raises InputError when there is none, or the first is no LIBERO file.
    """
    source = Path(source)
    if observations not in OBSERVATIONS:
        raise InputError(f"unknown observations '{observations}'", fix=nearest(observations, OBSERVATIONS))
    files = [source] if source.is_file() else sorted((*source.glob("*.hdf5"), *source.glob("*/*.hdf5")))
    if not files:
        what = "no hdf5 files here nor one level below" if source.is_dir() else "no such file or folder"
        raise InputError(what, where=source, fix="give a LIBERO suite, or one of its *_demo.hdf5 files")
    sizes: dict[str, tuple[int, int]] = {}
    for demo, group, _ in _demos(files[0]):
        found = group.get("obs", {})
        for camera in (name for name in found if name.endswith("_rgb")):
            if len(found[camera].shape) != 4:
                what = f"'{camera}' has shape {found[camera].shape}, expected (T, H, W, 3)"
                raise InputError(what, where=f"{files[0]}, {demo}", fix=_AGAIN)
            sizes[camera] = (int(found[camera].shape[1]), int(found[camera].shape[2]))
        break
    if not sizes:
        raise InputError("no demonstration with images, expected data/demo_0/obs/agentview_rgb", where=files[0])
    return LiberoSource(source, tuple(files), observations, sizes)


def _demos(path: Path) -> Iterator[tuple[str, h5py.Group, str]]:
    """Name, group and instruction of every demonstration, while the file is open."""
    import h5py

    try:
        file = h5py.File(path)
    except OSError as error:
        raise InputError(f"cannot be read as HDF5 ({reason(error)})", where=path, fix=_AGAIN) from None
    with file:
        try:
            data, told = file["data"], dict(file["data"].attrs)
            demos = sorted((name for name in data if re.fullmatch(r"demo_\d+", name)), key=lambda name: int(name[5:]))
            instruction = _instruction(path, told)
        except (KeyError, OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise InputError(f"not a LIBERO file ({reason(error)})", where=path, fix=_AGAIN) from None
        if int(told.get("num_demos", len(demos))) != len(demos):
            what = f"{len(demos)} demonstrations found, its num_demos says {told['num_demos']}"
            raise InputError(what, where=path, fix=_AGAIN)
        for demo in demos:
            yield demo, data[demo], instruction


def _instruction(path: Path, told: dict[str, Any]) -> str:
    """The instruction from `problem_info`; regenerated files have none, then from the file's name as LIBERO does."""
    if "problem_info" in told:
        text = json.loads(told["problem_info"])["language_instruction"]
        return str(text if isinstance(text, str) else " ".join(text)).strip(' "')
    words = re.sub(r"^[A-Z_]+SCENE\d+_", "", path.stem.removesuffix("_demo"))
    return words.replace("_", " ").strip()
