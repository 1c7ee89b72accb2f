"""The view of `benchmark_power`: what a design can show, and what the paper's interventions show under that noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from probes import tables
from probes.numbers import plain, signed, span
from probes.power import BENCHMARKS, Like, Plan, Reference, plan, reference

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probes.report.params import BenchmarkPowerParams

PUBLISHED = {"bridge": 96, "libero": 500, "calvin": 1000}  # episodes a model in the paper (data/paper/protocol.csv)


def design(params: BenchmarkPowerParams) -> Plan:
    """What this many models and episodes can show."""
    return plan(params.models, params.episodes, rho=params.rho, reference=reference(params.like))


def design_table(found: Plan) -> pd.DataFrame:
    """The design with its episodes, and with endless ones."""
    import pandas as pd

    rows = [
        ("probability of p below 0.05", plain(found.power), plain(found.power_true)),
        ("expected r", signed(found.expected), signed(found.expected_true)),
        ("smallest |rho| shown with 80 %", _known(found.detectable), plain(found.detectable_true)),
        ("models for 80 %", _known(found.models_needed), _known(found.models_needed_true)),
        ("reliability of the benchmark", plain(found.reliability), "1.00"),
        ("|r| expected at most", plain(found.ceiling), "1.00"),
    ]
    return pd.DataFrame(rows, columns=["", f"{found.episodes} episodes each", "endless episodes"])


def grid_table(found: Plan) -> pd.DataFrame:
    """Power by models (rows) and episodes of each (columns)."""
    frame = found.to_frame().map(plain)
    frame.columns = [f"{episodes} episodes" for episodes in frame.columns]
    return frame.reset_index().assign(models=lambda rows: rows["models"].astype(str))


def references() -> dict[str, tuple[Reference, Plan]]:
    """The paper's three benchmarks with the nine models and the episodes that it used."""
    likes: tuple[Like, ...] = ("calvin", "bridge", "libero")
    known = {like: reference(like) for like in likes}
    return {like: (one, plan(one.models, PUBLISHED[like], reference=one)) for like, one in known.items()}


def reference_table(known: dict[str, tuple[Reference, Plan]]) -> pd.DataFrame:
    """One row per benchmark: spread of the true scores, reliability, and what it would take."""
    import pandas as pd

    rows = []
    for like, (one, found) in known.items():
        low, high = _reliabilities(like, one)
        rows.append(
            {
                "benchmark": one.name,
                "episodes a model": str(PUBLISHED[like]),
                "true spread (SD)": f"{one.spread:.3f}",
                "reliability": plain(found.reliability),
                "95 % over models": f"{plain(low)} to {plain(high)}",
                "|r| expected at most": plain(found.ceiling),
                "power at 0.8": plain(found.power),
                "episodes for reliability 0.8": _known(found.episodes_for_reliability),
            }
        )
    return pd.DataFrame(rows)


def reliability_figure(known: dict[str, tuple[Reference, Plan]]) -> Figure:
    """Reliability of the paper's three benchmarks."""
    from probes import figures_power

    return figures_power.reliability_figure(
        [one.name for one, _ in known.values()],
        [found.reliability for _, found in known.values()],
        [_reliabilities(like, one) for like, (one, _) in known.items()],
    )


def _reliabilities(like: str, one: Reference) -> tuple[float, float]:
    """The reliability at both ends of the spread's interval."""
    ends = [plan(one.models, PUBLISHED[like], spread=end, reference=one).reliability for end in one.spread_interval]
    return ends[0], ends[1]


def contrast_table(shown: dict[str, tables.Contrasts]) -> pd.DataFrame:
    """The paper's contrasts with their intervals and Holm's p, one table below the other."""
    import pandas as pd

    rows = []
    for table in shown.values():
        for row, p in zip(table.rows, table.p_holm, strict=True):
            digits = 1 if row.metric == "success_pct" else 2
            rows.append(
                {
                    "model": row.model,
                    "setting": row.setting.removeprefix("first stage: "),
                    "benchmark": row.benchmark,
                    "value": f"{row.value:g}",
                    "baseline": f"{row.baseline:g}",
                    "difference": signed(row.difference, digits),
                    "95 % interval": span(*row.interval, digits=digits),
                    "p (Holm)": f"{p:.4f}" if p >= 5e-5 else "below 0.0001",
                    "flag": row.flag or None,
                }
            )
    return pd.DataFrame(rows)


def auxiliary_table(table: tables.AuxiliaryTable) -> pd.DataFrame:
    """Best, median and worst of three checkpoints beside the baseline's."""
    import pandas as pd

    return pd.DataFrame(
        {
            "model": row.model,
            "extra VLM training": row.task,
            "best / median / worst": " / ".join(f"{value:.2f}" for value in (row.best, row.median, row.worst)),
            "baseline": " / ".join(f"{value:.2f}" for value in row.baseline),
            "medians apart": f"{signed(row.difference)} ±{row.sampling:.2f}",
            "ranges": row.verdict,
        }
        for row in table.rows
    )


def answer(params: BenchmarkPowerParams, found: Plan, shown: dict[str, tables.Contrasts]) -> str:
    """One sentence: the power of the design, what would lift it, and which interventions stand out of the noise."""
    name = BENCHMARKS[params.like]
    lift = [f"{found.models_needed} models"] if found.models_needed else []
    lift += [f"{found.episodes_needed:,} episodes each"] if found.episodes_needed else []
    if found.power >= found.target:
        needed = "which is enough"
    elif lift:
        needed = f"{' or '.join(lift)} would lift that to {plain(found.target)}"
    else:
        needed = "and nothing would lift that"
    apart = []
    for what, table in shown.items():
        below = [p < 0.05 for p in table.p_holm]
        apart.append(f"{sum(below)} of {len(below)} for {what}")
    seen = f"{plain(found.power)} ({plain(found.power_true)} with endless episodes)"
    return (
        f"On a benchmark like {name}, {found.models} models with {found.episodes} episodes each show a true "
        f"correlation of {signed(found.rho)} with probability {seen}; {needed}. Of the paper's own comparisons, these "
        f"differ from their baseline by more than the noise of their episodes (Holm): {', '.join(apart)}."
    )


def badges(shown: dict[str, tables.Contrasts], auxiliary: tables.AuxiliaryTable) -> list[str]:
    """Published, with the qualities of the rows that were used."""
    from probes import paper

    reference_rows = dict.fromkeys(paper.performance()["quality"])
    qualities = [row.quality for table in shown.values() for row in table.rows]
    interventions = dict.fromkeys(qualities + [row.quality for row in auxiliary.rows])
    return [
        f"published: spread and noise, {', '.join(reference_rows)}",
        f"published: interventions, {', '.join(interventions)}",
    ]


def figure_words(found: Plan) -> str:
    """What the power figure shows, for readers who do not see it."""
    return (
        f"Power to show a true correlation of {signed(found.rho)} over episodes, one curve per number of models, and "
        f"the benchmark's reliability over episodes: with {found.models} models and {found.episodes} episodes each, "
        f"power {plain(found.power)}, reliability {plain(found.reliability)}."
    )


def numbers(found: Plan, shown: dict[str, tables.Contrasts], auxiliary: tables.AuxiliaryTable) -> dict[str, Any]:
    """What the answer rests on, as JSON values."""
    told: dict[str, Any] = {what: table.to_dict() for what, table in shown.items()}
    return {"plan": found.to_dict(), "paper": {**told, "auxiliary": auxiliary.to_dict()}}


def _known(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) else plain(value)
