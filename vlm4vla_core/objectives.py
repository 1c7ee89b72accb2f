"""What is trained and on what: the model a run starts from, its data, and the losses of action, language and FAST.

An objective turns pictures and rows into model inputs, and those into losses that are means over `count` parts (steps
of chunks, answer tokens). So the parts of a batch that several processes or passes handle add up to the whole batch's.

Trap: every random draw is made for the whole global batch and then cut to the part, or another number of processes
would ask other questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlm4vla_core import checkpoint, folders
from vlm4vla_core.episodes.augment import AUGMENTATIONS, augment
from vlm4vla_core.episodes.mixture import Mixture, mix
from vlm4vla_core.episodes.normalise import cut_share, quantile_normalise
from vlm4vla_core.episodes.sampling import action_chunks, batch_rows
from vlm4vla_core.episodes.store import REMAKE, EpisodeStore
from vlm4vla_core.errors import InputError, nearest
from vlm4vla_core.presets import TrainConfig

if TYPE_CHECKING:
    import torch

    from vlm4vla_core.backbone import Backbone
    from vlm4vla_core.fast import FastTokenizer

FAST_FILE = "fast.json"
_TOKENS_QUESTION = 'The task is "{}". Which action tokens carry it out?'  # as `vqa.embodied` asks


class Draw(NamedTuple):
    """A batch: which store (B,) and which of its rows (B,)."""

    which: np.ndarray
    rows: np.ndarray

    def part(self, places: slice) -> Draw:
        return Draw(self.which[places], self.rows[places])

    def __str__(self) -> str:
        several = len(np.unique(self.which)) > 1
        names = [f"{part}:{row}" if several else str(row) for part, row in zip(self.which, self.rows, strict=True)]
        return ", ".join(names[:8]) + (" …" if len(names) > 8 else "")


class Data:
    """The stores of a run, opened, split and read. Raises InputError on stores that cannot be trained on together."""

    def __init__(self, config: TrainConfig, paths: Sequence[Path]) -> None:
        stores = [EpisodeStore.open(path) for path in paths]
        for path, store in zip(paths, stores, strict=True):
            if len(bad := np.flatnonzero(~np.isfinite(store.action).all(1))):
                what = f"{len(bad)} actions are NaN or infinite, the first in row {bad[0]}"
                raise InputError(what, where=path, fix=REMAKE)
        if config.weights and len(config.weights) != len(stores):
            raise InputError(f"{len(config.weights)} weights for {len(stores)} stores", fix="give one for each")
        self.config = config
        self.mixture: Mixture = mix(stores, config.weights or None, fraction=config.val_fraction)
        self.stores = self.mixture.stores
        self.cameras = [_camera(config, store) for store in stores]
        self.stats = stores[0].stats["action"] if len(stores) == 1 else self.mixture.action_statistics()
        self.val = self._spread(config.val_rows)
        self.skipped = 0

    def _spread(self, wanted: int) -> Draw:
        """Held-out rows, evenly spread over all stores."""
        which = np.repeat(np.arange(len(self.stores)), [len(rows) for rows in self.mixture.val])
        rows = np.concatenate(self.mixture.val)
        return Draw(which, rows).part(np.linspace(0, len(rows) - 1, min(wanted, len(rows))).round().astype(int))  # type: ignore[arg-type]

    def batch(self, step: int) -> Draw:
        """The global batch of a step."""
        config = self.config
        if len(self.stores) > 1:
            return Draw(*self.mixture.batch(config.batch_size, config.seed, step))
        rows = batch_rows(self.mixture.train[0], config.batch_size, config.seed, step)
        return Draw(np.zeros(len(rows), np.int64), rows)

    def images(self, draw: Draw, size: int) -> np.ndarray:
        """uint8 (B, size, size, 3)."""
        found = np.empty((len(draw.rows), size, size, 3), np.uint8)
        for part in np.unique(draw.which):
            mine = draw.which == part
            found[mine] = self.stores[part].images(self.cameras[part], draw.rows[mine], size)
        return found

    def readable(self, draw: Draw, size: int) -> Draw:
        """`draw`, with what cannot be read replaced by other samples of it. Raises InputError when none can."""
        good, error = [], None
        for place in range(len(draw.rows)):
            try:
                self.images(draw.part(slice(place, place + 1)), size)
                good.append(place)
            except InputError as bad:
                error = bad
        if error and not good:
            raise error
        self.skipped += len(draw.rows) - len(good)
        filler = iter(range(len(draw.rows)))
        chosen = [place if place in good else good[next(filler) % len(good)] for place in range(len(draw.rows))]
        return draw.part(np.array(chosen))  # type: ignore[arg-type]

    def augmented(self, images: np.ndarray, step: int, first: int) -> np.ndarray:
        """Training pictures as the setting changes them; first: place of the first in the global batch."""
        return augment(images, AUGMENTATIONS[self.config.augmentation], self.config.seed, step, first=first)

    def texts(self, draw: Draw) -> list[str]:
        """B instructions."""
        stores = self.stores
        return [
            stores[part].instructions[stores[part].episode_of[row]]
            for part, row in zip(draw.which, draw.rows, strict=True)
        ]

    def actions(self, draw: Draw, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Chunks (B, chunk, A) and mask (B, chunk); see `sampling.action_chunks`."""
        chunks = np.empty((len(draw.rows), chunk, self.stores[0].convention.size), np.float32)
        mask = np.empty(chunks.shape[:2], bool)
        for part in np.unique(draw.which):
            store, mine = self.stores[part], draw.which == part
            chunks[mine], mask[mine] = action_chunks(store.action, store.episode_of, draw.rows[mine], chunk)
        return chunks, mask

    def cut(self) -> dict[str, float]:
        """Share of values of each arm dimension that the normalisation cuts at its bound; empty where it has none."""
        if self.config.normalisation == "quantile" or "action" not in self.config.objectives():
            return {}
        actions = np.concatenate([store.action for store in self.stores])
        if self.config.normalisation == "quantile_clip":
            actions = quantile_normalise(actions, np.array(self.stats["q01"]), np.array(self.stats["q99"]))
        shares = cut_share(actions, self.config.clip_actions)
        return dict(zip(self.stores[0].convention.names, shares.tolist(), strict=False))


