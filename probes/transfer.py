"""Does what a readout learnt on the base's features still hold on those of A and C?

    found = transfer({"base": layers, "A": layers, "C": layers}, target, episodes, pairs=[("A", "C")])
    found.to_frame(), found.similarity_frame()

A linear readout is fitted and selected on the base's features and tested on each model's, all on the same frames;
beside it stand the readout that each model's own features allow, and the debiased CKA of pairs of models. Trap:
features may hold all that they held and be turned. Then the transferred readout fails, the own one does not, and CKA is
high.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from probes.readout import Readout, compare_probes, read_out, split
from probes.similarity import CkaMatrix, cka_matrix
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Transfer:
    """readouts: (model, layer, "transferred" or "own") -> Readout; for the base both are one. similarity: (model,
    other model, layer) -> CKA of that layer in both."""

    readouts: dict[tuple[str, str, str], Readout]
    similarity: dict[tuple[str, str, str], CkaMatrix]

    def to_frame(self) -> pd.DataFrame:
        """model, layer, readout, score, low, high, shuffled (95 % quantile), change, change_low, change_high: against
        the base's own readout of that layer, paired by test episode."""
        import pandas as pd

        base, rows = next(iter(self.readouts))[0], []
        for (model, layer, kind), found in self.readouts.items():
            low, high = found.interval or (np.nan, np.nan)
            shuffled = float(np.quantile(found.shuffled, 0.95)) if len(found.shuffled) else np.nan
            change = compare_probes(found, self.readouts[base, layer, "transferred"])
            between = change.interval or (np.nan, np.nan)
            rows.append((model, layer, kind, found.mean, low, high, shuffled, change.value, *between))
        columns = ["model", "layer", "readout", "score", "low", "high", "shuffled"]
        return pd.DataFrame(rows, columns=[*columns, "change", "change_low", "change_high"])

    def similarity_frame(self) -> pd.DataFrame:
        """a, b, layer, cka, low, high, floor (95 % of shuffled frames lie below): one row per pair and layer."""
        import pandas as pd

        rows = [
            (a, b, layer, *(float(x[0, 0]) for x in (found.value, found.low, found.high, found.floor)))
            for (a, b, layer), found in self.similarity.items()
        ]
        return pd.DataFrame(rows, columns=["a", "b", "layer", "cka", "low", "high", "floor"])


def transfer(
    models: Mapping[str, Mapping[str, np.ndarray]], target: np.ndarray, episodes: np.ndarray, *,
    pairs: Sequence[tuple[str, str]] = (), content: np.ndarray | None = None, classes: tuple[str, ...] = (),
    metres: bool = False, resamples: int = 200, seed: int = 0,
) -> Transfer:  # fmt: skip
    """Readouts and CKA of several models' features of the same frames.

    models: name -> layer -> (n, d), the base first. target (n, k), or class numbers (n,) with `classes`. episodes (n,):
    the split and all intervals go by episode; content: as of `readout.split`. pairs: of models to compare beside the
    base with each; resamples: of their CKA. Raises InputError for other layers or widths than the base's, and as
    `readout.read_out` and `similarity.cka_matrix`.
    """
    (first, base), *others = models.items()
    parts = split(episodes, content=content, seed=seed)
    readouts = {}
    for model, layers in models.items():
        if list(layers) != list(base):
            fix = "extract the same layers of all"
            raise InputError(f"layers {', '.join(layers)}, the base has {', '.join(base)}", where=model, fix=fix)
        for layer, own in layers.items():
            if own.shape != base[layer].shape:
                what = f"features {own.shape}, the base's are {base[layer].shape}"
                raise InputError(what, where=f"{model} {layer}", fix="extract them from the same frames")
            mixed = base[layer].copy()
            mixed[parts.test] = own[parts.test]  # fitted, scaled and selected on the base, tested on the other
            for kind, features in (("transferred", mixed), ("own", own)):
                if kind == "transferred" or model != first:
                    readouts[model, layer, kind] = read_out(
                        layer, features, target, episodes, parts, classes=classes, metres=metres, seed=seed
                    )
    similarity = {
        (a, b, layer): cka_matrix(
            {layer: models[a][layer]}, {layer: models[b][layer]}, clusters=episodes, resamples=resamples, seed=seed
        )
        for a, b in [*((first, other) for other, _ in others), *pairs]
        for layer in base
    }
    return Transfer(readouts, similarity)
