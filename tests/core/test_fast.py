"""FAST against a literal reference (cosine sums, transformers' own tokenizer class), its error bound, and bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from tokenizers.trainers import BpeTrainer
from toys import toy_store

from vlm4vla_core import fast
from vlm4vla_core.episodes.sampling import action_chunks
from vlm4vla_core.errors import InputError

HYPOTHESIS = settings(deadline=None, derandomize=True, max_examples=60)
Q01, Q99 = np.array([-0.1, -0.2, 0.5, -1.0, 0.0]), np.array([0.1, 0.4, 0.5, 1.0, 1.0])  # the third is constant


def smooth(count: int, horizon: int = 8, seed: int = 0) -> np.ndarray:
    """(count, horizon, 5) slow sines over the quantile range, the last dimension a gripper that closes once."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, horizon)[None, :, None]
    waves = np.sin(6.28 * rng.uniform(0.2, 1.2, (count, 1, 5)) * time + rng.uniform(0, 6.28, (count, 1, 5)))
    values = Q01 + (waves * rng.uniform(0, 1.1, (count, 1, 5)) + 1) / 2 * (Q99 - Q01)
    values[..., -1] = time[..., 0] < rng.uniform(-0.5, 1.5, (count, 1))
    return values


@pytest.fixture(scope="module")
def tokenizer() -> fast.FastTokenizer:
    return fast.fit(smooth(600), Q01, Q99, scale=10, vocab_size=300)


def cosine_sums(chunk: np.ndarray, scale: float) -> list[list[int]]:
    """Rounded coefficients of one normalised chunk (T, A) by the definition of the orthonormal transform."""
    horizon, width = chunk.shape
    table = []
    for k in range(horizon):
        factor = math.sqrt((1 if k == 0 else 2) / horizon)
        angle = [math.cos(math.pi * (2 * t + 1) * k / (2 * horizon)) for t in range(horizon)]
        table.append(
            [round(scale * factor * sum(chunk[t, d] * angle[t] for t in range(horizon))) for d in range(width)]
        )
    return table


def test_coefficients_by_definition(tokenizer: fast.FastTokenizer):
    chunks = smooth(20, seed=1)
    span = np.where(Q99 > Q01, Q99 - Q01, 1)
    normalised = np.clip(np.where(Q99 > Q01, 2 * (chunks - Q01) / span - 1, 0), -1, 1)
    for found, chunk in zip(tokenizer.coefficients(chunks), normalised, strict=True):
        assert found.tolist() == cosine_sums(chunk, 10)


def test_low_frequencies_come_first(tokenizer: fast.FastTokenizer):
    """A constant chunk has only its first row of coefficients: then all zeros."""
    chunk = np.broadcast_to(Q01, (8, 5))
    text = tokenizer.bpe.decode(tokenizer.encode(chunk)[0])
    codes = [ord(character) - 0xE000 + tokenizer.lowest for character in text]
    edge = -round(10 * math.sqrt(8))
    assert codes == [edge, edge, 0, edge, edge] + [0] * 35


@HYPOTHESIS
@given(st.integers(0, 2**31), st.sampled_from([3.0, 10.0, 25.0]), st.integers(1, 9))
def test_error_bound_holds_for_anything_within_the_quantiles(seed: int, scale: float, horizon: int):
    """Not only for smooth chunks like those it was fitted to: noise, corners of the cube, constants."""
    rng = np.random.default_rng(seed)
    made = fast.fit(smooth(4, horizon), Q01, Q99, scale=scale, vocab_size=1024)
    unit = np.concatenate([rng.uniform(-1, 1, (6, horizon, 5)), rng.choice([-1.0, 1.0], (6, horizon, 5))])
    chunks = Q01 + (unit + 1) / 2 * (Q99 - Q01)
    back = made.decode(made.encode(chunks))
    assert back.ok.all()
    error = np.abs(back.actions - chunks)[..., Q99 > Q01] / ((Q99 - Q01) / 2)[Q99 > Q01]
    assert error.max() <= made.error_bound + 1e-5  # float32
    assert (back.actions[..., 2] == np.float32(0.5)).all()


def test_the_bound_is_nearly_reached():
    """All coefficients off by a half with the signs of one time step: the bound is no idle number."""
    made = fast.fit(smooth(4), Q01, Q99, scale=10)
    worst = 0.0
    for t in range(8):
        basis = [math.sqrt((1 if k == 0 else 2) / 8) * math.cos(math.pi * (2 * t + 1) * k / 16) for k in range(8)]
        wanted = np.array([0.0499 * np.sign(value) for value in basis])  # in units of coefficients
        unit = np.array(
            [sum(wanted[k] * math.sqrt((1 if k == 0 else 2) / 8) * math.cos(math.pi * (2 * s + 1) * k / 16)
                 for k in range(8)) for s in range(8)]
        )  # fmt: skip
        chunk = Q01 + (np.broadcast_to(unit[:, None], (8, 5)) + 1) / 2 * (Q99 - Q01)
        worst = max(worst, np.abs(made.decode(made.encode(chunk)).actions[0, :, 0] - chunk[:, 0]).max() / 0.1)
    assert 0.9 * made.error_bound < worst <= made.error_bound


