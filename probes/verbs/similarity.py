"""Compare two sets of features of the same frames, layer by layer, by centred kernel alignment (CKA) and more.

A and B are checkpoints (with --data; their features are made below --out) or folders made by `vlm4vla features`. The
debiased estimator, in float64; an interval by bootstrap over episodes (or over images); as a floor what remains when
the images of one side are shuffled, and as a ceiling (--ceiling) how alike A is to another seed of its own run. Also
mutual nearest neighbours, CKNNA and Procrustes. Features of different frames are refused. --estimator minibatch reads
features larger than memory; gram compares many layers at once.

Example: vlm4vla similarity runs/walk/features-trained runs/walk/features-start --json runs/walk/similarity.json
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from probes.features import Features


@dataclass(frozen=True)
class Args:
    a: Positional[Path]
    """Checkpoint, or folder made by `vlm4vla features`."""
    b: Positional[Path]
    """Another one, of the same frames."""
    data: Path | None = None
    """Of checkpoints: episode store, or folder of pictures."""
    ceiling: Path | None = None
    """Another seed of A's run: no comparison with A can be expected to come out higher."""
    layers: tuple[str, ...] = ("vision.0..-1", "projector")
    """Of checkpoints: layers to compare (see `vlm4vla features`)."""
    pool: Literal["mean", "grid", "attn", "cls"] = "mean"
    """Of checkpoints: pooling."""
    camera: str | None = None
    """Of checkpoints: camera of the store."""
    max_frames: int | None = None
    """Of checkpoints: look at this many frames, drawn without replacement."""
    estimator: Literal["exact", "gram", "minibatch"] = "exact"
    """exact: float64, with intervals and floor; gram: all layers at once, float32 products, values alone; minibatch:
    unbiased on random batches, features stay on disk."""
    batch: int = 64
    """Images of a minibatch."""
    neighbours: int = 10
    """Of mutual nearest neighbours and CKNNA; 0 leaves neighbours and Procrustes out."""
    over: Literal["episodes", "images"] = "episodes"
    """What the interval's bootstrap draws; frames of one episode are no independent images."""
    resamples: int = 200
    """Bootstrap draws; 0 for no intervals."""
    seed: int = 0
    """Seed of frames, resamples, batches, and of the shuffles behind the floor."""
    out: Path | None = None
    """Folder to write: matrices, figure, and the features of checkpoints."""
    device: str = "auto"
    """Of checkpoints: cpu, cuda, or auto."""
    json: Path | None = None
    """Also write everything as JSON; the command then does nothing when it is up to date."""


