"""A study as its author declares it: backbones x arms x seeds x benchmarks, in one TOML file.

An arm is a way of making policies: stages before the last one (auxiliary tasks, injection), a start (pretrained or
scratch) and settings of the last stage (freezing). The last stage belongs to the benchmark, which brings its preset
and its demonstrations. Unknown keys are errors that name the nearest.

A file may name many backbones at once: `source = "data/nano/*"` gives one for each folder that ships.

Trap: `set` of a benchmark goes under `set` of a backbone, and that under `set` of the arm; a seed given there would
undo the arm's `seeds`, so it is refused.
"""

from __future__ import annotations

import glob
import json
import re
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError, nearest

ALL = ("*",)
Axis = Literal["capability", "auxiliary", "freezing", "scratch", "injection", "divergence", "heads"]
_OWN = ("seed", "backbone", "init")  # settings that the study itself decides


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Data(_Table):
    """Demonstrations (or question files), recorded by the study or given by the user."""

    name: str
    world: str = ""
    """Recorded by `vlm4vla record WORLD`…"""
    options: dict[str, Any] = Field(default_factory=dict)
    """…with these options."""
    store: str = ""
    """Or a store or question files that are there, relative to the study's file."""
    fingerprint: str = ""
    """Of a given store: what its manifest says; for looking at results where the store is not."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if bool(self.world) == bool(self.store):
            raise ValueError(f"data '{self.name}' needs either world or store")
        return self


class Backbone(_Table):
    """A VLM to start from."""

    name: str
    source: str = "tiny"
    """`tiny` or `nano`, a checkpoint or Hugging Face folder relative to the study's file or shipped, or a hub id. A
    pattern stands for all folders that match, each named after its folder."""
    lineage: str = ""
    """What models made alike share; the family when left out."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings of all its trainings."""


class Stage(_Table):
    """A training before the last one."""

    name: str
    preset: str
    data: str
    set: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = Field(default=None, ge=0)
    """One training for all seeds of an arm (a VLM that several policies start from); the arm's seed when left out."""


class Benchmark(_Table):
    """A protocol, the training for it, and how much of it is run."""

    protocol: str
    preset: str
    data: str
    set: dict[str, Any] = Field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    episodes: int = Field(default=50, ge=1)
    execute: tuple[int, ...] = ()
    """Execute lengths, fixed beforehand; the whole chunk when left out."""
    baselines: tuple[Literal["random", "zero", "mean-action", "scripted"], ...] = ()
    """Policies without learning to run beside them."""


class Arm(_Table):
    """One way of making policies."""

    name: str
    title: str = ""
    axis: tuple[Axis, ...] = ()
    """Which of the paper's questions it belongs to; the reports are arranged by it."""
    against: str = ""
    """The arm that it is compared with."""
    stages: tuple[str, ...] = ()
    init: Literal["pretrained", "scratch"] = "pretrained"
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings of the last stage."""
    backbones: tuple[str, ...] = ALL
    """Names or patterns."""
    benchmarks: tuple[str, ...] = ALL
    seeds: tuple[int, ...] = (0,)
    draws: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Of a head that draws (flow): the same episodes again with these numbers of its noise (`evaluate --draw`)."""


class Capability(_Table):
    """Questions asked of VLMs."""

    protocol: str = "tabletop-vqa@1"
    episodes: int = Field(default=200, ge=1)
    of: tuple[Literal["backbone", "stages"], ...] = ("backbone",)
    """Whom: the backbones, and what comes out of every earlier stage."""


class Probe(_Table):
    """A verb of probes, called on checkpoints as `vlm4vla VERB CHECKPOINT --data STORE --out FOLDER`."""

    name: str
    verb: Literal["features", "probe"] = "probe"
    data: str
    of: tuple[Literal["backbone", "policy"], ...] = ("policy",)
    options: dict[str, Any] = Field(default_factory=dict)
    arms: tuple[str, ...] = ALL
    seeds: tuple[int, ...] = (0,)


class Resources(_Table):
    """What a job takes."""

    train_gpus: int = Field(default=1, ge=0)
    """GPUs of a training, where there are any; more than one go through torchrun. 0: all jobs are kept from them."""
    threads: int = Field(default=0, ge=0)
    """Threads of a job (OMP_NUM_THREADS); 0 leaves it to torch. Results are exact for one number of them."""


