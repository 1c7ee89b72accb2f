"""Checkpoints: folders that are whole or absent, hold no pickle, and resume a run exactly.

`model.safetensors` (weights, named `backbone.…` and, for a policy, `head.…`), `config.json` (how to build the
model), the tokenizer's files, and in a run `train_state.safetensors` with `train_state.json` (optimizer, step,
seed). The manifest comes last: a folder without one is no checkpoint.

Trap: "the newest checkpoint of a run" means the newest *whole* one; a folder cut short by a kill is never taken.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    import torch

    from vlm4vla_core.backbone import Backbone
    from vlm4vla_core.policy import VLAPolicy

KIND = "checkpoint"
WEIGHTS, CONFIG, STATE, STATE_FACTS = "model.safetensors", "config.json", "train_state.safetensors", "train_state.json"


# --- finding (no torch needed) --------------------------------------------------------------------------


def step_folder(run: Path, step: int) -> Path:
    """Where a run keeps its checkpoint of a step."""
    return Path(run) / "checkpoints" / f"step-{step:06d}"


def complete(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    whole = []
    for folder in sorted((Path(run) / "checkpoints").glob("step-*"), key=lambda path: (len(path.name), path.name)):
        try:
            folders.read_manifest(folder, KIND)
        except InputError:
            continue
        whole.append(folder)
    return whole


def looks_like_one(path: Path) -> bool:
    """True for a folder that is, or holds, a checkpoint of this project (whole or not)."""
    manifest = path / folders.MANIFEST
    return (path / "checkpoints").is_dir() or ((path / CONFIG).is_file() and (manifest.is_file() or _ours(path)))


def _ours(path: Path) -> bool:
    try:
        return "backbone" in folders.read_json(path / CONFIG)
    except InputError:
        return False


def resolve(path: Path | str) -> Path:
    """The checkpoint folder meant by `path`: itself, or a run's newest whole checkpoint.

    Raises InputError when there is none, or it is damaged or foreign.
    """
    path = Path(path)
    if not path.exists():
        raise InputError("no such checkpoint or run", where=path)
    if (path / "checkpoints").is_dir():
        whole = complete(path)
        if not whole:
            raise InputError("this run has no whole checkpoint yet", where=path, fix="issue the training command again")
        return whole[-1]
    folders.read_manifest(path, KIND, fix="give a checkpoint or run folder made by `vlm4vla train`")
    return path


def row_labels(folder: Path) -> dict[str, Any]:
    """What a checkpoint contributes to every result row: run_id, model, family, lineage, params_b, init, freeze, aux,
    train_seed, step, note (see `results.EPISODE_COLUMNS`)."""
    manifest = folders.read_manifest(folder, KIND)
    facts, lineage = manifest["facts"], manifest["facts"]["lineage"]
    source = lineage.get("source", "unknown")
    return {
        "run_id": manifest["fingerprint"],
        "model": source,
        "family": facts["family"],
        "lineage": facts["family"],
        "params_b": round(facts["parameters"] / 1e9, 6),
        "init": lineage.get("init"),
        "freeze": "+".join([*manifest["config"].get("freeze", []), *_adapted(lineage)]) or "none",
        "aux": "+".join(stage for stage in lineage.get("stages", []) if stage != "action") or "none",
        "train_seed": manifest["config"].get("seed"),
        "step": manifest.get("step"),
        "note": "tiny random model" if source.startswith("tiny ") else None,
    }


def _adapted(lineage: dict[str, Any]) -> list[str]:
    """Parts whose weights stayed and whose adapters were trained, as `lora(decoder)`."""
    settings = [*lineage.get("merged_lora", []), *([lineage["lora"]] if "lora" in lineage else [])]
    return [f"lora({part})" for one in settings for part in one["parts"]]


# --- writing --------------------------------------------------------------------------------------------


def save(
    folder: Path,
    model: VLAPolicy | Backbone,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    step: int | None = None,
    config: dict[str, Any] | None = None,
    inputs: dict[str, str] | None = None,
    metrics: dict[str, Any] | None = None,
    files: dict[str, Any] | None = None,
    tensors: tuple[dict[str, Any], dict[str, dict[str, Any]]] | None = None,
) -> None:
    """Write a checkpoint folder that appears whole or not at all.

    optimizer, step: the training state, for an exact resume. config, inputs: the run's settings and the
    fingerprints of its data. metrics: measured values to keep in the manifest. files: further JSON, by file name.
    tensors: weights and optimizer state of a sharded model (`sharding.whole`), instead of the model's own.
    """
    from safetensors.torch import save_file

    policy: Any = None if _is_backbone(model) else model
    backbone: Any = model if policy is None else model.backbone
    prefix = "backbone." if policy is None else ""
    own, state = tensors or (model.state_dict(), {} if optimizer is None else _optimizer_state(model, optimizer))
    weights = {prefix + name: value.detach().contiguous().cpu() for name, value in own.items()}
    description = {"backbone": backbone.describe(), "policy": None if policy is None else policy.config.to_dict()}
    facts = {
        "family": backbone.spec.name,
        "policy": policy is not None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "lineage": backbone.lineage,
    }
    with folders.new_folder(folder, KIND) as temporary:
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        folders.write_json(temporary / CONFIG, description)
        backbone.tokenizer.save_pretrained(temporary)
        for name, value in (files or {}).items():
            folders.write_json(temporary / name, value)
        if optimizer is not None:
            save_file(_named(state), temporary / STATE)
            folders.write_json(temporary / STATE_FACTS, {"step": step, "seed": (config or {}).get("seed")})
        folders.write_manifest(
            temporary, KIND, config=config or {}, inputs=inputs or {}, step=step, facts=facts, metrics=metrics or {}
        )


def _is_backbone(model: Any) -> bool:
    return not hasattr(model, "head")


def _optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    return {name: optimizer.state.get(parameter, {}) for name, parameter in model.named_parameters()}


def _named(state: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Optimizer state as named tensors, such as `exp_avg/backbone.query`."""
    return {
        f"{key}/{name}": value.detach().contiguous().cpu()
        for name, values in state.items()
        for key, value in values.items()
    }


