"""What is trained, as data: parts of a backbone by name.

"vision" is the tower without its merger; "projector" is the merger, resampler or connector that makes image tokens out
of patches (in the Qwen models it lives inside the tower's module, with the mergers of deep-stack features). The query,
the head and an untied output layer are no part and are always trained.

Trap: "freeze the vision encoder" is ambiguous for Qwen. The authors' flag freezes tower and merger, so the paper's rows
are freeze = ["vision", "projector"] there, and plain ["vision"] in PaliGemma, whose projector is a module of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm4vla_core.backbone import Backbone

# A part's module groups (see `FamilySpec.group_of`), by how their names begin.
PARTS = {
    "vision": "vision.",
    "projector": "projector",
    "decoder": "decoder.",
    "word_embeddings": "embeddings",
}


def part_of(group: str) -> str | None:
    """The part that a module group belongs to; None for "query" and "lm_head"."""
    return next((part for part, prefix in PARTS.items() if group.startswith(prefix)), None)


def freeze(backbone: Backbone, parts: Sequence[str]) -> None:
    """Train everything but `parts` (names of PARTS); LoRA adapters are trained wherever they are."""
    adapted = backbone.lineage.get("lora", {}).get("parts", [])
    for name, group in backbone.groups().items():
        fixed = part_of(group) in {*parts, *adapted} and ".lora_" not in name
        backbone.get_parameter(name).requires_grad_(not fixed)
