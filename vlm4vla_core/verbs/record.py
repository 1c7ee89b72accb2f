"""Record scripted demonstrations into an episode store: in the built-in world (nothing to download), or a simulator.

WORLD is tabletop, or a simulator's protocol such as libero-spatial@1 (`vlm4vla doctor` says which are installed). What
is carried out is the expert's action plus noise; what is written down is the expert's clean action. Recording never
starts where evaluation does, and keeps only successes in a simulator. Issuing the same command again does nothing.

Example: vlm4vla record tabletop --episodes 400 --tasks move touch --out stores/tabletop
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tyro.conf import Positional

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError, nearest

if TYPE_CHECKING:
    from vlm4vla_core.episodes.store import EpisodeStore
    from vlm4vla_core.sims.tabletop.demos import Demos

_FILMED = 12  # episodes in a film


@dataclass(frozen=True)
class Args:
    world: Positional[str]
    """tabletop, or a simulator's protocol with its version."""
    episodes: int
    """Number of demonstrations; tasks and domains take turns."""
    out: Path
    """Folder of the episode store to write."""
    tasks: tuple[str, ...] = ()
    """Of a simulator: tasks that its expert can do; all when left out. Of tabletop: task families (move, touch, push,
    pick, put, stack, switch), long tasks by name, or chain; all families when left out. Alone: scene, one picture
    without the hand each, for questions."""
    domains: tuple[str, ...] = ()
    """Looks; A, B, C when left out (of scenes U, V, W, which no policy sees). D is the unseen test look of
    tabletop-abc-d; R, S, T are the degraded ones of tabletop-shift."""
    seed: int = 0
    """Seed of the whole recording."""
    size: int = 112
    """Width and height of the pictures, in pixels."""
    cameras: tuple[str, ...] = ()
    """Cameras to record (tabletop: front, wrist); the first when left out. Training takes the first by default."""
    geometry: bool = False
    """Also record depth (mm, 16 bit) and segmentation."""
    noise: float | None = None
    """Standard deviation of the noise on executed motions, as a fraction of the largest step; 0.3 in the tabletop world
    and none in a simulator when left out."""
    options: tuple[str, ...] = ()
    """NAME=VALUE of a simulator's protocol, as for `evaluate`."""
    assets: Path | None = None
    """Folder with the simulators' assets, as for `evaluate`."""
    calvin_root: Path | None = None
    """CALVIN's checkout; else CALVIN_ROOT."""
    workers: int | None = None
    """Processes; by default up to one per core, as far as there is work. The bytes are the same for any number."""
    video: Path | None = None
    """Also write the first demonstrations as a film for people to this file (.mp4 or .gif)."""
    json: Path | None = None
    """Also write the summary as JSON to this file."""


def run(args: Args) -> int:
    from vlm4vla_core.episodes import conversion

    if args.world != "tabletop":
        return _simulator(args)
    args = replace(args, cameras=args.cameras or ("front",), noise=0.3 if args.noise is None else args.noise)
    if args.options:
        raise InputError("the tabletop world has no options", fix=f"leave --options {' '.join(args.options)} out")
    if not args.domains:
        args = replace(args, domains=("U", "V", "W") if "scene" in args.tasks else ("A", "B", "C"))
    tasks, config = _check(args)
    rate = None
    source = _source(args, tasks)
    if conversion.up_to_date(args.out, source, source.units(source.splits), config):
        conversion.tidy(args.out)
        print(f"{args.out} is up to date")
    else:
        folders.refuse_other(args.out, "episodes", name=folders.STORE_MANIFEST)
        rate = _record(args, tasks, config)
    if args.video:
        _film(args)
    if args.json:
        from vlm4vla_core.episodes.store import EpisodeStore

        manifest = folders.read_json(args.out / folders.STORE_MANIFEST)
        wanted = ("source", "config", "counts", "cameras", "fingerprint")
        summary = {"store": args.out, **{key: manifest[key] for key in wanted}, "frames_per_s": rate}
        folders.write_json(args.json, summary | {"account": _account(EpisodeStore.open(args.out))})
    return 0


def _simulator(args: Args) -> int:
    """Record in a real simulator, in its own Python."""
    from vlm4vla_core.episodes import conversion
    from vlm4vla_core.episodes.store import EpisodeStore
    from vlm4vla_core.episodes.writer import Recipe
    from vlm4vla_core.sims import recording, simulators
    from vlm4vla_core.sims.simulator import name_folders

    known = simulators()
    if args.world not in known:
        raise InputError(f"nothing can be recorded in '{args.world}'", fix=nearest(args.world, ("tabletop", *known)))
    name_folders(args.assets, args.calvin_root)
    if args.episodes < 1 or args.seed < 0 or not 0 <= (args.noise or 0.0) <= 1:
        raise InputError("--episodes has to be at least 1, --seed not negative, --noise between 0 and 1")
    bench = known[args.world]
    options = bench.chosen(args.options)
    source = recording.source(bench, args.episodes, args.tasks, options, args.cameras, args.seed, args.noise or 0.0)
    units = source.units(source.splits)
    config = {
        "verb": f"record {args.world}", "benchmark": bench.describe(), "episodes": args.episodes,
        "tasks": list(source.tasks), "seed": args.seed, "noise": source.noise, "options": options,
        "cameras": list(source.cameras),
    }  # fmt: skip
    if conversion.up_to_date(args.out, source, units, config):
        conversion.tidy(args.out)
        print(f"{args.out} is up to date")
    else:
        folders.refuse_other(args.out, "episodes", name=folders.STORE_MANIFEST)
        if (code := recording.elsewhere(bench, run, args)) is not None:
            return code
        began = time.perf_counter()
        recipe = Recipe(source.convention, source.state_names, full_colour=True)
        told, _ = conversion.convert(
            args.out, source, units, recipe, cameras=source.cameras, transform=source.transforms[0], config=config,
            workers=args.workers or min(conversion.cores(), len(units)),
        )  # fmt: skip
        assert told is not None
        print(f"{args.out}: {told['kept']} scripted demonstrations in {time.perf_counter() - began:.0f} s")
        for line in conversion.lines(told):
            print(f"  {line}")
    store = EpisodeStore.open(args.out)
    print(f"  {'; '.join(sorted(set(store.episodes['made_by'])))}; tasks {', '.join(source.tasks)}")
    if args.video:
        _film(args)
    if args.json:
        manifest = folders.read_json(args.out / folders.STORE_MANIFEST)
        wanted = ("source", "config", "counts", "cameras", "fingerprint", "account")
        folders.write_json(args.json, {"store": args.out, **{key: manifest.get(key) for key in wanted}})
    return 0


