"""Speed of feature extraction, of similarity over many layers and of the linear probe grid, beside the naive ways.

    python benchmarks/probing.py --layers 8 --images 2500 --width 640 --samples 12500      # a sixteenth and less
    OMP_NUM_THREADS=2 python benchmarks/probing.py                                         # full size, some 10 minutes
    python benchmarks/probing.py --device cuda --json benchmarks/results/probing_gpu.json  # extraction on a GPU alone

CPU seconds of this process (threads add up) beside wall seconds, which say little on a busy machine; on a GPU wall
alone. Naive: one pair of layers at a time through d x d products in float64 (similarity), one ridge fit per strength
and layer (probe); both are measured once and multiplied, and marked so. Every line is printed when it is measured; a
killed run goes on with the part at which it was.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
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


def similarity(layers: int, n: int, d: int) -> Iterator[dict[str, Any]]:
    a, pairs = features(layers, n, d), layers**2
    used, wall, exact = cpu(lambda: gram_cka(a))
    yield {"what": "all pairs, Gram strips", "cpu_s": used, "wall_s": wall}
    for batch in (64, 128):
        used, wall, found = cpu(lambda batch=batch: minibatch_cka(  # type: ignore[misc]
            lambda name, r: a[name][r], list(a), lambda name, r: a[name][r], list(a), n, batch=batch))  # fmt: skip
        off = float(np.abs(found.value - exact.value).max())
        yield {"what": f"minibatches of {batch}", "cpu_s": used, "wall_s": wall, "largest difference": off}
    names = list(a)[:2]
    used, wall, one = cpu(lambda: cka(a[names[0]], a[names[1]]).value)
    error = abs(one - float(exact.value[0, 1]))
    yield {"what": f"naive: d x d in float64, one pair x {pairs}", "cpu_s": used * pairs, "wall_s": wall * pairs,
           "extrapolated": True, "largest difference": error}  # fmt: skip


def grid(layers: int, n: int, d: int) -> Iterator[dict[str, Any]]:
    alphas = 10.0 ** np.linspace(-5, 4, 10)
    weights = np.random.default_rng(1).normal(size=(d, 3)) / np.sqrt(d)
    parts = Parts(*np.split(np.arange(n), [int(0.6 * n), int(0.8 * n)]))
    used, wall, best = 0.0, 0.0, []
    for i in range(layers):  # one in memory at a time, as when they are read from disk; drawing them does not count
        rng = np.random.default_rng(i)
        x = rng.standard_normal((n, d), dtype=np.float32)
        y = (x @ weights + rng.normal(size=(n, 3)))[:, None]
        more, longer, found = cpu(lambda x=x, y=y: ridge_grid(x, y, parts, alphas))  # type: ignore[misc]
        used, wall, best = used + more, wall + longer, [*best, int(found.best[0])]
    yield {"what": "grid: one decomposition per layer", "cpu_s": used, "wall_s": wall, "best": sorted(set(best))}

    def naive() -> np.ndarray:
        z = (x[parts.fit] - x[parts.fit].mean(0)).astype(np.float64)
        w = np.linalg.solve(z.T @ z + alphas[2] * len(z) * np.eye(d), z.T @ (y[parts.fit, 0] - y[parts.fit, 0].mean(0)))
        return x[parts.select] @ w

    slow, slow_wall, _ = cpu(naive)
    fits = layers * (len(alphas) + 1)
    yield {"what": f"naive: {fits} fits", "cpu_s": slow * fits, "wall_s": slow_wall * fits, "extrapolated": True}


# Blocks, width, heads and batch of the tower: what an idle core does in a minute, and SigLIP So400m's shape.
TOWERS = {"cpu": (6, 384, 6, 16), "cuda": (27, 1152, 16, 64)}


def throughput(images: int, repeats: int, device: str) -> Iterator[dict[str, Any]]:
    """A vision tower at 224 px: bare forward, and the whole of `vlm4vla features`, in turns."""
    import tempfile

    import torch
    from PIL import Image
    from transformers import AutoModel

    from probes.features import extract
    from probes.image_folder import ImageFolder
    from vlm4vla_core.backbone import Backbone, tiny
    from vlm4vla_core.families import family
    from vlm4vla_core.tiny import tiny_tokenizer

    torch.set_num_threads(1)
    blocks, width, heads, size = TOWERS[device]
    spec = family("paligemma")
    config = tiny("paligemma", image_size=224).base.config
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": blocks}
    for name, value in {**shape, "num_attention_heads": heads}.items():
        setattr(config.vision_config, name, value)
    model = Backbone(AutoModel.from_config(config), tiny_tokenizer(spec), spec, 224).to(device).eval()
    rng, clock = np.random.default_rng(0), 0 if device == "cpu" else 1  # CPU seconds, or wall seconds of a GPU
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pictures"
        folder.mkdir()
        for i in range(images):
            Image.fromarray(rng.integers(0, 255, (224, 224, 3), dtype=np.uint8)).save(folder / f"{i:04d}.jpg")
        data = ImageFolder(folder)
        batches = [data.images("", range(start, min(images, start + size))) for start in range(0, images, size)]
        bare, whole = [], []

        def forward() -> None:
            with torch.inference_mode():
                for batch in batches:
                    model.base.vision_tower(**model.pixels(torch.from_numpy(batch)))
                if device == "cuda":
                    torch.cuda.synchronize()

        for i in range(repeats + 1):  # the first of each warms up
            bare.append(cpu(forward)[clock])
            whole.append(cpu(lambda i=i: extract(  # type: ignore[misc]
                model, data, Path(scratch) / f"f{i}", layers=["vision.0..-1"], camera="", batch_size=size,
                config={"pool": "mean", "camera": ""}, inputs={"store": "s", "checkpoint": "c"}))[clock])  # fmt: skip
    b, w, per = float(np.median(bare[1:])), float(np.median(whole[1:])), ("CPU s", "s")[clock]
    yield {"what": f"bare vision tower, img per {per}", "rate": images / b}
    what = f"features of all layers (JPEG, pooling, writing), img per {per}"
    yield {"what": what, "rate": images / w, "of bare": b / w}


def measured(title: str, part: Iterator[dict[str, Any]], kept: Path) -> dict[str, Any]:
    """The rows of a part, printed one by one; of a part that an earlier, killed run has finished, those."""
    done = folders.read_json(kept) if kept.is_file() else {}
    if title in done:
        print(f"{title}: measured before")
        return dict(done[title])
    print(title)
    rows = []
    for row in part:
        rows.append(row)
        words = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{v}" for k, v in row.items())
        print(f"  {words}", flush=True)
    table = {"rows": rows, "made_by": folders.provenance()}
    folders.write_json(kept, {**done, title: table})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 32), ("images", 10_000), ("width", 1280), ("samples", 50_000), ("pictures", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=tuple(TOWERS), default="cpu", help="cuda: feature extraction alone")
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()
    layers, n, d, samples, device = args.layers, args.images, args.width, args.samples, args.device
    blocks, width, *_ = TOWERS[device]
    parts: dict[str, Iterator[dict[str, Any]]] = {}
    if device == "cpu":
        parts[f"similarity of {layers} x {layers} layers, n = {n}, d = {d}"] = similarity(layers, n, d)
        title = f"linear grid, {layers} layers x 10 strengths, {samples} samples, d = {d}"
        parts[title] = grid(layers, samples, d)
    title = f"feature extraction, {blocks} blocks of width {width} at 224 px, {args.pictures} pictures, {device}"
    parts[title] = throughput(args.pictures, args.repeats, device)
    kept = args.json.with_suffix(".partial.json")
    tables = {title: measured(title, part, kept) for title, part in parts.items()}
    command = "python benchmarks/probing.py " + " ".join(
        f"--{k} {getattr(args, k)}" for k in ("layers", "images", "width", "samples", "pictures", "repeats", "device")
    )
    note = "'extrapolated': measured on a part and multiplied; wall seconds say little when the machine was busy"
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"), "load": os.getloadavg()}
    value = {"command": command, "note": note, "environment": environment, "tables": tables}
    folders.write_json(args.json, {**value, "made_by": folders.provenance()})
    kept.unlink()


if __name__ == "__main__":
    main()
