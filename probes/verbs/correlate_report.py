"""What `vlm4vla correlate` prints, in the order in which the numbers should be read: can the benchmark tell at all,
then r, then who decides it, what noise does to it, how many were looked at, what could have been seen, and a verdict.

Trap: nothing is computed here; a sentence that depends on a threshold names the number it rests on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from probes.numbers import listed
from probes.verbs.text import columns, p_value, say
from probes.verdict import hidden

if TYPE_CHECKING:
    from probes.correlation import Correlation, Pair
    from probes.mixed import Slope
    from probes.pairs import Estimate
    from vlm4vla_core.results import Interval


def print_report(result: Correlation, published: Sequence[str] = ()) -> None:
    """published: which of "capability" and "performance" are the paper's own numbers."""
    _design(result, published)
    _can_it_tell(result)
    _correlations(result)
    _influence(result)
    _noise(result)
    _family(result)
    _power(result)
    _verdicts(result)


def _head(title: str) -> None:
    print(f"\n{title}")


def _names(result: Correlation) -> Callable[[Pair], str]:
    """How a pair is called: by its benchmark, with the score in front when there are several."""
    several = len({pair.capability for pair in result.pairs}) > 1
    return lambda pair: f"{pair.capability}: {pair.benchmark}" if several else pair.benchmark


# --- 1 the design -----------------------------------------------------------------------------------------

_MEANING = {
    "lineage": "the models' lineages (lineage)",
    "successes": "how many episodes succeeded (successes)",
    "episodes": "how many episodes were run (episodes)",
    "selection": "how checkpoint and execute length were chosen (selection)",
    "stderr": "the capability score's own error (stderr)",
    "evaluator": "what evaluated the VLMs (evaluator)",
}


def _design(result: Correlation, published: Sequence[str]) -> None:
    lineages = ", ".join(f"{name} {count}" for name, count in result.lineages.items())
    first = f"{len(result.models)} models" + (f" of {len(result.lineages)} lineages ({lineages})" if lineages else "")
    if published:
        first += f"; {' and '.join(published)}: the paper's published numbers, quality in data/paper/README.md"
    say(first)
    for name, design in result.benchmarks.items():
        episodes = " or ".join(map(str, design["episodes"])) or "number not stated"
        tasks = ", ".join(f"{task} {' or '.join(map(str, n))}" for task, n in design["tasks"].items())
        by_task = f" (by task: {tasks})" if tasks else ""
        say(f"{name}: {design['metric'] or 'metric not stated'}, episodes a model: {episodes}{by_task}")
    chosen = dict.fromkeys(design["selection"] for design in result.benchmarks.values() if design["selection"])
    if chosen:
        say(f"which policy was scored: {' / '.join(chosen)}")
    missing = [_MEANING[column] for column in result.not_stated]
    if result.lineages and (rest := len(result.models) - sum(result.lineages.values())):
        missing.append(f"the lineage of {rest} models (they change places with nobody)")
    if missing:
        say(f"not stated: {', '.join(missing)}")
    if result.unmatched:
        say("left out: " + "; ".join(f"{model} ({lack})" for model, lack in result.unmatched.items()))


# --- 2 can it tell ----------------------------------------------------------------------------------------


def _can_it_tell(result: Correlation) -> None:
    _head("Can the benchmark tell these models apart?")
    benchmarks = list({pair.benchmark: pair for pair in reversed(result.pairs)}.values())[::-1]
    if not any(pair.reliability or pair.homogeneity for pair in benchmarks):
        print("  not known: the tables state no successes and episodes")
        return
    head = ("benchmark", "one rate for all?", "p", "shuffled p", "model x task p", "reliability", "95 %", "ceiling")
    print(columns([_benchmark_row(pair) for pair in benchmarks], head))
    for pair in benchmarks:
        _by_task(pair)
    nulls = dict.fromkeys(pair.homogeneity.null for pair in benchmarks if pair.homogeneity and pair.homogeneity.null)
    if nulls:
        say(
            f"Shuffled p: outcomes change hands between models {' or '.join(nulls)}, and the variance of the models' "
            "totals is compared.",
            "  ",
        )
    say(
        "Reliability is the share of the variance between models that is not the luck of few episodes. It is an upper "
        "bound: training seeds and the choice of checkpoints are not in it. Ceiling is its square root, the |r| to be "
        "expected of a perfect capability score; a sample can exceed it.",
        "  ",
    )


def _benchmark_row(pair: Pair) -> tuple[str, ...]:
    alike, known = pair.homogeneity, pair.reliability
    cells = ["–"] * 7
    if alike is not None:
        cells[0] = f"chi2 {alike.chi2:.2f} on {alike.df} df"
        cells[1] = p_value(alike.p)
        cells[2] = "–" if alike.p_stratified is None else p_value(alike.p_stratified)
        cells[3] = "–" if alike.interaction is None else p_value(alike.interaction.p)
    if known is not None:
        by_task = "" if known.stratified is None else f" ({known.stratified:.2f} by task)"
        cells[4] = f"{known.pooled:.2f}{by_task}"
        cells[5] = f"{known.ci.low:.2f} to {known.ci.high:.2f}"
        cells[6] = f"{known.best**0.5:.2f}"
    return (pair.benchmark, *cells)


