"""The measurements of `vlm4vla diverge`, each into the same collection of tables, figures and words.

Trap: every part draws its own batches from the seed; two parts never see the same ones on purpose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from probes.divergence import WeightDivergence
    from probes.parting import Parting
    from probes.trajectories import Trajectories
    from probes.verbs.diverge import Args
    from vlm4vla_core.episodes.store import EpisodeStore
    from vlm4vla_core.policy import VLAPolicy
    from vlm4vla_core.vqa.files import QuestionFile


@dataclass
class Found:
    """Tables (name -> frame), figures (name -> figure), and further JSON values."""

    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)


def store_fingerprint(store: EpisodeStore | QuestionFile) -> str:
    """Names the content of a store or of question files."""
    from vlm4vla_core.vqa import files

    return files.fingerprint(store.path) if isinstance(store, files.QuestionFile) else store.fingerprint


def source_of(store: EpisodeStore | QuestionFile) -> str:
    """Where the data come from, for badges."""
    return str(store.manifest["source"]) if hasattr(store, "manifest") else "question files"


# --- weights ----------------------------------------------------------------------------------------------


def weights(args: Args, paths: Trajectories | None) -> tuple[WeightDivergence, pd.DataFrame, str]:
    """The comparison, its table with the ceilings of both arms, and where these come from."""
    from probes.divergence import weight_divergence
    from probes.verbs.shared import short_name
    from vlm4vla_core.progress import progress

    with progress(what="weights", unit="parameter") as bar:
        found = weight_divergence(args.base, args.vlm, args.vla, progress=bar.update)
    frame = found.to_frame()
    known = paths.same_arm() if paths else None
    told = []
    for side, path, twin in (("a", args.vlm, args.vlm_twin), ("c", args.vla, args.vla_twin)):
        ceiling = known[f"same_{side}"] if known is not None else None
        source = "seeds of the recorded paths"
        if twin:
            other = weight_divergence(args.base, path, twin).to_frame()
            ceiling, source = other.set_index("group")["cosine"], short_name(twin)
        frame[f"ceiling_{side}"] = float("nan") if ceiling is None else frame["group"].map(ceiling)
        missing = ceiling is None or not frame[f"ceiling_{side}"].notna().any()
        told.append(f"{side.upper()}: {'missing, a single seed' if missing else source}")
    return found, frame, "; ".join(told)


def spectra(args: Args, found: Found, total: int) -> None:
    """Effective ranks of both changes and the overlap of their leading directions."""
    from probes.spectra import spectral_divergence
    from vlm4vla_core.progress import progress

    with progress(total=total, what="spectra", unit="tensor") as bar:
        result = spectral_divergence(args.base, args.vlm, args.vla, seed=args.seed, progress=bar.update)
    found.tables["spectra"] = result.to_frame()


# --- gradients --------------------------------------------------------------------------------------------


def gradients(args: Args, stores: Mapping[str, Any], config: Mapping[str, Any], found: Found) -> pd.DataFrame:
    """Gradients at the base and along training, and interference at the base; the base's own table."""
    import pandas as pd

    from probes.divergence import gradient_divergence
    from probes.figures_divergence import gradients_figure
    from probes.interference import interference
    from probes.losses import measuring, policy_losses
    from probes.verbs.shared import few_threads, short_name, use_device
    from vlm4vla_core.progress import progress

    data, device = (stores["vlm_data"], stores["vla_data"]), use_device(args.device)
    parts = []
    for path in (args.base, *args.at):
        policy, head = _policy_at(path, args.vla, args.seed)
        few_threads(policy)
        policy.to(device)
        with progress(total=2 * (2 + args.fast) * args.batches, what="gradients", unit="half-batch") as bar:
            measured = gradient_divergence(
                policy, *data, batches=args.batches, batch_size=args.batch_size, pilots=args.pilots, fast=args.fast,
                kinds=config["questions"], seed=args.seed, memory_gb=args.memory_gb, progress=bar.update,
            )  # fmt: skip
        frame = measured.long_frame()
        frame.insert(0, "at", "base" if path is args.base else short_name(path))
        parts.append(frame)
        if path is not args.base:
            continue
        at_base = measured.to_frame()
        found.told |= {"head": head, "all_pairs": measured.all_pairs, "gradients": at_base.to_dict("records")}
        if args.interfere:
            losses = policy_losses(
                policy, *data, batch_size=args.batch_size, seed=args.seed + 1, fast=args.fast, kinds=config["questions"]
            )
            every = {"language": losses.language, "action": losses.action}
            every |= {"fast": losses.fast} if losses.fast else {}
            moving = {name: losses.parameters[name] for name in losses.groups}
            with measuring(policy):
                found.tables["interference"] = interference(moving, every, batches=args.interfere).to_frame()
    found.tables |= {"gradients": at_base, "gradients_all": pd.concat(parts, ignore_index=True)}
    found.figures["gradients"] = gradients_figure(found.tables["gradients_all"])
    return at_base


