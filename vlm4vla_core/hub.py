"""Real checkpoints in Hugging Face's layout, read headless, and never silently as random weights.

Only safetensors are read: nothing is unpickled. Any weight that is missing, left over or of another shape is an
error that names it, apart from the family's declared list (the output layer, which actions do not need). Then every
weight is compared with the files, bit for bit, through the family's own table of published names.

Trap: a headless load that matches no key succeeds in transformers and returns a randomly initialised model.
"""

from __future__ import annotations

import copy
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm4vla_core.errors import InputError
from vlm4vla_core.families import FamilySpec, family_of, family_of_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_LOUD = ("modeling_utils", "distributed.tensor_parallel", "integrations.tensor_parallel")


def read_base(
    path: str, *, init: str, seed: int, dtype: torch.dtype | None, attn: str | None, language_head: bool
) -> tuple[Any, Any, FamilySpec, Tensor | None]:
    """The headless base, tokenizer, family entry and (when asked for and untied) output layer (V, D) of a checkpoint.

    Raises InputError as `load_backbone` says.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    config = _config(path)
    spec = spec_of(config, path)
    options: dict[str, Any] = {"attn_implementation": attn or spec.attention, "dtype": dtype or torch.float32}
    if init == "scratch":
        base, head = draw(config, spec, seed, untied=language_head and not config.tie_word_embeddings, **options)
    else:
        with torch.random.fork_rng(devices=[]):  # a load must not move the caller's random state
            options |= {"use_safetensors": True, "output_loading_info": True}
            options["ignore_mismatched_sizes"] = True  # they are reported then, by name, and refused below
            base, report = _from_pretrained(AutoModel, path, config=config, **options)
        check_report(report, spec, path)
        check_finite(base, path)
        folder = _folder(path)
        verify(base, spec, folder)
        own = read_tensor(folder, spec, "lm_head.weight")
        words = base.get_submodule(spec.embeddings).weight.detach().cpu()
        # Configs leave it unsaid, or say it of the text part only; a layer in the file that differs is not tied.
        said = config.tie_word_embeddings, getattr(config.get_text_config(), "tie_word_embeddings", False)
        tied = any(said) if own is None else said[0] and torch.equal(own.to(words.dtype), words)
        base.config.tie_word_embeddings = tied
        if language_head and not tied and own is None:
            raise InputError("the checkpoint has no output layer", where=path, fix="leave language_head out")
        head = own.to(words.dtype) if language_head and not tied and own is not None else None
    return base, _from_pretrained(AutoTokenizer, path), spec, head


def spec_of(config: Any, where: object) -> FamilySpec:
    """The family entry of a Hugging Face config. Raises InputError naming the nearest known one."""
    return family_of(config.model_type, text_type=getattr(config.get_text_config(), "model_type", ""), where=where)


def draw(config: Any, spec: FamilySpec, seed: int, *, untied: bool, **options: Any) -> tuple[Any, Tensor | None]:
    """A base (and output layer, if untied) with every weight drawn anew by the library's default, from `seed`.

    Matrices that the library leaves at zero are drawn like the rest: Gemma3's image projection would else stay
    silent, as no gradient passes it. The caller's random state is left alone.
    """
    import torch
    from transformers import AutoModel

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        base = AutoModel.from_config(copy.deepcopy(config), **options)
        spread = getattr(config.get_text_config(), "initializer_range", 0.02)
        for parameter in base.parameters():
            if parameter.dim() == 2 and not bool(parameter.any()):
                parameter.normal_(std=spread)
        head = torch.empty_like(base.get_submodule(spec.embeddings).weight).normal_(std=spread) if untied else None
    return base, head


def _config(path: str) -> Any:
    from transformers import AutoConfig

    local = Path(path)
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise InputError("this folder has no config.json, so it is no model", where=path)
        values = _json(local / "config.json")
        family_of_config(values if isinstance(values, dict) else {}, path)
    elif local.exists() or path.startswith((".", "/")) or path.count("/") != 1:
        raise InputError("no such model folder", where=path, fix="a hub id looks like owner/name")
    return _from_pretrained(AutoConfig, path)


def _json(path: Path) -> Any:
    from vlm4vla_core.folders import read_json

    return read_json(path)


def _from_pretrained(auto: Any, path: str, **options: Any) -> Any:
    """`auto.from_pretrained`, its many kinds of failure told in one line."""
    import safetensors
    from huggingface_hub.errors import StrictDataclassError
    from transformers.utils import logging as library

    # Retries, a table of keys that we check, and a list of layers that are not spread over machines.
    for name in ("huggingface_hub", *(f"transformers.{part}" for part in _LOUD)):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        library.disable_progress_bar()
    try:
        return auto.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError, StrictDataclassError) as error:
        what = auto.__name__.removeprefix("Auto").lower()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        first = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
        fix = "check the folder's files" if Path(path).is_dir() else "give a local folder, or go online and log in"
        raise InputError(f"cannot load the {what} ({first[:300]})", where=path, fix=fix) from None


def check_report(report: dict[str, Any], spec: FamilySpec, path: str) -> None:
    """Raise InputError naming the weights that a load left missing, left over or did not fit."""
    allowed = re.compile("|".join(spec.unexpected) or r"(?!)")
    unexpected = sorted(key for key in report["unexpected_keys"] if not allowed.fullmatch(spec.canonical(key)))
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


# --- the files themselves -------------------------------------------------------------------------------


def _folder(path: str) -> Path:
    """The folder that holds a checkpoint's files: its own, or the snapshot of a hub id that was just loaded."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import try_to_load_from_cache

    for name in (INDEX, SINGLE):
        if isinstance(found := try_to_load_from_cache(path, name), str):
            return Path(found).parent
    raise InputError("the downloaded weights are not in the cache", where=path, fix="give a local folder")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder in Hugging Face's layout, sharded or not. Raises InputError."""
    if (folder / INDEX).is_file():
        files = [folder / name for name in sorted(set(_json(folder / INDEX)["weight_map"].values()))]
    else:
        files = [folder / SINGLE]
    for file in files:
        if not file.is_file():
            raise InputError("a weight file is missing", where=file, fix="fetch the checkpoint again")
    return files


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Names and lazily read tensors of all files."""
    from safetensors import safe_open

    for file in weight_files(folder):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                yield name, lambda handle=handle, name=name: handle.get_tensor(name)


def verify(base: Any, spec: FamilySpec, folder: Path) -> None:
    """Compare every weight of a loaded base with the files, bit for bit. Raises InputError naming one that differs.

    The word embeddings are mended instead: transformers 5.17 zeroes Kosmos-2's row of the padding token as it loads.
    """
    import torch

    state, allowed = base.state_dict(), re.compile("|".join(spec.unexpected) or r"(?!)")
    absent = set(dict(base.named_parameters()))
    for name, read in _tensors(folder):
        own = spec.canonical(name)
        if own not in state:
            if not allowed.fullmatch(own):
                raise InputError(f"weight {name} has no place in the {spec.name} model", where=folder)
            continue
        absent.discard(own)
        target, value = state[own], read()
        # Experts' matrices stand transposed in published files.
        fits = [v for v in (value, value.transpose(-1, -2) if value.dim() == 3 else value) if v.shape == target.shape]
        fits = [v.to(target.dtype) for v in fits]
        if not any(torch.equal(v, target.cpu()) for v in fits):
            if not fits or own != f"{spec.embeddings}.weight":
                raise InputError(f"weight {name} was not loaded as it stands in the file", where=folder)
            target.copy_(fits[0])
    if absent:
        raise InputError(f"{len(absent)} weights missing: {', '.join(sorted(absent)[:4])}", where=folder)


def read_tensor(folder: Path, spec: FamilySpec, own: str) -> Tensor | None:
    """One tensor of a checkpoint folder, by its headless name; None when no file has it."""
    return next((read() for name, read in _tensors(folder) if spec.canonical(name) == own), None)
