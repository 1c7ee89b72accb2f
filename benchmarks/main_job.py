"""How long the main job takes and how much memory it holds: installation, first `make report`, second one.

Run in a fresh clone:  python3 benchmarks/main_job.py [--out benchmarks/results/main_job.json]
Needs nothing but the standard library, since it runs before anything is installed. Linux only: memory is read from
/proc (resident pages of all processes below make, sampled five times a second, so that processes side by side add up).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(root: int) -> int:
    """Bytes resident in process `root` and everything below it (shared pages count in each process)."""
    children: dict[int, list[int]] = {}
    pages: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            pages[int(entry.name)] = int((entry / "statm").read_text().split()[1])
        except (OSError, IndexError):
            continue  # the process ended meanwhile
        children.setdefault(int(fields[1]), []).append(int(entry.name))
    total, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        total += pages.get(process, 0)
        waiting += children.get(process, [])
    return total * PAGE


def measure(words: list[str]) -> dict[str, float]:
    """Run one command in the project; seconds and peak resident gigabytes. Exits when the command fails."""
    began, peak, done = time.perf_counter(), 0, threading.Event()
    process = subprocess.Popen(words, cwd=ROOT)

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.2):
            peak = max(peak, resident(process.pid))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    code = process.wait()
    done.set()
    watcher.join()
    if code:
        sys.exit(f"{' '.join(words)} failed with exit code {code}")
    return {"seconds": round(time.perf_counter() - began, 1), "peak_gb": round(peak / 1e9, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/main_job.json")
    out = parser.parse_args().out
    if (ROOT / "runs").exists():
        sys.exit("runs/ is there already: measure in a fresh clone, or remove it")
    result = {
        "install": measure(["make", "install"]),
        "first make report": measure(["make", "report"]),
        "second make report, nothing changed": measure(["make", "report"]),
    }
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    result["made_by"] = {
        "command": "python3 benchmarks/main_job.py",
        "commit": commit,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
