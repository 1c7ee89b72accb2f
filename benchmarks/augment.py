"""The paper's augmentations beside decoding the picture they are made from, in CPU microseconds per picture.

Run:  python benchmarks/augment.py [--out benchmarks/results/augment.json]
A synthetic picture (smooth colour and noise) as JPEG of quality 95, through `images.decode` and `augment.augment`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vlm4vla_core import folders, images
from vlm4vla_core.episodes.augment import AUGMENTATIONS, augment

PICTURES = 64


def picture(size: int) -> np.ndarray:
    """(size, size, 3) uint8: slow waves of colour with noise, about as many JPEG bytes as a camera picture."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size
    waves = np.stack([np.sin(6 * x + 3 * y), np.cos(4 * y - x), np.sin(9 * x * y)], -1)
    return np.clip(128 + 80 * waves + rng.normal(0, 8, (size, size, 3)), 0, 255).astype(np.uint8)


def best(work: Callable[[], object]) -> float:
    """CPU microseconds per picture, the best of five."""
    spent = []
    for _ in range(5):
        began = time.process_time()
        work()
        spent.append((time.process_time() - began) / PICTURES * 1e6)
    return min(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "augment.json")
    out, result = parser.parse_args().out, {}
    for size in (112, 224):
        data = images.encode(picture(size))
        batch = np.repeat(images.decode(data)[None], PICTURES, axis=0)
        row = {
            "jpeg_kb": len(data) / 1e3,
            "decode_us": best(lambda d=data: [images.decode(d) for _ in range(PICTURES)]),
        }
        for name in ("calvin", "bridge"):
            row[f"{name}_us"] = best(lambda b=batch, a=AUGMENTATIONS[name]: augment(b, a, 0, 0))
        result[f"{size} px"] = row
        print(f"{size} px: " + ", ".join(f"{key} {value:.0f}" for key, value in row.items()))
    command = "OMP_NUM_THREADS=1 python benchmarks/augment.py"
    note = "CPU time of one process, other work on the machine; compare within this run"
    folders.write_json(out, result | {"made_by": {"command": command, "note": note, **folders.provenance()}})


if __name__ == "__main__":
    main()
