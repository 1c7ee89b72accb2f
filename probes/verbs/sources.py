"""Where a verb may be given a checkpoint or its features: opened, or made first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm4vla_core import checkpoint, folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from probes.features import Features


def is_features(path: Path) -> bool:
    """Whether a folder says of itself that it holds features."""
    manifest = path / folders.MANIFEST
    found = folders.read_json(manifest) if manifest.is_file() else {}
    return isinstance(found, dict) and found.get("format") == "vlm4vla-features"


def open_source(
    path: Path, *, data: Path | None, out: Path | None, pool: str, scratch: bool = False, **options: Any
) -> Features:
    """A features folder as it is; of a checkpoint, run, published folder or hub id its features, made below `out` where
    they are not there yet.

    options: of `probes.verbs.features.Args`. Raises InputError for what is neither, and without `out` or `data`.
    """
    from probes.features import Features
    from probes.verbs import features as verb

    a_model = (path / checkpoint.CONFIG).is_file() or (path / "checkpoints").is_dir() or not path.exists()
    if is_features(path) or not a_model:
        return Features.open(path)  # says what is wrong with a folder that is neither
    if out is None or data is None:
        what = "features of a checkpoint need a place" if path.exists() else "no such folder"
        raise InputError(what, where=path, fix="give --out FOLDER and --data, or a folder made by `vlm4vla features`")
    name = "untrained" if scratch else folders.fingerprint(str(path.resolve() if path.exists() else path))[:8]
    folder = out / "features" / f"{path.name}-{name}-{pool}"
    wanted: Any = {"pool": pool, "scratch": scratch, **options}
    verb.make(verb.Args(path, data, folder, **wanted))
    return Features.open(folder)
