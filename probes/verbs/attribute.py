"""Which parts of the frames of an episode move one number of a policy's answer, and whether the maps can be trusted.

Methods on image tokens: ig (integrated gradients), gradxact (gradient x activation at the projector), ablation. On
pixels: ig-pixels, occlusion. What is taken away becomes the mean token or mean colour. Beside the maps: deletion and
insertion curves against random orders, and the maps of the same policy with weights drawn anew. Issuing the command
again does nothing; a killed one goes on where it was.

Example: vlm4vla attribute runs/walk/vla --data runs/walk/demos --episode 0 --target x --method ig
         --out runs/walk/attribution
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError, nearest

if TYPE_CHECKING:
    import numpy as np

    from probes.attribution import Attribution, Faithfulness, Target
    from vlm4vla_core.episodes.store import EpisodeStore
    from vlm4vla_core.policy import VLAPolicy

KIND = "attribution"
EVENLY = 8  # frames of the episode that are looked at when none are named
SANITY = 4  # of these, frames whose maps are made again with weights drawn anew


@dataclass(frozen=True)
class Args:
    checkpoint: Positional[Path]
    """Checkpoint or run folder of a policy."""
    data: Path
    """Episode store."""
    episode: int
    """Number of the episode, from 0."""
    out: Path
    """Folder to write."""
    target: str
    """An action dimension, such as x, or gripper."""
    method: Literal["ig", "ig-pixels", "gradxact", "occlusion", "ablation"] = "ig"
    """How places are scored."""
    steps: tuple[int, ...] = ()
    """Steps of the episode; eight, evenly spread, when left out."""
    chunk_step: int = 0
    """Step of the predicted chunk of actions."""
    camera: str | None = None
    """Camera of the store; by default the one the policy was trained on."""
    orders: int = 20
    """Random orders beside the deletion and insertion curves; 0 leaves the curves out."""
    sanity: bool = True
    """Also make maps with weights drawn anew (Adebayo et al. 2018)."""
    seed: int = 0
    """Seed of the random orders and of the weights drawn anew."""
    batch_size: int = 16
    """Pictures per forward pass."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU when there is one."""
    json: Path | None = None
    """Also write the results as JSON here."""


def run(args: Args) -> int:
    from probes.verbs.shared import check_seed
    from probes.weights import weights_fingerprint
    from vlm4vla_core import checkpoint
    from vlm4vla_core.episodes.store import EpisodeStore

    check_seed(args.seed)
    if args.batch_size < 1 or args.orders < 0:
        raise InputError(f"--batch-size {args.batch_size}, --orders {args.orders}", fix="use 1, or 0, or more")
    folder = checkpoint.resolve(args.checkpoint)
    store = EpisodeStore.open(args.data)
    steps = known_steps(store, args.episode, args.steps)
    config = {
        "episode": args.episode, "steps": steps, "target": args.target, "chunk_step": args.chunk_step,
        "method": args.method, "camera": args.camera, "orders": args.orders, "sanity": args.sanity, "seed": args.seed,
    }  # fmt: skip
    inputs = {"checkpoint": weights_fingerprint(folder), "store": store.fingerprint}
    if folders.current(args.out, KIND, config=config, inputs=inputs):
        print(f"{args.out} is up to date")
        _json(args)
        return 0
    folders.check_replaceable(args.out, KIND)
    _compute(args, folder, store, steps, config, inputs)
    _json(args)
    return 0


def known_steps(store: EpisodeStore, episode: int, wanted: tuple[int, ...]) -> list[int]:
    """The steps to look at. Raises InputError for an episode or step that the store does not have."""
    import numpy as np

    count = len(store.lengths)
    if not 0 <= episode < count:
        raise InputError(f"no episode {episode}", where=store.path, fix=f"this store has episodes 0 to {count - 1}")
    length = int(store.lengths[episode])
    if outside := [step for step in wanted if not 0 <= step < length]:
        raise InputError(f"no step {outside[0]} in episode {episode}", fix=f"it has steps 0 to {length - 1}")
    even = np.unique(np.linspace(0, length - 1, min(EVENLY, length)).round().astype(int))
    return sorted(set(wanted)) or [int(step) for step in even]


