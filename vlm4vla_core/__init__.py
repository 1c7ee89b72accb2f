"""The compact core: turns a VLM into a VLA, trains it and evaluates it. Imports nothing of `probes`.

Trap: names below are loaded on first use, so that `import vlm4vla_core` needs no torch. `families` and `tiny` are also
names of submodules; here they are always the functions (`from vlm4vla_core.families import …` reaches the module).
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_WHERE = {
    "families": "vlm4vla_core.families",
    "tiny": "vlm4vla_core.backbone",
    "load_backbone": "vlm4vla_core.backbone",
    "check_backbone": "vlm4vla_core.contract",
    "Backbone": "vlm4vla_core.backbone",
    "BackboneOptions": "vlm4vla_core.options",
    "PAPER": "vlm4vla_core.options",
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


class _Package(ModuleType):
    """Importing a submodule binds its name in the package, which would hide the exported function of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
