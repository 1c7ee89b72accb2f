"""The view of `training_divergence`: weights, paths, gradients, representations and lines, and the sentence.

Trap: everything is measured in a temporary folder, which is gone when `open_inputs` returns; the tables stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from probes.numbers import signed, span
from probes.report.views.origins import data_badges, model_badges
from vlm4vla_core import folders
from vlm4vla_core.errors import InputError, nearest

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probes.report.params import TrainingDivergenceParams

BATCH, POINTS = 8, 5  # frames of a batch of gradients, and of a point on a line; points on a line


@dataclass(frozen=True)
class Divergence:
    """What `vlm4vla diverge` wrote: its JSON, and its tables by name, of the module groups asked for."""

    told: dict[str, Any]
    tables: dict[str, pd.DataFrame]


def open_inputs(params: TrainingDivergenceParams) -> Divergence:
    """Measure the three checkpoints as `vlm4vla diverge` does. Raises InputError as the verb and `read_folder`."""
    from probes.verbs.diverge import Args, make
    from probes.verbs.shared import model_facts
    from vlm4vla_core.episodes.store import EpisodeStore
    from vlm4vla_core.families import family

    spatial = family(model_facts(params.base)[1]["family"]).spatial
    store = EpisodeStore.open(params.data)
    placed = "gripper_xyz" if {"x", "y", "z"} <= set(store.state_names) else "next_action"
    vlm, vla = ([*paths, None][:2] for paths in (params.vlm, params.vla))
    with TemporaryDirectory(prefix="vlm4vla-divergence-") as place:
        out = Path(place) / "divergence"
        make(
            Args(
                params.base, params.vlm[0], params.vla[0], out, vlm_twin=vlm[1], vla_twin=vla[1], vla_data=params.data,
                trajectory=params.trajectories, batches=params.batches, batch_size=BATCH, pilots=2,
                interfere=min(params.batches, 4), features=True, layers=tuple(params.layers),
                pool="grid" if spatial else "mean", target=placed,
                max_frames=params.frames or None, interpolate=POINTS, seed=params.seed,
            )
        )  # fmt: skip
        return read_folder(out, params.groups)


def read_folder(folder: Path, groups: Sequence[str] = ()) -> Divergence:
    """A folder written by `vlm4vla diverge`. groups: module groups or the first parts of their names; all, if empty.

    Raises InputError for another folder, and for a group that the model does not have.
    """
    from vlm4vla_core.results import read_table

    manifest = folders.read_manifest(folder, "divergence", fix="make it again with `vlm4vla diverge`")
    told = {**folders.read_json(folder / "divergence.json"), "origin": manifest.get("origin", {})}
    tables = {path.stem: read_table(path) for path in sorted(folder.glob("*.parquet"))}
    known = list(tables["weights"]["group"])
    for group in groups:
        if not any(_within(name, group) for name in known):
            fix = nearest(group, [*known, *dict.fromkeys(name.split(".")[0] for name in known)])
            raise InputError(f"no module group '{group}'", where="groups", fix=fix)
    for name in ("weights", "gradients", "gradients_all") if groups else ():
        if name in tables:
            keep = [row == "all" or any(_within(row, group) for group in groups) for row in tables[name]["group"]]
            tables[name] = tables[name][keep].reset_index(drop=True)
    return Divergence(told, tables)


def _within(name: str, group: str) -> bool:
    return name == group or name.startswith(f"{group}.")


# --- the sentence -----------------------------------------------------------------------------------------


def answer(found: Divergence) -> str:
    """One sentence: how far and in which direction both trainings moved, when they part, how their gradients stand."""
    told, weights = found.told, found.tables["weights"].to_dict("records")
    total = told["total"]
    vlm, vla = (
        "an unknown share" if total[key] is None else f"{100 * total[key]:.1f} %"
        for key in ("rel_norm_a", "rel_norm_c")
    )
    text = f"From one base, VLM training moved the weights by {vlm} of their norm{_most(weights, 'rel_norm_a')} and "
    text += f"VLA training by {vla}{_most(weights, 'rel_norm_c')}"
    if total["cosine"] is None:
        text += "; the angle between the two changes is undefined, since one of them is zero"
    else:
        null = 2 * total["null_sd"]
        place = "outside" if abs(total["cosine"]) > null else "within"
        text += f", in directions with cosine {signed(total['cosine'], 3)} ({place} the ±{null:.3f} of random changes)"
        text += _by_group(weights)
    text += _parting_words(told.get("parting") or ())
    if "gradients" not in found.tables:
        return f"{text}; gradients were not measured."
    return f"{text}; {_gradient_words(found.tables['gradients'].set_index('group').loc['all'])}."


def _most(weights: list[dict[str, Any]], key: str) -> str:
    """Which module group moved most: an average over all weights may come from one of them."""
    known = [row for row in weights if row[key] == row[key]]
    if len(known) < 2:
        return ""
    top = max(known, key=lambda row: row[key])
    return f" (most in {top['group']}, {100 * top[key]:.1f} %)"


def _by_group(weights: list[dict[str, Any]]) -> str:
    """In how many module groups the directions are no chance: the cosine over all weights may hide it."""
    known = [row for row in weights if row["cosine"] == row["cosine"]]
    beyond = [row for row in known if abs(row["cosine"]) > 3 * row["null_sd"]]
    if len(known) < 2:
        return ""
    text = f", beyond 3 sd of random changes in {len(beyond)} of {len(known)} module groups"
    if beyond:
        top = max(beyond, key=lambda row: abs(row["cosine"]))
        text += f" ({top['group']} {signed(top['cosine'])} most)"
    return text


def _parting_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """When the arms part, of all modules together."""
    row = next((row for row in rows if row["module"] == "all"), None)
    return f"; over all modules {row['verdict']}" if row else "; when the arms part was not measured"


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


# --- tables -----------------------------------------------------------------------------------------------


def glance(found: Divergence) -> list[tuple[str, str]]:
    """One line per module: where the arms part, or why that is not known; and per arm, what is left of the base."""
    lines = [line.split(": ", 1) for line in found.told.get("verdict", ())]
    return [(head, text) for head, text in lines]


def weight_table(found: Divergence) -> pd.DataFrame:
    """Per module group: how far each training moved it, the cosine between the changes, its null and its ceilings."""
    import pandas as pd

    weights = found.tables["weights"]
    columns = {
        "module group": weights["group"],
        "parameters": [f"{n:,}" for n in weights["n_params"]],
        "VLM change, %": _percent(weights["rel_norm_a"]),
        "VLA change, %": _percent(weights["rel_norm_c"]),
        "cosine": _signed(weights["cosine"]),
        "random, ±2 sd": [f"{2 * value:.3f}" for value in weights["null_sd"]],
    }
    for column, label in (("ceiling_a", "two seeds, VLM"), ("ceiling_c", "two seeds, VLA")):
        columns |= {label: _signed(weights[column])} if column in weights else {}
    return pd.DataFrame(columns)


def weight_words(found: Divergence) -> str:
    """How to read the table of weights."""
    ceilings = found.told.get("ceilings", "missing, a single seed")
    return f"Change: |new − base| / |base|. Cosine: between both changes. Two seeds: of one training; {ceilings}."


def _percent(values: pd.Series) -> list[str | None]:
    return [None if value != value else f"{100 * value:.2f}" for value in values]


def _signed(values: pd.Series) -> list[str | None]:
    return [None if value != value else signed(value, 3) for value in values]


def gradient_table(found: Divergence) -> pd.DataFrame:
    """Per module group: the naive and the corrected cosine, its interval, and the signal-to-noise of one half-batch."""
    import pandas as pd

    rows = []
    for row in found.tables["gradients"].to_dict("records") if "gradients" in found.tables else []:
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


def gradient_words(found: Divergence) -> str:
    """How the gradients were measured, for a caption."""
    config = found.told["config"]
    if "gradients" not in found.tables:
        return "Gradients were not measured."
    return (
        f"{config['batches']} independent batches of {config['batch_size']} frames per loss; {found.told['head']}. "
        "Interval: bootstrap over batches; a dash where the noise leaves none."
    )


def interference_table(found: Divergence) -> pd.DataFrame:
    """What one step on one objective does to the loss of each, in per cent of the loss."""
    import pandas as pd

    rows = []
    for row in found.told.get("interference", ()):
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


# --- figures ----------------------------------------------------------------------------------------------


def weights_figure(found: Divergence) -> Figure:
    """Sizes and cosine of both changes, and the gradients' cosine, per module group."""
    from probes.figures_divergence import divergence_figure

    return divergence_figure(found.tables["weights"], found.tables.get("gradients"))


