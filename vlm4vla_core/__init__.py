"""The compact core: turns a VLM into a VLA, trains it and evaluates it. Imports nothing of `probes`.

Trap: names below are loaded on first use, so that `import vlm4vla_core` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "families": "vlm4vla_core.families",
    "tiny": "vlm4vla_core.backbone",
    "load_backbone": "vlm4vla_core.backbone",
    "check_backbone": "vlm4vla_core.contract",
    "Backbone": "vlm4vla_core.backbone",
    "VLAPolicy": "vlm4vla_core.policy",
    "ActionChunk": "vlm4vla_core.policy",
    "EpisodeStore": "vlm4vla_core.episodes.store",
    "train": "vlm4vla_core.training",
    "evaluate": "vlm4vla_core.evaluation",
    "ActionConvention": "vlm4vla_core.actions",
    "InputError": "vlm4vla_core.errors",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'vlm4vla_core' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)
