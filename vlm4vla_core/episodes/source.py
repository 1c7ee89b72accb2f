"""What every reader of robot data gives: a `Source`, cut into units of work that any process can read on its own.

A unit is a file, or a run of episodes, small enough to be converted again after a kill and large enough to be worth a
process. Units come in a fixed order and each yields its episodes in a fixed order, so a store has the same bytes
however many workers wrote it.

Trap: a source travels to worker processes, so it holds paths and numbers only; files, HDF5 handles and video containers
are opened inside `episodes`, never kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vlm4vla_core.actions import ActionConvention
    from vlm4vla_core.episodes.writer import Episode


@dataclass(frozen=True)
class Unit:
    """Work that one process reads in order. name: stable and unique. split: "train" or "val". files: everything its
    content depends on, to be iterated more than once. key: the reader's own way to find it (an index, a range)."""

    name: str
    split: str
    files: Iterable[Path]
    key: tuple[int | str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """An episode that was left out on purpose, counted in the store's account under `reason`; where: file and
    record."""

    reason: str
    where: str


class Source(Protocol):
    """An opened data set of one format; frozen and picklable.

    cameras: as the store will name them. sizes: camera -> (height, width) of its images, as far as they are declared.
    transforms: names that apply to this data, the default first. rendered: pictures of a simulator, which keep their
    colour at full resolution (4:4:4). columns: further declared columns -> the names within each.
    """

    @property
    def format(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def folder(self) -> Path: ...
    @property
    def convention(self) -> ActionConvention: ...
    @property
    def state_names(self) -> tuple[str, ...]: ...
    @property
    def cameras(self) -> tuple[str, ...]: ...
    @property
    def sizes(self) -> dict[str, tuple[int, int]]: ...
    @property
    def splits(self) -> tuple[str, ...]: ...
    @property
    def transforms(self) -> tuple[str, ...]: ...
    @property
    def rendered(self) -> bool: ...
    @property
    def columns(self) -> dict[str, tuple[str, ...]]: ...

    def units(self, splits: tuple[str, ...]) -> list[Unit]:
        """All work of these splits, in the order of the store. Raises InputError on an unknown split."""
        ...

    def episodes(self, unit: Unit, cameras: tuple[str, ...], transform: str) -> Iterator[Episode | Skipped]:
        """The unit's episodes with exactly these cameras, actions transformed. Raises InputError naming file and record
        on anything damaged; nothing is left out silently."""
        ...
