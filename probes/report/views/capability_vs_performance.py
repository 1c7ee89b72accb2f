"""The view of `capability_vs_performance`: which tables, every pair's verdict and numbers, the sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probes.numbers import signed, span
from probes.verdict import hidden
from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from probes.correlation import Correlation
    from probes.report.params import CapabilityVsPerformanceParams


def tables(params: CapabilityVsPerformanceParams) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(capability, performance) rows: the files given, or the paper's published ones for the folder data/paper."""
    from probes import paper
    from vlm4vla_core.results import read_table

    shipped = folders.shipped("data/paper").resolve()
    for path in (params.capability, params.performance):
        if path.is_dir() and path.resolve() != shipped:
            raise InputError("a folder is no table", where=path, fix="give a CSV or parquet file, or data/paper")
    capability = paper.capability(params.version) if params.capability.is_dir() else read_table(params.capability)
    performance = paper.performance(params.version) if params.performance.is_dir() else read_table(params.performance)
    return capability, performance


def badges(params: CapabilityVsPerformanceParams, capability: pd.DataFrame, performance: pd.DataFrame) -> list[str]:
    """Published with the qualities of its rows, or given."""
    found = []
    for what, path, frame in (
        ("capability", params.capability, capability),
        (
            "performance",
            params.performance,
            performance[performance["task"] == ""] if "task" in performance else performance,
        ),
    ):
        if path.is_dir():
            found.append(f"published: {what}, {' and '.join(dict.fromkeys(frame['quality']))}")
        else:
            found.append(f"given: {what}")
    return found


def answer(result: Correlation) -> str:
    """One sentence: every pair's r with its interval, pairs of one verdict together."""
    several = len({pair.capability for pair in result.pairs}) > 1
    by_verdict: dict[str, list[str]] = {}
    for pair in result.pairs:
        name = f"{pair.benchmark} with {pair.capability}" if several else pair.benchmark
        told = f"{name} (r {signed(pair.pearson.r)}, 95 % {span(*pair.pearson.ci_fisher)})"
        by_verdict.setdefault(pair.verdict, []).append(told)
    parts = [f"on {' and '.join(names)} {verdict}" for verdict, names in by_verdict.items()]
    lineages = f" of {len(result.lineages)} lineages" if result.lineages else ""
    over = f"Over {len(result.models)} models{lineages}"
    return f"{over}, the correlation of VLM capability with policy success is {'; '.join(parts)}."


def pair_table(result: Correlation) -> pd.DataFrame:
    """One row per pair: r, its interval, p values, what leaving one model out does, and the verdict."""
    import pandas as pd

    rows = []
    for pair in result.pairs:
        ends = pair.leave_one_out_range()
        rows.append(
            {
                "capability": pair.capability,
                "benchmark": pair.benchmark,
                "n": pair.n,
                "Pearson r": signed(pair.pearson.r, 3),
                "95 % interval": span(*pair.pearson.ci_fisher),
                "p": f"{pair.pearson.p_exact:.4f}",
                "p, all pairs": f"{pair.p_max_r:.4f}",
                "p within lineages": None if pair.p_within_lineage is None else f"{pair.p_within_lineage:.4f}",
                "lowest r without": None if ends is None else f"{signed(ends[0][1])} {ends[0][0]}",
                "highest r without": None if ends is None else f"{signed(ends[1][1])} {ends[1][0]}",
            }
        )
    frame = pd.DataFrame(rows)
    return frame.drop(columns="capability") if frame["capability"].nunique() == 1 else frame


def noise_table(result: Correlation) -> pd.DataFrame:
    """One row per pair: can the benchmark tell the models apart, and what r is when its noise is carried through."""
    import pandas as pd

    rows = []
    for pair in result.pairs:
        alike, known, corrected, mixed = pair.homogeneity, pair.reliability, pair.attenuated, pair.mixed.pooled
        by_task = "" if known is None or known.stratified is None else f", by task {known.stratified:.2f}"
        told = None if corrected.r is None or corrected.ci is None else f"{signed(corrected.r)} ({span(*corrected.ci)})"
        rows.append(
            {
                "capability": pair.capability,
                "benchmark": pair.benchmark,
                "one rate for all, p": None if alike is None else f"{alike.p:.2g}",
                "totals, shuffled p": None
                if alike is None or alike.p_stratified is None
                else f"{alike.p_stratified:.3f}",
                "reliability": None if known is None else f"{known.pooled:.2f}{by_task}",
                "r corrected for noise": told or f"refused: {corrected.refused}",
                "log-odds per SD": None if mixed is None else f"{signed(mixed.slope)} ({span(*mixed.ci)})",
            }
        )
    frame = pd.DataFrame(rows).dropna(axis="columns", how="all")
    return frame.drop(columns="capability") if frame["capability"].nunique() == 1 else frame


def verdicts(result: Correlation) -> list[tuple[str, str]]:
    """(benchmark: verdict, the sentence that says why, and what its average hides) of every pair."""
    return [
        (f"{pair.benchmark}: {pair.verdict}", " ".join(f"{text}." for text in (pair.why, hidden(pair)) if text))
        for pair in result.pairs
    ]


def figure_words(result: Correlation) -> str:
    """What the scatter shows, for readers who do not see it."""
    parts = [f"{pair.benchmark}: r {signed(pair.pearson.r)} over {pair.n} models" for pair in result.pairs]
    panels = "Policy performance against VLM capability, one panel per benchmark, models coloured by lineage"
    return f"{panels}. {'; '.join(parts)}."
