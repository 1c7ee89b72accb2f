"""Low-rank adapters (LoRA, Hu et al. 2021) on named parts of a backbone, through peft.

A part with adapters keeps its weights and trains the adapters alone; other parts follow `freeze`. What was added stands
in the backbone's lineage, so a checkpoint with adapters builds itself again. `merge_lora` folds them into the weights,
after which the backbone is a plain one: `load_backbone` does so, and `export_merged` writes such a checkpoint.

Trap: adapters sit on Linear and Embedding modules. Patch convolutions and the fused experts of mixtures stay as they
are; an adapter on the word embeddings changes what is read, never a tied output layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlm4vla_core.errors import InputError
from vlm4vla_core.families import FamilySpec
from vlm4vla_core.freezing import part_of

if TYPE_CHECKING:
    from vlm4vla_core.backbone import Backbone


def lora_targets(base: Any, spec: FamilySpec, parts: Sequence[str]) -> dict[str, nn.Linear | nn.Embedding]:
    """The modules of a headless base that adapters on `parts` sit on, by name. Raises InputError when none is."""
    found: dict[str, nn.Linear | nn.Embedding] = {}
    seen = set()
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and (group := spec.group_of(f"{name}.weight")):
            part = part_of(group)
            if part in parts and (isinstance(module, nn.Linear) or part == "word_embeddings"):
                found[name] = module
                seen.add(part)
    if missing := sorted(set(parts) - seen):
        what = f"{spec.name} has no module that takes an adapter in {', '.join(missing)}"
        raise InputError(what, fix="leave that part out of lora")
    return found


def lora_size(base: Any, spec: FamilySpec, parts: Sequence[str], rank: int) -> int:
    """Parameters that adapters on `parts` add: rank * (rows + columns) for every adapted matrix."""
    return sum(rank * sum(module.weight.shape) for module in lora_targets(base, spec, parts).values())


def add_lora(backbone: Backbone, parts: Sequence[str], *, rank: int = 16, alpha: int = 32, seed: int = 0) -> None:
    """Put adapters on every matrix of `parts` (names of `freezing.PARTS`): fp32, and without effect at first.

    The change of a weight is alpha / rank * B A. Their start is drawn from `seed`; nothing else of the backbone moves.
    Raises InputError when the backbone has adapters already, or a part has no place for one.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    if "lora" in backbone.lineage:
        raise InputError("this backbone has adapters already", fix="merge them first (lora.merge_lora)")
    targets = lora_targets(backbone.base, backbone.spec, parts)
    wanted = {id(parameter): parameter.requires_grad for parameter in backbone.parameters()}
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(targets), bias="none")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tied embeddings are adapted: the docstring says what it means
        torch.manual_seed(seed)
        inject_adapter_in_model(config, backbone.base)
    adapted = {name for name, module in backbone.base.named_modules() if isinstance(module, LoraLayer)}
    if adapted != set(targets):
        raise ValueError(f"peft adapted {sorted(adapted ^ set(targets))[:4]} against the plan")
    frozen = {id(module.weight) for module in targets.values()} | {id(getattr(m, "bias", 0)) for m in targets.values()}
    for name, parameter in backbone.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        else:
            parameter.requires_grad_(wanted[id(parameter)] and id(parameter) not in frozen)
    if "word_embeddings" in parts:  # after the adapter, or it would shift the query by the reserved token's row
        words = backbone.base.get_submodule(backbone.spec.embeddings)
        words.register_forward_hook(backbone._put_query)
    backbone.lineage["lora"] = {"parts": list(parts), "rank": rank, "alpha": alpha, "seed": seed}


def merge_lora(backbone: Backbone) -> None:
    """Fold the adapters of a backbone, if it has any, into its weights, which get back their plain names."""
    settings = backbone.lineage.pop("lora", None)
    if settings is None:
        return
    from peft.tuners.lora import LoraLayer

    layers = [(name, module) for name, module in backbone.base.named_modules() if isinstance(module, LoraLayer)]
    for name, module in layers:
        module.merge()
        parent, _, child = name.rpartition(".")
        setattr(backbone.base.get_submodule(parent), child, module.get_base_layer())
    if hasattr(backbone.base, "peft_config"):
        del backbone.base.peft_config
    backbone.requires_grad_(True)
    backbone.lineage["merged_lora"] = [*backbone.lineage.get("merged_lora", []), settings]


def export_merged(source: Path | str, out: Path | str) -> None:
    """Write the checkpoint (or a run's newest) as one without adapters, its run's settings kept.

    Raises InputError as `checkpoint.resolve`, and when it has no adapters.
    """
    from vlm4vla_core import checkpoint, folders

    folder = checkpoint.resolve(source)
    description = folders.read_json(folder / checkpoint.CONFIG)
    model: Any = (checkpoint.load_policy if description["policy"] else checkpoint.load_backbone)(folder)
    backbone: Backbone = getattr(model, "backbone", model)
    if "lora" not in backbone.lineage:
        raise InputError("this checkpoint has no adapters to merge", where=folder)
    merge_lora(backbone)
    manifest = folders.read_manifest(folder, checkpoint.KIND)
    inputs = {**manifest["inputs"], "adapted": manifest["fingerprint"]}
    checkpoint.save(Path(out), model, step=manifest.get("step"), config=manifest["config"], inputs=inputs)
