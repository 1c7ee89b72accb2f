"""Turn a VLM into a VLA from episode stores, or train it on questions or action tokens about the same pictures.

RECIPE is a preset (tiny, nano, or paper/calvin, paper/bridge and paper/libero10 with the authors' choices) or a TOML
file of settings, with [[stages]] tables if one is to follow the other. Every setting is an option, too. Issuing the
command again goes on where a killed run stopped, exactly, and does nothing once the run is finished; other settings or
data need another --out. For several processes: torchrun --nproc-per-node 2 -m vlm4vla_core.cli train …

With --parallel fsdp they share weights, gradients and optimizer states, too (docs/cluster.md).

Example: vlm4vla train tiny --data stores/tabletop --out runs/vla
"""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro
from tyro.conf import Positional

from vlm4vla_core import folders
from vlm4vla_core.presets import SOURCES, Objective, TrainConfig, make_stages


@dataclass(frozen=True)
class _Own:
    recipe: Positional[str]
    """Preset (tiny, nano, paper/calvin, paper/bridge, paper/libero10) or TOML file."""
    data: tuple[Path, ...]
    """Episode store, or several; for the language objective also question files (see docs/auxiliary-data.md)."""
    out: Path
    """Run folder: run.json, log.jsonl, checkpoints/; of several stages, a folder of runs."""
    dry_run: bool = False
    """Print the plan (settings, parameters, memory, tokens, checkpoints) and stop."""
    json: Path | None = None
    """Also write the summary as JSON."""


def _option(name: str, setting: Any) -> tuple[str, Any, Any]:
    kind = dict[str, float] if name == "auxiliary" else setting.annotation
    return name, Annotated[kind | None, tyro.conf.arg(help=setting.description)], field(default=None)


# Every setting is an option: what is left out is the recipe's.
Args: Any = make_dataclass(
    "Args",
    [_option(name, setting) for name, setting in TrainConfig.model_fields.items()],
    bases=(_Own,),
    frozen=True,
)

# Names of the measured values (see `validation`) for people.
_LABELS = {
    "arm": "arm loss",
    "gripper": "gripper loss (cross-entropy)",
    "constant_arm": "  arm loss of a constant action",
    "gripper_accuracy": "gripper accuracy",
    "gripper_majority": "  of always the commoner state",
    "token_accuracy": "answer tokens right",
    "answer_accuracy": "answers right",
    "majority": "  of always the commonest answer",
    "decoded": "token sequences that are a chunk",
    "presence_precision": "presence, average precision",
    "presence_share": "  of chance",
    "position_cm": "position error [cm]",
    "constant_position_cm": "  of each place's mean",
    "gripper_cm": "gripper position error [cm]",
    "constant_gripper_cm": "  of the mean position",
    "gripper_open": "gripper open or closed",
    "depth_cm": "depth error [cm]",
    "constant_depth_cm": "  of each place's mean",
    "offset": "offset error [cell sides]",
    "segmentation": "commonest class right",
    "segmentation_majority": "  of each place's commonest class",
}
_PEOPLE = {"m": ("mm", 1000.0), "rad": ("degrees", 57.29577951308232)}


def run(args: Any) -> int:
    if os.environ.get("RANK", "0") == "0":
        return _run(args)
    with redirect_stdout(io.StringIO()):  # of several processes the first one speaks and writes
        return _run(replace(args, json=None))


def _run(args: Any) -> int:
    given = {name: getattr(args, name) for name in TrainConfig.model_fields if getattr(args, name) is not None}
    stages = make_stages(args.recipe, given)
    summaries = []
    for number, (name, config) in enumerate(stages):
        if number:  # after the last checkpoint of the stage before
            config = config.model_copy(update={"backbone": str(args.out / stages[number - 1][0])})
        out = args.out / name
        if name:
            print(f"stage {number + 1} of {len(stages)}: {name}")
        if args.dry_run:
            from vlm4vla_core.plan import plan

            before = stages[0][1].backbone if number else config.backbone  # the same model
            summaries.append(plan(config.model_copy(update={"backbone": before}), args.data))
            _print_plan(summaries[-1], config if args.recipe.startswith("paper/") else None)
            continue
        summaries.append(_summary(out, _train(config, args.data, out)))
        _print(summaries[-1])
    if args.json:
        folders.write_json(args.json, summaries[0] if len(summaries) == 1 else {"stages": summaries})
    return 0


def _train(config: TrainConfig, data: tuple[Path, ...], out: Path) -> Path:
    from vlm4vla_core.run_folder import finished, run_inputs

    if last := finished(config, run_inputs(config, data), out):
        print(f"{out} is up to date")
        return last
    from vlm4vla_core.training import train

    return train(config, data, out)


def _summary(out: Path, last: Path) -> dict[str, Any]:
    settings = folders.read_json(out / "run.json")
    manifest = folders.read_manifest(last, "checkpoint")
    start = folders.read_manifest(last.parent / "step-000000", "checkpoint")
    policy = folders.read_json(last / "config.json")["policy"]
    units = dict(zip(policy["convention"]["names"], policy["convention"]["units"], strict=True)) if policy else {}
    return {
        "run": str(out),
        "checkpoint": str(last),
        "objective": settings["config"]["objective"],
        "steps": manifest["step"],
        "parameters": settings["parameters"],
        "start": start["metrics"],
        "end": manifest["metrics"],
        "units": units,
        "cut": settings["data"]["cut"],
    }


def _print(summary: dict[str, Any]) -> None:
    sizes = summary["parameters"]
    line = (
        f"{summary['objective']}, {summary['steps']} steps; {sizes['total']:,} parameters, {sizes['trained']:,} trained"
    )
    if sizes["new"]:
        line += f"; the adaptation adds {sizes['new']:,} ({100 * sizes['new_share']:.2g} %)"
    print(line)
    _warn_cut(summary["cut"])
    start, end = summary["start"], summary["end"]
    if end:
        print(f"{'held-out':<36}{'start':>10}{'end':>10}   ({end['rows']} rows)")
        _print_held_out(start, end, summary["units"])
    for name, values in end.items():  # of an auxiliary objective
        if name in get_args(Objective):
            print(f"{name}, beside it")
            _print_held_out(start.get(name, {}), values, summary["units"])
    print(f"checkpoint: {summary['checkpoint']}")


def _print_held_out(start: dict[str, Any], end: dict[str, Any], units: dict[str, str]) -> None:
    for name, value in end.items():
        if isinstance(value, float):
            print(f"{_LABELS.get(name, name):<36}{start.get(name, float('nan')):>10.4f}{value:>10.4f}")
    for name, value in end.get("error", {}).items():
        unit, factor = _PEOPLE.get(units.get(name, ""), (units.get(name, "own unit"), 1.0))
        before = start.get("error", {}).get(name, float("nan")) * factor
        print(f"{f'mean error {name} [{unit}]':<36}{before:>10.4f}{value * factor:>10.4f}")


def _warn_cut(cut: dict[str, float]) -> None:
    shares = ", ".join(f"{name} {100 * share:.2g} %" for name, share in cut.items() if share)
    if shares:
        print(f"warning: the normalisation cuts off {shares} of the actions; they can be neither learnt nor predicted")


def _print_plan(found: dict[str, Any], sourced: TrainConfig | None) -> None:
    for name, value in found.items():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        print(f"{name.replace('_', ' '):<28}{shown}")
    if sourced:
        print("\nsettings of the preset, and their source")
        for name, source in SOURCES.items():
            print(f"{name:<18}{getattr(sourced, name)!s:<14}{source}")


assert not {one.name for one in fields(_Own)} & set(TrainConfig.model_fields)
