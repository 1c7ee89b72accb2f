"""Fit a linear readout on frozen features and test it on episodes it never saw, beside its baselines.

Ridge in closed form; its strength is chosen on validation episodes, everything is tested once on held-out episodes.
R² counts from the mean predictor (0); intervals are over episodes. Beside it: the same readout of the pixels (16 x 16)
and of shuffled labels. With --against, the difference on the same episodes (paired).

Example: vlm4vla probe runs/walk/features-trained --against runs/walk/features-start --data runs/walk/demos
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True)
class Args:
    features: Positional[Path]
    """Folder made by `vlm4vla features`."""
    data: Path
    """The episode store those features were extracted from."""
    against: Path | None = None
    """A second features folder of the same frames, such as that of the untrained start."""
    target: str = "gripper_xyz"
    """What to read out: gripper_xyz or gripper_xy, in metres, from the recorded states."""
    seed: int = 0
    """Seed of the split by episode, the shuffles and the resamples."""
    json: Path | None = None
    """Also write everything as JSON; the command then does nothing when it is up to date."""


def run(args: Args) -> int:
    from probes.features import Features
    from probes.verbs.shared import check_seed, json_is_current, show, write_result
    from vlm4vla_core.episodes.store import EpisodeStore

    check_seed(args.seed)
    features, store = Features.open(args.features), EpisodeStore.open(args.data)
    against = Features.open(args.against) if args.against else None
    config = {"target": args.target, "seed": args.seed}
    inputs = {"features": features.fingerprint, "store": store.fingerprint}
    if against:
        inputs["against"] = against.fingerprint
    if json_is_current(args.json, "probe", config=config, inputs=inputs):
        print(f"{args.json} is up to date")
        return 0

    from probes.probe import probe

    result = probe(features, store, args.target, against=against, seed=args.seed)
    frame, chosen = result.to_frame(), result.readouts[result.layer]
    fit, select, test = chosen.episodes
    print(f"{args.target} from {features.label}: ridge, {fit} episodes to fit, {select} to select, {test} to test")
    print(show(frame.drop(columns=["chosen", "alpha", "selected"])))
    print(f"layer chosen on the selection episodes: {result.layer}; 95 % intervals over {test} test episodes")
    for name, (value, interval) in result.differences.items():
        shown = "no interval with one episode" if interval is None else f"[{interval.low:+.3f}, {interval.high:+.3f}]"
        print(f"R² difference, {name}: {value:+.3f} {shown}")
    if args.json:
        write_result(
            args.json, "probe", config=config, inputs=inputs,
            label=features.label, against=result.against_label, layer=result.layer, target=args.target,
            episodes=dict(zip(("fit", "select", "test"), chosen.episodes, strict=True)),
            frames=dict(zip(("fit", "select", "test"), chosen.frames, strict=True)),
            rows=frame.to_dict("records"),
            differences=[
                {"name": name, "value": value, "interval": interval}
                for name, (value, interval) in result.differences.items()
            ],
        )  # fmt: skip
    return 0
