"""What the study notebooks share: opening a study, its arms beside what they are compared with, forests, and "not run".

    study = open_study(Path("studies/nano.toml"))        # or a study's folder, or a bundle
    found = contrasts(study, "freezing")                 # one per arm, backbone and benchmark, run or not

A contrast is told apart only when both agree: the paired test over initial states (Holm over the contrasts of one axis
and benchmark), which is about these checkpoints, and Welch's interval over training seeds, which is about the training.

Trap: an arm that did not learn its first stage's task tests nothing; `learnt` has to be read beside every contrast.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.numbers import signed, span
from vlm4vla_core import folders

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probes.figures_compare import Line
    from probes.tables import Contrasts

NOT_RUN = "not run yet"
_ENOUGH = 3  # training seeds that a conclusion takes


@dataclass(frozen=True)
class StudyTables:
    """A study as far as it is done. file: what to give to `vlm4vla study run`. arms: name -> what it is. repeats: the
    rows of episodes that were run again with other draws of a head's noise; `episodes` is without them."""

    name: str
    question: str
    deviations: str
    file: str
    arms: dict[str, dict[str, Any]]
    cells: pd.DataFrame
    episodes: pd.DataFrame
    capability: pd.DataFrame
    performance: pd.DataFrame
    stages: pd.DataFrame
    repeats: pd.DataFrame

    def on(self, axis: str) -> list[dict[str, Any]]:
        """The arms of one question."""
        return [arm for arm in self.arms.values() if axis in arm["axis"]]

    def command(self, axis: str = "") -> str:
        """What runs this question's cells."""
        return f"vlm4vla study run {self.file}" + (f" --only {axis}" if axis else "")


def open_study(path: Path) -> StudyTables:
    """Read a study's file, folder or bundle. Raises InputError when it is damaged."""
    from vlm4vla_core.study.collect import collect, performance

    if path.is_dir() and not (path / folders.MANIFEST).is_file():
        return _from_tables(path / "tables")
    if path.is_dir():
        from vlm4vla_core.study.bundle import open_bundle

        plan, out, file = open_bundle(path).plan(), path / "none", None
    else:
        from probes.report.study_params import study_folder
        from vlm4vla_core.study import expand, read_study

        plan = expand(read_study(path))
        out, file = study_folder(plan.study.name), path
    tables = collect(plan, out)
    return _made(
        tables.study, tables.cells, tables.episodes, tables.capability, performance(tables), tables.stages, file
    )


def _from_tables(folder: Path) -> StudyTables:
    import pandas as pd

    names = ("cells", "capability", "performance", "stages")
    found = {name: _read_csv(folder / f"{name}.csv") for name in names}
    episodes = pd.read_parquet(folder / "episodes.parquet")
    told = folders.read_json(folder / "study.json")
    return _made(told, found["cells"], episodes, found["capability"], found["performance"], found["stages"])


