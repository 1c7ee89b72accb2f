"""A tiny data set behind the interface of readers: one file per unit, so that processes and kills can be tested."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm4vla_core.actions import BRIDGE, ActionConvention
from vlm4vla_core.episodes.source import Skipped, Unit
from vlm4vla_core.episodes.writer import Episode


@dataclass(frozen=True)
class ToySource:
    folder: Path
    cameras: tuple[str, ...] = ("front", "wrist")
    format: str = "toy"
    name: str = "toy"
    convention: ActionConvention = BRIDGE
    state_names: tuple[str, ...] = BRIDGE.names
    splits: tuple[str, ...] = ("train", "val")
    transforms: tuple[str, ...] = ("none",)
    rendered: bool = False

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        return {"truth": ("a", "b")}

    def units(self, splits: tuple[str, ...]) -> list[Unit]:
        return [
            Unit(path.name, split, (path,), (index,))
            for split in splits
            for index, path in enumerate(sorted(self.folder.glob(f"{split}-*.json")))
        ]

    def episodes(self, unit: Unit, cameras: tuple[str, ...], transform: str) -> Iterator[Episode | Skipped]:
        if (self.folder / f"{unit.name}.deadly").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        told = json.loads(unit.files[0].read_text())
        for place, seed in enumerate(told["seeds"]):
            yield made(seed, cameras, unit.split, f"{unit.name}, {place}", told.get("size", 16))
        for place in range(told.get("silent", 0)):
            yield Skipped("without language", f"{unit.name}, {place}")


def made(seed: int, cameras: tuple[str, ...], split: str, source: str, size: int = 16) -> Episode:
    rng = np.random.default_rng(seed)
    steps = 3 + seed % 4
    return Episode(
        instruction=f"do thing {seed % 3}",
        images={camera: rng.integers(0, 255, (steps, size, size, 3)).astype(np.uint8) for camera in cameras},
        state=rng.normal(size=(steps, 7)),
        action=rng.normal(size=(steps, 7)),
        columns={"truth": rng.normal(size=(steps, 2))},
        split=split,
        source=source,
        info={"domain": "AB"[seed % 2], "seed": str(seed)},
        notes={"pictures drawn anew": 1} if seed % 5 == 0 else {},
    )


def write_toy(folder: Path, train: list[list[int]], val: list[list[int]] = (), **more: int) -> ToySource:  # type: ignore[assignment]
    folder.mkdir(parents=True, exist_ok=True)
    for split, units in (("train", train), ("val", val)):
        for index, seeds in enumerate(units):
            (folder / f"{split}-{index}.json").write_text(json.dumps({"seeds": seeds, **more}))
    return ToySource(folder)
