"""Convert real robot data into an episode store, the one format everything else reads.

SRC of `rlds` is a TFDS folder (with dataset_info.json) or one of the two above it. BridgeV2's layout is known; its
actions go through `bridge_orig`: the gripper settled and the motion taken from the states, as in OpenVLA. Cameras
that are black everywhere, episodes without language and episodes that an earlier split has too are left out and
reported. Issuing the same command again does nothing while the source files are unchanged.

Example: vlm4vla convert rlds bridge_dataset/1.0.0 --out stores/bridge --cameras image_0 --size 224
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError
from vlm4vla_core.progress import progress

if TYPE_CHECKING:
    from vlm4vla_core.episodes.rlds import RldsDataset
    from vlm4vla_core.episodes.store import Episode


@dataclass(frozen=True)
class Args:
    format: Positional[Literal["rlds"]]
    """Format of the source."""
    src: Positional[Path]
    """Folder of the source data."""
    out: Path
    """Folder of the episode store to write."""
    cameras: tuple[str, ...] = ()
    """Cameras to keep; by default every one that shows anything."""
    size: int | None = None
    """Square image size in pixels to resize to; by default the source's own images, byte for byte."""
    split: tuple[str, ...] = ()
    """Splits to read; by default train and val."""
    transform: Literal["dataset", "none", "bridge_orig"] = "dataset"
    """Action transform; `dataset` is the one that belongs to the dataset."""
    json: Path | None = None
    """Also write the summary as JSON to this file."""


def run(args: Args) -> None:
    from vlm4vla_core.episodes import rlds

    if args.size is not None and not 8 <= args.size <= 4096:
        raise InputError(f"--size {args.size} is no image size", fix="give pixels between 8 and 4096")
    dataset = rlds.open_rlds(args.src)
    splits = rlds.choose_splits(dataset, args.split)
    for camera in args.cameras:
        dataset.check_camera(camera)
    config = {
        "verb": f"convert {args.format}",
        "layout": dataset.layout_name,
        "transform": dataset.layout.transform if args.transform == "dataset" else args.transform,
        "splits": list(splits),
        "cameras": list(dict.fromkeys(args.cameras)),  # in this order: the first is what training takes by default
        "size": args.size,
    }
    inputs = {}
    for path in progress(dataset.files(splits), what="fingerprints", unit="file"):
        inputs[path.name] = f"{path.stat().st_size} bytes, sha256 {folders.file_fingerprint(path)}"
    rate = None
    if folders.current(args.out, "episodes", config=config, inputs=inputs, name=folders.STORE_MANIFEST):
        print(f"{args.out} is up to date")
    else:
        folders.refuse_other(args.out, "episodes", name=folders.STORE_MANIFEST)
        rate = _convert(args, dataset, config, inputs)
    if args.json:
        manifest = folders.read_json(args.out / folders.STORE_MANIFEST)
        wanted = ("source", "transform", "counts", "cameras", "account", "fingerprint")
        folders.write_json(
            args.json, {"store": args.out, **{key: manifest.get(key) for key in wanted}, "frames_per_s": rate}
        )


def _convert(args: Args, dataset: RldsDataset, config: dict[str, Any], inputs: dict[str, str]) -> float:
    """Write the store, print what came of it; returns images written per second."""
    from vlm4vla_core.episodes import rlds, store

    began = time.perf_counter()
    splits, report = config["splits"], rlds.Report()
    total = sum(dataset.records(split) for split in splits)
    with progress(total=total, what="look for black cameras", unit="episode") as bar:
        cameras, report.black_cameras = rlds.seen_cameras(dataset, splits, args.cameras, bar.update)

    with progress(total=total, what="convert", unit="episode") as bar:

        def watched() -> Iterator[Episode]:
            for episode in rlds.episodes(dataset, splits, cameras, report, config["transform"]):
                bar.update(report.read - bar.n)
                yield episode

        try:
            made = store.write_store(
                args.out,
                watched(),
                source=f"{dataset.name} {dataset.version}".strip(),
                convention=dataset.layout.convention,
                state_names=dataset.layout.state_names,
                config=config,
                inputs=inputs,
                transform=config["transform"],
                image_size=args.size,
                account=report.to_dict,
            )
        except InputError as error:
            if error.what != "no episodes":
                raise
            left_out = "; ".join(report.lines()) or "the splits hold no records"
            raise InputError("no episodes to convert", where=dataset.folder, fix=left_out) from None
    seconds = time.perf_counter() - began
    rate = len(made) * len(made.cameras) / seconds
    for line in report.lines():
        print(f"note: {line}")
    counts = made.manifest["counts"]
    print(
        f"{args.out}: {counts['episodes']} episodes, {counts['steps']} steps, {counts['instructions']} instructions, "
        f"cameras {', '.join(made.cameras)} ({rate:.0f} frames/s)"
    )
    return rate
