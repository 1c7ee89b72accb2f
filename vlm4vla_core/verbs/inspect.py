"""Look into an episode store, or into robot data not yet converted: counts, statistics per dimension with histograms,
what looks wrong, and a sheet of images.

Of a store every file is compared with its checksum on the way. Of other data (RLDS, CALVIN, LIBERO, LeRobot, told apart
by their files) some episodes are read, evenly spread, with the transform that belongs to them.

Example: vlm4vla inspect stores/bridge --sheet bridge.png --html bridge.html
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError
from vlm4vla_core.progress import progress

if TYPE_CHECKING:
    from vlm4vla_core.episodes.store import EpisodeStore
    from vlm4vla_core.episodes.summary import Summary


@dataclass(frozen=True)
class Args:
    store: Positional[Path]
    """Folder of the episode store, or of robot data."""
    format: Literal["auto", "rlds", "calvin", "libero", "lerobot", "store"] = "auto"
    """Format of the data; by default its files tell."""
    episodes: int = 64
    """How many episodes to read of data not yet converted."""
    sheet: Path | None = None
    """Write a contact sheet of images to this PNG file."""
    camera: str | None = None
    """Camera of the contact sheet; by default the store's first."""
    html: Path | None = None
    """Write everything, with histograms and a contact sheet of every camera, to this HTML page."""
    json: Path | None = None
    """Also write the summary as JSON to this file."""


def run(args: Args) -> None:
    from vlm4vla_core.episodes.formats import detect
    from vlm4vla_core.episodes.store import EpisodeStore

    if args.episodes < 1:
        raise InputError(f"--episodes must be at least 1, got {args.episodes}")
    format = detect(args.store) if args.format == "auto" else args.format
    if format == "store":
        return _tell(args, EpisodeStore.open(args.store, hashes=True), "")
    with tempfile.TemporaryDirectory(prefix="vlm4vla-inspect-") as folder:
        _tell(args, *_sample(args, format, Path(folder) / "store"))


def _sample(args: Args, format: str, out: Path) -> tuple[EpisodeStore, str]:
    """Some episodes of a source as a store at `out`, and what was looked at."""
    from vlm4vla_core.episodes.checks import choose_splits, glance
    from vlm4vla_core.episodes.formats import open_source
    from vlm4vla_core.episodes.store import write_store

    source = open_source(format, args.store)
    splits, left_out = choose_splits(source), Counter[str]()
    try:
        store = write_store(
            out,
            progress(
                glance(source, splits, source.cameras, source.transforms[0], args.episodes, left_out),
                what="read",
                unit="episode",
            ),
            source=source.name,
            convention=source.convention,
            state_names=source.state_names,
            config={},
            inputs={},
            transform=source.transforms[0],
            jpeg_444=source.rendered,
            column_names=source.columns,
        )
    except InputError as error:
        if error.what != "no episodes":
            raise
        reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.items())
        raise InputError("no episodes to look at", where=args.store, fix=reasons) from None
    skipped = "".join(f", {n} episodes {reason} passed over" for reason, n in left_out.items())
    units = len(source.units(splits))
    return store, (
        f"{len(store.lengths)} episodes of {format} data, evenly spread over {units} parts{skipped}; not converted yet"
    )


def _tell(args: Args, store: EpisodeStore, scope: str) -> None:
    """Everything that was asked for, about the whole store; scope: what part of the data that is."""
    from vlm4vla_core.episodes.page import page
    from vlm4vla_core.episodes.summary import contact_sheet, summarise

    summary = summarise(store)
    sheet = contact_sheet(store, args.camera or store.cameras[0])  # before printing: the camera may be unknown
    _show(args.store, summary, scope)
    if args.sheet:
        from PIL import Image

        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet).save(args.sheet, format="PNG")
        print(f"contact sheet: {args.sheet}")
    if args.html:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        sheets = {camera: contact_sheet(store, camera) for camera in store.cameras}
        args.html.write_text(page(args.store.name, summary, sheets, scope), encoding="utf-8")
        print(f"page: {args.html}")
    if args.json:
        folders.write_json(args.json, {**asdict(summary), "looked_at": scope or "all"})


def _show(path: Path, summary: Summary, scope: str, most: int = 12) -> None:
    cameras = ", ".join(f"{name} {width}x{height}" for name, (height, width) in summary.cameras.items())
    shortest, median, longest = summary.lengths
    known = f"looked at {scope}" if scope else f"fingerprint {summary.fingerprint}"
    print(f"{path}: {summary.source}, transform {summary.transform}, {known}")
    print(f"  episodes  {summary.episodes} ({', '.join(f'{n} {split}' for split, n in summary.splits.items())})")
    print(f"  steps     {summary.steps} (per episode {shortest} to {longest}, median {median:g})")
    print(f"  cameras   {cameras}")
    size = f"{summary.bytes / 1e6:.1f} MB, {summary.bytes / summary.steps / 1e3:.1f} kB per step"
    print(f"  {'as store' if scope else 'on disk '}  {size}")
    print(f"\ninstructions ({len(summary.instructions)})")
    for instruction, count in list(summary.instructions.items())[:most]:
        print(f"  {count:5d}  {instruction or '(none)'}")
    if len(summary.instructions) > most:
        print(f"         … {len(summary.instructions) - most} more")
    width = max(len(f"{d.name} [{d.unit}]") for d in summary.dimensions)
    head = " ".join(f"{word:>10}" for word in ("min", "q01", "mean", "q99", "max", "outside"))
    kind = ""
    for dimension in summary.dimensions:
        if dimension.kind != kind:
            kind = dimension.kind
            print(f"\n{kind:<{width + 2}} {head}")
        name = f"{dimension.name} [{dimension.unit}]" if dimension.unit else dimension.name
        numbers = (dimension.min, dimension.q01, dimension.mean, dimension.q99, dimension.max)
        print(f"  {name:<{width}} {' '.join(f'{n:10.4g}' for n in numbers)} {dimension.outside:10.1%}")
    print("outside: share of steps beyond q01…q99, which training clips\n")
    for warning in summary.warnings:
        print(f"warning: {warning}")
    if not summary.warnings:
        print("nothing looks wrong")
