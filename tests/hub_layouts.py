"""Every family's weights as published files name them, written by hand and not by the table that reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from vlm4vla_core.backbone import Backbone

# Published files of: Qwen2.5-VL-3B-Instruct, Qwen3-VL-2B-Instruct, SmolVLM-Instruct, paligemma-3b-pt-224,
# InternVL3_5-4B-HF, kosmos-2-patch14-224. Pattern and replacement, from headless names.
_OLD_QWEN = [(r"^language_model\.", "model.")]
_UNDER_MODEL = [(r"^(?!lm_head)", "model.")]
_NESTED = [(r"^lm_head", "language_model.LM"), (r"^language_model\.(?!LM)", "language_model.model."), ("LM", "lm_head")]
_SIGLIP = [*_NESTED, (r"^vision_tower\.", "vision_tower.vision_model.")]
PUBLISHED = {
    "qwen2_vl": _OLD_QWEN, "qwen2_5_vl": _OLD_QWEN, "qwen3_vl": _UNDER_MODEL, "qwen3_vl_moe": _UNDER_MODEL,
    "qwen3_5": _UNDER_MODEL, "smolvlm": _UNDER_MODEL, "idefics3": _UNDER_MODEL, "paligemma": _SIGLIP,
    "paligemma2": _SIGLIP, "gemma3": _SIGLIP, "llava_onevision": _SIGLIP, "internvl": _NESTED,
    "kosmos2": [(r"^lm_head", "text_model.lm_head")],
}  # fmt: skip


def published(folder: Path, model: Backbone, head: torch.Tensor | None = None, **more: torch.Tensor) -> Path:
    """Write a member as the hub has it: its old names, in two shards with an index; experts' matrices transposed."""
    folder.mkdir()
    words = model.base.get_input_embeddings().weight
    tied = model.base.config.tie_word_embeddings
    tensors = {**dict(model.base.named_parameters()), "lm_head.weight": words if head is None and tied else head}
    if head is None and not tied:
        tensors["lm_head.weight"] = torch.randn(words.shape, generator=torch.Generator().manual_seed(1))
    out = {}
    for name, value in tensors.items():
        for pattern, replacement in PUBLISHED[model.spec.name]:
            name = re.sub(pattern, replacement, name)
        out[name] = (value.transpose(1, 2) if "experts" in name else value).detach().contiguous().clone()
    out |= more
    names = sorted(out)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: out[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model.base.config.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder
