"""A whole probe of a checkpoint: every layer's readout beside what it must beat, and paired comparisons.

    result = probe(Features.open("…/trained"), store, "gripper_xyz", against=[Features.open("…/untrained")])
    result.to_frame(); result.differences

Beside every readout stand the same readout of the pixels, the labels of other episodes (what it finds where nothing is
to be found), a control task (what it learns by heart) and the mean or the most frequent class. The layer in the
headline is the one that did best on the selection episodes. Trap: a good score alone says little; pixels often do well
too, and so do untrained networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probes.control import control_labels, types_of
from probes.readout import Difference, Parts, Readout, best_layer, compare_probes, read_out, split
from probes.targets import target_of
from vlm4vla_core.errors import InputError, nearest

if TYPE_CHECKING:
    import pandas as pd

    from probes.features import Features
    from vlm4vla_core.episodes.store import EpisodeStore

PIXELS, CELLS = 16, 4  # side of the images that the pixel baseline reads; per side of its tokens
DENSE_ROWS = 40_000  # patches that a dense readout is fitted, selected and tested on


@dataclass(frozen=True)
class Probe:
    """readouts: layer -> readout of the features in question; against: label -> the same of those compared with. kind:
    of the readouts. pool: how tokens were pooled. layer: chosen on selection episodes. pixels, nothing: baselines.
    differences: what is compared -> difference of scores, paired by episode. score: what is counted, R² or accuracy.
    undefined: frames that have no such target. maps: rows of the store, true and predicted maps (m, side, side) of the
    chosen layer on test frames, of dense readouts.
    """

    target: str
    kind: str
    pool: str
    label: str
    layer: str
    readouts: dict[str, Readout]
    against: dict[str, dict[str, Readout]]
    pixels: Readout
    nothing: Readout
    differences: dict[str, Difference]
    score: str
    undefined: int = 0
    maps: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    camera: str = ""

    def to_frame(self) -> pd.DataFrame:
        """One row per readout: target, readout, kind, name, layer, chosen, r2, low, high, error_mm, control,
        selectivity, r2_<dim>…, alpha, selected. r2: R², or accuracy of classes.

        kind: features, against, pixels, shuffled (mean and 95 % range over shuffles), control, mean.
        """
        import pandas as pd

        rows = [self._row("features", self.label, readout) for readout in self.readouts.values()]
        for label, theirs in self.against.items():
            rows += [self._row("against", label, readout) for readout in theirs.values()]
        rows.append(self._row("pixels", self.pixels.name, self.pixels))
        chosen = self.readouts[self.layer]
        if len(chosen.shuffled):
            low, high = np.quantile(chosen.shuffled, [0.025, 0.975])
            shuffled = {"r2": float(chosen.shuffled.mean()), "low": float(low), "high": float(high)}
            rows.append({"kind": "shuffled", "name": "labels of other episodes", "layer": self.layer, **shuffled})
        if chosen.control is not None:
            rows.append({"kind": "control", "name": "control task", "layer": self.layer, "r2": chosen.control})
        rows.append(self._row("mean", "most frequent class" if chosen.classes else "mean predictor", self.nothing))
        frame = pd.DataFrame(rows)
        frame["chosen"] = (frame["layer"] == self.layer) & frame["kind"].isin(["features", "against"])
        frame.insert(0, "target", self.target)
        frame.insert(1, "readout", self.kind)
        return frame

    def _row(self, kind: str, name: str, readout: Readout) -> dict[str, Any]:
        low, high = readout.interval or (np.nan, np.nan)
        none = readout.control is None
        dims = {} if readout.classes else dict(zip(readout.dims, readout.r2, strict=True))
        return {
            "kind": kind, "name": name, "layer": readout.name if kind in ("features", "against") else "",
            "r2": readout.mean, "low": low, "high": high, "error_mm": readout.error_mm,
            "control": np.nan if none else readout.control, "selectivity": np.nan if none else readout.selectivity,
            **{f"r2_{dim}": float(r2) for dim, r2 in dims.items()},
            "alpha": readout.alpha, "selected": readout.selected,
        }  # fmt: skip

    def differences_frame(self) -> pd.DataFrame:
        """One row per comparison: name, value, low, high, detectable."""
        import pandas as pd

        rows = []
        for name, found in self.differences.items():
            low, high = found.interval or (np.nan, np.nan)
            detectable = np.nan if found.detectable is None else found.detectable
            rows.append({"name": name, "value": found.value, "low": low, "high": high, "detectable": detectable})
        return pd.DataFrame(rows, columns=["name", "value", "low", "high", "detectable"])


def changes(result: Probe, reference: str, *, seed: int = 0) -> pd.DataFrame:
    """How every other source's score differs from that of `reference`, layer by layer: target, readout, reference,
    name, layer, value, low, high, paired by episode; `best` marks the row of both sources' own chosen layers, whose
    layer is the source's.

    reference: `result.label` or one of `result.against`. Raises InputError for another name.
    """
    import pandas as pd

    sources = {result.label: result.readouts, **result.against}
    if reference not in sources:
        raise InputError(f"no source '{reference}' in this probe", fix=nearest(reference, sources))
    base, rows = sources[reference], []
    own = best_layer(base)
    for name, readouts in sources.items():
        if name == reference:
            continue
        pairs = [(layer, layer, False) for layer in readouts] + [(best_layer(readouts), own, True)]
        for layer, theirs, best in pairs:
            found = compare_probes(readouts[layer], base[theirs], seed=seed)
            low, high = found.interval or (np.nan, np.nan)
            rows.append((result.target, result.kind, reference, name, layer, found.value, low, high, best))
    names = ["target", "readout", "reference", "name", "layer", "value", "low", "high", "best"]
    return pd.DataFrame(rows, columns=names).astype({"best": bool})  # of none, too


@dataclass(frozen=True)
class _Task:
    """What all readouts of one probe share. places: positions of the features' frames; patches: rows per frame."""

    values: np.ndarray
    classes: tuple[str, ...]
    dims: tuple[str, ...]
    metres: bool
    episodes: np.ndarray
    parts: Parts
    pixels: np.ndarray
    nothing: np.ndarray
    places: np.ndarray
    control: np.ndarray
    patches: int = 1
    undefined: int = 0
    centre: np.ndarray | int = 0  # (patches,), what was taken off the values of each patch


