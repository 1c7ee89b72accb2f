"""The paper's tables of interventions, each as differences from its baseline with the noise of their episodes.

    contrasts("freezing").to_frame()      # also "injection" and "scratch"
    auxiliary().to_frame()                # seven kinds of extra VLM training, three checkpoints each

Only counts were published, not which episodes succeeded, so differences of success are taken as unpaired (Newcombe;
the same initial states were run, which makes them a little narrower in truth). Differences of CALVIN's mean chain
length get a normal interval whose chain-to-chain spread follows from the mean itself when every step succeeds equally
often. Trap: one training run behind every number; how far another run would land is in no interval here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil, floor
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from probes import paper
from probes.differences import newcombe
from probes.jsonable import jsonable
from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.results import Interval

if TYPE_CHECKING:
    import pandas as pd

Table = Literal["freezing", "injection", "scratch"]
PAPER_TABLES = ("freezing", "injection", "auxiliary", "scratch")
CHAINS = 1000  # of one CALVIN evaluation (data/paper/protocol.csv)
_EPISODES = 96
BRIDGE, CALVIN = "SimplerEnv-Bridge", "CALVIN ABC-D"


@dataclass(frozen=True)
class Contrast:
    """One published setting against its baseline.

    value, baseline: as printed (per cent, or mean chain length); difference in the same unit. counts: successes that
    print `value`: one number, or the two nearest where none does (then `interval` covers both and `p` is the larger).
    p: Fisher's exact test of the counts; for chains that of the normal interval. flag: what does not add up.
    """

    model: str
    setting: str
    benchmark: str
    metric: str
    value: float
    baseline: float
    against: str
    difference: float
    interval: Interval
    p: float
    counts: tuple[int, ...]
    baseline_counts: tuple[int, ...]
    quality: str
    flag: str
    method: str

    @property
    def label(self) -> str:
        """`Qwen2.5-VL-3B, vision encoder frozen`."""
        return f"{self.model}, {self.setting}"


@dataclass(frozen=True)
class Contrasts:
    """All contrasts of one table. p_holm: over the rows of this table and one benchmark, in their order."""

    table: str
    rows: tuple[Contrast, ...]
    p_holm: tuple[float, ...]
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row per contrast; the interval as low and high."""
        import pandas as pd

        frame = pd.DataFrame([asdict(row) | {"low": row.interval.low, "high": row.interval.high} for row in self.rows])
        return frame.drop(columns="interval").assign(p_holm=self.p_holm)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dict(jsonable(asdict(self)))


def contrasts(table: Table) -> Contrasts:
    """freezing: against full fine-tuning; injection: against no first stage, for each policy stage; scratch: against
    the pretrained model's row in the main table. Raises InputError for another name."""
    from probes.permutation import holm

    rows = {"freezing": _freezing, "injection": _injection, "scratch": _scratch}
    if table not in rows:
        raise InputError(f"the paper has no table '{table}'", fix=nearest(table, PAPER_TABLES))
    found = tuple(rows[table]())
    corrected: dict[int, float] = {}
    for benchmark in dict.fromkeys(row.benchmark for row in found):
        places = [i for i, row in enumerate(found) if row.benchmark == benchmark]
        corrected |= dict(zip(places, holm([found[i].p for i in places]), strict=True))
    return Contrasts(table, found, tuple(corrected[i] for i in range(len(found))), _notes(found))


def _notes(rows: tuple[Contrast, ...]) -> tuple[str, ...]:
    notes = [
        "published numbers; success: difference of unpaired counts (Newcombe's interval, Fisher's exact test), for "
        "which episodes succeeded was not published"
    ]
    if any(row.metric == "avg_len" for row in rows):
        notes.append(
            f"chains: normal interval of {CHAINS} chains each, their spread modelled by one success rate for all steps"
        )
    if any(row.flag for row in rows):
        notes.append(
            "where a printed value fits no count, the interval covers the two nearest counts, and p is the larger"
        )
    if any(row.quality.startswith("secondary") for row in rows):
        notes.append("secondary: quoted by somebody who read the paper")
    notes.append("one training run each: no interval holds what another run would change")
    return tuple(notes)


def _freezing() -> list[Contrast]:
    frame = paper.table("freeze_ablation")
    frame = frame[frame["metric"].isin(("avg_len", "success_pct"))]
    return [
        _contrast(row, base, "full fine-tuning")
        for row, base in _against(frame, frame[frame["setting"] == "full fine-tuning"], ("model", "benchmark"))
        if row["setting"] != "full fine-tuning"
    ]


def _injection() -> list[Contrast]:
    frame = paper.table("vision_injection")
    frame = frame[frame["metric"] == "success_pct"].copy()
    frame["stage"] = frame["setting"].str.partition("; ")[2]
    none = frame["setting"].str.startswith("first stage: none")
    return [
        _contrast(row, base, f"no first stage; {row['stage']}")
        for row, base in _against(frame[~none], frame[none], ("model", "stage"))
    ]


def _scratch() -> list[Contrast]:
    frame = paper.table("from_scratch")
    frame = frame[frame["metric"].isin(("avg_len", "success_pct"))]
    main = paper.performance(tasks=False)
    return [_contrast(row, base, "pretrained") for row, base in _against(frame, main, ("model", "benchmark"))]


def _against(frame: pd.DataFrame, base: pd.DataFrame, keys: tuple[str, ...]) -> list[tuple[pd.Series, pd.Series]]:
    """Every row with the one row of `base` that has the same keys."""
    pairs = []
    for _, row in frame.iterrows():
        same = base[(base[list(keys)] == row[list(keys)]).all(axis=1)]
        assert len(same) == 1, f"{len(same)} baselines for {row.to_dict()}"
        pairs.append((row, same.iloc[0]))
    return pairs


