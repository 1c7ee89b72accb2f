"""The view of `feature_probe`: readouts of many checkpoints beside their baselines, what changed, the sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from probes.numbers import plain, signed, span
from probes.report.views.origins import data_badges, model_badges

if TYPE_CHECKING:
    import pandas as pd

    from probes.probe import Probe
    from probes.readout import Difference
    from probes.report.params import FeatureProbeParams
    from probes.report.views.opened import Opened

WORDS = {
    "gripper_xyz": "the gripper's position", "gripper_xy": "the gripper's place over the table",
    "object_xy": "the place of the object in question", "next_action": "the next action",
    "task_progress": "the progress of the task", "grasp": "whether the hand holds something",
    "contact": "whether the hand touches something",
}  # fmt: skip
MARKS = {"gained": "▲", "lost": "▼", "undetermined": "·"}


def open_inputs(params: FeatureProbeParams) -> Opened:
    """Features of the checkpoint in question, the reference, the others, and an untrained network; and their store."""
    from probes.report.views.opened import open_all

    sources = (params.checkpoint, params.reference, *params.others)
    return open_all(
        sources, params.data, layers=params.layers, pool="grid", frames=params.frames, seed=params.seed, untrained=True
    )


def probes(found: Opened, params: FeatureProbeParams) -> list[Probe]:
    """One probe for each target, the headline's first."""
    from probes.probe import probe

    first, *others = found.features
    return [
        probe(first, found.store, target, kind=params.readout, against=others, seed=params.seed)
        for target in params.targets
    ]


def frame(results: list[Probe]) -> pd.DataFrame:
    """Every readout of every target, as `figures_layers` draws them."""
    import pandas as pd

    return pd.concat([result.to_frame() for result in results], ignore_index=True)


def changed(results: list[Probe], params: FeatureProbeParams) -> pd.DataFrame:
    """`probe.changes` of every target from the reference, with the verdict: gained, lost or undetermined."""
    import numpy as np
    import pandas as pd

    from probes.probe import changes

    parts = [changes(result, _reference(result), seed=params.seed) for result in results]
    rows = pd.concat(parts, ignore_index=True)
    sides = [rows["low"] > 0, rows["high"] < 0]
    rows["verdict"] = np.select(sides, ["gained", "lost"], "undetermined")
    return rows


def _reference(result: Probe) -> str:
    """The first that the checkpoint in question is compared with, or itself when there is no other."""
    return next(iter(result.against), result.label)


def changes_table(results: list[Probe], rows: pd.DataFrame) -> pd.DataFrame:
    """A line per target, a column per checkpoint: score at its own chosen layer, that layer, and whether that is more
    or less than the reference has at its own."""
    import pandas as pd

    best = rows[rows["best"]].set_index(["target", "name"])
    lines = []
    for result in results:
        reference = _reference(result)
        sources = {reference: None, result.label: result.readouts, **result.against}
        line: dict[str, Any] = {"target": result.target.replace("_", " "), "in": result.score}
        for name in sources:
            readouts = result.readouts if name == result.label else result.against[name]
            layer = _chosen(readouts)
            text = f"{plain(readouts[layer].mean)} {layer.replace('vision.', 'v').replace('decoder.', 'd')}"
            line[name] = text if name == reference else f"{text} {MARKS[best.at[(result.target, name), 'verdict']]}"
        lines.append({**line, "pixels": plain(result.pixels.mean)})
    return pd.DataFrame(lines)


def changes_caption(results: list[Probe], rows: pd.DataFrame) -> str:
    """How to read `changes_table`, and how many of the comparisons may be chance."""
    count = int((~rows["best"]).sum())
    told = int(((rows["verdict"] != "undetermined") & ~rows["best"]).sum())
    return (
        f"v: vision block, d: decoder layer, each source's own choice on selection episodes. ▲ more, ▼ less than "
        f"{_reference(results[0])} (paired 95 % interval over {len(results[0].pixels.test_episodes)} episodes); · not "
        f"told apart. Layer by layer {told} of {count} differences exclude 0; 5 % would by chance."
    )


def _chosen(readouts: dict[str, Any]) -> str:
    from probes.readout import best_layer

    return best_layer(readouts)


