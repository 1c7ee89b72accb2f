"""Does pretraining help a nano policy? The default nano VLM against the same network from scratch, at equal steps.

Each arm is trained by the preset `nano` on demonstrations of touch, push, pick and put, and rolled out in the looks
of training (tabletop-tasks-abc@1) and in the unseen one (tabletop-tasks@1). Only verbs are called; issued again, it
does what is missing. CPU seconds are of the training process.

Example: python benchmarks/nano_vla.py --seeds 0 1 2 --json benchmarks/results/nano_vla.json
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vlm4vla_core import folders

TASKS = ("touch", "push", "pick", "put")
BENCHMARKS = {"A-C": "tabletop-tasks-abc@1", "D": "tabletop-tasks@1"}


def verb(*arguments: str | Path) -> dict[str, float]:
    """Run `vlm4vla …` on one thread; its CPU and wall seconds. Raises SystemExit when it fails."""
    began = time.time()
    command = [sys.executable, "-m", "vlm4vla_core.cli", *map(str, arguments)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command[3:])}")
    return {"cpu_s": round(used.ru_utime + used.ru_stime, 1), "wall_s": round(time.time() - began, 1)}


def arm(name: str, changes: list[str], seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Train and roll out one arm; its success by look and task, with counts."""
    run, cost = given.runs / f"{name}-{seed}", given.runs / f"{name}-{seed}.cost.json"
    settings = ["--seed", str(seed), "--max-steps", str(given.steps), *changes]
    spent = verb("train", "nano", "--data", given.runs / "demos", "--out", run, *settings)
    if not cost.is_file():
        folders.write_json(cost, spent)
    found: dict[str, Any] = {"arm": name, "seed": seed, "steps": given.steps, "training": folders.read_json(cost)}
    for look, benchmark in BENCHMARKS.items():
        scores = given.runs / f"{name}-{seed}-{look}.json"
        verb(
            "evaluate", run, "--benchmark", benchmark, "--tasks", *TASKS, "--episodes", str(given.episodes),
            "--execute", "4", "--json", scores,
        )  # fmt: skip
        found[look] = {row["task"]: row for row in folders.read_json(scores)["tasks"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=["pretrained", "scratch"], default=["pretrained", "scratch"])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--demos", type=int, default=12_000)
    parser.add_argument("--backbone", default="", help="another VLM than the preset's")
    parser.add_argument("--runs", type=Path, default=Path("runs/nano/policies"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    verb("record", "tabletop", "--tasks", *TASKS, "--episodes", str(given.demos), "--out", given.runs / "demos")
    own = ["--backbone", given.backbone] if given.backbone else []
    arms = {"pretrained": own, "scratch": [*own, "--init", "scratch"]}
    rows = [arm(name, arms[name], seed, given) for name in given.arms for seed in given.seeds]
    cells = [(look, task) for look in BENCHMARKS for task in TASKS]
    print(f"{'arm':<12}{'seed':>5}{'CPU s':>8}" + "".join(f"{look + ' ' + task:>11}" for look, task in cells))
    for row in rows:
        rates = "".join(f"{row[look][task]['rate']:>11.3f}" for look, task in cells)
        print(f"{row['arm']:<12}{row['seed']:>5}{row['training']['cpu_s']:>8}{rates}")
    if given.json:
        about = {
            "command": " ".join(sys.argv), "date": datetime.date.today().isoformat(), "made_by": folders.provenance(),
            "hardware": "one thread of a two-core machine shared with other jobs; CPU time",
        }  # fmt: skip
        about |= {"demonstrations": given.demos, "episodes_per_task": given.episodes}
        folders.write_json(given.json, {**about, "arms": rows})


if __name__ == "__main__":
    main()
