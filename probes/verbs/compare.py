"""Compare policies on the same initial states: how far apart, with what interval, and who cannot be told apart.

POLICIES are called by the folder that `vlm4vla evaluate` wrote, by model, MODEL@STEP or run_id; without names every
policy in the rows is ranked. Episodes are paired on task, episode and env_seed; what cannot be paired is left out and
listed. Two policies: exact McNemar test, Tango's score interval of the difference, a bootstrap over
initial states beside it, all tasks together and each by itself. Chains of tasks: mean length, the five step rates,
exact sign-flip test. Several: a ranked table, Holm over all pairs, letters for groups that cannot be told apart.

The paper's own comparisons, with the noise of their episodes, are shown by --paper.

Example: vlm4vla compare vla random --episodes runs/walk/eval/vla runs/walk/eval/random
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from probes.verbs.text import columns, p_value, say, signed_span
from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from probes.compare import Comparison, Difference, Rate
    from probes.tables import Auxiliary, AuxiliaryTable, Contrasts


@dataclass(frozen=True)
class Args:
    policies: Positional[tuple[str, ...]] = ()
    """Two policies or more; all in the rows when left out."""
    episodes: tuple[Path, ...] = ()
    """Episode rows: parquet or CSV files, or folders written by vlm4vla evaluate."""
    all: bool = False
    """Rank every policy in the rows."""
    metric: Literal["success", "chain"] | None = None
    """success, or chain for the number of tasks done in a row; chain where the rows state chains."""
    benchmark: str | None = None
    """Which benchmark or protocol, when the rows hold several."""
    unpaired: bool = False
    """Take the episodes as independent samples: Newcombe's interval, Fisher's exact test."""
    any_execute: bool = False
    """Compare although the policies executed different numbers of actions between two looks."""
    paper: Literal["freezing", "injection", "auxiliary", "scratch"] | None = None
    """One of the paper's tables instead of episode rows."""
    level: float = 0.95
    """Confidence level of the intervals."""
    seed: int = 0
    """Seed of the bootstrap."""
    json: Path | None = None
    """Also write everything as JSON."""
    plot: Path | None = None
    """Also draw a forest plot; .png and .svg are both written, .pdf when asked for."""


def run(args: Args) -> int:
    from probes.style import check_plot
    from probes.verbs.shared import check_seed

    check_seed(args.seed)
    check_plot(args.plot)
    if not 0.5 <= args.level < 1:
        raise InputError(f"level {args.level:g}", fix="use --level between 0.5 and 1, such as 0.95")
    if args.paper:
        if args.policies or args.episodes:
            raise InputError("--paper compares what the paper compared", fix="leave policies and --episodes out")
        return _paper(args)
    if args.policies and args.all:
        raise InputError("--all ranks every policy", fix="leave the names out, or --all")

    from probes.compare import compare
    from probes.episode_rows import read_rows

    rows = read_rows(args.episodes)
    result = compare(
        rows, args.policies, metric=args.metric, paired=not args.unpaired, benchmark=args.benchmark,
        any_execute=args.any_execute, level=args.level, seed=args.seed,
    )  # fmt: skip
    _print(result)
    if args.json:
        files = [path / "rows.parquet" if path.is_dir() else path for path in args.episodes]
        inputs = {str(path): folders.file_fingerprint(path) for path in files}
        _write(args.json, "comparison", {"inputs": inputs, **result.to_dict()})
    if args.plot:
        from probes.figures_compare import comparison_forest

        _draw(args.plot, comparison_forest(result))
    return 0


def _write(path: Path, kind: str, values: dict[str, object]) -> None:
    folders.write_json(path, {"format": f"vlm4vla-{kind}", "version": 1, **values})


def _draw(path: Path, figure: Figure) -> None:
    from probes.style import save_plot

    print(f"\nfigure: {' and '.join(map(str, save_plot(figure, path)))}")


# --- the paper's tables ---------------------------------------------------------------------------------------


_CONTRAST_HEAD = ("model", "setting", "value", "baseline", "difference", "95 %", "p", "Holm", "flag")
_AUXILIARY_HEAD = ("model", "extra VLM training", "best", "median", "worst", "baseline", "medians apart", "ranges")


