"""The vision attention of the Qwen families in one call per layer.

transformers cuts a batch into its images, or Qwen2.5-VL's windows, and calls attention once for each: 64 calls per
layer for 16 pictures of 224 px, after waiting for the GPU to say how long each is, and no graph can be made of that.
All our pictures have one size, so every window has one length and the batch goes through in a single call, with the
same result.

Trap: windows at the border are smaller when the picture is no multiple of the window; then nothing is changed.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vlm4vla_core.backbone import Backbone

# With "flash" in its name, transformers hands over the whole batch and where its pieces begin.
_NAME = "vlm4vla_flash_equal_windows"


def _equal_windows(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None = None, *,
    scaling: float, cu_seq_lens_q: Tensor, dropout: float = 0.0, **rest: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query, key, value: (1, heads, windows * n, size); cu_seq_lens_q: (windows + 1,). Returns (1, windows * n, …)."""
    heads, total, size = query.shape[1:]
    count = len(cu_seq_lens_q) - 1
    q, k, v = (x.view(heads, count, total // count, size).transpose(0, 1) for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2).reshape(1, total, heads, size), None  # from (windows, heads, n, size)


def one_call_per_layer(backbone: Backbone) -> bool:
    """Let all windows of a batch share one attention call; returns whether that was to be done and is.

    Families that are not Qwen's batch their pictures already. Only sdpa attention is replaced, and nothing that a
    checkpoint records changes.
    """
    geometry = backbone.geometry
    blocks = list(backbone.base.get_submodule(backbone.spec.blocks))
    pieces = [m for block in blocks for m in block.modules() if hasattr(m, "qkv") and hasattr(m, "config")]
    if backbone.spec.positions != "mrope":
        return False
    if geometry.window and geometry.size % geometry.window:
        return False
    if any(module.config._attn_implementation not in ("sdpa", _NAME) for module in pieces):
        return False
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_NAME, _equal_windows)
    for module in pieces:
        module.config = copy.copy(module.config)  # its own: the model's says what a checkpoint is rebuilt with
        module.config._attn_implementation = _NAME
    return True
