"""Roll a policy out in a benchmark, closed loop, and keep one row per episode.

POLICY is a checkpoint or run folder, or a baseline: random, zero, mean-action (needs --data), scripted; or leave it out
and name a server of `vlm4vla serve` by --remote HOST:PORT. Benchmarks are the built-in tabletop-…, and where they are
installed (`vlm4vla doctor` says) libero-…, simpler-… and calvin-….
Issuing the command again runs only the missing episodes.

Example: vlm4vla evaluate runs/walk/vla --benchmark tabletop-tasks@1 --tasks move touch --episodes 50
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from vlm4vla_core.evaluation import Plan
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
    """Episode store, for mean-action and for --blind image."""
    draw: int | None = None
    """Number of the noise of a policy with a sampling head (flow), drawn anew at every look: the same episodes with
    another one are another result. When left out, every look has the noise of seed 0."""
    ensemble: Literal["none", "temporal"] = "none"
    """Average the chunks that overlap in time (with --execute shorter than the chunk)."""
    blind: Literal["none", "image", "language"] = "none"
    """Shortcut check: show the policy the mean picture of --data at every step, or ask it without words."""
    options: tuple[str, ...] = ()
    """NAME=VALUE of a simulator's protocol, such as settle=acting crop=0.9 (docs/simulators.md)."""
    assets: Path | None = None
    """Folder with the simulators' assets (libero/, simpler/, calvin/); else VLM4VLA_SIM_ASSETS and their own places."""
    calvin_root: Path | None = None
    """CALVIN's checkout; else CALVIN_ROOT."""
    device: str = "cpu"
    """Where a checkpoint predicts: cpu, cuda, cuda:1."""
    workers: int | None = None
    """Processes that step simulators, one per core when left out; given for the tabletop world, it runs there too."""
    shard: str | None = None
    """i/n: run every n-th episode from the i-th on, on one machine of n; then --merge."""
    merge: bool = False
    """Run nothing: put the n shards of this evaluation together."""
    timeout: float = 300.0
    """Seconds without a sign of life after which a worker is replaced."""
    out: Path | None = None
    """Folder of the rows; by default eval/… beside the checkpoints, or runs/eval/<baseline>/<benchmark>."""
    video: str | None = None
    """Film: of so many episodes of each task, a file each, beside the rows; or, in the tabletop world, one file (.mp4,
    .gif) of the episodes --filmed."""
    filmed: tuple[int, ...] = (0,)
    """Numbers of the episodes in the one file."""
    json: Path | None = None
    """Also write the per-task table and the protocol as JSON."""


def run(args: Args) -> int:
    if args.benchmark.startswith("tabletop-vqa@"):
        from vlm4vla_core.vqa.benchmark import run as ask  # questions, not rollouts

        if args.remote:
            raise InputError("a policy server answers with actions, not with words", fix="give a checkpoint's folder")
        if args.draw is not None:
            raise InputError("answers in words are not drawn", fix="leave --draw out")
        return ask(args)
    from vlm4vla_core.evaluation import Plan, evaluate, film, merge
    from vlm4vla_core.film import check_ending
    from vlm4vla_core.results import wilson
    from vlm4vla_core.sims.simulator import name_folders

    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers must be at least 1, got {args.workers}")
    name_folders(args.assets, args.calvin_root)
    one_film = Path(args.video) if args.video and not args.video.isdigit() else None
    if one_film:
        check_ending(one_film)
    shard = _shard(args)
    policy = _policy(args)
    out = args.out or _default_out(args, policy)
    plan = Plan(
        policy, args.benchmark, args.tasks, args.episodes, args.execute, args.data, args.deterministic, args.options,
        args.ensemble, args.blind, args.device, args.draw,
    )  # fmt: skip
    if args.merge:
        rows = merge(plan, out)
    else:
        films = _films(plan, out, int(args.video)) if args.video and not one_film else {}
        rows = evaluate(plan, out, workers=args.workers, shard=shard, films=films, timeout=args.timeout)
    wanted = rows[rows["episode"] < args.episodes]
    if args.tasks:
        wanted = wanted[wanted["task"].isin(args.tasks)]
    if shard != (1, 1):
        print(
            f"shard {args.shard}: {len(wanted)} episodes; when all are there, issue this with --merge, without --shard"
        )
        return 0
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
    if one_film:
        film(plan, one_film, episodes=args.filmed)
        print(f"film: {one_film}")
    elif args.video:
        print(f"films in {_films_folder(out)}")
    return 0


