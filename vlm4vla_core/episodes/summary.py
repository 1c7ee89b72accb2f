"""What is in an episode store: counts, statistics, what looks wrong, and a sheet of its images.

Trap: statistics describe what is stored, that is the transformed actions. A camera counts as black after a look
at up to `LOOKS` evenly spread images, not at all of them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core import images
from vlm4vla_core.episodes.store import EpisodeStore

if TYPE_CHECKING:
    import pandas as pd

LOOKS = 64
BINS = 40


@dataclass(frozen=True)
class Dimension:
    """One dimension of the action or the state, in its physical unit; outside: share of steps beyond q01…q99.

    histogram: steps in each of `BINS` equally wide bins from min to max.
    """

    kind: str
    name: str
    unit: str
    min: float
    q01: float
    mean: float
    q99: float
    max: float
    outside: float
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class Summary:
    """An episode store in numbers. lengths: shortest, median and longest episode in steps."""

    source: str
    transform: str
    fingerprint: str
    episodes: int
    steps: int
    bytes: int
    lengths: tuple[int, float, int]
    splits: dict[str, int]
    instructions: dict[str, int]
    cameras: dict[str, tuple[int, int]]
    dimensions: tuple[Dimension, ...]
    warnings: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row per dimension: kind, name, unit, min, q01, mean, q99, max, outside."""
        import pandas as pd

        return pd.DataFrame([asdict(dimension) for dimension in self.dimensions]).drop(columns="histogram")


def summarise(store: EpisodeStore) -> Summary:
    """Counts, per-dimension statistics and warnings of a store; most frequent instructions first."""
    units = store.convention.units
    dimensions = [
        *_dimensions("action", store.action, store.convention.names, units, store.stats["action"]),
        *_dimensions("state", store.state, store.state_names, ("",) * len(store.state_names), store.stats["state"]),
    ]
    lengths = store.lengths
    return Summary(
        source=store.manifest["source"],
        transform=store.manifest["transform"],
        fingerprint=store.fingerprint,
        episodes=len(lengths),
        steps=len(store),
        bytes=sum(entry["bytes"] for entry in store.manifest["files"].values()),
        lengths=(int(lengths.min()), float(np.median(lengths)), int(lengths.max())),
        splits=dict(Counter(store.splits)),
        instructions=dict(Counter(store.instructions).most_common()),
        cameras={camera: (size[0], size[1]) for camera, size in store.manifest["cameras"].items()},
        dimensions=tuple(dimensions),
        warnings=tuple(_warnings(store, dimensions)),
    )


def _dimensions(
    kind: str, values: np.ndarray, names: tuple[str, ...], units: tuple[str, ...], stats: dict[str, list[float]]
) -> list[Dimension]:
    low, high = np.array(stats["q01"]), np.array(stats["q99"])
    outside = ((values < low) | (values > high)).mean(axis=0)  # (D,)
    keys = ("min", "q01", "mean", "q99", "max")
    counts = [np.histogram(column.astype(np.float64), BINS)[0].tolist() for column in values.T]
    return [
        Dimension(
            kind,
            name,
            units[index],
            **{key: stats[key][index] for key in keys},
            outside=float(outside[index]),
            histogram=tuple(counts[index]),
        )
        for index, name in enumerate(names)
    ]


def _warnings(store: EpisodeStore, dimensions: list[Dimension]) -> list[str]:
    found = []
    looks = np.unique(np.linspace(0, len(store) - 1, LOOKS).astype(int))
    for camera in store.cameras:
        if store.images(camera, looks).max() <= images.BLACK:
            found.append(f"camera {camera} is black in all of {len(looks)} images looked at")
    for dimension in dimensions:
        if dimension.kind == "action" and dimension.min == dimension.max and dimension.name != "gripper":
            found.append(f"action dimension {dimension.name} is constant ({dimension.min:g})")
    moves = (np.diff(store.action[:, -1]) != 0) & (np.diff(store.episode_of) == 0)
    if not moves.any() and not np.isnan(store.convention.gripper_open):  # NaN: no gripper there, or not known
        found.append("the gripper command never changes within an episode")
    if silent := sum(not text for text in store.instructions):
        found.append(f"{silent} of {len(store.instructions)} episodes have no instruction")
    copies = Counter(store.content)
    if repeated := sum(count - 1 for count in copies.values()):
        found.append(f"{repeated} episodes repeat another one (same actions, states and first images)")
    of = {
        split: {text for text, mine in zip(store.content, store.splits, strict=True) if mine == split}
        for split in set(store.splits)
    }
    if shared := len(set.intersection(*of.values())) if len(of) > 1 else 0:
        found.append(f"{shared} episodes are in {' and in '.join(sorted(of))} alike")
    return found


def contact_sheet(
    store: EpisodeStore, camera: str, *, episodes: int = 4, frames: int = 6, cell: int = 144
) -> np.ndarray:
    """A sheet of images: one row per episode, evenly spread over store and episode, labelled with its instruction.

    cell: pixels per image. Returns uint8 (H, W, 3). Raises InputError on an unknown camera.
    """
    from PIL import Image, ImageDraw, ImageFont

    chosen = _spread(store, episodes)
    label, gap, small = 22, 4, 15
    row_height = label + cell + small + gap
    sheet = Image.new("RGB", (gap + frames * (cell + gap), gap + len(chosen) * row_height), "white")
    draw, font, tiny = ImageDraw.Draw(sheet), ImageFont.load_default(14), ImageFont.load_default(11)
    for place, episode in enumerate(chosen):
        top = gap + place * row_height
        length = int(store.lengths[episode])
        steps = np.linspace(0, length - 1, min(frames, length)).round().astype(int)
        text = _fitting(f"{episode}: {store.instructions[episode] or '(no instruction)'}", draw, font, sheet.width)
        draw.text((gap, top + 1), text, fill="black", font=font)
        pictures = images.resize(store.images(camera, store.starts[episode] + steps), cell)
        for column, (step, picture) in enumerate(zip(steps, pictures, strict=True)):
            left = gap + column * (cell + gap)
            sheet.paste(Image.fromarray(picture), (left, top + label))
            note = f"step {step}" if column else f"{camera}, step {step}"
            draw.text((left, top + label + cell), note, fill="dimgray", font=tiny)
    return np.asarray(sheet)


def _spread(store: EpisodeStore, wanted: int) -> list[int]:
    """Episodes for the sheet: the first of each instruction, then evenly spread ones, in store order."""
    first: dict[str, int] = {}
    for episode, instruction in enumerate(store.instructions):
        first.setdefault(instruction, episode)
    distinct = list(first.values())
    if len(distinct) >= wanted:
        return [distinct[index] for index in np.linspace(0, len(distinct) - 1, wanted).round().astype(int)]
    rest = [episode for episode in range(len(store.lengths)) if episode not in set(distinct)]
    more = min(wanted - len(distinct), len(rest))
    return sorted(distinct + [rest[index] for index in np.linspace(0, len(rest) - 1, more).round().astype(int)])


def _fitting(text: str, draw: Any, font: Any, width: int) -> str:
    """The text, cut with an ellipsis where it would not fit into `width` pixels."""
    if draw.textlength(text, font=font) <= width - 8:
        return text
    while text and draw.textlength(text + "…", font=font) > width - 8:
        text = text[:-1]
    return text + "…"