def test_a_chunk_is_fewer_tokens_than_numbers(tokenizer: fast.FastTokenizer):
    held_out = smooth(200, seed=2)
    tokens = tokenizer.encode(held_out)
    assert np.mean([len(ids) for ids in tokens]) < 0.4 * 8 * 5
    assert max(max(ids) for ids in tokens) < tokenizer.vocab_size == 300
    assert tokenizer.decode(tokens).failed == 0
    assert tokenizer.encode(held_out[3]) == tokens[3:4]


def test_fitting_is_deterministic_and_survives_the_file(tokenizer: fast.FastTokenizer, tmp_path: Path):
    again = fast.fit(smooth(600), Q01, Q99, scale=10, vocab_size=300)
    assert again.to_dict() == tokenizer.to_dict()
    tokenizer.save(tmp_path / "fast.json")
    loaded = fast.FastTokenizer.load(tmp_path / "fast.json")
    chunks = smooth(50, seed=3)
    assert loaded.encode(chunks) == tokenizer.encode(chunks)
    assert loaded.to_dict() == tokenizer.to_dict()
    assert (loaded.vocab_size, loaded.error_bound) == (300, 0.05 * math.sqrt(8))


def test_what_is_no_chunk_decodes_to_zeros_and_is_counted(tokenizer: fast.FastTokenizer):
    good = tokenizer.encode(smooth(2, seed=4))
    bad = [[], good[0][:-1], [*good[0], 1], [300], [-1], [*good[1][:-1], 10**9]]
    found = tokenizer.decode([good[0], *bad, good[1]])
    assert found.ok.tolist() == [True] + [False] * 6 + [True]
    assert found.failed == 6
    middle = (Q01 + Q99) / 2  # zeros in normalised units
    np.testing.assert_allclose(found.actions[1:-1], np.broadcast_to(middle, (6, 8, 5)), atol=1e-6)
    assert tokenizer.decode([]).actions.shape == (0, 8, 5)


def test_tokens_have_names():
    assert fast.as_text([3, 12]) == "<action_3><action_12>"
    assert fast.from_text("Action: <action_3> <action_12>|") == [3, 12]
    assert fast.from_text("") == []


def test_a_store_is_fitted_with_its_own_quantiles(tmp_path: Path):
    store = toy_store(tmp_path / "toys")
    made = fast.fit_store(store, 4, vocab_size=256)
    assert (made.horizon, made.width, list(made.q01)) == (4, 7, store.stats["action"]["q01"])
    chunks, _ = action_chunks(store.action, store.episode_of, np.arange(len(store)), 4)
    back = made.decode(made.encode(chunks))
    half = (np.array(made.q99) - np.array(made.q01)) / 2
    clipped = np.clip(chunks, made.q01, made.q99)
    assert (np.abs(back.actions - clipped) <= made.error_bound * half + 1e-6).all()


# --- the published layout


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer in the published layout: byte-level BPE over code points that begin at 0."""
    folder = tmp_path_factory.mktemp("hub")
    chunks = smooth(400) * 8 - 4  # more than 128 coefficients, so that some characters take two bytes
    coefficients = np.array([cosine_sums(chunk, 10) for chunk in chunks]).reshape(400, -1)
    lowest, highest = int(coefficients.min()), int(coefficients.max())
    trainer = BpeTrainer(
        vocab_size=400, min_frequency=2, special_tokens=[], max_token_length=10000, show_progress=False,
        initial_alphabet=[chr(code) for code in range(highest - lowest + 1)],
    )  # fmt: skip
    bpe = ByteLevelBPETokenizer()
    bpe._tokenizer.train_from_iterator(["".join(chr(c - lowest) for c in row) for row in coefficients], trainer)
    bpe.save(str(folder / "tokenizer.json"))
    config = {"processor_class": "UniversalActionProcessor", "scale": 10, "vocab_size": 400, "min_token": lowest}
    (folder / "processor_config.json").write_text(json.dumps(config | {"time_horizon": None, "action_dim": None}))
    return folder


def test_published_tokens_equal_the_literal_reference(hub: Path):
    """By hand, with transformers' tokenizer class, as the published processor goes about it."""
    from transformers import PreTrainedTokenizerFast

    made = fast.published(hub, horizon=8, width=5)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(hub / "tokenizer.json"), clean_up_tokenization_spaces=False)
    lowest = json.loads((hub / "processor_config.json").read_text())["min_token"]
    chunks = smooth(60, seed=5) * 9 - 4.5  # some lie outside of what was seen: cut below, free above
    texts = ["".join(chr(max(c - lowest, 0)) for row in cosine_sums(chunk, 10) for c in row) for chunk in chunks]
    assert any(min(map(ord, text)) == 0 for text in texts)
    assert made.encode(chunks) == [theirs(text)["input_ids"] for text in texts]
    back = made.decode(made.encode(chunks))
    readable = [theirs.decode(theirs(text)["input_ids"]) == text for text in texts]
    assert back.ok.tolist() == readable  # bytes that its alphabet lacks are lost: no chunk
    assert sum(readable) > 40
    for text, actions in zip(np.array(texts)[readable], back.actions[readable], strict=True):
        coefficients = (np.array(list(map(ord, text))) + lowest).reshape(8, 5) / 10
        for t in range(8):
            basis = [math.sqrt((1 if k == 0 else 2) / 8) * math.cos(math.pi * (2 * t + 1) * k / 16) for k in range(8)]
            np.testing.assert_allclose(actions[t], np.array(basis) @ coefficients, atol=1e-5)


