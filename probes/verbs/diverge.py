"""Measure how VLM training and VLA training part: what they did to the weights, and where their gradients point.

Weights: B is the base both started from, A the VLM-trained and C the VLA-trained checkpoint; per module group the
relative size of both changes and the cosine between them. Gradients (with --vla-data): language loss and action loss at
the base (and --at), from independent half-batches; the naive cosine, and the one corrected for mini-batch noise, raw
and as AdamW's steps. --trajectory: runs with recorded snapshots, four seeds per arm, for the step after which the arms
part. --interpolate: both losses on the lines between the three.

Example: vlm4vla diverge --base runs/walk/vla/checkpoints/step-000000 --vlm runs/walk/vlm --vla runs/walk/vla
         --vla-data runs/walk/demos --out runs/walk/divergence
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
    from probes.trajectories import PathShares, Trajectories
    from vlm4vla_core.episodes.store import EpisodeStore
    from vlm4vla_core.policy import VLAPolicy


@dataclass(frozen=True)
class Args:
    base: Path
    """B: checkpoint or run folder, published folder or safetensors file that both runs started from."""
    vlm: Path
    """A: the VLM-trained checkpoint (its newest one, for a run)."""
    vla: Path
    """C: the VLA-trained checkpoint."""
    out: Path
    """Folder to write: tables, figures, JSON."""
    vla_data: Path | None = None
    """Episode store of demonstrations for the action loss; without it, gradients are not measured."""
    vlm_data: Path | None = None
    """Episode store that questions are generated from; by default the same one."""
    at: tuple[Path, ...] = ()
    """Further checkpoints along training at which the gradients are measured too."""
    fast: bool = False
    """The loss of FAST action tokens as a third objective."""
    batches: int = 16
    """Independent batches per objective; intervals are over them."""
    batch_size: int = 16
    """Frames per batch, in two halves."""
    pilots: int = 4
    """Batches for AdamW's second moments; 0 leaves its steps out."""
    interfere: int = 4
    """Batches for what a step on one objective does to the other's loss; 0 leaves it out."""
    trajectory: tuple[Path, ...] = ()
    """Runs of both arms from this base, trained with --snapshots sketch; at least four seeds per arm."""
    interpolate: int = 0
    """Points on each line between the three checkpoints, and the plane of both changes (0: none; needs --vla-data)."""
    spectra: bool = False
    """Effective ranks of the changes and the overlap of their leading directions (slow for large models)."""
    memory_gb: float = 2.0
    """Keep all gradients for all-pairs products when they fit into this."""
    seed: int = 0
    """Seed of the batches, of the resamples, and of a fresh head where the base has none."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU when there is one."""
    json: Path | None = None
    """Also write everything as JSON here."""


_SETTINGS = ("batches", "batch_size", "seed", "memory_gb", "fast", "pilots", "interfere", "interpolate", "spectra")


@dataclass
class _Found:
    """Tables (name -> frame), figures (name -> figure), further JSON values, and lines to print."""

    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)


def run(args: Args) -> int:
    from probes.verbs.shared import check_seed
    from probes.weights import model_source, weights_fingerprint

    _check(args)
    check_seed(args.seed)
    config = {name: getattr(args, name) for name in _SETTINGS}
    inputs = {name: weights_fingerprint(getattr(args, name)) for name in ("base", "vlm", "vla")}
    inputs |= {f"at {path}": weights_fingerprint(path) for path in args.at}
    if args.trajectory:
        from probes.trajectories import trajectories_fingerprint

        inputs["trajectory"] = trajectories_fingerprint(args.trajectory)
    stores: dict[str, EpisodeStore] = {}
    if args.vla_data:
        from vlm4vla_core.episodes.store import EpisodeStore

        stores = {"vla_data": EpisodeStore.open(args.vla_data)}
        stores["vlm_data"] = EpisodeStore.open(args.vlm_data) if args.vlm_data else stores["vla_data"]
        inputs |= {name: store.fingerprint for name, store in stores.items()}
    if folders.current(args.out, "divergence", config=config, inputs=inputs):
        print(f"{args.out} is up to date")
        _json(args)
        return 0

    from probes.divergence import weight_divergence
    from probes.figures_probe import divergence_figure
    from probes.glance import glance

    weights, found, parting = weight_divergence(args.base, args.vlm, args.vla), _Found(), None
    if args.trajectory:
        parting = _trajectories(args, found)
    frame = weights.to_frame()
    found.told["verdict"] = glance(frame, parting)
    gradients = _gradients(args, stores, found) if stores else None
    found.told.setdefault("head", "no gradients: --vla-data was not given")
    if args.spectra:
        found.tables["spectra"] = _spectra(args, len(weights.parameters))
    if args.interpolate:
        _interpolation(args, stores, found)
    found.tables |= {"weights": frame, "kinds": weights.kind_frame(), "parameters": weights.parameter_frame()}
    found.figures["divergence"] = divergence_figure(frame, gradients)
    origin = {"model": model_source(args.base), "data": sorted({store.manifest["source"] for store in stores.values()})}
    _write(args.out, weights, found, config, inputs, origin)
    _print(weights, found)
    print(f"tables, figures and JSON in {args.out}")
    _json(args)
    return 0


