"""Image tokens of a frozen tower, computed once per frame of the stores: a stage then trains on them alone.

RUN/features/tokens.f32 holds them as float32, row after row of the stores, and tokens.json what they were made of. They
are computed block by block before the first step; a killed run goes on with the block that it was at. The model's own
forward takes them instead of pictures, so nothing else changes, and losses are those without to rounding.

Trap: the file is as large as (rows x image tokens x width x 4) bytes, many times the pictures. It may be deleted once
the run is finished; deleted before, it is made again.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError
from vlm4vla_core.image_tokens import image_tokens, token_shape
from vlm4vla_core.presets import TrainConfig
from vlm4vla_core.progress import progress
from vlm4vla_core.training_data import Data, Draw

if TYPE_CHECKING:
    import torch

    from vlm4vla_core.backbone import Backbone
    from vlm4vla_core.devices import Devices
    from vlm4vla_core.objectives import Objective

FOLDER, TOKENS, FACTS, DONE = "features", "tokens.f32", "tokens.json", "done"
_BLOCK = 64  # frames computed together; fixed, since the size of a batch decides the last digits


def size_in_bytes(backbone: Backbone, data: Data) -> int:
    """Of the file that a stage on cached features makes."""
    return 4 * sum(map(len, data.stores)) * int(np.prod(token_shape(backbone)))


def on_cached_features(
    config: TrainConfig, data: Data, backbone: Backbone, objectives: dict[str, Objective], out: Path, devices: Devices
) -> dict[str, Objective]:
    """The objectives, with "tokens" instead of pictures in their inputs; the first process makes the file.

    `data` gives blank pictures from then on. Raises InputError when tower or projector are trained after all, and
    OSError when the disk is full.
    """
    groups = backbone.groups()
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad and groups[name].split(".")[0] in ("vision", "projector"):
            raise InputError(f"features cannot be cached while {name} is trained", fix="freeze vision and projector")
    facts: dict[str, Any] = {
        "weights": _fingerprint(backbone),
        "stores": [store.fingerprint for store in data.stores],
        "cameras": data.cameras,
        "image_size": [backbone.image_size, backbone.geometry.size],
        "precision": config.precision,
        "shape": [sum(map(len, data.stores)), *token_shape(backbone)],
    }
    folder = out / FOLDER
    if devices.first:
        _make(folder, facts, data, backbone)
    devices.wait()
    held = np.memmap(folder / TOKENS, np.float32, "r", shape=tuple(facts["shape"]))
    first = np.cumsum([0, *map(len, data.stores)])
    data.blank = True
    return {name: _on(objective, held, first) for name, objective in objectives.items()}


def _on(objective: Objective, held: np.ndarray, first: np.ndarray) -> Objective:
    import torch

    def make(images: np.ndarray, draw: Draw, rng: np.random.Generator, part: slice) -> dict[str, torch.Tensor]:
        batch, mine = objective.make(images, draw, rng, part), draw.part(part)
        del batch["images"]
        return {**batch, "tokens": torch.from_numpy(held[first[mine.which] + mine.rows])}

    return replace(objective, make=make)


def _fingerprint(backbone: Backbone) -> str:
    """Of all that decides the image tokens of a picture: the weights of tower and projector, and the model's config."""
    import torch

    groups, digest = backbone.groups(), hashlib.sha256(str(backbone.describe()["model"]).encode())
    for name, value in sorted(backbone.state_dict().items()):
        if groups.get(name, "vision").split(".")[0] in ("vision", "projector"):  # buffers are of no group
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _make(folder: Path, facts: dict[str, Any], data: Data, backbone: Backbone) -> None:
    """Write the tokens that are missing; those of another tower or store are thrown away."""
    import torch

    rows, *shape = facts["shape"]
    blocks, each = -(-rows // _BLOCK), 4 * int(np.prod(shape))
    paths = folder / FACTS, folder / TOKENS, folder / DONE
    same = all(path.is_file() for path in paths) and folders.read_json(folder / FACTS) == facts
    if not same or (folder / TOKENS).stat().st_size != rows * each or (folder / DONE).stat().st_size != blocks:
        folder.mkdir(exist_ok=True)
        (folder / DONE).write_bytes(b"")
        folders.write_json(folder / FACTS, facts)
        with (folder / TOKENS).open("wb") as handle:
            handle.truncate(rows * each)
        (folder / DONE).write_bytes(bytes(blocks))
    done = np.frombuffer((folder / DONE).read_bytes(), np.uint8)
    which = np.repeat(np.arange(len(data.stores)), [len(store) for store in data.stores])
    every = Draw(which, np.concatenate([np.arange(len(store)) for store in data.stores]))
    was_training = backbone.training
    backbone.eval()
    with (folder / TOKENS).open("r+b") as handle, (folder / DONE).open("r+b") as marks, torch.no_grad():
        for block in progress(np.flatnonzero(done == 0).tolist(), what="image features", unit="block"):
            part = slice(block * _BLOCK, (block + 1) * _BLOCK)
            pictures = backbone.pictures(data.images(every.part(part), backbone.image_size))
            handle.seek(block * _BLOCK * each)
            handle.write(image_tokens(backbone, pictures).float().cpu().numpy().tobytes())
            handle.flush()  # the tokens before the mark that they are there
            marks.seek(block)
            marks.write(b"\1")
            marks.flush()
    backbone.train(was_training)
