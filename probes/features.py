"""Features of a checkpoint's layers, kept as a folder that probes and comparisons read.

    features = Features.open(folder)
    features.layer("vision.-1")         # (n, d) float32, rows as in features.index
    features.chunks("vision.-1")        # the same, a shard at a time

Layout: `features-00000.safetensors`… (one tensor per layer, the same rows in each), `index.parquet` (row of the store,
episode, step, split), `shards.parquet` (one row per shard and layer: file, rows, and the key they were made under:
weights, layer, pooling, preprocessing, data) and the manifest. Images come resized to the model's size through the
project's one resize. Layers are those of `probes.taps`. Pooling: mean over the image's tokens; grid, the means of 4 x 4
cells side by side, which keeps where things are; attn, one attention step without parameters, the mean token asking;
cls, the tower's class token; none. The query is never pooled.
Trap: a readout of a position from mean-pooled features measures the pooling as much as the encoder: compare it with
pixels only on grid-pooled ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probes.taps import QUERY, class_tokens, layer_names, needs_words, resolve_layers, tap
from vlm4vla_core import folders
from vlm4vla_core.errors import InputError, nearest

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from probes.image_folder import ImageFolder
    from vlm4vla_core.backbone import Backbone
    from vlm4vla_core.episodes.store import EpisodeStore

KIND, INDEX, SHARDS, PLAN = "features", "index.parquet", "shards.parquet", "plan.json"
POOLS = ("mean", "grid", "none", "attn", "cls")
CELLS = 4  # cells per side of the grid pooling
SHARD_BYTES = 256 << 20
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
        self._checked: set[str] = set()  # shards whose content was compared with the manifest
        self._mapped: dict[str, list[np.ndarray]] = {}

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

        name: "vision.0", "vision.-1" (the model's last block), "projector", "decoder.0", "query". Raises InputError
        for a layer that the model does not have or that was not extracted.
        """
        parts = list(self.chunks(name))
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """The rows of `layer`, in order, a shard at a time. Raises InputError as `layer`, and for a changed shard."""
        from safetensors import SafetensorError, safe_open

        found = resolve_layers([name], self.manifest["model_layers"])
        if len(found) > 1 or found[0] not in self.layers:
            fix = f"they hold {', '.join(self.layers)}"
            raise InputError(f"layer '{name}' is not in these features", where=self.path, fix=fix)
        for shard in sorted(self.path.glob("features-*.safetensors")):
            self._check(shard)
            try:
                with safe_open(shard, "np") as file:
                    yield file.get_tensor(found[0])
            except SafetensorError as error:
                raise InputError(f"damaged features ({error})", where=shard, fix=_REMAKE) from None

    def _check(self, shard: Path) -> None:
        """Compare a shard's content with the manifest, once. Raises InputError when it has changed."""
        if shard.name not in self._checked:
            if folders.file_fingerprint(shard) != self.manifest["files"].get(shard.name, {}).get("sha256"):
                raise InputError("these features have changed since they were made", where=shard, fix=_REMAKE)
            self._checked.add(shard.name)

    def rows(self, name: str, places: np.ndarray) -> np.ndarray:
        """Some rows of a layer, by their places, read from the mapped files alone: (len(places), …) float32."""
        if name not in self._mapped:
            for shard in self.path.glob("features-*.safetensors"):
                self._check(shard)
            self._mapped[name] = [_map(shard, name) for shard in sorted(self.path.glob("features-*.safetensors"))]
        shards = self._mapped[name]
        bounds = np.cumsum([0, *(len(shard) for shard in shards)])
        which = np.searchsorted(bounds, places, side="right") - 1
        out = np.empty((len(places), *shards[0].shape[1:]), np.float32)
        for number in np.unique(which):
            mine = which == number
            out[mine] = shards[number][np.asarray(places)[mine] - bounds[number]]
        return out

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


def _map(shard: Path, name: str) -> np.ndarray:
    """One tensor of a safetensors file (8 bytes of header length, JSON, data), mapped and not read."""
    import json

    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        told = json.loads(file.read(length))[name]
    start = 8 + length + told["data_offsets"][0]
    return np.memmap(shard, np.float32, "r", offset=start, shape=tuple(told["shape"]))


