"""The training loop against a bare hand-written one over preloaded tensors, for the tiny Qwen2.5-VL at 112 px.

Both do the same arithmetic: forward, losses, backward, clipping, AdamW at the `tiny` preset's settings, one thread.
The loop reads, decodes and tokenises from the store meanwhile; the bare one has its batches ready. Rounds alternate,
and processor time (of all threads) is compared beside wall time, since other work may share the machine.

Run: OMP_NUM_THREADS=1 python benchmarks/training.py
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
STEPS, ROUNDS, WARM = 30, 3, 5


def bare(data: Any, config: Any) -> tuple[float, float]:
    """Wall and processor seconds of STEPS steps over batches made before."""
    import torch

    from vlm4vla_core.objectives import build

    model, objectives = build(config, data, {})
    model.train()
    size, batches = model.backbone.image_size, []
    for step in range(STEPS + WARM):
        draw = data.batch(step)
        rng = np.random.default_rng([config.seed, step])
        batches.append(objectives["action"].make(data.images(draw, size), draw, rng, slice(None)))
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, config.betas, weight_decay=0.02, fused=True)
    for step, batch in enumerate(batches):
        if step == WARM:
            wall, cpu = time.perf_counter(), time.process_time()
        optimizer.zero_grad(set_to_none=True)
        loss = model(batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        float(loss.detach())
    return time.perf_counter() - wall, time.process_time() - cpu


def loop(config: Any, path: Path, out: Path) -> tuple[float, float, float]:
    """Wall and processor seconds of STEPS steps of the loop (start and saving left out), and its share of waiting."""
    from vlm4vla_core import training

    marks: dict[int, tuple[float, float]] = {}
    update = training._Run._update

    def timed(self: Any, *args: Any) -> Any:
        found = update(self, *args)
        marks[self.step] = time.perf_counter(), time.process_time()
        return found

    training._Run._update = timed  # type: ignore[method-assign]
    try:
        training.train(config, path, out)
    finally:
        training._Run._update = update  # type: ignore[method-assign]
    first, last = marks[WARM - 1], marks[STEPS + WARM - 1]
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    waiting = [line["waiting"] for line in lines if "waiting" in line][-1]
    return last[0] - first[0], last[1] - first[1], waiting


def main() -> None:
    import torch

    from vlm4vla_core import folders
    from vlm4vla_core.cli import main as vlm4vla
    from vlm4vla_core.presets import make_config
    from vlm4vla_core.training_data import Data

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        vlm4vla(["record", "tabletop", "--tasks", "move", "touch", "--episodes", "40", "--out", str(store)])
        settings = {"max_steps": STEPS + WARM, "val_rows": 1, "val_every": 0, "save_every": 0}
        config = make_config("tiny", settings)
        data = Data(config, [store])
        rounds = []
        for number in range(ROUNDS):
            plain = bare(data, config)
            ours = loop(config, store, Path(folder) / f"run{number}")
            rounds.append({"bare": plain, "loop": ours[:2], "waiting": ours[2]})
    samples = STEPS * make_config("tiny").batch_size
    wall = {name: min(one[name][0] for one in rounds) for name in ("bare", "loop")}
    cpu = {name: min(one[name][1] for one in rounds) for name in ("bare", "loop")}
    result = {
        "what": f"tiny Qwen2.5-VL, 112 px, batch 32, {STEPS} steps, best of {ROUNDS} alternating rounds, 1 thread",
        "samples_per_s": {name: round(samples / value, 1) for name, value in wall.items()},
        "speed_of_the_loop_wall": round(wall["bare"] / wall["loop"], 3),
        "speed_of_the_loop_processor_time": round(cpu["bare"] / cpu["loop"], 3),
        "goal": 0.8,
        "waiting_for_data": min(one["waiting"] for one in rounds),
        "waiting_goal": 0.05,
        "rounds": rounds,
        "command": "OMP_NUM_THREADS=1 python benchmarks/training.py",
        "note": "the processor time of the loop holds decoding and tokenising on another thread; load of the machine "
        f"over the last minute: {os.getloadavg()[0]:.1f}",
        "made_by": folders.provenance(),
    }
    for name, value in result.items():
        if not isinstance(value, (dict, list)) or name == "samples_per_s":
            print(f"{name.replace('_', ' '):<36}{value}")
    folders.write_json(HERE / "results" / "training.json", result)


if __name__ == "__main__":
    sys.exit(main())
