"""Small LeRobot data sets written in the exact layouts of v2.0, v2.1 and v3.0, independent of the reader under test.

Every frame is one grey level, so that a frame says which one it is: `grey(episode, step)`.
"""

from __future__ import annotations

import io
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS, SIZE = 10, 32
AV1 = next(name for name in ("libsvtav1", "libaom-av1") if name in av.codecs_available)  # PyAV's wheels differ
NAMES = ["x", "y", "gripper"]


def grey(episode: int, step: int) -> int:
    return 20 + (60 * episode + 7 * step) % 216


def video(path: Path, levels: list[int], *, codec: str = "libx264", gop: int = 250, fps: int = FPS) -> Path:
    """An mp4 of frames of these grey levels. codec: as FFmpeg names its encoder; gop: frames per keyframe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            codec, rate=fps, options={"g": str(gop), "crf": "1"} if codec == "libx264" else {}
        )
        stream.width = stream.height = SIZE
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, 1000)
        for step, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(np.full((SIZE, SIZE, 3), level, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(1000 * step / fps), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers(episode: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Action (T, 3) and state (T, 2) of an episode, float64."""
    rng = np.random.default_rng(episode)
    return rng.normal(size=(steps, 3)), rng.normal(size=(steps, 2))


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (level,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def table(episode: int, steps: int, *, start: int = 0, **change: Any) -> pa.Table:
    """The rows of an episode; change replaces columns, None drops one."""
    action, state = numbers(episode, steps)
    columns: dict[str, Any] = {
        "action": list(action.astype(np.float32)), "observation.state": list(state.astype(np.float32)),
        "timestamp": np.arange(steps, dtype=np.float32) / np.float32(FPS), "frame_index": np.arange(steps),
        "episode_index": np.full(steps, episode), "index": start + np.arange(steps),
        "task_index": np.full(steps, episode % 2),
    }  # fmt: skip
    return pa.table({key: value for key, value in (columns | change).items() if value is not None})


def info(version: str, lengths: list[int], **change: Any) -> dict[str, Any]:
    camera = {"dtype": "video", "shape": [SIZE, SIZE, 3], "names": ["height", "width", "channel"]}
    features = {
        "action": {"dtype": "float32", "shape": [3], "names": NAMES},
        "observation.state": {"dtype": "float32", "shape": [2], "names": {"motors": ["a", "b"]}},
        "observation.images.top": camera,
        **{
            key: {"dtype": "int64", "shape": [1], "names": None} for key in ("timestamp", "episode_index", "task_index")
        },
    }
    told: dict[str, Any] = {
        "codebase_version": version, "robot_type": "made up", "total_episodes": len(lengths),
        "total_frames": sum(lengths), "total_tasks": 2, "total_videos": 99, "chunks_size": 1000, "fps": FPS,
        "splits": {"train": f"0:{len(lengths)}"}, "features": features,
    }  # fmt: skip
    if version.startswith("v2"):
        told["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        told["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    else:
        told["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        told["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    return told | change


def write_v2(folder: Path, lengths: list[int], *, version: str = "v2.1", codec: str = "libx264", **change: Any) -> Path:
    """change: of info.json, or "columns": changes of every table."""
    columns = change.pop("columns", {})
    meta = folder / "meta"
    meta.mkdir(parents=True, exist_ok=True)
    (meta / "info.json").write_text(json.dumps(info(version, lengths, **change)))
    rows = [{"episode_index": e, "tasks": [f"do {e % 2}"], "length": steps} for e, steps in enumerate(lengths)]
    (meta / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = "".join(json.dumps({"task_index": index, "task": f"do {index}"}) + "\n" for index in range(2))
    (meta / "tasks.jsonl").write_text(tasks)
    for episode, steps in enumerate(lengths):
        path = folder / f"data/chunk-000/episode_{episode:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table(episode, steps, start=sum(lengths[:episode]), **columns), path)
        levels = [grey(episode, step) for step in range(steps)]
        video(folder / f"videos/chunk-000/observation.images.top/episode_{episode:06d}.mp4", levels, codec=codec)
    return folder


def write_v3(folder: Path, lengths: list[int], *, codec: str = "libx264", **change: Any) -> Path:
    """All episodes in one table and one video."""
    meta = folder / "meta"
    (meta / "episodes/chunk-000").mkdir(parents=True, exist_ok=True)
    (meta / "info.json").write_text(json.dumps(info("v3.0", lengths, **change)))
    tasks = pa.table({"task_index": [0, 1], "__index_level_0__": ["do 0", "do 1"]})
    pq.write_table(tasks, meta / "tasks.parquet")
    ends = [0, *np.cumsum(lengths).tolist()]
    video_of = "videos/observation.images.top/"
    count = len(lengths)
    listed = {
        "episode_index": list(range(count)), "length": lengths, "tasks": [[f"do {e % 2}"] for e in range(count)],
        "data/chunk_index": [0] * count, "data/file_index": [0] * count,
        "dataset_from_index": ends[:-1], "dataset_to_index": ends[1:],
        f"{video_of}chunk_index": [0] * count, f"{video_of}file_index": [0] * count,
        f"{video_of}from_timestamp": [end / FPS for end in ends[:-1]],
        f"{video_of}to_timestamp": [end / FPS for end in ends[1:]],
    }  # fmt: skip
    pq.write_table(pa.table(listed), meta / "episodes/chunk-000/file-000.parquet")
    path = folder / "data/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    tables = [table(episode, steps, start=ends[episode]) for episode, steps in enumerate(lengths)]
    pq.write_table(pa.concat_tables(tables), path)
    levels = [grey(episode, step) for episode, steps in enumerate(lengths) for step in range(steps)]
    video(folder / f"{video_of}chunk-000/file-000.mp4", levels, codec=codec)
    return folder
