"""A whole probe of a checkpoint: every layer's readout beside what it must beat, and paired comparisons.

    result = probe(Features.open("…/trained"), store, "gripper_xyz", against=Features.open("…/untrained"))
    result.to_frame(); result.differences

Beside every readout stand the pixels (ridge on the images at 16 x 16), the labels of other episodes (what ridge finds
where nothing is to be found) and the mean predictor (0 by definition). The layer in the headline is the one that did
best on the selection episodes. Trap: a good R² alone says little; pixels often do well too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probes.readout import Difference, Readout, best_layer, compare, read_out, split, target
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from probes.features import Features
    from vlm4vla_core.episodes.store import EpisodeStore

PIXELS = 16  # side of the images that the pixel baseline reads


@dataclass(frozen=True)
class Probe:
    """readouts, against: layer -> readout of the features and of those compared with. pool: how their tokens were
    pooled, mean or grid. layer: chosen on selection episodes. pixels, nothing: baselines. differences: what is
    compared -> R² difference, paired by episode.
    """

    target: str
    pool: str
    label: str
    against_label: str
    layer: str
    readouts: dict[str, Readout]
    against: dict[str, Readout]
    pixels: Readout
    nothing: Readout
    differences: dict[str, Difference]

    def to_frame(self) -> pd.DataFrame:
        """One row per readout: kind, name, layer, chosen, r2, low, high, error_mm, r2_<dim>…, alpha, selected.

        kind: features, against, pixels, shuffled (mean and 95 % range over shuffles), mean.
        """
        import pandas as pd

        rows = [self._row("features", self.label, readout) for readout in self.readouts.values()]
        rows += [self._row("against", self.against_label, readout) for readout in self.against.values()]
        rows.append(self._row("pixels", f"pixels {PIXELS} x {PIXELS}", self.pixels))
        chosen = self.readouts[self.layer]
        if len(chosen.shuffled):
            low, high = np.quantile(chosen.shuffled, [0.025, 0.975])
            shuffled = {"r2": float(chosen.shuffled.mean()), "low": float(low), "high": float(high)}
            rows.append({"kind": "shuffled", "name": "labels of other episodes", "layer": self.layer, **shuffled})
        rows.append(self._row("mean", "mean predictor", self.nothing))
        frame = pd.DataFrame(rows)
        frame["chosen"] = (frame["layer"] == self.layer) & frame["kind"].isin(["features", "against"])
        return frame

    def _row(self, kind: str, name: str, readout: Readout) -> dict[str, Any]:
        low, high = readout.interval or (np.nan, np.nan)
        layer = readout.name if kind in ("features", "against") else ""
        return {
            "kind": kind, "name": name, "layer": layer, "r2": readout.mean, "low": low, "high": high,
            "error_mm": readout.error_mm,
            **{f"r2_{dim}": float(r2) for dim, r2 in zip(readout.dims, readout.r2, strict=True)},
            "alpha": readout.alpha, "selected": readout.selected,
        }  # fmt: skip


def probe(
    features: Features, store: EpisodeStore, target_name: str, *, against: Features | None = None, seed: int = 0
) -> Probe:
    """Read `target_name` out of every layer of `features` (pooled), and of the same layers of `against`.

    Raises InputError for features of another store or of other frames than `against`, for a target the store does
    not record, and as `split` and `read_out`.
    """
    if features.store != store.fingerprint:
        raise InputError(
            "these features were extracted from another episode store",
            where=f"{features.path}, {store.path}",
            fix="give the store that `vlm4vla features` was given",
        )
    if against is not None:
        features.same_images(against)
        if missing := sorted(set(features.layers) - set(against.layers)):
            fix = "extract the same --layers of both"
            raise InputError(f"layer {missing[0]} is only in one of the two", where=against.path, fix=fix)
    dims, values = target(store, target_name)
    rows = features.index["row"].to_numpy()
    episodes = features.index["episode"].to_numpy()
    parts = split(episodes, content=np.asarray(store.content)[episodes], seed=seed)

    def read(name: str, x: np.ndarray, shuffles: int = 0) -> Readout:
        return read_out(name, x, values[rows], episodes, parts, dims=dims, shuffles=shuffles, seed=seed)

    mine = {layer: read(layer, features.layer(layer), shuffles=20) for layer in features.layers}
    theirs = {} if against is None else {layer: read(layer, against.layer(layer)) for layer in features.layers}
    pixels = read(f"pixels {PIXELS} x {PIXELS}", _pixels(store, features.camera, rows))
    nothing = read("mean predictor", np.zeros((len(rows), 1)))
    layer = best_layer(mine)
    name = features.label
    differences = {f"{name} - pixels, {layer}": compare(mine[layer], pixels, seed=seed)}
    if against is not None:
        for key, readout in theirs.items():
            differences[f"{name} - {against.label}, {key}"] = compare(mine[key], readout, seed=seed)
    other = against.label if against else ""
    return Probe(target_name, features.pool, name, other, layer, mine, theirs, pixels, nothing, differences)


def _pixels(store: EpisodeStore, camera: str, rows: np.ndarray) -> np.ndarray:
    """(n, 3 * 16²) pixel values in [0, 1]."""
    parts = [store.images(camera, rows[start : start + 512], PIXELS) for start in range(0, len(rows), 512)]
    return np.concatenate(parts).reshape(len(rows), -1).astype(np.float32) / 255