def test_published_with_quantiles_takes_physical_units(hub: Path):
    made, plain = fast.published(hub, horizon=8, width=5, q01=Q01, q99=Q99), fast.published(hub, horizon=8, width=5)
    chunks = smooth(30, seed=6)
    normalised = np.clip(np.where(Q99 > Q01, 2 * (chunks - Q01) / np.where(Q99 > Q01, Q99 - Q01, 1) - 1, 0), -1, 1)
    assert made.encode(chunks) == plain.encode(normalised)
    back = made.decode(made.encode(chunks)).actions
    half = (Q99 - Q01) / 2
    assert (np.abs(back - np.clip(chunks, Q01, Q99)) <= made.error_bound * half + 1e-5).all()


def test_published_bytes_that_are_no_text_are_no_chunk(hub: Path):
    made = fast.published(hub, horizon=1, width=1)
    lone = made.bpe.token_to_id("Ā")  # stands for byte 0
    half = made.bpe.token_to_id("Â")  # the first byte of a character of two
    assert made.decode([[lone], [half]]).ok.tolist() == [True, False]


def test_a_published_folder_is_checked(hub: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"leaves time_horizon open.*give horizon"):
        fast.published(hub, width=5)
    with pytest.raises(InputError, match=r"processor_config.json"):
        fast.published(tmp_path, horizon=8, width=5)
    config = json.loads((hub / "processor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps(config | {"time_horizon": 4, "action_dim": 7}))
    with pytest.raises(InputError, match="time_horizon is 4, not 8"):
        fast.published(tmp_path, horizon=8, width=7)
    with pytest.raises(InputError, match="no published FAST tokenizer"):
        fast.published(tmp_path)
    (tmp_path / "bpe_tokenizer").mkdir()
    (tmp_path / "bpe_tokenizer" / "tokenizer.json").write_bytes((hub / "tokenizer.json").read_bytes())
    assert (fast.published(tmp_path).horizon, fast.published(tmp_path).width) == (4, 7)
    (tmp_path / "processor_config.json").write_text("[]")
    with pytest.raises(InputError):
        fast.published(tmp_path, horizon=4, width=7)


# --- bad input


def test_wrong_shapes_nan_and_too_small_vocabularies(tokenizer: fast.FastTokenizer):
    with pytest.raises(ValueError, match=r"expected finite actions \(B, 8, 5\), got shape \(1, 8, 4\)"):
        tokenizer.encode(np.zeros((8, 4)))
    with pytest.raises(ValueError, match="finite"):
        tokenizer.encode(np.full((1, 8, 5), np.nan))
    with pytest.raises(InputError, match=r"567 different coefficients.*vocabulary of 300.*scale 100, 8 steps"):
        fast.fit(smooth(5), Q01, Q99, scale=100, vocab_size=300)
    with pytest.raises(InputError, match="0 chunks"):
        fast.fit(np.zeros((0, 8, 5)), Q01, Q99)


def test_damaged_files_are_told_in_one_line(tokenizer: fast.FastTokenizer, tmp_path: Path):
    whole = tokenizer.to_dict()
    for change, match in [
        ({"version": 2}, "vlm4vla-fast version 2"), ({"format": "other"}, "other version 1"),
        ({"bpe": {}}, "damaged"), ({"bpe": None}, "damaged"),
    ]:  # fmt: skip
        (tmp_path / "fast.json").write_text(json.dumps(whole | change))
        with pytest.raises(InputError, match=match) as caught:
            fast.FastTokenizer.load(tmp_path / "fast.json")
        assert "fast.json" in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "fast.json").write_text(json.dumps({key: whole[key] for key in ("format", "version")}))
    with pytest.raises(InputError, match="damaged"):
        fast.FastTokenizer.load(tmp_path / "fast.json")