def _paper(args: Args) -> int:
    from probes import tables

    table: Contrasts | AuxiliaryTable
    table = tables.auxiliary() if args.paper == "auxiliary" else tables.contrasts(args.paper)  # type: ignore[arg-type]
    print(f"The paper's table of {args.paper} (published numbers, data/paper)\n")
    if isinstance(table, tables.AuxiliaryTable):
        print(columns([_auxiliary_row(row) for row in table.rows], _AUXILIARY_HEAD))
    else:
        for benchmark in dict.fromkeys(row.benchmark for row in table.rows):
            unit = "success, %" if benchmark == tables.BRIDGE else "mean tasks in a row"
            print(f"{benchmark} ({unit}), against {_against(table, benchmark)}")
            print(columns(_contrast_rows(table, benchmark), _CONTRAST_HEAD) + "\n")
    for note in table.notes:
        say(f"- {note}.")
    if args.json:
        _write(args.json, "paper-table", {"table": args.paper, **table.to_dict()})
    if args.plot:
        from probes.figures_compare import auxiliary_strip, contrast_forest

        _draw(args.plot, auxiliary_strip(table) if isinstance(table, tables.AuxiliaryTable) else contrast_forest(table))
    return 0


def _against(table: Contrasts, benchmark: str) -> str:
    return " / ".join(dict.fromkeys(row.against for row in table.rows if row.benchmark == benchmark))


def _contrast_rows(table: Contrasts, benchmark: str) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for row, holm in zip(table.rows, table.p_holm, strict=True):
        if row.benchmark != benchmark:
            continue
        digits = 1 if row.metric == "success_pct" else 2
        counts = f" ({' or '.join(map(str, row.counts))})" if row.counts else ""
        base = f" ({' or '.join(map(str, row.baseline_counts))})" if row.baseline_counts else ""
        rows.append(
            (row.model, row.setting, f"{row.value:g}{counts}", f"{row.baseline:g}{base}",
             f"{row.difference:+.{digits}f}", signed_span(row.interval, digits), p_value(row.p), p_value(holm),
             row.flag or "–")
        )  # fmt: skip
    return rows


def _auxiliary_row(row: Auxiliary) -> tuple[str, ...]:
    base = " / ".join(f"{value:.2f}" for value in row.baseline)
    return (
        row.model, row.task, f"{row.best:.2f}", f"{row.median:.2f}", f"{row.worst:.2f}", base,
        f"{row.difference:+.2f} ±{row.sampling:.2f}", row.verdict,
    )  # fmt: skip


# --- episode rows -------------------------------------------------------------------------------------------------