def _by_task(pair: Pair) -> None:
    """Each task's own p, and what it means when tasks tell models apart that the average does not."""
    alike = pair.homogeneity
    if alike is None or not alike.per_task or not alike.per_task_holm or not alike.per_task_permutation:
        return
    rows = [
        [task, *("–" if table[task] is None else p_value(table[task] or 0.0) for table in tables)]
        for tables in [(alike.per_task, alike.per_task_holm, alike.per_task_permutation)]
        for task in alike.per_task
    ]
    print()
    print(columns(rows, (f"{pair.benchmark} by task", "chi2 p", "Holm", "shuffled p")))
    if line := hidden(pair):
        say(f"{line}.", "  ")
    print()


# --- 3 and 4 the correlation and who decides it -------------------------------------------------------------


def _correlations(result: Correlation) -> None:
    for capability in dict.fromkeys(pair.capability for pair in result.pairs):
        pairs = [pair for pair in result.pairs if pair.capability == capability]
        _head(f"{capability} against")
        head = ("benchmark", "n", "Pearson r", "95 % Fisher", "exact p", "95 % BCa")
        print(columns([(p.benchmark, str(p.n), *_estimate(p.pearson, p, "+.3f")) for p in pairs], head))
        head = ("", "n", "Spearman", "Bonett-Wright", "exact p", "95 % BCa")
        rows = [(p.benchmark, str(p.n), *_estimate(p.spearman, p, "+.3f")) for p in pairs]
        print(columns(rows, head))
    drawn = any(pair.p_method != "exact" for pair in result.pairs)
    kind = " (above ten models random ones, ± their own error)" if drawn else ""
    say(f"p over all arrangements of the models{kind}, two-sided: |r*| at least |r|.", "  ")


def _estimate(found: Estimate, pair: Pair, form: str) -> tuple[str, ...]:
    drawn = "" if pair.p_method == "exact" or found is not pair.pearson else f" ±{pair.p_stderr:.1g}"
    bca = "–" if found.ci_bca is None else _span(found.ci_bca)
    return f"{found.r:{form}}", _span(found.ci_fisher), p_value(found.p_exact) + drawn, bca


def _span(span: Interval) -> str:
    return f"{span.low:+.2f} to {span.high:+.2f}"


def _influence(result: Correlation) -> None:
    _head("Who decides it?")
    name = _names(result)
    rows = []
    for pair in result.pairs:
        ends = pair.leave_one_out_range()
        without = ("–", "–") if ends is None else tuple(f"{r:+.3f} {model}" for model, r in ends)
        kin = [
            f"{lineage} {'–' if cell['r'] is None else format(cell['r'], '+.2f')} (n {cell['n']})"
            for lineage, cell in pair.leave_one_lineage_out.items()
        ]
        rows.append((name(pair), *without, ", ".join(kin) or "–"))
    if any(pair.leave_one_out_range() for pair in result.pairs):
        print(columns(rows, ("leaving one out", "lowest r", "highest r", "without a lineage")))
    else:
        print("  leaving a model out leaves no correlation to look at")
    if not result.lineages:
        print("  lineages are not stated, so a contrast between model families is not ruled out")
        return
    rows = []
    for pair in result.pairs:
        own = pair.within_lineage_centred
        inside = [f"{n} {cell['r']:+.2f} (n {cell['n']})" for n, cell in pair.within_lineage.items() if cell["r"]]
        rows.append(
            (
                name(pair),
                "–" if pair.p_within_lineage is None else p_value(pair.p_within_lineage),
                "–" if own is None else f"{own.r:+.2f} (p {p_value(own.p)})",
                str(pair.arrangements_within_lineage),
                ", ".join(inside) or "–",
            )
        )
    print()
    print(columns(rows, ("within lineages", "p of |r|", "r of deviations", "arrangements", "r inside a lineage")))
    say(
        "Models change places only with models of their own lineage. Deviations: from each lineage's mean, so that no "
        "contrast between lineages is left.",
        "  ",
    )
    alarms = next((pair.false_alarms for pair in result.pairs if pair.false_alarms), None)
    if alarms:
        told = listed([f"{rate:.0%}" for rate in alarms.values()])
        shares = listed([f"{float(share):.0%}" for share in alarms])
        say(
            f"Why that matters: where nothing connects the two scores but {shares} of the variance of each lies "
            f"between lineages, p over all models falls below 0.05 in {told} of such studies (simulated for these "
            "lineages); p within lineages in at most 5%.",
            "  ",
        )


# --- 5 noise ------------------------------------------------------------------------------------------------


