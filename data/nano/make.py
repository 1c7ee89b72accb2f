"""The whole pretraining of the nano zoo: one command, unattended, resumable, nothing but the project's own verbs.

    python data/nano/make.py                    # all recipes, one after the other
    python data/nano/make.py paligemma-s --jobs 2

Scenes and demonstrations are recorded once (runs/nano/scenes, runs/nano/hand); each recipe is trained (runs/nano/NAME),
asked `tabletop-vqa@1` (200 questions of each kind) and shipped (data/nano/NAME: fp16 weights, config, tokenizer,
card.json). Recipes of `HAND` also see the demonstrations, the others scenes alone. Issued again, it does only what is
missing. Processes are single-threaded; CPU seconds are those of the processes themselves.

Trap: weights are exact for one machine and version of torch; elsewhere they differ in the last digits and then in all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RUNS = Path("runs/nano")
SCENES, DEMONSTRATIONS, EPISODES = 30_000, 2_400, 200
RECORDED = {
    "scenes": ("--tasks", "scene", "--episodes", str(SCENES)),  # looks U, V, W; no hand
    "hand": ("--tasks", "touch", "push", "pick", "put", "--episodes", str(DEMONSTRATIONS), "--seed", "1"),  # A, B, C
}
# They also see the hand, in the looks of training.
HAND = {"paligemma-m", "paligemma-s", "paligemma-s-speak", "paligemma-s-long"}
LICENCE = "the project's (LICENSE): weights and training data were made by this project alone"


def verb(*arguments: str | Path, cost: Path | None = None) -> None:
    """Run `vlm4vla …` on one thread and add its cost to the list in `cost`. Raises SystemExit when it fails."""
    command = [sys.executable, "-m", "vlm4vla_core.cli", *map(str, arguments)]
    began = time.time()
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if cost is not None:
        spent = {"cpu_s": round(used.ru_utime + used.ru_stime, 1), "wall_s": round(time.time() - began, 1)}
        kept = json.loads(cost.read_text()) if cost.is_file() else []
        cost.parent.mkdir(parents=True, exist_ok=True)
        cost.write_text(json.dumps([*kept, {"command": " ".join(command[3:]), **spent}], indent=1) + "\n")
    if process.returncode:
        raise SystemExit(f"failed ({process.returncode}): {' '.join(command[3:])}")


def stages_of(name: str) -> list[tuple[str, Any]]:
    from vlm4vla_core.presets import make_stages

    return make_stages(str(HERE / "recipes" / f"{name}.toml"))


def go_on(name: str) -> None:
    """Begin a run with the finished stages of another one that has the same settings and pictures, as hard links.

    Training is exact, so they are what this run would make. Their cost is what their logs say that the steps took.
    """
    mine = stages_of(name)
    for other in sorted(path.stem for path in (HERE / "recipes").glob("*.toml")):
        if other == name or (other in HAND) != (name in HAND):
            continue
        shared = 0
        for (title, config), own in zip(stages_of(other), mine, strict=False):
            done = RUNS / other / title / "checkpoints" / f"step-{config.max_steps:06d}"
            if (title, config) != own or not done.is_dir():
                break
            shared += 1
        if shared and not (RUNS / name).exists():
            titles, ignored = [title for title, _ in mine[:shared]], shutil.ignore_patterns("features", "eval", ".lock")
            for title in titles:
                shutil.copytree(RUNS / other / title, RUNS / name / title, ignore=ignored, copy_function=os.link)
            spent = sum(map(logged, (RUNS / name / title for title in titles)))
            entry = {"command": f"{', '.join(titles)}: as {other}, from the logs", "cpu_s": round(spent, 1)}
            (RUNS / f"{name}.cost.json").write_text(json.dumps([entry], indent=1) + "\n")


def logged(run: Path) -> float:
    """Seconds that a stage's steps took, as its log has their rate."""
    batch = json.loads((run / "run.json").read_text())["identity"]["batch_size"]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    told, steps = [line for line in lines if "samples_per_s" in line], 0
    seconds = 0.0
    for line in told:
        seconds += (line["step"] - steps) * batch / line["samples_per_s"]
        steps = line["step"]
    return seconds


def make(name: str) -> None:
    """One model: train, ask, ship."""
    from vlm4vla_core import folders
    from vlm4vla_core.nano import ship

    recipe, run = HERE / "recipes" / f"{name}.toml", RUNS / name
    stages, cost = stages_of(name), RUNS / f"{name}.cost.json"
    last, scores = run / stages[-1][0], RUNS / f"{name}.vqa.json"
    stores = ["scenes", "hand"] if name in HAND else ["scenes"]
    go_on(name)
    verb("train", recipe, "--data", *(RUNS / store for store in stores), "--out", run, cost=cost)
    verb("evaluate", last, "--benchmark", "tabletop-vqa@1", "--episodes", EPISODES, "--json", scores)
    found = folders.read_json(scores)
    card: dict[str, Any] = {
        "name": name,
        "licence": LICENCE,
        "recipe": f"data/nano/recipes/{name}.toml",
        "stages": [{"name": title, **config.identity()} for title, config in stages],
        "seed": stages[0][1].seed,
        "data": [" ".join(("vlm4vla record tabletop", *RECORDED[store])) for store in stores],
        "pictures_seen": {title: config.max_steps * config.batch_size for title, config in stages},
        "training_cpu_s": round(sum(part["cpu_s"] for part in folders.read_json(cost)), 1),
        "hardware": "one thread",
        "capability": {
            "benchmark": found["benchmark"]["protocol"], "weights": "fp32, before storage in fp16",
            **{key: found[key] for key in ("score", "stderr", "interval", "questions", "kinds")},
        },
    }  # fmt: skip
    ship(last, HERE / name, card)
    print(f"{name}: score {found['score']:.3f}, shipped in {HERE / name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="recipes; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time, one thread each")
    given = parser.parse_args()
    known = sorted(path.stem for path in (HERE / "recipes").glob("*.toml"))
    if unknown := sorted(set(given.names) - set(known)):
        parser.error(f"no recipe {unknown[0]}; there are {', '.join(known)}")
    for store, words in RECORDED.items():
        verb("record", "tabletop", *words, "--out", RUNS / store)
    with ThreadPoolExecutor(given.jobs) as pool:
        for future in [pool.submit(make, name) for name in given.names or known]:
            future.result()


if __name__ == "__main__":
    main()
