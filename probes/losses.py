"""The objectives of VLM and VLA training at one policy's weights, as functions of a numbered draw of data.

    losses = policy_losses(policy, asked, shown, batch_size=16, seed=0)
    losses.language(k, half), losses.action(k, half)         # scalar tensors; the same numbers give the same data

Every half-batch is drawn anew from the training frames, with replacement, so that any two are independent.
Trap: the action loss goes through the policy's own query and head. At a head that was never trained it says how the
backbone serves a random readout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from vlm4vla_core.episodes.store import EpisodeStore
    from vlm4vla_core.policy import VLAPolicy
    from vlm4vla_core.vqa import Question
    from vlm4vla_core.vqa.files import QuestionFile

Loss = Callable[[int, int], "Tensor"]


@dataclass(frozen=True)
class Losses:
    """language (A), action (C) and, when asked for, fast (F): (batch, half) -> scalar loss. parameters: those of the
    backbone, by name; groups: name -> module group, the query left out."""

    language: Loss
    action: Loss
    fast: Loss | None
    parameters: dict[str, Any]
    groups: dict[str, str]


def policy_losses(
    policy: VLAPolicy, questions_from: EpisodeStore | QuestionFile, actions_from: EpisodeStore, *, batch_size: int = 16,
    kinds: Sequence[str] = (), seed: int = 0, fast: bool = False,
) -> Losses:  # fmt: skip
    """Losses of a policy on half-batches of batch_size // 2 training frames.

    questions_from: store that questions are generated from, or question files; kinds: of questions, as in training.
    actions_from: store of demonstrations. fast: chunks as FAST tokens too, by a tokenizer fitted to these
    demonstrations. Raises InputError for a batch size below 2 and for a store of another action convention.
    """
    from torch.nn.functional import cross_entropy

    from vlm4vla_core.episodes.sampling import action_chunks, split_episodes
    from vlm4vla_core.vqa import pictures
    from vlm4vla_core.vqa.embodied import NothingToAsk, questions
    from vlm4vla_core.vqa.files import QuestionFile

    if batch_size < 2:
        raise InputError(f"a batch of {batch_size} has no two halves", fix="use --batch-size 2 or more")
    wrong = policy.config.convention.differences(actions_from.convention)
    if wrong:
        raise InputError(f"the policy's actions mean something else: {'; '.join(wrong)}", where=actions_from.path)
    backbone, config = policy.backbone, policy.config
    frames = {
        store.path: store.split(0.1)[0] if isinstance(store, QuestionFile) else split_episodes(store)[0]
        for store in (questions_from, actions_from)
    }

    def draw(store: EpisodeStore | QuestionFile, objective: int, k: int, half: int) -> tuple[Any, np.ndarray]:
        rng = np.random.default_rng([seed, objective, k, half])
        return rng, rng.choice(frames[store.path], batch_size // 2)

    def camera(store: EpisodeStore) -> str:
        return config.camera if config.camera in store.cameras else store.cameras[0]

    def ask(store: EpisodeStore, row: int, rng: np.random.Generator) -> Question:
        try:
            return questions(store, row, rng, kinds=kinds, camera=camera(store))
        except NothingToAsk:
            return questions(store, row, rng, camera=camera(store))

    def language(k: int, half: int) -> Tensor:
        rng, rows = draw(questions_from, 0, k, half)
        if isinstance(questions_from, QuestionFile):
            images = np.stack([questions_from.picture(int(row), backbone.image_size) for row in rows])
            turns = [questions_from.turns(int(row)) for row in rows]
        else:
            asked = [ask(questions_from, int(row), rng) for row in rows]
            images = pictures(questions_from, camera(questions_from), rows, asked, backbone.image_size)
            turns = [[(one.question, one.answer)] for one in asked]
        return cross_entropy(*backbone.answer_logits(backbone.collate_turns(images, turns)))

    def demonstrated(objective: int, k: int, half: int) -> tuple[np.ndarray, list[str], np.ndarray, np.ndarray]:
        _, rows = draw(actions_from, objective, k, half)
        images = actions_from.images(camera(actions_from), rows, backbone.image_size)
        chunks, mask = action_chunks(actions_from.action, actions_from.episode_of, rows, config.chunk)
        return images, [actions_from.instructions[episode] for episode in actions_from.episode_of[rows]], chunks, mask

    def action(k: int, half: int) -> Tensor:
        return policy(policy.collate(*demonstrated(1, k, half)))["loss"]

    groups = {name: group for name, group in backbone.groups().items() if group != "query"}
    tokens = _fast_loss(policy, actions_from, frames[actions_from.path], demonstrated) if fast else None
    return Losses(language, action, tokens, dict(backbone.named_parameters()), groups)


def _fast_loss(policy: VLAPolicy, store: EpisodeStore, frames: np.ndarray, demonstrated: Any) -> Loss:
    from torch.nn.functional import cross_entropy

    from vlm4vla_core.fast import fit_store
    from vlm4vla_core.text_objectives import TOKENS_QUESTION, action_token_ids

    backbone = policy.backbone
    ids = action_token_ids(backbone, 1024)
    rows = frames[np.unique(np.linspace(0, len(frames) - 1, 20_000).astype(int))]
    tokenizer = fit_store(store, policy.config.chunk, rows=rows, vocab_size=len(ids))

    def loss(k: int, half: int) -> Tensor:
        images, told, chunks, _ = demonstrated(2, k, half)
        answers = [[ids[token] for token in answer] for answer in tokenizer.encode(chunks)]
        batch = backbone.collate_answers(images, [TOKENS_QUESTION.format(text) for text in told], answers)
        return cross_entropy(*backbone.answer_logits(batch))

    return loss


@contextmanager
def measuring(policy: VLAPolicy) -> Iterator[None]:
    """Without dropout, so that only the data are noise; the policy's mode is put back."""
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)
