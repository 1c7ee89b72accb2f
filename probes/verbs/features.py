"""Extract vision-encoder features of a checkpoint over the frames of an episode store.

CHECKPOINT is a checkpoint or run folder (of a policy or of a language objective) or a published model folder. Layers:
vision.0 (output of the first block), vision.-1 (the last), vision.0..-1 (all of them), projector (what the language
model reads). To read out positions, pool by grid. Issuing the same command again does nothing.

Example: vlm4vla features runs/walk/vla --data runs/walk/demos --layers vision.0..-1 projector --pool grid
         --out runs/walk/features-trained
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError


@dataclass(frozen=True)
class Args:
    checkpoint: Positional[Path]
    """Checkpoint or run folder, or a published model folder."""
    data: Path
    """Episode store whose frames are looked at."""
    out: Path
    """Folder to write."""
    layers: tuple[str, ...] = ("vision.-1", "projector")
    """Layers: vision.0, vision.-1, vision.0..-1, projector."""
    pool: Literal["mean", "grid", "none"] = "mean"
    """mean over the image's tokens; grid: means of 4 x 4 cells, which keeps where things are; none: every token."""
    camera: str | None = None
    """Camera of the store; by default the one the policy was trained on."""
    max_frames: int | None = None
    """Look at this many frames, drawn without replacement; all when left out."""
    seed: int = 0
    """Seed of the drawn frames."""
    batch_size: int = 32
    """Images per forward pass."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU when there is one."""
    json: Path | None = None
    """Also write the manifest and the summary table as JSON."""


def run(args: Args) -> int:
    from probes.verbs.shared import check_seed, choose_camera, model_facts
    from vlm4vla_core.episodes.store import EpisodeStore

    check_seed(args.seed)
    if args.batch_size < 1:
        raise InputError(f"a batch of {args.batch_size} images", fix="use --batch-size 1 or more")
    folder, facts = model_facts(args.checkpoint)
    store = EpisodeStore.open(args.data)
    camera = choose_camera(args.camera, facts["camera"], store)
    preprocessing = {"size": facts["image_size"], "resize": "bicubic to a square", "normalise": facts["family"]}
    config = {
        "layers": list(args.layers), "pool": args.pool, "camera": camera, "preprocessing": preprocessing,
        "max_frames": args.max_frames, "seed": args.seed,
    }  # fmt: skip
    from probes.weights import weights_fingerprint

    inputs = {"checkpoint": weights_fingerprint(folder), "store": store.fingerprint}
    if folders.current(args.out, "features", config=config, inputs=inputs):
        print(f"{args.out} is up to date")
        _json(args)
        return 0

    from probes.features import choose_rows, extract
    from probes.verbs.shared import few_threads, short_name, use_device
    from vlm4vla_core.backbone import load_backbone
    from vlm4vla_core.progress import progress

    device = use_device(args.device)
    backbone = load_backbone(folder).to(device).eval()
    few_threads(backbone)
    with progress(total=len(choose_rows(len(store), args.max_frames, args.seed)), what="features", unit="img") as bar:
        extract(
            backbone, store, args.out, layers=args.layers, pool=args.pool, camera=camera, max_frames=args.max_frames,
            seed=args.seed, batch_size=args.batch_size, config=config, inputs=inputs, label=short_name(folder),
            progress=bar.update,
        )  # fmt: skip
    _print(args.out)
    _json(args)
    return 0


def _print(out: Path) -> None:
    import pandas as pd

    from probes.features import Features
    from probes.verbs.shared import show

    features = Features.open(out)
    rows = [(name, features.manifest["widths"][name], *_spread(features.layer(name))) for name in features.layers]
    print(f"features of {features.label}: {len(features)} frames of camera {features.camera}, pooled: {features.pool}")
    print(show(pd.DataFrame(rows, columns=["layer", "width", "mean", "sd over frames"])))
    print(f"in {out}")


def _spread(values: Any) -> tuple[float, float]:
    """Mean, and the mean over dimensions of the standard deviation over frames."""
    return float(values.mean()), float(values.std(0).mean())


def _json(args: Args) -> None:
    if args.json:
        manifest = folders.read_manifest(args.out, "features")
        folders.write_json(args.json, {"folder": str(args.out), **manifest})
