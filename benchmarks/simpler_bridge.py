"""SIMPLER-Bridge in ManiSkill 3's port: baselines on all tasks, and a small policy that learnt one from scripted data.

Run:  python benchmarks/simpler_bridge.py WORK [--model tiny] [--out benchmarks/results/simpler_bridge_ms3.json]
It only issues the commands that it prints and writes down; in WORK, what is there already is not made again.
Needs `make venv-simpler` and the assets (docs/simulators.md). About an hour on two idle cores.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

BENCHMARK, TASK, EPISODES = "simpler-bridge-ms3@1", "widowx_carrot_on_plate", 24
DEMOS = f"record {BENCHMARK} --tasks {TASK} --episodes 60 --noise 0.15 --out {{work}}/demos --json {{work}}/demos.json"
TRAINED = "train {model} --data {work}/demos --out {work}/vla"
ROLLED = f"evaluate {{policy}} --benchmark {BENCHMARK} --episodes {EPISODES} --out {{work}}/{{name}}"
ROLLED += " --json {work}/{name}.json"
LEARNED = {"vla": "{work}/vla", "mean-action": "mean-action --data {work}/demos"}


def commands(work: Path, model: str, blind: tuple[str, ...]) -> dict[str, str]:
    """What is issued, by the name of what it gives."""
    fixed = {"work": work, "model": model}
    issued = {"demos": DEMOS.format(**fixed), "training": TRAINED.format(**fixed)}
    for name in ("random", "zero", "scripted"):
        issued[name] = ROLLED.format(policy=name, name=name, **fixed)
    for name, policy in LEARNED.items():
        issued[name] = ROLLED.format(policy=policy.format(**fixed), name=name + "-rows", **fixed) + f" --tasks {TASK}"
    for kind in blind:
        policy = LEARNED["vla"].format(**fixed) + (f" --data {work}/demos" if kind == "image" else "")
        issued[f"vla, no {kind}"] = (
            ROLLED.format(policy=policy, name=f"no-{kind}", **fixed) + f" --tasks {TASK} --blind {kind}"
        )
    return issued


def told(path: Path) -> dict[str, Any]:
    """The numbers of one evaluation."""
    found = folders.read_json(path)
    keep = ("rate", "interval", "episodes", "successes", "coverage", "tasks", "partial")
    return {key: found[key] for key in keep if key in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--blind", nargs="*", default=["image", "language"])
    parser.add_argument("--collect", action="store_true", help="run nothing, take what is there")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/simpler_bridge_ms3.json"))
    args = parser.parse_args()
    issued = commands(args.work, args.model, tuple(args.blind))
    results: dict[str, Any] = {}
    for name, command in issued.items():
        print("vlm4vla", command, flush=True)
        if not args.collect:
            subprocess.run([sys.executable, "-m", "vlm4vla_core.cli", *shlex.split(command)], check=True)
        if "--json" not in command or name == "demos":
            continue
        try:
            results[name] = told(Path(command.split("--json ")[1].split()[0]))
        except InputError as error:
            results[name] = {"not run": str(error)}
    from vlm4vla_core.sims import benchmark

    bench = benchmark(BENCHMARK)
    found = {
        "benchmark": bench.describe(),
        "label": "stand-in assets; a port, not the published benchmark; demonstrations are scripted",
        "results": results,
        "demonstrations": folders.read_json(args.work / "demos.json")["counts"],
        "commands": [f"vlm4vla {command}" for command in issued.values()],
        "made_by": folders.provenance(),
    }
    folders.write_json(args.out, found)
    for name, one in results.items():
        if "not run" in one:
            print(f"{name:18} not run")
            continue
        for row in one["tasks"]:
            print(
                f"{name:18} {row['task']:30} {row['successes']:3d} of {row['episodes']:3d}  "
                f"[{row['low']:.3f}, {row['high']:.3f}]  grasped {row.get('partial', float('nan')):.2f}"
            )


if __name__ == "__main__":
    main()
