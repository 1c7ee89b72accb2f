"""Speed and memory of the episode store beside its alternatives, all in one run, in CPU time of one process.

Run:  VLM4VLA_SAMPLES=FOLDER python benchmarks/episodes.py [RESULT.json]
Pictures are real (a robot's camera, 640x480, from the LeRobot sample; two real CALVIN frames). CPU time per item is
what one free core gives; other work on the machine still costs caches, so ratios within the run say more than rates.
Every measurement is the best of several rounds, alternatives taking turns.
"""

from __future__ import annotations

import json
import os
import platform
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "core"))

import numpy as np  # noqa: E402
import simplejpeg  # noqa: E402
import tfds_bytes  # noqa: E402

from vlm4vla_core import folders, images  # noqa: E402
from vlm4vla_core.cli import main as vlm4vla  # noqa: E402
from vlm4vla_core.episodes import frames as codec  # noqa: E402
from vlm4vla_core.episodes.sampling import action_chunks  # noqa: E402
from vlm4vla_core.episodes.store import EpisodeStore  # noqa: E402
from vlm4vla_core.episodes.tfrecord import masked_crc, parse_example, read_records  # noqa: E402

STEPS, EPISODES, FILES, CHUNK = 40, 60, 4, 10
BRIDGE_FRAMES = 2_135_463  # transitions of bridge_orig, see docs/episodes.md
ROUNDS = 3


def best(work: dict[str, Callable[[], int]], rounds: int = ROUNDS) -> dict[str, float]:
    """Items per CPU second of each kind of work; each returns how many items it did."""
    rates: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            began = time.process_time()
            items = run()
            rates[name].append(items / (time.process_time() - began))
    return {name: max(found) for name, found in rates.items()}


# --- data -----------------------------------------------------------------------------------------------


