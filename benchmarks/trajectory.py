"""What the recording of a training's path costs: snapshots "sketch" at steps 0, 1, 2, 4, 8 …, as a share of the run.

A run of the `tiny` preset is timed snapshot by snapshot in processor time, one thread. For a model of full size, which
does not fit here, the cost per weight is measured on a matrix of 8 million and multiplied; its step is an estimate.

Run: OMP_NUM_THREADS=1 python benchmarks/trajectory.py
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STEPS = 400
PAPER_STEPS, SAMPLES_PER_S, BATCH = 30_000, 100.0, 128  # of paper/calvin; the rate is the goal for one H200


def timed_run(store: Path, out: Path) -> dict[str, float]:
    """Processor seconds of all steps, and of what snapshots added to them."""
    from vlm4vla_core import training, trajectory
    from vlm4vla_core.presets import make_config

    spent = {"steps": 0.0, "snapshots": 0.0}
    update, record, norms = training._Run._update, trajectory.record, trajectory.gradient_norms

    def clocked(name: str, call: Any) -> Any:
        def inner(*args: Any, **options: Any) -> Any:
            began = time.process_time()
            found = call(*args, **options)
            spent[name] += time.process_time() - began
            return found

        return inner

    training._Run._update = clocked("steps", update)  # type: ignore[method-assign]
    trajectory.record = clocked("snapshots", record)
    trajectory.gradient_norms = clocked("snapshots", norms)
    try:
        settings = {"max_steps": STEPS, "val_every": 0, "save_every": 0, "val_rows": 1, "snapshots": "sketch"}
        training.train(make_config("tiny", settings), store, out)
    finally:
        training._Run._update, trajectory.record, trajectory.gradient_norms = update, record, norms  # type: ignore
    return spent


def seconds_per_weight() -> float:
    """Of a sketch, median of three."""
    import torch

    from vlm4vla_core.trajectory import sketch

    values, times = torch.zeros(2048, 4096), []
    for number in range(3):
        began = time.process_time()
        sketch(f"weight{number}", values)
        times.append((time.process_time() - began) / values.numel())
    return sorted(times)[1]


def main() -> None:
    import torch

    from vlm4vla_core import folders
    from vlm4vla_core.cli import main as vlm4vla

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        vlm4vla(["record", "tabletop", "--tasks", "move", "touch", "--episodes", "40", "--out", str(store)])
        spent = timed_run(store, Path(folder) / "run")
    each = seconds_per_weight()
    taken = 2 + (PAPER_STEPS.bit_length() - 1)  # steps 0, 1, 2, 4 … 16384
    large = taken * each * 3.75e9 / (PAPER_STEPS * BATCH / SAMPLES_PER_S)
    result = {
        "what": f"snapshots 'sketch' of {STEPS} steps of the tiny preset (0.3 M parameters, batch 32), one thread",
        "share_of_step_time": round(spent["snapshots"] / (spent["steps"] - spent["snapshots"]), 5),
        "goal": "cheap enough to leave on: below 1 %",
        "processor_seconds": {name: round(value, 3) for name, value in spent.items()},
        "nanoseconds_per_weight": round(1e9 * each, 2),
        "estimate_for_3.75_billion": {
            "seconds_per_snapshot": round(each * 3.75e9, 1),
            "snapshots": taken,
            "share": round(large, 4),
            "of": f"{PAPER_STEPS} steps of {BATCH} samples at {SAMPLES_PER_S:g} samples/s (the goal, not measured); "
            "copying weights to the CPU left out",
        },
        "note": f"processor time; load of the machine over the last minute: {os.getloadavg()[0]:.1f}",
        "command": "OMP_NUM_THREADS=1 python benchmarks/trajectory.py",
        "made_by": folders.provenance(),
    }
    for name, value in result.items():
        if not isinstance(value, dict):
            print(f"{name.replace('_', ' '):<28}{value}")
    folders.write_json(HERE / "results" / "trajectory.json", result)


if __name__ == "__main__":
    main()
