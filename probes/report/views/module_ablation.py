"""The view of `module_ablation`: what must be trained (freezing), what must be pretrained (scratch), and which head.

Trap: a frozen part makes steps cheaper, so equal steps are not equal compute; the longer arms stand for the latter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from probes.report.views import study as shared
from probes.report.views.study import ArmContrast, StudyTables

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

AXES = ("freezing", "scratch")


def found(study: StudyTables, axis: str, *, level: float = 0.95) -> list[ArmContrast]:
    """Every arm of freezing, scratch or heads beside full fine-tuning."""
    return shared.contrasts(study, axis, level=level)


def paper_table(name: str) -> pd.DataFrame:
    """The paper's table of `freezing` or `scratch`, each row against its baseline."""
    import pandas as pd

    from probes import tables
    from probes.numbers import signed, span

    table = tables.contrasts(name)  # type: ignore[arg-type]
    rows = []
    for row, holm in zip(table.rows, table.p_holm, strict=True):
        digits = 2 if row.metric == "avg_len" else 1
        rows.append({
            "model": row.model, "setting": row.setting, "benchmark": row.benchmark, "value": f"{row.value:g}",
            "baseline": f"{row.baseline:g}", "difference": signed(row.difference, digits),
            "95 %": span(*row.interval, digits), "p, Holm": f"{holm:.4f}", "flag": row.flag or None,
        })  # fmt: skip
    return pd.DataFrame(rows)


def figure(found: list[ArmContrast], name: str, *, stacked: bool = False) -> Figure:
    """Differences from full fine-tuning, here and in the paper."""
    from probes import tables

    papers = shared.paper_panels(tables.contrasts(name))  # type: ignore[arg-type]
    return shared.beside_the_paper(found, papers, stacked=stacked)


def answer(study: StudyTables, freezing: list[ArmContrast], scratch: list[ArmContrast]) -> str:
    """What freezing and starting from scratch did here, and in the paper."""
    from probes import tables

    told = []
    for name, words in (("freezing", "frozen parts"), ("scratch", "models from scratch")):
        table = tables.contrasts(name)  # type: ignore[arg-type]
        apart = [row for row, p in zip(table.rows, table.p_holm, strict=True) if p < 0.05]
        worse = sum(row.difference < 0 for row in apart)
        told.append(f"{worse} of {len(table.rows)} {words} were worse than their baseline")
    papers = f"In the paper {' and '.join(told)} (p below 0.05 after Holm)."
    return shared.answer(study, "freezing scratch", [*freezing, *scratch], papers)


def head_table(study: StudyTables) -> pd.DataFrame:
    """The heads that were run, each beside the one that it is compared with."""
    import pandas as pd

    from probes.numbers import plain

    names = [arm["name"] for arm in study.on("heads")]
    rows: list[dict[str, Any]] = []
    for one in shared.contrasts(study, "heads"):
        rows.append({
            "head": one.title, "backbone": one.backbone, "benchmark": one.protocol,
            "value": plain(one.value) if one.run else None, "against": plain(one.base) if one.run else None,
            "verdict": one.verdict,
        })  # fmt: skip
    return pd.DataFrame(rows or [{"head": ", ".join(names) or "none declared", "verdict": shared.NOT_RUN}])


def repeat_table(study: StudyTables) -> pd.DataFrame:
    """Policies whose head draws noise: how far runs of the same episodes with other draws lie apart, per policy."""
    import pandas as pd

    from probes.numbers import plain

    titles = {arm["name"]: arm["title"] for arm in study.on("heads")}
    rows: list[dict[str, Any]] = []
    keys = ["arm", "backbone", "protocol", "cell_seed"]
    for (arm, backbone, protocol, seed), part in study.repeats.groupby(keys, sort=False) if len(study.repeats) else ():
        outcome = part["chain" if part["chain"].notna().all() else "success"].astype(float)
        means = outcome.groupby(part["draw"]).mean()
        episodes = outcome.groupby([part["task"], part["episode"]])
        rows.append({
            "head": titles.get(arm, arm), "backbone": backbone, "benchmark": protocol, "training seed": int(seed),
            "draws": len(means), "lowest": plain(means.min()), "highest": plain(means.max()),
            "SD over draws": plain(means.std(ddof=1)),
            "episodes that differ": f"{int((episodes.max() > episodes.min()).sum())} of {episodes.ngroups}",
        })  # fmt: skip
    return pd.DataFrame(rows or [{"head": ", ".join(titles.values()) or "none declared", "draws": shared.NOT_RUN}])


def numbers(study: StudyTables, freezing: list[ArmContrast], scratch: list[ArmContrast]) -> dict[str, Any]:
    """What the page rests on, as JSON values."""
    told = {"freezing": shared.numbers(freezing), "scratch": shared.numbers(scratch)}
    return told | {"heads": shared.numbers(found(study, "heads")), "repeats": repeat_table(study).to_dict("records")}


def figure_words(found: list[ArmContrast], what: str) -> str:
    """What a figure shows, for readers who do not see it."""
    run = sum(one.run for one in found)
    return (
        f"Differences from full fine-tuning for {what}, with intervals: {run} of {len(found)} comparisons measured "
        "here, beside the paper's; the tables give the numbers."
    )
