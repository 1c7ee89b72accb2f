"""Look into an episode store: counts, statistics per dimension, what looks wrong, and a sheet of its images.

Every file is compared with its checksum on the way.

Example: vlm4vla inspect stores/bridge --sheet bridge.png
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from vlm4vla_core import folders

if TYPE_CHECKING:
    from vlm4vla_core.episodes.summary import Summary


@dataclass(frozen=True)
class Args:
    store: Positional[Path]
    """Folder of the episode store."""
    sheet: Path | None = None
    """Write a contact sheet of images to this PNG file."""
    camera: str | None = None
    """Camera of the contact sheet; by default the store's first."""
    json: Path | None = None
    """Also write the summary as JSON to this file."""


def run(args: Args) -> None:
    from vlm4vla_core.episodes.store import EpisodeStore
    from vlm4vla_core.episodes.summary import contact_sheet, summarise

    store = EpisodeStore.open(args.store, hashes=True)
    summary = summarise(store)
    sheet = contact_sheet(store, args.camera or store.cameras[0])  # before printing: the camera may be unknown
    _show(args.store, summary)
    if args.sheet:
        from PIL import Image

        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet).save(args.sheet, format="PNG")
        print(f"contact sheet: {args.sheet}")
    if args.json:
        folders.write_json(args.json, summary.to_dict())


def _show(path: Path, summary: Summary, most: int = 12) -> None:
    cameras = ", ".join(f"{name} {width}x{height}" for name, (height, width) in summary.cameras.items())
    shortest, median, longest = summary.lengths
    print(f"{path}: {summary.source}, transform {summary.transform}, fingerprint {summary.fingerprint}")
    print(f"  episodes  {summary.episodes} ({', '.join(f'{n} {split}' for split, n in summary.splits.items())})")
    print(f"  steps     {summary.steps} (per episode {shortest} to {longest}, median {median:g})")
    print(f"  cameras   {cameras}")
    print(f"  on disk   {summary.bytes / 1e6:.1f} MB, {summary.bytes / summary.steps / 1e3:.1f} kB per step")
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
