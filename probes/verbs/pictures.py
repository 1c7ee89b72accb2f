"""Look at what a checkpoint's vision encoder holds, frame by frame of an episode.

pca: the first three principal components of its patches as colours over the frames (as in DINOv2). neighbours: the most
alike frames of other episodes, the episode itself and copies of it left out. gripper: where a linear readout fitted on
other episodes sees the gripper, drawn on the frames (the tabletop world, whose camera is known).

Example: vlm4vla pictures runs/walk/vla --data runs/walk/demos --episode 18 --show pca --out runs/walk/pca
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure

    from vlm4vla_core.backbone import Backbone
    from vlm4vla_core.episodes.store import EpisodeStore

KIND = "pictures"


@dataclass(frozen=True)
class Args:
    checkpoint: Positional[Path]
    """Checkpoint or run folder, or a published model folder."""
    data: Path
    """Episode store."""
    episode: int
    """Number of the episode, from 0."""
    out: Path
    """Folder to write."""
    show: Literal["pca", "neighbours", "gripper"] = "pca"
    """What is drawn."""
    layer: str = "vision.-1"
    """Layer: vision.0, vision.-1, projector."""
    steps: tuple[int, ...] = ()
    """Steps of the episode; eight, evenly spread, when left out."""
    camera: str | None = None
    """Camera of the store; by default the one the policy was trained on."""
    number: int = 4
    """Neighbours of each frame."""
    max_frames: int = 1000
    """Frames of other episodes that are searched, or that the readout is fitted on."""
    seed: int = 0
    """Seed of the drawn frames."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU when there is one."""
    json: Path | None = None
    """Also write the table as JSON here."""


def run(args: Args) -> int:
    from probes.verbs.attribute import known_steps
    from probes.verbs.shared import check_seed, choose_camera, model_facts
    from probes.weights import weights_fingerprint
    from vlm4vla_core.episodes.store import EpisodeStore

    check_seed(args.seed)
    if args.number < 1 or args.max_frames < 2:
        raise InputError(f"--number {args.number}, --max-frames {args.max_frames}", fix="use 1 and 2, or more")
    folder, facts = model_facts(args.checkpoint)
    store = EpisodeStore.open(args.data)
    camera = choose_camera(args.camera, facts["camera"], store)
    steps = known_steps(store, args.episode, args.steps)
    config = {
        "show": args.show, "episode": args.episode, "steps": steps, "layer": args.layer, "camera": camera,
        "number": args.number, "max_frames": args.max_frames, "seed": args.seed,
    }  # fmt: skip
    inputs = {"checkpoint": weights_fingerprint(folder), "store": store.fingerprint}
    if folders.current(args.out, KIND, config=config, inputs=inputs):
        print(f"{args.out} is up to date")
    else:
        folders.check_replaceable(args.out, KIND)
        _make(args, folder, store, camera, steps, config, inputs)
    if args.json:
        folders.write_json(args.json, folders.read_json(args.out / "pictures.json"))
    return 0


def _make(
    args: Args, folder: Path, store: EpisodeStore, camera: str, steps: list[int],
    config: dict[str, Any], inputs: dict[str, str],
) -> None:  # fmt: skip
    from probes.style import save_figure
    from probes.verbs.shared import few_threads, short_name, show, use_device, write_result
    from probes.weights import model_source
    from vlm4vla_core.backbone import load_backbone

    backbone = load_backbone(folder).to(use_device(args.device)).eval()
    few_threads(backbone)
    images = store.images(camera, store.starts[args.episode] + steps, backbone.image_size)
    how = {"pca": _pca, "neighbours": _neighbours, "gripper": _gripper}[args.show]
    figure, table, line = how(args, backbone, store, camera, steps, images)
    with folders.new_folder(args.out, KIND) as made:
        save_figure(figure, made / "sheet", dpi=150)
        facts: dict[str, Any] = {"label": short_name(folder), "note": line, "rows": table.to_dict("records")}
        write_result(made / "pictures.json", KIND, config=config, inputs=inputs, **facts)
        origin = {"model": model_source(folder), "data": [store.manifest["source"]]}
        folders.write_manifest(made, KIND, config=config, inputs=inputs, origin=origin)
    print(show(table))
    print(line)
    print(f"contact sheet in {args.out}")


