"""Training settings: one validated object, from a named preset or a TOML file, overridden key by key.

An unknown key is an error that names the nearest one, wherever it stands.

Trap: the defaults are VLM4VLA's optimisation (constant rate, no clipping, gripper weight 0.01), made for pretrained
models of billions, with the action query where it is correct; the `paper/…` presets replicate the authors' query too.
The `tiny` preset is for a random model of a fraction of a million parameters and differs on purpose.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.folders import project_root
from vlm4vla_core.options import PAPER, BackboneOptions

# Settings that decide how a run is carried out but not what it computes; they may change between re-issues.
OPERATIONAL = frozenset({
    "save_every", "keep_last", "val_every", "val_rows", "log_every", "threads", "workers", "device", "trackers",
    "snapshots", "parallel", "image_root", "rollout_every", "rollout_benchmark", "rollout_tasks", "rollout_episodes",
})  # fmt: skip

DEFAULT = str(project_root() / "data/nano/paligemma-s")  # the nano VLM that one starts with
DRAWN = ("tiny", "nano")  # backbones that are drawn from the seed, not read
Part = Literal["vision", "projector", "decoder", "word_embeddings"]
Objective = Literal["action", "language", "fast", "dense"]


class TrainConfig(BaseModel):
    """Everything that decides a run, apart from its data."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    backbone: str = "tiny"
    """`tiny`, `nano`, a Hugging Face folder or hub id, or a checkpoint or run to go on from, with its own options."""
    family: str = "qwen2_5_vl"
    """Family of the tiny or nano backbone."""
    size: Literal["xs", "s", "m", "l"] = "s"
    """Size of the nano backbone (see docs/nano-zoo.md)."""
    init: Literal["pretrained", "scratch"] = "pretrained"
    """scratch: draw the weights anew, from the seed."""
    scratch: tuple[Literal["vision", "projector", "decoder"], ...] = ("vision", "projector", "decoder")
    """What init = scratch draws anew."""
    objective: Objective = "action"
    """action (the VLA), language (answers to questions about the scene), fast (actions as text tokens) or dense (heads
    on image tokens)."""
    auxiliary: dict[Objective, float] = Field(default_factory=dict)
    """Further objectives on the same pictures and their weights in the loss, such as language = 0.1."""
    questions: tuple[str, ...] = ()
    """Kinds of questions of the language objective (see docs/auxiliary-data.md); all simple ones by default."""
    questions_per_picture: int = Field(default=1, ge=1)
    """Most questions about one picture, one after the other in one sequence; each is asked once."""
    sources: Literal["all", "stores", "files"] = "all"
    """What of the data given is trained on: episode stores, question files or both; a stage may have its own."""
    image_root: str | None = None
    """Folder of the pictures that question files name; by default the one that the file lies in."""
    cache_features: bool = False
    """Compute the image tokens of a frozen tower once, keep them in RUN/features and train on them."""
    dense_targets: tuple[Literal["presence", "position", "gripper", "depth", "segmentation", "offset"], ...] = ()
    """What the dense objective learns; all that the stores have by default."""
    fast_vocab: int = Field(default=1024, ge=2)
    """Action tokens of the fast objective, at most; fewer when the vocabulary has no room."""
    weights: tuple[float, ...] = ()
    """Share of each store in every batch; their numbers of rows by default."""
    augmentation: Literal["none", "calvin", "bridge", "libero"] = "none"
    """Changes of training pictures: the authors' for a benchmark (see `episodes.augment`)."""
    skip_corrupt: bool = False
    """Replace samples whose picture cannot be read by others of the batch, and count them, instead of stopping."""
    image_size: int | None = Field(default=None, gt=0)
    """Pixels per side; the model's own by default."""
    n_queries: int = Field(default=1, ge=1)
    """Learned vectors; this and the next seven: see `BackboneOptions`."""
    query_init: Literal["scaled", "zeros"] = "scaled"
    """Start of the query."""
    positions: Literal["native", "arange"] = "native"
    """Positions of tokens."""
    query_role: Literal["suffix", "prefix"] = "suffix"
    """PaliGemma: whether the prompt sees the query (prefix)."""
    query_place: Literal["before_pads", "after_pads"] = "before_pads"
    """Place of the query in a padded row."""
    prompt: Literal["own", "paper"] = "own"
    """Words around the instruction."""
    upscale: bool = False
    """Enlarge pictures as the authors' processors did."""
    dropout: bool = False
    """Keep the checkpoint's own dropout."""
    camera: str | None = None
    """Camera of the store; its first one by default."""
    chunk: int = Field(default=10, ge=1)
    """Actions predicted at once."""
    normalisation: Literal["quantile", "quantile_clip", "clip"] = "quantile"
    """From actions to [-1, 1]; this and the next: see `PolicyConfig`."""
    clip_actions: float = Field(default=0.65, gt=0)
    """Bound of the normalisations that clip."""
    head: Literal["fc", "mlp", "flow"] = "fc"
    """Policy head: fc (the paper's), mlp (two layers) or flow (generates actions from noise)."""
    head_width: int = Field(default=1024, ge=4)
    """Width of the head."""
    flow_steps: int = Field(default=10, ge=1)
    """Steps of the flow head from noise to action."""
    arm_loss: Literal["huber", "l1", "l2"] = "huber"
    """Loss of the arm."""
    huber_delta: float = Field(default=1.0, gt=0)
    """Where Huber's loss turns linear."""
    gripper_weight: float = Field(default=0.01, ge=0)
    """Weight of the gripper in the loss."""
    freeze: tuple[Part, ...] = ()
    """Parts that are not trained. "projector" is the merger, which "vision" does not include."""
    lora: tuple[Part, ...] = ()
    """Parts whose weights stay while low-rank adapters on them are trained."""
    lora_rank: int = Field(default=16, ge=1)
    """Rank of the adapters."""
    lora_alpha: int = Field(default=32, ge=1)
    """Scale of the adapters, over the rank."""
    pad_to: int | None = Field(default=None, ge=1)
    """Tokens that every batch of actions is padded to; its longest prompt by default."""
    compile: bool = False
    """Compile vision blocks and decoder layers one by one; set pad_to with it."""
    checkpoint_activations: bool = False
    """Compute activations twice instead of keeping them: less memory, more time."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the base computes in bfloat16; weights, query, head, losses and optimizer stay fp32."""
    max_steps: int = Field(default=30_000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=128, ge=1)
    """Samples per step, of all processes together."""
    accumulate: int = Field(default=1, ge=1)
    """Parts that a process works through its samples in, one after the other, to save memory."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the linear layers of vision tower, projector and decoder, AdamW for all else."""
    lr: float = Field(default=2e-5, gt=0, allow_inf_nan=False)
    """Learning rate after warm-up."""
    query_lr: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Rate of the action query; lr by default."""
    head_lr: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Rate of the head; lr by default."""
    vision_lr: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Rate of vision tower and projector; lr by default."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up; cosine falls to 0 at max_steps."""
    warmup_steps: int = Field(default=2058, ge=0)
    """Steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's, on matrices alone."""
    clip: float = Field(default=0.0, ge=0)
    """Largest gradient norm; 0 for none."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of a moving average of the weights, saved in RUN/ema at the end; 0 for none."""
    patience: int = Field(default=0, ge=0)
    """Stop after so many validations in a row without a lower loss; 0 for never."""
    seed: int = Field(default=0, ge=0)
    """Seed of the start weights and of the data order."""
    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of episodes held out, where the store declares no split."""
    val_rows: int = Field(default=512, ge=1)
    """Held-out rows to validate on."""
    val_every: int = Field(default=0, ge=0)
    """Steps between validations; 0: only at the start and the end."""
    save_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 keeps only the start and the end."""
    keep_last: int = Field(default=0, ge=0)
    """Keep the start, so many newest checkpoints and the best validated one, saved for that; 0 keeps all."""
    log_every: int = Field(default=5, ge=1)
    """Steps between lines of the log."""
    snapshots: Literal["none", "sketch", "weights"] = "none"
    """Record at steps 0, 1, 2, 4, 8 …: sketches of the weights and gradient norms by module, or also the weights."""
    trackers: tuple[str, ...] = ()
    """Trackers of accelerate to log to as well, such as tensorboard or wandb."""
    rollout_every: int = Field(default=0, ge=0)
    """Steps between short rollouts on validation episodes, and at the end; 0 for none. They change nothing else."""
    rollout_benchmark: str = "tabletop-tasks-abc@1"
    """Benchmark of the rollouts; its looks and words of training, and seeds of their own, never those of the test."""
    rollout_tasks: tuple[str, ...] = ()
    """Tasks of the rollouts; all of the benchmark by default."""
    rollout_episodes: int = Field(default=10, ge=1)
    """Rollouts of each task."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: ddp (every process holds the model) or fsdp (they share weights, gradients and optimizer)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    threads: int | None = Field(default=None, ge=1)
    """Torch threads; 2 at most by default."""
    workers: int = Field(default=1, ge=1)
    """Threads that prepare batches, so many ahead."""

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        if both := sorted(set(self.freeze) & set(self.lora)):
            raise ValueError(f"{both[0]} stands in freeze and in lora; lora alone freezes its weights")
        if self.objective in self.auxiliary or "action" in self.auxiliary:
            raise ValueError("auxiliary objectives are language, fast and dense, beside another objective")
        if any(not 0 < weight < float("inf") for weight in self.auxiliary.values()):
            raise ValueError("weights of auxiliary objectives must be positive numbers")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must be at least 0 and below 1")
        if any(not 0 < weight < float("inf") for weight in self.weights):
            raise ValueError("weights of stores must be positive numbers")
        if len(set(self.freeze)) == len(get_args(Part)) and not {"action", "dense"} & set(self.objectives()):
            raise ValueError("every part is frozen, so that nothing is left to train; leave one out of freeze")
        if self.cache_features:
            if left := sorted({"vision", "projector"} - set(self.freeze)):
                raise ValueError(f"cache_features needs a frozen tower; add {' and '.join(left)} to freeze")
            others = {"augmentation": "none", "dropout": False, "skip_corrupt": False, "parallel": "ddp"}
            if changed := [name for name, value in others.items() if getattr(self, name) != value]:
                raise ValueError(f"cache_features needs {changed[0]} = {others[changed[0]]}")
        if self.patience and not self.val_every:
            raise ValueError("patience needs val_every")
        if self.optimizer == "muon" and self.parallel == "fsdp":
            raise ValueError("muon needs whole matrices, which fsdp shares out; use ddp or adamw")
        if self.rollout_every and self.objective != "action":
            raise ValueError("rollout_every needs the action objective")
        if self.rollout_every and self.parallel == "fsdp":
            raise ValueError("rollouts need the whole model in one process; use parallel ddp, or evaluate checkpoints")
        return self

    def objectives(self) -> dict[str, float]:
        """All objectives, the main one first, with their weights in the loss."""
        return {self.objective: 1.0} | {str(name): weight for name, weight in self.auxiliary.items()}

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
        return value if self.backbone in DRAWN else {**value, "backbone": "given"}


# All that the authors chose. Batches are of 8 GPUs; their `run.sh` starts 4, which halves them.
_PAPER = {
    **PAPER.to_dict(), "head": "fc", "head_width": 1024, "arm_loss": "huber", "gripper_weight": 0.01, "clip": 0.0,
    "weight_decay": 0.0, "schedule": "constant", "lr": 2e-5, "seed": 123, "precision": "bf16",
}  # fmt: skip
_OXE = {"chunk": 4, "normalisation": "quantile_clip", "batch_size": 512, "max_steps": 50_000}

PRESETS: dict[str, dict[str, Any]] = {
    "paper/calvin": {
        **_PAPER, "chunk": 10, "normalisation": "clip", "batch_size": 128, "max_steps": 30_000, "warmup_steps": 2058,
        "augmentation": "calvin",
    },
    "paper/bridge": {**_PAPER, **_OXE, "warmup_steps": 2500, "augmentation": "bridge"},
    "paper/libero10": {**_PAPER, **_OXE, "warmup_steps": 250, "augmentation": "libero"},
    # A random model of 0.3 M parameters on the CPU: a minute or two. Tuned on held-out episodes of the built-in world.
    "tiny": {
        "backbone": "tiny", "chunk": 4, "head_width": 256, "gripper_weight": 0.03,
        "max_steps": 400, "batch_size": 32, "lr": 1e-3, "schedule": "cosine", "warmup_steps": 60,
        "betas": (0.9, 0.98), "weight_decay": 0.02, "clip": 1.0, "save_every": 100, "val_every": 100, "threads": 1,
        "device": "cpu",
    },
    # What the stages of a nano VLM's pretraining share (data/nano/recipes).
    "nano/pretrain": {
        "backbone": "nano", "batch_size": 32, "lr": 2.5e-3, "schedule": "cosine", "warmup_steps": 100,
        "betas": (0.9, 0.98), "weight_decay": 0.05, "clip": 1.0, "val_fraction": 0.03, "val_rows": 256,
        "val_every": 500, "save_every": 500, "keep_last": 1, "log_every": 50, "threads": 1,
    },
    # The shipped nano VLM as a policy, on one thread a few minutes; vision at half the rate keeps what it has learnt.
    "nano": {
        "backbone": DEFAULT, "chunk": 4, "head": "mlp", "head_width": 256, "huber_delta": 0.3, "gripper_weight": 0.03,
        "max_steps": 2000, "batch_size": 32, "lr": 8e-4, "vision_lr": 4e-4, "schedule": "cosine", "warmup_steps": 100,
        "betas": (0.9, 0.98), "weight_decay": 0.05, "clip": 1.0, "val_fraction": 0.03, "save_every": 500,
        "keep_last": 1, "val_every": 500, "log_every": 50, "threads": 1,
    },
}  # fmt: skip

# Where the values of the `paper/…` presets come from; CSV: data/paper/training_configs.csv, of the authors' repository.
_CSV = "released configurations (training_configs.csv)"
SOURCES = {
    "batch_size": f"{_CSV}: global batch on 8 GPUs",
    "lr": f"{_CSV}; 5e-5 for PaliGemma and Kosmos-2 on Bridge and LIBERO (PaliGemma-2: as PaliGemma, none released)",
    "weight_decay": _CSV,
    "chunk": _CSV,
    "gripper_weight": _CSV,
    "seed": _CSV,
    "image_size": _CSV,
    "head": f"{_CSV}: FCDecoder",
    "head_width": "authors' code, policy_head/base_policy.py",
    "arm_loss": "authors' code: Huber, delta 1; the paper's equation has a squared error",
    "precision": f"{_CSV}: bf16 for Qwen and InternVL; theirs is fp16 for PaliGemma and Kosmos-2, bf16 here",
    "clip": "authors' entry script puts 0, no clipping, in place of the files' 1.0",
    "schedule": "authors' code: constant after warm-up",
    "warmup_steps": "authors' trainer: 0.25 of what it calls an epoch",
    "max_steps": "project page: 30k on CALVIN, 50k on Bridge and LIBERO",
    "normalisation": f"authors' data code; bound: {_CSV}",
    "augmentation": "authors' data code: shift of 10 px, or crop and colours",
}
_FASTER = ("paligemma", "kosmos")  # lr 5e-5 in their files of Bridge and LIBERO-10


def make_config(name: str, overrides: dict[str, Any] | None = None) -> TrainConfig:
    """Settings from a preset's name or a TOML file, with `overrides` on top.

    A file may name a preset to start from (`preset = "tiny"`). Raises InputError on an unknown preset or key (naming
    the nearest), a missing or malformed file, a value out of range, and a file of several stages.
    """
    found = make_stages(name, overrides)
    if len(found) > 1:
        raise InputError(f"a file of {len(found)} stages, one is expected", where=name, fix="train it as stages")
    return found[0][1]


def make_stages(name: str, overrides: dict[str, Any] | None = None) -> list[tuple[str, TrainConfig]]:
    """Names and settings of the stages of a TOML file, in order; one, without a name, of all else.

    Each `[[stages]]` table holds a name and what differs from the settings above it; every stage starts from the last
    checkpoint of the one before. `overrides` go to all stages. Raises InputError as `make_config`.
    """
    overrides = overrides or {}
    if name in PRESETS:
        values: dict[str, Any] = {"preset": name}
    elif name.endswith(".toml") or Path(name).is_file():
        values = _read_toml(Path(name))
    else:
        raise InputError(f"unknown preset '{name}'", fix=f"{nearest(name, PRESETS)}; or give a .toml file")
    stages = values.pop("stages", None)
    if stages is None:
        return [("", _validated({**_base(values, overrides, name), **overrides}, name))]
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise InputError("stages must be tables", where=name, fix="write [[stages]] before each")
    made = []
    for number, stage in enumerate(stages, 1):
        rest = {**values, **{key: value for key, value in stage.items() if key != "name"}}
        title = str(stage.get("name", f"stage-{number}"))
        made.append((title, _validated({**_base(rest, overrides, name), **overrides}, f"{name}, {title}")))
    titles = [title for title, _ in made]
    if len(set(titles)) < len(titles) or any(title != Path(title).name for title in titles):
        raise InputError(
            f"stages named {', '.join(titles)}", where=name, fix="give each a name of its own, as a folder"
        )
    return made


def _base(values: dict[str, Any], overrides: dict[str, Any], where: str) -> dict[str, Any]:
    """`values` on top of the preset that they name."""
    values = dict(values)
    base = values.pop("preset", None)
    if base is None:
        return values
    if base not in PRESETS:
        raise InputError(f"unknown preset '{base}'", where=where, fix=nearest(str(base), PRESETS))
    given = {**values, **overrides}
    faster = base in ("paper/bridge", "paper/libero10") and any(word in _family(given) for word in _FASTER)
    return {**PRESETS[base], **({"lr": 5e-5} if faster else {}), **values}


def _family(values: dict[str, Any]) -> str:
    """What says the model's family: its hub id, or the config of its folder."""
    backbone = str(values.get("backbone", "tiny"))
    if backbone == "tiny":
        return str(values.get("family", ""))
    folder = Path(backbone)
    if (folder / "checkpoints").is_dir():  # a run
        folder = max((folder / "checkpoints").glob("step-*"), default=folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(config.get("model_type") or config["backbone"]["family"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return backbone.lower()


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("no such settings file", where=path) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"not a valid TOML file ({error})", where=path) from None


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