def _read_csv(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        frame = pd.read_csv(path)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    texts = {name: frame[name].fillna("") for name in ("freeze", "earlier", "lineage") if name in frame}
    return frame.assign(**texts)


def _made(
    told: dict[str, Any], cells: Any, episodes: Any, capability: Any, performance: Any, stages: Any,
    path: Path | None = None,
) -> StudyTables:  # fmt: skip
    """path: of the study's file; that of a folder or a bundle is not known, so it is taken for one that ships."""
    from probes.report.params import shown

    name = str(told["name"])
    file = path or Path("studies") / f"{name}.toml"
    if told.get("filled_by"):
        file = file.parent / str(told["filled_by"])
    arms = {arm["name"]: arm for arm in told["arms"]}
    once, repeats = episodes, episodes.iloc[:0]
    if "draw" in episodes:
        once, repeats = episodes[episodes["draw"].isna()], episodes[episodes["draw"].notna()]
    return StudyTables(
        name, told["question"], told["deviations"], shown(file), arms, cells, once, capability, performance, stages,
        repeats,
    )  # fmt: skip


# --- an arm beside what it is compared with ----------------------------------------------------------------------


@dataclass(frozen=True)
class ArmContrast:
    """An arm against another on one backbone and benchmark; without rows of both, only its names and `note`.

    value, base: success rate or mean chain length; difference with two intervals: over initial states (these
    checkpoints), and over training seeds (Welch; None below two of each). seeds: of the arm and of the other. p: of the
    paired test; p_holm over the contrasts of an axis and benchmark. learnt: how its first stage went, `no` or `yes`
    first, empty without one.
    """

    arm: str
    title: str
    against: str
    backbone: str
    protocol: str
    note: str = ""
    metric: str = "success"
    value: float = float("nan")
    base: float = float("nan")
    difference: float = float("nan")
    interval: tuple[float, float] | None = None
    training: tuple[float, float] | None = None
    seeds: tuple[int, int] = (0, 0)
    episodes: int = 0
    p: float = float("nan")
    p_holm: float = float("nan")
    learnt: str = ""

    @property
    def run(self) -> bool:
        return self.difference == self.difference

    @property
    def verdict(self) -> str:
        """higher, lower, undetermined; `not tested` where the first stage was not learnt; or what is missing."""
        if not self.run:
            return self.note
        if self.learnt.startswith("no"):
            return "not tested"
        if min(self.seeds) < _ENOUGH:
            return f"undetermined ({min(self.seeds)} of {_ENOUGH} seeds)"
        apart = self.training is not None and (self.training[0] > 0 or self.training[1] < 0)
        if not apart or self.p_holm >= 0.05:
            return "undetermined"
        return "higher" if self.difference > 0 else "lower"


def contrasts(study: StudyTables, axis: str, *, level: float = 0.95) -> list[ArmContrast]:
    """Every arm of a question beside the arm that it names, on each backbone and benchmark, in the order declared."""
    found: list[ArmContrast] = []
    for arm in study.on(axis):
        if not arm["against"]:
            continue
        mine = study.cells[study.cells["arm"] == arm["name"]]
        for (backbone, protocol), _ in mine.groupby(["backbone", "protocol"], sort=False):
            found.append(_contrast(study, arm, str(backbone), str(protocol), level))
    return _corrected(found)


def _contrast(study: StudyTables, arm: dict[str, Any], backbone: str, protocol: str, level: float) -> ArmContrast:
    from probes.compare import compare

    name, other = arm["name"], arm["against"]
    known = ArmContrast(name, arm["title"], other, backbone, protocol, learnt=learnt(study, name, backbone))
    rows = study.episodes
    if rows.empty:
        return replace(known, note=NOT_RUN)
    rows = rows[(rows["backbone"] == backbone) & (rows["protocol"] == protocol) & rows["arm"].isin([name, other])]
    missing = [one for one in (name, other) if not (rows["arm"] == one).any()]
    if missing:
        return replace(known, note=NOT_RUN if name in missing else f"{other}: {NOT_RUN}")
    rows = rows.assign(model=rows["arm"]).astype(object)
    result = compare(rows.where(rows.notna(), None), [name, other], benchmark=protocol, level=level)
    (one,) = result.differences
    means = {policy.name: policy for policy in result.policies}
    return replace(
        known, metric=result.metric, value=means[name].mean, base=means[other].mean, difference=one.difference,
        interval=(one.interval.low, one.interval.high) if one.interval else None,
        training=(one.training.low, one.training.high) if one.training else None,
        seeds=(len(means[name].by_seed), len(means[other].by_seed)), episodes=one.n, p=one.p,
    )  # fmt: skip


def _corrected(found: list[ArmContrast]) -> list[ArmContrast]:
    """Holm over the contrasts that were run, by benchmark."""
    from probes.permutation import holm

    corrected: dict[int, float] = {}
    for protocol in dict.fromkeys(one.protocol for one in found):
        places = [i for i, one in enumerate(found) if one.protocol == protocol and one.run]
        corrected |= dict(zip(places, holm([found[i].p for i in places]), strict=True))
    return [replace(one, p_holm=corrected.get(i, float("nan"))) for i, one in enumerate(found)]


_MEASURES = {"language": ("answer_accuracy", "answers right"), "fast": ("token_accuracy", "action tokens right")}


def learnt(study: StudyTables, arm: str, backbone: str) -> str:
    """What an arm's first stage did to its own held-out score: `yes, answers right 0.31 -> 0.62 (…)`; empty without a
    stage or before it was run.

    Learnt means: the 95 % interval (Wilson, of the held-out rows) after the last step lies above the score before the
    first one and above that of always giving the commonest answer; for dense targets, whose score is a loss, that it
    fell by a tenth. With several seeds, in each of them.
    """
    from vlm4vla_core.results import wilson

    mine = study.cells[(study.cells["arm"] == arm) & (study.cells["backbone"] == backbone)]
    jobs = list(dict.fromkeys(one for earlier in mine["earlier"] for one in str(earlier).split()))
    stages = study.stages[study.stages["id"].isin(jobs)] if len(study.stages) and jobs else study.stages.iloc[:0]
    if stages.empty:
        return ""
    verdicts, before, after, words = [], [], [], "loss"
    for _, part in stages.groupby("id", sort=False):
        start, end = (part[part["when"] == when].iloc[0] for when in ("start", "end"))
        column, words = _MEASURES.get(str(start["objective"]), ("loss", "held-out loss"))
        before.append(float(start[column]))
        after.append(float(end[column]))
        if column == "loss":
            verdicts.append(after[-1] < 0.9 * before[-1])
            continue
        rows = int(end["rows"])
        floor = max(before[-1], float(end.get("majority", 0.0) or 0.0) if column == "answer_accuracy" else 0.0)
        verdicts.append(wilson(round(after[-1] * rows), rows)[0] > floor)
    mean = [sum(values) / len(values) for values in (before, after)]
    told = f"{words} {mean[0]:.2f} to {mean[1]:.2f}"
    return f"{'yes' if all(verdicts) else 'no'}, {told}" + (f", {len(verdicts)} seeds" if len(verdicts) > 1 else "")


# --- what is shown -------------------------------------------------------------------------------------------------


def contrast_table(found: list[ArmContrast], *, stage: bool = False) -> pd.DataFrame:
    """The contrasts as a reader wants them."""
    import pandas as pd

    several = len({one.backbone for one in found}) > 1, len({one.protocol for one in found}) > 1
    rows = []
    for one in found:
        digits = 2 if one.metric == "chain" else 3
        line = {"arm": one.title}
        line |= {"backbone": one.backbone} if several[0] else {}
        line |= {"benchmark": one.protocol} if several[1] else {}
        line |= {"first stage learnt?": one.learnt or ("–" if one.run else NOT_RUN)} if stage else {}
        shown = {
            "value": f"{one.value:.{digits}f}", "against": f"{one.base:.{digits}f}",
            "difference": signed(one.difference, digits),
            "over episodes": span(*one.interval, digits) if one.interval else None,
            "over seeds": span(*one.training, digits) if one.training else None,
            "seeds": f"{one.seeds[0]} and {one.seeds[1]}",
            "p, Holm": f"{one.p_holm:.3f}",
        }  # fmt: skip
        rows.append(line | (shown if one.run else dict.fromkeys(shown)) | {"verdict": one.verdict})
    return pd.DataFrame(rows)


CAPTION = (
    "Mean tasks done in a row (chains) or success rate, over all training seeds. Intervals (95 %): over initial "
    "states, for these checkpoints; over training seeds (Welch), for the training. Higher or lower only where both "
    "agree, with at least three seeds of each arm and p corrected over the arms of this question; an arm that did not "
    "learn its first stage's task is not tested."
)


def beside_the_paper(
    found: list[ArmContrast], papers: list[tuple[str, list[Line], str]], *, stacked: bool = False, note: str = ""
) -> Figure:
    """Left the differences measured here, one panel per benchmark; right the paper's, in its own units.

    papers: (title, lines, unit) of each of the paper's panels. stacked: one below the other, for a phone. note: on
    what is drawn filled.
    """
    from probes.figures_compare import forest
    from probes.style import MUTED, SMALL, figure_style, new_figure

    own = [
        (_title(protocol), _own_lines([one for one in found if one.protocol == protocol]), _unit(found, protocol))
        for protocol in dict.fromkeys(one.protocol for one in found)
    ]
    with figure_style():
        if stacked:
            panels = [*own, *papers]
            heights = [0.66 + 0.17 * tall(lines) for _, lines, _ in panels]
            fig, axes = new_figure(len(panels), 1, width=3.3, height=sum(heights) + 0.25, height_ratios=heights)
            placed = list(zip(axes.flat, panels, strict=True))
        else:
            rows = max(len(own), len(papers))
            heights = [
                0.66 + 0.17 * max(tall(side[i][1]) if i < len(side) else 0 for side in (own, papers))
                for i in range(rows)
            ]
            fig, axes = new_figure(rows, 2, width=7.2, height=sum(heights) + 0.25, height_ratios=heights)
            placed = []
            for column, side in enumerate((own, papers)):
                placed += [(axes[i, column], panel) for i, panel in enumerate(side)]
                for i in range(len(side), rows):
                    axes[i, column].set_axis_off()
        for ax, (title, lines, unit) in placed:
            ax.set_title(title, fontsize=7.5, loc="right")  # to the left there is room
            if not lines:
                ax.set_axis_off()
                ax.text(1, 0.5, NOT_RUN, transform=ax.transAxes, ha="right", va="center", color=MUTED)
                continue
            forest(ax, lines)
            ax.set_xlabel(unit)
        fig.supxlabel("95 %; filled: told apart" + (f" {note}" if note else ""), fontsize=SMALL, color=MUTED)
    return fig


def _own_lines(found: list[ArmContrast]) -> list[Line]:
    """The lines of a panel; none while nothing of it was run, since the table below it names every arm."""
    return forest_lines(found) if any(one.run for one in found) else []


def tall(lines: list[Line]) -> int:
    """Lines of text that these take."""
    return sum(line.label.count("\n") + 1 for line in lines)


def _title(protocol: str) -> str:
    return f"Here: {protocol}"


def _unit(found: list[ArmContrast], protocol: str) -> str:
    metrics = {one.metric for one in found if one.protocol == protocol and one.run}
    return "difference of mean tasks in a row" if metrics == {"chain"} else "difference of success rate"


def forest_lines(found: list[ArmContrast], *, headings: bool = True) -> list[Line]:
    """One line per contrast; several backbones stand under headings, or with their names behind the arm's."""
    from probes.figures_compare import Line
    from vlm4vla_core.results import Interval

    lines: list[Line] = []
    several = len({one.backbone for one in found}) > 1
    for backbone in dict.fromkeys(one.backbone for one in found):
        if several and headings:
            lines.append(Line(backbone, 0, None, False, heading=True))
        for one in (one for one in found if one.backbone == backbone):
            shown = one.training or one.interval
            note = signed(one.difference, 2) if one.run else NOT_RUN
            mark = " (not tested)" if one.verdict == "not tested" else ""
            label = one.title if headings or not several else f"{one.title}, {backbone}"
            lines.append(
                Line(wrapped(label), one.difference, Interval(*shown) if shown else None,
                     one.verdict in ("higher", "lower"), note + mark)
            )  # fmt: skip
    return lines


def wrapped(text: str, width: int = 34) -> str:
    """Text in lines that a figure's margin can hold."""
    import textwrap

    return textwrap.fill(text, width)


def paper_panels(table: Contrasts, label: Any = None) -> list[tuple[str, list[Line], str]]:
    """The paper's contrasts as panels of `beside_the_paper`. label: row -> its line's words."""
    from probes.figures_compare import Line

    panels = []
    for benchmark in dict.fromkeys(row.benchmark for row in table.rows):
        rows = [(row, p) for row, p in zip(table.rows, table.p_holm, strict=True) if row.benchmark == benchmark]
        chain = rows[0][0].metric == "avg_len"
        lines = [
            Line(wrapped(label(row) if label else row.label), row.difference, row.interval, p < 0.05,
                 signed(row.difference, 2 if chain else 1)) for row, p in rows
        ]  # fmt: skip
        unit = "difference of mean tasks in a row" if chain else "difference of success, points"
        panels.append((f"Paper: {benchmark}", lines, unit))
    return panels


def answer(study: StudyTables, axis: str, found: list[ArmContrast], papers: str) -> str:
    """One sentence: what this question's arms showed here, or that they were not run, beside the paper's."""
    run = [one for one in found if one.run]
    if not run:
        return f"Here this was {NOT_RUN} ({study.command(axis)}). {papers}"
    parts = []
    for word in ("higher", "lower"):
        chosen = [one for one in run if one.verdict == word]
        if chosen:
            parts.append(f"{word} than its baseline: " + "; ".join(map(_told, chosen)))
    untested = [one for one in run if one.verdict == "not tested"]
    open_ones = len(run) - sum(one.verdict in ("higher", "lower", "not tested") for one in run)
    if open_ones:
        parts.append(f"{open_ones} undetermined")
    if untested:
        parts.append(f"{len(untested)} not tested, since the first stage did not learn its task")
    left = len(found) - len(run)
    tail = f"; {left} {NOT_RUN}" if left else ""
    return f"Of {len(run)} comparisons on the built-in world, {'; '.join(parts)}{tail}. {papers}"


def _told(one: ArmContrast) -> str:
    digits = 2 if one.metric == "chain" else 3
    where = f"{one.title} ({one.backbone}, {one.protocol})"
    return f"{where} {signed(one.difference, digits)}" + (f", {span(*one.training, digits)}" if one.training else "")


def badges(study: StudyTables, *, paper: bool = True) -> list[str]:
    """Where the numbers come from."""
    kinds = set(study.episodes["provenance"]) if len(study.episodes) else set()
    found = ["measured: rows that ship with the project"] if "shipped" in kinds else []
    found += ["measured"] if "run here" in kinds else []
    found += ["built-in", "scripted"] if kinds else []
    return found + (["published: data/paper"] if paper else []) or ["built-in"]


def numbers(found: list[ArmContrast]) -> list[dict[str, Any]]:
    """Contrasts as JSON values."""
    from dataclasses import asdict

    from probes.jsonable import jsonable

    return [dict(jsonable(asdict(one))) | {"verdict": one.verdict} for one in found]
