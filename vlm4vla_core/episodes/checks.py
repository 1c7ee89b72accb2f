"""What every reader checks alike: what is asked for, numbers and lengths, and which cameras show nothing.

Trap: a camera may be black in some episodes only (it was unplugged for a while), so `black_cameras` looks at episodes
from all over the data; what it calls black was black in those, and the caller says in how many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core import images
from vlm4vla_core.episodes.source import Skipped, Source
from vlm4vla_core.errors import InputError, nearest

if TYPE_CHECKING:
    from vlm4vla_core.episodes.writer import Episode


def choose_splits(source: Source, wanted: Iterable[str] = ()) -> tuple[str, ...]:
    """The splits to read, train first: the wanted ones, or by default train and val, as far as there are any.

    Raises InputError on an unknown split, or when there is neither train nor val to take by default.
    """
    wanted = tuple(dict.fromkeys(wanted)) or tuple(name for name in ("train", "val") if name in source.splits)
    check_splits(source, wanted)
    if not wanted:
        fix = f"choose with --split among: {', '.join(source.splits)}"
        raise InputError("no split named train or val", where=source.folder, fix=fix)
    return tuple(sorted(wanted, key=lambda name: name != "train"))


def check_splits(source: Source, wanted: Iterable[str]) -> None:
    for name in wanted:
        if name not in source.splits:
            raise InputError(f"no split '{name}'", where=source.folder, fix=nearest(name, source.splits))


def check_request(source: Source, cameras: Iterable[str], transform: str) -> None:
    """Raises InputError when the data has no such camera, or when the transform does not belong to it."""
    for camera in cameras:
        if camera not in source.cameras:
            fix = nearest(camera, source.cameras)
            raise InputError(f"no camera '{camera}' in the data", where=source.folder, fix=fix)
    if transform not in source.transforms:
        what = f"transform '{transform}' does not belong to this {source.format} data"
        raise InputError(what, where=source.folder, fix=nearest(transform, source.transforms))


def numbers(value: Any, names: Sequence[str], what: str, where: str, *, finite: bool = True) -> np.ndarray:
    """`value` as float32 (T, len(names)). Raises InputError naming the shape, or step and dimension of what is not
    finite."""
    with np.errstate(over="ignore"):  # a float64 too large becomes infinite and is refused by name below
        rows = np.ascontiguousarray(value, np.float32)
    if rows.ndim != 2 or rows.shape[1] != len(names) or not names:
        expected = f"(T, {len(names)}) for {', '.join(names) or 'no names'}"
        raise InputError(f"'{what}' has shape {rows.shape}, expected {expected}", where=where)
    if finite and not np.isfinite(rows).all():
        step, index = np.argwhere(~np.isfinite(rows))[0]
        kind = "NaN" if np.isnan(rows[step, index]) else "infinite"
        what = f"'{what}' is {kind} in dimension {index} ({names[index]})"
        raise InputError(what, where=f"{where}, step {step}", fix="repair or drop the episode")
    return rows


def same_length(parts: Mapping[str, Any], where: str) -> int:
    """The common length of these features. Raises InputError listing them when it differs."""
    lengths = {name: len(part) for name, part in parts.items()}
    if len(set(lengths.values())) > 1:
        listing = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InputError(f"features of unequal length: {listing}", where=where, fix="drop the episode")
    return next(iter(lengths.values()))


def reason(error: Exception) -> str:
    """The first line of another library's error, or the name of its kind."""
    return next(iter(str(error).strip("\"' ").splitlines()), "") or type(error).__name__


def black_cameras(source: Source, splits: Iterable[str], cameras: Iterable[str], episodes: int = 8) -> tuple[str, ...]:
    """Those of the cameras that are black throughout `episodes` episodes, spread evenly over the units of these splits.

    Looks only until every camera has shown something; none when no episode is kept. Raises InputError when all are
    black, and as the reader does.
    """
    unseen, found = list(dict.fromkeys(cameras)), False
    for episode in glance(source, tuple(splits), tuple(unseen), source.transforms[0], episodes):
        unseen, found = [camera for camera in unseen if not _shows(episode, camera)], True
        if not unseen:
            return ()
    if not found:  # no episode that is kept: nothing is known
        return ()
    if set(unseen) == set(cameras):
        raise InputError(f"nothing but black images from {', '.join(unseen)}", where=source.folder)
    return tuple(unseen)


def glance(
    source: Source,
    splits: tuple[str, ...],
    cameras: tuple[str, ...],
    transform: str,
    limit: int,
    left_out: Counter[str] | None = None,
) -> Iterator[Episode]:
    """Up to `limit` episodes of a source: the first of evenly spread units, with few units more of each.

    left_out: the reasons of skipped episodes are counted there.
    """
    units = source.units(splits)
    chosen = np.unique(np.linspace(0, len(units) - 1, min(limit, len(units))).round().astype(int))
    for place, index in enumerate(chosen):
        wanted = limit // len(chosen) + (place < limit % len(chosen))
        for one in source.episodes(units[index], cameras, transform):
            if isinstance(one, Skipped):
                if left_out is not None:
                    left_out[one.reason] += 1
                continue
            yield one
            wanted -= 1
            if not wanted:
                break


def _shows(episode: Episode, camera: str) -> bool:
    black: set[bytes] = set()  # black images of one source are equal bytes: look at each kind once
    for step, frame in enumerate(episode.images[camera]):
        if isinstance(frame, bytes):
            if frame in black:
                continue
            black.add(frame)
            try:
                frame = images.decode(frame)
            except ValueError as error:
                what = f"image of camera '{camera}' cannot be read ({error})"
                raise InputError(what, where=f"{episode.source}, step {step}") from None
        if frame.max() > images.BLACK:
            return True
    return False
