"""Greedy answers of a VLM to questions about pictures, for every family that the backbone knows.

Each step runs the model's own forward over prompt and answer so far: no cache, so that no family needs a rule of its
own for what it keeps between steps.

Trap: the answer so far enters as token ids. As text it would be cut into tokens anew, and differently: a word may be
made of pieces that the tokenizer would never choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlm4vla_core.errors import InputError

if TYPE_CHECKING:
    from vlm4vla_core.backbone import Backbone


def answer(
    backbone: Backbone, images: np.ndarray, questions: Sequence[str], *, max_tokens: int = 32, batch_size: int = 32
) -> list[str]:
    """The most likely next token, again and again, until the model closes its answer or has said `max_tokens`.

    images: uint8 (B, H, W, 3), one for each question. Special tokens and blanks at the ends are left out. Raises
    InputError as `Backbone.collate_answers` and `Backbone.answer_logits` (an output layer that was not loaded).
    """
    if len(images) != len(questions):
        raise InputError(f"{len(images)} images for {len(questions)} questions", fix="give one image for each question")
    if max_tokens < 1:
        raise InputError(f"an answer of at most {max_tokens} tokens", fix="give at least 1")
    said: list[str] = []
    for start in range(0, len(questions), batch_size):
        part = slice(start, start + batch_size)
        said += [_text(backbone, ids) for ids in _answer_ids(backbone, images[part], questions[part], max_tokens)]
    return said


def _text(backbone: Backbone, ids: list[int]) -> str:
    return str(backbone.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _answer_ids(backbone: Backbone, images: np.ndarray, questions: Sequence[str], max_tokens: int) -> list[list[int]]:
    import torch

    from vlm4vla_core.backbone import IGNORE

    answers: list[list[int]] = [[] for _ in questions]
    going = list(range(len(questions)))
    for said in range(max_tokens):
        # Closing tokens hold the places, since any tokenizer keeps them apart; the ids are put in afterwards.
        held = [backbone.spec.answer_end * said] * len(going)
        batch = backbone.collate_answers(images[going], [questions[i] for i in going], held)
        row, column = (batch["labels"] != IGNORE).nonzero(as_tuple=True)
        row, column = row.view(len(going), said + 1), column.view(len(going), said + 1)
        if said:
            batch["input_ids"][row[:, :-1], column[:, :-1]] = torch.tensor([answers[i] for i in going])
            batch["labels"][row[:, :-1], column[:, :-1]] = IGNORE  # only the last place meets the output layer
        with torch.no_grad():
            logits, _ = backbone.answer_logits(batch)  # (n, V)
        for i, token in zip(list(going), logits.argmax(-1).tolist(), strict=True):
            if token in (backbone.end_id, backbone.pad_id):
                going.remove(i)
            else:
                answers[i].append(token)
        if not going:
            break
    return answers