def choose_rows(count: int, max_frames: int | None, seed: int) -> np.ndarray:
    """Rows of a store, ascending: all of them, or `max_frames` drawn without replacement from `seed`."""
    if max_frames is not None and max_frames < 1:
        raise InputError(f"{max_frames} frames were asked for", fix="use --max-frames 1 or more")
    if max_frames is None or max_frames >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, max_frames, replace=False))


def work_folder(out: Path, config: dict[str, Any], inputs: dict[str, str]) -> Path:
    """Where shards wait until all are there; another setting or input has another one."""
    return out.resolve().with_name(f".{out.name}.{folders.fingerprint([config, inputs])}.work")


def extract(
    backbone: Backbone,
    store: EpisodeStore | ImageFolder,
    out: Path,
    *,
    layers: Sequence[str],
    pool: str = "mean",
    camera: str,
    max_frames: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    instruction: str = "",
    config: dict[str, Any],
    inputs: dict[str, str],
    label: str = "",
    progress: Callable[[int], Any] | None = None,
) -> Features:
    """Run the model over a store's frames and write the features folder, whole or not at all.

    instruction: in place of the store's own, for decoder layers and the query. config, inputs, label: go into the
    manifest (settings, fingerprints, a short name of the checkpoint). Shards that a killed run has left beside `out`
    are kept. Memory holds one shard. Raises InputError for a layer or camera that does not exist, for a pooling that
    the layer does not have, and for features that are not finite.
    """
    import torch

    rows, available = choose_rows(len(store), max_frames, seed), layer_names(backbone)
    names = resolve_layers(layers, available)
    _check_pool(backbone, names, pool)
    folders.check_replaceable(out, KIND)
    folders.recover(out.resolve())
    work = work_folder(out, config, inputs)
    work.mkdir(parents=True, exist_ok=True)
    texts = [instruction] * len(store) if instruction else [store.instructions[e] for e in store.episode_of] if (
        needs_words(names) and store.instructions) else []  # fmt: skip

    def see(part: np.ndarray, pictures: np.ndarray) -> dict[str, np.ndarray]:
        if pool == "cls":
            tokens = class_tokens(backbone, pictures, names)
            piece = {name: value.float().cpu().numpy() for name, value in tokens.items()}
        else:
            tokens = tap(backbone, pictures, names, [texts[row] for row in part] if texts else [])
            piece = {name: pooled(value, "flat" if name == QUERY else pool) for name, value in tokens.items()}
        for name, value in piece.items():
            if not np.isfinite(value).all():
                where = f"row {part[0]} and following"
                raise InputError(f"features of {name} are NaN or infinite", where=where, fix="check the checkpoint")
        return piece

    def pictures(part: np.ndarray) -> np.ndarray:
        return store.images(camera, part, backbone.image_size)

    try:
        with torch.inference_mode(), ThreadPoolExecutor(1) as ahead:
            first_piece = None  # of a fresh start: the first batch tells how many rows a shard takes
            if not (work / PLAN).is_file():
                first_piece = see(rows[:batch_size], pictures(rows[:batch_size]))
                size = sum(value[0].nbytes for value in first_piece.values())
                batches = max(1, SHARD_BYTES // (size * batch_size))
                folders.write_json(work / PLAN, {"rows": min(len(rows), batches * batch_size), "batch": batch_size})
            plan = folders.read_json(work / PLAN)
            for number, first in enumerate(range(0, len(rows), plan["rows"])):
                shard = rows[first : first + plan["rows"]]
                file = work / f"features-{number:05d}.safetensors"
                if file.is_file():
                    if progress:
                        progress(len(shard))
                    continue
                parts = [shard[start : start + plan["batch"]] for start in range(0, len(shard), plan["batch"])]
                pieces, coming = [], ahead.submit(pictures, parts[0])
                for part, after in zip(parts, [*parts[1:], None], strict=True):
                    batch = coming.result()
                    if after is not None:
                        coming = ahead.submit(pictures, after)  # decoded while the model looks at this one
                    pieces.append(first_piece or see(part, batch))
                    first_piece = None
                    if progress:
                        progress(len(part))
                _write_shard(file, {name: np.concatenate([piece[name] for piece in pieces]) for name in names})
    except InputError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    widths = _index(work, store, rows, names, config, inputs)
    (work / PLAN).unlink()
    folders.write_manifest(
        work, KIND, config=config, inputs=inputs, frames=len(rows),
        layers=names, model_layers=available, widths=widths, label=label,
        origin={"model": backbone.lineage.get("source", ""), "data": [store.manifest["source"]]},
    )  # fmt: skip
    folders.publish(work, out.resolve())
    return Features.open(out)


def _check_pool(backbone: Backbone, names: Sequence[str], pool: str) -> None:
    if pool not in POOLS:
        raise InputError(f"unknown pooling '{pool}'", fix=nearest(pool, POOLS))
    latents = [name for name in names if name.startswith("decoder.") or name == "projector"]
    if pool == "grid" and latents and not backbone.spec.spatial:
        fix = f"leave {latents[0]} out, or use --pool mean"
        raise InputError(f"the image tokens after the projector of {backbone.spec.name} lie on no grid", fix=fix)
    if pool == "cls" and (other := [name for name in names if not name.startswith("vision.")]):
        raise InputError(f"{other[0]} has no class token", fix="use --pool cls with vision layers only")


def _write_shard(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Whole or absent: a killed run leaves a name that is never taken for a shard."""
    import os

    from safetensors.numpy import save_file

    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary)
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())
    temporary.replace(file)


def _index(
    work: Path, store: EpisodeStore | ImageFolder, rows: np.ndarray, names: Sequence[str], config: dict[str, Any],
    inputs: dict[str, str],
) -> dict[str, int]:  # fmt: skip
    """Write the tables of frames and of shards; returns the width of each layer."""
    import pandas as pd
    from safetensors import safe_open

    columns: dict[str, Any] = {"row": rows, "episode": store.episode_of[rows], "step": store.step_of[rows]}
    columns["split"] = np.asarray(store.splits)[store.episode_of[rows]]
    if files := getattr(store, "names", None):
        columns["file"] = [files[row] for row in rows]
    pd.DataFrame(columns).to_parquet(work / INDEX)
    found, widths, first = [], {}, 0
    for left in work.glob(".*.tmp"):
        left.unlink()
    key = {
        "weights": inputs.get("checkpoint", ""), "pooling": config.get("pool", ""), "data": inputs.get("store", ""),
        "preprocessing": folders.fingerprint(config.get("preprocessing", {})),
    }  # fmt: skip
    for file in sorted(work.glob("features-*.safetensors")):
        with safe_open(file, "np") as shard:
            for name in names:
                shape = shard.get_slice(name).get_shape()
                widths[name], count = int(shape[-1]), int(shape[0])
                found.append(
                    {"file": file.name, "first": first, "rows": count, "layer": name, "width": shape[-1]} | key
                )
        first += count
    pd.DataFrame(found).to_parquet(work / SHARDS)
    return widths


def pooled(tokens: Tensor, pool: str) -> np.ndarray:
    """Tokens (B, N, d) in raster order -> (B, d), the means of 4 x 4 cells side by side (B, 16 d), or all of them.

    attn: the tokens t weighted by softmax(t · m / sqrt(d)), m the mean token, both centred over channels; flat: side by
    side (B, N d).
    """
    import torch

    values = tokens.float()
    if pool == "mean":
        values = values.mean(1)
    elif pool == "flat":
        values = values.flatten(1)
    elif pool == "attn":
        centred = values - values.mean(-1, keepdim=True)
        score = (centred * centred.mean(1, keepdim=True)).sum(-1) / values.shape[-1] ** 0.5  # (B, N)
        values = (score.softmax(1)[..., None] * values).sum(1)
    elif pool == "grid":
        side = round(values.shape[1] ** 0.5)
        if side * side != values.shape[1]:
            raise InputError(f"{values.shape[1]} image tokens form no square grid", fix="use --pool mean")
        square = values.reshape(len(values), side, side, -1).permute(0, 3, 1, 2)  # (B, d, side, side)
        cells = torch.nn.functional.adaptive_avg_pool2d(square, min(CELLS, side))
        values = cells.permute(0, 2, 3, 1).flatten(1)
    return values.cpu().numpy()