def _compute(
    args: Args, folder: Path, store: EpisodeStore, steps: list[int], config: dict[str, Any], inputs: dict[str, str]
) -> None:
    import torch

    from probes.attribution import target_of
    from probes.verbs.shared import few_threads, use_device
    from vlm4vla_core.lora import merge_lora
    from vlm4vla_core.policy import VLAPolicy
    from vlm4vla_core.progress import progress

    policy = VLAPolicy.load(folder, use_device(args.device), torch.float32)
    merge_lora(policy.backbone)  # so that its weights have the names of those drawn anew
    few_threads(policy)
    camera = args.camera or policy.config.camera
    if camera not in store.cameras:
        fix = f"give --camera; {nearest(camera, store.cameras)}"
        raise InputError(f"the store has no camera '{camera}'", where=store.path, fix=fix)
    target = target_of(policy.config, args.target, args.chunk_step)
    method = _method(args.method, policy)
    images = store.images(camera, store.starts[args.episode] + steps, policy.backbone.image_size)
    instruction = store.instructions[args.episode]
    work = args.out.resolve().with_name(f".{args.out.name}.{folders.fingerprint([config, inputs])}.work")
    count = min(SANITY, len(steps)) if args.sanity else 0
    with progress(total=len(steps) + 4 * count, what="attribution", unit="picture") as bar:
        found, curves = [], []
        for step, image in zip(steps, images, strict=True):
            one, curve = _kept(work / f"{step}.json", policy, image, instruction, target, method, args)
            found.append(one)
            curves.append(curve)
            bar.update()
        sane = _sanity(args, folder, policy, images[:count], instruction, target, found[:count], bar) if count else None
    _write(args, store, steps, images, instruction, target, found, curves, sane, config, inputs)
    import shutil

    shutil.rmtree(work, ignore_errors=True)


def _method(wanted: str, policy: VLAPolicy) -> str:
    """Families without a grid of image tokens are looked at on their pixels, and that is said."""
    spec = policy.backbone.spec
    if spec.spatial or wanted in ("ig-pixels", "occlusion"):
        return wanted
    if wanted == "gradxact":
        fix = "use --method ig-pixels or occlusion"
        raise InputError(f"the image tokens of {spec.name} are latents that lie on no grid", fix=fix)
    method = {"ig": "ig-pixels", "ablation": "occlusion"}[wanted]
    print(f"the image tokens of {spec.name} are latents that lie on no grid: {method} instead of {wanted}")
    return method


def _kept(
    path: Path, policy: VLAPolicy, image: np.ndarray, instruction: str, target: Target, method: str, args: Args
) -> tuple[Attribution, Faithfulness | None]:
    """One picture's attribution and curves, read from the work folder where an earlier call has left them."""
    import numpy as np

    from probes.attribution import Attribution, Faithfulness, Lens, explain, faithfulness

    if path.is_file():
        held = folders.read_json(path)
        for part, names in ((held["map"], ("cells", "pixels")), (held["curves"] or {}, tuple(held["curves"] or ()))):
            part.update({name: np.array(part[name]) for name in names if part[name] is not None})
        return Attribution(**held["map"]), Faithfulness(**held["curves"]) if held["curves"] else None
    lens = Lens(policy, image, instruction, target)
    one = explain(lens, method, batch_size=args.batch_size)
    curve = None
    if args.orders:
        curve = faithfulness(lens, one, seed=args.seed, orders=args.orders, batch_size=args.batch_size)
    folders.write_json(path, {"map": vars(one), "curves": vars(curve) if curve else None})
    return one, curve


