"""A policy on our backbone against the straightforward way, in speed and memory: training step and inference.

Straightforward: the full `…ForConditionalGeneration` forward with logits for every token and output_hidden_states=True,
image embeddings spliced in by hand, the query appended. Ours: the headless base with the query hook. Both have the same
architecture, head, loss, batch and optimizer; weights are random. Each arm runs in a process of its own.

CPU:  python benchmarks/backbones.py                        (tiny and about 100 M parameters, one thread, CPU time)
GPU:  python benchmarks/backbones.py --gpu                  (Qwen2.5-VL-3B and Qwen3-VL-2B in bf16, 224 px)
Dry:  python benchmarks/backbones.py --gpu --device cpu --size tiny --out /dev/null

On a GPU ours is compiled layer by layer, padded to one length and updated by fused AdamW; MFU is 6 FLOPs per parameter
and token that passes it (attention products and padding left out), over the bf16 matrix peak of the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "backbones.json"
TEXTS = ["move left", "push the blue ball to the right side of the large table", "open the drawer", "take the red cube"]
SIZES = {"tiny": 0.3, "mid": 100, "Qwen2.5-VL-3B": 3755, "Qwen3-VL-2B": 2128}
CPU_PLAN = {"tiny": (16, 15), "mid": (2, 3)}  # batch, iterations after one to warm up
GPU_PLAN = {"tiny": (4, 3), "Qwen2.5-VL-3B": (32, 20), "Qwen3-VL-2B": (32, 20)}


GOAL = (
    "on one H200 at 224 px: forward and backward at 50 % of the measured bf16 matrix peak, one picture and instruction "
    "under 25 ms for the 3B, and twice the straightforward way in speed and in memory"
)
NO_GPU = "not run: no GPU could be had, so whether the goal is met is unknown; the CPU numbers do not answer it"


def model_config(size: str) -> tuple[Any, Any, Any]:
    """Config, family entry and offline tokenizer; special ids are the tokenizer's."""
    from transformers import AutoConfig

    from vlm4vla_core.families import family
    from vlm4vla_core.sizes import known
    from vlm4vla_core.tiny import tiny_tokenizer

    spec = family("qwen3_vl" if size.startswith("Qwen3") else "qwen2_5_vl")
    tokenizer = tiny_tokenizer(spec)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in spec.special_tokens}
    if size == "tiny":
        return spec.tiny_config({**ids, "vocab": len(tokenizer)}, 112), spec, tokenizer
    values = {entry["name"]: entry["config"] for entry in known()}["Qwen2.5-VL-3B" if size == "mid" else size]
    if size == "mid":  # a real vocabulary, narrow layers
        values = values | {
            "hidden_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "intermediate_size": 1408,
        }
        narrow = {"depth": 6, "hidden_size": 320, "intermediate_size": 856, "num_heads": 4, "out_hidden_size": 512}
        values["vision_config"] = values["vision_config"] | narrow | {"fullatt_block_indexes": [2, 5]}
        values["rope_scaling"] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return AutoConfig.for_model(**(values | {key: ids[token] for key, token in names.items()})), spec, tokenizer


def head_for(width: int, device: str) -> Any:
    from vlm4vla_core.heads import FCHead

    return FCHead(width, 10, 6).to(device)


