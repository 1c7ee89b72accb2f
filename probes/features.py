"""Features of a checkpoint's vision encoder, kept as a folder that probes and comparisons read.

    features = Features.open(folder)
    features.layer("vision.-1")         # (n, d) float32, rows as in features.index

Layout: `features-00000.safetensors`… (one tensor per layer, the same rows in each), `index.parquet` (row of the store,
episode, step, split) and the manifest. Images come resized to the model's size through the project's one resize.
Pooling: mean over the image's tokens; grid, the means of 4 x 4 cells side by side, which keeps where things are; none.
Traps: layer i is the *output* of block i, before any final norm. A readout of a position from mean-pooled features
measures the pooling as much as the encoder: compare it with pixels only on grid-pooled ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError, nearest

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from vlm4vla_core.backbone import Backbone
    from vlm4vla_core.episodes.store import EpisodeStore

KIND, INDEX = "features", "index.parquet"
POOLS = ("mean", "grid", "none")
CELLS = 4  # cells per side of the grid pooling
SHARD_BYTES = 256 << 20
_NUMBERED = re.compile(r"vision\.(-?\d+)(?:\.\.(-?\d+))?")
_REMAKE = "make them again with `vlm4vla features`"


class Features:
    """An opened features folder. index: one row per image, in the order of the features' rows."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.layers: tuple[str, ...] = tuple(manifest["layers"])
        self.pool: str = manifest["config"]["pool"]
        self.camera: str = manifest["config"]["camera"]
        self.store: str = manifest["inputs"]["store"]
        self.checkpoint: str = manifest["inputs"]["checkpoint"]
        self.fingerprint: str = manifest["fingerprint"]
        self.label: str = manifest["label"] or path.name

    @classmethod
    def open(cls, path: Path | str) -> Features:
        """Open a features folder. Raises InputError when it is missing, unfinished, damaged or of another kind."""
        path = Path(path)
        return cls(path, folders.read_manifest(path, KIND, fix=_REMAKE))

    def __len__(self) -> int:
        return int(self.manifest["frames"])

    def __repr__(self) -> str:
        return f"Features({str(self.path)!r}, {len(self)} frames, layers {', '.join(self.layers)})"

    @cached_property
    def index(self) -> pd.DataFrame:
        """One row per image: row (of the store), episode, step, split."""
        import pandas as pd

        return pd.read_parquet(self.path / INDEX)

    def layer(self, name: str) -> np.ndarray:
        """Features of one layer: (n, d) float32; (n, 16 d) for pool grid, (n, tokens, d) for pool none.

        name: "vision.0", "vision.-1" (the model's last block), "projector". Raises InputError for a layer that the
        model does not have or that was not extracted.
        """
        from safetensors import SafetensorError, safe_open

        found = resolve_layers([name], self.manifest["model_layers"])
        if len(found) > 1 or found[0] not in self.layers:
            fix = f"they hold {', '.join(self.layers)}"
            raise InputError(f"layer '{name}' is not in these features", where=self.path, fix=fix)
        parts = []
        for shard in sorted(self.path.glob("features-*.safetensors")):
            try:
                with safe_open(shard, "np") as file:
                    parts.append(file.get_tensor(found[0]))
            except SafetensorError as error:
                raise InputError(f"damaged features ({error})", where=shard, fix=_REMAKE) from None
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def same_images(self, other: Features) -> None:
        """Raise InputError unless both hold the same images in the same order, pooled alike."""
        for what, mine, theirs in (
            ("stores", self.store, other.store),
            ("cameras", self.camera, other.camera),
            ("numbers of frames", len(self), len(other)),
            ("poolings", self.pool, other.pool),
        ):
            if mine != theirs:
                raise InputError(
                    f"features of different {what} ({mine} and {theirs}) cannot be paired",
                    where=f"{self.path}, {other.path}",
                    fix="extract both with the same --data, --camera, --pool, --max-frames and --seed",
                )
        if not np.array_equal(self.index["row"], other.index["row"]):
            raise InputError(
                "features of different frames of the store cannot be paired",
                where=f"{self.path}, {other.path}",
                fix="extract both with the same --max-frames and --seed",
            )


