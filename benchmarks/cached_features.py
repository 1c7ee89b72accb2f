"""A language stage on cached image tokens against the same stage on pictures: the step, and making the file.

Tower and projector are frozen in both and eight questions are asked of a picture, as in the zoo's "speak" stage. Steps
of one and the other alternate in one warmed-up process, on one thread, on the same draws; what is timed is the
preparation of a batch and the optimizer's step, in processor time, since other work may share the machine.

Run: OMP_NUM_THREADS=1 python benchmarks/cached_features.py
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
STEPS, WARM, BATCH = 8, 2, 8
MODELS = {"tiny qwen2_5_vl": {"backbone": "tiny"}, "nano paligemma s": {"backbone": "nano", "family": "paligemma"}}
SETTINGS = {
    "objective": "language", "questions": ("general",), "questions_per_picture": 8, "freeze": ("vision", "projector"),
    "cache_features": True, "batch_size": BATCH, "val_rows": 1, "threads": 1, "device": "cpu",
}  # fmt: skip


def measure(name: str, store: Path, out: Path) -> dict[str, Any]:
    """Processor seconds of a step with pictures and with tokens, and per frame of making the tokens."""
    from vlm4vla_core.cached import on_cached_features
    from vlm4vla_core.devices import Devices
    from vlm4vla_core.objectives import build
    from vlm4vla_core.optimisers import make_optimizer
    from vlm4vla_core.presets import make_config
    from vlm4vla_core.training_data import Data

    config = make_config("tiny", {**SETTINGS, **MODELS[name]})
    data = Data(config, [store])
    model, pictured = build(config, data, {})
    model.train()
    optimizer, spent = make_optimizer(config, model), {"pictures": [], "tokens": []}  # type: ignore[var-annotated]
    out.mkdir()
    began = time.process_time()
    both = {"pictures": pictured, "tokens": on_cached_features(config, data, model, pictured, out, Devices("cpu"))}
    making = (time.process_time() - began) / sum(map(len, data.stores))
    for step in range(WARM + STEPS):
        for way, objectives in both.items():
            began = time.process_time()
            draw, rng = data.batch(step), np.random.default_rng(step)
            data.blank = way == "tokens"
            batch = objectives["language"].make(data.images(draw, model.image_size), draw, rng, slice(None))
            optimizer.zero_grad(set_to_none=True)
            loss = objectives["language"].loss(batch)["loss"]
            loss.backward()
            optimizer.step()
            spent[way].append(time.process_time() - began)
    step_s = {way: float(np.median(values[WARM:])) for way, values in spent.items()}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_tokens": model.geometry.tokens,
        "step_cpu_s": {way: round(value, 4) for way, value in step_s.items()},
        "pictures_over_tokens": round(step_s["pictures"] / step_s["tokens"], 2),
        "making_cpu_s_per_frame": round(making, 5),
        "passes_until_it_pays": "never" if step_s["pictures"] <= step_s["tokens"] else round(
            making * BATCH / (step_s["pictures"] - step_s["tokens"]), 1),
        "steps_cpu_s": {way: [round(value, 4) for value in values] for way, values in spent.items()},
    }  # fmt: skip


def main() -> None:
    import torch

    from vlm4vla_core import folders
    from vlm4vla_core.cli import main as vlm4vla

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        vlm4vla(["record", "tabletop", "--tasks", "scene", "--episodes", "64", "--out", str(store)])
        found = {name: measure(name, store, Path(folder) / name) for name in MODELS}
    result = {
        "what": f"language stage on frozen tower and projector, batch {BATCH}, 8 questions per picture, median of "
        f"{STEPS} alternating steps after {WARM}, 1 thread, processor time",
        "models": found,
        "command": "OMP_NUM_THREADS=1 python benchmarks/cached_features.py",
        "note": f"a busy machine: load over the last minute {os.getloadavg()[0]:.1f}",
        "made_by": folders.provenance(),
    }
    for name, one in found.items():
        print(name, {key: value for key, value in one.items() if key != "steps_cpu_s"})
    folders.write_json(HERE / "results" / "cached_features.json", result)


if __name__ == "__main__":
    main()
