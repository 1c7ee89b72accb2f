"""Fit readouts on frozen features and test them on episodes they never saw, beside what they must beat.

SOURCE is a checkpoint (or run, published folder, hub id), whose features are made below --out, or a folder made by
`vlm4vla features`. Regularisation and layer are chosen on validation episodes, everything is tested once on held-out
episodes; intervals are over episodes. Beside it: the same readout of the pixels, of shuffled labels, a control task
(selectivity) and an untrained network of the same shape. With --against, further checkpoints, paired on the same
episodes, all in one figure.

Example: vlm4vla probe runs/walk/vla --data runs/walk/demos --targets gripper_xyz,next_action --max-frames 800
         --against runs/walk/vlm --out runs/walk/probe
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from probes.features import Features
    from probes.probe import Probe
    from vlm4vla_core.episodes.store import EpisodeStore

TOKENS = ("attentive", "dense")  # readouts that need every token


@dataclass(frozen=True)
class Args:
    source: Positional[Path]
    """Checkpoint, or folder made by `vlm4vla features`."""
    data: Path
    """The episode store that is looked at."""
    against: tuple[Path, ...] = ()
    """Further checkpoints or features folders of the same frames, such as base, VLM and scratch."""
    targets: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--target",))] = ("gripper_xyz",)
    """What to read out: gripper_xyz, gripper_xy, object_xy, object_xyz, next_action, next_chunk, task_progress, depth,
    grasp, contact, lamp, task, instruction, colour, shape; dense: depth, segmentation. Spaces or commas between."""
    readout: tuple[str, ...] = ("linear",)
    """linear, mlp, attentive (every token), dense (maps)."""
    layers: tuple[str, ...] = ("vision.0..-1", "projector")
    """Of checkpoints: layers to look at (see `vlm4vla features`)."""
    pool: str = "grid"
    """Of checkpoints: pooling for linear and mlp readouts."""
    camera: str | None = None
    """Of checkpoints: camera of the store."""
    max_frames: int | None = None
    """Of checkpoints: look at this many frames, drawn without replacement."""
    untrained: bool = True
    """Of a checkpoint: also probe a network of the same shape with weights drawn anew."""
    seed: int = 0
    """Seed of frames, split by episode, shuffles, control task, untrained weights and resamples."""
    out: Path | None = None
    """Folder to write: tables, figures, and the features of checkpoints."""
    device: str = "auto"
    """Of checkpoints: cpu, cuda, or auto."""
    json: Path | None = None
    """Also write everything as JSON; the command then does nothing when it is up to date."""


def run(args: Args) -> int:
    from probes.verbs.shared import check_seed, json_is_current, write_result
    from vlm4vla_core.episodes.store import EpisodeStore

    check_seed(args.seed)
    targets, readouts = _names(args)
    store = EpisodeStore.open(args.data)
    sets = {
        pool: _features(args, pool) for pool in dict.fromkeys("none" if r in TOKENS else args.pool for r in readouts)
    }
    config = {"targets": targets, "readouts": readouts, "seed": args.seed}
    inputs = {"store": store.fingerprint}
    for pool, features in sets.items():
        inputs |= {f"features {i} {pool}": one.fingerprint for i, one in enumerate(features)}
    done = args.out / "probe.json" if args.out else args.json
    if json_is_current(done, "probe", config=config, inputs=inputs):
        print(f"{done} is up to date")
        if args.out and args.json:
            folders.write_json(args.json, folders.read_json(args.out / "probe.json"))
        return 0

    from probes.probe import probe

    results: list[Probe] = []
    for readout in readouts:
        first, *others = sets["none" if readout in TOKENS else args.pool]
        for target in targets:
            result = probe(first, store, target, kind=readout, against=others, seed=args.seed)
            results.append(result)
            _print(result)
    import pandas as pd

    rows = pd.concat([result.to_frame() for result in results], ignore_index=True)
    value = {
        "label": results[0].label, "against": list(results[0].against), "results": [_facts(one) for one in results],
        "rows": rows.to_dict("records"),
        "differences": [
            {"target": one.target, "readout": one.kind, **row}
            for one in results for row in one.differences_frame().to_dict("records")
        ],
    }  # fmt: skip
    if args.out:
        _write(args.out, results, rows, store, args.seed)
        write_result(args.out / "probe.json", "probe", config=config, inputs=inputs, **value)
        print(f"tables and figures in {args.out}")
    if args.json:
        write_result(args.json, "probe", config=config, inputs=inputs, **value)
    return 0


def _names(args: Args) -> tuple[list[str], list[str]]:
    """Targets and readouts, before any work. Raises InputError for an unknown one."""
    from probes.dense import NAMES
    from probes.readout import KINDS
    from probes.targets import TARGETS
    from vlm4vla_core.errors import nearest

    targets, readouts = ([p for text in texts for p in text.split(",") if p] for texts in (args.targets, args.readout))
    if not targets or not readouts:
        raise InputError("nothing to read out", fix="give --targets and --readout")
    for readout in readouts:
        if readout not in (*KINDS, "dense"):
            raise InputError(f"unknown readout '{readout}'", fix=nearest(readout, [*KINDS, "dense"]))
        known = NAMES if readout == "dense" else tuple(TARGETS)
        for target in targets:
            if target not in known:
                raise InputError(f"unknown target '{target}' of a {readout} readout", fix=nearest(target, known))
    return targets, readouts


def _features(args: Args, pool: str) -> list[Features]:
    """Features of all sources, made where they are checkpoints; the untrained network's last."""
    from probes.verbs.sources import is_features, open_source

    options: dict[str, Any] = {
        "data": args.data, "out": args.out, "layers": args.layers, "pool": pool, "camera": args.camera,
        "max_frames": args.max_frames, "seed": args.seed, "device": args.device,
    }  # fmt: skip
    opened = [open_source(path, **options) for path in (args.source, *args.against)]
    if args.untrained and not is_features(args.source):
        opened.append(open_source(args.source, scratch=True, **options))
    return opened