def _policy_at(base: Path, vla: Path, seed: int) -> tuple[VLAPolicy, str]:
    """The base as a policy, and which head the action loss goes through."""
    from vlm4vla_core import checkpoint
    from vlm4vla_core.backbone import load_backbone
    from vlm4vla_core.policy import PolicyConfig, VLAPolicy

    if checkpoint.looks_like_one(base):
        folder = checkpoint.resolve(base)
        if folders.read_json(folder / checkpoint.CONFIG)["policy"] is not None:
            return VLAPolicy.load(folder), "action loss through the base's own head"
    described = folders.read_json(checkpoint.resolve(vla) / checkpoint.CONFIG)["policy"]
    if described is None:
        fix = "give a policy checkpoint as --vla"
        raise InputError("neither the base nor the VLA checkpoint has a policy head", where=vla, fix=fix)
    policy = VLAPolicy(load_backbone(base, language_head=True), PolicyConfig.from_dict(described), seed=seed)
    return policy, f"action loss through a fresh head, drawn from seed {seed}"


# --- representations --------------------------------------------------------------------------------------


def representations(args: Args, store: EpisodeStore, found: Found) -> list[str]:
    """Debiased CKA of base, A, C, other seeds and --at, layer by layer, and readouts carried over from the base."""
    import numpy as np

    from probes.features import Features
    from probes.figures_divergence import representations_figure
    from probes.targets import target_of
    from probes.transfer import transfer
    from probes.verbs import features as verb
    from probes.verbs.shared import short_name

    paths = {"base": args.base, "A": args.vlm, "C": args.vla}
    paths |= {name: path for name, path in (("A, other seed", args.vlm_twin), ("C, other seed", args.vla_twin)) if path}
    paths |= {short_name(path): path for path in args.at} | {"untrained": args.base}
    made = {}
    for name, path in paths.items():
        folder = args.out.with_name(f"{args.out.name}-features") / folders.fingerprint([str(path.resolve()), name])[:8]
        verb.make(
            verb.Args(
                path, store.path, folder, layers=args.layers, pool=args.pool, max_frames=args.max_frames,
                seed=args.seed, scratch=name == "untrained", device=args.device,
            )
        )  # fmt: skip
        made[name] = Features.open(folder)
        made["base"].same_images(made[name])
    index = made["base"].index
    target = target_of(store, args.target, camera=made["base"].camera, rows=index["row"].to_numpy())
    known = np.flatnonzero(target.defined[index["row"]])
    if not len(known):
        fix = "use more frames"
        raise InputError(f"target '{args.target}' is defined in none of these frames", where=store.path, fix=fix)
    rows, episodes = (index[name].to_numpy()[known] for name in ("row", "episode"))
    result = transfer(
        {name: {layer: one.layer(layer)[known] for layer in one.layers} for name, one in made.items()},
        target.values[rows], episodes, content=np.asarray(store.content)[episodes], classes=target.classes,
        pairs=[("A", "C"), *((name[0], name) for name in made if name.endswith(", other seed"))],
        metres=target.metres, seed=args.seed,
    )  # fmt: skip
    scores, alike = result.to_frame(), result.similarity_frame()
    scores.insert(0, "target", args.target)
    found.tables |= {"readouts": scores, "cka": alike}
    found.figures["representations"] = representations_figure(scores, alike)
    return [_in_words(name, scores, alike) for name in ("A", "C")]


def _in_words(model: str, scores: pd.DataFrame, alike: pd.DataFrame) -> str:
    """Of the last layer: how alike a model is to the base, and what a readout loses on the way."""
    layer = scores["layer"].iloc[-1]
    pair = alike.set_index(["a", "b", "layer"])["cka"]
    rows = scores[scores["layer"] == layer].set_index(["model", "readout"])
    carried, own = rows.loc[(model, "transferred")], rows.loc[(model, "own")]
    ceiling = pair.get((model, f"{model}, other seed", layer))
    told = f"ceiling {ceiling:.2f}" if ceiling is not None else "no ceiling: a single seed"
    lost = f"{carried['change_low']:+.2f} to {carried['change_high']:+.2f}"
    return (
        f"representations, {model} at {layer}: CKA with the base {pair['base', model, layer]:.2f} ({told}); the base's "
        f"readout of {scores['target'].iloc[0]} scores {carried['score']:.2f} there ({lost} against the base), "
        f"its own {own['score']:.2f}"
    )