def run(args: Args) -> int:
    from probes.verbs.shared import check_seed, json_is_current, show, write_result
    from probes.verbs.sources import open_source

    check_seed(args.seed)
    if args.resamples < 0 or args.neighbours < 0:
        raise InputError(f"{min(args.resamples, args.neighbours)} resamples or neighbours", fix="use 0 or more")
    options: dict[str, Any] = {
        "data": args.data, "out": args.out, "layers": args.layers, "pool": args.pool, "camera": args.camera,
        "max_frames": args.max_frames, "seed": args.seed, "device": args.device,
    }  # fmt: skip
    a, b = (open_source(path, **options) for path in (args.a, args.b))
    twin = open_source(args.ceiling, **options) if args.ceiling else None
    config = {
        "over": args.over, "resamples": args.resamples, "seed": args.seed, "estimator": args.estimator,
        "batch": args.batch, "neighbours": args.neighbours,
    }  # fmt: skip
    inputs = {"a": a.fingerprint, "b": b.fingerprint} | ({"ceiling": twin.fingerprint} if twin else {})
    done = args.out / "similarity.json" if args.out else args.json
    if json_is_current(done, "similarity", config=config, inputs=inputs):
        print(f"{done} is up to date")
        if args.out and args.json:
            folders.write_json(args.json, folders.read_json(args.out / "similarity.json"))
        return 0
    for other in (b, *([twin] if twin else [])):
        a.same_images(other)
    frame, line = _compare(args, a, b)
    if twin:
        frame["ceiling"] = frame["layer_a"].map(_ceilings(a, twin))
    episodes = len(set(a.index["episode"]))
    print(f"debiased CKA of {a.label} (A) and {b.label} (B) on {frame['n'].iloc[0]} frames of {episodes} episodes")
    matrix = frame.pivot(index="layer_a", columns="layer_b", values="cka").reindex(a.layers)[list(b.layers)]
    print(show(matrix.reset_index()))
    print(show(frame.dropna(axis=1, how="all")))
    print(line)
    value: dict[str, Any] = {
        "label_a": a.label, "label_b": b.label, "n": int(frame["n"].iloc[0]), "episodes": episodes, "level": 0.95,
        "layers_a": list(a.layers), "layers_b": list(b.layers), "rows": frame.to_dict("records"),
    }  # fmt: skip
    if args.out:
        from probes.figures_probe import similarity_figure
        from probes.style import save_figure

        args.out.mkdir(parents=True, exist_ok=True)
        frame.to_parquet(args.out / "similarity.parquet")
        save_figure(similarity_figure(frame, label_a=a.label, label_b=b.label), args.out / "similarity")
        write_result(args.out / "similarity.json", "similarity", config=config, inputs=inputs, **value)
        print(f"matrices and figure in {args.out}")
    if args.json:
        write_result(args.json, "similarity", config=config, inputs=inputs, **value)
    return 0


def _compare(args: Args, a: Features, b: Features) -> tuple[pd.DataFrame, str]:
    """The table of all pairs of layers, and a line that says how to read it."""
    from probes.alignment import alignments
    from probes.large_cka import gram_cka, minibatch_cka
    from probes.similarity import cka_matrix

    if args.estimator == "minibatch":
        large = minibatch_cka(a.rows, a.layers, b.rows, b.layers, len(a), batch=args.batch, seed=args.seed)
        line = f"error: standard error over batches of {args.batch} images, which takes images for independent"
        return large.to_frame().assign(floor=float("nan")), line
    layers_a, layers_b = ({name: one.layer(name) for name in one.layers} for one in (a, b))
    if args.estimator == "gram":
        return gram_cka(layers_a, layers_b).to_frame().assign(
            floor=float("nan")
        ), "float32 products; no interval, no floor"
    episodes = a.index["episode"].to_numpy()
    clusters = episodes if args.over == "episodes" else None
    result = cka_matrix(layers_a, layers_b, resamples=args.resamples, clusters=clusters, seed=args.seed)
    frame = result.to_frame()
    over = f"95 % interval over {args.over}" if frame["low"].notna().all() else _no_interval(args)
    line = f"low, high: {over}; floor: 95 % of shuffled images lie below; biased: the textbook value"
    if args.neighbours:
        more = alignments(layers_a, layers_b, k=args.neighbours, groups=clusters)
        frame = frame.join(more[["mutual_knn", "cknna", "procrustes"]])
        apart = " of other episodes" if clusters is not None else ""
        line += f"; mutual_knn: share of {args.neighbours} nearest frames{apart} in common"
    return frame, line


def _ceilings(a: Features, twin: Features) -> dict[str, float]:
    """Debiased CKA of each layer of A with the same layer of another seed of its run."""
    from probes.similarity import cka

    if missing := sorted(set(a.layers) - set(twin.layers)):
        raise InputError(f"layer {missing[0]} is not in the ceiling's features", where=twin.path)
    return {name: cka(a.layer(name), twin.layer(name)).value for name in a.layers}


def _no_interval(args: Args) -> str:
    from probes.similarity import MIN_UNITS

    return f"no interval: fewer than {MIN_UNITS} {args.over}" if args.resamples else "no interval: no resamples"