def _sanity(
    args: Args, folder: Path, policy: VLAPolicy, images: np.ndarray, instruction: str, target: Target,
    before: list[Attribution], bar: Any,
) -> Any:  # fmt: skip
    """Maps after weights were drawn anew, as far from the answer as the stage says; `policy` is changed."""
    import torch

    from probes.attribution import Lens, explain, randomised, sanity_frame
    from vlm4vla_core.backbone import load_backbone
    from vlm4vla_core.policy import VLAPolicy

    fresh = load_backbone(folder, init="scratch", seed=args.seed + 1, dtype=torch.float32).to(policy.backbone.device)
    after: dict[str, list[Attribution]] = {}
    for stage, changed in randomised(policy, VLAPolicy(fresh, policy.config, seed=args.seed + 1)):
        after[stage] = []
        for image, old in zip(images, before, strict=True):
            options = {"max_steps": old.n_steps} if old.n_steps else {}
            lens = Lens(changed, image, instruction, target)
            after[stage].append(explain(lens, old.method, batch_size=args.batch_size, strict=False, **options))
            bar.update()
    return sanity_frame(before, after)


def _write(
    args: Args, store: EpisodeStore, steps: list[int], images: np.ndarray, instruction: str, target: Target,
    found: list[Attribution], curves: list[Any], sane: Any, config: dict[str, Any], inputs: dict[str, str],
) -> None:  # fmt: skip
    import numpy as np
    import pandas as pd
    from PIL import Image
    from safetensors.numpy import save_file

    from probes import figures_attribution as figures
    from probes.style import save_figure
    from probes.verbs.shared import short_name, show, write_result
    from probes.weights import model_source

    rows = []
    for step, one, curve in zip(steps, found, curves, strict=True):
        row: dict[str, Any] = {
            "step": step,
            "value": one.value,
            "baseline": one.baseline,
            "sum": float(one.cells.sum()),
        }
        row |= {"delta": one.delta, "n_steps": one.n_steps, "complete": one.complete} if one.n_steps else {}
        rows.append(row | (curve.areas() if curve else {}))
    table, method = pd.DataFrame(rows), found[0].method
    maps = [one.cells if one.pixels is None else one.pixels for one in found]
    reach, name = figures.reach_of(maps), short_name(args.checkpoint)
    with folders.new_folder(args.out, KIND) as folder:
        table.to_parquet(folder / "pictures.parquet")
        tensors = {"cells": np.stack([one.cells for one in found])}
        if found[0].pixels is not None:
            tensors["pixels"] = np.stack(maps)
        save_file(tensors, folder / "maps.safetensors")
        (folder / "overlays").mkdir()
        for step, image, scores in zip(steps, images, maps, strict=True):
            Image.fromarray(figures.overlay(image, scores, reach)).save(folder / "overlays" / f"step-{step:04d}.png")
        title = f"{name}: {method} of {target.name}, chunk step {target.step}; “{instruction}”"
        captions = [f"step {step}: {target.name} {one.value:+.3f}" for step, one in zip(steps, found, strict=True)]
        sheet = figures.contact_sheet(images, maps, captions, title=title, unit=target.unit)
        save_figure(sheet, folder / "sheet", dpi=150)
        if curves[0]:
            save_figure(figures.faithfulness_figure(curves, unit=target.unit), folder / "faithfulness")
        if sane is not None:
            sane.to_parquet(folder / "sanity.parquet")
            save_figure(figures.sanity_figure(sane), folder / "sanity")
        write_result(
            folder / "attribution.json", KIND, config=config, inputs=inputs, label=name, method=method,
            target={"name": target.name, "chunk_step": target.step, "unit": target.unit}, instruction=instruction,
            baseline="mean colour" if method in ("ig-pixels", "occlusion") else "mean image token",
            pictures=table.to_dict("records"), sanity=[] if sane is None else sane.to_dict("records"),
        )  # fmt: skip
        origin = {"model": model_source(args.checkpoint), "data": [store.manifest["source"]]}
        folders.write_manifest(folder, KIND, config=config, inputs=inputs, origin=origin)
    print(f"{method} of {target.name} ({target.unit}), episode {args.episode}: “{instruction}”")
    print(show(table, digits=4))
    if curves[0]:
        print("deletion (smaller is better), insertion (larger is better): areas; p: share of random orders as good")
    if sane is not None:
        print("rank correlation of the maps with those of the same policy after weights were drawn anew, cumulatively")
        print(show(sane))
    print(f"contact sheet, overlays, curves and tables in {args.out}")


def _json(args: Args) -> None:
    if args.json:
        folders.write_json(args.json, folders.read_json(args.out / "attribution.json"))
