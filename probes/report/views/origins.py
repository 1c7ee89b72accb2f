"""Where numbers come from, as badges: what views share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_badges(*manifests: Mapping[str, Any]) -> list[str]:
    """Where the weights behind these products come from: `origin.model` of their manifests."""
    models = [manifest.get("origin", {}).get("model", "") for manifest in manifests]
    kinds = {"tiny ": "tiny-random", "nano ": "nano"}
    found = [badge for start, badge in kinds.items() if any(str(model).startswith(start) for model in models)]
    return found + (["unstated: model"] if not all(models) else [])


def data_badges(*sources: str) -> list[str]:
    """Where the demonstrations come from: the `source` of their stores, `tabletop` for the built-in world."""
    return ["scripted"] if "tabletop" in sources else []
