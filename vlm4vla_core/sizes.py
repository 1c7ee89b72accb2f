"""How large a VLM is, part by part, what the adaptation adds, and what training it would hold in memory.

Everything is counted from a config on torch's meta device: the real class is built without any weight, so the largest
model takes a fraction of a second and no memory.

Trap: three counts are in use for one model. "total" has the output layer, as model cards count; "headless" is what this
project loads, without an untied output layer; "trained" leaves out what is frozen. VLM4VLA's trainable counts have
the untied output layer in them, although no action ever reaches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.freezing import PARTS, part_of

MEMORY_RULE = (
    "16 bytes for each trained parameter (fp32 master, gradient and two AdamW moments; or bf16 weight and gradient "
    "beside fp32 master and moments), 2 for each frozen one (bf16); activations come on top"
)


@dataclass(frozen=True)
class Size:
    """Parameters of one model made into a policy.

    parts: of the headless base, by the names of `freezing.PARTS`. lm_head: of an untied output layer in the published
    checkpoint. new: query and head. adapters: of LoRA, by part. image_tokens: of one picture of image_size pixels;
    token_width: numbers in one, deep-stack features included. idle: parameters of experts that a token does not use.
    """

    name: str
    family: str
    parts: dict[str, int]
    lm_head: int
    new: int
    image_size: int
    image_tokens: int
    token_width: int = 0
    idle: int = 0
    adapters: dict[str, int] = field(default_factory=dict)
    source: str = ""
    paper_b: float | None = None

    @property
    def headless(self) -> int:
        """Parameters that are loaded: all but an untied output layer."""
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        """Parameters of the published model."""
        return self.headless + self.lm_head

    @property
    def new_share(self) -> float:
        """Query and head among all parameters of the policy."""
        return self.new / (self.headless + self.new)

    def trained(self, freeze: Sequence[str] = (), *, output_layer: bool = False) -> int:
        """Parameters trained with the parts `freeze` frozen (those with adapters are, too).

        output_layer: count an untied one among them, as the paper's numbers do.
        """
        base = sum(count for part, count in self.parts.items() if part not in {*freeze, *self.adapters})
        return base + sum(self.adapters.values()) + self.new + (self.lm_head if output_layer else 0)

    def training_gb(self, freeze: Sequence[str] = ()) -> float:
        """Gigabytes (1e9) of weights, gradients and optimizer states by MEMORY_RULE."""
        trained = self.trained(freeze)
        frozen = self.headless + self.new + sum(self.adapters.values()) - trained
        return (16 * trained + 2 * frozen) / 1e9

    def to_dict(self, freeze: Sequence[str] = ()) -> dict[str, Any]:
        """JSON values, with what is trained under `freeze`."""
        return {
            **vars(self),
            "total": self.total,
            "headless": self.headless,
            "new_share": self.new_share,
            "frozen": list(freeze),
            "trained": self.trained(freeze),
            "trained_with_output_layer": self.trained(freeze, output_layer=True),
            "training_gb": round(self.training_gb(freeze), 2),
            "inference_gb_bf16": round(2 * (self.headless + self.new) / 1e9, 2),
        }


def measure(
    config: Any,
    name: str,
    *,
    head: str = "fc",
    chunk: int = 10,
    arm_size: int = 6,
    width: int = 1024,
    n_queries: int = 1,
    image_size: int | None = None,
    lora: Sequence[str] = (),
    rank: int = 16,
    source: str = "",
    paper_b: float | None = None,
) -> Size:
    """Count the model of a Hugging Face config with a policy's head. Raises InputError on an unknown family."""
    import copy

    import torch
    from transformers import AutoModel

    from vlm4vla_core.heads import make_head
    from vlm4vla_core.hub import spec_of
    from vlm4vla_core.lora import lora_size

    spec = spec_of(config, name)
    with torch.device("meta"):
        base = AutoModel.from_config(copy.deepcopy(config))
        words = base.get_submodule(spec.embeddings).weight  # (V, D)
        made = make_head(head, n_queries * words.shape[1], chunk, arm_size, width=width)
    parts = dict.fromkeys(PARTS, 0)
    for parameter_name, parameter in base.named_parameters():
        part = part_of(spec.group_of(parameter_name) or "")
        if part is None:
            raise ValueError(f"parameter {parameter_name} belongs to no part of {spec.name}")
        parts[part] += parameter.numel()
    pixels = image_size or spec.native_size(config)
    text = config.get_text_config()
    used = getattr(text, "num_experts_per_tok", 1) / (getattr(text, "num_experts", None) or 1)
    experts = sum(one.numel() for key, one in base.named_parameters() if ".experts." in key)
    return Size(
        name=name,
        family=spec.name,
        parts=parts,
        lm_head=0 if config.tie_word_embeddings else words.numel(),
        new=n_queries * words.shape[1] + sum(parameter.numel() for parameter in made.parameters()),
        image_size=pixels,
        image_tokens=spec.geometry(config, pixels).tokens,
        token_width=words.shape[1] * (1 + len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ())),
        idle=round(experts * (1 - used)),
        adapters={part: lora_size(base, spec, [part], rank) for part in lora},
        source=source,
        paper_b=paper_b,
    )


def known() -> list[dict[str, Any]]:
    """The published models whose architecture ships with the project (data/backbones.json)."""
    from vlm4vla_core import folders

    return folders.read_json(folders.shipped("data/backbones.json"))["models"]


def size_of(path: str, **options: Any) -> Size:
    """The size of a Hugging Face folder or hub id, of a checkpoint or run of this project, or of a model of `known`.

    options: see `measure`; a policy's checkpoint brings its own head and chunk. Raises InputError when it is none.
    """
    from transformers import AutoConfig

    from vlm4vla_core import checkpoint, folders

    if checkpoint.looks_like_one(Path(path)):
        description = folders.read_json(checkpoint.resolve(path) / checkpoint.CONFIG)
        backbone, policy = description["backbone"], description["policy"] or {}
        own = {"head": policy.get("head"), "chunk": policy.get("chunk"), "width": policy.get("width")}
        own |= {"n_queries": backbone["n_queries"], "image_size": backbone["image_size"]}
        own |= {"arm_size": len(policy["q01"]) - 1} if policy else {}
        given = {**options, **{key: value for key, value in own.items() if value is not None}}
        return measure(AutoConfig.for_model(**backbone["model"]), path, **given)
    for entry in known():
        if path in (entry["name"], entry["hub"]):
            return _known(entry, options)
    if not Path(path).exists() and path.count("/") != 1:
        names = [entry["name"] for entry in known()]
        raise InputError("no such folder, hub id or known model", where=path, fix=nearest(path, names))
    from vlm4vla_core.hub import _config

    return measure(_config(path), path, **options)


def known_sizes(**options: Any) -> list[Size]:
    """The size of every known model, in the order of data/backbones.json."""
    return [_known(entry, options) for entry in known()]


def _known(entry: dict[str, Any], options: dict[str, Any]) -> Size:
    from transformers import AutoConfig

    config = AutoConfig.for_model(**entry["config"])
    return measure(config, entry["name"], source=entry["source"], paper_b=entry["paper_b"], **options)
