"""The view of `attribution`: maps over an episode, whether to trust them, another checkpoint's maps, the sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probes.numbers import signed
from probes.report.views.origins import data_badges, model_badges

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probes.attribution import Attribution, Faithfulness, Target
    from probes.report.params import AttributionParams

BATCH = 16


@dataclass(frozen=True)
class Explained:
    """Of the frames at `steps`: pictures, maps, curves, and the reference checkpoint's maps."""

    label: str
    reference: str
    target: Target
    method: str
    instruction: str
    steps: list[int]
    images: np.ndarray
    maps: list[Attribution]
    curves: list[Faithfulness]
    other: list[Attribution]
    models: list[str]
    data: str


def explained(params: AttributionParams) -> Explained:
    """Attribute the target in every frame, and again with the reference checkpoint.

    Raises InputError for an episode, action dimension or camera that is not there, and for maps that never become
    complete.
    """
    import torch

    from probes.attribution import Lens, explain, faithfulness, target_of
    from probes.verbs.attribute import known_steps
    from probes.verbs.shared import few_threads, short_name
    from probes.weights import model_source
    from vlm4vla_core import checkpoint
    from vlm4vla_core.episodes.store import EpisodeStore
    from vlm4vla_core.policy import VLAPolicy

    store = EpisodeStore.open(params.data)
    known_steps(store, params.episode, ())
    length = int(store.lengths[params.episode])
    steps = [int(s) for s in np.unique(np.linspace(0, length - 1, min(params.frames, length)).round())]
    paths = [checkpoint.resolve(path) for path in (params.checkpoint, params.reference)]
    instruction, found = store.instructions[params.episode], []
    for path in paths:
        policy = VLAPolicy.load(path, "cpu", torch.float32)
        few_threads(policy)
        images = store.images(policy.config.camera, store.starts[params.episode] + steps, policy.backbone.image_size)
        target = target_of(policy.config, params.target)
        lenses = [Lens(policy, image, instruction, target) for image in images]
        maps = [explain(lens, params.method, batch_size=BATCH) for lens in lenses]
        found.append((target, images, lenses, maps))
    (target, images, lenses, maps), (_, _, _, other) = found
    curves = [faithfulness(lens, one, seed=params.seed, orders=params.orders, batch_size=BATCH)
              for lens, one in zip(lenses, maps, strict=True)]  # fmt: skip
    return Explained(
        short_name(paths[0]), short_name(paths[1]), target, params.method, instruction, steps, images, maps, curves,
        other, [model_source(path) for path in paths], str(store.manifest["source"]),
    )  # fmt: skip


def _scores(one: Attribution) -> np.ndarray:
    return one.cells if one.pixels is None else one.pixels


def sheet(found: Explained) -> Figure:
    """The contact sheet: frames above scores, one colour scale for all."""
    from probes.figures_attribution import contact_sheet

    captions = [f"step {step}: {one.value:+.3f}" for step, one in zip(found.steps, found.maps, strict=True)]
    title = f"{found.label}: {found.method} of {found.target.name}; “{found.instruction}”"
    maps = [_scores(one) for one in found.maps]
    return contact_sheet(found.images, maps, captions, title=title, unit=found.target.unit)


def sheet_words(found: Explained) -> str:
    """What the sheet shows, for readers who do not see it."""
    parts = []
    for step, one in zip(found.steps, found.maps, strict=True):
        row, column = np.unravel_index(np.abs(one.cells).argmax(), one.cells.shape)
        side = len(one.cells)
        parts.append(f"step {step}, strongest at row {row + 1} and column {column + 1} of {side}")
    return f"Scores of the places of {len(found.steps)} frames for {found.target.name}: {'; '.join(parts)}."


def frame_table(found: Explained) -> pd.DataFrame:
    """Per frame: the answer, the answer without a picture, the sum of the scores, the areas under the curves."""
    import pandas as pd

    rows = []
    for step, one, curve in zip(found.steps, found.maps, found.curves, strict=True):
        areas = curve.areas()
        rows.append(
            {
                "step": step, "answer": one.value, "baseline": one.baseline, "sum of scores": float(one.cells.sum()),
                "missed": one.delta, "steps of the path": one.n_steps,
                "deletion": areas["deletion"], "insertion": areas["insertion"], "random orders": areas["random"],
                "p, deletion": areas["deletion_p"], "p, insertion": areas["insertion_p"],
            }
        )  # fmt: skip
    return pd.DataFrame(rows).dropna(axis=1, how="all")


def completeness(found: Explained) -> str:
    """How complete the maps are, in words."""
    from probes.attribution import ABSOLUTE, RELATIVE

    if found.maps[0].delta is None:
        return "This method has no completeness: its scores need not add up to the difference from the baseline."
    within = f"{RELATIVE:.0%} of it or {ABSOLUTE:g}"
    return f"Scores add up to answer minus baseline within {within}; p: share of random orders as good."


def curves(found: Explained) -> Figure:
    """Deletion and insertion, means over the frames."""
    from probes.figures_attribution import faithfulness_figure

    return faithfulness_figure(found.curves, unit=found.target.unit)


def curve_words(found: Explained) -> str:
    """What the curves show, for readers who do not see them."""
    means = {
        name: float(np.mean([curve.areas()[name] for curve in found.curves]))
        for name in ("deletion", "insertion", "random")
    }
    return "Areas under the curves: " + ", ".join(f"{name} {value:.3f}" for name, value in means.items()) + "."


def reference_table(found: Explained) -> pd.DataFrame:
    """Per frame: both checkpoints' answers and how their maps correlate."""
    import pandas as pd

    return pd.DataFrame(
        {
            "step": found.steps, found.label: [one.value for one in found.maps],
            found.reference: [one.value for one in found.other], "rank correlation": _correlations(found),
        }
    )  # fmt: skip


def _correlations(found: Explained) -> list[float]:
    from probes.attribution import rank_correlation

    return [rank_correlation(a.cells, b.cells) for a, b in zip(found.maps, found.other, strict=True)]


def answer(found: Explained) -> str:
    """One sentence: are the maps faithful, and are they this policy's own?"""
    better = {
        name: sum(curve.areas()[f"{name}_p"] <= 0.05 for curve in found.curves) for name in ("deletion", "insertion")
    }
    mean, count = float(np.nanmean(_correlations(found))), len(found.maps)
    name = f"{found.target.name} of {found.label} in {count} frames of “{found.instruction}”"
    return (
        f"For {name}, hiding the places that {found.method} scores highest changes the answer faster than 95 % of "
        f"random orders in {better['deletion']} of {count} frames, and showing them brings it back faster in "
        f"{better['insertion']}; the maps have a mean rank correlation of {signed(mean)} with those of "
        f"{found.reference}."
    )


def badges(found: Explained) -> list[str]:
    """Measured here, on whose weights and on which demonstrations."""
    manifests = [{"origin": {"model": model}} for model in found.models]
    return ["measured", *data_badges(found.data), *model_badges(*manifests)]


def numbers(found: Explained) -> dict[str, Any]:
    """What the page rests on, as JSON values."""
    from probes.jsonable import jsonable

    frames, reference = frame_table(found), reference_table(found)
    return dict(jsonable({"frames": frames.to_dict("records"), "reference": reference.to_dict("records")}))
