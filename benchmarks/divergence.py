"""How fast three checkpoints are compared, beside `cat` of the same files, and in how much anonymous memory.

    python benchmarks/divergence.py --gb 4              # three synthetic bf16 checkpoints of 4 GB each; two minutes
    python benchmarks/divergence.py --gb 0.5 --scratch /some/folder

Goals: under 6 GB of anonymous memory (RssAnon; mapped pages do not count), and at least a quarter of a warm `cat` or
half of a cold one (the files' own pages are dropped first; needs no root). `cat` runs just before each comparison.
CPU seconds stand beside wall seconds, since a loaded machine slows both. The files are deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import torch

from probes.divergence import weight_divergence
from vlm4vla_core import folders

RESULT = Path(__file__).parent / "results" / "divergence.json"
ROWS, WIDTH = 8192, 4096  # one bf16 matrix of 64 MiB


def make(path: Path, matrices: int, seed: int) -> None:
    """A checkpoint of equal matrices: that of seed 0, moved a little by others. Written a matrix at a time."""
    value = torch.empty(ROWS, WIDTH).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    if seed:
        value += torch.empty(ROWS, WIDTH).normal_(0, 0.001, generator=torch.Generator().manual_seed(seed))
    data = value.bfloat16().view(torch.uint8).numpy().tobytes()
    header = json.dumps(
        {
            f"layers.{layer}.mlp.weight": {
                "dtype": "BF16", "shape": [ROWS, WIDTH], "data_offsets": [layer * len(data), (layer + 1) * len(data)]
            }
            for layer in range(matrices)
        }
    ).encode()  # fmt: skip
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _ in range(matrices):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


def timed(work, *, children: bool = False) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, before = time.perf_counter(), os.times()
    work()
    after = os.times()
    cpu = after.user + after.system - before.user - before.system
    if children:
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - wall, cpu


def anonymous() -> float:
    """Anonymous memory of this process, MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


class Peak(threading.Thread):
    """The greatest anonymous memory while it runs, sampled every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.value, self.stop = anonymous(), threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.02):
            self.value = max(self.value, anonymous())


def forget(paths: list[Path]) -> None:
    """Drop these files' pages from the cache."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(paths: list[Path], size: float, *, cold: bool) -> dict[str, float | str]:
    """One `cat` and one comparison after it."""

    def cat() -> None:
        for path in paths:
            subprocess.run(["cat", str(path)], stdout=subprocess.DEVNULL, check=True, timeout=3600)

    if cold:
        forget(paths)
    plain = timed(cat, children=True)
    if cold:
        forget(paths)
    start, peak = anonymous(), Peak()
    peak.start()
    ours = timed(lambda: weight_divergence(*paths))
    peak.stop.set()
    peak.join(timeout=5)
    row: dict[str, float | str] = {
        "cache": "cold" if cold else "warm", "of_cat": plain[0] / ours[0], "gb_per_s": size / ours[0],
        "cat_gb_per_s": size / plain[0], "gb_per_cpu_s": size / ours[1], "wall_s": ours[0], "cpu_s": ours[1],
        "cat_wall_s": plain[0], "cat_cpu_s": plain[1], "peak_anonymous_mb": peak.value, "start_anonymous_mb": start,
    }  # fmt: skip
    print("  " + ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else v for k, v in row.items()), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=4.0, help="of each of the three checkpoints")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the checkpoints")
    parser.add_argument("--repeats", type=int, default=3, help="of each, warm and cold")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    folder, load, rows = Path(tempfile.mkdtemp(dir=args.scratch)), os.getloadavg()[0], []
    try:
        paths = [folder / f"{name}.safetensors" for name in "bac"]
        print(f"writing three checkpoints of {args.gb} GB to {folder}", flush=True)
        for seed, path in enumerate(paths):
            make(path, max(1, round(args.gb * 1e9 / (2 * ROWS * WIDTH))), seed)
        size = sum(path.stat().st_size for path in paths) / 1e9
        for cold in (True, False):  # the cold ones warm the cache
            print(f"{'cold' if cold else 'warm'}: cat, then the comparison", flush=True)
            rows += [measured(paths, size, cold=cold) for _ in range(args.repeats)]
    finally:
        shutil.rmtree(folder)
    medians = {
        cache: sorted(float(row["of_cat"]) for row in rows if row["cache"] == cache)[args.repeats // 2]
        for cache in ("cold", "warm")
    }
    most = max(float(row["peak_anonymous_mb"]) for row in rows)
    result = {
        "command": f"python benchmarks/divergence.py --gb {args.gb:g}", "gb": size,
        "median_of_cat": medians, "goal_of_cat": "0.5 of a cold one or 0.25 of a warm one",
        "goal_of_cat_met": medians["cold"] >= 0.5 or medians["warm"] >= 0.25,
        "peak_anonymous_mb": most, "goal_peak_anonymous_mb": 6000, "goal_memory_met": most < 6000, "rows": rows,
        "load_before": load, "threads": torch.get_num_threads(), "made_by": folders.provenance(),
        "note": "cat ran just before each comparison, in the same run and on the same machine",
    }  # fmt: skip
    folders.write_json(args.out, result)
    print(
        f"of cat: cold {medians['cold']:.2f} (goal 0.5), warm {medians['warm']:.2f} (goal 0.25); load before {load:.1f}"
    )


if __name__ == "__main__":
    main()
