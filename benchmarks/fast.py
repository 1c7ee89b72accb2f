"""FAST action tokens beside plain binning and the published byte-level variant: tokens, error and time per chunk.

Run:  python benchmarks/fast.py [--out benchmarks/results/fast.json]
Three sets of chunks, each fitted on one part (by episode where there are episodes) and measured on the rest: smooth
synthetic ones, the tabletop world's demonstrations, and the 25 real BridgeV2 episodes in the folder named by
VLM4VLA_SAMPLES. Errors are in normalised units, where the quantile range is [-1, 1], of values within it. Times are
CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlm4vla_core import fast, folders
from vlm4vla_core.episodes.normalise import quantile_normalise
from vlm4vla_core.episodes.sampling import action_chunks
from vlm4vla_core.episodes.store import statistics
from vlm4vla_core.sims.tabletop import demos

BINS = 256


def smooth(count: int, horizon: int = 10) -> np.ndarray:
    """(count, horizon, 7): slow sines of random size, phase and rate, and a gripper that changes at most once."""
    rng = np.random.default_rng(0)
    t = np.linspace(0, 1, horizon)[None, :, None]
    rate, phase = rng.uniform(0.1, 1.0, (count, 1, 7)), rng.uniform(0, 6.28, (count, 1, 7))
    chunks = rng.random((count, 1, 7)) * np.sin(6.28 * rate * t + phase)
    chunks[..., 6] = np.where(t[..., 0] < rng.uniform(-1, 2, (count, 1)), -1, 1)
    return chunks


def of_episodes(actions: list[np.ndarray], horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """Chunks from every step of the first four fifths of the episodes, and of the rest."""
    cut = len(actions) * 4 // 5

    def chunks(part: list[np.ndarray]) -> np.ndarray:
        whole, of = np.concatenate(part), np.repeat(np.arange(len(part)), [len(one) for one in part])
        return action_chunks(whole, of, np.arange(len(whole)), horizon)[0]

    return chunks(actions[:cut]), chunks(actions[cut:])


def data() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    synthetic = smooth(4000)
    found = {"smooth synthetic, 10 x 7": (synthetic[:3500], synthetic[3500:])}
    plans = demos.plan(200, ("move", "touch", "push", "pick"), ("A",), seed=0)
    recorded = [episode.action for episode in demos.demonstrations(plans, size=16, noise=0.3)]
    found["tabletop demonstrations, 4 x 7"] = of_episodes(recorded, 4)
    found["tabletop demonstrations, 10 x 7"] = of_episodes(recorded, 10)
    if folder := os.environ.get("VLM4VLA_SAMPLES"):
        stored = np.load(Path(folder) / "bridge_rlds_octo" / "openvla_bridge_orig_expected.npz")
        bridge = [stored[f"action_{number:02d}"] for number in range(25)]
        found["real BridgeV2 (25 short episodes), 4 x 7"] = of_episodes(bridge, 4)
    return found


def byte_level(chunks: np.ndarray, q01: list[float], q99: list[float], scale: float, vocab: int) -> fast.FastTokenizer:
    """The published way: byte-level BPE over code points from 0, fitted with the tokenizers library's own class."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.trainers import BpeTrainer

    plain = fast.fit(chunks, q01, q99, scale=scale, vocab_size=vocab)
    coefficients = plain.coefficients(chunks).reshape(len(chunks), -1)
    lowest, highest = int(coefficients.min()), int(coefficients.max())
    bpe = ByteLevelBPETokenizer()
    trainer = BpeTrainer(
        vocab_size=vocab, min_frequency=2, special_tokens=[], max_token_length=10_000, show_progress=False,
        initial_alphabet=[chr(code) for code in range(highest - lowest + 1)],
    )  # fmt: skip
    bpe._tokenizer.train_from_iterator(["".join(chr(c - lowest) for c in row) for row in coefficients], trainer)
    with tempfile.TemporaryDirectory() as name:
        bpe.save(str(Path(name) / "tokenizer.json"))
        config = {"scale": scale, "vocab_size": vocab, "min_token": lowest}
        (Path(name) / "processor_config.json").write_text(json.dumps(config))
        return fast.published(Path(name), horizon=plain.horizon, width=plain.width, q01=q01, q99=q99)