def _contrast(row: pd.Series, base: pd.Series, against: str) -> Contrast:
    flags = [
        f"{name}{one.get('printed', one['value'])} {one['flag']}"
        for name, one in (("", row), ("baseline ", base))
        if one["flag"]
    ]
    told: dict[str, Any] = {
        "model": row["model"], "setting": row["setting"], "benchmark": row["benchmark"], "metric": row["metric"],
        "value": float(row["value"]), "baseline": float(base["value"]), "against": against,
        "difference": float(row["value"] - base["value"]), "quality": row["quality"],
        "flag": "; ".join(flags),
    }  # fmt: skip
    if row["metric"] == "avg_len":
        return Contrast(**told, **_chain_noise(told["value"], told["baseline"]), counts=(), baseline_counts=())
    own, other = _counts(row), _counts(base)
    return Contrast(**told, **_count_noise(own, other), counts=own, baseline_counts=other)


def _counts(row: pd.Series) -> tuple[int, ...]:
    """The count behind a printed percentage, or the two next to it where it fits none."""
    import pandas as pd

    if not pd.isna(row["successes"]):
        return (int(row["successes"]),)
    exact = row["value"] * _EPISODES / 100
    return floor(exact), ceil(exact)


def _count_noise(own: tuple[int, ...], other: tuple[int, ...]) -> dict[str, Any]:
    from scipy.stats import fisher_exact

    n = _EPISODES
    spans = [newcombe(k, n, base, n) for k in own for base in other]
    p = max(float(fisher_exact([[k, n - k], [base, n - base]]).pvalue) for k in own for base in other)
    span = Interval(100 * min(s.low for s in spans), 100 * max(s.high for s in spans))
    return {"interval": span, "p": p, "method": f"Newcombe and Fisher's exact test, {n} episodes each"}


def _chain_noise(value: float, baseline: float) -> dict[str, Any]:
    from scipy.stats import norm

    error = float(np.sqrt((modelled_chain_variance(value) + modelled_chain_variance(baseline)) / CHAINS))
    half = float(norm.ppf(0.975)) * error
    return {
        "interval": Interval(value - baseline - half, value - baseline + half),
        "p": float(2 * norm.sf(abs(value - baseline) / error)),
        "method": f"normal, spread of {CHAINS} chains modelled from the mean",
    }


def modelled_chain_variance(mean: float, steps: int = 5) -> float:
    """Variance of one chain's length when every step succeeds with the same probability and the mean is `mean`.

    On the ten models whose step rates are known it is never too small and at most 15 % too large.
    """
    from scipy.optimize import brentq

    if not 0 < mean < steps:
        return 0.0
    k = np.arange(1, steps + 1)
    p = brentq(lambda p: float((p**k).sum()) - mean, 0.0, 1.0)
    return float(((2 * k - 1) * p**k).sum() - mean**2)


# --- auxiliary tasks --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Auxiliary:
    """One kind of extra VLM training on CALVIN: best, median and worst of three checkpoints, beside the baseline's.

    difference: of the medians. sampling: half width of a 95 % interval of the difference of two checkpoints from their
    1,000 chains alone. verdict: by the ranges, `below the baseline's range`, `above …`, or `undetermined` (overlap).
    """

    model: str
    task: str
    best: float
    median: float
    worst: float
    baseline: tuple[float, float, float]
    difference: float
    sampling: float
    verdict: str
    quality: str


@dataclass(frozen=True)
class AuxiliaryTable:
    """All seven, and the two baselines, by model."""

    rows: tuple[Auxiliary, ...]
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row per task; the baseline's three as best, median, worst."""
        import pandas as pd

        frame = pd.DataFrame([asdict(row) for row in self.rows])
        triple = pd.DataFrame(
            frame.pop("baseline").tolist(), columns=["baseline_best", "baseline_median", "baseline_worst"]
        )
        return pd.concat([frame, triple], axis=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dict(jsonable(asdict(self)))


def auxiliary() -> AuxiliaryTable:
    """Mean chain length after extra VLM training against the same model without it (figure readings, error 0.005)."""
    frame = paper.table("auxiliary_tasks")
    frame = frame[frame["metric"].str.startswith("avg_len:") & frame["metric"].str.endswith("_of_3_checkpoints")]
    triples: dict[tuple[str, str], tuple[float, float, float]] = {}
    quality = {}
    for (model, task), part in frame.groupby(["model", "setting"], sort=False):
        values = part.set_index(part["metric"].str.removeprefix("avg_len:").str.partition("_")[0])["value"]
        triples[model, task] = (float(values["max"]), float(values["median"]), float(values["min"]))
        quality[model, task] = part["quality"].iloc[0]
    rows = []
    for (model, task), (best, median, worst) in triples.items():
        base = triples[model, "baseline"]
        if task == "baseline":
            continue
        noise = sum(modelled_chain_variance(value) for value in (median, base[1])) / CHAINS
        below, above = best < base[2], worst > base[0]
        verdict = "below the baseline's range" if below else "above the baseline's range" if above else "undetermined"
        rows.append(
            Auxiliary(model, task, best, median, worst, base, median - base[1], 1.96 * noise**0.5, verdict,
                      quality[model, task])
        )  # fmt: skip
    notes = (
        "three checkpoints of one training run each, read off a figure (error 0.005): no repeats of the training",
        "three against three cannot be significant: the smallest two-sided permutation p is 2 of 20, 0.10",
        f"±: 95 %, what {CHAINS} chains alone leave open in the difference of two checkpoints",
    )
    return AuxiliaryTable(tuple(sorted(rows, key=lambda row: (row.model, -row.median))), notes)
