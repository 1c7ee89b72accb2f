"""Greedy answers: equal to a slow loop over one question at a time, and to the library's own generation."""

from __future__ import annotations

import copy
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from vlm4vla_core.answers import answer
from vlm4vla_core.backbone import Backbone, tiny
from vlm4vla_core.errors import InputError
from vlm4vla_core.families import families

QUESTIONS = ["What color is the cube?", "Is it open?", "Where is the red ball, left or right of the blue plate?"]
STEPS = 5


@lru_cache
def member(name: str) -> Backbone:
    """A tiny model with a random output layer of its own; a tied one would echo the last word."""
    model = tiny(name, seed=2)
    shape = model.base.get_submodule(model.spec.embeddings).weight.shape
    model.lm_head = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    return model


def pictures(count: int = 3, size: int = 112) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@torch.no_grad()
def literal(model: Backbone, image: np.ndarray, question: str, steps: int = STEPS) -> list[int]:
    """One question alone: the whole sequence anew for each token, the output layer at its last place."""
    ids: list[int] = []
    prompt = list(model._encode(question, "{instruction}"))
    cap = getattr(model.base.config.get_text_config(), "final_logit_softcapping", None)
    while len(ids) < steps:
        batch = model._batch(image[None], [prompt + ids], starts=[len(prompt)])
        logits = model.lm_head @ model.hidden(batch)[0, -1].float()
        if cap:
            logits = cap * torch.tanh(logits / cap)
        token = int(logits.argmax())
        if token in (model.end_id, model.pad_id):
            break
        ids.append(token)
    return ids


def text(model: Backbone, ids: list[int]) -> str:
    return model.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", families())
def test_a_batch_answers_as_each_question_alone(name: str):
    model, images = member(name), pictures()
    expected = [literal(model, image, question) for image, question in zip(images, QUESTIONS, strict=True)]
    assert any(expected)
    assert answer(model, images, QUESTIONS, max_tokens=STEPS) == [text(model, ids) for ids in expected]


def test_the_batch_and_the_side_of_the_padding_change_nothing():
    model, images = member("qwen2_5_vl"), pictures()
    one = answer(model, images, QUESTIONS, max_tokens=STEPS)
    assert answer(model, images, QUESTIONS, max_tokens=STEPS, batch_size=2) == one
    left = copy.deepcopy(model)
    left.padding = "left"
    assert answer(left, images, QUESTIONS, max_tokens=STEPS) == one
    assert len(set(one)) > 1


def test_an_answer_ends_at_the_closing_token():
    model, images = copy.deepcopy(member("qwen2_5_vl")), pictures()
    ids = [literal(model, image, question) for image, question in zip(images, QUESTIONS, strict=True)]
    model.end_id = ids[0][2]
    cut = [one[: one.index(model.end_id)] if model.end_id in one else one for one in ids]
    assert len(cut[0]) < STEPS
    assert answer(model, images, QUESTIONS, max_tokens=STEPS) == [text(model, one) for one in cut]


def test_answers_are_those_of_the_library_s_own_generation():
    model, images = member("qwen2_5_vl"), pictures()
    config = copy.deepcopy(model.base.config)
    config.tie_word_embeddings = False
    full = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    full.model.load_state_dict(model.base.state_dict())
    full.lm_head.load_state_dict({"weight": model.lm_head.detach()})
    theirs = []
    for image, question in zip(images, QUESTIONS, strict=True):
        batch = model.collate(image[None], [question], query=False)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
        made = full.generate(
            **inputs, **model.pixels(batch["images"]), max_new_tokens=8, do_sample=False,
            eos_token_id=model.end_id, pad_token_id=model.pad_id,
        )  # fmt: skip
        theirs.append(text(model, made[0, inputs["input_ids"].shape[1] :].tolist()))
    assert answer(model, images, QUESTIONS, max_tokens=8) == theirs


def test_what_cannot_be_answered_is_one_line():
    model = copy.deepcopy(member("qwen2_5_vl"))
    with pytest.raises(InputError, match="2 images for 3 questions"):
        answer(model, pictures(2), QUESTIONS)
    with pytest.raises(InputError, match="at most 0 tokens"):
        answer(model, pictures(), QUESTIONS, max_tokens=0)
    model.lm_head, model.base.config.tie_word_embeddings = None, False
    with pytest.raises(InputError, match="not tied to its word embeddings and was not loaded"):
        answer(model, pictures(), QUESTIONS)
