"""What the views of representations look at: features of checkpoints, made for one report, or features that are there.

Trap: the features lie in a temporary folder that goes when what is returned goes; keep it while they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probes.features import Features
    from vlm4vla_core.episodes.store import EpisodeStore


@dataclass(frozen=True)
class Opened:
    """features: of every source, in order, of the same frames; an untrained network's last. store: of those frames."""

    features: tuple[Features, ...]
    store: EpisodeStore
    place: TemporaryDirectory[str]


def open_all(
    sources: Sequence[Path], data: Path, *, layers: Sequence[str], pool: str, frames: int, seed: int,
    untrained: bool = False,
) -> Opened:  # fmt: skip
    """Features of every source: checkpoints are run over `frames` frames of `data` (0: all), features folders opened.

    untrained: also those of a network of the first source's shape with weights drawn anew, where it is a checkpoint.
    Raises InputError for what is neither, and for features of other frames.
    """
    from probes.verbs.sources import is_features, open_source
    from vlm4vla_core.episodes.store import EpisodeStore

    store, place = EpisodeStore.open(data), TemporaryDirectory(prefix="vlm4vla-features-")
    wanted = [(path, False) for path in dict.fromkeys(sources)]
    if untrained and not is_features(sources[0]):
        wanted.append((sources[0], True))
    found = [
        open_source(
            path, data=data, out=Path(place.name), pool=pool, scratch=anew, layers=tuple(layers), seed=seed,
            max_frames=frames or None,
        )
        for path, anew in wanted
    ]  # fmt: skip
    for other in found[1:]:
        found[0].same_images(other)
    return Opened(tuple(found), store, place)