# --- lines ------------------------------------------------------------------------------------------------


def interpolation(args: Args, stores: Mapping[str, Any], config: Mapping[str, Any], found: Found) -> None:
    """Both losses on the lines between the checkpoints, on those to random changes as long, and on the plane."""
    from probes.figures_divergence import lines_figure, plane_figure
    from probes.interpolation import GRID, losses_between, random_ends, shared_weights, task_arithmetic
    from probes.losses import measuring, policy_losses
    from probes.verbs.shared import few_threads, use_device
    from vlm4vla_core.progress import progress

    policy, _ = _policy_at(args.vla, args.vla, args.seed)
    found.told["lines_head"] = "action loss through the VLA checkpoint's query and head at every point"
    few_threads(policy)
    policy.to(use_device(args.device))
    losses = policy_losses(
        policy, stores["vlm_data"], stores["vla_data"], batch_size=args.batch_size, seed=args.seed + 2,
        kinds=config["questions"],
    )  # fmt: skip
    every, batches = {"language": losses.language, "action": losses.action}, max(2, args.batches // 2)
    twins = [(f"{a}→{a}'", path, twin) for a, path, twin in
             (("A", args.vlm, args.vlm_twin), ("C", args.vla, args.vla_twin)) if twin]  # fmt: skip
    total = (5 + len(twins)) * args.interpolate - 4 + len(GRID) ** 2
    planes = []
    with measuring(policy), progress(total=total, what="lines", unit="point") as bar:
        way: dict[str, Any] = {"batches": batches, "progress": bar.update}
        with shared_weights(policy.backbone, args.base, args.vlm, args.vla) as ends:
            planes.append(losses_between(losses.parameters, ends, every, points=args.interpolate, **way))
            drawn = random_ends(ends, seed=args.seed)
            lines = {"B→random A": ((0.0, 0.0), (1.0, 0.0)), "B→random C": ((0.0, 0.0), (0.0, 1.0))}
            planes.append(losses_between(losses.parameters, drawn, every, points=args.interpolate, lines=lines, **way))
            plane = task_arithmetic(losses.parameters, ends, every, **way)
        for name, path, twin in twins:
            with shared_weights(policy.backbone, args.base, path, twin) as ends:
                lines = {name: ((1.0, 0.0), (0.0, 1.0))}
                planes.append(
                    losses_between(losses.parameters, ends, every, points=args.interpolate, lines=lines, **way)
                )
    import pandas as pd

    found.tables["lines"] = pd.concat([one.to_frame() for one in planes], ignore_index=True)
    found.tables["barriers"] = pd.concat([one.barriers(args.seed) for one in planes], ignore_index=True)
    found.tables["plane"] = plane.to_frame()
    found.figures["lines"] = lines_figure(found.tables["lines"], found.tables["barriers"])
    found.figures["plane"] = plane_figure(found.tables["plane"])


# --- paths ------------------------------------------------------------------------------------------------


def trajectories(args: Args, paths: Trajectories, found: Found) -> Parting:
    """Shared phase and divergence point of recorded paths, and their PCA beside its null."""
    import pandas as pd

    from probes.figures_divergence import parting_figure, path_figure
    from probes.parting import parting
    from probes.trajectories import path_shares

    modules = paths.modules()
    result = parting(modules, paths.arms, paths.seeds, paths.steps, seed=args.seed)
    shares = path_shares(modules["all"], seed=args.seed)
    pca = pd.DataFrame({"component": [1, 2, 3], "share": shares.shares, "low": shares.low, "high": shares.high})
    points = pd.DataFrame(shares.points.reshape(-1, 2), columns=["first", "second"])
    points.insert(0, "step", [0, *paths.steps.tolist()] * len(paths.runs))
    points.insert(0, "arm", [arm for arm in paths.arms for _ in range(len(paths.steps) + 1)])
    points.insert(0, "run", [run for run in paths.runs for _ in range(len(paths.steps) + 1)])
    found.tables |= {"trajectory": result.to_frame(), "parting": result.verdicts(), "path": points, "path_shares": pca}
    found.tables["moved"] = paths.sizes()
    found.told["trajectory_left_out"] = list(paths.left_out)
    found.figures["trajectory"] = parting_figure(found.tables["trajectory"], found.tables["parting"])
    found.figures["path"] = path_figure(shares.points, pca, paths.arms)
    return result
