"""Real checkpoints in Hugging Face's layout, read headless, and never silently as random weights.

Only safetensors are read: nothing is unpickled. Any weight that is missing, left over or of another shape is an
error that names it, apart from the family's declared list (the output layer, which actions do not need).

Trap: a headless load that matches no key succeeds in transformers and returns a randomly initialised model.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.families import FamilySpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def read_base(
    path: str,
    family_of: Callable[..., FamilySpec],
    *,
    init: str,
    seed: int,
    dtype: torch.dtype | None,
    attn: str | None,
    language_head: bool,
) -> tuple[Any, Any, FamilySpec, Tensor | None]:
    """The headless base, tokenizer, family entry and (when asked for and untied) output layer (V, D) of a checkpoint.

    Raises InputError as `load_backbone` says.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    config = _config(path)
    spec = family_of(config.model_type, where=path)
    options: dict[str, Any] = {"attn_implementation": attn or spec.attention, "dtype": dtype or torch.float32}
    with torch.random.fork_rng(devices=[]):  # a load must not move the caller's random state
        if init == "scratch":
            torch.manual_seed(seed)
            base = AutoModel.from_config(config, **options)
        else:
            base, report = _from_pretrained(
                AutoModel, path, config=config, use_safetensors=True, output_loading_info=True, **options
            )
            check_report(report, spec, path)
    tokenizer = _from_pretrained(AutoTokenizer, path)
    head = None
    if language_head and not config.tie_word_embeddings and init == "pretrained":
        head = read_tensor(Path(path), spec.head_weight).to(options["dtype"])
    check_finite(base, path)
    return base, tokenizer, spec, head


def _config(path: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    local = Path(path)
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise InputError("this folder has no config.json, so it is no model", where=path)
        config = _json(local / "config.json")
        kind = str(config.get("model_type", "")) if isinstance(config, dict) else ""
        if kind not in CONFIG_MAPPING_NAMES:
            from vlm4vla_core.families import families

            raise InputError(f"no model family for model_type '{kind}'", where=path, fix=nearest(kind, families()))
    elif local.exists() or path.startswith((".", "/")) or path.count("/") != 1:
        raise InputError("no such model folder", where=path, fix="a hub id looks like owner/name")
    return _from_pretrained(AutoConfig, path)


def _json(path: Path) -> Any:
    from vlm4vla_core.folders import read_json

    return read_json(path)


def _from_pretrained(auto: Any, path: str, **options: Any) -> Any:
    """`auto.from_pretrained`, its many kinds of failure told in one line."""
    import safetensors

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries, a dozen lines, end in one of ours
    try:
        return auto.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        what = auto.__name__.removeprefix("Auto").lower()
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        fix = "check the folder's files" if Path(path).is_dir() else "give a local folder, or go online and log in"
        raise InputError(f"cannot load the {what} ({first[:300]})", where=path, fix=fix) from None


def check_report(report: dict[str, Any], spec: FamilySpec, path: str) -> None:
    """Raise InputError naming the weights that a load left missing, left over or did not fit."""
    allowed = re.compile("|".join(f"(?:{pattern})" for pattern in spec.unexpected) or r"(?!)")
    unexpected = sorted(key for key in report["unexpected_keys"] if not allowed.fullmatch(key))
    mismatched = sorted(entry[0] if isinstance(entry, tuple) else entry for entry in report["mismatched_keys"])
    problems = {"missing": sorted(report["missing_keys"]), "left over": unexpected, "of another shape": mismatched}
    for what, names in problems.items():
        if names:
            listing = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            fix = "the model would be partly random, so fetch the checkpoint again"
            raise InputError(f"{len(names)} weights {what}: {listing}", where=path, fix=fix)
    if errors := report.get("error_msgs"):
        raise InputError(str(errors[0]).splitlines()[0], where=path)


def check_finite(module: torch.nn.Module, where: object) -> None:
    """Raise InputError naming the first weight that holds NaN or infinity."""
    import torch

    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise InputError(f"weight {name} holds NaN or infinity", where=where, fix="use an earlier checkpoint")


def read_tensor(folder: Path, name: str) -> Tensor:
    """One tensor of a checkpoint folder, sharded or not. Raises InputError when no file of it has that tensor."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    if index.is_file():
        files = [folder / json.loads(index.read_text())["weight_map"].get(name, "model.safetensors")]
    for file in files:
        if file.is_file():
            with safe_open(file, "pt") as handle:
                if name in handle.keys():  # noqa: SIM118 (not a dict)
                    return handle.get_tensor(name)
    raise InputError(f"the checkpoint has no weight '{name}'", where=folder, fix="give a local folder that holds it")
