"""Pictures of what a vision encoder holds: PCA maps of its patches, nearest neighbours, a readout drawn on the frames.

    colours, share = pca_maps(tokens)                # patches (n, side², C) -> RGB (n, side, side, 3), as in DINOv2
    rows = neighbours(queries, bank, groups)         # the most alike frames of other episodes
    predict_gripper(bank, places, episodes, queries) # where a linear readout sees the gripper, metres

Trap: the colours of two PCA maps mean the same only when they were made together; signs and scales are of all frames.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from probes.grid import ALPHAS, ridge_path
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from vlm4vla_core.backbone import Backbone
    from vlm4vla_core.episodes.store import EpisodeStore


def patch_tokens(
    backbone: Backbone,
    images: np.ndarray,
    layer: str,
    *,
    batch_size: int = 32,
    pool: str = "none",
    progress: Any = None,
) -> np.ndarray:
    """Features of one layer for uint8 images (n, H, W, 3), in raster order and pooled as in `probes.features`.

    Raises InputError for a layer that does not exist or whose tokens lie on no grid.
    """
    import torch

    from probes.features import pooled, resolve_layers

    blocks: Any = backbone.base.get_submodule(backbone.spec.blocks)
    name = resolve_layers([layer], [*(f"vision.{place}" for place in range(len(blocks))), "projector"])[0]
    if name == "projector" and not backbone.spec.spatial:
        what = f"the image tokens after the projector of {backbone.spec.name} lie on no grid"
        raise InputError(what, fix="use a layer of the vision tower, such as vision.-1")
    parts = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            parts.append(pooled(backbone.vision_features(part)[name], pool))
            if progress:
                progress(len(part))
    return np.concatenate(parts)


def pca_maps(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first three principal components of all patches as red, green and blue, and their shares of the variance.

    tokens: (n, side², C) in raster order. Returns colours (n, side, side, 3) in [0, 1], each component stretched from
    its 1st to its 99th percentile over all frames, and (3,) shares. A component's sign is that of its largest weight.
    Raises InputError for fewer than three channels or patches, and for tokens that form no square.
    """
    count, patches, width = tokens.shape
    side = round(patches**0.5)
    if side * side != patches:
        raise InputError(f"{patches} image tokens form no square grid")
    if min(width, count * patches - 1) < 3:
        raise InputError(f"{count * patches} patches of width {width} have no three components", fix="use more frames")
    flat = tokens.reshape(-1, width).astype(np.float64)
    flat = flat - flat.mean(0)
    values, vectors = np.linalg.eigh(flat.T @ flat)
    first = vectors[:, ::-1][:, :3]
    first = first * np.sign(first[np.abs(first).argmax(0), np.arange(3)])
    scores = flat @ first  # (n side², 3)
    low, high = np.quantile(scores, [0.01, 0.99], axis=0)
    colours = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
    return colours.reshape(count, side, side, 3), values[::-1][:3] / max(values.sum(), 1e-300)


def neighbours(
    queries: np.ndarray, bank: np.ndarray, episodes: np.ndarray, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the bank (q, number) of the most alike frames, at most one per episode, and their cosines.

    queries (q, d), bank (m, d): features, centred on the bank's mean; episodes (m,): the queries' own must not be
    among them. Raises InputError when the bank has fewer episodes.
    """
    unique = np.unique(episodes)
    if len(unique) < number:
        what = f"{len(unique)} other episodes for {number} neighbours"
        raise InputError(what, fix="ask for fewer, or use a larger store or --max-frames")
    centre = bank.mean(0, dtype=np.float64)
    a, b = (values - centre for values in (queries, bank))
    a, b = (values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12) for values in (a, b))
    cosine = a @ b.T  # (q, m)
    best = np.stack([np.where(episodes == one, cosine, -np.inf).argmax(1) for one in unique], axis=1)  # (q, E)
    reached = np.take_along_axis(cosine, best, 1)
    order = np.argsort(-reached, axis=1, kind="stable")[:, :number]
    return np.take_along_axis(best, order, 1), np.take_along_axis(reached, order, 1)


def predict_gripper(
    bank: np.ndarray, places: np.ndarray, episodes: np.ndarray, queries: np.ndarray, *, seed: int = 0
) -> np.ndarray:
    """Ridge from features (m, d) to places (m, 3), metres, applied to queries (q, d) of another episode: (q, 3).

    The strength is chosen on a fifth of the episodes, then all are fitted. Raises InputError for fewer than two.
    """
    unique = np.random.default_rng(seed).permutation(np.unique(episodes))
    if len(unique) < 2:
        raise InputError("one other episode is too few to fit and to select", fix="use a store with more episodes")
    held = np.isin(episodes, unique[: max(1, len(unique) // 5)])
    x, y, new = (np.asarray(value, np.float64) for value in (bank, places, queries))
    trial = ridge_path(x[~held], y[~held], x[held], ALPHAS)
    best = np.square(trial - y[held]).sum((1, 2)).argmin()
    return ridge_path(x, y, new, ALPHAS[best : best + 1])[0]


def gripper_places(store: EpisodeStore) -> np.ndarray:
    """(N, 3) the gripper's recorded position, metres. Raises InputError for a store that does not record it."""
    from probes.targets import target_of

    return target_of(store, "gripper_xyz").values


def on_picture(store: EpisodeStore, episode: int, camera: str, places: np.ndarray) -> np.ndarray:
    """Points (n, 3) in metres as picture coordinates (n, 2) in [0, 1], right and down.

    Only the tabletop world's fixed camera is known; InputError for any other store or camera.
    """
    from vlm4vla_core.sims.tabletop.looks import LOOKS

    look = LOOKS.get(str(store.episodes["domain"][episode])) if "domain" in store.episodes else None
    if store.manifest["source"] != "tabletop" or camera != "front" or look is None:
        what = "where the camera stands is known only of the tabletop world's front camera"
        raise InputError(what, where=store.path, fix="use --show pca or neighbours")
    return look.camera.project(np.asarray(places, np.float64))[0]
