"""What a training run would do and take, without training: the answer of `vlm4vla train --dry-run`.

Trap: the memory is that of weights, gradients and optimizer; activations come on top and grow with the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm4vla_core.presets import DRAWN, TrainConfig


def plan(config: TrainConfig, data: Sequence[Path]) -> dict[str, Any]:
    """Parameters, memory, tokens, steps and checkpoints of a run. Raises InputError on stores and models as `train`."""
    from vlm4vla_core.training_data import Data

    opened = Data(config, data)
    rows = sum(map(len, opened.mixture.train))
    total, trained, tokens, numbers = _sizes(config, opened)
    frames = sum(map(len, opened.stores))
    return {
        "objectives": ", ".join(f"{name} ({weight:g})" for name, weight in config.objectives().items()),
        "parameters": total,
        "trained": trained,
        "memory": _memory(config, total, trained),
        "tokens_per_sample": tokens,
        **({"cached_features": f"{4 * frames * numbers / 1e9:.3g} GB on disk"} if config.cache_features else {}),
        "training_rows": rows,
        "validation_rows": len(opened.val.rows),
        "steps": config.max_steps,
        "samples_per_step": config.batch_size,
        "epochs": round(config.max_steps * config.batch_size / max(1, rows), 2),
        "checkpoints": _checkpoints(config, total, trained),
        "cut_by_normalisation": {name: round(share, 4) for name, share in opened.cut().items()},
    }


def _memory(config: TrainConfig, total: int, trained: int) -> str:
    """fp32: weights of everything; gradient, two moments and the average, if any, of what is trained."""
    needed = (4 * total + (12 + 4 * bool(config.ema)) * trained) / 1e9
    told = f"{needed:.3g} GB of weights, gradients and optimizer in fp32"
    if config.parallel == "fsdp":
        return f"{told}, shared among all processes ({needed / 8:.3g} GB in each of 8, {needed / 16:.3g} of 16)"
    return f"{told}, in every process"


def _checkpoints(config: TrainConfig, total: int, trained: int) -> str:
    """fp32 weights, and the optimizer's moments and average of what is trained, which the start has not."""
    steps = sorted({0, config.max_steps, *(range(0, config.max_steps, config.save_every) if config.save_every else ())})
    kept = len(steps) if not config.keep_last else min(len(steps), config.keep_last + 2)
    shown = ", ".join(map(str, steps if len(steps) < 5 else [*steps[:3], "…", steps[-1]]))
    start, each = 4 * total / 1e9, (4 * total + (8 + 4 * bool(config.ema)) * trained) / 1e9
    best = ", and the best of every validation" if config.keep_last else ""
    return (
        f"{len(steps)} written (steps {shown}{best}), {kept} kept; the start {start:.3g} GB, the others {each:.3g} GB"
    )


def _sizes(config: TrainConfig, data: Any) -> tuple[int, int, str, int]:
    """Parameters, trained parameters, tokens of a sample (measured where the model is built, else of its image), and
    numbers in a picture's image tokens."""
    if config.backbone in DRAWN:
        from vlm4vla_core.image_tokens import token_shape
        from vlm4vla_core.objectives import build

        model, _ = build(config, data, {})
        backbone = getattr(model, "backbone", model)
        told = {text for store in data.stores for text in store.instructions}
        texts = sorted(told or {data.turns(0, 0)[0][0]}, key=len)
        lengths = [len(backbone._encode(text, backbone.prompt.question)) for text in (texts[0], texts[-1])]
        shown = f"{lengths[0] + len(backbone.query)} to {lengths[1] + len(backbone.query)}"
        counts = [p.numel() for p in model.parameters()]
        return (
            sum(counts),
            sum(p.numel() for p in model.parameters() if p.requires_grad),
            f"{shown}, {backbone.geometry.tokens} of them the image's",
            math.prod(token_shape(backbone)),
        )
    from vlm4vla_core.sizes import size_of

    width = data.stores[0].convention.size - 1 if data.stores else 6
    size = size_of(
        config.backbone, head=config.head, chunk=config.chunk, arm_size=width, width=config.head_width,
        n_queries=config.n_queries, image_size=config.image_size, lora=config.lora, rank=config.lora_rank,
    )  # fmt: skip
    total = size.headless + size.new + sum(size.adapters.values())
    return (
        total,
        size.trained(config.freeze),
        f"{size.image_tokens} of the image at {size.image_size} px, and the prompt",
        size.image_tokens * size.token_width,
    )