# --- reading --------------------------------------------------------------------------------------------


def load_policy(path: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> VLAPolicy:
    """The policy of a checkpoint or run folder, in eval mode. dtype: of the base; the saved one when left out.

    Raises InputError when it is damaged or foreign, or holds a backbone without a head.
    """
    from vlm4vla_core.policy import PolicyConfig, VLAPolicy

    folder, description = _describe(path)
    if description["policy"] is None:
        raise InputError(
            "this checkpoint is a backbone without a policy head",
            where=folder,
            fix="train it with --objective action, or give a policy's checkpoint",
        )
    try:
        config = PolicyConfig.from_dict(description["policy"])
    except (KeyError, TypeError, ValueError) as error:  # a key of another version, or a damaged one
        what = f"config.json does not describe a policy ({type(error).__name__}: {error})"
        raise InputError(what, where=folder, fix="update vlm4vla, or use another checkpoint") from None
    if dtype is not None:
        description["backbone"]["dtype"] = str(dtype).removeprefix("torch.")
    policy = VLAPolicy(_build(folder, description), config)
    fill(policy, folder)
    return _on(policy, device)


def load_backbone(path: Path, device: str = "cpu") -> Backbone:
    """The backbone of a checkpoint or run folder, of a policy too, in eval mode. Raises InputError as `load_policy`."""
    folder, description = _describe(path)
    backbone = _build(folder, description)
    fill(backbone, folder, "backbone.")
    return _on(backbone, device)


def _on(model: Any, device: str) -> Any:
    try:
        return model.to(device).eval()
    except (AssertionError, RuntimeError) as error:  # no such device, or no room on it
        reason = str(error).splitlines()[0]
        raise InputError(f"the model cannot be moved to '{device}' ({reason})", fix="use another device") from None


def reload(
    path: Path, *, init: str, seed: int, dtype: torch.dtype | None, attn: str | None, image_size: int | None
) -> Backbone:
    """`load_backbone` with some of its settings changed; adapters are merged. init="scratch" draws the base anew."""
    from vlm4vla_core.lora import merge_lora

    folder, description = _describe(path)
    changed = dict(description["backbone"])
    if image_size is not None:
        changed["image_size"] = image_size
    if dtype is not None:
        changed["dtype"] = str(dtype).removeprefix("torch.")
    if attn is not None:
        changed["attention"] = attn
    if init == "pretrained":
        backbone = _build(folder, {**description, "backbone": changed})
        fill(backbone, folder, "backbone.")
        merge_lora(backbone)
        return backbone
    changed.pop("dense", None)
    plain = {key: value for key, value in changed["lineage"].items() if key not in ("lora", "merged_lora", "domains")}
    changed["lineage"] = {**plain, "init": "scratch", "init_seed": seed, "stages": []}
    return _build(folder, {**description, "backbone": changed}, seed)


def _describe(path: Path) -> tuple[Path, dict[str, Any]]:
    folder = resolve(path)
    description = folders.read_json(folder / CONFIG)
    if not isinstance(description, dict) or not {"backbone", "policy"} <= set(description):
        raise InputError("config.json does not describe a model of this project", where=folder)
    return folder, description


def _build(folder: Path, description: dict[str, Any], seed: int | None = None) -> Backbone:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        backbone = _rebuild(description["backbone"], tokenizer, seed)
        if lora := backbone.lineage.pop("lora", None):
            from vlm4vla_core.lora import add_lora

            add_lora(backbone, lora["parts"], rank=lora["rank"], alpha=lora["alpha"], seed=lora["seed"])
        return backbone
    except (KeyError, TypeError, ValueError, OSError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"the model cannot be built ({reason})", where=folder, fix="use another checkpoint") from None


def _rebuild(description: dict[str, Any], tokenizer: Any, seed: int | None = None) -> Backbone:
    """The backbone of a `describe` value; its weights are drawn from `seed`, or left to be filled in when None."""
    import torch
    from transformers import AutoConfig, AutoModel

    from vlm4vla_core.backbone import Backbone
    from vlm4vla_core.families import family
    from vlm4vla_core.hub import draw
    from vlm4vla_core.options import BackboneOptions

    spec = family(description["family"])
    config = AutoConfig.for_model(**description["model"])
    made = {"attn_implementation": description["attention"], "dtype": getattr(torch, description["dtype"])}
    head = None
    if seed is not None:
        base, head = draw(config, spec, seed, untied=description["untied_head"], **made)
        source, generator = description["lineage"].get("source", ""), torch.Generator().manual_seed(seed)
        if source.startswith("tiny "):
            from vlm4vla_core.tiny import initialise

            initialise(base, spec, generator)
        elif source.startswith("nano "):
            from vlm4vla_core.nano import initialise as initialise_nano

            initialise_nano(base, spec, generator)
    else:
        with torch.random.fork_rng(devices=[]), _without_init():
            base = AutoModel.from_config(config, **made)
        if description["untied_head"]:
            head = torch.empty_like(base.get_submodule(spec.embeddings).weight.detach())
    dense = None
    if description.get("dense"):
        from vlm4vla_core.dense_heads import DenseHeads

        dense = DenseHeads(config.get_text_config().hidden_size, description["dense"])
    options = BackboneOptions.from_dict(description.get("options", {"n_queries": description["n_queries"]}))
    backbone = Backbone(
        base,
        tokenizer,
        spec,
        description["image_size"],
        options=options,
        seed=seed or 0,
        padding=description["padding"],
        lm_head=head,
        lineage=description["lineage"],
    )
    backbone.dense = dense
    return backbone.eval()


def _without_init() -> Any:
    """Skip drawing weights that are filled in next; a saving of time only, so it may be absent."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:
        return nullcontext()
    return no_init_weights()


def fill(model: torch.nn.Module, folder: Path, prefix: str = "") -> None:
    """Fill every weight of `model` from the checkpoint's, and nothing else."""
    from vlm4vla_core.hub import check_finite
    from vlm4vla_core.sharding import set_weights

    weights = read_tensors(folder / WEIGHTS)
    wanted = {prefix + name: name for name in model.state_dict()}
    if missing := sorted(set(wanted) - set(weights)):
        raise InputError(f"{len(missing)} weights missing: {', '.join(missing[:4])}", where=folder / WEIGHTS)
    left = sorted(name for name in weights if name not in wanted and name.startswith(prefix))
    if left:
        raise InputError(f"{len(left)} weights left over: {', '.join(left[:4])}", where=folder / WEIGHTS)
    try:
        set_weights(model, {name: weights[key] for key, name in wanted.items()})
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"weights do not fit the model ({reason})", where=folder / WEIGHTS) from None
    check_finite(model, folder / WEIGHTS)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file. Raises InputError when it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"not a whole safetensors file ({error})", where=path, fix="use an earlier checkpoint"
        ) from None


def restore_optimizer(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Fill the optimizer's state from a checkpoint; returns the step. Raises InputError when it holds none."""
    if not (folder / STATE).is_file():
        raise InputError("this checkpoint holds no training state to resume from", where=folder)
    from vlm4vla_core.sharding import as_sharded

    own = dict(model.named_parameters())
    state: dict[Any, dict[str, Any]] = {}
    for name, value in read_tensors(folder / STATE).items():
        key, parameter = name.split("/", 1)
        state.setdefault(parameter, {})[key] = as_sharded(value, own.get(parameter))
    # torch's own loading puts each tensor where the parameter is, with its exceptions (the step of an unfused AdamW).
    packed = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    number = {id(parameter): index for index, parameter in enumerate(order)}
    names = {name: number.get(id(parameter)) for name, parameter in own.items()}
    if foreign := sorted(name for name in state if names.get(name) is None):
        raise InputError(f"the training state is of other parameters ({foreign[0]})", where=folder / STATE)
    optimizer.load_state_dict({**packed, "state": {names[name]: value for name, value in state.items()}})
    return int(folders.read_json(folder / STATE_FACTS)["step"])
