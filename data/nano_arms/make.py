"""What the probing and divergence notebooks look at: six ways on from one nano VLM, by the project's own verbs.

    python data/nano_arms/make.py                                  # from the default nano VLM
    python data/nano_arms/make.py --base data/nano/qwen3_vl-xs     # from another one

Demonstrations are recorded once (runs/nano_arms/demos), every arm is trained below runs/nano_arms/BASE-… and shipped
here: fp16 weights with card.json, sketches of the training paths (trajectories/), and a small store with depth and
segmentation that no arm was trained on (probes/). Issued again, it does only what is missing.

Trap: weights are exact for one machine and version of torch; elsewhere they differ in the last digits and then in all.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RUNS = Path("runs/nano_arms")
DEMOS = ("--tasks", "touch", "pick", "switch", "--episodes", "900")
# Short tasks in one look: readouts are fitted on episodes, and where things stand is a matter of the camera.
PROBES = ("--tasks", "touch", "pick", "--episodes", "80", "--domains", "A", "--seed", "1000", "--size", "72")
STEPS = 512  # a power of two, so that the last snapshot is the end
SEEDS = 4
LICENCE = "the project's (LICENSE): weights and training data were made by this project alone"
verb = runpy.run_path(str(HERE.parent / "nano" / "make.py"))["verb"]  # runs `vlm4vla …` and writes down its cost


@dataclass(frozen=True)
class Arm:
    """One training from the base. settings: over those of the preset `nano`. seeds: of its runs; the first is shipped.
    twin: whether the second is shipped, too. path: whether the training paths are."""

    name: str
    what: str
    settings: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    twin: bool = False
    path: bool = False


def words(*questions: str) -> tuple[str, ...]:
    """Settings of the language objective on these kinds of questions."""
    return ("--objective", "language", "--batch-size", "8", "--questions-per-picture", "4", "--questions", *questions)


FOUR = tuple(range(SEEDS))
ARMS = (
    Arm("vlm", "VLM-tuned: embodied and general questions about demonstrations", words("embodied", "general"), FOUR,
        path=True),
    Arm("vla", "VLA-tuned: actions", (), FOUR, twin=True, path=True),
    Arm("spatial", "auxiliary-tuned: questions of the spatial mix", words("spatial")),
    Arm("fast", "FAST-injected: actions as text tokens", ("--objective", "fast", "--batch-size", "16")),
    Arm("scratch", "VLA-trained from random weights: actions, the network alone taken from the base",
        ("--init", "scratch")),
)  # fmt: skip


def train(arm: Arm, seed: int, base: Path, runs: Path, steps: int) -> Path:
    """The run folder of one arm and seed, trained where it is not yet; its cost stands beside it."""
    run = runs / f"{arm.name}-{seed}"
    verb(
        "train", "nano", "--backbone", base, "--data", RUNS / "demos", "--out", run, "--seed", str(seed),
        "--max-steps", str(steps), "--save-every", "0", "--val-every", "0", "--val-rows", "96", "--snapshots", "sketch",
        *arm.settings,
        cost=None if (run / "checkpoints" / f"step-{steps:06d}").is_dir() else cost_of(run),
    )  # fmt: skip
    return run


def card(arm: Arm, run: Path, base: Path) -> dict[str, Any]:
    """What a reader should know of a shipped arm; `ship` adds size and fingerprint."""
    from vlm4vla_core import folders
    from vlm4vla_core.checkpoint import resolve

    about, last = folders.read_json(run / "run.json"), resolve(run)
    start, end = (folders.read_manifest(folder, "checkpoint") for folder in (last.parent / "step-000000", last))
    known = folders.read_json(base / "card.json") if (base / "card.json").is_file() else {}
    settings = about["identity"]
    return {
        "name": arm.name, "what": arm.what, "licence": LICENCE,
        "recipe": f"data/nano_arms/make.py: vlm4vla train nano {' '.join(arm.settings)}".strip(),
        "base": {"name": base.name, "weights": known.get("weights"), "score": known.get("capability", {}).get("score")},
        "settings": settings, "seed": settings["seed"], "steps": end["step"],
        "pictures_seen": end["step"] * settings["batch_size"],
        "data": f"vlm4vla record tabletop {' '.join(DEMOS)} (looks A, B, C)",
        "training_cpu_s": round(sum(part["cpu_s"] for part in folders.read_json(cost_of(run))), 1),
        "hardware": "one thread",
        "held_out": {"weights": "fp32, before storage in fp16", "start": start["metrics"], "end": end["metrics"]},
    }  # fmt: skip


def cost_of(run: Path) -> Path:
    return run.with_name(f"{run.name}.cost.json")


def ship_path(run: Path, folder: Path, base: str) -> None:
    """Copy what a training path consists of: run.json, log.jsonl and the sketches, no weights."""
    about = json.loads((run / "run.json").read_text())
    about["config"]["backbone"] = base
    text = json.dumps(about, indent=1) + "\n"
    if (folder / "run.json").is_file() and (folder / "run.json").read_text() == text:
        return
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run / "trajectory", folder / "trajectory")
    shutil.copy(run / "log.jsonl", folder)
    (folder / "run.json").write_text(text)  # last: what is cut short is copied again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a shipped nano VLM; the default one when left out")
    parser.add_argument("--steps", type=int, default=STEPS, help="of every arm")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to ship to")
    given = parser.parse_args()
    os.chdir(HERE.parents[1])  # so that no path of this machine is written down

    from vlm4vla_core import folders
    from vlm4vla_core.nano import ship
    from vlm4vla_core.presets import DEFAULT

    base = Path(os.path.relpath(given.base or DEFAULT))
    known = folders.read_manifest(base, "checkpoint")["fingerprint"]
    runs = RUNS / f"{base.name}-{known[:6]}-{given.steps}"
    verb("record", "tabletop", *DEMOS, "--out", RUNS / "demos", "--workers", "1")
    verb("record", "tabletop", *PROBES, "--geometry", "--out", given.out / "probes", "--workers", "1")
    if not folders.current(given.out / "base", "checkpoint", **_made(base)):
        with folders.new_folder(given.out / "base", "checkpoint") as folder:
            shutil.copytree(base, folder, dirs_exist_ok=True)
    for arm in ARMS:
        for number, seed in enumerate(arm.seeds):
            run = train(arm, seed, base, runs, given.steps)
            if number <= arm.twin:
                ship(run, given.out / (f"{arm.name}-twin" if number else arm.name), card(arm, run, base))
            if arm.path:
                ship_path(run, given.out / "trajectories" / run.name, str(base))
    spent = [part["cpu_s"] for cost in sorted(runs.glob("*.cost.json")) for part in folders.read_json(cost)]
    size = sum(file.stat().st_size for file in given.out.rglob("*") if file.is_file())
    print(f"{given.out}: {size / 1e6:.1f} MB; training took {sum(spent):.0f} CPU seconds")


def _made(folder: Path) -> dict[str, Any]:
    from vlm4vla_core import folders

    manifest = folders.read_manifest(folder, "checkpoint")
    return {"config": manifest["config"], "inputs": manifest["inputs"]}


if __name__ == "__main__":
    main()
