"""The VLM4VLA paper's published numbers (`data/paper`), as the tidy rows that everything else reads.

    performance(), capability()      # what `correlate` takes by default: the nine VLMs of the arXiv version
    table("freeze_ablation")         # any table, with its quality filter and a `flag` on what does not add up

Every row keeps its `quality`; what that means stands in data/paper/README.md. Trap: `score` is a position on an
axis without numbers, so differences of it have no unit and its level no meaning.
"""

from __future__ import annotations

from functools import cache
from math import floor
from typing import TYPE_CHECKING, Literal, NamedTuple

from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.folders import shipped
from vlm4vla_core.results import CAPABILITY_COLUMNS, PERFORMANCE_COLUMNS, read_table

if TYPE_CHECKING:
    import pandas as pd

Version = Literal["arxiv", "openreview"]
Quality = Literal["printed", "usable", "all"]


class Vlm(NamedTuple):
    """family: the transformers model type; lineage: who trained it, and so what it shares with its siblings."""

    family: str
    lineage: str


VLMS = {
    "Kosmos-2": Vlm("kosmos2", "Kosmos"),
    "PaliGemma-1": Vlm("paligemma", "PaliGemma"),
    "PaliGemma-2": Vlm("paligemma2", "PaliGemma"),
    "Qwen2.5-VL-3B": Vlm("qwen2_5_vl", "Qwen"),
    "Qwen2.5-VL-7B": Vlm("qwen2_5_vl", "Qwen"),
    "Qwen3-VL-2B": Vlm("qwen3_vl", "Qwen"),
    "Qwen3-VL-4B": Vlm("qwen3_vl", "Qwen"),
    "Qwen3-VL-8B": Vlm("qwen3_vl", "Qwen"),
    "Qwen3-VL-30B-A3B": Vlm("qwen3_vl_moe", "Qwen"),
    "InternVL3.5-4B": Vlm("internvl", "InternVL"),
}
# Which VLMs each version of the paper correlates.
MODELS: dict[str, tuple[str, ...]] = {
    "arxiv": tuple(name for name in VLMS if name != "InternVL3.5-4B"),
    "openreview": tuple(name for name in VLMS if name not in ("Qwen3-VL-2B", "Qwen3-VL-8B", "Qwen3-VL-30B-A3B")),
}
EXPERTS = {"OpenVLA": Vlm("openvla", "Llama"), "pi0": Vlm("pi0", "PaliGemma")}
CAPABILITY_NAME = "VLM capability"
CAPABILITY_UNIT = "published figure position, tick units; absolute scale unknown"

_TABLES = (
    "main_results", "vlm_capability", "auxiliary_tasks", "freeze_ablation", "vision_injection", "from_scratch",
    "replication", "training_configs", "protocol",
)  # fmt: skip
_PRINTED = ("exact", "decoded-exact", "inferred")
_UNUSABLE = ("secondary-low", "secondary-conflict", "rejected")
_BRIDGE, _LIBERO, _CALVIN = "SimplerEnv-Bridge", "LIBERO-10", "CALVIN ABC-D"
# Episodes of one evaluation (protocol.csv): tasks x episodes a task; CALVIN counts chains of five.
_EPISODES = {_BRIDGE: (4, 24), _LIBERO: (10, 50), _CALVIN: (1, 1000)}
_SELECTION = "best over execution lengths (by one source also over checkpoints), on the reported episodes"


# --- tables ---------------------------------------------------------------------------------------------