def _check(args: Args) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The tasks to record and the config that decides the store's content. Raises InputError on bad values."""
    from vlm4vla_core.sims.benchmarks import SEED_RULE
    from vlm4vla_core.sims.tabletop.demos import SCENE
    from vlm4vla_core.sims.tabletop.env import CHAIN_TASK
    from vlm4vla_core.sims.tabletop.looks import LOOKS
    from vlm4vla_core.sims.tabletop.render import CAMERAS
    from vlm4vla_core.sims.tabletop.scenes import LONG
    from vlm4vla_core.sims.tabletop.tasks import TASKS
    from vlm4vla_core.sims.tabletop.world import VERSION

    if args.episodes < 1:
        raise InputError(f"--episodes must be at least 1, got {args.episodes}")
    if not 16 <= args.size <= 1024:
        raise InputError(f"--size {args.size} is no picture size", fix="give pixels between 16 and 1024")
    for camera in args.cameras:
        if camera not in CAMERAS:
            raise InputError(f"the tabletop world has no camera '{camera}'", fix=nearest(camera, CAMERAS))
    if not 0 <= (args.noise or 0.0) <= 1:
        raise InputError(f"--noise {args.noise} is not between 0 and 1")
    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers must be at least 1, got {args.workers}")
    if args.seed < 0:
        raise InputError(f"--seed must not be negative, got {args.seed}")
    known = (*TASKS, *LONG, CHAIN_TASK, SCENE)
    for task in args.tasks:
        if task not in known:
            raise InputError(f"the tabletop world has no task '{task}'", fix=nearest(task, known))
    for domain in args.domains:
        if domain not in LOOKS:
            raise InputError(f"the tabletop world has no domain '{domain}'", fix=nearest(domain, LOOKS))
    if SCENE in args.tasks and (len(args.tasks) > 1 or args.cameras != ("front",)):
        raise InputError("scenes are recorded alone, by the front camera", fix="give --tasks scene and no --cameras")
    tasks, domains = args.tasks or TASKS, args.domains
    cameras = args.cameras
    if not domains or not cameras or any(len(set(names)) < len(names) for names in (tasks, domains, cameras)):
        raise InputError("--tasks, --domains and --cameras take different names, and at least one domain and camera")
    return tasks, {
        "verb": "record tabletop", "world_version": VERSION, "episodes": args.episodes, "tasks": list(tasks),
        "domains": list(domains), "seed": args.seed, "size": args.size, "noise": args.noise,
        "cameras": list(args.cameras), "geometry": args.geometry, "seeds": SEED_RULE,
    }  # fmt: skip


def _source(args: Args, tasks: tuple[str, ...]) -> Demos:
    from vlm4vla_core.sims.tabletop.demos import Demos

    assert args.noise is not None
    return Demos(
        args.episodes, tasks, args.domains, args.seed, args.size, args.noise, args.geometry, tuple(args.cameras)
    )


def _record(args: Args, tasks: tuple[str, ...], config: dict[str, Any]) -> float:
    """Make and write the demonstrations and print what came of them; returns frames per second."""
    from vlm4vla_core.episodes import conversion
    from vlm4vla_core.episodes.store import EpisodeStore
    from vlm4vla_core.episodes.writer import Recipe

    began, source = time.perf_counter(), _source(args, tasks)
    # Colour at full resolution: edges between saturated colours suffer from halved colour resolution.
    recipe = Recipe(source.convention, source.state_names, full_colour=True, columns=source.columns)
    _, frames = conversion.convert(
        args.out,
        source,
        source.units(source.splits),
        recipe,
        cameras=source.cameras,
        transform=source.transforms[0],
        config=config,
        workers=args.workers,
    )
    seconds = time.perf_counter() - began
    made = EpisodeStore.open(args.out)
    told = _account(made)
    for task in tasks:
        if count := told["demonstrations"].get(task, 0):
            reached, mean = f"goal reached in {told['goal_reached'][task]}", told["steps"][task] / count
            print(f"  {task:<6} {count:5d} demonstrations, {reached}, {mean:.1f} steps on average")
    counts = made.manifest["counts"]
    print(
        f"{args.out}: {counts['episodes']} episodes, {counts['steps']} frames, {counts['instructions']} instructions, "
        f"domains {', '.join(args.domains)} in {seconds:.1f} s ({frames / seconds:.0f} frames/s)"
    )
    return frames / seconds


def _account(store: EpisodeStore) -> dict[str, dict[str, int]]:
    """Per task: demonstrations, those whose goal was reached, and steps. A chain has a demonstration per part."""
    table = store.episodes
    table = table.assign(reached=table["success"] == "true").groupby("task")
    found = {"demonstrations": table.size(), "goal_reached": table["reached"].sum(), "steps": table["length"].sum()}
    return {name: {str(task): int(value) for task, value in column.items()} for name, column in found.items()}


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
