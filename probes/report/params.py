"""Typed parameters of the report notebooks: what a notebook may be asked, checked before a kernel starts.

A notebook's `parameters` cell holds the defaults as literals; the model here says which names there are, their
types and ranges, and which of them are inputs (files and folders whose content decides whether a report is up to
date). Trap: papermill alone only warns of an unknown name and runs the default; `check` refuses it.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import CoreSchema, core_schema

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError, nearest

STORE_MANIFEST = "dataset.json"  # episode stores name their manifest after what it is to a user


@dataclass(frozen=True)
class Input:
    """Marks a parameter as one file or folder: text in the notebook, a resolved Path in the model.

    kind: the manifest kind a folder must have ("" accepts any folder). made_by: the command that makes one.
    """

    kind: str = ""
    made_by: str = ""

    def resolve(self, value: Any) -> Path:
        """The existing path that `value` names. Raises InputError when nothing is there or it is of another kind."""
        if not isinstance(value, str | Path):
            raise ValueError("should be the path of a file or folder")
        return self._checked(find_path(value, fix=f"make it with `{self.made_by}`" if self.made_by else ""))

    def _checked(self, path: Path) -> Path:
        if self.kind and path.is_dir():
            name = STORE_MANIFEST if self.kind == "episodes" else folders.MANIFEST
            folders.read_manifest(path, self.kind, name=name, fix=f"make it with `{self.made_by}`")
        return path

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.resolve)


@dataclass(frozen=True)
class Inputs(Input):
    """Marks a parameter as a list of files and folders; an entry may be a pattern such as `runs/eval/*`. least: how
    many entries there must be."""

    least: int = 1

    def resolve(self, value: Any) -> tuple[Path, ...]:  # type: ignore[override]  # many where Input has one
        """Every existing path named, in order. Raises InputError when an entry names nothing."""
        entries = [value] if isinstance(value, str | Path) else value
        if not isinstance(entries, list | tuple) or len(entries) < self.least:
            some = "at least one file, folder or pattern" if self.least else "files, folders or patterns"
            raise ValueError(f"should be a list of {some}")
        if not all(isinstance(entry, str | Path) for entry in entries):
            raise ValueError("should hold paths only")
        fix = f"make it with `{self.made_by}`" if self.made_by else ""
        found = [path for entry in entries for path in find_paths(entry, fix=fix)]
        return tuple(self._checked(path) for path in dict.fromkeys(found))


def find_path(value: str | Path, *, fix: str = "") -> Path:
    """A path given as text: against the current folder first, then the project root, then what is shipped."""
    path = Path(value).expanduser()
    if path.is_absolute():
        if path.exists():
            return path
    else:
        for root in (Path.cwd(), folders.project_root(), folders.project_root() / "vlm4vla_core" / "_shipped"):
            if (root / path).exists():
                return root / path
    raise InputError("no such file or folder", where=value, fix=fix)


def find_paths(pattern: str | Path, *, fix: str = "") -> list[Path]:
    """As `find_path`, for text that may hold `*`, `?` or `[…]`; hidden (unfinished) entries never match."""
    text = str(Path(pattern).expanduser())
    if not glob.has_magic(text) or Path(text).exists():
        return [find_path(text, fix=fix)]
    for root in (Path.cwd(), folders.project_root()):
        if found := sorted(glob.glob(str(root / text), recursive=True)):  # noqa: PTH207  # Path.glob takes no absolute pattern
            return [Path(path) for path in found]
    raise InputError("nothing matches this pattern", where=pattern, fix=fix)


def shown(path: Path) -> str:
    """A path as a reader meets it: relative to the current folder or the project root where it lies below one."""
    for root in (Path.cwd(), folders.project_root()):
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return str(path)


def input_fingerprint(path: Path) -> str:
    """Fingerprint of an input: a file's content, a product folder's manifest, or every file of another folder."""
    if path.is_file():
        return folders.file_fingerprint(path)
    for name in (folders.MANIFEST, STORE_MANIFEST):
        if (path / name).is_file():
            manifest = folders.read_json(path / name)
            if isinstance(manifest, dict) and "fingerprint" in manifest:
                return str(manifest["fingerprint"])
    files = sorted(entry for entry in path.rglob("*") if entry.is_file() and not entry.name.startswith("."))
    return folders.fingerprint({entry.relative_to(path).as_posix(): folders.file_fingerprint(entry) for entry in files})


class NotebookParams(BaseModel):
    """Base of every notebook's parameters; `notebook` is the notebook's name. Unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    notebook: ClassVar[str] = ""

    @property
    def inputs(self) -> dict[str, Path]:
        """label -> path of every input, in order of declaration; the label is `parameter: path`."""
        found: dict[str, Path] = {}
        for name, field in type(self).model_fields.items():
            if any(isinstance(mark, Input) for mark in field.metadata):
                value = getattr(self, name)
                for path in value if isinstance(value, tuple) else (value,):
                    found[f"{name}: {shown(path)}"] = path
        return found

    def input_fingerprints(self) -> dict[str, str]:
        """label -> fingerprint of every input."""
        return {label: input_fingerprint(path) for label, path in self.inputs.items()}