def figure_words(found: Divergence) -> str:
    """What the divergence figure shows, for readers who do not see it."""
    weights = found.tables["weights"]
    return (
        f"For {len(weights)} module groups from {weights['group'].iloc[0]} to {weights['group'].iloc[-1]}: the size of "
        "both changes, the cosine between them with its random null and two seeds of one training as its ceiling, and "
        "the cosine of the losses' gradients; the tables give the numbers."
    )


def pictures(found: Divergence, part: str) -> list[tuple[Figure, str]]:
    """Figures of one part (paths, gradients, representations, lines) with words for each; none if not measured."""
    from probes.figures_divergence import (
        gradients_figure,
        lines_figure,
        parting_figure,
        path_figure,
        plane_figure,
        representations_figure,
    )

    tables = found.tables
    if part == "gradients" and "gradients_all" in tables:
        words = "Noise-corrected gradient cosines per module group, with bands over batches; null 0, ceiling 1."
        return [(gradients_figure(tables["gradients_all"]), words)]
    if part == "paths" and "trajectory" in tables:
        path = tables["path"]
        runs, arms = path["run"].nunique(), tuple(path.groupby("run", sort=False)["arm"].first())
        points = path[["first", "second"]].to_numpy().reshape(runs, -1, 2)
        words = "Corrected cosine of both arms' displacements over steps with floor and ceiling, and the excess."
        told = "All runs on the first two principal components, and their shares beside walks without a plan."
        return [
            (parting_figure(tables["trajectory"], tables["parting"]), words),
            (path_figure(points, tables["path_shares"], arms), told),
        ]
    if part == "representations" and "cka" in tables:
        words = "Debiased CKA by layer with the base, above shuffled frames; scores of readouts carried from the base."
        return [(representations_figure(tables["readouts"], tables["cka"]), words)]
    if part == "lines" and "lines" in tables:
        words = "Both losses on the straight lines between base, VLM- and VLA-trained weights, with barriers."
        told = "Both losses on the plane that the two changes span."
        return [(lines_figure(tables["lines"], tables["barriers"]), words), (plane_figure(tables["plane"]), told)]
    return []


# --- what stands beside -----------------------------------------------------------------------------------


def badges(found: Divergence) -> list[str]:
    """Measured here, on whose weights and on which demonstrations."""
    origin = found.told["origin"]
    return ["measured", *data_badges(*origin.get("data", ())), *model_badges(found.told)]


def numbers(found: Divergence) -> dict[str, Any]:
    """What the page rests on, as JSON values."""
    known = (
        "total", "weights", "ceilings", "gradients", "head", "unmatched", "excluded", "verdict", "interference",
        "barriers", "parting", "path_shares", "spread", "cka", "readouts",
    )  # fmt: skip
    return {key: found.told[key] for key in known if key in found.told}
