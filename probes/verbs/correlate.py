"""Correlate VLM capability with VLA performance: what do these models show, and what do they leave open?

Without tables of your own it reads the published numbers of the paper (data/paper). A capability table needs the
columns model and score (and benchmark, if there are several scores); a performance table model, benchmark and value.
Optional columns make the report stronger: lineage, metric, successes, episodes, task (rows below a benchmark's
total), selection (how checkpoint and execute length were chosen); for capability also stderr, evaluator and unit.

Every pair gets Pearson's r with its exact permutation p (two-sided, |r*| >= |r|) and Fisher interval, the p corrected
for looking at all pairs, r without each model, and one verdict. "Undetermined" is an answer; "no correlation" is not.

Example: vlm4vla correlate --capability my_vlms.csv --performance my_policies.csv --plot scatter.png
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from probes.correlation import Correlation, Pair


@dataclass(frozen=True)
class Args:
    capability: Path | None = None
    """Table of VLM scores, CSV or parquet; the paper's when left out."""
    performance: Path | None = None
    """Table of policy scores, CSV or parquet; the paper's when left out."""
    episodes: Path | None = None
    """Episode rows, CSV or parquet; their counts by task say how noisy a benchmark is."""
    primary: str | None = None
    """The pair that was planned, CAPABILITY:BENCHMARK; all others are then labelled exploratory."""
    seed: int = 0
    """Seed of what is drawn: permutations above ten models, bootstrap, stratified homogeneity test."""
    json: Path | None = None
    """Also write everything as JSON."""
    plot: Path | None = None
    """Also draw the scatter; .png and .svg are both written."""


def run(args: Args) -> int:
    if args.plot is not None and args.plot.suffix not in (".png", ".svg"):
        raise InputError(f"a plot is .png or .svg, not '{args.plot.suffix}'", where=args.plot)
    from probes.verbs.shared import check_seed

    check_seed(args.seed)
    from probes import paper
    from probes.correlation import correlate
    from vlm4vla_core.results import read_table

    origin = str(folders.shipped("data/paper"))
    capability = read_table(args.capability) if args.capability else paper.capability()
    performance = read_table(args.performance) if args.performance else paper.performance()
    rows = read_table(args.episodes) if args.episodes else None
    names = (str(args.capability or origin), str(args.performance or origin), str(args.episodes or ""))
    result = correlate(capability, performance, rows, primary=args.primary, seed=args.seed, names=names)
    published = [
        kind for kind, path in (("capability", args.capability), ("performance", args.performance)) if not path
    ]
    _print(result, published)
    if args.json:
        inputs = {
            kind: folders.file_fingerprint(path) if path else "published (data/paper)"
            for kind, path in (("capability", args.capability), ("performance", args.performance))
        }
        if args.episodes:
            inputs["episodes"] = folders.file_fingerprint(args.episodes)
        folders.write_json(
            args.json, {"format": "vlm4vla-correlation", "version": 1, "inputs": inputs, **result.to_dict()}
        )
    if args.plot:
        from probes.figures import capability_scatter
        from probes.style import save_figure

        svg, png = save_figure(capability_scatter(result), args.plot.with_suffix(""))
        print(f"\nfigure: {png} and {svg}")
    return 0


# --- what people read -------------------------------------------------------------------------------------


def _print(result: Correlation, published: Sequence[str]) -> None:
    for line in _design(result, published):
        _say(line)
    print("\nCan the benchmark tell these models apart?")
    benchmarks = _one_per_benchmark(result)
    if any(pair.reliability or pair.homogeneity for pair in benchmarks):
        print(_columns([_benchmark_row(pair) for pair in benchmarks], _BENCHMARK_HEAD))
    else:
        print("  not known: the tables state no successes and episodes")
    for pair in benchmarks:
        if line := _by_task(pair):
            _say(line, indent="  ")
    for capability in dict.fromkeys(pair.capability for pair in result.pairs):
        pairs = [pair for pair in result.pairs if pair.capability == capability]
        print(f"\n{capability} against")
        print(_columns([_pair_row(pair) for pair in pairs], _PAIR_HEAD))
        for pair in pairs:
            role = f" ({pair.role})" if pair.role else ""
            print(f"\n{pair.benchmark}{role}: {pair.verdict.upper()}")
            _say(f"{pair.why}.", indent="  ")
    print()
    _say(_legend(result))


_MEANING = {
    "lineage": "the models' lineages (lineage)",
    "successes": "how many episodes succeeded (successes)",
    "episodes": "how many episodes were run (episodes)",
    "selection": "how checkpoint and execute length were chosen (selection)",
    "stderr": "the capability score's own error (stderr)",
    "evaluator": "what evaluated the VLMs (evaluator)",
}


