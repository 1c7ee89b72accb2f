"""Numbers in words, and where numbers come from: what all views share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, and a true minus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def plain(value: float, digits: int = 2) -> str:
    """A number with a true minus, and no plus."""
    return f"{value:.{digits}f}".replace("-", "−")


def span(low: float, high: float, digits: int = 2) -> str:
    """`+0.12 to +0.34`."""
    return f"{signed(low, digits)} to {signed(high, digits)}"


def model_badges(*manifests: Mapping[str, Any]) -> list[str]:
    """Where the weights behind these products come from: `origin.model` of their manifests."""
    models = [manifest.get("origin", {}).get("model", "") for manifest in manifests]
    found = ["tiny-random"] if any(str(model).startswith("tiny ") for model in models) else []
    return found + (["unstated: model"] if not all(models) else [])


def data_badges(*sources: str) -> list[str]:
    """Where the demonstrations come from: the `source` of their stores, `tabletop` for the built-in world."""
    return ["scripted"] if "tabletop" in sources else []