def _check(args: Args) -> None:
    if args.vlm_data and not args.vla_data:
        raise InputError("--vlm-data without --vla-data", fix="gradients need both objectives; give --vla-data too")
    for name in ("interpolate", "at", "fast"):
        if getattr(args, name) and not args.vla_data:
            raise InputError(f"--{name} without --vla-data", fix="losses need demonstrations; give --vla-data too")
    for name, least in (("pilots", 0), ("interfere", 2), ("interpolate", 3)):
        if getattr(args, name) and getattr(args, name) < max(least, 1):
            raise InputError(f"--{name} {getattr(args, name)}", fix=f"use {least} or more, or 0 to leave it out")


def _gradients(args: Args, stores: Mapping[str, EpisodeStore], found: _Found) -> pd.DataFrame:
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
                seed=args.seed, memory_gb=args.memory_gb, progress=bar.update,
            )  # fmt: skip
        frame = measured.long_frame()
        frame.insert(0, "at", "base" if path is args.base else short_name(path))
        parts.append(frame)
        if path is not args.base:
            continue
        at_base = measured.to_frame()
        found.told |= {"head": head, "all_pairs": measured.all_pairs, "gradients": at_base.to_dict("records")}
        if args.interfere:
            losses = policy_losses(policy, *data, batch_size=args.batch_size, seed=args.seed + 1, fast=args.fast)
            every = {"language": losses.language, "action": losses.action}
            every |= {"fast": losses.fast} if losses.fast else {}
            moving = {name: losses.parameters[name] for name in losses.groups}
            with measuring(policy):
                found.tables["interference"] = interference(moving, every, batches=args.interfere).to_frame()
    found.tables |= {"gradients": at_base, "gradients_all": pd.concat(parts, ignore_index=True)}
    found.figures["gradients"] = gradients_figure(found.tables["gradients_all"])
    return at_base


def _spectra(args: Args, total: int) -> pd.DataFrame:
    from probes.spectra import spectral_divergence
    from vlm4vla_core.progress import progress

    with progress(total=total, what="spectra", unit="tensor") as bar:
        return spectral_divergence(args.base, args.vlm, args.vla, seed=args.seed, progress=bar.update).to_frame()