def _print(result: Probe) -> None:
    from probes.verbs.shared import show

    chosen = result.readouts[result.layer]
    fit, select, test = chosen.episodes
    print(
        f"{result.target} from {result.label}, {result.kind}: {fit} episodes to fit, {select} to select, {test} to test"
    )
    frame = result.to_frame().drop(columns=["target", "readout", "chosen", "alpha", "selected"])
    frame = frame.rename(columns={"r2": result.score}).dropna(axis=1, how="all")
    print(
        show(
            frame[[name for name in frame if not name.startswith("r2_") or len(result.readouts[result.layer].dims) < 4]]
        )
    )
    print(f"layer chosen on the selection episodes: {result.layer}; 95 % intervals over {test} test episodes")
    for label, readouts in result.against.items():
        from probes.readout import best_layer

        print(f"  of {label}: {best_layer(readouts)}")
    if result.undefined:
        print(f"{result.undefined} frames have no {result.target} and are left out")
    print(f"differences of {result.score}, paired by episode (detectable: with 80 % power)")
    print(show(result.differences_frame()))


def _facts(result: Probe) -> dict[str, Any]:
    chosen = result.readouts[result.layer]
    parts = ("fit", "select", "test")
    return {
        "target": result.target, "readout": result.kind, "layer": result.layer, "score": result.score,
        "pool": result.pool, "classes": list(chosen.classes), "undefined": result.undefined,
        "episodes": dict(zip(parts, chosen.episodes, strict=True)),
        "frames": dict(zip(parts, chosen.frames, strict=True)),
    }  # fmt: skip


def _write(out: Path, results: list[Probe], rows: pd.DataFrame, store: EpisodeStore, seed: int) -> None:
    import pandas as pd

    from probes.figures_layers import layers_figure, maps_sheet
    from probes.probe import changes
    from probes.style import save_figure

    out.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(out / "rows.parquet")
    told = [one.differences_frame().assign(target=one.target, readout=one.kind) for one in results]
    pd.concat(told, ignore_index=True).to_parquet(out / "differences.parquet")
    changed = pd.concat([changes(one, one.label, seed=seed) for one in results], ignore_index=True)
    for readout in dict.fromkeys(rows["readout"]):
        figure = layers_figure(rows[rows["readout"] == readout], changed[changed["readout"] == readout])
        save_figure(figure, out / f"layers-{readout}")
    for one in results:
        if one.maps is not None:
            sheet = maps_sheet(one, store)
            save_figure(sheet, out / f"maps-{one.target}", dpi=150)
