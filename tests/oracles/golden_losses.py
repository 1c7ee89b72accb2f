"""Losses of 20 steps of every objective for two families, kept so that a refactor cannot change a number.

Run from the repository: OMP_NUM_THREADS=1 python tests/oracles/golden_losses.py writes golden_losses.json beside it.
Only do so when a change of numbers is meant, and say why in the commit.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FAMILIES = ("qwen2_5_vl", "paligemma")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "action": {},
    "flow": {"head": "flow"},
    "language": {"objective": "language"},
    "fast": {"objective": "fast"},
    "mixture": {"auxiliary": {"language": 0.5}},
    "dense": {"objective": "dense"},
    "packed": {"objective": "language", "questions_per_picture": 4},
    "cached": {"objective": "language", "freeze": ("vision", "projector"), "cache_features": True},
}
CASES = [f"{family} {name}" for family in FAMILIES for name in OBJECTIVES]


def losses(case: str, data: Path, out: Path) -> list[float]:
    """The 20 losses of one case."""
    from vlm4vla_core.presets import TrainConfig
    from vlm4vla_core.training import train

    family, name = case.split()
    config = TrainConfig(
        family=family, image_size=56, chunk=2, head_width=16, max_steps=20, batch_size=2, lr=1e-3, warmup_steps=4,
        schedule="cosine", clip=1.0, weight_decay=0.01, log_every=1, val_fraction=0.0, threads=1, device="cpu",
        **OBJECTIVES[name],
    )  # fmt: skip
    train(config, data, out)
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent / "core"))
    from toys import toy_store

    with tempfile.TemporaryDirectory() as folder:
        store = toy_store(Path(folder) / "store").path
        made = {case: losses(case, store, Path(folder) / case) for case in CASES}
    (HERE / "golden_losses.json").write_text(json.dumps(made, indent=1) + "\n")
