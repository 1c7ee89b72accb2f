"""Peak memory of every reader of robot data at 1x and 10x the data: it has to stay flat.

Writes made-up data sets in each format's own layout (1x: 10 episodes, 10x: 100, in one tfrecord, one video or one
folder as the format allows), reads every frame of each in a fresh process, and takes that process's peak of memory of
its own (RssAnon, looked at after every episode) and of resident memory (VmHWM), which also counts pages of mapped
files: the kernel's cache, given back when memory is short. What importing and opening take is told apart.
Prints a table and writes benchmarks/results/reader_memory.json.

Run: .venv/bin/python benchmarks/reader_memory.py
"""

from __future__ import annotations

import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "core"))
EPISODES, STEPS, SIZE = 10, 40, 128

READ = """
import re, sys, time
from pathlib import Path
from vlm4vla_core.episodes.formats import open_source
def now(key): return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
source = open_source(sys.argv[1], sys.argv[2])
opened, own, began, frames = now("RssAnon"), 0, time.process_time(), 0
for unit in source.units(source.splits):
    for episode in source.episodes(unit, source.cameras, source.transforms[0]):
        frames += sum(1 for shown in episode.images.values() for _ in shown)
        own = max(own, now("RssAnon"))
print(opened, own, now("VmHWM"), frames, time.process_time() - began)
"""


def jpegs(seed: int) -> list[bytes]:
    import numpy as np

    from vlm4vla_core import images

    rng = np.random.default_rng(seed)
    return [images.encode(rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8)) for _ in range(STEPS)]


def rlds(folder: Path, episodes: int) -> None:
    import tfds_bytes

    from vlm4vla_core.episodes.tfrecord import masked_crc

    def record(data: bytes) -> bytes:  # the bit-by-bit checksum of the tests' own writer takes minutes here
        length = struct.pack("<Q", len(data))
        return length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data))

    tfds_bytes.record = record
    shown = [jpegs(seed) for seed in range(3)]
    made = [tfds_bytes.bridge_episode(i, steps=STEPS, image_0=shown[i % 3], image_1=shown[1]) for i in range(episodes)]
    tfds_bytes.write_tfds(folder, {"train": [made]})


def calvin(folder: Path, episodes: int) -> None:
    import numpy as np

    part = folder / "training"
    (part / "lang_annotations").mkdir(parents=True)
    rng = np.random.default_rng(0)
    frame: dict[str, Any] = {"rel_actions": rng.uniform(-1, 1, 7), "robot_obs": rng.normal(size=15)}
    frame |= {"rgb_static": rng.integers(0, 255, (200, 200, 3), np.uint8)}
    frame |= {"rgb_gripper": rng.integers(0, 255, (84, 84, 3), np.uint8)}
    np.savez_compressed(part / "first.npz", **frame)
    for index in range(episodes * STEPS):
        (part / f"episode_{index:07d}.npz").hardlink_to(part / "first.npz")
    spans = [(i * STEPS, (i + 1) * STEPS - 1) for i in range(episodes)]
    language = {"ann": ["do it"] * episodes, "task": ["it"] * episodes, "emb": np.zeros((episodes, 1, 384), np.float32)}
    told: Any = {"language": language, "info": {"episodes": [], "indx": spans}}
    np.save(part / "lang_annotations" / "auto_lang_ann.npy", told)


def libero(folder: Path, episodes: int) -> None:
    from test_reader_libero import write_libero

    write_libero(folder / "task_demo.hdf5", [STEPS] * episodes, size=SIZE)


def lerobot(folder: Path, episodes: int) -> None:
    import lerobot_files

    lerobot_files.SIZE = SIZE
    lerobot_files.write_v3(folder, [STEPS] * episodes)


def store(folder: Path, episodes: int) -> None:
    from test_reader_store import make

    make(folder / "s", list(range(episodes)), steps=STEPS, size=SIZE)


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "rlds": rlds, "calvin": calvin, "libero": libero, "lerobot": lerobot, "store": store,
}  # fmt: skip


def measure(name: str, episodes: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        WRITERS[name](Path(folder), episodes)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e6
        done = subprocess.run(
            [sys.executable, "-c", READ, name, folder], capture_output=True, text=True, timeout=300, check=True
        )
        names = ("opened_own_mib", "peak_own_mib", "peak_resident_mib", "frames", "cpu_s")
        return {"data_mb": size, **dict(zip(names, map(float, done.stdout.split()), strict=True))}


def main() -> None:
    from vlm4vla_core import folders

    results: dict[str, Any] = {}
    print(f"{'format':8}{'data':>10}{'opened':>12}{'own peak':>12}{'resident':>12}{'frames/cpu-s':>14}")
    for name in WRITERS:
        results[name] = {"1x": measure(name, EPISODES), "10x": measure(name, 10 * EPISODES)}
        for one in results[name].values():
            memory = "".join(f"{one[key]:8.0f} MiB" for key in ("opened_own_mib", "peak_own_mib", "peak_resident_mib"))
            print(f"{name:8}{one['data_mb']:7.1f} MB{memory}{one['frames'] / one['cpu_s']:14.0f}")
    how = f"{STEPS} steps per episode, {EPISODES} and {10 * EPISODES} episodes, {SIZE} px (CALVIN 200 and 84 px)"
    folders.write_json(
        ROOT / "benchmarks" / "results" / "reader_memory.json",
        {
            "command": "python benchmarks/reader_memory.py",
            "how": f"{how}; memory of a fresh process that reads every frame; the machine was shared with others",
            "results": results,
            "made_by": folders.provenance(),
        },
    )


if __name__ == "__main__":
    main()
