"""Correlate VLM capability with VLA performance: what do these models show, and what do they leave open?

Without tables of your own it reads the published numbers of the paper (data/paper). A capability table needs the
columns model and score (and benchmark, if there are several scores); a performance table model, benchmark and value.
Optional columns make the report stronger: lineage, metric, successes, episodes, task (rows below a benchmark's
total), selection (how checkpoint and execute length were chosen); for capability also stderr, evaluator and unit.

The report asks in this order: can the benchmark tell these models apart at all, what is r (exact permutation p, Fisher
and BCa intervals), which model or lineage decides it, what does noise do to it, how many pairs were looked at, what
could so few models have shown, and one verdict per pair. "Undetermined" is an answer; "no correlation" is not.

Example: vlm4vla correlate --capability my_vlms.csv --performance my_policies.csv --plot scatter.png
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlm4vla_core import folders


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
    """Also draw the scatter; .png and .svg are both written, .pdf when asked for."""


def run(args: Args) -> int:
    from probes.style import check_plot
    from probes.verbs.shared import check_seed

    check_plot(args.plot)
    check_seed(args.seed)
    from probes import paper
    from probes.correlation import correlate
    from probes.verbs.correlate_report import print_report
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
    print_report(result, published)
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
        from probes.style import save_plot

        print(f"\nfigure: {' and '.join(map(str, save_plot(capability_scatter(result), args.plot)))}")
    return 0
