"""Speed of feature extraction, of similarity over many layers and of the linear probe grid, beside the naive ways.

    python benchmarks/probing.py --layers 8 --images 2500 --width 640 --samples 12500      # a sixteenth and less
    python benchmarks/probing.py                                                           # full size, some 10 minutes

Times are CPU seconds of this process (threads add up), since wall time says little on a busy machine. Naive: one pair
of layers at a time through d x d products in float64 (similarity), one ridge fit per strength and layer (probe); both
are measured on a few pairs or fits and multiplied, and marked so.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from probes.grid import Parts, ridge_grid
from probes.large_cka import gram_cka, minibatch_cka
from probes.similarity import cka
from vlm4vla_core import folders

RESULT = Path(__file__).parent / "results" / "probing.json"


def cpu(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """CPU seconds, wall seconds and the result of some work."""
    began, wall = time.process_time(), time.perf_counter()
    out = work()
    return time.process_time() - began, time.perf_counter() - wall, out


def features(layers: int, n: int, d: int) -> dict[str, np.ndarray]:
    """Layers that share more with their neighbours, float32."""
    rng = np.random.default_rng(0)
    out, x = {}, rng.normal(size=(n, d)).astype(np.float32)
    for i in range(layers):
        x = 0.9 * x + 0.4 * rng.standard_normal((n, d), dtype=np.float32)
        out[f"vision.{i}"] = x
    return out


def similarity(layers: int, n: int, d: int) -> list[dict[str, Any]]:
    a, pairs = features(layers, n, d), layers**2
    rows = []
    used, wall, exact = cpu(lambda: gram_cka(a))
    rows.append({"what": "all pairs, Gram strips", "cpu_s": used, "wall_s": wall})
    for batch in (64, 128):
        used, wall, found = cpu(lambda batch=batch: minibatch_cka(  # type: ignore[misc]
            lambda name, r: a[name][r], list(a), lambda name, r: a[name][r], list(a), n, batch=batch))  # fmt: skip
        off = float(np.abs(found.value - exact.value).max())
        rows.append({"what": f"minibatches of {batch}", "cpu_s": used, "wall_s": wall, "largest difference": off})
    names = list(a)[:2]
    used, wall, one = cpu(lambda: cka(a[names[0]], a[names[1]]).value)
    error = abs(one - float(exact.value[0, 1]))
    rows.append({"what": f"naive: d x d in float64, one pair x {pairs}", "cpu_s": used * pairs, "wall_s": wall * pairs,
                 "extrapolated": True, "largest difference": error})  # fmt: skip
    return rows


def grid(layers: int, n: int, d: int) -> list[dict[str, Any]]:
    alphas = 10.0 ** np.linspace(-5, 4, 10)
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(d, 3)) / np.sqrt(d)
    parts = Parts(*np.split(np.arange(n), [int(0.6 * n), int(0.8 * n)]))

    def layer(i: int) -> tuple[np.ndarray, np.ndarray]:
        x = np.random.default_rng(i).standard_normal((n, d), dtype=np.float32)
        return x, (x @ weights + rng.normal(size=(n, 3)))[:, None]

    measured = min(layers, 2)
    data = [layer(i) for i in range(measured)]
    used, wall, found = cpu(lambda: [ridge_grid(x, y, parts, alphas) for x, y in data])

    def naive() -> np.ndarray:
        x, y = data[0]
        z = (x[parts.fit] - x[parts.fit].mean(0)).astype(np.float64)
        w = np.linalg.solve(z.T @ z + alphas[2] * len(z) * np.eye(d), z.T @ (y[parts.fit, 0] - y[parts.fit, 0].mean(0)))
        return x[parts.select] @ w

    slow, slow_wall, _ = cpu(naive)
    times = layers / measured
    fits = layers * (len(alphas) + 1)
    return [
        {"what": "grid: one decomposition per layer", "cpu_s": used * times, "wall_s": wall * times,
         "extrapolated": times > 1, "best": [int(one.best[0]) for one in found]},
        {"what": f"naive: {fits} fits", "cpu_s": slow * fits, "wall_s": slow_wall * fits, "extrapolated": True},
    ]  # fmt: skip


def throughput(images: int, repeats: int) -> list[dict[str, Any]]:
    """A vision tower of 6 blocks, width 384, at 224 px: bare forward, and the whole of `vlm4vla features`, in turns."""
    import tempfile

    import torch

    from probes.features import extract
    from probes.image_folder import ImageFolder
    from vlm4vla_core.backbone import Backbone, tiny
    from vlm4vla_core.families import family
    from vlm4vla_core.tiny import tiny_tokenizer

    torch.set_num_threads(1)
    spec = family("paligemma")
    tokenizer = tiny_tokenizer(spec)
    config = tiny("paligemma", image_size=224).base.config
    for name, value in (
        ("hidden_size", 384),
        ("intermediate_size", 1536),
        ("num_hidden_layers", 6),
        ("num_attention_heads", 6),
    ):
        setattr(config.vision_config, name, value)
    from transformers import AutoModel

    model = Backbone(AutoModel.from_config(config), tokenizer, spec, 224).eval()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        from PIL import Image

        folder = Path(scratch) / "pictures"
        folder.mkdir()
        for i in range(images):
            Image.fromarray(rng.integers(0, 255, (224, 224, 3), dtype=np.uint8)).save(folder / f"{i:04d}.jpg")
        data = ImageFolder(folder)
        batches = [data.images("", range(start, start + 16)) for start in range(0, images, 16)]
        bare, whole = [], []

        def forward() -> None:
            with torch.inference_mode():
                for batch in batches:
                    model.base.vision_tower(**model.pixels(torch.from_numpy(batch)))

        for i in range(repeats + 1):  # the first of each warms up
            bare.append(cpu(forward)[0])
            whole.append(cpu(lambda i=i: extract(  # type: ignore[misc]
                model, data, Path(scratch) / f"f{i}", layers=["vision.0..-1"], camera="", batch_size=16,
                config={"pool": "mean", "camera": ""}, inputs={"store": "s", "checkpoint": "c"}))[0])  # fmt: skip
    b, w = float(np.median(bare[1:])), float(np.median(whole[1:]))
    return [
        {"what": "bare vision tower, img per CPU s", "rate": images / b},
        {
            "what": "features of all layers (JPEG, pooling, writing), img per CPU s",
            "rate": images / w,
            "of bare": b / w,
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 32), ("images", 10_000), ("width", 1280), ("samples", 50_000), ("pictures", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()
    sizes = (args.layers, args.images, args.width)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        f"similarity of {args.layers} x {args.layers} layers, n = {args.images}, d = {args.width}": lambda: similarity(
            *sizes
        ),
        f"linear grid, {args.layers} layers x 10 strengths, {args.samples} samples, d = {args.width}": lambda: grid(
            args.layers, args.samples, args.width
        ),
        "feature extraction, 6 blocks of width 384 at 224 px, one thread": lambda: throughput(
            args.pictures, args.repeats
        ),
    }
    tables = {}
    for title, measure in parts.items():
        tables[title] = measure()
        print(title)
        for row in tables[title]:
            print(
                "  " + ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{v}" for k, v in row.items()), flush=True
            )
    command = "python benchmarks/probing.py " + " ".join(
        f"--{k} {getattr(args, k)}" for k in ("layers", "images", "width", "samples", "pictures", "repeats")
    )
    note = "CPU seconds on a busy machine; 'extrapolated': measured on a part and multiplied"
    value = {"command": command, "note": note, "tables": tables, "made_by": folders.provenance()}
    folders.write_json(args.json, json.loads(json.dumps(value)))


if __name__ == "__main__":
    main()