def _interpolation(args: Args, stores: Mapping[str, EpisodeStore], found: _Found) -> None:
    from probes.figures_divergence import lines_figure
    from probes.interpolation import GRID, losses_between, shared_weights, task_arithmetic
    from probes.losses import measuring, policy_losses
    from probes.verbs.shared import few_threads, use_device
    from vlm4vla_core.progress import progress

    policy, _ = _policy_at(args.vla, args.vla, args.seed)
    found.told["lines_head"] = "action loss through the VLA checkpoint's query and head at every point"
    few_threads(policy)
    policy.to(use_device(args.device))
    losses = policy_losses(
        policy, stores["vlm_data"], stores["vla_data"], batch_size=args.batch_size, seed=args.seed + 2
    )
    every, batches = {"language": losses.language, "action": losses.action}, max(2, args.batches // 2)
    total = 3 * args.interpolate - 3 + len(GRID) ** 2
    with (
        shared_weights(policy.backbone, args.base, args.vlm, args.vla) as ends,
        measuring(policy),
        progress(total=total, what="lines", unit="point") as bar,
    ):
        way = {"points": args.interpolate, "batches": batches, "progress": bar.update}
        lines = losses_between(losses.parameters, ends, every, **way)
        plane = task_arithmetic(losses.parameters, ends, every, batches=batches, progress=bar.update)
    found.tables |= {"lines": lines.to_frame(), "barriers": lines.barriers(args.seed), "plane": plane.to_frame()}
    found.figures["lines"] = lines_figure(found.tables["lines"], found.tables["barriers"])


def _trajectories(args: Args, found: _Found) -> Parting:
    import pandas as pd

    from probes.figures_divergence import parting_figure, path_figure
    from probes.parting import parting
    from probes.trajectories import path_shares, read_trajectories

    paths: Trajectories = read_trajectories(args.trajectory)
    modules = paths.modules()
    result = parting(modules, paths.arms, paths.seeds, paths.steps, seed=args.seed)
    shares: PathShares = path_shares(modules["all"], seed=args.seed)
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


def _write(
    out: Path, weights: WeightDivergence, found: _Found, config: dict[str, Any], inputs: dict[str, str],
    origin: dict[str, Any],
) -> None:  # fmt: skip
    from probes.divergence import describe
    from probes.style import save_figure
    from probes.verbs.shared import write_result

    whole = {"weights", "interference", "barriers", "lines", "plane", "parting", "path_shares", "gradients_all"}
    told = {name: table.to_dict("records") for name, table in found.tables.items() if name in whole}
    with folders.new_folder(out, "divergence") as folder:
        for name, table in found.tables.items():
            table.to_parquet(folder / f"{name}.parquet")
        for name, figure in found.figures.items():
            save_figure(figure, folder / name)
        write_result(
            folder / "divergence.json", "divergence", config=config, inputs=inputs,
            **{"gradients": [], "all_pairs": None, **told, **found.told},
            total=describe(weights.total), spread=weights.spread(),
            unmatched=list(weights.unmatched), excluded=list(weights.excluded),
        )  # fmt: skip
        folders.write_manifest(folder, "divergence", config=config, inputs=inputs, origin=origin)


def _print(weights: WeightDivergence, found: _Found) -> None:
    from probes.verbs.shared import show

    total = weights.total
    print("weights: A is VLM-trained, C is VLA-trained; null_sd: of the cosine of two random changes; chance sign: 0.5")
    print(show(weights.to_frame(), digits=4))
    spread = weights.spread()
    print(f"spread over {spread['a']:.1f} groups (A) and {spread['c']:.1f} (C); parameters: {spread['params']:.1f}")
    for label, moved in (("A", total.a), ("C", total.c)):
        if moved == 0:
            print(f"{label} is equal to the base: its change is zero and the cosine is undefined")
    if weights.excluded:
        print(f"left out, new in the policy: {len(weights.excluded)} parameters ({weights.excluded[0]}, …)")
    if weights.unmatched:
        shown = "; ".join(weights.unmatched[:5]) + ("; …" if len(weights.unmatched) > 5 else "")
        print(f"not compared, {len(weights.unmatched)} names are not in all three: {shown}")
    if "gradients_all" not in found.tables:
        print(found.told["head"])
    else:
        pairs = "all pairs of half-batches" if found.told["all_pairs"] else "halves of the same batch only"
        print(f"gradients: products of {pairs}; {found.told['head']}; A language, C action, F FAST tokens")
        frame = found.tables["gradients_all"].drop(columns=["n_params"])
        print(show(frame if frame["verdict"].any() else frame.drop(columns=["verdict"])))
    titles = {
        "interference": "change of the losses by one step, and back",
        "spectra": "spectra of the changes",
        "barriers": "barriers on the lines between the checkpoints",
        "path_shares": "PCA of the joint path, beside walks without a plan",
    }
    for name, title in titles.items():
        if name in found.tables:
            print(f"{title}\n{show(found.tables[name], digits=4)}")
    for words in found.told.get("trajectory_left_out", []):
        print(f"left out of the paths: {words}")
    print("\n".join(["at a glance", *(f"  {line}" for line in found.told["verdict"])]))


def _json(args: Args) -> None:
    if args.json:
        folders.write_json(args.json, folders.read_json(args.out / "divergence.json"))
