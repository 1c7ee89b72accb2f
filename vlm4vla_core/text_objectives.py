"""Objectives that the language model answers in words: questions about the scene, and chunks as FAST tokens.

Trap: action tokens are written with word ids that exist already (`action_token_ids`), so the words that had them mean
something else afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core.errors import InputError
from vlm4vla_core.objectives import Objective
from vlm4vla_core.presets import TrainConfig
from vlm4vla_core.training_data import Data, Draw

if TYPE_CHECKING:
    import torch

    from vlm4vla_core.backbone import Backbone
    from vlm4vla_core.fast import FastTokenizer
    from vlm4vla_core.vqa import Question

FAST_FILE = "fast.json"
TOKENS_QUESTION = 'The task is "{}". Which action tokens carry it out?'  # as `vqa.embodied` asks


def language_objective(config: TrainConfig, data: Data, backbone: Backbone) -> Objective:
    """The VLM objective: next-token loss on answers to questions about the scene.

    A row that allows none of the kinds asked for (an end of an episode has no next action) is asked any question; one
    about two moments shows them side by side. `questions_per_picture` are packed into one sequence, and so is every
    conversation of a question file (`vqa.files`).
    """
    from vlm4vla_core.vqa.embodied import NothingToAsk, beside, expand, several

    # Two pictures in one have no features of their own among those of the store's frames.
    kinds = tuple(kind for kind in expand(config.questions) if kind != "moved" or not config.cache_features)
    if config.questions and not kinds:
        raise InputError("questions about two moments cannot be asked of cached features", fix="ask other questions")

    def ask(which: int, row: int, rng: np.random.Generator) -> list[Question]:
        store, camera, count = data.stores[which], data.cameras[which], config.questions_per_picture
        try:
            return several(store, row, rng, count, kinds=kinds, camera=camera)
        except NothingToAsk:
            return several(store, row, rng, count, camera=camera)

    def make(images: np.ndarray, draw: Draw, rng: np.random.Generator, part: slice) -> dict[str, torch.Tensor]:
        asked = [
            ask(int(which), int(row), rng) if which < len(data.stores) else []  # a file's questions are given
            for which, row in zip(draw.which, draw.rows, strict=True)
        ][part]
        turns = [[(one.question, one.answer) for one in questions] for questions in asked]
        if any(first.earlier >= 0 for first, *_ in filter(None, asked)):
            images = images.copy()
        for i, (which, row, questions) in enumerate(zip(*draw.part(part), asked, strict=True)):
            if not questions:
                turns[i] = data.turns(which, row)
            elif questions[0].earlier >= 0:
                before = data.stores[which].images(data.cameras[which], [questions[0].earlier], images.shape[1])
                images[i] = beside(before[0], images[i])
        return backbone.collate_turns(images, turns)

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
        return backbone.collate_answers(images, [TOKENS_QUESTION.format(text) for text in data.texts(mine)], answers)

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
