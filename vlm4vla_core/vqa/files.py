"""Question files as training data: RoboPoint, Robo2VLM and their like beside, or instead of, episode stores.

A sample is a conversation: all of its answers are learnt, in the order in which they were given. Several pictures of
one conversation are narrowed and stand side by side in one, since a backbone here takes one picture.

Trap: the identity of a run holds the files' content, not that of the pictures that they name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from vlm4vla_core import folders, images
from vlm4vla_core.errors import InputError
from vlm4vla_core.vqa.data import ChoiceData, LlavaData, VQAData

KINDS = (".json", ".jsonl", ".parquet")


def question_files(path: Path) -> list[Path]:
    """The question files that `path` is, or holds; none of an episode store and of what is something else."""
    path = Path(path)
    if path.is_file():
        return [path] if path.suffix in KINDS else []
    if not path.is_dir() or any((path / name).exists() for name in (folders.STORE_MANIFEST, folders.MANIFEST)):
        return []
    found = sorted(file for file in path.iterdir() if file.suffix in KINDS)
    return [file for file in found if file.suffix == ".parquet"] or found  # metadata may lie beside parquet


def fingerprint(path: Path) -> str:
    """Of the content of the question files at `path`."""
    return folders.fingerprint({file.name: folders.file_fingerprint(file) for file in question_files(path)})


@dataclass(frozen=True)
class QuestionFile:
    """The conversations of a question file. data: its rows, one per question."""

    path: Path
    data: VQAData

    @classmethod
    def open(cls, path: Path, image_root: Path | None = None) -> QuestionFile:
        """A JSON or JSONL file of conversations, or parquet files of choices, or a folder of either. image_root: where
        the pictures lie; beside the file by default. Raises InputError on what is malformed, and on several JSON files.
        """
        found = question_files(path)
        if found[0].suffix == ".parquet":
            return cls(path, ChoiceData(path))
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:4])
            raise InputError(f"{len(found)} question files ({names})", where=path, fix="give the file to train on")
        return cls(path, LlavaData(found[0], image_root or found[0].parent))

    @cached_property
    def _last(self) -> np.ndarray:
        """(n,) the row of the last question of each conversation."""
        before = self.data.before if isinstance(self.data, LlavaData) else np.arange(len(self.data))
        return np.append(before[1:], len(self.data)) - 1

    def __len__(self) -> int:
        return len(self._last)

    def turns(self, number: int) -> list[tuple[str, str]]:
        """Questions and answers of one conversation."""
        row = self.data[int(self._last[number])]
        return [*row.history, (row.question, row.answer)]

    def picture(self, number: int, size: int) -> np.ndarray:
        """uint8 (size, size, 3). Raises InputError on a picture that is missing, damaged or not there at all."""
        row = self.data[int(self._last[number])]
        shown = row.images(size)
        if not shown:
            raise InputError("a question without a picture", where=row.source, fix="remove it, or --skip-corrupt True")
        return shown[0] if len(shown) == 1 else images.resize(np.concatenate(shown, 1)[None], size)[0]

    def split(self, fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Conversations to train and to validate on, as `sampling.split_episodes` with episodes."""
        held_out = min(max(1, round(fraction * len(self))), len(self) - 1) if fraction > 0 else 0
        order = np.random.default_rng(seed).permutation(len(self))
        return np.sort(order[held_out:]), np.sort(order[:held_out])
