"""Roll a policy out in a benchmark, closed loop, and keep one row per episode.

POLICY is a checkpoint or run folder, or a baseline: random, zero, mean-action (needs --data), scripted; or leave it out
and name a server of `vlm4vla serve` by --remote HOST:PORT.
Issuing the command again with more episodes runs only the missing ones.

Example: vlm4vla evaluate runs/walk/vla --benchmark tabletop-tasks@1 --tasks move touch --episodes 50
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from vlm4vla_core.remote import Remote


@dataclass(frozen=True)
class Args:
    benchmark: str
    """Protocol with its version, such as tabletop-tasks@1."""
    policy: Positional[str] = ""
    """Checkpoint or run folder, or random, zero, mean-action, scripted."""
    remote: str | None = None
    """HOST:PORT of a policy server, in place of POLICY."""
    token_file: Path | None = None
    """File with the server's token."""
    deterministic: bool = False
    """Predict one picture at a time, so that no rounding depends on the batch."""
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
    video: Path | None = None
    """Also film episodes of each task, with instruction and outcome, to this file (.mp4 or .gif)."""
    filmed: tuple[int, ...] = (0,)
    """Numbers of the episodes that are filmed."""
    json: Path | None = None
    """Also write the per-task table and the protocol as JSON."""


def run(args: Args) -> int:
    if args.benchmark.startswith("tabletop-vqa@"):
        from vlm4vla_core.vqa.benchmark import run as ask  # questions, not rollouts

        if args.remote:
            raise InputError("a policy server answers with actions, not with words", fix="give a checkpoint's folder")
        return ask(args)
    from vlm4vla_core.evaluation import evaluate, film
    from vlm4vla_core.film import check_ending
    from vlm4vla_core.results import wilson

    if args.video:
        check_ending(args.video)
    policy = _policy(args)
    out = args.out or _default_out(args, policy)
    rows = evaluate(
        policy, args.benchmark, out, tasks=args.tasks, episodes=args.episodes, execute=args.execute, data=args.data,
        deterministic=args.deterministic,
    )  # fmt: skip
    wanted = rows[rows["episode"] < args.episodes]
    if args.tasks:
        wanted = wanted[wanted["task"].isin(args.tasks)]
    k, n = int(wanted["success"].sum()), len(wanted)
    protocol = folders.read_manifest(out, "rollouts")["config"]["benchmark"]
    found = {"episodes": n, "successes": k, "rate": k / n, "interval": list(wilson(k, n))}
    found |= _tell(args, wanted, protocol, found)
    print(f"rows in {out / 'rows.parquet'}")
    if args.json:
        summary = {
            "policy": args.policy or args.remote,
            "benchmark": protocol,
            **found,
            "rows": str(out / "rows.parquet"),
        }
        folders.write_json(args.json, summary)
    if args.video:
        film(
            policy, args.benchmark, args.video,
            tasks=args.tasks, episodes=args.filmed, execute=args.execute, data=args.data,
        )  # fmt: skip
        print(f"film: {args.video}")
    return 0


def _tell(args: Args, rows: pd.DataFrame, protocol: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Print the result; returns what the JSON has beside the overall rate."""
    from vlm4vla_core.evaluation import bounded_mean, chain_summary
    from vlm4vla_core.results import success_table
    from vlm4vla_core.sims import coverage
    from vlm4vla_core.sims.tabletop.scenes import LONG

    table, part = success_table(rows, ["task"]), coverage(args.benchmark, rows["task"])
    rule = f"success rule {rows['success_rule'].iloc[0]}, Wilson intervals"
    print(f"{args.policy or args.remote} on {args.benchmark}, {part}; {rule}")
    looks = f"looks {', '.join(protocol['domains'])} (training: {', '.join(protocol['train_domains'])})"
    size, version = protocol["image_size"], protocol["world_version"]
    print(f"{protocol['title']}; {looks}, {size} px, built-in world version {version}")
    partial = rows["partial"].astype(float)
    if set(rows["task"]) <= set(LONG):
        spread = {task: bounded_mean(partial[rows["task"] == task].to_numpy(), 1.0) for task in table["task"]}
        table["partial"] = [float(partial[rows["task"] == task].mean()) for task in table["task"]]
        table["partial_low"], table["partial_high"] = zip(*spread.values(), strict=True)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    told = {"coverage": part, "tasks": table.to_dict("records")}
    (low, high), n = found["interval"], found["episodes"]
    print(f"together: {found['successes']} of {n} = {found['rate']:.3f} [{low:.3f}, {high:.3f}]", end="; ")
    if rows["chain"].notna().any():
        chains = chain_summary(rows["chain"].dropna().to_numpy(int))
        low, high = chains.interval
        print(f"mean length {chains.mean:.2f} of 5 [{low:.2f}, {high:.2f}] over {chains.n} chains, and of them reached")
        for step in chains.rates:
            print("  {at_least} or more: {rate:.3f} [{low:.3f}, {high:.3f}]".format(**step))
        told["chains"] = asdict(chains)
    elif "partial" in table:
        low, high = bounded_mean(partial.to_numpy(), 1.0)
        print(f"share of what was asked: {partial.mean():.3f} [{low:.3f}, {high:.3f}]", end="; ")
        told["partial"] = {"mean": float(partial.mean()), "interval": [low, high]}
    return told


def _policy(args: Args) -> str | Remote:
    """What is rolled out: the name that was given, or the policy behind a server."""
    if bool(args.policy) == bool(args.remote):
        raise InputError("give either a POLICY or --remote HOST:PORT")
    if not args.remote:
        return args.policy
    from vlm4vla_core.remote import Remote
    from vlm4vla_core.serve import read_token

    return Remote(args.remote, read_token(args.token_file), alone=args.deterministic)


def _default_out(args: Args, policy: str | Remote) -> Path:
    """A folder of its own for every checkpoint, protocol and execute length, so that rows are never mixed."""
    from vlm4vla_core.evaluation import BASELINES

    if args.policy in BASELINES:
        return Path("runs/eval") / args.policy / args.benchmark
    from vlm4vla_core import checkpoint

    tail = (f"-execute{args.execute}" if args.execute else "") + ("-deterministic" if args.deterministic else "")
    if not isinstance(policy, str):
        return Path("runs/eval") / f"remote-{policy.fingerprint[:12]}" / f"{args.benchmark}{tail}"
    folder = checkpoint.resolve(Path(policy))
    name = f"{args.benchmark}-{folder.name}{tail}"
    return (folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent) / "eval" / name