def _print(result: Comparison) -> None:
    chains = result.metric == "chain"
    kind = "the same initial states" if result.paired else "all episodes of each, as independent samples"
    what = "chains" if chains else "episodes"
    counts = dict.fromkeys(policy.success.episodes // len(policy.by_seed) for policy in result.policies)
    print(f"{len(result.policies)} policies on {result.protocol}, {' or '.join(map(str, counts))} {what}: {kind}")
    for name, left in result.unpaired.items():
        tasks = ", ".join(f"{task} {count}" for task, count in left.items())
        say(f"not paired, and left out: {sum(left.values())} episodes of {name} ({tasks})")
    percent = f"{100 * result.level:g} %"
    print(f"\n{'Best first' if len(result.policies) > 2 else 'Each policy'}")
    if chains:
        print(columns(_chain_rows(result), ("policy", "group", "mean length", percent, "1", "2", "3", "4", "5")))
        print("  1 to 5: share of chains with at least so many tasks done, Wilson interval below")
    else:
        head = ("policy", "group", "successes", "rate", f"Wilson {percent}", f"Clopper-Pearson {percent}")
        print(
            columns(
                [
                    _success_row(one.name, one.group if len(result.policies) > 2 else "", one.success)
                    for one in result.policies
                ],
                head,
            )
        )
    if len(result.policies) == 2:
        _two(result, percent)
    else:
        _many(result, percent)
    for policy in result.policies:
        if len(policy.by_seed) > 1:
            seeds = ", ".join(f"seed {seed} {value:.3f}" for seed, value in policy.by_seed.items())
            say(f"- {policy.name} by training seed: {seeds}.")
    for note in result.notes:
        say(f"- {note}.")


def _success_row(name: str, group: str, rate: Rate) -> tuple[str, ...]:
    exact = rate.clopper_pearson
    return (name, group, f"{rate.successes} of {rate.episodes}", f"{rate.rate:.3f}",
            f"{rate.wilson.low:.3f} to {rate.wilson.high:.3f}", f"{exact.low:.3f} to {exact.high:.3f}")  # fmt: skip


def _chain_rows(result: Comparison) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for one in result.policies:
        span = "–" if one.mean_interval is None else f"{one.mean_interval.low:.3f} to {one.mean_interval.high:.3f}"
        rows.append(
            (
                one.name,
                one.group if len(result.policies) > 2 else "",
                f"{one.mean:.3f}",
                span,
                *(f"{step.rate:.3f}" for step in one.step_rates),
            )
        )
        rows.append(("", "", "", "", *(f"{step.wilson.low:.2f}-{step.wilson.high:.2f}" for step in one.step_rates)))
    return rows


def _two(result: Comparison, percent: str) -> None:
    (whole,) = result.differences
    tasks = result.by_task if len(result.by_task) > 1 else ()
    print(f"\n{whole.a} minus {whole.b}")
    head = ("", "n", f"{whole.a} only", f"{whole.b} only", "both", "neither", "difference", percent, "bootstrap", "p",
            "mid-p", "Holm by task")  # fmt: skip
    print(columns([_difference_row(one, corrected=one is not whole) for one in (whole, *tasks)], head))
    print()
    verb = {"higher": "does better than", "lower": "does worse than"}.get(whole.verdict())
    verdict = f"{whole.a} {verb} {whole.b}" if verb else f"undetermined: {whole.a} and {whole.b} are not told apart"
    if any(len(policy.by_seed) > 1 for policy in result.policies):
        verdict += ", as these checkpoints go"
    span = "" if whole.interval is None else f", {percent} {signed_span(whole.interval, 3)}"
    say(f"{verdict} (difference {whole.difference:+.3f}{span}; {whole.test}, p {p_value(whole.p)}).")
    if whole.training is not None:
        say(f"- over training seeds (Welch): {percent} {signed_span(whole.training, 3)}.")
    interval = {"McNemar exact": "Tango's score interval", "Fisher exact": "Newcombe's interval"}.get(whole.test)
    if whole.bootstrap is None and result.paired:
        say("- no bootstrap interval: no outcome differs from another.")
    told = f"{interval or 'the interval'} of the difference; " if interval else ""
    beside = "bootstrap: BCa over initial states within tasks" if result.paired else "episodes as independent samples"
    say(f"- {percent}: {told}{beside}; every episode weighs the same.")


def _difference_row(one: Difference, *, corrected: bool) -> tuple[str, ...]:
    counts = (one.a_only, one.b_only, one.both, one.neither)
    return (
        one.task, str(one.n), *("–" if count is None else str(count) for count in counts), f"{one.difference:+.3f}",
        "–" if one.interval is None else signed_span(one.interval, 3),
        "–" if one.bootstrap is None or one.score is None else signed_span(one.bootstrap, 3),
        p_value(one.p), "–" if one.p_mid is None else p_value(one.p_mid), p_value(one.p_holm) if corrected else "–",
    )  # fmt: skip


def _many(result: Comparison, percent: str) -> None:
    print(f"\nPairs, Holm over all {len(result.differences)}: {result.differences[0].test}")
    rows = []
    for one in result.differences:
        span = "–" if one.interval is None else signed_span(one.interval, 3)
        rows.append(
            (f"{one.a} – {one.b}", f"{one.difference:+.3f}", span, p_value(one.p), p_value(one.p_holm), one.verdict())
        )
    print(columns(rows, ("pair", "difference", percent, "p", "Holm", "verdict")) + "\n")
    say("- group: policies that share a letter could not be told apart, which is not the same as being equal.")
    say("- intervals are for one pair at a time; p with Holm is for all of them.")
