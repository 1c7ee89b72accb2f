"""The formats of robot data that can be read, and which one a path holds.

Trap: several formats use the same file endings, so a format is told by its landmark files alone, never by guessing
from what is inside them.
"""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from vlm4vla_core.episodes.source import Source
from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.folders import STORE_MANIFEST

# format -> (module and function that open it, what tells it: any of these patterns at or below the path)
FORMATS: dict[str, tuple[str, tuple[str, ...]]] = {
    "store": ("restore:open_store", (STORE_MANIFEST,)),
    "lerobot": ("lerobot:open_lerobot", ("meta/info.json",)),
    "rlds": ("rlds:open_rlds", ("dataset_info.json", "*/dataset_info.json", "*/*/dataset_info.json")),
    "calvin": ("calvin:open_calvin", ("training/episode_*.npz", "validation/episode_*.npz", "episode_*.npz")),
    "libero": ("libero:open_libero", ("*.hdf5", "*/*.hdf5")),
}


def open_source(format: str, path: Path | str, **options: Any) -> Source:
    """Open `path` as data of this format; options are those of the reader's own `open_…`.

    Raises InputError on an unknown format or option, and when the path holds nothing of the kind.
    """
    if format not in FORMATS:
        raise InputError(f"unknown format '{format}'", fix=nearest(format, FORMATS))
    module, _, name = FORMATS[format][0].partition(":")
    function = getattr(import_module(f"vlm4vla_core.episodes.{module}"), name)
    known = list(signature(function).parameters)[1:]
    for option in options:
        if option not in known:
            raise InputError(f"{format} data have no option '{option}'", fix=nearest(option, known))
    opened: Source = function(Path(path), **options)
    return opened


def detect(path: Path | str) -> str:
    """The format of the data at `path`. Raises InputError when there is none, naming what is looked for."""
    path = Path(path)
    if path.is_file() and path.suffix in (".hdf5", ".h5"):
        return "libero"
    if not path.is_dir():
        raise InputError("this is a file, not a folder of data" if path.exists() else "no such folder", where=path)
    for name, (_, patterns) in FORMATS.items():
        if any(next(path.glob(pattern), None) for pattern in patterns):
            return name
    marks = "; ".join(f"{name}: {patterns[0]}" for name, (_, patterns) in FORMATS.items())
    raise InputError("no known format of robot data", where=path, fix=f"it would hold one of {marks}")
