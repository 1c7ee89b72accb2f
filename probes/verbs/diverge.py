"""Measure how VLM training and VLA training part: in weights, gradients, representations and along the way.

B is the base both started from, A the VLM-trained and C the VLA-trained checkpoint. Weights: per module group the size
of both changes and the cosine between them; --vlm-twin and --vla-twin (other seeds) are its ceilings. With --vla-data:
gradients of both losses at the base (and --at), corrected for mini-batch noise, raw and as AdamW's steps; --features:
debiased CKA and readouts carried over, by layer; --interpolate: both losses on the lines between the three.
--trajectory: runs with recorded snapshots, four seeds per arm, for the step after which the arms part.

Example: vlm4vla diverge --base runs/walk/vla/checkpoints/step-000000 --vlm runs/walk/vlm --vla runs/walk/vla
         --vla-data runs/walk/demos --features --out runs/walk/divergence
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from probes.divergence import WeightDivergence
    from probes.verbs.diverge_parts import Found


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
    vlm_twin: Path | None = None
    """Another seed of A's training: the ceiling of every comparison with A."""
    vla_twin: Path | None = None
    """Another seed of C's training."""
    vla_data: Path | None = None
    """Episode store of demonstrations for the action loss; without it, only weights are compared."""
    vlm_data: Path | None = None
    """Episode store that questions are generated from, or question files; by default the store of demonstrations."""
    questions: tuple[str, ...] = ()
    """Kinds of questions, as in `vlm4vla train`; by default those that A's run was trained with, where it says so."""
    at: tuple[Path, ...] = ()
    """Further checkpoints along training at which gradients and representations are measured too."""
    fast: bool = False
    """The loss of FAST action tokens as a third objective."""
    batches: int = 16
    """Independent batches per objective; intervals are over them. 0 leaves gradients out."""
    batch_size: int = 16
    """Frames per batch, in two halves."""
    pilots: int = 4
    """Batches for AdamW's second moments; 0 leaves its steps out."""
    interfere: int = 4
    """Batches for what a step on one objective does to the other's loss; 0 leaves it out."""
    features: bool = False
    """Representations: debiased CKA between base, A, C and --at, and readouts carried over from the base."""
    layers: tuple[str, ...] = ("vision.0..-1", "projector")
    """Of --features: layers (see `vlm4vla features`)."""
    pool: Literal["mean", "grid", "attn", "cls"] = "grid"
    """Of --features: pooling."""
    target: str = "gripper_xyz"
    """Of --features: what is read out (see `vlm4vla probe`)."""
    max_frames: int | None = 1000
    """Of --features: look at this many frames, drawn without replacement."""
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


_PATHS = {"base", "vlm", "vla", "out", "vlm_twin", "vla_twin", "vla_data", "vlm_data", "at", "trajectory", "json"}


def run(args: Args) -> int:
    made = make(args)
    if made is None:
        print(f"{args.out} is up to date")
    else:
        _print(*made)
        print(f"tables, figures and JSON in {args.out}")
    if args.json:
        folders.write_json(args.json, folders.read_json(args.out / "divergence.json"))
    return 0


def make(args: Args) -> tuple[WeightDivergence, Found] | None:
    """Measure what `args` ask for and write the folder; None when it is there already."""
    from probes.verbs.diverge_parts import store_fingerprint
    from probes.verbs.shared import check_seed
    from probes.weights import model_source, weights_fingerprint

    _check(args)
    check_seed(args.seed)
    config = {name: value for name, value in vars(args).items() if name not in _PATHS and name != "device"}
    config = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    config["questions"] = _questions(args)
    named = {name: getattr(args, name) for name in ("base", "vlm", "vla", "vlm_twin", "vla_twin")}
    inputs = {name: weights_fingerprint(path) for name, path in named.items() if path}
    inputs |= {f"at {path}": weights_fingerprint(path) for path in args.at}
    if args.trajectory:
        from probes.trajectories import trajectories_fingerprint

        inputs["trajectory"] = trajectories_fingerprint(args.trajectory)
    stores = _stores(args)
    inputs |= {name: store_fingerprint(store) for name, store in stores.items()}
    if folders.current(args.out, "divergence", config=config, inputs=inputs):
        return None

    from probes.figures_divergence import divergence_figure
    from probes.glance import glance
    from probes.verbs import diverge_parts as parts

    found, paths, parting = parts.Found(), None, None
    if args.trajectory:
        from probes.trajectories import read_trajectories

        paths = read_trajectories(args.trajectory)
        parting = parts.trajectories(args, paths, found)
    weights, frame, ceiling = parts.weights(args, paths)
    found.told |= {"ceilings": ceiling, "head": "no gradients: --vla-data was not given"}
    gradients = parts.gradients(args, stores, config, found) if stores and args.batches else None
    verdict = glance(frame, parting)
    if args.features and stores:
        verdict += parts.representations(args, stores["vla_data"], found)
    found.told["verdict"] = verdict
    if args.spectra:
        parts.spectra(args, found, len(weights.parameters))
    if args.interpolate:
        parts.interpolation(args, stores, config, found)
    found.tables |= {"weights": frame, "kinds": weights.kind_frame(), "parameters": weights.parameter_frame()}
    found.figures["divergence"] = divergence_figure(frame, gradients)
    origin = {"model": model_source(args.base), "data": sorted({parts.source_of(store) for store in stores.values()})}
    _write(args.out, weights, found, config, inputs, origin)
    return weights, found


