"""Do the intervals of `correlate` cover, and do its tests keep their level? Simulated studies whose truth is known.

    python benchmarks/coverage.py            # about three minutes; writes results/coverage.json and the table of
                                             # docs/statistics.md

Each row of the table is a share of simulated studies with its Monte-Carlo standard error. `simulate(scale)` runs all of
it on a fraction of the studies; the slow tests use it.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from probes import attenuation, intervals, lineages, mixed, reliability
from probes.permutation import permutation_test

HERE = Path(__file__).parent
PAPER = ["Kosmos", "PaliGemma", "PaliGemma", *["Qwen"] * 6]  # the lineages of the paper's nine models


@dataclass(frozen=True)
class Row:
    """value: a share of `studies`; stderr: its Monte-Carlo error; goal: what it should be."""

    what: str
    setting: str
    goal: str
    value: float
    stderr: float
    studies: int


def row(what: str, setting: str, goal: str, hits: np.ndarray | list[bool]) -> Row:
    value, studies = float(np.mean(hits)), len(hits)
    return Row(what, setting, goal, round(value, 4), round((value * (1 - value) / studies) ** 0.5, 4), studies)


def normal_pairs(rng: np.random.Generator, rho: float, studies: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    x, e = rng.normal(size=(2, studies, n))
    return x, rho * x + np.sqrt(1 - rho**2) * e


def correlations(rng: np.random.Generator, scale: float) -> list[Row]:
    """Fisher, Bonett-Wright and BCa at n = 9, bivariate normal models."""
    from scipy.stats import rankdata

    rows = []
    for rho in (0.0, 0.5, 0.8):
        x, y = normal_pairs(rng, rho, int(20_000 * scale), 9)
        spans = [intervals.fisher(float(r), 9) for r in intervals.pearson(x, y)]
        rows.append(row("Fisher, Pearson", f"rho {rho:g}", "93 to 97 %", [s.low <= rho <= s.high for s in spans]))
        ranked = intervals.pearson(rankdata(x, axis=1), rankdata(y, axis=1))
        true = 6 / np.pi * np.arcsin(rho / 2)  # Spearman's rho of a bivariate normal
        spans = [intervals.fisher(float(r), 9, ranks=True) for r in ranked]
        rows.append(row("Bonett-Wright, Spearman", f"rho {rho:g}", "95 %", [s.low <= true <= s.high for s in spans]))
        few = int(2_500 * scale)
        pairs = zip(x[:few], y[:few], strict=True)
        found = [intervals.bca(a, b, draws=2_000, seed=i) for i, (a, b) in enumerate(pairs)]
        hits = [s is not None and s.low <= rho <= s.high for s in found]
        rows.append(row("BCa, Pearson", f"rho {rho:g}", "reported", hits))
    return rows


def corrected(rng: np.random.Generator, scale: float) -> list[Row]:
    """The attenuation-corrected interval, where it is not refused, at n = 9."""
    rows = []
    for share in (0.6, 0.8, 0.95):
        for rho in (0.0, 0.5, 0.8):
            x, theta = normal_pairs(rng, rho, int(1_500 * scale), 9)
            noise = (1 - share) / share
            y = theta + np.sqrt(noise) * rng.normal(size=theta.shape)
            hits = []
            for a, b in zip(x, y, strict=True):
                known = reliability.reliability(b, np.full(9, noise))
                found = attenuation.corrected(float(intervals.pearson(a, b)), 9, known.pooled)
                if found.ci is not None:
                    hits.append(found.ci.low <= rho <= found.ci.high)
            rows.append(row("corrected for noise", f"reliability {share:g}, rho {rho:g}", "95 %", hits))
    return rows


def reliabilities(rng: np.random.Generator, scale: float) -> list[Row]:
    """The interval of reliability: 9 models whose true rates are normal, 96 episodes each."""
    rows = []
    for spread in (0.05, 0.1):
        rate = rng.normal(0.5, spread, size=(int(10_000 * scale), 9)).clip(0.02, 0.98)
        k, n = rng.binomial(96, rate), np.full(9, 96)
        true = 1 - (0.25 - spread**2) / 96 / (spread**2 + (0.25 - spread**2) / 96)
        spans = [reliability.reliability(one / n, reliability.pooled_variance(one, n)).ci for one in k]
        hits = [s.low <= true <= s.high for s in spans]
        rows.append(row("reliability", f"true value {true:.2f}", "95 %", hits))
    return rows


def levels(rng: np.random.Generator, scale: float) -> list[Row]:
    """How often p < 0.05 when lineages differ in both scores and nothing else connects them (the paper's lineages)."""
    rows, blocks = [], lineages.blocks(PAPER)
    member = np.repeat(np.arange(3), [1, 2, 6])
    for share in (0.0, *lineages.SHARED):
        p: dict[str, list[bool]] = {"permutation of all": [], "within lineages": [], "within, centred": []}
        for seed in range(int(3_000 * scale)):
            own, between = rng.normal(size=(2, 9)), rng.normal(size=(2, 3))
            x, y = np.sqrt(share) * between[:, member] + np.sqrt(1 - share) * own
            naive = permutation_test(x[:, None], y[:, None], enumerate_up_to=1, draws=1_999, seed=seed)
            inside = permutation_test(x[:, None], y[:, None], blocks=blocks)
            centred = lineages.centred_test(x, y, PAPER)
            p["permutation of all"].append(naive.p[0, 0] < 0.05)
            p["within lineages"].append(inside.p[0, 0] < 0.05)
            p["within, centred"].append(centred is not None and centred.p < 0.05)
        goals = {"permutation of all": "reported" if share else "5 %"}
        for name, hits in p.items():
            setting = f"{share:.0%} between lineages"
            rows.append(row(f"type-I error, {name}", setting, goals.get(name, "at most 5 %"), hits))
    return rows


def mixed_models(rng: np.random.Generator, scale: float) -> list[Row]:
    """The slope's interval over 9 models: models alike but for capability, and models that differ beyond it."""
    rows = []
    for tasks, episodes, studies in ((1, 96, 400), (4, 24, 100)):
        for slope, spread in ((0.0, 0.0), (0.0, 0.5), (0.5, 0.5)):
            hits = []
            for _ in range(int(studies * scale)):
                x = rng.normal(size=9)
                x = (x - x.mean()) / x.std(ddof=1)
                eta = rng.normal(0, 1, tasks) * (tasks > 1) + (slope * x + spread * rng.normal(size=9))[:, None]
                eta = eta + spread * (tasks > 1) * rng.normal(size=(9, tasks))
                n = np.full((9, tasks), episodes)
                found = mixed.fit(rng.binomial(n, 1 / (1 + np.exp(-eta))), n, x)
                if isinstance(found, mixed.Slope):
                    hits.append(found.ci.low <= slope <= found.ci.high)
            setting = f"{tasks} task{'s' * (tasks > 1)}, slope {slope:g}, SD of models {spread:g}"
            rows.append(row("mixed model's slope", setting, "95 % or more", hits))
    return rows


def simulate(scale: float = 1.0, seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    parts = (correlations, corrected, reliabilities, levels, mixed_models)
    return [found for part in parts for found in part(rng, scale)]


def table(rows: list[dict] | list[Row]) -> str:
    """The markdown of docs/statistics.md."""
    lines = ["| | truth | should be | share of studies | studies |", "|---|---|---|---|---|"]
    for one in rows:
        r = one if isinstance(one, dict) else asdict(one)
        value = f"{100 * r['value']:.1f} % ± {100 * r['stderr']:.1f}"
        lines.append(f"| {r['what']} | {r['setting']} | {r['goal']} | {value} | {r['studies']} |")
    return "\n".join(lines)


def main() -> None:
    from datetime import UTC, datetime

    start = time.process_time()
    rows = simulate()
    out = {
        "command": "python benchmarks/coverage.py",
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{platform.machine()}, one core",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("numpy", "scipy")}},
        "cpu_s": round(time.process_time() - start, 1),
        "rows": [asdict(one) for one in rows],
    }
    (HERE / "results" / "coverage.json").write_text(json.dumps(out, indent=1) + "\n")
    page = HERE.parent / "docs" / "statistics.md"
    text = page.read_text()
    before, rest = text.split("<!-- coverage -->\n", 1)
    after = rest.split("<!-- end of coverage -->", 1)[1]
    page.write_text(f"{before}<!-- coverage -->\n{table(rows)}\n<!-- end of coverage -->{after}")
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
