"""The view of `representation_similarity`: CKA of all pairs of layers, other measures beside it, the sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from probes.numbers import plain
from probes.report.views.origins import data_badges, model_badges

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probes.report.params import RepresentationSimilarityParams
    from probes.report.views.opened import Opened


@dataclass(frozen=True)
class Alike:
    """rows: `CkaMatrix.to_frame()`, with the ceiling of each layer of A where there is a twin: ceiling, ceiling_low,
    ceiling_high. other: `alignments`. neighbours: of them. n, episodes: frames, and of how many episodes. a, b, twin:
    names of the sources."""

    rows: pd.DataFrame
    other: pd.DataFrame
    neighbours: int
    n: int
    episodes: int
    a: str
    b: str
    twin: str

    def same(self) -> pd.DataFrame:
        """The rows that compare a layer with itself; all, where the two share no layer."""
        same = self.rows[self.rows["layer_a"] == self.rows["layer_b"]]
        return same if len(same) else self.rows


def open_inputs(params: RepresentationSimilarityParams) -> Opened:
    """Features of the checkpoint, the reference and the twin, of the same frames, or an InputError."""
    from probes.report.views.opened import open_all
    from vlm4vla_core.errors import InputError

    if len(params.twin) > 1:
        raise InputError(f"{len(params.twin)} twins", where="twin", fix="give one, or none")
    sources = (params.checkpoint, params.reference, *params.twin)
    return open_all(
        sources, params.data, layers=params.layers, pool=params.pool, frames=params.frames, seed=params.seed
    )


def compare(found: Opened, params: RepresentationSimilarityParams) -> Alike:
    """All measures of all pairs of layers, neighbours and intervals by episode."""
    from probes.alignment import alignments
    from probes.similarity import cka_matrix

    one, other, *twin = found.features
    episodes = one.index["episode"].to_numpy()
    a, b, *c = ({name: side.layer(name) for name in side.layers} for side in found.features)
    drawn: dict[str, Any] = {"resamples": params.resamples, "clusters": episodes, "seed": params.seed}
    rows = cka_matrix(a, b, **drawn).to_frame()
    for ceiling in c:
        parts = {name: cka_matrix({name: a[name]}, {name: ceiling[name]}, permutations=0, **drawn) for name in a}
        for column, values in (("ceiling", "value"), ("ceiling_low", "low"), ("ceiling_high", "high")):
            rows[column] = rows["layer_a"].map({name: getattr(part, values)[0, 0] for name, part in parts.items()})
    return Alike(
        rows, alignments(a, b, k=params.neighbours, groups=episodes), params.neighbours, len(one), len(set(episodes)),
        one.label, other.label, twin[0].label if twin else "",
    )  # fmt: skip


def answer(alike: Alike) -> str:
    """One sentence: the first and last layer that both have, their CKA, and what it must be compared with."""
    rows = list(alike.same().itertuples())
    first, last = rows[0], rows[-1]
    told = [
        f"{plain(row.cka)}{_interval(row)} in {row.layer_a}" for row in ([first, last] if first != last else [last])
    ]
    below = [row.layer_a for row in rows if not row.cka > row.floor]
    ends = f"; not above shuffled images in {', '.join(below)}" if below else "; above what shuffled images give"
    if alike.twin:
        ends += f"; {alike.twin}, another seed of {alike.a}, has {plain(last.ceiling)} in {last.layer_a}"
    return (
        f"On {alike.n} frames of {alike.episodes} episodes the representations of {alike.a} and {alike.b} "
        f"have a debiased CKA of {' and '.join(told)}{ends}."
    )


def _interval(row: Any) -> str:
    return f" (95 % {plain(row.low)} to {plain(row.high)})" if row.low == row.low else ""


def figure(alike: Alike) -> Figure:
    """The matrix, and layer by layer beside ceiling and floor."""
    from probes.figures_probe import similarity_figure

    return similarity_figure(alike.rows, label_a=alike.a, label_b=alike.b, twin=alike.twin)


def figure_words(alike: Alike) -> str:
    """What the figure shows, for readers who do not see it."""
    parts = [f"{row.layer_a} and {row.layer_b} {row.cka:.2f}" for row in alike.rows.itertuples()]
    return f"Debiased CKA of {alike.a} and {alike.b}: {'; '.join(parts)}."


def layer_table(alike: Alike) -> pd.DataFrame:
    """Every layer with itself: CKA with its interval, the ceiling of another seed, the floor, the textbook estimate."""
    import pandas as pd

    rows = []
    for row in alike.same().itertuples():
        line = {"A": row.layer_a, "B": row.layer_b, "CKA, debiased": f"{row.cka:.3f}"}
        line["95 % interval"] = f"{row.low:.3f} to {row.high:.3f}" if row.low == row.low else "–"
        if alike.twin:
            known = row.ceiling_low == row.ceiling_low
            ends = f" ({row.ceiling_low:.3f} to {row.ceiling_high:.3f})" if known else ""
            line["another seed"] = f"{row.ceiling:.3f}{ends}"
        rows.append({**line, "shuffled images, below": f"{row.floor:.3f}", "CKA, textbook": f"{row.biased:.3f}"})
    return pd.DataFrame(rows)


def layer_caption(alike: Alike) -> str:
    """What stands beside the values."""
    twin = f"another seed: {alike.a} with {alike.twin}, trained alike from another seed; " if alike.twin else ""
    return f"A: {alike.a}, B: {alike.b}; {twin}shuffled images: 95 % of orders lie below."


def cka_table(alike: Alike) -> pd.DataFrame:
    """Debiased CKA, layers of A down and layers of B across."""
    table = alike.rows.pivot(index="layer_a", columns="layer_b", values="cka")
    table = table.loc[list(dict.fromkeys(alike.rows["layer_a"])), list(dict.fromkeys(alike.rows["layer_b"]))]
    return table.rename_axis(index="A | B", columns=None).reset_index()


def other_table(alike: Alike) -> pd.DataFrame:
    """Every pair of layers by the other measures."""
    return alike.other.rename(
        columns={
            "layer_a": "A", "layer_b": "B", "mutual_knn": f"shared neighbours of {alike.neighbours}", "cknna": "CKNNA",
            "procrustes": "Procrustes",
        }
    )  # fmt: skip


def badges(found: Opened) -> list[str]:
    """Measured here, on whose weights and on which demonstrations."""
    manifests = [one.manifest for one in found.features]
    return ["measured", *data_badges(found.store.manifest["source"]), *model_badges(*manifests)]


def numbers(alike: Alike) -> dict[str, Any]:
    """What the page rests on, as JSON values."""
    from probes.jsonable import jsonable

    tables = {"cka": alike.rows, "other": alike.other}
    return dict(jsonable({name: table.to_dict("records") for name, table in tables.items()}))
