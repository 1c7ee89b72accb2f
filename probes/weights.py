"""Checkpoints as named tensors that are read one at a time, under one name whatever the layout of the file.

    with open_weights(path) as weights:
        weights.names, weights.group_of(name), weights.tensor(name)

path: a checkpoint or run folder of this project, a published folder (sharded or not), or one safetensors file. Names
are those of the headless base ("visual.blocks.0.attn.qkv.weight"); parts that only a policy has are in `excluded`.
Trap: two files of one model need not use the same names; a comparison by raw names would silently skip most of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm4vla_core import checkpoint, folders, hub
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from vlm4vla_core.families import FamilySpec

_WRAPPERS = ("backbone.", "base.")  # of this project's checkpoints, around the headless base
_PARTS = ("vision", "projector", "embeddings", "decoder", "lm_head")
HEAD = "lm_head.weight"
NEW = ("head", "query", "dense")  # first parts of the names of what no published VLM has
_KINDS = {
    "norm": ("norm", "ln_", "ln1", "ln2", "layernorm"),
    "attention": ("attn", "attention", "q_proj", "k_proj", "v_proj", "o_proj", "qkv", "out_proj"),
    "mlp": ("mlp", "ffn", "fc1", "fc2", "gate", "up_proj", "down_proj", "expert"),
    "embedding": ("embed", "lm_head", "wte"),
}


@dataclass(frozen=True)
class Weights:
    """Open weights of one checkpoint. names: readable name -> (file, name in it). excluded: those of head,
    query and dense heads."""

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
def open_weights(path: Path, family: FamilySpec | None = None) -> Iterator[Weights]:
    """Open a checkpoint's weights; `family` is taken for files without a config.json.

    An output layer that is the word embeddings over again (a tied one) is left out. Raises InputError when there are
    none, a file is missing or damaged, or adapters are not merged.
    """
    from safetensors import SafetensorError, safe_open

    files = weight_files(path)
    family = family_at(path) or family
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
        if any(".lora_" in name for name in names):
            fix = "write it without adapters first (vlm4vla_core.lora.export_merged)"
            raise InputError("this checkpoint has adapters, whose weights stand apart", where=path, fix=fix)
        excluded = frozenset(name for name in names if name.split(".")[0] in NEW)
        weights = Weights(names, excluded, family, handles)
        if family and HEAD in names and (words := f"{family.embeddings}.weight") in names:
            head, rows = weights.tensor(HEAD), weights.tensor(words)
            if head.dtype == rows.dtype and head.equal(rows):
                del names[HEAD]
        yield weights


@dataclass(frozen=True)
class Three:
    """Base, A and C, open. names: parameters of all three. unmatched: those that are not, with where they are.
    excluded: parts that are new in a policy (head and query)."""

    sides: tuple[Weights, Weights, Weights]
    names: tuple[str, ...]
    unmatched: tuple[str, ...]
    excluded: tuple[str, ...]

    def tensors(self, name: str) -> list[Tensor]:
        """One parameter of base, A and C, mapped from their files. Raises InputError when the shapes differ."""
        tensors = [side.tensor(name) for side in self.sides]
        if tensors[0].dim() == 3:  # experts' matrices stand transposed in published files, and sums do not mind
            turned = (*tensors[0].shape[:1], *tensors[0].shape[:0:-1])
            tensors = [tensor.transpose(-1, -2) if tensor.shape == turned else tensor for tensor in tensors]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if len(set(shapes)) > 1:
            raise InputError(f"shapes differ: base {shapes[0]}, A {shapes[1]}, C {shapes[2]}", where=name)
        return tensors


@contextmanager
def open_three(base: Path | str, a: Path | str, c: Path | str) -> Iterator[Three]:
    """Open three checkpoints and match their parameters by name. Raises InputError for different families, for
    different numbers of layers, and for checkpoints without a common parameter."""
    with ExitStack() as stack:
        paths, where = [Path(path) for path in (base, a, c)], f"{base}, {a}, {c}"
        known = next((found for path in paths if (found := family_at(path))), None)
        one, two, three = (stack.enter_context(open_weights(path, known)) for path in paths)
        sides = (one, two, three)
        families = sorted({side.family.name for side in sides if side.family})
        if len(families) > 1:
            raise InputError(f"checkpoints of different families: {', '.join(families)}", where=where)
        _same_depth(sides, where)
        every = list(dict.fromkeys(name for side in sides for name in side.names))
        excluded = tuple(name for name in every if any(name in side.excluded for side in sides))
        names, unmatched = [], []
        for name in every:
            present = [label for label, side in zip(("base", "A", "C"), sides, strict=True) if name in side.names]
            if name not in excluded and len(present) == 3:
                names.append(name)
            elif name not in excluded:
                why = "; tied to the word embeddings, or left out, elsewhere" if name == HEAD else ""
                unmatched.append(f"{name} (only in {' and '.join(present)}{why})")
        if not names:
            fix = "compare one model family"
            raise InputError("the three checkpoints have no parameter in common", where=where, fix=fix)
        yield Three(sides, tuple(names), tuple(unmatched), excluded)


def _same_depth(sides: Sequence[Weights], where: str) -> None:
    """Refuse a tower or a decoder of other depths; a part that is missing as a whole is merely unmatched."""
    for part in ("vision", "decoder"):
        layers = [{group for group in map(side.group_of, side.names) if re.fullmatch(rf"{part}\.\d+", group)}
                  for side in sides]  # fmt: skip
        depths = [len(found) for found in layers]
        if len(set(depths) - {0}) > 1:
            what = f"{part} layers: {depths[0]} in base, {depths[1]} in A, {depths[2]} in C"
            raise InputError(what, where=where, fix="compare checkpoints of one architecture")


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that hold a checkpoint's weights, the optimizer's state left out."""
    path = Path(path)
    if path.is_file():
        return [path]
    if (path / "checkpoints").is_dir() or (path / folders.MANIFEST).is_file():
        return [checkpoint.resolve(path) / checkpoint.WEIGHTS]
    if (path / hub.INDEX).is_file():
        return hub.weight_files(path)
    if files := sorted(path.glob("*.safetensors")):
        return files
    what = "no safetensors weights in this folder" if path.is_dir() else "no such checkpoint"
    raise InputError(what, where=path, fix="give a checkpoint or run folder, or a .safetensors file")


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


