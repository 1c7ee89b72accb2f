"""The image tokens of a picture as one tensor: what the projector makes of it and the decoder receives.

`image_tokens` computes them, `given` lets the model's own forward take them instead of computing its own: several
objectives share one pass of the vision tower, and a frozen tower need not run twice for a picture (`cached`).

Trap: Qwen3-VL's decoder receives deep-stack features too, layers after its input. They stand behind the projector's
output in the last axis here, so a token is (1 + layers) times as wide as a hidden state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from vlm4vla_core.backbone import Backbone


def image_tokens(backbone: Backbone, images: Tensor) -> Tensor:
    """(B, n, (1 + layers) D) in raster order and the base's dtype; images: uint8 (B, S, S, 3) of the model's size."""
    import torch

    found = backbone.base.get_image_features(**backbone.pixels(images.to(backbone.device)))
    parts = [found.pooler_output, *(getattr(found, "deepstack_features", None) or ())]
    whole = [part if isinstance(part, torch.Tensor) else torch.cat(list(part)) for part in parts]
    return torch.cat([part.reshape(len(images), -1, backbone.hidden_size) for part in whole], dim=-1)


def token_shape(backbone: Backbone) -> tuple[int, int]:
    """(n, (1 + layers) D) of `image_tokens`."""
    layers = len(getattr(backbone.base.config.vision_config, "deepstack_visual_indexes", None) or ())
    return backbone.geometry.tokens, (1 + layers) * backbone.hidden_size


def on_grid(backbone: Backbone, tokens: Tensor) -> Tensor:
    """The projector's output on the grid of the whole picture: (B, side², D), row by row from the top left."""
    side = backbone.geometry.grid // backbone.geometry.merge
    return tokens[:, : side * side, : backbone.hidden_size]  # LLaVA-OneVision repeats the picture after it


@contextmanager
def given(backbone: Backbone, tokens: Tensor) -> Iterator[None]:
    """Within, the model's forward takes these tokens (of `image_tokens`) for the pictures that it is given."""
    width = backbone.hidden_size
    whole, *deep = tokens.to(backbone.device).split(width, dim=-1)  # (B, n, D) each
    single = backbone.spec.positions == "mrope" or backbone.geometry.placeholders is not None
    listed = single and backbone.spec.spatial  # one tensor per picture, where the library cats them
    pooled: Any = whole.unbind() if listed else whole
    output = SimpleNamespace(
        pooler_output=pooled, deepstack_features=[part.unbind() for part in deep], last_hidden_state=None,
        hidden_states=None, attentions=None, projection_attentions=None, vision_model_output=None,
    )  # fmt: skip
    own = vars(backbone.base).get("get_image_features")  # the class's is not among them
    backbone.base.get_image_features = lambda *args, **named: output
    try:
        yield
    finally:
        del backbone.base.get_image_features
        if own is not None:
            backbone.base.get_image_features = own
