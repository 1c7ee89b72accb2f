"""The data of a run: its stores, split and read; which samples a step sees, and what it sees of them.

Trap: a sample is a place in a store, so a draw names the store and the row; rows alone mean nothing in a mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlm4vla_core.episodes.augment import AUGMENTATIONS, augment
from vlm4vla_core.episodes.mixture import Mixture, mix
from vlm4vla_core.episodes.normalise import cut_share, quantile_normalise
from vlm4vla_core.episodes.sampling import action_chunks, batch_rows
from vlm4vla_core.episodes.store import REMAKE, EpisodeStore
from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.presets import TrainConfig
from vlm4vla_core.vqa.files import QuestionFile, question_files


class Draw(NamedTuple):
    """A batch: which store (B,) and which of its rows (B,); question files are numbered after the stores."""

    which: np.ndarray
    rows: np.ndarray

    def part(self, places: slice) -> Draw:
        return Draw(self.which[places], self.rows[places])

    def __str__(self) -> str:
        several = len(np.unique(self.which)) > 1
        names = [f"{part}:{row}" if several else str(row) for part, row in zip(self.which, self.rows, strict=True)]
        return ", ".join(names[:8]) + (" …" if len(names) > 8 else "")


class Data:
    """The stores of a run, opened, split and read, and question files beside or instead of them.

    Raises InputError on stores that cannot be trained on together, and on question files with another objective than
    language.
    """

    def __init__(self, config: TrainConfig, paths: Sequence[Path]) -> None:
        known = {path: bool(question_files(path)) for path in paths}
        paths = [path for path in paths if config.sources in ("all", "files" if known[path] else "stores")]
        if not paths:
            what = "question files" if config.sources == "files" else "stores"
            raise InputError(f"no {what} among the data", fix="give some to --data, or other sources")
        asked = [known[path] for path in paths]
        stores = [EpisodeStore.open(path) for path, questions in zip(paths, asked, strict=True) if not questions]
        root = Path(config.image_root) if config.image_root else None
        self.files = [QuestionFile.open(path, root) for path, questions in zip(paths, asked, strict=True) if questions]
        if self.files and (set(config.objectives()) != {"language"} or config.cache_features):
            what = "question files are for the language objective alone, without cache_features"
            raise InputError(what, where=self.files[0].path, fix="use --objective language, or --sources stores")
        for store in stores:
            path = store.path
            if len(bad := np.flatnonzero(~np.isfinite(store.action).all(1))):
                what = f"{len(bad)} actions are NaN or infinite, the first in row {bad[0]}"
                raise InputError(what, where=path, fix=REMAKE)
        if config.weights and len(config.weights) != len(paths):
            raise InputError(f"{len(config.weights)} weights for {len(paths)} stores", fix="give one for each")
        self.config, self.paths = config, list(paths)
        order = sorted(range(len(paths)), key=lambda place: asked[place])  # stores before files
        weights = [config.weights[place] for place in order] if config.weights else []
        mixture = mix(stores, weights[: len(stores)] or None, fraction=config.val_fraction)
        if self.files:
            splits = [file.split(config.val_fraction) for file in self.files]
            mixture = replace(
                mixture,
                weights=(*mixture.weights, *(weights[len(stores) :] or (float(len(train)) for train, _ in splits))),
                train=(*mixture.train, *(train for train, _ in splits)),
                val=(*mixture.val, *(val for _, val in splits)),
            )
        self.mixture: Mixture = mixture
        self.stores = self.mixture.stores
        self.cameras = [_camera(config, store) for store in stores]
        self.stats = {} if not stores else stores[0].stats["action"]
        if len(stores) > 1:
            self.stats = self.mixture.action_statistics()
        self.val = self._spread(config.val_rows)
        self.skipped = 0
        self.blank = False  # whether pictures are not looked at, because their image tokens are there (`cached`)

    def _spread(self, wanted: int) -> Draw:
        """Held-out rows, evenly spread over all stores."""
        which = np.repeat(np.arange(len(self.mixture.val)), [len(rows) for rows in self.mixture.val])
        rows = np.concatenate(self.mixture.val)
        return Draw(which, rows).part(np.linspace(0, len(rows) - 1, min(wanted, len(rows))).round().astype(int))  # type: ignore[arg-type]

    def batch(self, step: int) -> Draw:
        """The global batch of a step."""
        config = self.config
        if len(self.mixture.train) > 1:
            return Draw(*self.mixture.batch(config.batch_size, config.seed, step))
        rows = batch_rows(self.mixture.train[0], config.batch_size, config.seed, step)
        return Draw(np.zeros(len(rows), np.int64), rows)

    def images(self, draw: Draw, size: int) -> np.ndarray:
        """uint8 (B, size, size, 3)."""
        if self.blank:
            return np.broadcast_to(np.uint8(0), (len(draw.rows), size, size, 3))
        found = np.empty((len(draw.rows), size, size, 3), np.uint8)
        for part in np.unique(draw.which):
            mine = draw.which == part
            if part < len(self.stores):
                found[mine] = self.stores[part].images(self.cameras[part], draw.rows[mine], size)
            else:
                file = self.files[part - len(self.stores)]
                found[mine] = [file.picture(row, size) for row in draw.rows[mine]]
        return found

    def readable(self, draw: Draw, size: int) -> Draw:
        """`draw`, with what cannot be read replaced by other samples of it. Raises InputError when none can."""
        good, error = [], None
        for place in range(len(draw.rows)):
            try:
                self.images(draw.part(slice(place, place + 1)), size)
                good.append(place)
            except InputError as bad:
                error = bad
        if error and not good:
            raise error
        self.skipped += len(draw.rows) - len(good)
        filler = iter(range(len(draw.rows)))
        chosen = [place if place in good else good[next(filler) % len(good)] for place in range(len(draw.rows))]
        return draw.part(np.array(chosen))  # type: ignore[arg-type]

    def augmented(self, images: np.ndarray, step: int, first: int) -> np.ndarray:
        """Training pictures as the setting changes them; first: place of the first in the global batch."""
        return augment(images, AUGMENTATIONS[self.config.augmentation], self.config.seed, step, first=first)

    def texts(self, draw: Draw) -> list[str]:
        """B instructions."""
        stores = self.stores
        return [
            stores[part].instructions[stores[part].episode_of[row]]
            for part, row in zip(draw.which, draw.rows, strict=True)
        ]

    def turns(self, which: int, row: int) -> list[tuple[str, str]]:
        """Questions and answers of one conversation of a question file."""
        return self.files[which - len(self.stores)].turns(row)

    def actions(self, draw: Draw, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Chunks (B, chunk, A) and mask (B, chunk); see `sampling.action_chunks`."""
        chunks = np.empty((len(draw.rows), chunk, self.stores[0].convention.size), np.float32)
        mask = np.empty(chunks.shape[:2], bool)
        for part in np.unique(draw.which):
            store, mine = self.stores[part], draw.which == part
            chunks[mine], mask[mine] = action_chunks(store.action, store.episode_of, draw.rows[mine], chunk)
        return chunks, mask

    def cut(self) -> dict[str, float]:
        """Share of values of each arm dimension that the normalisation cuts at its bound; empty where it has none."""
        if self.config.normalisation == "quantile" or "action" not in self.config.objectives():
            return {}
        actions = np.concatenate([store.action for store in self.stores])
        if self.config.normalisation == "quantile_clip":
            actions = quantile_normalise(actions, np.array(self.stats["q01"]), np.array(self.stats["q99"]))
        shares = cut_share(actions, self.config.clip_actions)
        return dict(zip(self.stores[0].convention.names, shares.tolist(), strict=False))


def _camera(config: TrainConfig, store: EpisodeStore) -> str:
    camera = config.camera or store.cameras[0]
    if camera not in store.cameras:
        raise InputError(f"the store has no camera '{camera}'", where=store.path, fix=nearest(camera, store.cameras))
    return camera
