"""Roll a policy out in a benchmark, closed loop, and keep one row per episode.

POLICY is a checkpoint or run folder, or a baseline: random, zero, mean-action (needs --data), scripted.
Issuing the command again with more episodes runs only the missing ones.

Example: vlm4vla evaluate runs/walk/vla --benchmark tabletop-tasks@1 --tasks move touch --episodes 50
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from vlm4vla_core import folders


@dataclass(frozen=True)
class Args:
    policy: Positional[str]
    """Checkpoint or run folder, or random, zero, mean-action, scripted."""
    benchmark: str
    """Protocol with its version, such as tabletop-tasks@1."""
    tasks: tuple[str, ...] = ()
    """Subset of the benchmark's tasks; all when left out."""
    episodes: int = 20
    """Episodes per task, numbered from 0 (fixed initial states)."""
    execute: int | None = None
    """Actions of each predicted chunk to carry out before replanning; the whole chunk when left out."""
    data: Path | None = None
    """Episode store, for mean-action."""
    out: Path | None = None
    """Folder of the rows; by default eval/… beside the checkpoints, or runs/eval/<baseline>/<benchmark>."""
    json: Path | None = None
    """Also write the per-task table and the protocol as JSON."""


def run(args: Args) -> int:
    if args.benchmark.startswith("tabletop-vqa@"):
        from vlm4vla_core.vqa.benchmark import run as ask  # questions, not rollouts

        return ask(args)
    from vlm4vla_core.evaluation import evaluate
    from vlm4vla_core.results import success_table, wilson
    from vlm4vla_core.sims import coverage

    out = args.out or _default_out(args)
    rows = evaluate(
        args.policy, args.benchmark, out,
        tasks=args.tasks, episodes=args.episodes, execute=args.execute, data=args.data,
    )  # fmt: skip
    wanted = rows[rows["episode"] < args.episodes]
    if args.tasks:
        wanted = wanted[wanted["task"].isin(args.tasks)]
    table = success_table(wanted, ["task"])
    k, n = int(wanted["success"].sum()), len(wanted)
    low, high = wilson(k, n)
    part = coverage(args.benchmark, wanted["task"])
    print(f"{args.policy} on {args.benchmark}, {part}; success rule {wanted['success_rule'].iloc[0]}, Wilson intervals")
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    print(f"together: {k} of {n} = {k / n:.3f} [{low:.3f}, {high:.3f}]; rows in {out / 'rows.parquet'}")
    if args.json:
        manifest = folders.read_manifest(out, "rollouts")
        folders.write_json(
            args.json,
            {
                "policy": args.policy,
                "benchmark": manifest["config"]["benchmark"],
                "coverage": part,
                "episodes": n,
                "successes": k,
                "rate": k / n,
                "interval": [low, high],
                "tasks": table.to_dict("records"),
                "rows": str(out / "rows.parquet"),
            },
        )
    return 0


def _default_out(args: Args) -> Path:
    """A folder of its own for every checkpoint, protocol and execute length, so that rows are never mixed."""
    from vlm4vla_core.evaluation import BASELINES

    if args.policy in BASELINES:
        return Path("runs/eval") / args.policy / args.benchmark
    from vlm4vla_core import checkpoint

    folder = checkpoint.resolve(Path(args.policy))
    name = f"{args.benchmark}-{folder.name}" + (f"-execute{args.execute}" if args.execute else "")
    return (folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent) / "eval" / name
