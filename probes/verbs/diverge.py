"""Measure how VLM training and VLA training part: what they did to the weights, and where their gradients point.

Weights: B is the base both started from, A the VLM-trained and C the VLA-trained checkpoint; per module group the
relative size of both changes and the cosine between them. Gradients (with --vla-data): language loss and action loss at
the base, from independent half-batches; the naive cosine, and the one corrected for mini-batch noise.

Example: vlm4vla diverge --base runs/walk/vla/checkpoints/step-000000 --vlm runs/walk/vlm --vla runs/walk/vla
         --vla-data runs/walk/demos --out runs/walk/divergence
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from probes.divergence import WeightDivergence
    from probes.gradients import GradientDivergence
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
    """Folder to write: tables, figure, JSON."""
    vla_data: Path | None = None
    """Episode store of demonstrations for the action loss; without it, gradients are not measured."""
    vlm_data: Path | None = None
    """Episode store that questions are generated from; by default the same one."""
    batches: int = 16
    """Independent batches per objective; intervals are over them."""
    batch_size: int = 16
    """Frames per batch, in two halves."""
    memory_gb: float = 2.0
    """Keep all gradients for all-pairs products when they fit into this."""
    seed: int = 0
    """Seed of the batches, of the resamples, and of a fresh head where the base has none."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU when there is one."""
    json: Path | None = None
    """Also write everything as JSON here."""


def run(args: Args) -> int:
    from probes.verbs.shared import check_seed
    from probes.weights import model_source, weights_fingerprint

    check_seed(args.seed)
    if args.vlm_data and not args.vla_data:
        raise InputError("--vlm-data without --vla-data", fix="gradients need both objectives; give --vla-data too")
    config = {"batches": args.batches, "batch_size": args.batch_size, "seed": args.seed, "memory_gb": args.memory_gb}
    inputs = {name: weights_fingerprint(getattr(args, name)) for name in ("base", "vlm", "vla")}
    stores = {}
    if args.vla_data:
        from vlm4vla_core.episodes.store import EpisodeStore

        stores = {"vla_data": EpisodeStore.open(args.vla_data)}
        stores["vlm_data"] = EpisodeStore.open(args.vlm_data) if args.vlm_data else stores["vla_data"]
        inputs |= {name: store.fingerprint for name, store in stores.items()}
    if folders.current(args.out, "divergence", config=config, inputs=inputs):
        print(f"{args.out} is up to date")
        _json(args)
        return 0

    from probes.divergence import gradient_divergence, weight_divergence
    from probes.verbs.shared import few_threads, use_device
    from vlm4vla_core.progress import progress

    device = use_device(args.device)
    weights = weight_divergence(args.base, args.vlm, args.vla)
    gradients, head = None, "no gradients: --vla-data was not given"
    if stores:
        policy, head = _policy_at(args.base, args.vla, args.seed)
        few_threads(policy)
        with progress(total=4 * args.batches, what="gradients", unit="half-batch") as bar:
            gradients = gradient_divergence(
                policy.to(device), stores["vlm_data"], stores["vla_data"], batches=args.batches,
                batch_size=args.batch_size, seed=args.seed, memory_gb=args.memory_gb, progress=bar.update,
            )  # fmt: skip
    origin = {"model": model_source(args.base), "data": sorted({store.manifest["source"] for store in stores.values()})}
    _write(args.out, weights, gradients, head, config, inputs, origin)
    _print(weights, gradients, head)
    print(f"tables, figure and JSON in {args.out}")
    _json(args)
    return 0


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
    out: Path,
    weights: WeightDivergence,
    gradients: GradientDivergence | None,
    head: str,
    config: dict[str, Any],
    inputs: dict[str, str],
    origin: dict[str, Any],
) -> None:
    from probes.divergence import describe
    from probes.figures_probe import divergence_figure
    from probes.style import save_figure
    from probes.verbs.shared import write_result

    frame, gradient_frame = weights.to_frame(), gradients.to_frame() if gradients else None
    with folders.new_folder(out, "divergence") as folder:
        frame.to_parquet(folder / "weights.parquet")
        weights.parameter_frame().to_parquet(folder / "parameters.parquet")
        if gradient_frame is not None:
            gradient_frame.to_parquet(folder / "gradients.parquet")
        save_figure(divergence_figure(frame, gradient_frame), folder / "divergence")
        write_result(
            folder / "divergence.json", "divergence", config=config, inputs=inputs,
            weights=frame.to_dict("records"), total=describe(weights.total),
            unmatched=list(weights.unmatched), excluded=list(weights.excluded),
            gradients=[] if gradient_frame is None else gradient_frame.to_dict("records"),
            head=head, all_pairs=gradients.all_pairs if gradients else None,
        )  # fmt: skip
        folders.write_manifest(folder, "divergence", config=config, inputs=inputs, origin=origin)


def _print(weights: WeightDivergence, gradients: GradientDivergence | None, head: str) -> None:
    from probes.verbs.shared import show

    total = weights.total
    print("weights: A is VLM-trained, C is VLA-trained; null_sd: of the cosine of two random changes")
    print(show(weights.to_frame(), digits=4))
    for label, moved in (("A", total.a), ("C", total.c)):
        if moved == 0:
            print(f"{label} is equal to the base: its change is zero and the cosine is undefined")
    if weights.excluded:
        print(f"left out, new in the policy: {len(weights.excluded)} parameters ({weights.excluded[0]}, …)")
    if weights.unmatched:
        shown = "; ".join(weights.unmatched[:5]) + ("; …" if len(weights.unmatched) > 5 else "")
        print(f"not compared, {len(weights.unmatched)} names are not in all three: {shown}")
    if gradients is None:
        print(head)
        return
    pairs = "all pairs of half-batches" if gradients.all_pairs else "halves of the same batch only"
    print(f"gradients at the base: {gradients.batches} batches per loss, products of {pairs}; {head}")
    frame = gradients.to_frame().drop(columns=["n_params"])
    print(show(frame if frame["verdict"].any() else frame.drop(columns=["verdict"])))


def _json(args: Args) -> None:
    if args.json:
        folders.write_json(args.json, folders.read_json(args.out / "divergence.json"))