def family_at(path: Path) -> FamilySpec | None:
    """The family that the config.json beside a checkpoint's weights names; None when it names none."""
    from vlm4vla_core.families import family_of_config

    config = weight_files(path)[0].parent / checkpoint.CONFIG
    try:
        return family_of_config(folders.read_json(config)) if config.is_file() else None
    except InputError:  # weights of a foreign model can still be compared, by the names alone
        return None


def readable_name(name: str, family: FamilySpec | None = None) -> str:
    """A parameter's name relative to the headless base, from this project's layout or the family's published one."""
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    if name == "lm_head":  # a backbone's own output layer is a parameter of no module
        return HEAD
    return family.canonical(name) if family else name.removeprefix("model.")


def _numbered_part(name: str) -> str:
    """ "blocks.3.mlp.weight" -> "blocks.3"; without a number the module that holds the parameter."""
    parts = name.split(".")
    numbered = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: numbered + 1] if numbered is not None else parts[:-1] or parts)


def kind_of(name: str) -> str:
    """What a parameter does: norm, attention, mlp, embedding or other, by the last telling part of its name."""
    for part in reversed(name.lower().split(".")[:-1] or [name.lower()]):
        for kind, marks in _KINDS.items():
            if any(mark in part for mark in marks):
                return kind
    return "other"


def network_order(group: str) -> tuple[Any, ...]:
    """Sorts module groups from the eye to the output: vision.embed, vision.0…, projector, …, decoder.norm, lm_head."""
    part, _, rest = group.partition(".")
    first = _PARTS.index(part) if part in _PARTS else len(_PARTS)
    digits = rest.rsplit(".", 1)[-1]
    middle = (0, 0) if rest == "embed" else (1, int(digits)) if digits.isdigit() else (2, 0)
    return (first, part, middle, rest)
