"""A folder of pictures in the place of an episode store, for features of images that belong to no robot.

Every picture counts as an episode of one step. Trap: a fingerprint by names would not notice a picture that was
replaced, so every file is read once and hashed.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core import folders, images
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from vlm4vla_core.episodes.store import EpisodeStore

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
CAMERA = "picture"
_MISSING = "give an episode store, or a folder of .jpg or .png files"


class ImageFolder:
    """Pictures (.jpg, .png, .webp, .bmp) below a folder, in order of their names. `len(folder)` counts them."""

    cameras = (CAMERA,)

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not self.files:
            raise InputError("neither an episode store nor a folder of pictures", where=path, fix=_MISSING)
        self.names = [file.relative_to(path).as_posix() for file in self.files]
        self.manifest: dict[str, Any] = {"source": "pictures"}
        self.instructions: list[str] = []
        self.splits = [""] * len(self.files)

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def fingerprint(self) -> str:
        """Names the pictures and their content."""
        return folders.fingerprint(
            [[n, folders.file_fingerprint(f)] for n, f in zip(self.names, self.files, strict=True)]
        )

    @property
    def episode_of(self) -> np.ndarray:
        """(N,) its own number: no picture shares an episode with another."""
        return np.arange(len(self))

    @property
    def step_of(self) -> np.ndarray:
        """(N,) zeros."""
        return np.zeros(len(self), np.int64)

    def images(self, camera: str, rows: Iterable[int] | np.ndarray, size: int | None = None) -> np.ndarray:
        """Pictures as uint8 (len(rows), size, size, 3). Raises InputError on a file that is no picture."""
        out = []
        for row in rows:
            try:
                picture = images.decode(self.files[row].read_bytes())
                out.append(images.resize(picture[None], size)[0] if size else picture)
            except ValueError as error:
                raise InputError(f"damaged picture ({error})", where=self.files[row], fix="remove it") from None
        if len({picture.shape for picture in out}) > 1:
            raise ValueError("pictures of several sizes need a common one")
        return np.stack(out)


def open_data(path: Path | str) -> EpisodeStore | ImageFolder:
    """An episode store, or else the pictures of a folder. Raises InputError when it is neither."""
    path = Path(path)
    if (path / folders.STORE_MANIFEST).is_file() or not path.is_dir() or any(path.glob("*.arrow")):
        from vlm4vla_core.episodes.store import EpisodeStore

        return EpisodeStore.open(path)
    return ImageFolder(path)
