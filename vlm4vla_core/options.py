"""How an action query enters a VLM: the choices in which the paper's code and the correct way differ.

Trap: the defaults are what is correct for each model. `PAPER` selects the authors' choices instead, to replicate their
numbers; mixing the two in one comparison compares adaptations, not backbones.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, get_args, get_type_hints

from vlm4vla_core.errors import InputError, nearest


@dataclass(frozen=True)
class BackboneOptions:
    """Settings of a backbone, kept in its checkpoints. Sources: the authors' public code, as read in its facts."""

    n_queries: int = 1
    """Learned vectors, in a row after the prompt."""
    query_init: str = "scaled"
    """scaled: random, as long as a typical word. zeros: the authors'."""
    positions: str = "native"
    """native: the model's own rule, padding not counted. arange: the authors' plain count, the same on all axes where
    the model has three; padding is counted, but for Qwen2-VL and Qwen2.5-VL."""
    query_role: str = "suffix"
    """PaliGemma only. suffix: the prompt does not see the query. prefix: it does, as in the authors' runs."""
    query_place: str = "before_pads"
    """before_pads: right after the last real token. after_pads: at the end of the padded row, as the authors'."""
    prompt: str = "own"
    """own: the checkpoint's. paper: the authors', where the paper has the family."""
    upscale: bool = False
    """Enlarge images as the authors' processors did (Qwen and InternVL: 224 to 448 px, 256 or 196 tokens)."""
    image_size: int | None = None
    """Pixels per side of the images that go in; None: the checkpoint's own."""
    dropout: bool = False
    """Keep the checkpoint's own dropout in training (Kosmos-2: 0.1)."""

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise InputError(f"unknown {name} '{getattr(self, name)}'", fix=nearest(getattr(self, name), known))
        if self.n_queries < 1:
            raise InputError(f"{self.n_queries} action queries", fix="use at least one")

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> BackboneOptions:
        """The options of `to_dict`; what is missing (older checkpoints) is the default. Raises InputError."""
        hints = get_type_hints(BackboneOptions)
        for name, value in values.items():
            if name not in hints:
                raise InputError(f"unknown backbone option '{name}'", fix=nearest(name, hints))
            kinds = get_args(hints[name]) or (hints[name],)
            if type(value) not in kinds:
                raise InputError(f"backbone option {name} is {value!r}, not {kinds[0].__name__}")
        return BackboneOptions(**values)


_CHOICES = {
    "query_init": ("scaled", "zeros"),
    "positions": ("native", "arange"),
    "query_role": ("suffix", "prefix"),
    "query_place": ("before_pads", "after_pads"),
    "prompt": ("own", "paper"),
}
PAPER = BackboneOptions(
    query_init="zeros",
    positions="arange",
    query_role="prefix",
    query_place="after_pads",
    prompt="paper",
    upscale=True,
    image_size=224,
    dropout=True,
)
