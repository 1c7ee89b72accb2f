"""The view of `feature_probe`: readouts beside their baselines, paired differences, similarity, the sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from probes.numbers import plain, signed, span
from probes.report.views.origins import data_badges, model_badges

if TYPE_CHECKING:
    import pandas as pd

    from probes.features import Features
    from probes.probe import Probe
    from probes.readout import Difference
    from probes.report.params import FeatureProbeParams
    from probes.similarity import CkaMatrix
    from vlm4vla_core.episodes.store import EpisodeStore

WORDS = {
    "gripper_xyz": "the gripper's position", "gripper_xy": "the gripper's place over the table",
    "object_xy": "the place of the object in question", "next_action": "the next action",
    "task_progress": "the progress of the task", "grasp": "whether the hand holds something",
}  # fmt: skip


def open_inputs(params: FeatureProbeParams) -> tuple[Features, Features, EpisodeStore]:
    """The features in question, those they are compared with, and their store."""
    from probes.features import Features
    from vlm4vla_core.episodes.store import EpisodeStore

    return Features.open(params.trained), Features.open(params.start), EpisodeStore.open(params.store)


def probes(trained: Features, start: Features, store: EpisodeStore, params: FeatureProbeParams) -> list[Probe]:
    """One probe for each target, the headline's first."""
    from probes.probe import probe

    return [
        probe(trained, store, target, kind=params.readout, against=[start], seed=params.seed)
        for target in params.targets
    ]


def frame(results: list[Probe]) -> pd.DataFrame:
    """Every readout of every target, as `figures_layers` draws them."""
    import pandas as pd

    return pd.concat([result.to_frame() for result in results], ignore_index=True)


def target_table(results: list[Probe]) -> pd.DataFrame:
    """Per target: the chosen layer's score and selectivity, the pixels', and the gain over the start."""
    import pandas as pd

    rows = []
    for result in results:
        chosen, floor = result.readouts[result.layer], result.nothing.mean
        row: dict[str, Any] = {
            "target": result.target, "layer ▸": result.layer, "counted in": result.score,
            "score": plain(chosen.mean, 3),
            "nothing to see": plain(floor, 3), "pixels": plain(result.pixels.mean, 3),
            "selectivity": None if chosen.selectivity is None else signed(chosen.selectivity, 3),
        }  # fmt: skip
        for label in result.against:
            gain = result.differences[f"{result.label} - {label}, {result.layer}"]
            ends = gain.interval
            row[f"gain over {label}"] = None if ends is None else span(ends.low, ends.high, 3)
            row["detectable"] = None if gain.detectable is None else plain(gain.detectable, 3)
        rows.append(row)
    return pd.DataFrame(rows)


def layers_words(results: list[Probe]) -> str:
    """What the figure of all targets shows, for readers who do not see it."""
    parts = [f"{result.target} best in {result.layer} ({result.readouts[result.layer].mean:.2f})" for result in results]
    return f"Scores of a readout over the layers, one panel per target: {'; '.join(parts)}."


def similarity(trained: Features, start: Features, *, resamples: int, seed: int) -> CkaMatrix:
    """Debiased CKA, layer by layer, with intervals over episodes."""
    from probes.similarity import cka_matrix

    trained.same_images(start)
    episodes = trained.index["episode"].to_numpy()
    layers = ({name: side.layer(name) for name in side.layers} for side in (trained, start))
    return cka_matrix(*layers, resamples=resamples, clusters=episodes, seed=seed)


def answer(result: Probe) -> str:
    """One sentence: the chosen layer's readout, beside the pixels and beside the features it is compared with."""
    readout = result.readouts[result.layer]
    interval = "" if readout.interval is None else f" (95 % {' to '.join(map(plain, readout.interval))})"
    text = (
        f"From layer {result.layer} of {result.label}, {result.pool}-pooled, {_article(result.kind)} readout finds "
        f"{WORDS.get(result.target, result.target)} in held-out episodes with {result.score} "
        f"{plain(readout.mean)}{interval}"
    )
    text += "" if readout.error_mm != readout.error_mm else f", {readout.error_mm:.0f} mm off on average"
    parts = [
        _compared(
            f"raw pixels at {_pixels()} × {_pixels()}", result.differences[f"{result.label} - pixels, {result.layer}"]
        )
    ]
    for label in result.against:
        key = f"{result.label} - {label}, {result.layer}"
        parts.append(_compared(f"{label} at the same layer", result.differences[key]))
    return f"{text}: {' and '.join(parts)}."


