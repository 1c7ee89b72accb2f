"""The view of `training_divergence`: weight changes and gradients per module group, the sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.numbers import signed, span
from probes.report.views.origins import data_badges, model_badges
from vlm4vla_core import folders

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def open_inputs(folder: Path) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame | None]:
    """(the JSON, weights per group, gradients per group or None) of a folder written by `vlm4vla diverge`."""
    from vlm4vla_core.results import read_table

    manifest = folders.read_manifest(folder, "divergence", fix="make it again with `vlm4vla diverge`")
    told = {**folders.read_json(folder / "divergence.json"), "origin": manifest.get("origin", {})}
    gradients = folder / "gradients.parquet"
    return told, read_table(folder / "weights.parquet"), read_table(gradients) if gradients.is_file() else None


def answer(told: Mapping[str, Any], gradients: pd.DataFrame | None) -> str:
    """One sentence: how far and in which direction both trainings moved, and how their gradients stand at the base."""
    total = told["total"]
    vlm, vla = (
        "an unknown share" if total[key] is None else f"{100 * total[key]:.1f} %"
        for key in ("rel_norm_a", "rel_norm_c")
    )
    most_vlm, most_vla = _most(told["weights"], "rel_norm_a"), _most(told["weights"], "rel_norm_c")
    text = f"From one base, VLM training moved the weights by {vlm} of their norm{most_vlm} and VLA training by {vla}"
    text += most_vla
    if total["cosine"] is None:
        text += "; the angle between the two changes is undefined, since one of them is zero"
    else:
        null = 2 * total["null_sd"]
        place = "outside" if abs(total["cosine"]) > null else "within"
        text += f", in directions with cosine {signed(total['cosine'], 3)} ({place} the ±{null:.3f} of random changes)"
        text += _by_group(told["weights"])
    if gradients is None:
        return f"{text}; gradients were not measured."
    return f"{text}; {_gradient_words(gradients.set_index('group').loc['all'])}."


def _most(weights: list[dict[str, Any]], key: str) -> str:
    """Which module group moved most: an average over all weights may come from one of them."""
    known = [row for row in weights if row[key] is not None]
    if len(known) < 2:
        return ""
    top = max(known, key=lambda row: row[key])
    return f" (most in {top['group']}, {100 * top[key]:.1f} %)"


def _by_group(weights: list[dict[str, Any]]) -> str:
    """In how many module groups the directions are no chance: the cosine over all weights may hide it."""
    known = [row for row in weights if row["cosine"] is not None]
    beyond = [row for row in known if abs(row["cosine"]) > 3 * row["null_sd"]]
    if len(known) < 2:
        return ""
    text = f", beyond 3 sd of random changes in {len(beyond)} of {len(known)} module groups"
    if beyond:
        top = max(beyond, key=lambda row: abs(row["cosine"]))
        text += f" ({top['group']} {signed(top['cosine'])} most)"
    return text


def _gradient_words(row: pd.Series) -> str:
    if row["corrected"] != row["corrected"]:
        return "at the base the losses' gradients are below the noise of the batches, so their angle is undetermined"
    known = row["low"] == row["low"]
    if not known:
        word, interval = "the sign is undetermined", "no interval"
    else:
        interval = f"95 % {span(row['low'], row['high'])}"
        signs = {(True, False): "they pull together", (False, True): "they oppose each other"}
        word = signs.get((row["low"] > 0, row["high"] < 0), "the sign is undetermined")
    cosine = f"{signed(row['corrected'])} ({interval})"
    return f"at the base the noise-corrected cosine of the two losses' gradients is {cosine}: {word}"


def weight_table(weights: pd.DataFrame) -> pd.DataFrame:
    """Per module group: how far each training moved it, the cosine between the changes, and its random null."""
    import pandas as pd

    return pd.DataFrame(
        {
            "module group": weights["group"],
            "parameters": [f"{n:,}" for n in weights["n_params"]],
            "VLM change, %": _percent(weights["rel_norm_a"]),
            "VLA change, %": _percent(weights["rel_norm_c"]),
            "cosine": [None if value != value else signed(value, 3) for value in weights["cosine"]],
            "random, ±2 sd": [f"{2 * value:.3f}" for value in weights["null_sd"]],
        }
    )


def _percent(values: pd.Series) -> list[str | None]:
    return [None if value != value else f"{100 * value:.2f}" for value in values]


def gradient_table(gradients: pd.DataFrame | None) -> pd.DataFrame:
    """Per module group: the naive and the corrected cosine, its interval, and the signal-to-noise of one half-batch."""
    import pandas as pd

    rows = []
    for row in [] if gradients is None else gradients.to_dict("records"):
        rows.append(
            {
                "module group": row["group"],
                "naive cosine": None if row["naive"] != row["naive"] else signed(row["naive"]),
                "corrected": None if row["corrected"] != row["corrected"] else signed(row["corrected"]),
                "95 % interval": None if row["low"] != row["low"] else span(row["low"], row["high"]),
                "signal to noise, VLM": f"{row['snr_a']:.2f}",
                "signal to noise, VLA": f"{row['snr_c']:.2f}",
                "remark": row["verdict"] or None,
            }
        )
    return pd.DataFrame(rows)


def verdict_table(told: Mapping[str, Any]) -> pd.DataFrame:
    """One line per module: where the arms part, or why that is not known."""
    import pandas as pd

    lines = [line.split(": ", 1) for line in told.get("verdict", ())]
    return pd.DataFrame(lines, columns=["module", "at a glance"])


def interference_table(told: Mapping[str, Any]) -> pd.DataFrame:
    """What one step on one objective does to the loss of each, in per cent of the loss."""
    import pandas as pd

    rows = []
    for row in told.get("interference", ()):
        scale = 100 * row["relative"] / row["change"] if row["change"] else 0.0
        rows.append(
            {
                "step": "plain gradient" if row["form"] == "raw" else "AdamW's first",
                "on": row["step_on"],
                "loss of": row["loss_of"],
                "change, %": signed(scale * row["change"], 3),
                "95 % interval": span(scale * row["low"], scale * row["high"]),
            }
        )
    return pd.DataFrame(rows)


def further_figures(folder: Path) -> list[tuple[Figure, str]]:
    """Figures of what `vlm4vla diverge` measured beyond weights and gradients at the base, with words for each."""
    from probes.figures_divergence import gradients_figure, lines_figure, parting_figure, path_figure
    from vlm4vla_core.results import read_table

    tables = {path.stem: read_table(path) for path in folder.glob("*.parquet")}
    found = []
    if "gradients_all" in tables:
        words = "Noise-corrected gradient cosines per module group, with bands over batches; null 0, ceiling 1."
        found.append((gradients_figure(tables["gradients_all"]), words))
    if "trajectory" in tables:
        words = (
            "Corrected cosine of both arms' displacements over steps with floor and ceiling, and the excess distance."
        )
        found.append((parting_figure(tables["trajectory"], tables["parting"]), words))
        path = tables["path"]
        runs = path["run"].nunique()
        points = path[["first", "second"]].to_numpy().reshape(runs, -1, 2)
        arms = tuple(path.groupby("run", sort=False)["arm"].first())
        words = "All runs on the first two principal components, and their shares beside walks without a plan."
        found.append((path_figure(points, tables["path_shares"], arms), words))
    if "lines" in tables:
        words = "Both losses on the straight lines between base, VLM- and VLA-trained weights, with barriers."
        found.append((lines_figure(tables["lines"], tables["barriers"]), words))
    return found


def figure_words(weights: pd.DataFrame) -> str:
    """What the divergence figure shows, for readers who do not see it."""
    return (
        f"For {len(weights)} module groups from {weights['group'].iloc[0]} to {weights['group'].iloc[-1]}: the size of "
        "both changes, the cosine between them with its random null, and the cosine of the losses' gradients; "
        "the tables give the numbers."
    )


def gradient_words(told: Mapping[str, Any]) -> str:
    """How the gradients were measured, for a caption."""
    config = told["config"]
    if not told["gradients"]:
        return "Gradients were not measured: `vlm4vla diverge` was given no demonstrations."
    return (
        f"{config['batches']} independent batches of {config['batch_size']} frames per loss; {told['head']}. "
        "Interval: bootstrap over batches; a dash where the noise leaves none."
    )


def badges(told: Mapping[str, Any]) -> list[str]:
    """Measured here, on whose weights and on which demonstrations."""
    origin = told["origin"]
    return ["measured", *data_badges(*origin.get("data", ())), *model_badges(told)]


def numbers(told: Mapping[str, Any]) -> dict[str, Any]:
    """What the page rests on, as JSON values."""
    known = {key: told[key] for key in ("total", "weights", "gradients", "head", "unmatched", "excluded")}
    further = ("verdict", "interference", "barriers", "parting", "path_shares", "spread")
    return known | {key: told[key] for key in further if key in told}