def _design(result: Correlation, published: Sequence[str]) -> list[str]:
    lineages = ", ".join(f"{name} {count}" for name, count in result.lineages.items())
    lines = [f"{len(result.models)} models" + (f" of {len(result.lineages)} lineages ({lineages})" if lineages else "")]
    if published:
        lines[0] += f"; {' and '.join(published)}: the paper's published numbers, quality in data/paper/README.md"
    for name, design in result.benchmarks.items():
        episodes = " or ".join(map(str, design["episodes"])) or "number not stated"
        tasks = f", {len(design['tasks'])} tasks" if design["tasks"] else ""
        lines.append(f"{name}: {design['metric'] or 'metric not stated'}, episodes a model: {episodes}{tasks}")
    chosen = dict.fromkeys(design["selection"] for design in result.benchmarks.values() if design["selection"])
    if chosen:
        lines.append(f"which policy was scored: {' / '.join(chosen)}")
    if result.not_stated:
        lines.append(f"not stated: {', '.join(_MEANING[column] for column in result.not_stated)}")
    if result.unmatched:
        lines.append("left out: " + "; ".join(f"{model} ({lack})" for model, lack in result.unmatched.items()))
    return lines


def _one_per_benchmark(result: Correlation) -> list[Pair]:
    return list({pair.benchmark: pair for pair in reversed(result.pairs)}.values())[::-1]


_BENCHMARK_HEAD = ("benchmark", "homogeneity", "p", "p by task", "reliability", "95 %", "expected |r| at most")


def _benchmark_row(pair: Pair) -> tuple[str, ...]:
    alike, known = pair.homogeneity, pair.reliability
    cells = ["–"] * 6
    if alike is not None:
        cells[0] = f"chi2 {alike.chi2:.2f} on {alike.df} df"
        cells[1] = _p(alike.p)
        cells[2] = "–" if alike.p_stratified is None else _p(alike.p_stratified)
    if known is not None:
        by_task = "" if known.stratified is None else f", {known.stratified:.2f} by task"
        cells[3] = f"{known.pooled:.2f}{by_task}"
        cells[4] = f"{known.ci.low:.2f} to {known.ci.high:.2f}"
        cells[5] = f"{known.best**0.5:.2f}"
    return (pair.benchmark, *cells)


def _by_task(pair: Pair) -> str:
    """Each task's own p, and what it means when tasks tell models apart that the average does not."""
    alike = pair.homogeneity
    if alike is None or not alike.per_task:
        return ""
    known = {task: p for task, p in alike.per_task.items() if p is not None}
    line = f"{pair.benchmark} by task: " + ", ".join(f"{task} p {_p(p)}" for task, p in known.items())
    if known and min(known.values()) * len(known) < 0.05 <= alike.p:  # Bonferroni over the tasks
        line += ". Models differ within tasks, and in the average these differences cancel or drown"
    return f"{line}."


_PAIR_HEAD = (
    "benchmark", "n", "Pearson r", "95 % Fisher", "exact p", "all pairs", "in lineage", "Spearman", "lowest without",
    "highest without",
)  # fmt: skip


def _pair_row(pair: Pair) -> tuple[str, ...]:
    ends = pair.leave_one_out_range()
    without = ("–", "–") if ends is None else tuple(f"{r:+.3f} {model}" for model, r in ends)
    drawn = "" if pair.p_method == "exact" else f" ±{pair.p_stderr:.1g}"
    return (
        pair.benchmark,
        str(pair.n),
        f"{pair.pearson.r:+.3f}",
        f"{pair.pearson.ci_fisher.low:+.2f} to {pair.pearson.ci_fisher.high:+.2f}",
        _p(pair.pearson.p_exact) + drawn,
        _p(pair.p_max_r),
        "–" if pair.p_within_lineage is None else _p(pair.p_within_lineage),
        f"{pair.spearman.r:+.2f} (p {_p(pair.spearman.p_exact)})",
        *without,
    )


def _legend(result: Correlation) -> str:
    smallest = max(pair.min_detectable_rho for pair in result.pairs)
    exact = all(pair.p_method == "exact" for pair in result.pairs)
    kind = "exact p: all arrangements of the models" if exact else "p: random arrangements, with their own error"
    return (
        f"{kind}, two-sided; all pairs: the same against the largest |r| of all {len(result.pairs)} pairs; in lineage: "
        f"only models of one lineage change places. Reliability is an upper bound: training seeds and the choice of "
        f"checkpoints are not in it. The smallest true correlation that so few models show with 80 % probability: "
        f"{smallest:.2f}."
    )


def _p(p: float) -> str:
    return f"{p:.4f}" if p >= 5e-5 else f"{p:.0e}"


def _columns(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """Left-aligned columns; one that is empty throughout is left out."""
    keep = [i for i in range(len(head)) if any(row[i] != "–" for row in rows)]
    table = [[row[i] for i in keep] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(keep))]
    lines = ("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in table)
    return "\n".join(f"  {line}" for line in lines)


def _say(text: str, indent: str = "") -> None:
    import shutil
    import textwrap

    width = min(shutil.get_terminal_size((110, 24)).columns, 110)
    print(textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent or "  "))
