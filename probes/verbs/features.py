"""Extract features of any layer of a checkpoint over the frames of an episode store or the pictures of a folder.

CHECKPOINT is a checkpoint or run folder (of a policy or of a language objective), a published model folder or a hub id.
Layers: vision.0 (output of the first block), vision.-1 (the last), vision.0..-1 (all), projector (what the language
model reads), decoder.-1 (the image's tokens there), query (what a policy's head reads). To read out positions, pool by
grid. Weights that another trainer wrote: CHECKPOINT is their base model, --weights the file. Issuing the same command
again does nothing; a killed one goes on where it was.

Example: vlm4vla features runs/walk/vla --data runs/walk/demos --layers vision.0..-1,projector --pool grid
         --out runs/walk/features-trained
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from probes.features import Features
    from vlm4vla_core.backbone import Backbone


@dataclass(frozen=True)
class Args:
    checkpoint: Positional[Path]
    """Checkpoint or run folder, a published model folder, or a hub id (owner/name)."""
    data: Path
    """Episode store, or folder of pictures."""
    out: Path
    """Folder to write."""
    layers: tuple[str, ...] = ("vision.-1", "projector")
    """Layers: vision.0, vision.-1, vision.0..-1, projector, decoder.-1, query; spaces or commas between."""
    pool: Literal["mean", "grid", "none", "attn", "cls"] = "mean"
    """mean over the image's tokens; grid: means of 4 x 4 cells, which keeps where things are; none: every token; attn:
    one attention step, the mean token asking; cls: the class token."""
    camera: str | None = None
    """Camera of the store; by default the one the policy was trained on."""
    instruction: str = ""
    """Words for decoder layers and the query; the store's own when left out."""
    max_frames: int | None = None
    """Look at this many frames, drawn without replacement; all when left out."""
    seed: int = 0
    """Seed of the drawn frames, and of the weights of --scratch."""
    scratch: bool = False
    """Draw all weights anew: the untrained network of the same shape."""
    weights: Path | None = None
    """A .safetensors file, or folder of them, that another trainer wrote; CHECKPOINT gives architecture and words."""
    family: str | None = None
    """With --weights: the family that CHECKPOINT must be of."""
    key_map: tuple[str, ...] = ()
    """With --weights: PATTERN=>REPLACEMENT (regular expressions, in turn) or a .json file, from its names to the
    model's."""
    batch_size: int = 32
    """Images per forward pass."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU when there is one."""
    json: Path | None = None
    """Also write the manifest and the summary table as JSON."""


def run(args: Args) -> int:
    made = make(args)
    if made is None:
        print(f"{args.out} is up to date")
    else:
        _print(made)
    _json(args)
    return 0


def make(args: Args) -> Features | None:
    """Make the features that `args` ask for; None when they are there already."""
    from probes.foreign import foreign_fingerprint, read_key_map
    from probes.image_folder import open_data
    from probes.verbs.shared import check_seed, choose_camera, model_facts, preprocessing
    from probes.weights import weights_fingerprint

    check_seed(args.seed)
    if args.batch_size < 1:
        raise InputError(f"a batch of {args.batch_size} images", fix="use --batch-size 1 or more")
    if args.weights is None and (args.key_map or args.family):
        raise InputError("--key-map and --family belong to --weights", fix="name the file with --weights")
    folder, facts = model_facts(args.checkpoint)
    if args.family and args.family != facts["family"]:
        raise InputError(
            f"{args.checkpoint} is of family {facts['family']}, not {args.family}", fix="give its base model"
        )
    key_map = read_key_map(args.key_map)
    store = open_data(args.data)
    camera = choose_camera(args.camera, facts["camera"], store)
    config = {
        "layers": list(args.layers), "pool": args.pool, "camera": camera,
        "preprocessing": preprocessing(folder, facts), "max_frames": args.max_frames, "seed": args.seed,
    }  # fmt: skip
    config |= {"scratch": True} if args.scratch else {}
    config |= {"instruction": args.instruction} if args.instruction else {}
    weights = foreign_fingerprint(args.weights, key_map) if args.weights else weights_fingerprint(folder)
    inputs = {"checkpoint": weights, "store": store.fingerprint}
    if folders.current(args.out, "features", config=config, inputs=inputs):
        return None
    _same_preprocessing(args.out, config, inputs)

    from probes.features import choose_rows, extract
    from probes.verbs.shared import short_name
    from vlm4vla_core.progress import progress

    backbone = _load(args, folder, key_map)
    label = args.weights.stem if args.weights else short_name(args.checkpoint if folder.name == "" else folder)
    hub = not args.checkpoint.exists()
    label = args.weights.stem if args.weights else str(args.checkpoint) if hub else short_name(folder)
    with progress(total=len(choose_rows(len(store), args.max_frames, args.seed)), what="features", unit="img") as bar:
        return extract(
            backbone, store, args.out, layers=args.layers, pool=args.pool, camera=camera, max_frames=args.max_frames,
            seed=args.seed, batch_size=args.batch_size, instruction=args.instruction, config=config, inputs=inputs,
            label=f"untrained {label}" if args.scratch else label, progress=bar.update,
        )  # fmt: skip


def _same_preprocessing(out: Path, config: dict[str, Any], inputs: dict[str, str]) -> None:
    """Raise InputError when `out` holds features of these weights and data that came through another processor."""
    try:
        held = folders.read_manifest(out, "features")
    except InputError:
        return
    before, now = held["config"].get("preprocessing", {}), config["preprocessing"]
    changed = [key for key in before if key in now and before[key] != now[key]]
    if changed and held["inputs"] == inputs:
        key = changed[0]
        what = f"these features were made with another preprocessing ({key} {before[key]}, now {now[key]})"
        raise InputError(what, where=out, fix="give another --out, or remove the folder")


def _load(args: Args, folder: Path, key_map: Any) -> Backbone:
    from probes.foreign import load_foreign
    from probes.taps import layer_names, needs_words, resolve_layers
    from probes.verbs.shared import few_threads, use_device
    from vlm4vla_core.backbone import load_backbone

    device, anew = use_device(args.device), args.scratch or args.weights is not None
    backbone = load_backbone(folder, init="scratch", seed=args.seed) if anew else load_backbone(folder)
    if args.weights:
        decoder = needs_words(resolve_layers(args.layers, layer_names(backbone)))
        if left := load_foreign(backbone, args.weights, key_map, decoder=decoder):
            print(f"{left} tensors of {args.weights} have no place in the model (a policy's head, for one)")
    backbone = backbone.to(device).eval()
    few_threads(backbone)
    return backbone


def _print(features: Features) -> None:
    import pandas as pd

    from probes.verbs.shared import show

    rows = [(name, features.manifest["widths"][name], *_spread(features.layer(name))) for name in features.layers]
    print(f"features of {features.label}: {len(features)} frames of camera {features.camera}, pooled: {features.pool}")
    print(show(pd.DataFrame(rows, columns=["layer", "width", "mean", "sd over frames"])))
    print(f"in {features.path}")


def _spread(values: Any) -> tuple[float, float]:
    """Mean, and the mean over dimensions of the standard deviation over frames."""
    return float(values.mean()), float(values.std(0).mean())


def _json(args: Args) -> None:
    if args.json:
        manifest = folders.read_manifest(args.out, "features")
        folders.write_json(args.json, {"folder": str(args.out), **manifest})