class Study(_Table):
    """The whole declaration. folder: of its file, which relative paths start from."""

    name: str
    question: str = ""
    deviations: str = ""
    """Where the study departs from the paper on purpose."""
    data: tuple[Data, ...] = ()
    backbone: tuple[Backbone, ...] = ()
    benchmark: tuple[Benchmark, ...] = ()
    arm: tuple[Arm, ...] = ()
    stage: tuple[Stage, ...] = ()
    capability: tuple[Capability, ...] = ()
    probe: tuple[Probe, ...] = ()
    resources: Resources = Resources()
    shipped: str = ""
    """A bundle whose jobs count as done, relative to the file."""
    live: tuple[str, ...] = ()
    """Cells that are run here although the bundle has them, as ARM/BACKBONE/PROTOCOL/SEED; * for any of them."""
    only_live: bool = False
    """Run nothing but the live cells; what is neither shipped nor live stays as it is."""
    filled_by: str = ""
    """The study whose runs fill what this one reads from the bundle, a file beside this one; the pages name it."""
    folder: Path = Field(default=Path(), exclude=True)

    @model_validator(mode="after")
    def _names(self) -> Self:
        for kind in ("data", "backbone", "benchmark", "arm", "stage", "probe"):
            names = [_name(entry) for entry in getattr(self, kind)]
            if odd := [name for name in (self.name, *names) if not re.fullmatch(r"[\w.@+-]+", name)]:
                raise ValueError(f"'{odd[0]}' becomes part of a path; use letters, digits, '.', '_', '+' and '-'")
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"two {kind} entries are called '{min(twice)}'")
        for kind, where, wanted in self._mentions():
            known = [_name(entry) for entry in getattr(self, kind)]
            for name in wanted:
                if name not in known and not _is_pattern(name):
                    raise ValueError(f"{where}: no {kind} '{name}'; {nearest(name, known)}")
        settings: tuple[Any, ...] = (*self.backbone, *self.stage, *self.benchmark, *self.arm)
        for entry in settings:
            if own := [key for key in _OWN if key in entry.set]:
                raise ValueError(f"'{_name(entry)}' sets {own[0]}, which seeds, backbones and init decide")
        return self

    def _mentions(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """What entry mentions which names of which kind."""
        found: list[tuple[str, str, tuple[str, ...]]] = []
        for arm in self.arm:
            where = f"arm '{arm.name}'"
            found += [("stage", where, arm.stages), ("backbone", where, arm.backbones)]
            found += [("benchmark", where, arm.benchmarks), ("arm", where, (arm.against,) if arm.against else ())]
        reading: tuple[Any, ...] = (*self.stage, *self.benchmark, *self.probe)
        for entry in reading:
            found.append(("data", f"'{_name(entry)}'", (entry.data,)))
        return found + [("arm", f"probe '{probe.name}'", probe.arms) for probe in self.probe]


def _name(entry: Any) -> str:
    return str(getattr(entry, "name", None) or entry.protocol)


def _is_pattern(name: str) -> bool:
    return glob.has_magic(name)


def chosen(name: str, wanted: tuple[str, ...]) -> bool:
    """Whether a name is among these names and patterns."""
    return any(fnmatchcase(name, one) for one in wanted)


def read_study(path: Path) -> Study:
    """The study that a TOML file declares (or the JSON of a bundle).

    Raises InputError on a missing or malformed file, unknown keys and names.
    """
    path = Path(path)
    values, folder = _read(path), path.resolve().parent
    if "folder" in values:
        raise InputError("unknown key 'folder'", where=path)
    if isinstance(values.get("backbone"), list):
        values["backbone"] = _backbones(values["backbone"], folder)
    try:
        study = Study(**values, folder=folder)
    except ValidationError as error:
        raise _told(error, values, path) from None
    if study.filled_by and not (folder / study.filled_by).is_file():
        raise InputError(f"filled_by: no study file '{study.filled_by}' is there", where=path)
    return study


def _backbones(entries: list[Any], folder: Path) -> list[Any]:
    """The entries with one for each folder that a pattern matches; one that is named by itself stays as it is."""
    found: list[Any] = []
    for entry in entries:
        source = entry.get("source", "") if isinstance(entry, dict) else ""
        if not isinstance(source, str) or not _is_pattern(source):
            found.append(entry)
            continue
        roots = (folder, folders.project_root(), folders.project_root() / "vlm4vla_core" / "_shipped")
        matches = next((sorted(some) for root in roots if (some := list(root.glob(source)))), [])
        own = {str(one.get("name")) for one in entries if isinstance(one, dict)}
        for match in matches:
            if (match / "config.json").is_file() and match.name not in own:
                found.append({**entry, "name": match.name, "source": source.rpartition("/")[0] + "/" + match.name})
    return found


def _read(path: Path, depth: int = 0) -> dict[str, Any]:
    """A file's tables, after those of the files that it includes; what stands later adds entries, or wins."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (FileNotFoundError, IsADirectoryError):
        raise InputError("no such study file", where=path) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"not a valid TOML file ({error})", where=path) from None
    if not isinstance(values, dict):
        raise InputError("a study is a table of settings", where=path)
    merged: dict[str, Any] = {}
    included = values.pop("include", [])
    if not isinstance(included, list) or depth > 4:
        raise InputError("include must be a list of files that do not include each other", where=path)
    for more in (*(_read(path.parent / str(name), depth + 1) for name in included), values):
        for key, value in more.items():
            merged[key] = [*merged[key], *value] if isinstance(merged.get(key), list) else value
    return merged


def _told(error: ValidationError, values: dict[str, Any], path: Path) -> InputError:
    """The first thing that is wrong, with its place and the nearest known key."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        table = _MODELS.get(place[0], Study) if len(place) > 1 else Study
        what, fix = f"unknown key '{place[-1]}'", nearest(place[-1], table.model_fields)
    elif first["type"] == "missing":
        what, fix = f"'{place[-1]}' is missing", "add it"
    else:
        what, fix = first["msg"].removeprefix("Value error, "), ""
        if place and first["type"] != "value_error":
            what = f"{place[-1]} = {first['input']!r}: {what.lower()}"
    inside = values.get(place[0]) if len(place) > 1 and place[1].isdigit() else None
    if isinstance(inside, list):
        entry = inside[int(place[1])]
        label = entry.get("name") or entry.get("protocol") if isinstance(entry, dict) else None
        what = f"{what} ([[{place[0]}]] {label or 'number ' + str(int(place[1]) + 1)})"
    return InputError(what, where=path, fix=fix)


_MODELS: dict[str, type[_Table]] = {
    "data": Data, "backbone": Backbone, "stage": Stage, "benchmark": Benchmark, "arm": Arm, "capability": Capability,
    "probe": Probe, "resources": Resources,
}  # fmt: skip