def table(name: str, quality: Quality = "usable") -> pd.DataFrame:
    """One table of data/paper by its file name without `.csv`.

    quality: "printed" keeps what the authors printed or what follows from it exactly; "usable" also figure readings
    and quotations; "all" also what must not be built on. Tables of measurements get numbers in `value`, the digits
    in `printed`, and a `flag` that is empty unless the value contradicts its own episode count.
    Raises InputError for an unknown table or quality.
    """
    if name not in _TABLES:
        raise InputError(f"the paper has no table '{name}'", fix=nearest(name, _TABLES))
    if quality not in ("printed", "usable", "all"):
        raise InputError(f"no quality filter '{quality}'", fix=nearest(quality, ("printed", "usable", "all")))
    frame = _read(name).copy()
    if "quality" not in frame:
        return frame
    if quality == "printed":
        frame = frame[frame["quality"].isin(_PRINTED)]
    elif quality == "usable":
        frame = frame[~frame["quality"].isin(_UNUSABLE)]
    return frame.reset_index(drop=True)


@cache
def _read(name: str) -> pd.DataFrame:
    import pandas as pd

    path = shipped(f"data/paper/{name}.csv")
    frame = read_table(path, required=("model", "value") if name not in ("training_configs", "protocol") else ())
    if "quality" not in frame:
        return frame
    # Read again as text: 25.50 and 25.5 are two different statements about rounding.
    frame.insert(frame.columns.get_loc("value") + 1, "printed", pd.read_csv(path, dtype=str)["value"])
    for column in ("successes", "episodes"):
        frame[column] = frame[column].astype("Int64")
    for column in ("benchmark", "setting", "source", "note"):
        frame[column] = frame[column].fillna("").astype(str)
    frame["flag"] = [
        _flag(benchmark, metric, printed)
        for benchmark, metric, printed in zip(frame["benchmark"], frame["metric"], frame["printed"], strict=True)
    ]
    return frame


def _flag(benchmark: str, metric: str, printed: str) -> str:
    if metric != "success_pct" or benchmark not in _EPISODES:
        return ""
    tasks, episodes = _EPISODES[benchmark]
    return "" if fits_count(printed, tasks, episodes) else f"fits no count of {tasks * episodes}"


# --- do the printed percentages come from a count? --------------------------------------------------------


def fits_count(printed: str, tasks: int, episodes: int) -> bool:
    """Whether a printed percentage can come from `tasks` x `episodes` outcomes.

    Two origins are admitted, both found in the paper's tables: successes over all episodes, and the mean over tasks
    of percentages already rounded to whole numbers (halves to even, as Python and numpy do: 3/24 -> 12). Either may
    be rounded or cut to the printed decimals.
    """
    decimals = len(printed.partition(".")[2])
    wanted = round(float(printed) * 10**decimals)
    values = [100 * k / (tasks * episodes) for k in range(tasks * episodes + 1)]
    values += [total / tasks for total in _whole_percentage_sums(tasks, episodes)]
    for value in values:
        scaled = value * 10**decimals
        if wanted in (floor(scaled + 1e-9), floor(scaled + 0.5 + 1e-9), round(scaled)):
            return True
    return False


@cache
def _whole_percentage_sums(tasks: int, episodes: int) -> tuple[int, ...]:
    whole = {round(100 * k / episodes) for k in range(episodes + 1)}
    sums = {0}
    for _ in range(tasks):
        sums = {total + one for total in sums for one in whole}
    return tuple(sums)


# --- rows -------------------------------------------------------------------------------------------------