def _camera(config: TrainConfig, store: EpisodeStore) -> str:
    camera = config.camera or store.cameras[0]
    if camera not in store.cameras:
        raise InputError(f"the store has no camera '{camera}'", where=store.path, fix=nearest(camera, store.cameras))
    return camera


@dataclass(frozen=True)
class Objective:
    """What the loop needs of an objective.

    make: pictures of a part, the global draw, a generator and the part -> inputs. loss: inputs -> scalars, "loss"
    first of all. count: of what the loss is a mean. evaluate: a maker of inputs for places of the held-out draw, and
    their number -> measured values. files: JSON to keep in every checkpoint.
    """

    make: Callable[[np.ndarray, Draw, np.random.Generator, slice], dict[str, torch.Tensor]]
    loss: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    count: Callable[[dict[str, torch.Tensor]], int]
    evaluate: Callable[[Any, int], dict[str, Any]]
    files: dict[str, Any] = field(default_factory=dict)


def build(config: TrainConfig, data: Data, inputs: dict[str, str]) -> tuple[Any, dict[str, Objective]]:
    """The model of a run, and its objectives by name, the main one first."""
    model: Any = start(config, inputs)
    backbone: Backbone = model
    seen = {look for store in data.stores for look in store.episodes.get("domain", ()) if isinstance(look, str)}
    if seen:  # what is seen in training may not pass for unseen in evaluation
        backbone.lineage["domains"] = sorted({*backbone.lineage.get("domains", ()), *seen})
    if config.objective == "action":
        model = _policy(config, data, backbone)
    if config.compile:
        if config.objective != "action":
            raise InputError("compile is for the action objective", fix="leave it out")
        model.compile_layers()
    makers = {"language": language_objective, "fast": fast_objective}
    return model, {
        name: action_objective(config, data, model) if name == "action" else makers[name](config, data, backbone)
        for name in config.objectives()
    }


