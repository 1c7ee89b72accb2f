"""Training settings: one validated object, from a named preset or a TOML file, overridden key by key.

An unknown key is an error that names the nearest one, wherever it stands.

Trap: the defaults are VLM4VLA's optimisation (constant rate, no clipping, gripper weight 0.01), made for pretrained
models of billions, with the action query where it is correct; the `paper` presets replicate the authors' query as well.
The `tiny` preset is for a random model of a fraction of a million parameters and differs on purpose.
"""

from __future__ import annotations

import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.options import PAPER, BackboneOptions

# Settings that decide how a run is carried out but not what it computes; they may change between re-issues.
OPERATIONAL = frozenset({"save_every", "val_every", "val_rows", "log_every", "threads"})


Part = Literal["vision", "projector", "decoder", "word_embeddings"]


class TrainConfig(BaseModel):
    """Everything that decides a run, apart from its data.

    backbone: "tiny" or a path (Hugging Face folder or hub id, or a checkpoint or run to go on from, which keeps its own
    options). init, scratch: see `load_backbone`. n_queries … dropout: see `BackboneOptions`.
    objective: "action" (the VLA) or "language" (answers to questions about the scene).
    head, arm_loss, huber_delta, gripper_weight, flow_steps, normalisation, clip_actions, pad_to: see `PolicyConfig`.
    freeze: parts that are not trained; "projector" is the merger, which "vision" does not include.
    lora: parts whose weights stay while adapters of lora_rank on them are trained (see `lora.add_lora`).
    compile: vision blocks and decoder layers one by one; set pad_to with it. Both are for the action objective.
    lr is reached after warmup_steps; "cosine" then falls to 0 at max_steps. clip: largest gradient norm, 0 for none.
    val_rows: rows of held-out episodes to validate on. threads: of torch; None means 2 at most.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: str = "tiny"
    family: str = "qwen2_5_vl"
    init: Literal["pretrained", "scratch"] = "pretrained"
    objective: Literal["action", "language"] = "action"
    scratch: tuple[Literal["vision", "projector", "decoder"], ...] = ("vision", "projector", "decoder")
    image_size: int | None = Field(default=None, gt=0)
    n_queries: int = Field(default=1, ge=1)
    query_init: Literal["scaled", "zeros"] = "scaled"
    positions: Literal["native", "arange"] = "native"
    query_role: Literal["suffix", "prefix"] = "suffix"
    query_place: Literal["before_pads", "after_pads"] = "before_pads"
    prompt: Literal["own", "paper"] = "own"
    upscale: bool = False
    dropout: bool = False
    camera: str | None = None
    chunk: int = Field(default=10, ge=1)
    normalisation: Literal["quantile", "quantile_clip", "clip"] = "quantile"
    clip_actions: float = Field(default=0.65, gt=0)
    head: Literal["fc", "mlp", "flow"] = "fc"
    head_width: int = Field(default=1024, ge=4)
    flow_steps: int = Field(default=10, ge=1)
    arm_loss: Literal["huber", "l1", "l2"] = "huber"
    huber_delta: float = Field(default=1.0, gt=0)
    gripper_weight: float = Field(default=0.01, ge=0)
    freeze: tuple[Part, ...] = ()
    lora: tuple[Part, ...] = ()
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    pad_to: int | None = Field(default=None, ge=1)
    compile: bool = False
    max_steps: int = Field(default=30_000, ge=1)
    batch_size: int = Field(default=128, ge=1)
    lr: float = Field(default=2e-5, gt=0, allow_inf_nan=False)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(default=2058, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=0.0, ge=0)
    seed: int = Field(default=0, ge=0)
    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    val_rows: int = Field(default=512, ge=1)
    val_every: int = Field(default=0, ge=0)
    save_every: int = Field(default=0, ge=0)
    log_every: int = Field(default=5, ge=1)
    threads: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_fate_for_a_part(self) -> Self:
        if both := sorted(set(self.freeze) & set(self.lora)):
            raise ValueError(f"{both[0]} stands in freeze and in lora; lora alone freezes its weights")
        return self

    def options(self) -> BackboneOptions:
        """How the action query enters the backbone."""
        return BackboneOptions(**{field.name: getattr(self, field.name) for field in fields(BackboneOptions)})

    def default_options(self) -> bool:
        """Whether the query enters as it does when nothing is said, which leaves a checkpoint's own options alone."""
        return replace(self.options(), image_size=None) == BackboneOptions()

    def identity(self) -> dict[str, Any]:
        """The settings that decide the result, as JSON values; equal identities and inputs give equal weights.

        A backbone's path is left out: its content is among the run's inputs.
        """
        value = self.model_dump(mode="json", exclude=set(OPERATIONAL))
        return value if self.backbone == "tiny" else {**value, "backbone": "given"}


