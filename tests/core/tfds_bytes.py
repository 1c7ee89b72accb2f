"""Hand-built TFRecord and tf.train.Example bytes, independent of the reader under test (own CRC, own encoder)."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def crc32c(data: bytes) -> int:
    """CRC-32C bit by bit (reflected polynomial 0x82F63B78)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def varint(value: int) -> bytes:
    value %= 2**64
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(value: Any, packed: bool = True) -> bytes:
    """A Feature from a list of bytes, a float array or an int array."""
    if isinstance(value, list):
        return field(1, b"".join(field(1, item) for item in value))
    value = np.asarray(value)
    if value.dtype.kind == "f":
        pieces, kind, tag = [struct.pack("<f", number) for number in value.ravel()], 2, b"\x0d"
    else:
        pieces, kind, tag = [varint(int(number)) for number in value.ravel()], 3, b"\x08"
    return field(kind, field(1, b"".join(pieces)) if packed else b"".join(tag + piece for piece in pieces))


def example(features: dict[str, Any], packed: bool = True) -> bytes:
    entries = [field(1, key.encode()) + field(2, feature(value, packed)) for key, value in features.items()]
    return field(1, b"".join(field(1, entry) for entry in entries))


def jpeg(value: int, size: int = 8) -> bytes:
    """A small JPEG of one grey level, encoded by Pillow."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def bridge_episode(seed: int, steps: int = 4, **change: Any) -> dict[str, Any]:
    """Features of one episode in Bridge's layout; `change` replaces keys (last part of the name), None drops one."""
    rng = np.random.default_rng(seed)
    action = rng.normal(0, 0.02, (steps, 7)).astype(np.float32)
    action[:, 6] = rng.integers(0, 2, steps)
    action[0] = 0
    features: dict[str, Any] = {
        "steps/action": action,
        "steps/observation/state": rng.normal(0, 0.3, (steps, 7)).astype(np.float32),
        "steps/observation/image_0": [jpeg(20 + (37 * seed + 11 * step) % 200) for step in range(steps)],
        "steps/observation/image_1": [jpeg(0)] * steps,
        "steps/language_instruction": [f"do thing {seed % 2}".encode()] * steps,
        "episode_metadata/file_path": [f"/origin/{seed}.npy".encode()],
        "episode_metadata/has_image_0": np.zeros(1, np.int64),
    }
    for name, value in change.items():
        key = next(key for key in features if key.rsplit("/", 1)[-1] == name)
        if value is None:
            del features[key]
        else:
            features[key] = value
    return features


def shape(*dimensions: int) -> dict[str, Any]:
    return {"dimensions": [str(size) for size in dimensions]} if dimensions else {}


def _node(children: dict[str, Any]) -> dict[str, Any]:
    return {"featuresDict": {"features": children}}


def write_tfds(
    folder: Path,
    splits: dict[str, Sequence[Sequence[dict[str, Any]]]],
    *,
    name: str = "mini",
    state_size: int = 7,
    leaves: dict[str, Any] | None = None,
) -> Path:
    """A TFDS folder: split -> shards -> episodes. leaves: key -> its feature description, by default Bridge's.

    Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    described = []
    for split, shards in splits.items():
        for index, episodes in enumerate(shards):
            path = folder / f"{name}-{split}.tfrecord-{index:05d}-of-{len(shards):05d}"
            path.write_bytes(b"".join(record(example(episode)) for episode in episodes))
        described.append({
            "name": split,
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "shardLengths": [str(len(episodes)) for episodes in shards],
        })  # fmt: skip
    info = {"name": name, "version": "1.0.0", "fileFormat": "tfrecord", "splits": described}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(_features(leaves or _bridge_leaves(state_size))))
    return folder


def _bridge_leaves(state_size: int) -> dict[str, Any]:
    image = {"image": {"shape": shape(8, 8, 3), "dtype": "uint8", "encodingFormat": "jpeg"}}
    return {
        "steps/action": {"tensor": {"shape": shape(7)}},
        "steps/observation/image_0": image,
        "steps/observation/image_1": image,
        "steps/observation/state": {"tensor": {"shape": shape(state_size)}},
        "steps/language_instruction": {"text": {}},
        "episode_metadata/file_path": {"text": {}},
        "episode_metadata/has_image_0": {"tensor": {"shape": shape()}},
    }


def _features(leaves: dict[str, Any]) -> dict[str, Any]:
    """features.json from flat keys: "steps" is a sequence, every other level a dictionary."""
    root: dict[str, Any] = {}
    for key, leaf in leaves.items():
        *levels, last = key.split("/")
        node = root
        for level in levels:
            node = node.setdefault(level, {})
        node[last] = (leaf,)

    def described(node: Any) -> dict[str, Any]:
        leaf = isinstance(node, tuple)  # of one: tells it from a level that happens to hold a feature named "image"
        return node[0] if leaf else _node({name: wrapped(name, child) for name, child in node.items()})

    def wrapped(name: str, child: Any) -> dict[str, Any]:
        return {"sequence": {"feature": described(child)}} if name == "steps" else described(child)

    return described(root)