def performance(version: Version = "arxiv", *, tasks: bool = True, experts: bool = False) -> pd.DataFrame:
    """Published policy scores, PERFORMANCE_COLUMNS plus `selection` and `flag`.

    Rows with an empty `task` are a model's result on a benchmark (CALVIN: mean chain length, metric `avg_len`;
    Bridge and LIBERO-10: per cent). tasks=True adds what is known below that: Bridge by scene, with counts, and CALVIN
    by chain position (tasks `1 in a row` … `5 in a row`, metric `step_rate`, 0 to 1, read off a figure).
    experts=True adds OpenVLA and pi0, which are policies and have no VLM capability.

    `successes`: decoded (Bridge) or the one count of 500 that prints the value (LIBERO-10); empty for chains.
    version="openreview" gives that version's seven VLMs; its `flag` names InternVL3.5-4B, which the arXiv version
    dropped, and the LIBERO-10 score that was drawn otherwise than printed.
    """
    import pandas as pd

    models = {name: VLMS[name] for name in _models(version)} | (EXPERTS if experts else {})
    source = table("main_results")
    rows = []
    for row in source[source["model"].isin(models)].itertuples():
        task, metric, value = _place(row.benchmark, row.metric, row.value)
        if metric == "" or "earlier page" in row.setting or "as drawn" in row.setting or (task and not tasks):
            continue
        successes, episodes = row.successes, row.episodes
        if not task:
            successes, episodes = _counts(source, row.model, row.benchmark, row.value)
        flag = row.flag
        if version == "openreview" and "OpenReview version only" in row.setting:
            flag = "OpenReview version only"
        if version == "openreview" and (row.model, row.benchmark, task) == ("Qwen3-VL-4B", _LIBERO, ""):
            flag = "drawn at 54.2 in this version's figure"
        rows.append(
            (row.model, *models[row.model], row.benchmark, task, metric, value, successes, episodes, row.source,
             row.quality, _SELECTION, flag)
        )  # fmt: skip
    frame = pd.DataFrame(rows, columns=[*PERFORMANCE_COLUMNS, "selection", "flag"])
    frame[["successes", "episodes"]] = frame[["successes", "episodes"]].astype("Int64")
    order = {name: position for position, name in enumerate(models)}
    return frame.sort_values("model", key=lambda names: names.map(order), kind="stable").reset_index(drop=True)


def _place(benchmark: str, metric: str, value: float) -> tuple[str, str, float]:
    """(task, metric, value) of a row of the main table; an empty metric means: not a row of its own."""
    kind, _, part = metric.partition(":")
    if metric in ("avg_len", "success_pct"):
        return "", metric, value
    if part.startswith("task") and benchmark == _CALVIN:
        return f"{part.removeprefix('task').partition('_')[0]} in a row", "step_rate", value
    if kind == "success_pct" and part and not part.startswith("mean_of"):
        return part, kind, value
    return "", "", value


def _counts(source: pd.DataFrame, model: str, benchmark: str, value: float) -> tuple[int | None, int | None]:
    tasks, episodes = _EPISODES[benchmark]
    total = tasks * episodes
    if benchmark == _CALVIN:
        return None, total
    if benchmark == _BRIDGE:
        mean = source[(source["model"] == model) & (source["metric"] == "success_pct:mean_of_4_from_counts")]
        return (int(mean["successes"].iloc[0]), total) if len(mean) == 1 else (None, total)
    exact = value * total / 100  # LIBERO-10: 0.2 points an episode, printed to 0.1
    return (round(exact), total) if abs(exact - round(exact)) < 1e-6 else (None, total)


def capability(version: Version = "arxiv") -> pd.DataFrame:
    """Where each VLM stands in the paper's scatter, CAPABILITY_COLUMNS plus `unit`.

    score: position in ticks of an axis without numbers, read at pixel level (error about 0.003, which is the reading's
    and not the evaluation's: the standard error of the capability itself is unknown, so `stderr` is empty).
    """
    import pandas as pd

    models = _models(version)
    source = table("vlm_capability")
    label = {"arxiv": "arXiv", "openreview": "OpenReview"}[version]
    source = source[(source["metric"] == "x_position_in_tick_units") & (source["setting"] == label)].set_index("model")
    rows = [
        (model, *VLMS[model], CAPABILITY_NAME, float(source.at[model, "value"]), None, None, "unknown", label,
         source.at[model, "source"], source.at[model, "quality"], CAPABILITY_UNIT)
        for model in models
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=[*CAPABILITY_COLUMNS, "unit"])
    frame["stderr"], frame["n"] = frame["stderr"].astype(float), frame["n"].astype("Int64")
    return frame


def _models(version: str) -> tuple[str, ...]:
    if version not in MODELS:
        raise InputError(f"the paper has no version '{version}'", fix=nearest(version, MODELS))
    return MODELS[version]
