"""One verdict per pair, and the sentence that says why.

`positive` / `negative` need all of: five models, p below 0.05 with every pair counted (max-|r|), a Fisher interval
without zero, and a sign that no single model turns, nor any lineage whose absence leaves five. (Of four models every
arrangement is 4 % of all, and leaving one out leaves a triangle.) When exchanging models within lineages does as much,
it is a contrast between lineages and is called that. `practically none` takes an equivalence test. The rest is
`undetermined`: an answer, not a failure, and never "no correlation".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from probes import intervals
from probes.numbers import listed

if TYPE_CHECKING:
    from probes.correlation import Pair

ALPHA = 0.05
NEGLIGIBLE = 0.3  # |rho| below this is "practically none"
FEWEST = 5  # models, in all or left by leaving a lineage out, below which nothing is concluded from r
ROUNDING = 1e-12  # an r of 0 without a model keeps no sign, on whichever side of 0 rounding leaves it
POOR = 0.7  # a reliability below this is mentioned


def judge(pair: Pair, family: int) -> tuple[str, str]:
    """(verdict, why) of a pair whose p values are filled in. family: how many pairs were looked at together."""
    r, span = pair.pearson.r, pair.pearson.ci_fisher
    estimate = f"r {r:+.2f} ({span.low:+.2f} to {span.high:+.2f})"
    doubts = _doubts(pair, family)
    if not doubts:
        return _found(pair, estimate, family)
    if pair.equivalence.p < ALPHA:
        narrow = intervals.fisher(r, pair.n, 0.90)
        inside = f"its 90 % interval, {narrow.low:+.2f} to {narrow.high:+.2f}, lies within ±{NEGLIGIBLE:g}"
        return "practically none", f"{estimate}: {inside} (equivalence test, p {_p(pair.equivalence.p)})"
    return "undetermined", f"{estimate}: {', '.join(doubts)}{_poor_benchmark(pair)}"


def hidden(pair: Pair) -> str:
    """What the average over tasks hides: tasks tell the models apart that their totals do not. Empty if nothing."""
    alike = pair.homogeneity
    if alike is None or alike.p < ALPHA or not alike.per_task_holm:
        return ""
    telling = [task for task, p in alike.per_task_holm.items() if p is not None and p < ALPHA]
    if not telling:
        return ""
    text = (
        f"The average hides what tasks show: pooled, all models could share one rate (p {_p(alike.p)}), yet "
        f"{listed(telling)} tell{'s' * (len(telling) == 1)} them apart (Holm)"
    )
    if alike.interaction is not None and alike.interaction.p < ALPHA:
        text += (
            f". Models are good at different tasks (model x task p {_p(alike.interaction.p)}): differences in opposite "
            "directions cancel in the average"
        )
    return text


def _doubts(pair: Pair, family: int) -> list[str]:
    r, span = pair.pearson.r, pair.pearson.ci_fisher
    doubts = []
    if pair.n < FEWEST:
        doubts.append(f"{pair.n} models are too few for a verdict")
    if span.low <= 0 <= span.high:
        doubts.append("the interval holds zero")
    if pair.p_max_r >= ALPHA:
        doubts.append(f"p is {_p(pair.p_max_r)}{f' with all {family} pairs counted' if family > 1 else ''}")
    turning = [model for model, other in pair.leave_one_out.items() if other is not None and other * r <= ROUNDING]
    if any(other is None for other in pair.leave_one_out.values()):
        doubts.append("leaving a model out leaves no correlation to look at")
    elif turning:
        others = f" or {len(turning) - 3} others" if len(turning) > 3 else ""
        doubts.append(f"the sign turns without {' or '.join(turning[:3])}{others}")
    left = {name: cell for name, cell in pair.leave_one_lineage_out.items() if cell["r"] is not None}
    for name, cell in left.items():
        if cell["n"] >= FEWEST and cell["r"] * r <= ROUNDING and name not in _alone(pair):
            doubts.append(f"the sign turns without the {name} lineage (n {cell['n']})")
    return doubts


def _alone(pair: Pair) -> set[str]:
    """Lineages of one model: leaving them out is leaving that model out, which is told already."""
    kin = [point.lineage for point in pair.points]
    return {name for name in kin if kin.count(name) == 1}


def _poor_benchmark(pair: Pair) -> str:
    known = pair.reliability
    if known is None or known.best >= POOR:
        return ""
    value = f"{known.best:.2f}"
    if known.stratified is not None:
        value = f"{known.pooled:.2f} with episodes pooled, {known.stratified:.2f} by task"
    return (
        f". Much of what separates these models there is sampling noise: reliability {value}, so that even a perfect "
        f"capability score would be expected to reach |r| {known.best**0.5:.2f} only"
    )


def _found(pair: Pair, estimate: str, family: int) -> tuple[str, str]:
    sign = "positive" if pair.pearson.r > 0 else "negative"
    counted = f" with all {family} pairs counted" if family > 1 else ""
    firm = f"{estimate}: p is {_p(pair.p_max_r)}{counted}, and no single model turns the sign"
    if not pair.lineages:
        return sign, f"{firm}. Lineages are not stated: a contrast between model families is not ruled out"
    if pair.p_within_lineage is not None and pair.p_within_lineage < ALPHA:
        return sign, f"{firm}. It holds within lineages too (p {_p(pair.p_within_lineage)})"
    if pair.p_within_lineage is None:
        doubt = "But no two models share a lineage, so nothing is known within one"
    else:
        doubt = (
            f"But exchanging models within their lineages does as much with p {_p(pair.p_within_lineage)}"
            f"{_centred(pair)}: this is a contrast of {len(pair.lineages)} lineages"
        )
    inside = "".join(
        f"; within {name} r is {cell['r']:+.2f} (n {cell['n']})"
        for name, cell in pair.within_lineage.items()
        if cell["r"] is not None
    )
    return f"{sign} between lineages, undetermined within", f"{firm}. {doubt}{inside}"


def _centred(pair: Pair) -> str:
    own = pair.within_lineage_centred
    return "" if own is None else f" (p {_p(own.p)} with each lineage's mean taken out)"


def _p(p: float) -> str:
    return "below 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
