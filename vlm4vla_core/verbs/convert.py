"""Convert real robot data into an episode store, the one format everything else reads.

SRC is an RLDS/TFDS folder (or one of the two above it), a CALVIN folder, a folder or file of LIBERO demonstrations, a
LeRobot folder (v2.0, v2.1, v3.0), or an episode store to be resized or cut down. Actions go through the transform that
belongs to the data. Cameras that are black, episodes without language and episodes that an earlier split has too are
left out and reported.

What is finished survives a kill: the same command goes on from there, and does nothing when the store is there and the
source files are unchanged. Several machines with a shared file system each do `--shard i/n`; the same command without
--shard then finishes the store. The bytes do not depend on workers, machines or interruptions.

Example: vlm4vla convert rlds bridge_dataset/1.0.0 --out stores/bridge --cameras image_0 --size 224
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError, nearest

if TYPE_CHECKING:
    from vlm4vla_core.actions import ActionConvention
    from vlm4vla_core.episodes.source import Source


OPTIONS = ("scenes", "depth", "observations")  # of single formats; the others' readers refuse them


@dataclass(frozen=True)
class Args:
    format: Positional[Literal["rlds", "calvin", "libero", "lerobot", "store"]]
    """Format of the source."""
    src: Positional[Path]
    """Folder (or, of LIBERO, file) of the source data."""
    out: Path
    """Folder of the episode store to write."""
    cameras: tuple[str, ...] = ()
    """Cameras to keep; by default every one that shows anything."""
    size: int | None = None
    """Square image size in pixels to resize to; by default the source's own images, byte for byte where JPEG."""
    encoding: Literal["jpeg", "raw"] = "jpeg"
    """JPEG, or raw uint8 images: ten times larger and faster to read, for small sets."""
    split: tuple[str, ...] = ()
    """Splits to read; by default train and val."""
    transform: str = "dataset"
    """Action transform; `dataset` is the one that belongs to the data, another name chooses among its own."""
    workers: int | None = None
    """Processes to convert with; by default up to one per core, as far as there is work for them."""
    shard: str = ""
    """Do only part i of n (`2/4`), on one of n machines; the command without --shard finishes the store."""
    scenes: tuple[str, ...] = ()
    """CALVIN: keep only what was recorded in these scenes (A, B, C, D)."""
    depth: bool = False
    """CALVIN: also keep the depth images, losslessly."""
    observations: Literal["after_action", "before_action"] | None = None
    """LIBERO: whether the files hold the observation after each action (the default, LIBERO's own way) or before it."""
    convention: str = ""
    """LeRobot: what the actions mean, which such data do not say: calvin, libero, bridge, fractal, or a JSON file with
    the fields of `convention` in a store's dataset.json. By default recorded as unknown."""
    json: Path | None = None
    """Also write the summary as JSON to this file."""


def run(args: Args) -> None:
    from vlm4vla_core.episodes import conversion
    from vlm4vla_core.episodes.checks import check_request, choose_splits
    from vlm4vla_core.episodes.formats import open_source

    if args.size is not None and not 8 <= args.size <= 4096:
        raise InputError(f"--size {args.size} is no image size", fix="give pixels between 8 and 4096")
    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers must be at least 1, got {args.workers}")
    shard = _shard(args.shard)
    options = {name: value for name in OPTIONS if (value := getattr(args, name))}
    meaning = {"convention": _convention(args.convention)} if args.convention else {}
    source = open_source(args.format, args.src, **options, **meaning)
    splits = choose_splits(source, args.split)
    transform = source.transforms[0] if args.transform == "dataset" else args.transform
    check_request(source, args.cameras, transform)
    config = {
        "verb": f"convert {args.format}",
        "name": source.name,
        "transform": transform,
        "splits": list(splits),
        "cameras": list(dict.fromkeys(args.cameras)),  # in this order: the first is what training takes by default
        "size": args.size,
        "encoding": args.encoding,
        **options,
        **{name: value.to_dict() for name, value in meaning.items()},
    }
    units = source.units(splits)
    rate = None
    if conversion.up_to_date(args.out, source, units, config):
        conversion.tidy(args.out)
        print(f"{args.out} is up to date")
    else:
        folders.refuse_other(args.out, "episodes", name=folders.STORE_MANIFEST)
        rate = _convert(args, source, splits, transform, config, shard)
        if rate is None:
            print(f"part {args.shard} is done; when all are, the same command without --shard finishes {args.out}")
            return
    if args.json:
        manifest = folders.read_json(args.out / folders.STORE_MANIFEST)
        wanted = ("source", "transform", "counts", "cameras", "account", "fingerprint")
        folders.write_json(
            args.json, {"store": args.out, **{key: manifest.get(key) for key in wanted}, "frames_per_s": rate}
        )


def _convention(text: str) -> ActionConvention:
    """A convention by name or from a JSON file. Raises InputError on an unknown name and on wrong fields."""
    from vlm4vla_core import actions

    known = {name: getattr(actions, name.upper()) for name in ("bridge", "calvin", "fractal", "libero")}
    if text in known:
        return known[text]
    if not Path(text).is_file():
        raise InputError(f"no action convention '{text}', nor a file of that name", fix=nearest(text, known))
    value = folders.read_json(Path(text))
    try:
        return actions.ActionConvention.from_dict(value)
    except InputError as error:
        raise InputError(
            f"no action convention ({error})", where=text, fix="take one of dataset.json as a model"
        ) from None


def _shard(text: str) -> tuple[int, int]:
    """`i/n` as two numbers; (1, 1) when nothing is asked for. Raises InputError on anything else."""
    if not text:
        return 1, 1
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n) and int(n) > 1):
        raise InputError(f"--shard {text} is no part of a whole", fix="give i/n, such as 2/4")
    return int(i), int(n)


def _convert(
    args: Args,
    source: Source,
    splits: tuple[str, ...],
    transform: str,
    config: dict[str, Any],
    shard: tuple[int, int],
) -> float | None:
    """Write the store, print what came of it; returns images converted per second, None when only a part was done."""
    from vlm4vla_core.episodes import conversion
    from vlm4vla_core.episodes.checks import black_cameras
    from vlm4vla_core.episodes.store import EpisodeStore
    from vlm4vla_core.episodes.writer import Recipe

    began = time.perf_counter()
    cameras = tuple(config["cameras"]) or source.cameras
    # A camera that was asked for is left out only when there is nothing in all the data.
    black = black_cameras(source, splits, cameras, 10**9 if args.cameras else conversion.LOOKS)
    account, frames = conversion.convert(
        args.out,
        source,
        source.units(splits),
        Recipe(
            convention=source.convention,
            state_names=source.state_names,
            image_size=args.size,
            full_colour=source.rendered,
            encoding=args.encoding,
            columns=source.columns,
        ),
        cameras=tuple(camera for camera in cameras if camera not in black),
        transform=transform,
        config=config,
        black=black,
        workers=args.workers,
        shard=shard,
    )
    if account is None:
        return None
    seconds = time.perf_counter() - began
    made = EpisodeStore.open(args.out)
    rate = frames / seconds
    for line in conversion.lines(account):
        print(f"note: {line}")
    if black and not args.cameras:
        print(f"note: looked for black cameras in up to {conversion.LOOKS} episodes; of a camera you name, in all")
    counts = made.manifest["counts"]
    print(
        f"{args.out}: {counts['episodes']} episodes, {counts['steps']} steps, {counts['instructions']} instructions, "
        f"cameras {', '.join(made.cameras)} ({rate:.0f} frames/s)"
    )
    return rate