# All that the authors chose, for CALVIN; their code has 5e-5 for PaliGemma and Kosmos-2 on the other two. Their random
# shifts and colour changes of pictures are no setting of the backbone.
_PAPER = {
    **PAPER.to_dict(), "head": "fc", "head_width": 1024, "arm_loss": "huber", "gripper_weight": 0.01, "clip": 0.0,
    "weight_decay": 0.0, "schedule": "constant", "lr": 2e-5, "seed": 123, "chunk": 10, "normalisation": "clip",
    "batch_size": 128, "max_steps": 30_000, "warmup_steps": 2058,
}  # fmt: skip
_OXE = {"chunk": 4, "normalisation": "quantile_clip", "batch_size": 512, "max_steps": 50_000}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "paper-bridge": {**_PAPER, **_OXE, "warmup_steps": 2500},
    "paper-libero": {**_PAPER, **_OXE, "warmup_steps": 250},
    # A random model of 0.3 M parameters on the CPU: a minute or two. Tuned on held-out episodes of the built-in world.
    "tiny": {
        "backbone": "tiny", "image_size": 112, "chunk": 4, "head_width": 256, "gripper_weight": 0.03,
        "max_steps": 400, "batch_size": 32, "lr": 1e-3, "schedule": "cosine", "warmup_steps": 60,
        "betas": (0.9, 0.98), "weight_decay": 0.02, "clip": 1.0, "save_every": 100, "val_every": 100, "threads": 1,
    },
}  # fmt: skip


def make_config(name: str, overrides: dict[str, Any] | None = None) -> TrainConfig:
    """Settings from a preset's name or a TOML file, with `overrides` on top.

    A file may name a preset to start from (`preset = "tiny"`). Raises InputError on an unknown preset or key (naming
    the nearest), a missing or malformed file, and a value out of range.
    """
    if name in PRESETS:
        values, where = dict(PRESETS[name]), name
    elif name.endswith(".toml") or Path(name).is_file():
        values, where = _read_toml(Path(name)), name
    else:
        raise InputError(f"unknown preset '{name}'", fix=f"{nearest(name, PRESETS)}; or give a .toml file")
    return _validated({**values, **(overrides or {})}, where)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("no such settings file", where=path) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"not a valid TOML file ({error})", where=path) from None
    base = values.pop("preset", None)
    if base is None:
        return values
    if base not in PRESETS:
        raise InputError(f"unknown preset '{base}'", where=path, fix=nearest(str(base), PRESETS))
    return {**PRESETS[base], **values}


def _validated(values: dict[str, Any], where: str) -> TrainConfig:
    for key in values:
        if key not in TrainConfig.model_fields:
            raise InputError(f"unknown setting '{key}'", where=where, fix=nearest(key, TrainConfig.model_fields))
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # of two settings together
            raise InputError(first["msg"].removeprefix("Value error, "), where=where) from None
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"setting {key} = {first['input']!r}: {first['msg'].lower()}", where=where) from None