def _check(args: Args) -> None:
    if args.vlm_data and not args.vla_data:
        raise InputError("--vlm-data without --vla-data", fix="gradients need both objectives; give --vla-data too")
    for name in ("interpolate", "at", "fast", "features", "questions"):
        if getattr(args, name) and not args.vla_data:
            raise InputError(f"--{name} without --vla-data", fix="losses need demonstrations; give --vla-data too")
    if args.features:
        from probes.targets import TARGETS
        from vlm4vla_core.errors import nearest

        if args.target not in TARGETS:
            raise InputError(f"unknown target '{args.target}'", fix=nearest(args.target, TARGETS))
    for name, least in (("batches", 2), ("pilots", 0), ("interfere", 2), ("interpolate", 3)):
        if getattr(args, name) and getattr(args, name) < max(least, 1):
            raise InputError(f"--{name} {getattr(args, name)}", fix=f"use {least} or more, or 0 to leave it out")


def _stores(args: Args) -> dict[str, Any]:
    """The data of both objectives: demonstrations, and a store or question files for the language loss."""
    if not args.vla_data:
        return {}
    from vlm4vla_core.episodes.store import EpisodeStore
    from vlm4vla_core.vqa.files import QuestionFile, question_files

    shown = EpisodeStore.open(args.vla_data)
    if not args.vlm_data:
        return {"vla_data": shown, "vlm_data": shown}
    opened = QuestionFile if question_files(args.vlm_data) else EpisodeStore
    return {"vla_data": shown, "vlm_data": opened.open(args.vlm_data)}


def _questions(args: Args) -> list[str]:
    """Kinds of questions of the language loss: those asked for, else those of A's run."""
    if args.questions:
        return list(args.questions)
    for folder in (args.vlm, args.vlm.parent.parent):
        if (folder / "run.json").is_file():
            config = folders.read_json(folder / "run.json").get("config", {})
            return list(config.get("questions", ())) if config.get("objective") == "language" else []
    return []


def _write(
    out: Path, weights: WeightDivergence, found: Found, config: dict[str, Any], inputs: dict[str, str],
    origin: dict[str, Any],
) -> None:  # fmt: skip
    from probes.divergence import describe
    from probes.style import save_figure
    from probes.verbs.shared import write_result

    whole = {"weights", "interference", "barriers", "lines", "plane", "parting", "path_shares", "gradients_all"}
    whole |= {"readouts", "cka"}
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


def _print(weights: WeightDivergence, found: Found) -> None:
    from probes.verbs.shared import show

    total = weights.total
    print("weights: A is VLM-trained, C is VLA-trained; null_sd: of the cosine of two random changes; chance sign: 0.5")
    print(show(found.tables["weights"], digits=4))
    print(f"ceilings (cosine of the changes by two seeds of one training): {found.told['ceilings']}")
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
        "cka": "debiased CKA of the representations (floor: 95 % of shuffled frames lie below)",
        "readouts": "readouts fitted to the base's features (transferred) or to own ones; change: to the base's",
        "spectra": "spectra of the changes",
        "barriers": "barriers on the lines between the checkpoints; random: to changes as long, drawn at random",
        "path_shares": "PCA of the joint path, beside walks without a plan",
    }
    for name, title in titles.items():
        if name in found.tables:
            print(f"{title}\n{show(found.tables[name], digits=4)}")
    for words in found.told.get("trajectory_left_out", []):
        print(f"left out of the paths: {words}")
    print("\n".join(["at a glance", *(f"  {line}" for line in found.told["verdict"])]))
