"""The description of a TensorFlow Datasets folder: splits, files and record counts, keys and shapes.

Trap: the path template of `dataset_info.json` does not always name the files that are there (renamed data keep the old
name in their files), so the usual names are tried before a file counts as missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_INFO_FIX = "give the folder that holds dataset_info.json, or the one above"


@dataclass(frozen=True)
class Description:
    """name: with the version. shards: split -> (file, records) in order. shapes: key -> shape of one step, keys as in
    the records. pictures: the keys that hold encoded images."""

    folder: Path
    name: str
    shards: dict[str, tuple[tuple[Path, int], ...]]
    shapes: dict[str, tuple[int, ...]]
    pictures: tuple[str, ...]


def find_folder(source: Path) -> Path:
    """The TFDS version folder at `source`, one or two levels below it. Raises InputError on none or several."""
    source = Path(source)
    if not source.is_dir():
        raise InputError("no such folder", where=source, fix=_INFO_FIX)
    for pattern in ("dataset_info.json", "*/dataset_info.json", "*/*/dataset_info.json"):
        found = sorted(path.parent for path in source.glob(pattern))
        if len(found) > 1:
            names = ", ".join(str(path.relative_to(source)) for path in found)
            raise InputError(f"several datasets here: {names}", where=source, fix="name one of them")
        if found:
            return found[0]
    raise InputError("no dataset_info.json here nor two levels below", where=source, fix=_INFO_FIX)


def describe(source: Path) -> Description:
    """Read the description of the TFDS folder at or below `source`.

    Raises InputError when a file is missing or damaged, or when the records are no tfrecords.
    """
    folder = find_folder(source)
    info = folders.read_json(folder / "dataset_info.json", fix=_INFO_FIX)
    features = folders.read_json(folder / "features.json", fix="fetch features.json of the dataset too")
    try:
        name = str(info["name"])
        if info.get("fileFormat", "tfrecord") != "tfrecord":
            raise InputError(f"files of format '{info['fileFormat']}', only tfrecord is read", where=folder)
        shards = {str(split["name"]): tuple(_shards(folder, name, split)) for split in info["splits"]}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"not a TFDS description ({type(error).__name__}: {error})"
        raise InputError(what, where=folder / "dataset_info.json", fix="fetch the file again") from None
    if not any(shards.values()):
        raise InputError("the dataset has no splits with files", where=folder / "dataset_info.json")
    shapes: dict[str, tuple[int, ...]] = {}
    pictures: list[str] = []
    try:
        _flatten(features, "", shapes, pictures)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        what = f"not a TFDS feature description ({type(error).__name__}: {error})"
        raise InputError(what, where=folder / "features.json", fix="fetch the file again") from None
    return Description(folder, f"{name} {info.get('version', '')}".strip(), shards, shapes, tuple(pictures))


def _shards(folder: Path, name: str, split: dict[str, Any]) -> Iterator[tuple[Path, int]]:
    """Files and record counts of a split. Raises InputError when a listed file is not there under any usual name."""
    lengths = [int(length) for length in split.get("shardLengths", [])]
    for index, length in enumerate(lengths):
        number, total = f"{index:05d}", f"{len(lengths):05d}"
        values = {"DATASET": name, "SPLIT": split["name"], "FILEFORMAT": "tfrecord", "SHARD_INDEX": number}
        values |= {"NUM_SHARDS": total, "SHARD_X_OF_Y": f"{number}-of-{total}"}
        told = folder / (split.get("filepathTemplate") or TEMPLATE).format(**values)
        named = [path for path in (told, folder / TEMPLATE.format(**values)) if path.is_file()]
        # Renamed data keep the old name in their files; what else of one split and number is there must be the file.
        found = named or list(folder.glob(f"*-{split['name']}.tfrecord-{number}-of-{total}"))
        if len(found) != 1 and not named:
            what = "missing tfrecord file" if not found else f"{len(found)} files could be this tfrecord file"
            raise InputError(what, where=told, fix="fetch it, dataset_info.json lists it")
        yield found[0], length


def _flatten(node: dict[str, Any], key: str, shapes: dict[str, tuple[int, ...]], pictures: list[str]) -> None:
    """Walk features.json: nested names are joined by "/", as in the records."""
    if "featuresDict" in node:
        for name, child in node["featuresDict"]["features"].items():
            _flatten(child, f"{key}/{name}" if key else name, shapes, pictures)
    elif "sequence" in node:
        _flatten(node["sequence"]["feature"], key, shapes, pictures)
    elif "image" in node:
        shapes[key] = tuple(int(size) for size in node["image"]["shape"].get("dimensions", []))
        pictures.append(key)
    elif "text" in node:
        shapes[key] = ()
    elif "tensor" in node:
        shapes[key] = tuple(int(size) for size in node["tensor"]["shape"].get("dimensions", []))