def start(config: TrainConfig, inputs: dict[str, str]) -> Backbone:
    """The backbone a run starts from, with what is frozen marked and adapters in place."""
    from vlm4vla_core.backbone import load_backbone, tiny
    from vlm4vla_core.freezing import freeze
    from vlm4vla_core.lora import add_lora

    writes = set(config.objectives()) != {"action"}
    if config.backbone == "tiny":
        backbone = tiny(
            config.family, seed=config.seed, image_size=config.image_size or 112, options=config.options(),
            language_head=writes,
        )  # fmt: skip
    else:
        own = checkpoint.looks_like_one(Path(config.backbone))
        backbone = load_backbone(
            config.backbone,
            init=config.init,
            scratch=config.scratch,
            seed=config.seed,
            options=None if own and _keeps_options(config) else config.options(),
            image_size=config.image_size,
            language_head=writes,
        )
        if own:
            backbone.lineage["ancestors"] = [*backbone.lineage.get("ancestors", []), inputs["backbone"]]
    stage = "+".join(config.objectives())
    backbone.lineage["stages"] = [*backbone.lineage.get("stages", []), stage]
    if config.lora:
        add_lora(backbone, config.lora, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed)
    freeze(backbone, config.freeze)
    return backbone


def _keeps_options(config: TrainConfig) -> bool:
    """Whether a checkpoint's own options are those asked for, or none are."""
    if config.default_options():
        return True
    own = folders.read_json(checkpoint.resolve(config.backbone) / checkpoint.CONFIG)["backbone"].get("options", {})
    return {**own, "image_size": None} == {**config.options().to_dict(), "image_size": None}


# --- (a) actions at the query


def _policy(config: TrainConfig, data: Data, backbone: Backbone) -> Any:
    from vlm4vla_core.policy import PolicyConfig, VLAPolicy

    settings = PolicyConfig(
        chunk=config.chunk,
        convention=data.stores[0].convention,
        q01=data.stats["q01"],
        q99=data.stats["q99"],
        camera=data.cameras[0],
        width=config.head_width,
        head=config.head,
        arm_loss=config.arm_loss,
        huber_delta=config.huber_delta,
        gripper_weight=config.gripper_weight,
        flow_steps=config.flow_steps,
        pad_to=config.pad_to,
        normalisation=config.normalisation,
        clip=config.clip_actions,
    )
    return VLAPolicy(backbone, settings, seed=config.seed)


def action_objective(config: TrainConfig, data: Data, policy: Any) -> Objective:
    """The VLA objective: chunks of actions at the query."""
    import torch

    def make(images: np.ndarray, draw: Draw, rng: np.random.Generator, part: slice) -> dict[str, torch.Tensor]:
        mine = draw.part(part)
        chunks, mask = data.actions(mine, config.chunk)
        batch = policy.collate(images, data.texts(mine), chunks, mask)
        if config.head == "flow":
            shape = (len(draw.rows), *batch["arm_targets"].shape[1:])
            batch["flow_noise"] = torch.from_numpy(rng.standard_normal(shape, np.float32)[part])
            batch["flow_time"] = torch.from_numpy(rng.random(len(draw.rows), np.float32)[part])
        return batch

    def evaluate(batch: Any, rows: int) -> dict[str, Any]:
        from vlm4vla_core.validation import action_metrics

        return action_metrics(policy, batch, rows)

    return Objective(make, policy, lambda batch: int(batch["action_mask"].sum()), evaluate)


# --- (b) and (c) text