def _pca(
    args: Args, backbone: Backbone, store: EpisodeStore, camera: str, steps: list[int], images: np.ndarray
) -> tuple[Figure, pd.DataFrame, str]:
    import pandas as pd

    from probes.figures_attribution import pair_sheet
    from probes.pictures import patch_tokens, pca_maps

    maps, shares = pca_maps(patch_tokens(backbone, images, args.layer))
    line = f"components of {args.layer}: " + ", ".join(f"{share:.0%}" for share in shares) + " of the variance"
    figure = pair_sheet(images, maps, [f"step {step}" for step in steps], title=f"red, green, blue: {line}")
    return figure, pd.DataFrame({"component": ["red", "green", "blue"], "share": shares}), line


def _others(
    args: Args, backbone: Backbone, store: EpisodeStore, camera: str, images: np.ndarray, pool: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of other episodes (no copies of this one), their features, and those of the pictures in question."""
    import numpy as np

    from probes.features import choose_rows
    from probes.pictures import patch_tokens
    from vlm4vla_core.progress import progress

    same = np.asarray(store.content) == store.content[args.episode]
    rows = np.flatnonzero(~same[store.episode_of])
    if not len(rows):
        raise InputError("the store has no other episode", where=store.path, fix="use a larger store")
    rows = rows[choose_rows(len(rows), args.max_frames, args.seed)]
    with progress(total=len(rows), what="features", unit="img") as bar:
        parts = []
        for start in range(0, len(rows), 256):
            part = store.images(camera, rows[start : start + 256], backbone.image_size)
            parts.append(patch_tokens(backbone, part, args.layer, pool=pool, progress=bar.update))
    return rows, np.concatenate(parts), patch_tokens(backbone, images, args.layer, pool=pool)


def _neighbours(
    args: Args, backbone: Backbone, store: EpisodeStore, camera: str, steps: list[int], images: np.ndarray
) -> tuple[Figure, pd.DataFrame, str]:
    import pandas as pd

    from probes.figures_attribution import neighbour_sheet
    from probes.pictures import neighbours

    rows, bank, queries = _others(args, backbone, store, camera, images, "mean")
    found, cosine = neighbours(queries, bank, store.episode_of[rows], args.number)
    near = rows[found]  # (q, number)
    records = []
    for i, step in enumerate(steps):
        for k, row in enumerate(near[i]):
            episode, at = int(store.episode_of[row]), int(store.step_of[row])
            told = {"episode": episode, "at_step": at, "cosine": float(cosine[i, k])}
            records.append({"step": step, "neighbour": k + 1, **told, "instruction": store.instructions[episode]})
    table = pd.DataFrame(records)
    shown = store.images(camera, near.ravel(), backbone.image_size).reshape(*near.shape, *images.shape[1:])
    captions = [f"episode {r['episode']}, step {r['at_step']}: {r['cosine']:.3f}" for r in records]
    line = f"cosine of centred, mean-pooled {args.layer}; {len(rows)} frames of other episodes were searched"
    return neighbour_sheet(images, shown, [f"step {step}" for step in steps], captions, title=line), table, line


def _gripper(
    args: Args, backbone: Backbone, store: EpisodeStore, camera: str, steps: list[int], images: np.ndarray
) -> tuple[Figure, pd.DataFrame, str]:
    import numpy as np
    import pandas as pd

    from probes.figures_attribution import points_sheet
    from probes.pictures import gripper_places, on_picture, predict_gripper

    places = gripper_places(store)
    true = places[store.starts[args.episode] + steps]
    drawn = [on_picture(store, args.episode, camera, true)]
    rows, bank, queries = _others(args, backbone, store, camera, images, "grid")
    told = predict_gripper(bank, places[rows], store.episode_of[rows], queries, seed=args.seed)
    drawn.append(on_picture(store, args.episode, camera, told))
    error = 1000 * np.linalg.norm(told - true, axis=1)
    mean = 1000 * np.linalg.norm(places[rows].mean(0) - true, axis=1)
    table = pd.DataFrame({"step": steps, "error_mm": error, "mean_predictor_mm": mean})
    line = (
        f"grid-pooled {args.layer}: {error.mean():.0f} mm off on average (mean predictor {mean.mean():.0f} mm); "
        f"fitted on {len(rows)} frames of other episodes"
    )
    captions = [f"step {step}: {off:.0f} mm off" for step, off in zip(steps, error, strict=True)]
    title = line.partition(" (")[0]
    return points_sheet(images, drawn[0], drawn[1], captions, title=title), table, line