def _article(kind: str) -> str:
    return {"linear": "a linear", "mlp": "an MLP"}[kind]


def _pixels() -> int:
    from probes.probe import PIXELS

    return PIXELS


def _compared(other: str, difference: Difference) -> str:
    low, high = difference.interval or (None, None)
    if low is None or high is None:
        return f"{signed(difference.value)} against {other} (one episode, so undetermined)"
    word = "better than" if low > 0 else "worse than" if high < 0 else "undetermined against"
    return f"{word} {other} (difference {span(low, high, digits=3)})"


def difference_table(result: Probe) -> pd.DataFrame:
    """Every paired comparison on the same held-out episodes."""
    import pandas as pd

    rows = [
        {"comparison": name.replace(" - ", " − "), "difference in R²": signed(value, 3),
         "95 % interval": None if interval is None else span(*interval, digits=3)}
        for name, (value, interval, _) in result.differences.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def readout_table(result: Probe) -> pd.DataFrame:
    """Every readout and baseline: R² with its interval, and the error."""
    import pandas as pd

    rows = []
    for row in result.to_frame().to_dict("records"):
        known = row["low"] == row["low"]
        rows.append(
            {
                "read from": row["name"] if row["kind"] in ("features", "against") else f"{row['name']} (baseline)",
                "layer": (row["layer"] or "–") + (" ▸" if row["chosen"] and row["kind"] == "features" else ""),
                "R²": plain(row["r2"], 3),
                "95 % interval": f"{plain(row['low'], 3)} to {plain(row['high'], 3)}" if known else None,
                "error, mm": None if row["error_mm"] != row["error_mm"] else f"{row['error_mm']:.1f}",
            }
        )
    return pd.DataFrame(rows)


def figure_words(result: Probe) -> str:
    """What the probe figure shows, for readers who do not see it."""
    parts = [
        f"{row['name']} {row['layer']} {row['r2']:.2f}".replace("  ", " ")
        for row in result.to_frame().to_dict("records")
    ]
    what = WORDS.get(result.target, result.target)
    return f"{result.score} of {_article(result.kind)} readout of {what}: {'; '.join(parts)}."


def similarity_words(result: CkaMatrix) -> str:
    """What the similarity figure shows, for readers who do not see it."""
    parts = [f"{row.layer_a} and {row.layer_b} {row.cka:.2f}" for row in result.to_frame().itertuples()]
    return f"Debiased CKA on {result.n} images: {'; '.join(parts)}."


def similarity_table(result: CkaMatrix) -> pd.DataFrame:
    """Every pair of layers: CKA, its interval, the floor of shuffled images, and the textbook estimate."""
    import pandas as pd

    rows = []
    for row in result.to_frame().itertuples():
        known = row.low == row.low
        rows.append(
            {
                "trained": row.layer_a, "start": row.layer_b, "CKA, debiased": f"{row.cka:.3f}",
                f"{100 * result.level:g} % interval": f"{row.low:.3f} to {row.high:.3f}" if known else None,
                "shuffled images, below": f"{row.floor:.3f}", "CKA, textbook": f"{row.biased:.3f}",
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def badges(trained: Features, start: Features, store: EpisodeStore) -> list[str]:
    """Measured here, on whose weights and on which demonstrations."""
    return ["measured", *data_badges(store.manifest["source"]), *model_badges(trained.manifest, start.manifest)]


def numbers(results: list[Probe], alike: CkaMatrix) -> dict[str, Any]:
    """What the page rests on, as JSON values."""
    from probes.jsonable import jsonable

    differences = [
        {"target": result.target, **row}
        for result in results for row in result.differences_frame().to_dict("records")
    ]  # fmt: skip
    tables = {"readouts": frame(results), "similarity": alike.to_frame()}
    return dict(jsonable({"layer": results[0].layer, "target": results[0].target, "differences": differences,
                             **{name: table.to_dict("records") for name, table in tables.items()}}))  # fmt: skip
