"""Scripted demonstrations on CALVIN's own physics, written as CALVIN writes its data: one npz per frame, annotations.

`training/` shows scenes A, B and C, `validation/` scene D, so that the reader (`vlm4vla convert calvin`), the split and
training run without the data set. `actions` is the pose that was measured one step later with the finger command,
`rel_actions` follows from it as in CALVIN. Killed and issued again, it makes only the demonstrations that are missing.

Trap: scripted data are not CALVIN's: no play, 9 of 34 tasks, no language embeddings; name them so wherever they go.

Example: .venv-calvin/bin/python -m vlm4vla_core.sims.calvin.layout data/calvin-scripted --training 108 --validation 9
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.sims.calvin.checkout import open_checkout
from vlm4vla_core.sims.calvin.expert import TASKS

GAP = 400  # frame numbers set apart for one demonstration
_MOST_STEPS, _TRIES = 200, 5
_DONE = "demonstration.json"


@dataclass(frozen=True)
class Args:
    out: Positional[Path]
    """Folder to write training/ and validation/ into."""
    training: int = 108
    """Demonstrations in scenes A, B and C."""
    validation: int = 9
    """Demonstrations in scene D."""
    tasks: tuple[str, ...] = TASKS
    """Tasks, taking turns; all that have a scripted expert when left out."""
    seed: int = 0
    """Seed of the whole recording."""
    depth: bool = False
    """Also write depth_static and depth_gripper."""
    renderer: str = "tiny"
    """tiny or egl."""
    workers: int = 1
    """Processes."""


@dataclass(frozen=True)
class Plan:
    """One demonstration before it is made; `number` is its place in its split."""

    number: int
    task: str
    scene: str
    seed: int


def plans(count: int, tasks: tuple[str, ...], scenes: tuple[str, ...], seed: int, split: int) -> list[Plan]:
    """Scene after scene, as `scene_info` needs it; within each, the tasks in turn."""
    made = []
    for number in range(count):
        scene = scenes[number * len(scenes) // count]
        drawn = int(np.random.SeedSequence([seed, split, number]).generate_state(1)[0])
        made.append(Plan(number, tasks[number % len(tasks)], scene, drawn))
    return made


def record(args: Args) -> int:
    """Write what is missing and describe the whole; returns the number of frames."""
    for task in args.tasks:
        if task not in TASKS:
            raise InputError(f"CALVIN has no scripted expert for '{task}'", fix=nearest(task, TASKS))
    splits = {"training": (args.training, ("A", "B", "C")), "validation": (args.validation, ("D",))}
    work = []
    for k, (name, (count, scenes)) in enumerate(splits.items()):
        (args.out / name).mkdir(parents=True, exist_ok=True)
        planned = plans(count, args.tasks, scenes, args.seed, k)
        settings = {
            "tasks": list(args.tasks),
            "count": count,
            "seed": args.seed,
            "depth": args.depth,
            "renderer": args.renderer,
        }
        _same(args.out / name / "recording.json", settings)
        work += [(args.out / name, plan) for plan in planned if not _marker(args.out / name, plan).is_file()]
    shares = [(work[k :: args.workers], args.depth, args.renderer) for k in range(args.workers)]
    if args.workers == 1:
        _make(shares[0])
    else:
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context

        with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
            list(pool.map(_make, shares))
    for name, (_, scenes) in splits.items():
        described = args.out / name / ".hydra" / "merged_config.yaml"  # CALVIN's own evaluation makes its world from it
        described.parent.mkdir(exist_ok=True)
        described.write_text(open_checkout().recorded_as(scenes[-1], egl=args.renderer == "egl"))
    return sum(_describe(args.out / name, count) for name, (count, _) in splits.items() if count)


def _same(path: Path, settings: dict[str, Any]) -> None:
    if path.is_file() and json.loads(path.read_text()) != settings:
        raise InputError("this folder holds a recording with other settings", where=path, fix="give another folder")
    path.write_text(json.dumps(settings))


def _marker(folder: Path, plan: Plan) -> Path:
    return folder / f".{plan.number:05d}.{_DONE}"


def _make(share: tuple[list[tuple[Path, Plan]], bool, str]) -> None:
    """Make these demonstrations in one simulation, of this process."""
    from vlm4vla_core.progress import progress
    from vlm4vla_core.sims.calvin import PROTOCOLS

    work, depth, renderer = share
    if not work:
        return
    simulator: Any = PROTOCOLS["calvin-abc-d@1"].make({"renderer": renderer})
    try:
        for folder, plan in progress(work, what="record CALVIN", unit="demonstration"):
            words, frames = _demonstration(simulator, plan, depth)
            frame: Any
            for k, frame in enumerate(frames):
                np.savez_compressed(folder / f"episode_{plan.number * GAP + k:07d}.npz", **frame)
            told = {"task": plan.task, "scene": plan.scene, "words": words, "frames": len(frames), "seed": plan.seed}
            _marker(folder, plan).write_text(json.dumps(told))
    finally:
        simulator.close()


def _demonstration(simulator: Any, plan: Plan, depth: bool) -> tuple[str, list[dict[str, np.ndarray]]]:
    """Instruction and frames of one demonstration that reached its goal."""
    from vlm4vla_core.episodes.transforms import calvin_relative

    for attempt in range(_TRIES):
        seen, words = simulator.practise(plan.task, plan.seed + attempt, plan.scene)
        frames: list[dict[str, np.ndarray]] = []
        while simulator.running and len(frames) < _MOST_STEPS:
            frame = {f"rgb_{name}": seen.render(f"rgb_{name}") for name in ("static", "gripper")}
            frame |= (
                {f"depth_{name}": simulator.depth(f"rgb_{name}") for name in ("static", "gripper")} if depth else {}
            )
            frame |= {"robot_obs": seen.state, "scene_obs": simulator.scene_state()}
            command = simulator.expert()
            seen = simulator.step(command)
            frames.append({**frame, "actions": np.append(seen.state[:6], command[6])})
        if simulator.outcome()["success"]:
            actions, states = (np.stack([frame[key] for frame in frames]) for key in ("actions", "robot_obs"))
            for frame, relative in zip(frames, calvin_relative(actions, states), strict=True):
                frame["rel_actions"] = relative
            return words, frames
    raise RuntimeError(f"{plan}: the expert failed {_TRIES} times")


def _describe(folder: Path, count: int) -> int:
    """The split's descriptions, from what was made; returns its frames."""
    told = list(_told(folder, count))
    spans = np.array([(number * GAP, number * GAP + one["frames"] - 1) for number, one in enumerate(told)])
    scenes = [one["scene"] for one in told]
    ranges = {scene: spans[[found == scene for found in scenes]] for scene in sorted(set(scenes))}
    info: Any = {f"calvin_scene_{scene}": [int(part[0, 0]), int(part[-1, 1])] for scene, part in ranges.items()}
    words: Any = {
        "language": {"ann": [one["words"] for one in told], "task": [one["task"] for one in told]},
        "info": {"episodes": [], "indx": [(int(first), int(last)) for first, last in spans]},
    }
    (folder / "lang_annotations").mkdir(exist_ok=True)
    np.save(folder / "ep_start_end_ids.npy", spans)
    np.save(folder / "ep_lens.npy", spans[:, 1] - spans[:, 0] + 1)
    np.save(folder / "scene_info.npy", info)
    np.save(folder / "lang_annotations" / "auto_lang_ann.npy", words)
    return int((spans[:, 1] - spans[:, 0] + 1).sum())


def _told(folder: Path, count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        yield json.loads((folder / f".{number:05d}.{_DONE}").read_text())


def main() -> None:
    import tyro

    args = tyro.cli(Args, description=__doc__)
    frames = record(args)
    print(f"{args.out}: {args.training} + {args.validation} scripted demonstrations, {frames} frames")


if __name__ == "__main__":
    main()