def ours(size: str, batch: int, device: str, fast: bool) -> tuple[Any, Any, Any]:
    """Model, its training loss and its prediction for one picture."""
    import numpy as np
    import torch
    from transformers import AutoModel

    from vlm4vla_core.actions import TABLETOP
    from vlm4vla_core.backbone import Backbone
    from vlm4vla_core.policy import PolicyConfig, VLAPolicy

    config, spec, tokenizer = model_config(size)
    dtype = torch.bfloat16 if fast and device != "cpu" else torch.float32
    with torch.device(device):
        base = AutoModel.from_config(config, attn_implementation="sdpa", dtype=dtype)
    backbone = Backbone(base, tokenizer, spec, 112 if size == "tiny" else 224)
    images, texts = pictures(batch, backbone.image_size), [TEXTS[i % len(TEXTS)] for i in range(batch)]
    length = backbone.collate(images, texts)["input_ids"].shape[1] if fast else 0
    pad_to = -(-length // 8) * 8 if fast else None
    policy = VLAPolicy(backbone, PolicyConfig(10, TABLETOP, (-1.0,) * 7, (1.0,) * 7, "front", pad_to=pad_to))
    if fast:
        policy.compile_layers(**({"backend": "aot_eager"} if device == "cpu" else {}))
    chunks = np.zeros((batch, 10, 7), np.float32)
    inputs = policy.collate(images, texts, chunks, np.ones((batch, 10), bool))
    policy.tokens = float(inputs["attention_mask"].sum(1).float().mean())  # that are no padding
    return policy, lambda: policy(inputs)["loss"], lambda: policy.predict(images[:1], texts[:1])


def straightforward(size: str, batch: int, device: str, fast: bool) -> tuple[Any, Any, Any]:
    """As `ours`, by the full model: see the top of the file."""
    import torch
    from torch import nn
    from transformers import AutoModelForImageTextToText

    from vlm4vla_core.families.spec import Geometry
    from vlm4vla_core.heads import action_losses

    config, spec, tokenizer = model_config(size)
    dtype = torch.bfloat16 if fast and device != "cpu" else torch.float32
    side = 112 if size == "tiny" else 224
    geometry: Geometry = spec.geometry(config, side)

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.device(device):
                self.model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa", dtype=dtype)
            width = self.model.get_input_embeddings().weight.shape[1]
            self.query = nn.Parameter(torch.zeros(1, 1, width, device=device))
            self.head = head_for(width, device)

        def forward(self, ids: Any, mask: Any, images: Any) -> Any:
            x = images.permute(0, 3, 1, 2).float() / 255
            mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
            pixels = spec.pixel_inputs((x - mean) / std, geometry)
            pixels["pixel_values"] = pixels["pixel_values"].to(dtype)
            words = self.model.get_input_embeddings()(ids)
            seen = torch.cat(list(self.model.model.get_image_features(**pixels).pooler_output)).to(words.dtype)
            words = words.masked_scatter((ids == config.image_token_id)[..., None].expand_as(words), seen)
            words = torch.cat([words, self.query.to(words.dtype).expand(len(ids), -1, -1)], 1)
            mask = torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
            out = self.model(inputs_embeds=words, attention_mask=mask, output_hidden_states=True, use_cache=False)
            return self.head(out.hidden_states[-1][:, -1])

    policy = Policy()
    tokenizer.padding_side = "right"
    prompt = spec.prompts["own"]

    def inputs(count: int) -> tuple[Any, ...]:
        texts = [prompt.question.replace("{instruction}", TEXTS[i % len(TEXTS)]) for i in range(count)]
        image = spec.image_token * geometry.tokens
        full = [prompt.text.replace("{image}", image).replace("{text}", text) for text in texts]
        told = tokenizer(full, padding=True, add_special_tokens=False, return_tensors="pt")
        values = (told["input_ids"], told["attention_mask"], torch.from_numpy(pictures(count, side)))
        return tuple(value.to(device) for value in values)

    batched = inputs(batch)
    policy.tokens = float(batched[1].sum(1).float().mean()) + 1

    def loss() -> Any:
        arm, logits = policy(*batched)
        zeros = torch.zeros_like(arm)
        return action_losses(arm, logits, zeros, zeros[..., 0], torch.ones_like(logits, dtype=torch.bool))["loss"]

    def predict() -> Any:
        with torch.no_grad():
            return [value.float().cpu().numpy() for value in policy(*inputs(1))]

    return policy, loss, predict


def pictures(count: int, side: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


ARMS = {"ours": ours, "straightforward": straightforward}


# --- measuring ------------------------------------------------------------------------------------------


class Meter:
    """Seconds per call and peak memory of the model: CPU time and resident memory beyond what is resident now, or the
    GPU's clock and allocator."""

    def __init__(self, device: str) -> None:
        import torch

        self.cuda = torch.cuda if device != "cpu" else None
        self.before = 0.0 if self.cuda else self._status("VmRSS")

    def reset(self) -> None:
        if self.cuda:
            self.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now

    def peak_gb(self) -> float:
        if self.cuda:
            return self.cuda.max_memory_allocated() / 1e9
        return self._status("VmHWM") - self.before

    def _status(self, key: str) -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024 / 1e9

    def seconds(self, call: Any, iterations: int, warm: int) -> float:
        times = []
        for step in range(warm + iterations):
            if self.cuda:
                self.cuda.synchronize()
            began = time.perf_counter() if self.cuda else time.process_time()
            call()
            if self.cuda:
                self.cuda.synchronize()
            ended = time.perf_counter() if self.cuda else time.process_time()
            if step >= warm:
                times.append(ended - began)
        return statistics.median(times)


def matrix_peak(device: str) -> float:
    """TFLOP/s of the largest bf16 matrix product that is quick to run, best of twenty."""
    import torch

    n = 8192 if device != "cpu" else 256
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    meter = Meter(device)
    best = min(meter.seconds(lambda: a @ b, 1, 1) for _ in range(20))
    return 2 * n**3 / max(best, 1e-9) / 1e12


def measure(arm: str, size: str, device: str, fast: bool) -> dict[str, Any]:
    """One arm in this process."""
    import torch
    import transformers.modeling_utils  # noqa: F401

    from vlm4vla_core import policy, sizes  # noqa: F401 (imported before memory is measured, like the libraries)

    torch.manual_seed(0)
    batch, iterations = (GPU_PLAN if fast else CPU_PLAN)[size]
    if device == "cpu":
        torch.set_num_threads(1)
    meter, warm = Meter(device), 3 if fast else 1
    model, loss, predict = ARMS[arm](size, batch, device, fast)
    model.eval()
    meter.reset()
    latency = meter.seconds(predict, iterations, warm)
    result: dict[str, Any] = {"arm": arm, "size": size, "batch": batch, "inference_ms": 1e3 * latency}
    result["inference_peak_gb"] = meter.peak_gb()
    model.train()

    def both_ways() -> None:
        model.zero_grad(set_to_none=True)
        loss().backward()

    fused = fast and arm == "ours"
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=fused)
    meter.reset()
    result["forward_backward_ms"] = 1e3 * meter.seconds(both_ways, iterations, warm)

    def step() -> None:
        both_ways()
        optimizer.step()

    meter.reset()
    result["step_ms"] = 1e3 * meter.seconds(step, iterations, 1)
    result["train_peak_gb"] = meter.peak_gb()
    result["samples_per_s"] = 1e3 * batch / result["step_ms"]
    result["parameters_m"] = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    if fast:
        config, spec, _ = model_config(size)
        made = sizes.measure(config, size, image_size=112 if size == "tiny" else 224)
        patches = spec.geometry(config, made.image_size).grid ** 2
        per_sample = made.parts["vision"] * patches + made.parts["projector"] * made.image_tokens
        flops = 6 * batch * (per_sample + made.parts["decoder"] * model.tokens)
        peak = matrix_peak(device)
        achieved = flops / result["forward_backward_ms"] / 1e9
        result |= {"tokens": model.tokens, "tflops": achieved, "matrix_peak_tflops": peak, "mfu": achieved / peak}
    return result


def made_by(command: str, device: str) -> dict[str, Any]:
    import torch
    import transformers

    gpu = torch.cuda.get_device_name() if device != "cpu" else None
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "hardware": {"gpu": gpu, "cpus": os.cpu_count(), "load_at_end": round(os.getloadavg()[0], 1)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--device", default=None)
    parser.add_argument("--size", choices=SIZES, nargs="+", default=None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--arm", choices=ARMS, default=None, help="measure one arm here and print it (used by itself)")
    args = parser.parse_args()
    device = args.device or ("cuda" if args.gpu else "cpu")
    if args.arm:
        print(json.dumps(measure(args.arm, args.size[0], device, args.gpu)))
        return
    names = args.size or (["Qwen2.5-VL-3B", "Qwen3-VL-2B"] if args.gpu else ["tiny", "mid"])
    print(
        f"{'size':<15}{'arm':<17}{'step ms':>10}{'fwd+bwd ms':>12}{'infer ms':>10}"
        f"{'train GB':>10}{'infer GB':>10}{'MFU':>7}"
    )
    for size in names:
        rows = {arm: in_its_own_process(arm, size, device, args.gpu) for arm in ARMS}
        keys = ("step_ms", "forward_backward_ms", "inference_ms", "train_peak_gb", "inference_peak_gb")
        ratios = {key: round(rows["straightforward"][key] / rows["ours"][key], 2) for key in keys}
        print(f"{size}: straightforward / ours " + ", ".join(f"{key} {value}" for key, value in ratios.items()))
        if str(args.out) != os.devnull:
            write(args.out, "gpu" if args.gpu else "cpu", size, {**rows, "straightforward_over_ours": ratios}, device)


def in_its_own_process(arm: str, size: str, device: str, fast: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--arm", arm, "--size", size, "--device", device] + ["--gpu"] * fast
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if device == "cpu" else dict(os.environ)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{arm} at {size} failed:\n{done.stderr[-3000:]}")
    row = json.loads(done.stdout.splitlines()[-1])
    mfu = f"{row['mfu']:>7.2f}" if "mfu" in row else ""
    print(
        f"{size:<15}{arm:<17}{row['step_ms']:>10.1f}{row['forward_backward_ms']:>12.1f}{row['inference_ms']:>10.1f}"
        f"{row['train_peak_gb']:>10.2f}{row['inference_peak_gb']:>10.2f}{mfu}",
        flush=True,
    )
    return row


def write(out: Path, part: str, size: str, result: dict[str, Any], device: str) -> None:
    """Put one size's result beside those that are there."""
    whole = json.loads(out.read_text()) if out.is_file() else {"goal": GOAL, "cpu": "not run", "gpu": NO_GPU}
    about = {
        "cpu": "CPU time of one thread, median; peak resident memory beyond the imported libraries. Two thirds of the "
        "100 M parameters are a real vocabulary, so the output layer that ours skips weighs far more than in the 3B, "
        "where it is a tenth of the decoder: the gain there will be smaller",
        "gpu": "wall time, median; peak of the GPU's allocator",
    }
    words = " ".join(["python", "benchmarks/backbones.py", *sys.argv[1:]])
    there = whole[part] if isinstance(whole[part], dict) else {"about": about[part]}
    whole[part] = {**there, size: {**result, "made_by": made_by(words, device)}}
    out.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