def _shard(args: Args) -> tuple[int, int]:
    if args.shard is None:
        return 1, 1
    index, _, total = args.shard.partition("/")
    if args.merge or not (index.isdigit() and total.isdigit() and 1 <= int(index) <= int(total)):
        raise InputError(f"--shard '{args.shard}' is no share", fix="give i/n with 1 <= i <= n, and --merge without it")
    return int(index), int(total)


def _films_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}-films")


def _films(plan: Plan, out: Path, count: int) -> dict[tuple[str, int], Path]:
    """Where the films of the first episodes go; those of the tabletop world are made here, by one more run."""
    from vlm4vla_core.evaluation import film
    from vlm4vla_core.sims import SimulatorBenchmark

    found = plan.checked()
    wanted = {
        (task, episode): _films_folder(out) / f"{task}-{episode:03d}.mp4"
        for task, episode in found.cells
        if episode < count
    }
    if not isinstance(found.bench, SimulatorBenchmark):
        for (task, episode), path in wanted.items():
            if not path.exists():
                film(replace(plan, tasks=(task,)), path, episodes=(episode,))
    return wanted


def _tell(args: Args, rows: pd.DataFrame, protocol: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Print the result; returns what the JSON has beside the overall rate."""
    from vlm4vla_core.evaluation import bounded_mean, chain_summary
    from vlm4vla_core.results import success_table
    from vlm4vla_core.sims import coverage
    from vlm4vla_core.sims.tabletop.scenes import LONG

    if "success_last" in rows and set(rows["success_rule"]) == {"last_step"}:
        told_ever = {task: int(group["success_ever"].sum()) for task, group in rows.groupby("task", sort=False)}
    else:
        told_ever = {}
    table, part = success_table(rows, ["task"]), coverage(args.benchmark, rows["task"], rows["episode"].nunique())
    rule = f"success rule {rows['success_rule'].iloc[0]}, Wilson intervals"
    print(f"{args.policy or args.remote} on {args.benchmark}, {part}; {rule}")
    print(_protocol_line(args, rows, protocol))
    partial = rows["partial"].astype(float)
    if "domains" not in protocol or set(rows["task"]) <= set(LONG):
        spread = {task: bounded_mean(partial[rows["task"] == task].to_numpy(), 1.0) for task in table["task"]}
        table["partial"] = [float(partial[rows["task"] == task].mean()) for task in table["task"]]
        table["partial_low"], table["partial_high"] = zip(*spread.values(), strict=True)
    if told_ever:  # beside the rule, so that nobody needs to guess which one a published number followed
        table["ever"] = [told_ever[task] for task in table["task"]]
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


def _protocol_line(args: Args, rows: pd.DataFrame, protocol: dict[str, Any]) -> str:
    """What the numbers were obtained with."""
    words = [protocol["title"]]
    if "domains" in protocol:
        looks = f"looks {', '.join(protocol['domains'])} (training: {', '.join(protocol['train_domains'])})"
        words.append(f"{looks}, {protocol['image_size']} px, built-in world version {protocol['world_version']}")
    else:
        from vlm4vla_core.sims import benchmark

        bench = benchmark(args.benchmark)
        words += [" ".join(f"{name}={value}" for name, value in bench.chosen(args.options).items())]
    executed = ", ".join(map(str, sorted(set(rows["execute"]))))
    words += [f"executes {executed}" + (f", ensembling {args.ensemble}" if args.ensemble != "none" else "")]
    words += [f"without {args.blind}"] if args.blind != "none" else []
    words += [f"noise drawn anew at every look, draw {args.draw}"] if args.draw is not None else []
    return "; ".join(word for word in [*words, *sorted(set(rows["note"].dropna()))] if word)


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

    tail = "".join(f"-{option}" for option in args.options)
    if args.policy in BASELINES:
        return Path("runs/eval") / args.policy / f"{args.benchmark}{tail}"
    from vlm4vla_core import checkpoint

    tail += (f"-execute{args.execute}" if args.execute else "") + ("-deterministic" if args.deterministic else "")
    tail += f"-{args.ensemble}" if args.ensemble != "none" else ""
    tail += f"-blind-{args.blind}" if args.blind != "none" else ""
    tail += f"-draw{args.draw}" if args.draw is not None else ""
    if not isinstance(policy, str):
        return Path("runs/eval") / f"remote-{policy.fingerprint[:12]}" / f"{args.benchmark}{tail}"
    folder = checkpoint.resolve(Path(policy))
    name = f"{args.benchmark}-{folder.name}{tail}"
    return (folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent) / "eval" / name