def _noise(result: Correlation) -> None:
    _head("Noise carried through")
    name = _names(result)
    rows = []
    for pair in result.pairs:
        noise = pair.attenuated
        value = "–" if noise.r is None else f"{noise.r:+.2f}" + " inadmissible" * noise.inadmissible
        rows.append(
            (
                name(pair),
                value if noise.refused is None else f"refused: {noise.refused}",
                "–" if noise.ci is None else _span(noise.ci),
                "–" if noise.reliability_performance is None else f"{noise.reliability_performance:.2f} {noise.source}",
                "–" if noise.reliability_capability is None else f"{noise.reliability_capability:.2f}",
            )
        )
    print(columns(rows, ("corrected for noise", "r", "95 %", "performance's reliability", "capability's")))
    if all(pair.attenuated.reliability_capability is None for pair in result.pairs):
        say("Only the performance's noise is corrected for: the capability score's own error is not stated.", "  ")
    if any(pair.attenuated.inadmissible for pair in result.pairs):
        say("Inadmissible: beyond 1, so r was lucky or the reliability is too low an estimate.", "  ")
    rows = []
    for pair in result.pairs:
        mixed = pair.mixed
        rows.append((name(pair), *_slope(mixed.pooled, mixed.refused.get("pooled")), mixed.counts or "–"))
        rows += [(f"  {task}", *_slope(one, mixed.refused.get(task)), "–") for task, one in mixed.per_task.items()]
    print()
    print(columns(rows, ("mixed model", "slope", "95 %", "p", "counted over")))
    if any(pair.mixed.pooled for pair in result.pairs):
        say(
            "Slope: log-odds of success per standard deviation of capability, in a binomial model where models (and "
            "models by task) also differ by chance; t on n - 2.",
            "  ",
        )


def _slope(found: Slope | None, refused: str | None) -> tuple[str, str, str]:
    if found is None:
        return refused or "–", "–", "–"
    return f"{found.slope:+.2f}", _span(found.ci), p_value(found.p)


# --- 6 and 7 how many were looked at, and what could be seen --------------------------------------------------


def _family(result: Correlation) -> None:
    name = _names(result)
    _head(f"{len(result.pairs)} pair{'s' * (len(result.pairs) > 1)} looked at")
    rows = [
        (name(pair), p_value(pair.pearson.p_exact), p_value(pair.p_holm), p_value(pair.p_max_r), pair.role or "–")
        for pair in result.pairs
    ]
    print(columns(rows, ("", "p alone", "Holm", "p of max |r|", "role")))
    if result.primary is None and len(result.pairs) > 1:
        say("No pair was declared primary beforehand (--primary), so the p of max |r| over all pairs decides.", "  ")


def _power(result: Correlation) -> None:
    _head("What these models could have shown")
    name = _names(result)
    rows = []
    for pair in result.pairs:
        half, strong = pair.power.chances
        rows.append(
            (
                name(pair),
                str(pair.n),
                f"{pair.min_detectable_rho:.2f}",
                f"{_share(half.power_true)} / {_share(strong.power_true)}",
                "–" if strong.power is None else f"{_share(half.power or 0.0)} / {_share(strong.power)}",
                "–" if half.models is None else f"{half.models} / {strong.models}",
                "–" if pair.power.episodes is None else str(pair.power.episodes),
                "–" if pair.power.episodes_for_reliability is None else str(pair.power.episodes_for_reliability),
            )
        )
    head = (
        "", "n", "detectable rho", "power at 0.5 / 0.8", "with its noise", "models needed", "episodes",
        "for reliability 0.8",
    )  # fmt: skip
    print(columns(rows, head))
    for pair in result.pairs:
        if pair.power.over_episodes and pair.power.over_episodes[0].reliability < 0.8:
            told = ", ".join(
                f"{more.episodes} episodes {more.ceiling:.2f} ({more.power:.0%})" for more in pair.power.over_episodes
            )
            say(f"{name(pair)}, ceiling (power at rho 0.8) with more episodes a model: {told}.", "  ")
    say(
        "Detectable: with 80 % power, true scores. With its noise: as reliability dims it. Models needed: for 80 % "
        "power at rho 0.5 / 0.8 with that noise.",
        "  ",
    )
    equal = result.pairs[0].equivalence
    say(
        f"Showing that there is practically no correlation (|rho| < {equal.margin:g}) takes about "
        f"{equal.n_for_80_power} models for 80 % power and cannot succeed below {equal.cannot_succeed_below}.",
        "  ",
    )


def _share(power: float) -> str:
    return "–" if power != power else f"{power:.0%}"


# --- 8 the verdicts -------------------------------------------------------------------------------------------


def _verdicts(result: Correlation) -> None:
    _head("Verdict")
    name = _names(result)
    for pair in result.pairs:
        role = f" ({pair.role})" if pair.role else ""
        print(f"\n{name(pair)}{role}: {pair.verdict.upper()}")
        say(f"{pair.why}.", "  ")
    open_ones = sum(pair.verdict == "undetermined" for pair in result.pairs)
    if open_ones:
        print()
        say(
            f"{open_ones} of {len(result.pairs)} verdict{'s' * (len(result.pairs) > 1)} "
            f"{'is' if open_ones == 1 else 'are'} undetermined: there the tables neither show a correlation nor rule "
            "one out."
        )
