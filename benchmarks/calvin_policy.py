"""A small policy learnt from scripted demonstrations in CALVIN's scenes A, B, C, tried in scene D beside baselines.

    CALVIN_ROOT=… python benchmarks/calvin_policy.py WORK --backbone NANO_VLM [--chains 30] [--steps 450]

types the verbs that a user would type (each does nothing where its product is there); results/calvin_policy.json.
The first N chains are a part of the benchmark, the demonstrations are scripted and of four tasks: no number here is
CALVIN's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import tyro
from tyro.conf import Positional

from vlm4vla_core import folders
from vlm4vla_core.evaluation import chain_summary
from vlm4vla_core.sims.calvin.chains import official_chains

TASKS = ("open_drawer", "close_drawer", "turn_on_led", "turn_off_led")


@dataclass(frozen=True)
class Args:
    work: Positional[Path]
    """Folder for demonstrations, store, run and rows."""
    backbone: str
    """Nano VLM to fine-tune: a checkpoint or run."""
    chains: int = 30
    """First chains of the official list."""
    steps: int = 450
    """Steps of fine-tuning."""
    demonstrations: int = 60
    """In scenes A, B, C; four more in D, which only tell the validation loss."""
    workers: int = 2
    """Processes of recording and evaluation."""


def verb(*words: object) -> None:
    subprocess.run([str(Path(sys.executable).parent / "vlm4vla"), *map(str, words)], check=True)


def policy_rows(rows: pd.DataFrame) -> dict[str, Any]:
    """Chains, and how the first part of each went, by task: what the chains' mean hides."""
    lengths, chains = rows.sort_values("episode")["chain"].to_numpy(int), official_chains()
    first: dict[str, list[int]] = {}
    for episode, length in zip(sorted(rows["episode"]), lengths, strict=True):
        first.setdefault(chains[episode].tasks[0], []).append(int(length > 0))
    taught = [one for task, found in first.items() if task in TASKS for one in found]
    return {
        **asdict(chain_summary(lengths)),
        "first_part": {task: [sum(found), len(found)] for task, found in sorted(first.items())},
        "first_part_of_taught_tasks": [sum(taught), len(taught)],
    }


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    made, store, run = args.work / "demonstrations", args.work / "store", args.work / "run"
    calvin = folders.project_root() / ".venv-calvin" / "bin" / "python"
    record = [
        calvin,
        "-m",
        "vlm4vla_core.sims.calvin.layout",
        made,
        "--training",
        args.demonstrations,
        "--validation",
        4,
    ]
    subprocess.run([*map(str, record), "--tasks", *TASKS, "--workers", str(args.workers)], check=True)
    verb("convert", "calvin", made, "--out", store, "--cameras", "rgb_static", "--size", 112)
    train = ["--max-steps", args.steps, "--schedule", "cosine", "--save-every", 150]
    verb("train", "nano", "--backbone", args.backbone, "--data", store, "--out", run, *train)
    found: dict[str, Any] = {}
    policies = {"random": [], "zero": [], "mean-action": ["--data", store], "scripted": [], str(run): []}
    for policy, more in policies.items():
        out = args.work / "rows" / Path(policy).name
        where = ["--benchmark", "calvin-abc-d@1", "--episodes", args.chains, "--workers", args.workers, "--out", out]
        verb("evaluate", policy, *where, *more)
        found["learnt" if policy == str(run) else policy] = policy_rows(pd.read_parquet(out / "rows.parquet"))
    for name, one in found.items():
        low, high = one["interval"]
        print(f"{name:12} mean length {one['mean']:.2f} [{low:.2f}, {high:.2f}], first parts {one['first_part']}")
    protocol = folders.read_manifest(args.work / "rows" / "random", "rollouts")["config"]["benchmark"]
    trained = folders.read_json(run / "run.json")["config"]
    kept = ("objective", "chunk", "head", "batch_size", "lr", "max_steps", "schedule", "augmentation", "seed")
    command = (
        f"CALVIN_ROOT=CHECKOUT python benchmarks/calvin_policy.py WORK --chains {args.chains} --steps {args.steps}"
    )
    load = f"load average {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores: other work ran on the machine"
    result = {
        "label": f"the first {args.chains} of 1,000 chains of calvin-abc-d@1; policy fine-tuned from a nano VLM on "
        f"{args.demonstrations} locally scripted demonstrations of {len(TASKS)} tasks in scenes A, B, C",
        "backbone": "/".join(Path(args.backbone).parts[-2:]),
        "training": {key: trained[key] for key in kept if key in trained},
        "policies": found,
        "tasks_taught": list(TASKS),
        "protocol": protocol,
        "store": folders.read_json(store / folders.STORE_MANIFEST)["counts"],
        "made_by": {"command": command, "note": load, **folders.provenance()},
    }
    folders.write_json(Path(__file__).parent / "results" / "calvin_policy.json", result)


if __name__ == "__main__":
    main()