def probe(
    features: Features,
    store: EpisodeStore,
    target_name: str,
    *,
    kind: str = "linear",
    against: Sequence[Features] | Features | None = None,
    seed: int = 0,
) -> Probe:
    """Read `target_name` out of every layer of `features`, and of the same layers of those in `against`.

    kind: linear, mlp, attentive (every token), or dense (depth or segmentation of every patch, from every token).
    Raises InputError for features of another store or of other frames than `against`, for a target the store does
    not record, and as `split` and `read_out`.
    """
    if features.store != store.fingerprint:
        raise InputError(
            "these features were extracted from another episode store",
            where=f"{features.path}, {store.path}",
            fix="give the store that `vlm4vla features` was given",
        )
    others = [] if against is None else [against] if not isinstance(against, Sequence) else list(against)
    for other in others:
        features.same_images(other)
        if missing := sorted(set(features.layers) - set(other.layers)):
            fix = "extract the same --layers of both"
            raise InputError(f"layer {missing[0]} is only in one of the two", where=other.path, fix=fix)
    task = (
        _dense_task(features, store, target_name, seed)
        if kind == "dense"
        else _task(features, store, target_name, kind, seed)
    )

    def read(name: str, x: np.ndarray, shuffles: int | None = 0) -> Readout:
        return read_out(
            name, x, task.values, task.episodes, task.parts, kind="linear" if kind == "dense" else kind, dims=task.dims,
            classes=task.classes, metres=task.metres, control=task.control, shuffles=shuffles, patches=task.patches,
            seed=seed,
        )  # fmt: skip

    def layer_of(one: Features, layer: str) -> np.ndarray:
        x = one.layer(layer)
        if kind == "dense":
            x = x.reshape(-1, x.shape[-1])
        return x[task.places]

    mine = {layer: read(layer, layer_of(features, layer), None) for layer in features.layers}
    labels = _labels(features, others)
    theirs = {
        label: {layer: read(layer, layer_of(other, layer)) for layer in features.layers}
        for label, other in zip(labels[1:], others, strict=True)
    }
    pixels = read(f"pixels {PIXELS} x {PIXELS}" if kind != "dense" else "pixels of the patch", task.pixels)
    nothing = read_out(
        "nothing", task.nothing, task.values, task.episodes, task.parts, dims=task.dims, classes=task.classes,
        metres=task.metres, shuffles=0, patches=task.patches, seed=seed,
    )  # fmt: skip
    layer, name = best_layer(mine), labels[0]
    differences = {f"{name} - pixels, {layer}": compare_probes(mine[layer], pixels, seed=seed)}
    for label, readouts in theirs.items():
        for key, readout in readouts.items():
            differences[f"{name} - {label}, {key}"] = compare_probes(mine[key], readout, seed=seed)
    maps = _maps(features, task, mine[layer]) if kind == "dense" else None
    score = "accuracy" if task.classes else "R²"
    return Probe(
        target_name, kind, features.pool, name, layer, mine, theirs, pixels, nothing, differences, score,
        task.undefined, maps, features.camera,
    )  # fmt: skip


