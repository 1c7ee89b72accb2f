"""The view of `representation_similarity`: CKA of all pairs of layers, other measures beside it, the sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from probes.numbers import plain
from probes.report.views.origins import data_badges, model_badges

if TYPE_CHECKING:
    import pandas as pd

    from probes.features import Features
    from probes.report.params import RepresentationSimilarityParams
    from probes.similarity import CkaMatrix


@dataclass(frozen=True)
class Alike:
    """cka: the matrix with intervals and floor. other: `alignments`. neighbours: of them."""

    cka: CkaMatrix
    other: pd.DataFrame
    neighbours: int
    episodes: int


def open_inputs(params: RepresentationSimilarityParams) -> tuple[Features, Features]:
    """Both sets of features; of the same frames, or an InputError."""
    from probes.features import Features

    one, other = Features.open(params.a), Features.open(params.b)
    one.same_images(other)
    return one, other


def compare(one: Features, other: Features, params: RepresentationSimilarityParams) -> Alike:
    """All measures of all pairs of the layers asked for, neighbours and intervals by episode."""
    from probes.alignment import alignments
    from probes.similarity import cka_matrix

    episodes = one.index["episode"].to_numpy()
    layers = ({name: side.layer(name) for name in params.layers or side.layers} for side in (one, other))
    a, b = layers
    cka = cka_matrix(a, b, resamples=params.resamples, clusters=episodes, seed=params.seed)
    return Alike(cka, alignments(a, b, k=params.neighbours, groups=episodes), params.neighbours, len(set(episodes)))


def answer(alike: Alike, one: Features, other: Features) -> str:
    """One sentence: the last layer that both have, its CKA, and what it must be compared with."""
    rows = [row for row in alike.cka.to_frame().itertuples() if row.layer_a == row.layer_b] or list(
        alike.cka.to_frame().itertuples()
    )
    first, last = rows[0], rows[-1]
    told = [
        f"{plain(row.cka)}{_interval(row)} in {row.layer_a}" for row in ([first, last] if first != last else [last])
    ]
    below = [row.layer_a for row in rows if not row.cka > row.floor]
    ends = f"; not above shuffled images in {', '.join(below)}" if below else "; above what shuffled images give"
    return (
        f"On {alike.cka.n} frames of {alike.episodes} episodes the representations of {one.label} and {other.label} "
        f"have a debiased CKA of {' and '.join(told)}{ends}."
    )


def _interval(row: Any) -> str:
    return f" (95 % {plain(row.low)} to {plain(row.high)})" if row.low == row.low else ""


def figure_words(alike: Alike, one: Features, other: Features) -> str:
    """What the figure shows, for readers who do not see it."""
    parts = [f"{row.layer_a} and {row.layer_b} {row.cka:.2f}" for row in alike.cka.to_frame().itertuples()]
    return f"Debiased CKA of {one.label} and {other.label}: {'; '.join(parts)}."


def cka_table(alike: Alike) -> pd.DataFrame:
    """Every pair of layers: CKA, its interval, the floor of shuffled images, and the textbook estimate."""
    import pandas as pd

    rows = []
    for row in alike.cka.to_frame().itertuples():
        known = row.low == row.low
        rows.append(
            {
                "A": row.layer_a, "B": row.layer_b, "CKA, debiased": f"{row.cka:.3f}",
                "95 % interval": f"{row.low:.3f} to {row.high:.3f}" if known else None,
                "shuffled images, below": f"{row.floor:.3f}", "CKA, textbook": f"{row.biased:.3f}",
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def other_table(alike: Alike) -> pd.DataFrame:
    """Every pair of layers by the other measures."""
    return alike.other.rename(
        columns={
            "layer_a": "A", "layer_b": "B", "mutual_knn": f"shared neighbours of {alike.neighbours}", "cknna": "CKNNA",
            "procrustes": "Procrustes",
        }
    )  # fmt: skip


def badges(one: Features, other: Features) -> list[str]:
    """Measured here, on whose weights and on which demonstrations."""
    sources = one.manifest.get("origin", {}).get("data", [])
    return ["measured", *data_badges(*sources), *model_badges(one.manifest, other.manifest)]


def numbers(alike: Alike) -> dict[str, Any]:
    """What the page rests on, as JSON values."""
    from probes.jsonable import jsonable

    tables = {"cka": alike.cka.to_frame(), "other": alike.other}
    return dict(jsonable({name: table.to_dict("records") for name, table in tables.items()}))