Model = TypeVar("Model", bound=NotebookParams)


def check(model: type[Model], values: Mapping[str, Any], *, where: object) -> Model:
    """The validated parameters. Raises InputError on an unknown name (naming the nearest) or a wrong type or range."""
    for name in values:
        if name not in model.model_fields:
            raise InputError(f"unknown parameter '{name}'", where=where, fix=nearest(name, model.model_fields))
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "parameters"
        about = model.model_fields[name].description if name in model.model_fields else None
        message = first["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        got = "" if first["type"] == "missing" else f", got {first['input']!r}"
        raise InputError(f"parameter '{name}': {message}{got}", where=where, fix=about or "") from None


def from_text(model: type[NotebookParams], name: str, text: str) -> Any:
    """The value that command-line text stands for: JSON (numbers, true, lists), or the text where that is meant."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    field = model.model_fields.get(name)
    is_path = field is not None and any(isinstance(mark, Input) for mark in field.metadata)
    if field is None or field.annotation is str or (is_path and not isinstance(value, list)):
        return text  # `-p label 7` and a folder named 7 stay text
    return value


# --- the notebooks that ship ------------------------------------------------------------------------------

Level = Annotated[float, Field(gt=0.5, lt=1.0, description="confidence level of the intervals, between 0.5 and 1")]
Seed = Annotated[int, Field(ge=0, description="seed of everything that is drawn at random, 0 or more")]


class BenchmarkResultsParams(NotebookParams):
    """Parameters of `benchmark_results`."""

    notebook: ClassVar[str] = "benchmark_results"
    rows: Annotated[
        tuple[Path, ...],
        Inputs("rollouts", made_by="vlm4vla evaluate"),
        Field(description="folders written by vlm4vla evaluate, or files of episode rows; patterns are allowed"),
    ]
    level: Level


class BenchmarkPowerParams(NotebookParams):
    """Parameters of `benchmark_power`."""

    notebook: ClassVar[str] = "benchmark_power"
    models: Annotated[int, Field(ge=4, le=10_000, description="number of models, 4 to 10000")]
    episodes: Annotated[int, Field(ge=1, description="episodes of each model, over all tasks; chains on CALVIN")]
    rho: Annotated[float, Field(gt=0, lt=1, description="true correlation to be seen, between 0 and 1")]
    like: Annotated[
        Literal["bridge", "libero", "calvin"],
        Field(description="the paper's benchmark whose spread and noise are taken: bridge, libero or calvin"),
    ]


class CapabilityVsPerformanceParams(NotebookParams):
    """Parameters of `capability_vs_performance`. The folder data/paper stands for the paper's published tables."""

    notebook: ClassVar[str] = "capability_vs_performance"
    capability: Annotated[Path, Input(), Field(description="table of VLM scores (model, score), or data/paper")]
    performance: Annotated[
        Path, Input(), Field(description="table of policy scores (model, benchmark, value), or data/paper")
    ]
    version: Annotated[
        Literal["arxiv", "openreview"], Field(description="which version of the paper data/paper stands for")
    ]
    primary: Annotated[str, Field(description="the pair that was planned, CAPABILITY:BENCHMARK, or empty")]
    seed: Seed


_SOURCE = "checkpoint or run folder, or folder of features"


class FeatureProbeParams(NotebookParams):
    """Parameters of `feature_probe`."""

    notebook: ClassVar[str] = "feature_probe"
    checkpoint: Annotated[Path, Input(made_by="vlm4vla train"), Field(description=f"the {_SOURCE} in question")]
    reference: Annotated[
        Path, Input(made_by="vlm4vla train"), Field(description=f"{_SOURCE} that all others are compared with")
    ]
    others: Annotated[
        tuple[Path, ...],
        Inputs(made_by="vlm4vla train", least=0),
        Field(description="further checkpoints of the same layers, or features of the same frames; may be empty"),
    ]
    data: Annotated[
        Path, Input("episodes", made_by="vlm4vla record"), Field(description="the episode store that is looked at")
    ]
    layers: Annotated[
        list[str], Field(min_length=1, description="layers of checkpoints, such as vision.0..-1 (see vlm4vla features)")
    ]
    targets: Annotated[
        list[str],
        Field(min_length=1, description="what is read out of the features, the headline's first (see `vlm4vla probe`)"),
    ]
    readout: Annotated[Literal["linear", "mlp"], Field(description="kind of readout: linear or mlp")]
    frames: Annotated[int, Field(ge=0, description="frames of the store that checkpoints see, 0 for all")]
    seed: Seed


class RepresentationSimilarityParams(NotebookParams):
    """Parameters of `representation_similarity`."""

    notebook: ClassVar[str] = "representation_similarity"
    checkpoint: Annotated[Path, Input(made_by="vlm4vla train"), Field(description=f"the {_SOURCE} in question")]
    reference: Annotated[Path, Input(made_by="vlm4vla train"), Field(description=f"{_SOURCE} that it is compared with")]
    twin: Annotated[
        tuple[Path, ...],
        Inputs(made_by="vlm4vla train", least=0),
        Field(description="another seed of the checkpoint's run, for the ceiling: at most one, may be empty"),
    ]
    data: Annotated[
        Path, Input("episodes", made_by="vlm4vla record"), Field(description="the episode store that is looked at")
    ]
    layers: Annotated[
        list[str], Field(min_length=1, description="layers of checkpoints, such as vision.0..-1 (see vlm4vla features)")
    ]
    pool: Annotated[Literal["mean", "grid", "attn", "cls"], Field(description="pooling of checkpoints' tokens")]
    frames: Annotated[int, Field(ge=0, description="frames of the store that checkpoints see, 0 for all")]
    neighbours: Annotated[int, Field(ge=1, le=100, description="nearest frames that are compared, 1 to 100")]
    resamples: Annotated[int, Field(ge=0, description="bootstrap draws for the intervals, 0 for none")]
    seed: Seed


class AttributionParams(NotebookParams):
    """Parameters of `attribution`."""

    notebook: ClassVar[str] = "attribution"
    checkpoint: Annotated[
        Path, Input(made_by="vlm4vla train"), Field(description="checkpoint or run folder of the policy in question")
    ]
    reference: Annotated[
        Path, Input(made_by="vlm4vla train"), Field(description="checkpoint of the same policy to compare with")
    ]
    data: Annotated[Path, Input("episodes", made_by="vlm4vla record"), Field(description="an episode store")]
    episode: Annotated[int, Field(ge=0, description="number of the episode, from 0")]
    frames: Annotated[int, Field(ge=1, le=16, description="frames of the episode, evenly spread, 1 to 16")]
    target: Annotated[str, Field(description="an action dimension, such as x, or gripper")]
    method: Annotated[
        Literal["ig", "ig-pixels", "gradxact", "occlusion", "ablation"], Field(description="how places are scored")
    ]
    orders: Annotated[int, Field(ge=1, description="random orders beside the deletion and insertion curves")]
    seed: Seed


class TrainingDivergenceParams(NotebookParams):
    """Parameters of `training_divergence`."""

    notebook: ClassVar[str] = "training_divergence"
    base: Annotated[
        Path, Input(made_by="vlm4vla train"), Field(description="checkpoint or run that both trainings started from")
    ]
    vlm: Annotated[
        tuple[Path, ...],
        Inputs(made_by="vlm4vla train"),
        Field(max_length=2, description="the VLM-trained checkpoint or run, and perhaps another seed of it"),
    ]
    vla: Annotated[
        tuple[Path, ...],
        Inputs(made_by="vlm4vla train"),
        Field(max_length=2, description="the VLA-trained checkpoint or run, and perhaps another seed of it"),
    ]
    trajectories: Annotated[
        tuple[Path, ...],
        Inputs(made_by="vlm4vla train --snapshots sketch", least=0),
        Field(description="runs of both trainings with recorded snapshots, four seeds of each; may be empty"),
    ]
    data: Annotated[
        Path,
        Input("episodes", made_by="vlm4vla record"),
        Field(description="the episode store that is looked at"),
    ]
    groups: Annotated[
        list[str], Field(description="module groups to show, such as vision or decoder.0; all of them if empty")
    ]
    layers: Annotated[list[str], Field(min_length=1, description="layers to compare, such as vision.0..-1")]
    frames: Annotated[int, Field(ge=0, description="frames of the store that the layers see, 0 for all")]
    batches: Annotated[int, Field(ge=2, description="independent batches per loss, at least 2")]
    seed: Seed
