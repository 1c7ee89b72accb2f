"""SIMPLER-Bridge in ManiSkill 3's port: baselines on all tasks, and a small policy that learnt one from scripted data.

Run:  python benchmarks/simpler_bridge.py WORK [--model nano] [--out benchmarks/results/simpler_bridge_ms3.json]
It only issues the commands that it prints and writes down; in WORK, what is there already is not made again.
Needs `make venv-simpler` and the assets (docs/simulators.md). About an hour on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from vlm4vla_core import folders

BENCHMARK, TASK, EPISODES = "simpler-bridge-ms3@1", "widowx_carrot_on_plate", 24
DEMOS = (
    f"record {BENCHMARK} --tasks {TASK} --episodes {{count}} --noise 0.15 "
    "--out {work}/demos --json {work}/demos.json"
)
TRAINED = "train {model} --data {work}/demos --out {work}/vla"
ROLLED = f"evaluate {{policy}} --benchmark {BENCHMARK} --episodes {EPISODES} --out {{work}}/{{name}}"
LEARNED = {  # folder of the rows, policy
    "vla": ("vla-rows", "{work}/vla"),
    "vla, looks at every step": ("vla-execute1", "{work}/vla --execute 1"),
    "mean-action": ("mean-action-rows", "mean-action --data {work}/demos"),
}


def commands(work: Path, model: str, count: int, blind: tuple[str, ...]) -> dict[str, str]:
    """What is issued, by the name of what it gives."""
    fixed = {"work": work, "model": model, "count": count}
    issued = {"demos": DEMOS.format(**fixed), "training": TRAINED.format(**fixed)}
    for name in ("random", "zero", "scripted"):
        issued[name] = ROLLED.format(policy=name, name=name, **fixed)
    for name, (folder, policy) in LEARNED.items():
        issued[name] = ROLLED.format(policy=policy.format(**fixed), name=folder, **fixed) + f" --tasks {TASK}"
    for kind in blind:
        policy = LEARNED["vla"][1].format(**fixed) + (f" --data {work}/demos" if kind == "image" else "")
        issued[f"vla, no {kind}"] = (
            ROLLED.format(policy=policy, name=f"no-{kind}", **fixed) + f" --tasks {TASK} --blind {kind}"
        )
    return issued


def told(rows: Path) -> list[dict[str, Any]]:
    """Per task: successes by the protocol's rule (the last step) with Wilson's interval, at any step, ever grasped."""
    import pandas as pd

    from vlm4vla_core.evaluation import bounded_mean
    from vlm4vla_core.results import success_table

    table = pd.read_parquet(rows)
    found = success_table(table, ["task"]).to_dict("records")
    for one in found:
        mine = table[table["task"] == one["task"]]
        grasped = mine["partial"].astype(float)
        one |= {"success_ever": int(mine["success_ever"].sum()), "grasped": float(grasped.mean())}
        one["grasped_interval"] = bounded_mean(grasped.to_numpy(), 1.0)
        one["note"] = sorted(set(mine["note"]))
    return found


def validated(run: Path) -> Any:
    """The training's held-out losses by step, beside that of a constant action."""
    log = run / "log.jsonl"
    lines = map(json.loads, log.read_text().splitlines()) if log.exists() else ()
    told = ("arm", "constant_arm", "gripper_accuracy", "gripper_majority", "rows")
    return [
        {"step": line["step"], **{name: line["validation"][name] for name in told}}
        for line in lines
        if "validation" in line
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--demonstrations", type=int, default=200)
    parser.add_argument("--blind", nargs="*", default=["image", "language"])
    parser.add_argument("--collect", action="store_true", help="run nothing, take what is there")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/simpler_bridge_ms3.json"))
    args = parser.parse_args()
    issued = commands(args.work, args.model, args.demonstrations, tuple(args.blind))
    results: dict[str, Any] = {}
    for name, command in issued.items():
        print("vlm4vla", command, flush=True)
        if not args.collect:
            subprocess.run([sys.executable, "-m", "vlm4vla_core.cli", *shlex.split(command)], check=True)
        if command.startswith("evaluate"):
            rows = Path(command.split("--out ")[1].split()[0]) / "rows.parquet"
            results[name] = told(rows) if rows.exists() else "not run"
    from vlm4vla_core.sims import benchmark

    bench, demos = benchmark(BENCHMARK), args.work / "demos.json"
    protocol = bench.describe()
    found = {
        "benchmark": protocol,
        "label": ("stand-in assets; " if protocol["stand_in_assets"] else "")
        + "ManiSkill 3's port, not the published benchmark; scripted demonstrations",
        "results": results,
        "training": validated(args.work / "vla"),
        "demonstrations": folders.read_json(demos)["counts"] if demos.exists() else "not recorded",
        "commands": [f"vlm4vla {command}".replace(str(args.work), "WORK") for command in issued.values()],
        "made_by": folders.provenance(),
    }
    folders.write_json(args.out, found)
    for name, table in results.items():
        for row in table if isinstance(table, list) else []:
            print(
                f"{name:18} {row['task']:30} {row['successes']:3d} of {row['episodes']:3d}  "
                f"[{row['low']:.3f}, {row['high']:.3f}]  ever {row['success_ever']:3d}  grasped {row['grasped']:.2f}"
            )


if __name__ == "__main__":
    main()