def target_table(results: list[Probe]) -> pd.DataFrame:
    """Per target: the chosen layer's score and selectivity, the pixels', and the gain over the reference there."""
    import pandas as pd

    rows = []
    for result in results:
        chosen, floor = result.readouts[result.layer], result.nothing.mean
        row: dict[str, Any] = {
            "target": result.target.replace("_", " "), "layer ▸": result.layer, "counted in": result.score,
            "score": plain(chosen.mean, 3), "95 % interval": span(*chosen.interval, 3) if chosen.interval else None,
            "nothing to see": plain(floor, 3), "pixels": plain(result.pixels.mean, 3),
            "selectivity": None if chosen.selectivity is None else signed(chosen.selectivity, 3),
        }  # fmt: skip
        if result.against:
            label = _reference(result)
            gain = result.differences[f"{result.label} - {label}, {result.layer}"]
            ends = gain.interval
            row[f"gain over {label}"] = None if ends is None else span(ends.low, ends.high, 3)
            row["detectable"] = None if gain.detectable is None else plain(gain.detectable, 3)
        rows.append(row)
    return pd.DataFrame(rows)


def layers_words(results: list[Probe]) -> str:
    """What the figure of all targets shows, for readers who do not see it."""
    parts = [f"{result.target} best in {result.layer} ({result.readouts[result.layer].mean:.2f})" for result in results]
    others = ", ".join(results[0].against)
    return (
        f"Scores of a readout over the layers of {results[0].label}, beside {others}, one panel per target: "
        f"{'; '.join(parts)}."
    )


def answer(results: list[Probe], rows: pd.DataFrame) -> str:
    """The chosen layer's readout of the first target, beside pixels and reference; then what all targets say."""
    result = results[0]
    readout = result.readouts[result.layer]
    interval = "" if readout.interval is None else f" (95 % {' to '.join(map(plain, readout.interval))})"
    text = (
        f"From layer {result.layer} of {result.label}, {result.pool}-pooled, {_article(result.kind)} readout finds "
        f"{WORDS.get(result.target, result.target)} in held-out episodes with {result.score} "
        f"{plain(readout.mean)}{interval}"
    )
    text += "" if readout.error_mm != readout.error_mm else f", {readout.error_mm:.0f} mm off on average"
    compared = {f"raw pixels at {_pixels()} × {_pixels()}": "pixels"}
    if result.against:
        compared[f"{_reference(result)} at the same layer"] = _reference(result)
    parts = [
        _compared(words, result.differences[f"{result.label} - {key}, {result.layer}"])
        for words, key in compared.items()
    ]
    return f"{text}: {' and '.join(parts)}.{_overall(results, rows)}"


def _overall(results: list[Probe], rows: pd.DataFrame) -> str:
    """In how many of the targets the checkpoint in question has more or less than the reference, each at its best."""
    mine = rows[rows["best"] & (rows["name"] == results[0].label)]
    if len(mine) < 2:
        return ""
    told = [
        f"{word} in {', '.join(found)}"
        for word in ("gained", "lost", "undetermined")
        if (found := [target.replace("_", " ") for target in mine.loc[mine["verdict"] == word, "target"]])
    ]
    return f" Against {_reference(results[0])}, each at its own best layer: {'; '.join(told)}."


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


def badges(found: Opened) -> list[str]:
    """Measured here, on whose weights and on which demonstrations."""
    manifests = [one.manifest for one in found.features]
    return ["measured", *data_badges(found.store.manifest["source"]), *model_badges(*manifests)]


def numbers(results: list[Probe], rows: pd.DataFrame) -> dict[str, Any]:
    """What the page rests on, as JSON values."""
    from probes.jsonable import jsonable

    differences = [
        {"target": result.target, **row}
        for result in results for row in result.differences_frame().to_dict("records")
    ]  # fmt: skip
    tables = {"readouts": frame(results), "changes": rows}
    return dict(jsonable({"layer": results[0].layer, "target": results[0].target, "differences": differences,
                             **{name: table.to_dict("records") for name, table in tables.items()}}))  # fmt: skip