def camera_frames(samples: Path, count: int) -> np.ndarray:
    """(count, 480, 640, 3) real pictures, repeated when the sample has fewer."""
    import av

    found: list[np.ndarray] = []
    for path in sorted((samples / "lerobot_v21_unitree_g1").rglob("*.mp4")):
        with av.open(str(path)) as video:
            found += [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)][::2]
        if len(found) >= count:
            break
    return np.stack((found * -(-count // len(found)))[:count])


def write_tfds(folder: Path, jpegs: list[bytes], files: int) -> Path:
    """Bridge's layout: `files` tfrecords of EPISODES / FILES episodes of STEPS steps with one 256 px camera."""

    def record(data: bytes) -> bytes:
        length = struct.pack("<Q", len(data))
        return length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data))

    tfds_bytes.write_tfds(folder, {"train": [[] for _ in range(files)]})
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = [str(EPISODES // FILES)] * files
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for index, path in enumerate(sorted(folder.glob("*.tfrecord-*"))):
        records = []
        for number in range(EPISODES // FILES):
            seed = index * EPISODES // FILES + number
            start = (seed * STEPS) % (len(jpegs) - STEPS + 1)
            shown = jpegs[start : start + STEPS]
            episode = tfds_bytes.bridge_episode(seed, STEPS, image_0=shown, image_1=None)
            records.append(record(tfds_bytes.example(episode)))
        path.write_bytes(b"".join(records))
    description = json.loads((folder / "features.json").read_text())
    observation = description["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"][
        "observation"
    ]["featuresDict"]["features"]
    del observation["image_1"]
    observation["image_0"]["image"]["shape"] = tfds_bytes.shape(256, 256, 3)
    (folder / "features.json").write_text(json.dumps(description))
    return folder


def write_calvin(folder: Path, samples: Path, count: int) -> list[Path]:
    """`count` time steps in CALVIN's layout (all ten keys, compressed), from two real frames shifted sideways."""
    real = [dict(np.load(path)) for path in sorted((samples / "calvin_npz").glob("*.npz"))]
    paths = []
    for step in range(count):
        values = dict(real[step % len(real)])
        for key in ("rgb_static", "rgb_gripper", "depth_static", "depth_gripper"):
            values[key] = np.roll(values[key], step, axis=1)
        paths.append(folder / f"episode_{step:07d}.npz")
        np.savez_compressed(paths[-1], **values)
    return paths


def write_video(path: Path, pictures: np.ndarray, name: str, **options: str) -> Path:
    import av

    with av.open(str(path), "w") as video:
        stream = video.add_stream(name, rate=Fraction(30), options=dict(options))
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            video.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        video.mux(stream.encode())
    return path


# --- what is measured -----------------------------------------------------------------------------------


def conversion(source: Path, room: Path) -> dict[str, Any]:
    """CPU seconds per frame of `vlm4vla convert`, from 256 to 224 px, split into what it is made of."""
    rates = []
    for attempt in range(ROUNDS):
        began = time.process_time()
        vlm4vla(
            ["convert", "rlds", str(source), "--out", str(room / f"store{attempt}"), "--size", "224", "--workers", "1"]
        )
        rates.append(EPISODES * (STEPS - 2) / (time.process_time() - began))
    vlm4vla(["convert", "rlds", str(source), "--out", str(room / "two"), "--size", "224", "--workers", "2"])
    fingerprints = {EpisodeStore.open(room / name).fingerprint for name in ("store0", "store1", "two")}
    jpegs = [data for path in sorted(source.glob("*.tfrecord-*"))[:1] for data in _images(path)][:400]
    decoded = [images.decode(data) for data in jpegs]
    small = [images.resize(picture[None], 224)[0] for picture in decoded]
    parts = best({
        "decode 256 px": lambda: len([images.decode(data) for data in jpegs]),
        "resize to 224 px": lambda: len([images.resize(picture[None], 224) for picture in decoded]),
        "encode 224 px": lambda: len([images.encode(picture) for picture in small]),
    })  # fmt: skip
    files = sorted(source.glob("*.tfrecord-*"))
    hashing = best({"frames": lambda: EPISODES * STEPS if [folders.file_fingerprint(path) for path in files] else 0})
    together = 1 / sum(1 / rate for rate in parts.values())
    return {
        "frames_per_cpu_s": max(rates),
        "parts_per_cpu_s": parts,
        "share of what decode, resize and encode alone allow": max(rates) / together,
        "share of the time for the SHA-256 of the source": max(rates) / hashing["frames"],
        "same_bytes_for_1_and_2_workers": len(fingerprints) == 1,
    }


def _images(path: Path) -> list[bytes]:
    found: list[bytes] = []
    for record in read_records(path):
        found += parse_example(record)["steps/observation/image_0"]  # type: ignore[arg-type]
    return found


def parsing(source: Path) -> dict[str, float]:
    """Own tfrecord parser with both checksums, beside decoding the same images."""
    paths = sorted(source.glob("*.tfrecord-*"))
    jpegs = [data for path in paths for data in _images(path)]
    rates = best({
        "parse": lambda: sum(len(_images(path)) for path in paths),
        "decode": lambda: len([simplejpeg.decode_jpeg(data) for data in jpegs]),
    })  # fmt: skip
    return {**{f"{name}_per_cpu_s": rate for name, rate in rates.items()}, "share": rates["decode"] / rates["parse"]}


def against_bare(store: EpisodeStore, camera: str, rng: np.random.Generator) -> dict[str, Any]:
    """The store beside bare decoding of the same bytes, in many short turns: microseconds and ratios, medians."""
    draws = [rng.integers(0, len(store), 96) for _ in range(60)]
    bytes_of = [[store.jpeg(camera, row) for row in rows] for rows in draws]

    def chunks(rows: np.ndarray) -> None:
        action_chunks(store.action, store.episode_of, rows, CHUNK)

    def bare(rows: np.ndarray, data: list[bytes]) -> None:
        for item in data:
            simplejpeg.decode_jpeg(item)

    def single(rows: np.ndarray, data: list[bytes]) -> None:
        for row in rows:
            store.images(camera, [row])
            store.action[row : row + CHUNK]

    def padded(rows: np.ndarray, data: list[bytes]) -> None:
        for row in rows[:, None]:
            store.images(camera, row)
            chunks(row)

    def batches(rows: np.ndarray, data: list[bytes]) -> None:
        for batch in np.split(rows, 3):
            store.images(camera, batch)
            chunks(batch)

    def bare_batches(rows: np.ndarray, data: list[bytes]) -> None:
        for start in range(0, 96, 32):
            np.stack([simplejpeg.decode_jpeg(item) for item in data[start : start + 32]])

    work = {
        "bare simplejpeg, each picture thrown away": bare,
        "store, one picture and a slice of actions": single,
        "store, one picture and a padded, masked chunk": padded,
        "store, batches of 32 with chunks, as training draws them": batches,
        "bare simplejpeg, stacked to batches of 32": bare_batches,
    }
    spent: dict[str, list[float]] = {name: [] for name in work}
    for rows, data in zip(draws, bytes_of, strict=True):
        for name, run in work.items():
            began = time.process_time()
            run(rows, data)
            spent[name].append((time.process_time() - began) / 96 * 1e6)
    first = np.array(spent["bare simplejpeg, each picture thrown away"])
    return {
        name: {"us_per_sample": float(np.median(times)), "of_bare": float(np.median(first / np.array(times)))}
        for name, times in spent.items()
    }


def access(store: EpisodeStore, raw: EpisodeStore, samples: Path, pictures: np.ndarray, room: Path) -> dict[str, Any]:
    """Training samples per CPU second: one random picture of 224 px and the next CHUNK actions."""
    import av

    rng = np.random.default_rng(0)
    (camera,) = store.cameras
    rows = rng.integers(0, len(store), 800)
    beside = against_bare(store, camera, rng)

    def from_store(opened: EpisodeStore) -> int:
        for batch in np.split(rows, 25):
            opened.images(camera, batch)
            action_chunks(opened.action, opened.episode_of, batch, CHUNK)
        return len(rows)

    steps = write_calvin(room, samples, 60)

    def calvin() -> int:
        starts = rng.integers(0, len(steps) - CHUNK - 1, 6)
        for start in starts:
            for path in steps[start : start + CHUNK + 1]:
                with np.load(path) as step:
                    for key in ("rgb_static", "rgb_gripper", "rel_actions", "robot_obs", "scene_obs"):
                        step[key]
        return len(starts)

    def video(path: Path, resize: bool, count: int) -> Callable[[], int]:
        container = av.open(str(path))
        stream = container.streams.video[0]
        times = [packet.pts for packet in container.demux(stream) if packet.pts is not None]

        def run() -> int:
            for wanted in rng.choice(times, count):
                container.seek(int(wanted), stream=stream)
                frame = next(frame for frame in container.decode(stream) if frame.pts >= wanted)
                picture = frame.to_ndarray(format="rgb24")
                if resize:
                    images.resize(picture[None], 224)
            return count

        return run

    small = images.resize(pictures[:500], 224)
    h264 = write_video(room / "h264.mp4", small, "libx264")
    real = next((samples / "lerobot_v30_unitree_g1").rglob("*.mp4"))
    work = {
        "episode store": lambda: from_store(store),
        "episode store, raw": lambda: from_store(raw),
        "CALVIN npz as the paper reads it (11 files, 5 keys)": calvin,
        "LeRobot h264 224 px, encoder's default GOP of 250": video(h264, False, 10),
        "LeRobot AV1 640x480, recorder's default GOP of 2 (real sample)": video(real, False, 40),
        "the same, resized to 224 px": video(real, True, 40),
    }
    if "libsvtav1" in av.codecs_available:
        av1 = write_video(room / "av1.mp4", small, "libsvtav1", g="2", preset="12")
        work["LeRobot AV1 224 px, recorder's default GOP of 2"] = video(av1, False, 60)
    rates = best(work)
    mine = rates["episode store"]
    return {
        "samples_per_cpu_s": rates,
        "store_against": {name: mine / rate for name, rate in rates.items() if not name.startswith("episode store")},
        "beside bare decoding": beside,
    }


def memory(source: Path, tenfold: Path, room: Path) -> dict[str, float]:
    """Peak resident megabytes of a conversion, and of reading alone, with 1x and 10x the data."""
    reading = (
        "import sys, pathlib; from vlm4vla_core.episodes.formats import open_source\n"
        "source = open_source('rlds', pathlib.Path(sys.argv[1]))\n"
        "for unit in source.units(('train',)):\n"
        "    for _ in source.episodes(unit, source.cameras, 'bridge_orig'): pass\n"
    )
    converting = (
        "import sys; from vlm4vla_core.cli import main\n"
        "main(['convert', 'rlds', sys.argv[1], '--out', sys.argv[2], '--size', '224', '--workers', '1'])\n"
    )
    told = "print('peak', next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    peaks = {}
    for what, code in (("reading", reading), ("converting", converting)):
        for size, folder in (("1x", source), ("10x", tenfold)):
            done = subprocess.run(
                [sys.executable, "-c", code + told, str(folder), str(room / f"memory-{size}")],
                capture_output=True, text=True, check=True, cwd=ROOT,
            )  # fmt: skip
            peaks[f"{what} {size}"] = int(done.stdout.rpartition("peak")[2]) / 1024
    return peaks


def lossless(samples: Path) -> dict[str, dict[str, float]]:
    """Bytes and milliseconds per frame of ways to keep a real CALVIN depth image of 16 bits without loss."""
    import io

    import pyarrow as pa
    from PIL import Image

    path = next((samples / "calvin_npz").glob("*.npz"))
    depth = np.round(np.load(path)["depth_static"] * 1000).astype(np.uint16)

    def png() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(depth).save(buffer, "PNG", compress_level=3)
        return buffer.getvalue()

    lz4, zstd = pa.Codec("lz4"), pa.Codec("zstd", compression_level=1)
    ways: dict[str, tuple[Callable[[], bytes], Callable[[bytes], Any]]] = {
        "differences + zstd 1 (ours)": (
            lambda: codec.pack(depth),
            lambda data: codec.unpack(data, np.uint16, depth.shape),
        ),
        "zstd 1": (lambda: zstd.compress(depth, asbytes=True), lambda data: zstd.decompress(data, depth.nbytes)),
        "lz4": (lambda: lz4.compress(depth, asbytes=True), lambda data: lz4.decompress(data, depth.nbytes)),
        "zlib 1": (lambda: zlib.compress(depth.tobytes(), 1), zlib.decompress),
        "PNG": (png, lambda data: np.asarray(Image.open(io.BytesIO(data)))),
    }
    out = {}
    for name, (pack, unpack) in ways.items():
        data = pack()
        turns = {"in": partial(_times, 20, pack), "out": partial(_times, 20, partial(unpack, data))}
        rates = best(turns)
        out[name] = {"bytes": len(data), "pack_ms": 1000 / rates["in"], "unpack_ms": 1000 / rates["out"]}
    return out


def _times(count: int, work: Callable[[], Any]) -> int:
    for _ in range(count):
        work()
    return count


def main() -> None:
    samples = Path(os.environ["VLM4VLA_SAMPLES"])
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks" / "results" / "episodes.json"
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        pictures = camera_frames(samples, 700)
        jpegs = [images.encode(picture) for picture in images.resize(pictures, 256)]
        source = write_tfds(room / "bench" / "1.0.0", jpegs, FILES)
        tenfold = write_tfds(room / "tenfold" / "1.0.0", jpegs, 10 * FILES)
        result: dict[str, Any] = {"conversion, 256 to 224 px": conversion(source, room)}
        store = EpisodeStore.open(room / "store0")
        vlm4vla(["convert", "store", str(room / "store0"), "--out", str(room / "raw"), "--encoding", "raw"])
        result["tfrecord parsing against decoding"] = parsing(source)
        result["random access"] = access(store, EpisodeStore.open(room / "raw"), samples, pictures, room)
        result["peak memory, MB"] = memory(source, tenfold, room)
        result["lossless depth"] = lossless(samples)
        per_frame = sum(path.stat().st_size for path in store.path.iterdir()) / len(store)
        rate = result["conversion, 256 to 224 px"]["frames_per_cpu_s"]
        result["Bridge, one camera at 224 px, computed"] = {
            "frames": BRIDGE_FRAMES,
            "kB_per_frame": per_frame / 1000,
            "GB": BRIDGE_FRAMES * per_frame / 1e9,
            "core_hours": BRIDGE_FRAMES / rate / 3600,
        }
    result["made_by"] = {
        "command": "python benchmarks/episodes.py",
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("simplejpeg", "pillow", "pyarrow", "av", "numpy")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end",
        "method": "CPU time of one process per item, best of 3 rounds, alternatives in turn, warm page cache",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