def language_objective(config: TrainConfig, data: Data, backbone: Backbone) -> Objective:
    """The VLM objective: next-token loss on answers to questions about the scene."""
    from vlm4vla_core.vqa import questions

    def make(images: np.ndarray, draw: Draw, rng: np.random.Generator, part: slice) -> dict[str, torch.Tensor]:
        asked = [
            questions(data.stores[which], int(row), rng, kinds=config.questions, camera=data.cameras[which])
            for which, row in zip(draw.which, draw.rows, strict=True)
        ][part]
        return backbone.collate_answers(images, [q.question for q in asked], [q.answer for q in asked])

    return _text_objective(backbone, make)


def fast_objective(config: TrainConfig, data: Data, backbone: Backbone) -> Objective:
    """FAST: the chunk that carries out the instruction, as tokens that the language model writes.

    The tokenizer is fitted to chunks of the training rows (20,000 at most) and kept in every checkpoint, with the word
    ids that stand for its tokens (`action_token_ids`).
    """
    from vlm4vla_core import fast

    which = np.repeat(np.arange(len(data.stores)), [len(rows) for rows in data.mixture.train])
    every = Draw(which, np.concatenate(data.mixture.train))
    sample = np.unique(np.linspace(0, len(which) - 1, 20_000).astype(int))
    chunks, _ = data.actions(every.part(sample), config.chunk)  # type: ignore[arg-type]
    ids = action_token_ids(backbone, config.fast_vocab)
    tokenizer: FastTokenizer = fast.fit(chunks, data.stats["q01"], data.stats["q99"], vocab_size=len(ids))
    ids = ids[: tokenizer.vocab_size]
    tokens = {word: token for token, word in enumerate(ids)}

    def make(images: np.ndarray, draw: Draw, rng: np.random.Generator, part: slice) -> dict[str, torch.Tensor]:
        mine = draw.part(part)
        chunks, _ = data.actions(mine, config.chunk)
        answers = [[ids[token] for token in answer] for answer in tokenizer.encode(chunks)]
        return backbone.collate_answers(images, [_TOKENS_QUESTION.format(text) for text in data.texts(mine)], answers)

    def read(written: list[list[int]]) -> dict[str, Any]:
        truth, mask = data.actions(data.val, config.chunk)
        found = tokenizer.decode([[tokens.get(word, -1) for word in answer] for answer in written])
        real = mask & found.ok[:, None]
        error = np.abs(found.actions - truth)[real][:, :-1].mean(0).tolist() if real.any() else []
        return {
            "error": dict(zip(data.stores[0].convention.names, error, strict=False)),
            "decoded": float(found.ok.mean()),
        }

    files = {FAST_FILE: {**tokenizer.to_dict(), "word_ids": ids}}
    return _text_objective(backbone, make, read, files)


def action_token_ids(backbone: Backbone, count: int) -> list[int]:
    """Word ids that stand for action tokens: rows of the embedding that no word has, then the vocabulary's last words.

    At most half of the ordinary words are taken, the last (rarest) first, as in the FAST paper's use of PaliGemma's
    vocabulary; reserved tokens never.
    """
    rows, words = backbone.base.get_submodule(backbone.spec.embeddings).num_embeddings, len(backbone.tokenizer)
    taken = {*backbone.reserved, backbone.image_id, backbone.query_id, backbone.end_id, backbone.pad_id}
    spare = [index for index in range(words, rows) if index not in taken]
    common = [index for index in range(words - 1, -1, -1) if index not in taken]
    return [*spare, *common[: len(common) // 2]][:count]


def _text_objective(
    backbone: Backbone, make: Any, read: Callable[[list[list[int]]], dict[str, Any]] | None = None, files: Any = None
) -> Objective:
    from torch.nn.functional import cross_entropy

    def loss(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        logits, targets = backbone.answer_logits(inputs)
        return {"loss": cross_entropy(logits, targets)}

    def evaluate(batch: Any, rows: int) -> dict[str, Any]:
        from vlm4vla_core.validation import language_metrics

        return language_metrics(backbone, batch, rows, read)

    return Objective(make, loss, lambda inputs: int((inputs["labels"] != -100).sum()), evaluate, files or {})