def _labels(features: Features, others: Sequence[Features]) -> list[str]:
    """Names of the sources; of two that are called alike, the later ones are told by their folders."""
    names: list[str] = []
    for one in [features, *others]:
        names.append(one.label if one.label not in names else f"{one.label} ({one.path.name})")
    return names


def _task(features: Features, store: EpisodeStore, name: str, kind: str, seed: int) -> _Task:
    rows = features.index["row"].to_numpy()
    found = target_of(store, name, camera=features.camera, rows=rows)
    places = np.flatnonzero(found.defined[rows])
    if not len(places):
        raise InputError(f"target '{name}' is defined in none of these frames", where=store.path, fix="use more frames")
    rows = rows[places]
    episodes = features.index["episode"].to_numpy()[places]
    parts = split(episodes, content=np.asarray(store.content)[episodes], seed=seed)
    pixels = _pixels(store, features.camera, rows)
    types = types_of(pixels, parts.fit, seed=seed)
    values = found.values[rows]
    control = control_labels(values, types, parts.fit, np.random.default_rng(seed + 1))
    if kind == "attentive":
        step = PIXELS // CELLS
        square = pixels.reshape(-1, CELLS, step, CELLS, step, 3).swapaxes(2, 3)
        pixels = square.reshape(len(pixels), CELLS**2, -1)
    undefined = len(features.index) - len(places)
    nothing = np.zeros((len(rows), 1))
    return _Task(values, found.classes, found.dims, found.metres, episodes, parts, pixels, nothing, places, control,
                 undefined=undefined)  # fmt: skip


def _dense_task(features: Features, store: EpisodeStore, name: str, seed: int) -> _Task:
    from probes.dense import dense_view

    rows, episodes = features.index["row"].to_numpy(), features.index["episode"].to_numpy()
    shapes = {layer: features.layer(layer).shape for layer in features.layers}
    tokens = {shape[1] if len(shape) == 3 else 0 for shape in shapes.values()}
    side = round(max(tokens) ** 0.5)
    if tokens != {side**2}:
        fix = "extract layers of one grid with --pool none, such as vision.0..-1"
        raise InputError("a dense readout needs the tokens of one square grid", where=features.path, fix=fix)
    # Whole frames, as many as the budget allows, spread evenly over the drawn ones.
    keep = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), max(1, DENSE_ROWS // side**2))).round().astype(int))
    rows, episodes = rows[keep], episodes[keep]
    view = dense_view(store, name, features.camera, rows, side)
    frames = split(episodes, content=np.asarray(store.content)[episodes], seed=seed)
    parts = Parts(*((part[:, None] * side**2 + np.arange(side**2)).ravel() for part in frames))
    centre = 0 if view.classes else view.values[frames.fit].mean(0)
    values = view.values - centre
    flat = values.reshape(-1) if view.classes else values.reshape(-1, 1)
    pixels = view.pixels.reshape(len(flat), -1)
    types = types_of(pixels, parts.fit, seed=seed)
    control = control_labels(flat, types, parts.fit, np.random.default_rng(seed + 1))
    places = (keep[:, None] * side**2 + np.arange(side**2)).ravel()
    nothing = np.tile(np.eye(side**2, dtype=np.float32), (len(rows), 1)) if view.classes else np.zeros((len(flat), 1))
    return _Task(flat, view.classes, (name,), False, np.repeat(episodes, side**2), parts, pixels, nothing, places,
                 control, patches=side**2, centre=centre)  # fmt: skip


def _maps(features: Features, task: _Task, readout: Readout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the store, and true and predicted maps (m, side, side), of the test frames."""
    side = round(task.patches**0.5)
    rows = features.index["row"].to_numpy()[task.places[task.parts.test][:: task.patches] // task.patches]
    both = (task.values[task.parts.test], readout.predicted)
    true, told = ((value.reshape(-1, side**2) + task.centre).reshape(-1, side, side) for value in both)
    return rows, true, told


def _pixels(store: EpisodeStore, camera: str, rows: np.ndarray) -> np.ndarray:
    """(n, 3 * 16²) pixel values in [0, 1]."""
    parts = [store.images(camera, rows[start : start + 512], PIXELS) for start in range(0, len(rows), 512)]
    return np.concatenate(parts).reshape(len(rows), -1).astype(np.float32) / 255
