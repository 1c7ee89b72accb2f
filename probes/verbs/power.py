"""What so many models and episodes can show about capability and performance, before they are paid for.

Given a true correlation between VLM capability and policy success: with what probability do so many models show it,
which correlation would they show with 80 %, how much of what separates them is sampling of episodes, and how many
models or episodes it would take. Exact distribution of Pearson's r under a bivariate normal; episodes are independent.
The capability score is taken as free of error and the models as independent draws: everything here is an upper bound.

What is not stated comes from the paper's nine models on one benchmark (--like): how far their true success rates
spread (--spread: SD of the observed rates after taking sampling of episodes off), and how much one episode varies.

Example: vlm4vla power --models 9 --episodes 96 --rho 0.8 --plot power.png
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from probes.verbs.text import columns, say
from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from probes.power import Plan, Reference


@dataclass(frozen=True)
class Args:
    models: int = 9
    """Number of models, at least 4."""
    episodes: int = 96
    """Episodes of each model, over all tasks together (chains, for calvin)."""
    tasks: int | None = None
    """Tasks that share these episodes; the benchmark's own number when left out. 1: all drawn at one rate."""
    spread: float | None = None
    """SD of the models' true success rates, 0 to 1 (calvin: of mean chain lengths); the benchmark's when left out."""
    rho: float = 0.8
    """True correlation to be seen, between -1 and 1."""
    like: Literal["bridge", "libero", "calvin"] = "bridge"
    """The benchmark in the paper that stands in for what is not stated."""
    power: float = 0.8
    """The power aimed at."""
    reliability: float = 0.8
    """The reliability aimed at."""
    alpha: float = 0.05
    """Two-sided significance level."""
    json: Path | None = None
    """Also write everything as JSON."""
    plot: Path | None = None
    """Also draw power and reliability; .png and .svg are both written, .pdf when asked for."""


def run(args: Args) -> int:
    from probes.style import check_plot, save_plot

    _check(args)
    check_plot(args.plot)
    from probes.power import plan, reference

    like = reference(args.like)
    found = plan(
        args.models, args.episodes, rho=args.rho, tasks=args.tasks, spread=args.spread, reference=like,
        target=args.power, wanted=args.reliability, alpha=args.alpha,
    )  # fmt: skip
    _print(args, found, like)
    if args.json:
        values = {"format": "vlm4vla-power", "version": 1, **found.to_dict(), "wanted_reliability": args.reliability,
                  "reference": asdict(like), "spread_from": _origin(args, like)}  # fmt: skip
        folders.write_json(args.json, values)
    if args.plot:
        from probes.figures_power import power_figure

        print(f"\nfigure: {' and '.join(map(str, save_plot(power_figure(found), args.plot)))}")
    return 0


def _check(args: Args) -> None:
    most = 100_000_000
    for name, value, low in (("models", args.models, 4), ("episodes", args.episodes, 1), ("tasks", args.tasks, 1)):
        if value is not None and not low <= value <= most:
            raise InputError(f"--{name} {value}", fix=f"give a whole number of at least {low}")
    if args.models > 10_000:
        raise InputError(f"--models {args.models}", fix="give at most 10000")
    if args.tasks is not None and args.tasks > args.episodes:
        raise InputError(f"{args.episodes} episodes for {args.tasks} tasks", fix="give at least one episode a task")
    if not 0 < abs(args.rho) < 1:
        raise InputError(f"--rho {args.rho:g}", fix="give a correlation between -1 and 1, not 0")
    for name in ("power", "reliability", "alpha"):
        if not 0 < getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name):g}", fix="give a number between 0 and 1")
    if args.power <= args.alpha:
        raise InputError(f"--power {args.power:g} is no more than --alpha {args.alpha:g}", fix="aim higher")
    top = 2.5 if args.like == "calvin" else 0.5
    if args.spread is not None and not 0 <= args.spread <= top:
        what = "mean chain lengths, 0 to 5" if args.like == "calvin" else "rates from 0 to 1 (not per cent)"
        raise InputError(f"--spread {args.spread:g}", fix=f"give the SD of {what}: between 0 and {top:g}")


def _origin(args: Args, like: Reference) -> str:
    if args.spread is not None:
        return "given"
    return f"the paper's {like.models} models on {like.name}, sampling of episodes taken off"


def _print(args: Args, found: Plan, like: Reference) -> None:
    chains = args.like == "calvin"
    unit = "mean chain lengths" if chains else "success rates"
    count = f"{found.episodes} {'chains' if chains else 'episodes'} each"
    if found.tasks > 1:
        count += f" in {found.tasks} tasks"
    print(f"{found.models} models, {count}, a true correlation of {found.rho:+g}\n")
    low, high = like.spread_interval
    known = "" if args.spread is not None else f" (95 % {low:.3f} to {high:.3f})"
    say(f"True {unit} spread with SD {found.spread:.3f}{known}: {_origin(args, like)}.")
    source = f"{like.name}, {'within tasks' if found.tasks > 1 and like.within_task else 'at one rate per model'}"
    say(f"One {'chain' if chains else 'episode'} varies with SD {found.episode_variance**0.5:.2f}: {source}.")
    if found.tasks > 1 and like.within_task is None:
        say(f"Nothing by task was published for {like.name}, so --tasks changes nothing.")
    percent = f"{100 * found.target:g} %"
    rows = [
        ("probability of p below " + f"{found.alpha:g}", f"{found.power:.2f}", f"{found.power_true:.2f}"),
        ("expected r", f"{found.expected:+.2f}", f"{found.expected_true:+.2f}"),
        (f"smallest |rho| shown with {percent}", _none(found.detectable, "none"), f"{found.detectable_true:.2f}"),
        (f"models for {percent}", _none(found.models_needed, "none"), _none(found.models_needed_true, "none")),
    ]
    print("\n" + columns(rows, ("", "these episodes", "endless episodes")) + "\n")
    facts = [
        ("|r| that is significant", f"{found.critical:.3f}"),
        ("reliability of the benchmark", f"{found.reliability:.2f}, so |r| {found.ceiling:.2f} is expected at most"),
        (f"episodes for reliability {args.reliability:g}", _none(found.episodes_for_reliability, "no spread, none")),
        (f"episodes for {percent} with {found.models} models", _none(found.episodes_needed, "no number suffices")),
        ("to show |rho| < 0.3", f"{found.equivalence[0]} models at least, {found.equivalence[1]} for 80 % power at 0"),
    ]
    width = max(len(name) for name, _ in facts)
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in facts))
    grid = found.to_frame()
    print(f"\nPower to show a true correlation of {found.rho:+g}, by models and episodes of each")
    cells = [(f"{models}", *(f"{value:.2f}" for value in line)) for models, line in zip(grid.index, grid.to_numpy(),
                                                                                       strict=True)]  # fmt: skip
    print(columns(cells, ("models", *map(str, grid.columns))))
    print()
    say("Upper bounds: no error of the capability score, no luck of training, independent models (lineages are not).")


def _none(value: float | None, otherwise: str) -> str:
    if value is None:
        return otherwise
    return str(value) if isinstance(value, int) else f"{value:.2f}"
