"""One entry per VLM family: everything in which families differ, so that the rest of the code need not know them.

Adding a family means adding one `FamilySpec` (to a file of its style here) and passing `vlm4vla_core.check_backbone`.
torch is imported inside the functions: naming the families must not cost a second.

Trap: `model_type: paligemma` covers two families, told apart by the text config's `model_type`.
"""

from __future__ import annotations

from typing import Any

from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.families import gemma, internvl, kosmos, llava, qwen, smolvlm
from vlm4vla_core.families.spec import FamilySpec, Geometry, Prompt

__all__ = ["FamilySpec", "Geometry", "Prompt", "families", "family", "family_of", "family_of_config"]

_SPECS: dict[str, FamilySpec] = {
    spec.name: spec for module in (qwen, gemma, kosmos, internvl, smolvlm, llava) for spec in module.SPECS
}


def families() -> list[str]:
    """Names of the families that can be loaded."""
    return sorted(_SPECS)


def family(name: str) -> FamilySpec:
    """The entry of one family. Raises InputError naming the nearest known one."""
    if name not in _SPECS:
        raise InputError(f"unknown model family '{name}'", fix=nearest(name, _SPECS))
    return _SPECS[name]


def family_of(model_type: str, *, text_type: str = "", where: object = "") -> FamilySpec:
    """The entry for a Hugging Face `model_type`, and that of its text config where two families share the first.

    Raises InputError naming the nearest known one.
    """
    fitting = [spec for spec in _SPECS.values() if model_type in spec.model_types]
    exact = [spec for spec in fitting if not (text_type and spec.text_types) or text_type in spec.text_types]
    if not exact:
        known = {kind for spec in _SPECS.values() for kind in spec.model_types}
        what = f"no model family for model_type '{model_type}'" + (f" with a {text_type} decoder" if fitting else "")
        raise InputError(what, where=where, fix=nearest(model_type, known))
    return exact[0]


def family_of_config(config: dict[str, Any], where: object = "") -> FamilySpec:
    """The entry for the values of a config.json, of Hugging Face's or of this project. Raises InputError."""
    if isinstance(config.get("backbone"), dict):
        return family(config["backbone"].get("family", ""))
    text = config.get("text_config")
    text_type = text.get("model_type", "") if isinstance(text, dict) else ""
    return family_of(str(config.get("model_type", "")), text_type=text_type, where=where)
