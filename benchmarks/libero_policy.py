"""A learned policy on real LIBERO physics: 60 scripted demonstrations of libero_spatial task 0, the nano VLM fine-tuned
on them, 20 initial states that no demonstration began from, beside the baselines and the shortcut checks.

It types the verbs a user would type, each of which does only what is missing, so it can be stopped and issued again.

Run:  OMP_NUM_THREADS=1 python benchmarks/libero_policy.py [--work runs/libero-policy] [--preset nano]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from vlm4vla_core import folders

BENCHMARK, TASK = "libero-spatial@1", "0"
OPTIONS = ("antialias=off", "size=128")


def verb(*words: object) -> list[str]:
    told = ["vlm4vla", *map(str, words)]
    print("$", " ".join(told), flush=True)
    subprocess.run([sys.executable, "-m", "vlm4vla_core.cli", *told[1:]], check=True)
    return told


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("runs/libero-policy"))
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--demonstrations", type=int, default=60)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], help="further words for `vlm4vla train`")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/libero_policy.json"))
    args = parser.parse_args()
    demos, run = args.work / "demos", args.work / args.preset
    common = ["--tasks", TASK, "--options", *OPTIONS, "--workers", args.workers]
    commands = [
        verb("record", BENCHMARK, *common, "--episodes", args.demonstrations, "--noise", "0.1", "--out", demos),
        verb("train", args.preset, "--data", demos, "--out", run, *args.set),
    ]
    policies: dict[str, list[object]] = {
        "learned": [run], "learned, no language": [run, "--blind", "language"],
        "learned, no image": [run, "--blind", "image", "--data", demos],
        "random": ["random"], "zero": ["zero"], "mean action": ["mean-action", "--data", demos],
        "scripted": ["scripted"],
    }  # fmt: skip
    found = {}
    for name, words in policies.items():
        place = args.work / "eval" / name.replace(", ", "-").replace(" ", "-")
        result = place.with_suffix(".json")
        asked = ["--benchmark", BENCHMARK, *common, "--episodes", args.episodes, "--out", place, "--json", result]
        commands.append(verb("evaluate", *words, *asked))
        told = json.loads(result.read_text())
        found[name] = {key: told[key] for key in ("episodes", "successes", "rate", "interval", "partial")}
    from vlm4vla_core.episodes.store import EpisodeStore

    made_by = sorted(set(EpisodeStore.open(demos).episodes["made_by"]))
    print(f"\n{'':<24}{'n':>4}{'success':>9}   95 % Wilson")
    for name, one in found.items():
        low, high = one["interval"]
        print(f"{name:<24}{one['episodes']:4d}{one['rate']:9.2f}   [{low:.2f}, {high:.2f}]")
    told = {
        "what": " ".join(__doc__.split("\n\n")[0].split()), "benchmark": BENCHMARK, "task": TASK, "options": OPTIONS,
        "demonstrations": len(EpisodeStore.open(demos).lengths),
        "labels": ["scripted data", "one task of ten", *made_by],
        "commands": [" ".join(words) for words in commands], "results": found, "load_average": os.getloadavg(),
        "made_by": folders.provenance(),
    }  # fmt: skip
    folders.write_json(args.out, told)


if __name__ == "__main__":
    main()