def timed(work: Callable[[], Any], chunks: int) -> tuple[Any, float]:
    """The result, and CPU microseconds per chunk, the best of three."""
    best = np.inf
    for _ in range(3):
        began = time.process_time()
        result = work()
        best = min(best, time.process_time() - began)
    return result, best / chunks * 1e6


def measure(fitted: np.ndarray, held_out: np.ndarray) -> list[dict[str, Any]]:
    stats = statistics(fitted.reshape(-1, fitted.shape[-1]))
    q01, q99 = stats["q01"], stats["q99"]
    target = quantile_normalise(held_out, np.array(q01), np.array(q99), keep=0)
    rows = []

    def bins() -> np.ndarray:
        unit = quantile_normalise(held_out, np.array(q01), np.array(q99), keep=0)
        return np.minimum(((unit + 1) / 2 * BINS).astype(int), BINS - 1)

    binned, spent = timed(bins, len(held_out))
    error = np.abs((binned + 0.5) / BINS * 2 - 1 - target)
    size = held_out[0].size
    rows.append({
        "variant": f"plain binning, {BINS} bins", "vocabulary": BINS, "tokens": size, "most": size, "mae": error.mean(),
        "largest": error.max(), "bound": 1 / BINS, "failed": 0, "encode_us": spent, "decode_us": None, "fit_s": 0.0,
    })  # fmt: skip
    variants = [
        ("own, scale 10", 10, 1024, fast.fit), ("own, scale 10, 2048 tokens", 10, 2048, fast.fit),
        ("own, scale 20", 20, 1024, fast.fit),
    ]  # fmt: skip
    variants.append(("byte-level as published, scale 10", 10, 1024, None))
    for name, scale, vocab, make in variants:
        began = time.process_time()
        if make:
            tokenizer = make(fitted, q01, q99, scale=scale, vocab_size=vocab)
        else:
            tokenizer = byte_level(fitted, q01, q99, scale, vocab)
        fit_s = time.process_time() - began
        tokens, encode_us = timed(lambda t=tokenizer: t.encode(held_out), len(held_out))
        found, decode_us = timed(lambda t=tokenizer, ids=tokens: t.decode(ids), len(held_out))
        back = quantile_normalise(found.actions, np.array(q01), np.array(q99), keep=0)
        error = np.abs(back - target)[found.ok]
        lengths = [len(ids) for ids in tokens]
        rows.append({
            "variant": name, "vocabulary": tokenizer.vocab_size, "tokens": float(np.mean(lengths)), "most":
            max(lengths), "mae": error.mean(), "largest": error.max(), "bound": tokenizer.error_bound, "failed":
            found.failed, "encode_us": encode_us, "decode_us": decode_us, "fit_s": fit_s,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fast.json")
    out, result = parser.parse_args().out, {}
    for name, (fitted, held_out) in data().items():
        rows = measure(fitted, held_out)
        result[name] = {"fitted_on": len(fitted), "measured_on": len(held_out), "variants": rows}
        print(f"\n{name}: {len(fitted)} chunks fitted, {len(held_out)} measured")
        print(f"{'variant':36} vocab  tokens  most     MAE  largest  bound  failed  encode us  decode us  fit s")
        for row in rows:
            decode = "        -" if row["decode_us"] is None else f"{row['decode_us']:9.0f}"
            print(
                f"{row['variant']:36} {row['vocabulary']:5d}  {row['tokens']:6.1f}  {row['most']:4d}  "
                f"{row['mae']:.4f}  {row['largest']:.4f}  {row['bound']:.3f}  {row['failed']:6d}  "
                f"{row['encode_us']:9.0f}  {decode}  {row['fit_s']:5.1f}"
            )
    result["made_by"] = {
        "command": "OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false python benchmarks/fast.py",
        "note": "CPU time of one process, other work on the machine; compare within this run",
        **folders.provenance(),
    }
    folders.write_json(out, result)


if __name__ == "__main__":
    main()
