"""Turn a VLM into a VLA from an episode store, or train it on questions about the same pictures.

RECIPE is a preset (tiny, or paper, paper-bridge and paper-libero with the authors' choices) or a TOML file of settings.
Issuing the command again goes on where a killed run stopped, exactly, and does nothing once the run is finished;
other settings or data need another --out.

Example: vlm4vla train tiny --data stores/tabletop --out runs/vla
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from vlm4vla_core import folders

Part = Literal["vision", "projector", "decoder", "word_embeddings"]


@dataclass(frozen=True)
class Args:
    recipe: Positional[str]
    """Preset (tiny, paper, paper-bridge, paper-libero) or TOML file."""
    data: Path
    """Episode store."""
    out: Path
    """Run folder: run.json, log.jsonl, checkpoints/."""
    objective: Literal["action", "language"] | None = None
    """action (the VLA) or language (answers to questions about the scene)."""
    backbone: str | None = None
    """Model to start from: a Hugging Face folder or hub id, or a checkpoint or run of this project."""
    freeze: tuple[Part, ...] | None = None
    """Parts that are not trained. "projector" is the merger, which "vision" does not include."""
    lora: tuple[Part, ...] | None = None
    """Parts whose weights stay while low-rank adapters on them are trained."""
    head: Literal["fc", "mlp", "flow"] | None = None
    """Policy head: fc (the paper's), mlp (two layers) or flow (generates actions from noise)."""
    max_steps: int | None = None
    """Optimizer steps."""
    batch_size: int | None = None
    """Samples per step."""
    lr: float | None = None
    """Learning rate after warm-up."""
    seed: int | None = None
    """Seed of the start weights and of the data order."""
    save_every: int | None = None
    """Steps between checkpoints; 0 keeps only the start and the end."""
    camera: str | None = None
    """Camera of the store; its first one by default."""
    threads: int | None = None
    """Torch threads; 2 at most by default."""
    json: Path | None = None
    """Also write the summary as JSON."""


_SETTINGS = (
    "objective", "backbone", "freeze", "lora", "head", "max_steps", "batch_size", "lr", "seed", "save_every", "camera",
    "threads",
)  # fmt: skip

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
}


def run(args: Args) -> int:
    from vlm4vla_core.presets import make_config
    from vlm4vla_core.training import train, up_to_date

    given = {name: getattr(args, name) for name in _SETTINGS}
    config = make_config(args.recipe, {name: value for name, value in given.items() if value is not None})
    last = up_to_date(config, args.data, args.out)
    if last:
        print(f"{args.out} is up to date")
    else:
        last = train(config, args.data, args.out)
    summary = _summary(args.out, last)
    _print(summary)
    if args.json:
        folders.write_json(args.json, summary)
    return 0


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
    }


def _print(summary: dict[str, Any]) -> None:
    sizes = summary["parameters"]
    line = (
        f"{summary['objective']}, {summary['steps']} steps; {sizes['total']:,} parameters, {sizes['trained']:,} trained"
    )
    if sizes["new"]:
        line += f"; the adaptation adds {sizes['new']:,} ({100 * sizes['new_share']:.2g} %)"
    print(line)
    start, end = summary["start"], summary["end"]
    if end:
        print(f"{'held-out':<36}{'start':>10}{'end':>10}   ({end['rows']} rows)")
        for name in end:
            if isinstance(end[name], float):
                print(f"{_LABELS.get(name, name):<36}{start[name]:>10.4f}{end[name]:>10.4f}")
        for name, value in end.get("error", {}).items():
            label = f"mean error {name} [{summary['units'][name]}]"
            print(f"{label:<36}{start['error'][name]:>10.4f}{value:>10.4f}")
    print(f"checkpoint: {summary['checkpoint']}")
