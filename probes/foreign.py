"""Weights that another trainer wrote, in the place of a model's own: `--weights X.safetensors --key-map …`.

The model folder (or hub id) gives architecture and tokenizer; the file gives the weights, under whatever names. A key
map is a list of (pattern, replacement) for `re.sub`, applied in turn; then wrappers ("backbone.", "base.") and the
family's published names are put right. What the asked layers need must be there, each once and of the right shape.
Trap: a name that matches nothing would leave a random weight in place; so nothing that is needed may be missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlm4vla_core import folders
from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from vlm4vla_core.backbone import Backbone

KeyMap = tuple[tuple[str, str], ...]


def read_key_map(texts: Sequence[str]) -> KeyMap:
    """Pairs from texts such as "^vla\\.=>model." and from JSON files {pattern: replacement}.

    Raises InputError for a text that is neither, and for a pattern that is no regular expression.
    """
    pairs: list[tuple[str, str]] = []
    for text in texts:
        if "=>" in text:
            pattern, _, replacement = text.partition("=>")
            pairs.append((pattern, replacement))
        elif text.endswith(".json"):
            found = folders.read_json(Path(text))
            if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
                raise InputError("a key map is a JSON object of texts", where=text)
            pairs += list(found.items())
        else:
            raise InputError(f"'{text}' is no key map", fix="write PATTERN=>REPLACEMENT, or give a .json file")
    for pattern, replacement in pairs:
        try:
            re.sub(pattern, replacement, "")
        except (re.error, IndexError) as error:
            raise InputError(f"'{pattern}' => '{replacement}' is no replacement ({error})", where="--key-map") from None
    return tuple(pairs)


def weight_files(path: Path) -> list[Path]:
    """One safetensors file, or all of a folder. Raises InputError when there are none."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError(
            "no safetensors weights there", where=path, fix="give a .safetensors file, or a folder of them"
        )
    return files


def foreign_fingerprint(path: Path, key_map: KeyMap) -> str:
    """Names the content of the files and how their names are read."""
    return folders.fingerprint([[folders.file_fingerprint(file) for file in weight_files(path)], json.dumps(key_map)])


def load_foreign(backbone: Backbone, path: Path, key_map: KeyMap, *, decoder: bool = False) -> int:
    """Fill `backbone` in place from foreign files; returns how many of their tensors have no place in it.

    decoder: whether decoder and word embeddings are needed as well as vision tower and projector. A tensor named
    "query" of the right shape fills the action query. Raises InputError naming what is missing, doubled, of another
    shape or not finite, and for a file that is not whole.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    from probes.weights import readable_name

    state = dict(backbone.base.state_dict())
    state["query"] = backbone.query.data
    filled: dict[str, str] = {}
    left: list[str] = []
    for file in weight_files(path):
        try:
            with safe_open(file, "pt") as handle, torch.no_grad():
                for name in handle.keys():  # noqa: SIM118 (not a dict)
                    own = name
                    for pattern, replacement in key_map:
                        own = re.sub(pattern, replacement, own)
                    own = readable_name(own, backbone.spec)
                    if own not in state:
                        left.append(name)
                        continue
                    value, place = handle.get_tensor(name), state[own]
                    if own in filled:
                        raise InputError(f"{filled[own]} and {name} both stand for {own}", where=file)
                    if value.shape != place.shape:
                        shapes = f"{tuple(value.shape)}, the model has {tuple(place.shape)}"
                        raise InputError(
                            f"{name} ({own}) has shape {shapes}", where=file, fix="give its own base model"
                        )
                    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                        raise InputError(f"weight {name} holds NaN or infinity", where=file)
                    place.copy_(value)
                    filled[own] = name
        except SafetensorError as error:
            raise InputError(f"not a whole safetensors file ({error})", where=file) from None
    parts = ("vision", "projector", "decoder", "embeddings") if decoder else ("vision", "projector")
    missing = []
    for name, _ in backbone.base.named_parameters():
        group = str(backbone.spec.group_of(name)).split(".")[0]
        if group in parts and name not in filled:
            missing.append(name)
    if missing:
        seen = f"the file has {', '.join(left[:2])}, …" if left else "the file has no more"
        fix = f"{seen}: map its names with --key-map 'PATTERN=>REPLACEMENT'"
        raise InputError(f"{len(missing)} weights missing: {', '.join(missing[:3])}", where=path, fix=fix)
    backbone.lineage = {"source": Path(path).name, "init": "foreign weights", "init_seed": None}
    return len(left)
