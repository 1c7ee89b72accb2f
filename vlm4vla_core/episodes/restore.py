"""Episode stores as sources: to encode anew, resize, choose cameras, or join several stores of one convention.

`open_store` takes one store, or a folder of stores, which are joined: the same cameras, columns, state and action
convention, or a refusal that says where they differ.
Traps: images of a JPEG store were compressed once; they are copied unchanged while the size stays, and compressed a
second time when it changes. The actions were transformed once and are not again: a store's one transform is the name
of what was done.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm4vla_core.actions import ActionConvention
from vlm4vla_core.episodes.checks import check_request, check_splits
from vlm4vla_core.episodes.source import Unit
from vlm4vla_core.episodes.store import EpisodeStore
from vlm4vla_core.episodes.writer import MANIFEST, Episode
from vlm4vla_core.errors import InputError

STEPS_PER_UNIT = 4096
_OWN = ("episode", "start", "length", "instruction", "split", "source", "content")  # columns that no reader declares


@dataclass(frozen=True)
class StoreSource:
    """Opened stores: a `Source` whose units are runs of episodes of one split.

    stores: their folders, in order. lengths: per store the (split, steps) of each episode.
    """

    folder: Path
    name: str
    stores: tuple[Path, ...]
    lengths: tuple[tuple[tuple[str, int], ...], ...]
    convention: ActionConvention
    state_names: tuple[str, ...]
    sizes: dict[str, tuple[int, int]]
    columns: dict[str, tuple[str, ...]]
    transforms: tuple[str, ...]
    rendered: bool
    format: str = "store"

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    @property
    def splits(self) -> tuple[str, ...]:
        found = {split for episodes in self.lengths for split, _ in episodes}
        return tuple(split for split in ("train", "val") if split in found)

    def units(self, splits: tuple[str, ...]) -> list[Unit]:
        """Runs of about `STEPS_PER_UNIT` steps. Raises InputError on an unknown split."""
        check_splits(self, splits)
        units = []
        for split in splits:
            for index, (path, episodes) in enumerate(zip(self.stores, self.lengths, strict=True)):
                held: list[int] = []
                mine = [number for number, (name, _) in enumerate(episodes) if name == split]
                for number in mine:
                    held.append(number)
                    if number == mine[-1] or sum(episodes[i][1] for i in held) >= STEPS_PER_UNIT:
                        name = f"{path.name}-{index}-{split}-{held[0]:06d}"
                        # The manifest holds every file's fingerprint.
                        units.append(Unit(name, split, (path / MANIFEST,), (index, *held)))
                        held = []
        return units

    def episodes(self, unit: Unit, cameras: tuple[str, ...], transform: str) -> Iterator[Episode]:
        """The unit's episodes as they were stored; JPEG bytes unchanged. Raises InputError on a damaged store."""
        check_request(self, cameras, transform)
        store = EpisodeStore.open(self.stores[int(unit.key[0])])
        columns = {name: store.column(name) for name in self.columns}
        layers = {layer: store.manifest.get(layer, {}) for layer in ("depth", "segmentation")}
        for number in map(int, unit.key[1:]):
            start = int(store.starts[number])
            rows = range(start, start + int(store.lengths[number]))
            told = store.episodes.iloc[number]
            yield Episode(
                instruction=told["instruction"],
                images={
                    camera: store.images(camera, rows) if store.raw else [store.jpeg(camera, row) for row in rows]
                    for camera in cameras
                },
                state=store.state[rows.start : rows.stop],
                action=store.action[rows.start : rows.stop],
                columns={name: values[rows.start : rows.stop] for name, values in columns.items()},
                split=unit.split,
                source=told["source"],
                info={key: str(value) for key, value in told.items() if key not in _OWN},
                depth={camera: store.depth(camera, rows) for camera in layers["depth"] if camera in cameras},
                depth_unit=next((float(about["unit"]) for about in layers["depth"].values()), 0.001),
                segmentation={c: store.segmentation(c, rows) for c in layers["segmentation"] if c in cameras},
            )


def open_store(source: Path) -> StoreSource:
    """Open a store, or every store in a folder, joined in the order of their names.

    Raises InputError when there is none, when one is damaged, and when they differ in anything but their episodes.
    """
    source = Path(source)
    paths = [source] if (source / MANIFEST).is_file() else sorted(path.parent for path in source.glob(f"*/{MANIFEST}"))
    if not paths:
        EpisodeStore.open(source)  # says what is wrong with it
        raise InputError("no episode store here", where=source)
    stores = [EpisodeStore.open(path) for path in paths]
    first = _declared(stores[0])
    for store in stores[1:]:
        for key, value in _declared(store).items():
            if value != first[key]:
                told = f"{key} {value} against {first[key]}"
                if isinstance(value, ActionConvention):
                    told = f"another action convention: {', '.join(value.differences(first[key]))}"
                raise InputError(f"stores that cannot be joined: {told}", where=store.path, fix="convert them apart")
    return StoreSource(
        source,
        ", ".join(dict.fromkeys(str(store.manifest.get("source", store.path.name)) for store in stores)),
        tuple(paths),
        tuple(tuple(zip(store.splits, map(int, store.lengths), strict=True)) for store in stores),
        **first,
        rendered=stores[0].manifest.get("images", {}).get("colour") == "444",
    )


def _declared(store: EpisodeStore) -> dict[str, Any]:
    return {
        "convention": store.convention,
        "state_names": store.state_names,
        "sizes": {camera: (int(height), int(width)) for camera, (height, width) in store.manifest["cameras"].items()},
        "columns": {name: tuple(names) for name, names in store.manifest["columns"].items()},
        "transforms": (str(store.manifest.get("transform", "none")),),
    }
