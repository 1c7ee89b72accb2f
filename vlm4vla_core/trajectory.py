"""The path of a training, for the divergence probes: sketches of the weights and gradient norms at log-spaced steps.

A sketch is a fixed random projection to SIZE numbers per module group, after CountSketch (Charikar et al. 2002): every
weight gets a random sign, every SIZE weights in a row are turned by a random number of places, and the rows are summed.
Two weights meet with probability 1 / SIZE, or never. Signs and places depend on the parameter's name alone, so arms of
one family share them, and inner products of differences of sketches estimate those of the weights without bias, with
a standard error of at most sqrt(2 / SIZE) |x| |y|.

Trap: subtract the start's sketch first. The weights themselves are far longer than what training moves.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

SIZE = 256  # a turn is a byte
_SEED = 20260103


def due(step: int) -> bool:
    """Whether a step is 0 or a power of two."""
    return step & (step - 1) == 0


def groups_of(model: torch.nn.Module) -> dict[str, list[tuple[str, torch.nn.Parameter]]]:
    """Module group -> its trained parameters with their names: the backbone's groups, and "head"."""
    backbone: Any = getattr(model, "backbone", model)
    prefix, groups = ("backbone." if backbone is not model else ""), backbone.groups()
    found: dict[str, list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = name.removeprefix(prefix)
            found.setdefault(groups.get(own, "head"), []).append((own, parameter))
    return found


def sketch(name: str, values: torch.Tensor) -> torch.Tensor:
    """The sketch (SIZE,) float32, on the CPU, of one parameter. A linear function of its values."""
    import torch

    seed = int.from_bytes(hashlib.sha256(f"{_SEED} {name}".encode()).digest()[:7], "big")
    drawn, flat = np.random.PCG64(seed), values.detach().float().flatten().cpu()
    turned = torch.zeros(SIZE, SIZE)  # sums of the rows that are turned by 0, 1, 2 … places
    for part in flat.split(1 << 18):  # what the processor's cache holds: several times as fast as all at once
        rows = -(-len(part) // SIZE)
        part = torch.nn.functional.pad(part, (0, rows * SIZE - len(part))).numpy().reshape(rows, SIZE)
        words = drawn.random_raw(rows * SIZE // 64 + -(-rows // 8)).view(np.uint8)
        minus = np.unpackbits(words[: rows * SIZE // 8]).view(np.int8).reshape(rows, SIZE)
        turns = torch.from_numpy(words[rows * SIZE // 8 :][:rows].astype(np.int64))
        turned.index_add_(0, turns, torch.from_numpy(part * (1 - 2 * minus)))
    places = torch.arange(SIZE)
    return turned.gather(1, (places - places[:, None]) % SIZE).sum(0)


def gradient_norms(model: torch.nn.Module) -> dict[str, float]:
    """Euclidean norm of the gradient of each module group, before clipping (call it before)."""
    import torch

    from vlm4vla_core.sharding import full

    norms = {}
    for group, members in groups_of(model).items():
        grads = [parameter.grad for _, parameter in members if parameter.grad is not None]
        if grads:
            norms[group] = float(full(torch.nn.utils.get_total_norm(grads)))
    return norms


def record(folder: Path, model: torch.nn.Module, *, weights: bool = False, write: bool = True) -> None:
    """Write FOLDER/sketch.safetensors, one tensor per module group, and weights.safetensors of what is trained.

    write: False in the other processes of a sharded model, which must all call this.
    """
    import torch
    from safetensors.torch import save_file

    from vlm4vla_core import folders
    from vlm4vla_core.sharding import full

    groups, sketches, every = groups_of(model), {}, {}
    for group, members in groups.items():
        made = []
        for name, parameter in members:
            value = full(parameter.detach())  # one at a time: a sharded model is larger than a device
            made.append(sketch(name, value) if write else torch.zeros(SIZE))
            if weights and write:
                every[name] = value.cpu().contiguous()
        sketches[group] = torch.stack(made).sum(0)
    if not write:
        return
    with folders.new_folder(folder, "snapshot") as temporary:
        save_file(sketches, temporary / "sketch.safetensors")
        if weights:
            save_file(every, temporary / "weights.safetensors")
        folders.write_manifest(temporary, "snapshot", config={"size": SIZE, "seed": _SEED, "projection": 2}, inputs={})
