"""How fast three checkpoints are compared, beside `cat` of the same files, and in how much anonymous memory.

    python benchmarks/divergence.py --gb 4              # three synthetic bf16 checkpoints of 4 GB each
    python benchmarks/divergence.py --gb 0.25 --scratch /some/folder

Goals: under 6 GB of anonymous memory (RssAnon; mapped pages do not count), and at least a quarter of a warm `cat`, or
half of a cold one (--cold: drops the page cache, needs root). Both are run in this process's run, one after the other.
CPU seconds stand beside wall seconds, since a loaded machine slows both.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from probes.divergence import weight_divergence
from vlm4vla_core import folders

RESULT = Path(__file__).parent / "results" / "divergence.json"
ROWS, WIDTH = 8192, 4096  # one bf16 matrix of 64 MiB


def make(path: Path, matrices: int, seed: int) -> None:
    """A checkpoint of equal matrices: those of seed 0, moved a little by others."""
    drawn = torch.Generator().manual_seed(seed)
    base = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(matrices):
        value = torch.empty(ROWS, WIDTH).normal_(0, 0.02, generator=base)
        if seed:
            value += torch.empty(ROWS, WIDTH).normal_(0, 0.001, generator=drawn)
        tensors[f"layers.{layer}.mlp.weight"] = value.bfloat16()
    save_file(tensors, path)


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


def cold() -> None:
    """Drop the page cache (needs root)."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=4.0, help="of each of the three checkpoints")
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.scratch))
    try:
        paths = [folder / f"{name}.safetensors" for name in "bac"]
        for seed, path in enumerate(paths):
            make(path, max(1, round(args.gb * 1e9 / (2 * ROWS * WIDTH))), seed)
        size = sum(path.stat().st_size for path in paths) / 1e9
        rows = []

        def cat() -> None:
            for path in paths:
                subprocess.run(["cat", str(path)], stdout=subprocess.DEVNULL, check=True, timeout=3600)

        cat()  # warm
        for _ in range(args.repeats):
            if args.cold:
                cold()
            plain = timed(cat, children=True)
            if args.cold:
                cold()
            start, peak = anonymous(), Peak()
            peak.start()
            ours = timed(lambda: weight_divergence(*paths))
            peak.stop.set()
            peak.join(timeout=5)
            rows.append(
                {"cat_wall_s": plain[0], "cat_cpu_s": plain[1], "wall_s": ours[0], "cpu_s": ours[1],
                 "gb_per_s": size / ours[0], "gb_per_cpu_s": size / ours[1], "of_cat": plain[0] / ours[0],
                 "peak_anonymous_mb": peak.value, "start_anonymous_mb": start}
            )  # fmt: skip
            print({key: round(value, 3) for key, value in rows[-1].items()}, flush=True)
    finally:
        shutil.rmtree(folder)
    middle = sorted(rows, key=lambda row: row["of_cat"])[len(rows) // 2]
    goal = 0.5 if args.cold else 0.25
    result = {
        "command": f"python benchmarks/divergence.py --gb {args.gb}" + " --cold" * args.cold,
        "gb": size, "cache": "cold" if args.cold else "warm", "rows": rows, "goal_of_cat": goal,
        "goal_of_cat_met": middle["of_cat"] >= goal, "goal_peak_anonymous_mb": 6000,
        "goal_memory_met": max(row["peak_anonymous_mb"] for row in rows) < 6000,
        "load": os.getloadavg()[0], "threads": torch.get_num_threads(), "made_by": folders.provenance(),
        "note": "cat ran just before the comparison, in the same run and on the same machine",
    }  # fmt: skip
    folders.write_json(args.out, result)
    print(
        f"median: {middle['of_cat']:.2f} of cat, goal {goal}; {middle['gb_per_s']:.2f} GB/s; load {result['load']:.1f}"
    )


if __name__ == "__main__":
    main()
