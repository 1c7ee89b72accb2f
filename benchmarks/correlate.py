"""How long `vlm4vla correlate` takes on the paper's tables, beside scipy's own permutation routines in the same run.

    OMP_NUM_THREADS=1 python benchmarks/correlate.py     # half a minute

CPU seconds of one core (other jobs on the machine then matter little). scipy's routines take one pair at a time; with a
statistic that is not vectorised they are asked for 2,000 permutations only, because all 9! would take minutes.
"""

from __future__ import annotations

import json
import math
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

RESULT = Path(__file__).parent / "results" / "correlate.json"


def cpu(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def command() -> dict[str, float]:
    """The whole process, imports and all: CPU and wall seconds of `vlm4vla correlate` without arguments."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    words = [sys.executable, "-c", "from vlm4vla_core.cli import main; raise SystemExit(main(['correlate']))"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_s": round(used, 2), "wall_s": round(time.perf_counter() - start, 2)}


def main() -> None:
    from scipy import stats

    from probes import paper
    from probes.permutation import permutation_test
    from probes.scores import gather

    whole = min((command() for _ in range(3)), key=lambda one: one["cpu_s"])
    scores = gather(paper.capability(), paper.performance())
    x, y = scores.x[:, 0], scores.y[:, 0]
    every = math.factorial(9)
    ours = min(cpu(lambda: permutation_test(scores.x, scores.y)) for _ in range(3))
    few = 2_000
    method = stats.PermutationMethod(n_resamples=every)
    pearsonr = cpu(lambda: stats.pearsonr(x, y, method=method))

    def statistic(a: np.ndarray, axis: int = -1) -> np.ndarray:
        a, b = a - a.mean(axis=axis, keepdims=True), y - y.mean()
        return (a * b).sum(axis=axis) / np.sqrt((a * a).sum(axis=axis) * (b * b).sum())

    vectorised = cpu(
        lambda: stats.permutation_test(
            (x,), statistic, permutation_type="pairings", n_resamples=every, vectorized=True, batch=every // 9
        )
    )
    plain = cpu(
        lambda: stats.permutation_test(
            (x,), lambda a: stats.pearsonr(a, y)[0], permutation_type="pairings", n_resamples=few,
            vectorized=False, rng=np.random.default_rng(0),
        )
    )  # fmt: skip
    rows = [
        ("ours, 3 pairs, all 9!, with max |r|", every, ours),
        ("scipy.stats.pearsonr(PermutationMethod), 1 pair", every, pearsonr),
        ("scipy.stats.permutation_test, vectorised r, 1 pair", every, vectorised),
        ("scipy.stats.permutation_test, pearsonr, 1 pair", few, plain),
    ]
    print(f"vlm4vla correlate, everything: {whole['cpu_s']} s CPU, {whole['wall_s']} s wall (goal: 5 s on one core)")
    for name, count, seconds in rows:
        print(f"{name:52} {count:7d} permutations  {seconds:7.2f} s  {1e6 * seconds / count:8.2f} µs each")
    out = {
        "command": "OMP_NUM_THREADS=1 python benchmarks/correlate.py",
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{platform.machine()}, one core; the machine was shared, so CPU seconds are given",
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("numpy", "scipy", "pandas")}},
        "goal": "the full default report under 5 s on one core",
        "full_report": whole,
        "permutations": [
            {
                "what": name,
                "permutations": count,
                "cpu_s": round(seconds, 3),
                "us_each": round(1e6 * seconds / count, 3),
            }
            for name, count, seconds in rows
        ],
    }
    RESULT.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
