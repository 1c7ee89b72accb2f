"""Record scripted demonstrations in a built-in world into an episode store, nothing to download.

What is carried out is the expert's action plus noise; what is written down is the expert's clean action. Recording
seeds never coincide with evaluation seeds. Issuing the same command again does nothing.

Example: vlm4vla record tabletop --episodes 400 --tasks move touch --out stores/tabletop
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tyro.conf import Positional

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.progress import progress

_FILMED = 12  # episodes in a film


@dataclass(frozen=True)
class Args:
    world: Positional[Literal["tabletop"]]
    """Built-in world."""
    episodes: int
    """Number of demonstrations; tasks and domains take turns."""
    out: Path
    """Folder of the episode store to write."""
    tasks: tuple[str, ...] = ()
    """Task families (move, touch, push, pick, put, stack, switch), long tasks by name, or chain; by default all families."""
    domains: tuple[str, ...] = ("A", "B", "C")
    """Looks: A, B, C; D is the unseen test look of tabletop-abc-d; R, S, T are the degraded ones of tabletop-shift."""
    seed: int = 0
    """Seed of the whole recording."""
    size: int = 112
    """Width and height of the pictures, in pixels."""
    cameras: tuple[Literal["front", "wrist"], ...] = ("front",)
    """Cameras to record; training takes the first by default."""
    geometry: bool = False
    """Also record depth (mm, 16 bit) and segmentation."""
    noise: float = 0.3
    """Standard deviation of the noise on executed motions, as a fraction of the largest step."""
    video: Path | None = None
    """Also write the first demonstrations as a film for people to this file (.mp4 or .gif)."""
    json: Path | None = None
    """Also write the summary as JSON to this file."""


def run(args: Args) -> int:
    tasks, config = _check(args)
    rate = None
    if folders.current(args.out, "episodes", config=config, inputs={}, name=folders.STORE_MANIFEST):
        print(f"{args.out} is up to date")
    else:
        folders.refuse_other(args.out, "episodes", name=folders.STORE_MANIFEST)
        rate = _record(args, tasks, config)
    if args.video:
        _film(args)
    if args.json:
        manifest = folders.read_json(args.out / folders.STORE_MANIFEST)
        wanted = ("source", "config", "counts", "cameras", "account", "fingerprint")
        summary = {"store": args.out, **{key: manifest[key] for key in wanted}, "frames_per_s": rate}
        folders.write_json(args.json, summary)
    return 0


def _check(args: Args) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The tasks to record and the config that decides the store's content. Raises InputError on bad values."""
    from vlm4vla_core.sims.tabletop.looks import LOOKS
    from vlm4vla_core.sims.tabletop.env import CHAIN_TASK
    from vlm4vla_core.sims.tabletop.scenes import LONG
    from vlm4vla_core.sims.tabletop.tasks import TASKS
    from vlm4vla_core.sims.tabletop.world import VERSION

    if args.episodes < 1:
        raise InputError(f"--episodes must be at least 1, got {args.episodes}")
    if not 16 <= args.size <= 1024:
        raise InputError(f"--size {args.size} is no picture size", fix="give pixels between 16 and 1024")
    if not 0 <= args.noise <= 1:
        raise InputError(f"--noise {args.noise} is not between 0 and 1")
    if args.seed < 0:
        raise InputError(f"--seed must not be negative, got {args.seed}")
    known = (*TASKS, *LONG, CHAIN_TASK)
    for task in args.tasks:
        if task not in known:
            raise InputError(f"the tabletop world has no task '{task}'", fix=nearest(task, known))
    for domain in args.domains:
        if domain not in LOOKS:
            raise InputError(f"the tabletop world has no domain '{domain}'", fix=nearest(domain, LOOKS))
    tasks, domains = args.tasks or TASKS, args.domains
    cameras = args.cameras
    if not domains or not cameras or any(len(set(names)) < len(names) for names in (tasks, domains, cameras)):
        raise InputError("--tasks, --domains and --cameras take different names, and at least one domain and camera")
    return tasks, {
        "verb": "record tabletop", "world_version": VERSION, "episodes": args.episodes, "tasks": list(tasks),
        "domains": list(domains), "seed": args.seed, "size": args.size, "noise": args.noise,
        "cameras": list(args.cameras), "geometry": args.geometry,
    }  # fmt: skip


def _record(args: Args, tasks: tuple[str, ...], config: dict[str, Any]) -> float:
    """Make and write the demonstrations and print what came of them; returns frames per second."""
    from vlm4vla_core.actions import TABLETOP
    from vlm4vla_core.episodes.store import write_store
    from vlm4vla_core.sims.benchmarks import SEED_RULE
    from vlm4vla_core.sims.tabletop import demos

    began = time.perf_counter()
    plans = demos.plan(args.episodes, tasks, args.domains, args.seed)
    reached = dict.fromkeys(tasks, 0)
    parts, steps = dict.fromkeys(tasks, 0), dict.fromkeys(tasks, 0)  # a chain is an episode per part
    with progress(total=len(plans), what="record", unit="episode") as bar:

        def watched() -> Any:
            for episode in demos.demonstrations(
                plans, size=args.size, noise=args.noise, cameras=args.cameras, geometry=args.geometry
            ):
                parts[episode.info["task"]] += 1
                steps[episode.info["task"]] += len(episode.action)
                reached[episode.info["task"]] += episode.info["success"] == "true"
                yield episode
                bar.update()

        made = write_store(
            args.out,
            watched(),
            source="tabletop",
            convention=TABLETOP,
            state_names=demos.STATE_NAMES,
            config=config,
            inputs={},
            transform="expert label, executed with noise",
            jpeg_444=True,  # edges between saturated colours suffer from halved colour resolution
            column_names=demos.COLUMN_NAMES,
            provenance_note=f"scripted demonstrations in a built-in world; {SEED_RULE}",
            account=lambda: {"demonstrations": parts, "goal_reached": reached},
        )
    seconds = time.perf_counter() - began
    for task in tasks:
        if parts[task]:
            print(
                f"  {task:<6} {parts[task]:5d} demonstrations, goal reached in {reached[task]}, "
                f"{steps[task] / parts[task]:.1f} steps on average"
            )
    counts = made.manifest["counts"]
    rate = counts["steps"] / seconds
    print(
        f"{args.out}: {counts['episodes']} episodes, {counts['steps']} frames, {counts['instructions']} instructions, "
        f"domains {', '.join(args.domains)} in {seconds:.1f} s ({rate:.0f} frames/s)"
    )
    return rate


def _film(args: Args) -> None:
    """The store's first episodes one after the other, each frame under its instruction."""
    from vlm4vla_core.episodes.store import EpisodeStore
    from vlm4vla_core.film import captioned, write_video

    assert args.video is not None
    store = EpisodeStore.open(args.out)
    frames = []
    for episode in range(min(_FILMED, len(store.lengths))):
        rows = store.starts[episode] + np.arange(store.lengths[episode])
        shown = [store.images(camera, rows) for camera in store.cameras]  # (T, H, W, 3) each
        for pictures in zip(*shown, strict=True):
            frames.append(captioned(np.concatenate(pictures, axis=1), store.instructions[episode]))
        frames += [frames[-1]] * 3
    write_video(args.video, frames, fps=float(store.convention.control_hz))
    print(f"film: {args.video}")
