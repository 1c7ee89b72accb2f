"""Checkpoints as named tensors that are read one at a time, under one name whatever the layout of the file.

    with open_weights(path) as weights:
        weights.names, weights.group_of(name), weights.tensor(name)

path: a checkpoint or run folder of this project, a published folder (sharded or not), or one safetensors file. Names
are those of the headless base ("visual.blocks.0.attn.qkv.weight"); parts that only a policy has are in `excluded`.
Trap: two files of one model need not use the same names; a comparison by raw names would silently skip most of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm4vla_core import checkpoint, folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from vlm4vla_core.families import FamilySpec

INDEX = "model.safetensors.index.json"
_PREFIXES = ("backbone.", "base.", "model.")
_PARTS = ("vision", "projector", "embeddings", "decoder", "lm_head")


@dataclass(frozen=True)
class Weights:
    """Open weights of one checkpoint. names: readable name -> (file, name in it). excluded: those of head and query."""

    names: dict[str, tuple[Path, str]]
    excluded: frozenset[str]
    family: FamilySpec | None
    handles: dict[Path, Any]

    def tensor(self, name: str) -> Tensor:
        """One tensor, mapped from its file."""
        file, inside = self.names[name]
        return self.handles[file].get_tensor(inside)

    def group_of(self, name: str) -> str:
        """The module group of a parameter: by the family, or by the first numbered part of its name."""
        found = self.family.group_of(name) if self.family else None
        return found or _numbered_part(name)


@contextmanager
def open_weights(path: Path) -> Iterator[Weights]:
    """Open a checkpoint's weights. Raises InputError when there are none or a file is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    files = weight_files(path)
    family = _family(files[0].parent)
    with ExitStack() as stack:
        handles: dict[Path, Any] = {}
        names: dict[str, tuple[Path, str]] = {}
        for file in files:
            try:
                handles[file] = stack.enter_context(safe_open(file, "pt"))
            except (SafetensorError, OSError) as error:
                raise InputError(f"not a whole safetensors file ({error})", where=file) from None
            for inside in handles[file].keys():  # noqa: SIM118 (not a dict)
                names.setdefault(readable_name(inside, family), (file, inside))
        excluded = frozenset(name for name in names if name == "query" or name.split(".")[0] == "head")
        yield Weights(names, excluded, family, handles)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that hold a checkpoint's weights, the optimizer's state left out."""
    path = Path(path)
    if path.is_file():
        return [path]
    if (path / "checkpoints").is_dir() or (path / folders.MANIFEST).is_file():
        return [checkpoint.resolve(path) / checkpoint.WEIGHTS]
    if (path / INDEX).is_file():
        files = [path / name for name in sorted(set(folders.read_json(path / INDEX)["weight_map"].values()))]
    else:
        files = [file for file in sorted(path.glob("*.safetensors")) if file.name != checkpoint.STATE]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{len(missing)} of {len(files)} weight files are missing", where=missing[0])
    if not files:
        what = "no safetensors weights in this folder" if path.is_dir() else "no such checkpoint"
        raise InputError(what, where=path, fix="give a checkpoint or run folder, or a .safetensors file")
    return files


def weights_fingerprint(path: Path) -> str:
    """Names the content of a checkpoint: its manifest's fingerprint, or the hash of its weight files."""
    files = weight_files(path)
    if (files[0].parent / folders.MANIFEST).is_file() and Path(path).is_dir():
        return str(folders.read_manifest(files[0].parent, checkpoint.KIND)["fingerprint"])
    return folders.fingerprint([folders.file_fingerprint(file) for file in files])


def model_source(path: Path) -> str:
    """What model a checkpoint's weights once came from, such as "tiny qwen2_5_vl"; a published folder's own name."""
    folder = weight_files(path)[0].parent
    if (folder / folders.MANIFEST).is_file():
        manifest = folders.read_manifest(folder, checkpoint.KIND)
        return str(manifest["facts"]["lineage"].get("source", ""))
    return folder.name


def _family(folder: Path) -> FamilySpec | None:
    """The family that config.json names, in this project's layout or Hugging Face's; None when it names none."""
    from vlm4vla_core.families import family, family_of

    if not (folder / checkpoint.CONFIG).is_file():
        return None
    config = folders.read_json(folder / checkpoint.CONFIG)
    try:
        if "backbone" in config:
            return family(config["backbone"]["family"])
        return family_of(config.get("model_type", ""))
    except InputError:  # weights of a foreign model can still be compared, by the names alone
        return None


def readable_name(name: str, family: FamilySpec | None = None) -> str:
    """A parameter's name relative to the headless base: wrappers and, in older files, a missing level are undone."""
    path = name
    for prefix in _PREFIXES:
        path = path.removeprefix(prefix)
    if family and family.group_of(path) is None:
        above = family.layers.split(".")[0]  # "model.layers.0…" of older files is "language_model.layers.0…"
        if family.group_of(f"{above}.{path}"):
            return f"{above}.{path}"
    return path


def _numbered_part(name: str) -> str:
    """ "blocks.3.mlp.weight" -> "blocks.3"; without a number the module that holds the parameter."""
    parts = name.split(".")
    numbered = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: numbered + 1] if numbered is not None else parts[:-1] or parts)


def network_order(group: str) -> tuple[Any, ...]:
    """Sorts module groups from the eye to the output: vision.embed, vision.0…, projector, …, decoder.norm, lm_head."""
    part, _, rest = group.partition(".")
    first = _PARTS.index(part) if part in _PARTS else len(_PARTS)
    digits = rest.rsplit(".", 1)[-1]
    middle = (0, 0) if rest == "embed" else (1, int(digits)) if digits.isdigit() else (2, 0)
    return (first, part, middle, rest)
