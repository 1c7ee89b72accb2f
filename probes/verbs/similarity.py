"""Compare two sets of features of the same frames, layer by layer, by centred kernel alignment (CKA).

The debiased estimator, in float64; an interval by bootstrap over episodes (or over images), and as a floor what
remains when the images of one side are shuffled. Features of different frames are refused.

Example: vlm4vla similarity runs/walk/features-trained runs/walk/features-start --json runs/walk/similarity.json
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from vlm4vla_core.errors import InputError


@dataclass(frozen=True)
class Args:
    a: Positional[Path]
    """Folder made by `vlm4vla features`."""
    b: Positional[Path]
    """Another one, of the same frames."""
    over: Literal["episodes", "images"] = "episodes"
    """What the interval's bootstrap draws; frames of one episode are no independent images."""
    resamples: int = 200
    """Bootstrap draws; 0 for no intervals."""
    seed: int = 0
    """Seed of the resamples and of the shuffles behind the floor."""
    json: Path | None = None
    """Also write everything as JSON; the command then does nothing when it is up to date."""


def run(args: Args) -> int:
    from probes.features import Features
    from probes.verbs.shared import check_seed, json_is_current, show, write_result

    check_seed(args.seed)
    if args.resamples < 0:
        raise InputError(f"{args.resamples} resamples", fix="use --resamples 0 or more")
    a, b = Features.open(args.a), Features.open(args.b)
    config = {"over": args.over, "resamples": args.resamples, "seed": args.seed}
    inputs = {"a": a.fingerprint, "b": b.fingerprint}
    if json_is_current(args.json, "similarity", config=config, inputs=inputs):
        print(f"{args.json} is up to date")
        return 0
    a.same_images(b)

    from probes.similarity import cka_matrix

    episodes = a.index["episode"].to_numpy()
    result = cka_matrix(
        {name: a.layer(name) for name in a.layers},
        {name: b.layer(name) for name in b.layers},
        resamples=args.resamples,
        clusters=episodes if args.over == "episodes" else None,
        seed=args.seed,
    )
    frame = result.to_frame()
    print(f"debiased CKA of {a.label} (A) and {b.label} (B) on {result.n} frames of {len(set(episodes))} episodes")
    print(
        show(
            frame.pivot(index="layer_a", columns="layer_b", values="cka")
            .reindex(a.layers)[list(b.layers)]
            .reset_index()
        )
    )
    print(show(frame))
    over = f"95 % interval over {args.over}" if frame["low"].notna().all() else _no_interval(args)
    print(f"low, high: {over}; floor: 95 % of shuffled images lie below; biased: the textbook value")
    if args.json:
        write_result(
            args.json, "similarity", config=config, inputs=inputs,
            label_a=a.label, label_b=b.label, n=result.n, episodes=len(set(episodes)), level=result.level,
            layers_a=list(result.layers_a), layers_b=list(result.layers_b), rows=frame.to_dict("records"),
        )  # fmt: skip
    return 0


def _no_interval(args: Args) -> str:
    from probes.similarity import MIN_UNITS

    return f"no interval: fewer than {MIN_UNITS} {args.over}" if args.resamples else "no interval: no resamples"