def resolve_layers(expressions: Sequence[str], available: Sequence[str]) -> list[str]:
    """Layer names for expressions such as "vision.0", "vision.-1", "vision.0..-1" (inclusive) and "projector".

    available: the model's layers in order. Each layer once, in order of first mention. Raises InputError for an
    expression that names none, with the valid ones.
    """
    blocks = [name for name in available if name.startswith("vision.")]
    chosen: list[str] = []
    for expression in expressions:
        match = _NUMBERED.fullmatch(expression)
        if match:
            first = int(match[1])
            last = first if match[2] is None else int(match[2])
            ends = [number + len(blocks) if number < 0 else number for number in (first, last)]
            named = blocks[ends[0] : ends[1] + 1] if 0 <= ends[0] <= ends[1] < len(blocks) else []
        else:
            named = [expression] if expression in available else []
        if not named:
            fix = f"this model has {', '.join(available)} (vision.-1 is the last block, vision.0..-1 all blocks)"
            raise InputError(f"no layer '{expression}'", fix=fix)
        chosen += named
    if not chosen:
        raise InputError("no layers were asked for", fix=f"this model has {', '.join(available)}")
    return list(dict.fromkeys(chosen))


def choose_rows(count: int, max_frames: int | None, seed: int) -> np.ndarray:
    """Rows of a store, ascending: all of them, or `max_frames` drawn without replacement from `seed`."""
    if max_frames is not None and max_frames < 1:
        raise InputError(f"{max_frames} frames were asked for", fix="use --max-frames 1 or more")
    if max_frames is None or max_frames >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, max_frames, replace=False))


def extract(
    backbone: Backbone,
    store: EpisodeStore,
    out: Path,
    *,
    layers: Sequence[str],
    pool: str = "mean",
    camera: str,
    max_frames: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    config: dict[str, Any],
    inputs: dict[str, str],
    label: str = "",
    progress: Callable[[int], Any] | None = None,
) -> Features:
    """Run the vision encoder over a store's frames and write the features folder, whole or not at all.

    config, inputs, label: go into the manifest (settings, fingerprints, a short name of the checkpoint).
    Memory holds one shard. Raises InputError for a layer or camera that does not exist and for features that are
    not finite.
    """
    import pandas as pd
    import torch
    from safetensors.numpy import save_file

    if pool not in POOLS:
        raise InputError(f"unknown pooling '{pool}'", fix=nearest(pool, POOLS))
    rows = choose_rows(len(store), max_frames, seed)
    blocks: Any = backbone.base.get_submodule(backbone.spec.blocks)
    available = [*(f"vision.{place}" for place in range(len(blocks))), "projector"]
    names = resolve_layers(layers, available)
    if pool == "grid" and "projector" in names and not backbone.spec.spatial:
        fix = "leave the projector out, or use --pool mean"
        raise InputError(f"the image tokens after the projector of {backbone.spec.name} lie on no grid", fix=fix)
    with folders.new_folder(out, KIND) as folder, torch.inference_mode():
        shard: list[dict[str, np.ndarray]] = []
        held = count = 0
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            seen = backbone.vision_features(store.images(camera, part, backbone.image_size))
            piece = {name: pooled(seen[name], pool) for name in names}  # (B, d) or (B, N, d)
            for name, value in piece.items():
                if not np.isfinite(value).all():
                    where = f"row {part[0]} and following"
                    raise InputError(f"features of {name} are NaN or infinite", where=where, fix="check the checkpoint")
            shard.append(piece)
            held += sum(value.nbytes for value in piece.values())
            if held >= SHARD_BYTES or start + batch_size >= len(rows):
                joined = {name: np.concatenate([piece[name] for piece in shard]) for name in names}
                save_file(joined, folder / f"features-{count:05d}.safetensors")
                shard, held, count = [], 0, count + 1
            if progress:
                progress(len(part))
        split = np.asarray(store.splits)
        columns = {"row": rows, "episode": store.episode_of[rows], "step": store.step_of[rows]}
        pd.DataFrame({**columns, "split": split[store.episode_of[rows]]}).to_parquet(folder / INDEX)
        widths = {name: int(value.shape[-1]) for name, value in piece.items()}
        folders.write_manifest(
            folder, KIND, config=config, inputs=inputs, frames=len(rows),
            layers=names, model_layers=available, widths=widths, label=label,
            origin={"model": backbone.lineage.get("source", ""), "data": [store.manifest["source"]]},
        )  # fmt: skip
    return Features.open(out)


def pooled(tokens: Tensor, pool: str) -> np.ndarray:
    """Tokens (B, N, d) in raster order -> (B, d), the means of 4 x 4 cells side by side (B, 16 d), or all of them."""
    import torch

    values = tokens.float()
    if pool == "mean":
        values = values.mean(1)
    elif pool == "grid":
        side = round(values.shape[1] ** 0.5)
        if side * side != values.shape[1]:
            raise InputError(f"{values.shape[1]} image tokens form no square grid", fix="use --pool mean")
        square = values.reshape(len(values), side, side, -1).permute(0, 3, 1, 2)  # (B, d, side, side)
        cells = torch.nn.functional.adaptive_avg_pool2d(square, min(CELLS, side))
        values = cells.permute(0, 2, 3, 1).flatten(1)
    return values.cpu().numpy()
