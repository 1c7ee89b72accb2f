"""Does what a readout learnt on the base's features still hold on those of A and C?

    transfer({"base": layers, "A": layers, "C": layers}, target, episodes).to_frame()

A linear readout is fitted and selected on the base's features and tested on each model's, all on the same frames;
beside it stand the readout that each model's own features allow, and the debiased CKA with the base. Trap: features may
hold all that they held and be turned. Then the transferred readout fails, the own one does not, and CKA is high.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from probes.readout import Readout, read_out, split
from probes.similarity import CkaMatrix, cka_matrix
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Transfer:
    """readouts: (model, layer, "transferred" or "own") -> Readout; for the base both are one. similarity: (model,
    layer) -> CKA with the base's same layer."""

    readouts: dict[tuple[str, str, str], Readout]
    similarity: dict[tuple[str, str], CkaMatrix]

    def to_frame(self) -> pd.DataFrame:
        """model, layer, readout, score, low, high, shuffled (95 % quantile), cka, cka_low, cka_high, cka_floor."""
        import pandas as pd

        rows = []
        for (model, layer, kind), found in self.readouts.items():
            low, high = found.interval or (np.nan, np.nan)
            shuffled = float(np.quantile(found.shuffled, 0.95)) if len(found.shuffled) else np.nan
            alike = self.similarity[model, layer]
            values = (float(x[0, 0]) for x in (alike.value, alike.low, alike.high, alike.floor))
            rows.append((model, layer, kind, found.mean, low, high, shuffled, *values))
        columns = ["model", "layer", "readout", "score", "low", "high", "shuffled"]
        return pd.DataFrame(rows, columns=[*columns, "cka", "cka_low", "cka_high", "cka_floor"])


def transfer(
    models: Mapping[str, Mapping[str, np.ndarray]], target: np.ndarray, episodes: np.ndarray, *,
    classes: tuple[str, ...] = (), metres: bool = False, seed: int = 0,
) -> Transfer:  # fmt: skip
    """Readouts and CKA of several models' features of the same frames.

    models: name -> layer -> (n, d), the base first. target (n, k), or class numbers (n,) with `classes`. episodes (n,):
    the split and all intervals go by episode. Raises InputError for other layers or widths than the base's, and as
    `readout.read_out` and `similarity.cka_matrix`.
    """
    (first, base), *_ = models.items()
    parts = split(episodes, seed=seed)
    readouts, similarity = {}, {}
    for model, layers in models.items():
        if list(layers) != list(base):
            fix = "extract the same layers of all"
            raise InputError(f"layers {', '.join(layers)}, the base has {', '.join(base)}", where=model, fix=fix)
        for layer, own in layers.items():
            if own.shape != base[layer].shape:
                what = f"features {own.shape}, the base's are {base[layer].shape}"
                raise InputError(what, where=f"{model} {layer}", fix="extract them from the same frames")
            similarity[model, layer] = cka_matrix({layer: base[layer]}, {layer: own}, clusters=episodes, seed=seed)
            mixed = base[layer].copy()
            mixed[parts.test] = own[parts.test]  # fitted, scaled and selected on the base, tested on the other
            for kind, features in (("transferred", mixed), ("own", own)):
                if kind == "transferred" or model != first:
                    readouts[model, layer, kind] = read_out(
                        layer, features, target, episodes, parts, classes=classes, metres=metres, seed=seed
                    )
    return Transfer(readouts, similarity)
