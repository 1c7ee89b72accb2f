"""Our own image and text processing against the library's processors, where those can be built without torchvision."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from vlm4vla_core.backbone import Backbone, tiny
from vlm4vla_core.families import families, family
from vlm4vla_core.images import resize

TEXTS = ["open the drawer", "put the small red cup on the plate"]
SIZE = 112


def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 90, 130, 3), dtype=np.uint8)


def image_processor(module: str, name: str, model: Backbone, **options: Any) -> Any:
    where = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    values = {"image_mean": model.spec.mean, "image_std": model.spec.std, **options}
    return getattr(where, name)(**values)


SQUARE = {"size": {"height": SIZE, "width": SIZE}}
LONGEST = {"size": {"longest_edge": SIZE}, "max_image_size": {"longest_edge": SIZE}, "do_image_splitting": False}
IMAGE_PROCESSORS = {
    "paligemma": ("siglip", "SiglipImageProcessorPil", {**SQUARE, "resample": 3}),
    "paligemma2": ("siglip", "SiglipImageProcessorPil", {**SQUARE, "resample": 3}),
    "gemma3": ("gemma3", "Gemma3ImageProcessorPil", {**SQUARE, "do_pan_and_scan": False, "resample": 3}),
    "kosmos2": ("clip", "CLIPImageProcessorPil", {"size": {"shortest_edge": SIZE}, "crop_size": SQUARE["size"]}),
    "internvl": ("got_ocr2", "GotOcr2ImageProcessorPil", {**SQUARE, "crop_to_patches": False, "resample": 3}),
    "smolvlm": ("smolvlm", "SmolVLMImageProcessorPil", {**LONGEST, "resample": 3}),
    "idefics3": ("idefics3", "Idefics3ImageProcessorPil", {**LONGEST, "resample": 3}),
    "llava_onevision": (
        "llava_onevision", "LlavaOnevisionImageProcessorPil", {**SQUARE, "image_grid_pinpoints": [[SIZE, SIZE]]},
    ),
    **{
        name: ("qwen2_vl", "Qwen2VLImageProcessorPil", {"patch_size": 14, "min_pixels": 1})
        for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")
    },
}  # fmt: skip


def own_image_processor(name: str, model: Backbone) -> Any:
    module, kind, options = IMAGE_PROCESSORS[name]
    if module == "qwen2_vl":
        options = {**options, "temporal_patch_size": model.geometry.temporal}
    return image_processor(module, kind, model, **options)


def assert_same_pixels(ours: dict[str, torch.Tensor], theirs: Any) -> None:
    for key, value in ours.items():
        other = theirs[key]
        other = torch.stack(list(other)) if isinstance(other, list) else other
        assert torch.equal(value, other.to(value.dtype)), key


@pytest.mark.parametrize("name", sorted(IMAGE_PROCESSORS))
def test_pixels_equal_the_library_bit_for_bit(name: str):
    """All 256 grey levels, cut and normalised; the resizing of squares too, where the processor's filter is bicubic."""
    model = tiny(name)
    images = resize(pictures(), SIZE)
    images[0].reshape(-1)[: 256 * 3] = np.repeat(np.arange(256, dtype=np.uint8), 3)
    theirs = own_image_processor(name, model)([[image] for image in images], return_tensors="pt")
    assert_same_pixels(model.pixels(torch.from_numpy(images)), theirs)


@pytest.mark.parametrize("name", ["paligemma", "internvl", "gemma3"])
def test_resizing_equals_the_library_for_one_filter(name: str):
    model = tiny(name)
    theirs = own_image_processor(name, model)([[image] for image in pictures()], return_tensors="pt")
    assert_same_pixels(model.pixels(torch.from_numpy(resize(pictures(), SIZE))), theirs)


def test_normalisation_and_sizes_are_the_published_ones():
    """preprocessor_config.json of the models named, by the library's constants where it has them."""
    from transformers import image_utils as library

    clip = (library.OPENAI_CLIP_MEAN, library.OPENAI_CLIP_STD)
    imagenet = (library.IMAGENET_DEFAULT_MEAN, library.IMAGENET_DEFAULT_STD)
    half = (library.IMAGENET_STANDARD_MEAN, library.IMAGENET_STANDARD_STD)
    expected = dict.fromkeys(families(), half)
    expected |= {"qwen2_vl": clip, "qwen2_5_vl": clip, "kosmos2": clip, "internvl": imagenet}
    for name, (mean, std) in expected.items():
        assert (list(family(name).mean), list(family(name).std)) == (mean, std)
    for name, module, patch, size, tokens in (
        ("qwen2_5_vl", "qwen2_5_vl", 14, 224, 64),  # Qwen2.5-VL-3B: at least 3136 pixels
        ("qwen3_vl", "qwen3_vl", 16, 256, 64),  # Qwen3-VL-2B: at least 65536 pixels
    ):
        config = transformers.AutoConfig.for_model(module)
        assert config.vision_config.patch_size == patch
        assert family(name).native_size(config) == size
        assert family(name).geometry(config, size).tokens == tokens


# The processors that need torchvision are what AutoProcessor builds where that is installed.
WITH_TORCHVISION = {
    "siglip": "SiglipImageProcessor", "gemma3": "Gemma3ImageProcessor", "clip": "CLIPImageProcessor",
    "got_ocr2": "GotOcr2ImageProcessor", "smolvlm": "SmolVLMImageProcessor", "idefics3": "Idefics3ImageProcessor",
    "llava_onevision": "LlavaOnevisionImageProcessor", "qwen2_vl": "Qwen2VLImageProcessor",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(IMAGE_PROCESSORS))
def test_pixels_equal_the_torchvision_processors(name: str):
    """Of squares at the model's size. They fold scaling into normalisation, so rounding may differ."""
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # also where a build does not fit torch
        pytest.skip(f"torchvision cannot be imported here ({type(error).__name__}: {error})"[:160])
    model = tiny(name)
    module, _, options = IMAGE_PROCESSORS[name]
    if module == "qwen2_vl":
        options = {**options, "temporal_patch_size": model.geometry.temporal}
    where = importlib.import_module(f"transformers.models.{module}.image_processing_{module}")
    kind = getattr(where, f"{WITH_TORCHVISION[module]}Fast", None) or getattr(where, WITH_TORCHVISION[module])
    processor = kind(image_mean=model.spec.mean, image_std=model.spec.std, **options)
    images = resize(pictures(), SIZE)
    theirs = processor([[image] for image in images], return_tensors="pt")
    for key, value in model.pixels(torch.from_numpy(images)).items():
        other = torch.stack(list(theirs[key])) if isinstance(theirs[key], list) else theirs[key]
        torch.testing.assert_close(value, other.to(value.dtype), rtol=0, atol=2e-6)


# --- combined processors: token ids too -----------------------------------------------------------------

# Prompts as one gives them to the library's processor, which puts in the image's placeholders itself.
_FAKE = "<fake_token_around_image><global-img>{image}<fake_token_around_image>"
PLACEHOLDER = {
    "paligemma": ("{image}<bos>", "<image>"), "paligemma2": ("{image}<bos>", "<image>"),
    "kosmos2": ("<s><image>{image}</image> ", ""), "internvl": ("<img>{image}</img>", "<IMG_CONTEXT>"),
    "gemma3": ("\n\n<start_of_image>{image}<end_of_image>\n\n", "<start_of_image>"), "idefics3": (_FAKE, "<image>"),
    "llava_onevision": ("{image}", "<image>"), "qwen2_vl": ("{image}", "<|image_pad|>"),
    "qwen2_5_vl": ("{image}", "<|image_pad|>"), "qwen3_vl": ("{image}", "<|image_pad|>"),
}  # fmt: skip
EXTRA_TOKENS = {
    "internvl": {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "gemma3": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
}  # fmt: skip


def combined(name: str, model: Backbone, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library's processor around our tokenizer; families with videos need torchvision, but for this patch."""
    import transformers.processing_utils as processing

    if name in ("internvl", "llava_onevision") or name.startswith("qwen"):
        monkeypatch.setattr(processing.transformers_module, "VideoProcessorMixin", type(None), raising=False)
    images, tokenizer, tokens = own_image_processor(name, model), model.tokenizer, model.geometry.tokens
    for key, token in EXTRA_TOKENS.get(name, {}).items():
        setattr(tokenizer, key, token)
        setattr(tokenizer, f"{key}_id", tokenizer.convert_tokens_to_ids(token))
    if name.startswith("paligemma"):
        images.image_seq_length = tokens
        return transformers.PaliGemmaProcessor(images, tokenizer)
    if name == "kosmos2":
        return transformers.Kosmos2Processor(images, tokenizer, num_patch_index_tokens=1)
    if name == "gemma3":
        return transformers.Gemma3Processor(images, tokenizer, image_seq_length=tokens)
    if name == "idefics3":
        return transformers.Idefics3Processor(images, tokenizer, image_seq_len=tokens)
    if name == "internvl":
        return transformers.InternVLProcessor(images, tokenizer, None, image_seq_length=tokens)
    if name == "llava_onevision":
        grid = model.geometry.grid
        return transformers.LlavaOnevisionProcessor(
            images, tokenizer, None, num_image_tokens=grid * grid, vision_feature_select_strategy="full"
        )
    kind = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
    return getattr(transformers, kind[name])(images, tokenizer, None)


@pytest.mark.parametrize("name", sorted(PLACEHOLDER))
def test_ids_types_and_pixels_equal_the_combined_processor(name: str, monkeypatch: pytest.MonkeyPatch):
    model = tiny(name)
    ours = model.collate(pictures(), TEXTS, query=False)
    try:
        processor = combined(name, model, monkeypatch)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        pytest.skip(f"the library's processor cannot be built here: {error}")
    expanded, bare = PLACEHOLDER[name]
    assert expanded in model.prompt.text
    prompt = model.prompt.text.replace(expanded, bare)
    if name.startswith("paligemma"):
        prompt = prompt.removesuffix("\n")  # the processor adds begin token and newline itself
    options: dict[str, Any] = {"num_image_tokens": model.geometry.tokens} if name == "kosmos2" else {}
    if name in ("gemma3", "idefics3"):
        options["add_special_tokens"] = False
    texts = [prompt.replace("{text}", text) for text in TEXTS]
    images = [[image] for image in resize(pictures(), SIZE)] if name in ("gemma3", "idefics3") else None
    images = list(resize(pictures(), SIZE)) if images is None else images
    theirs = processor(images=images, text=texts, return_tensors="pt", padding=True, **options)
    assert_same_pixels(model.pixels(ours["images"]), theirs)
    for row in range(2):
        real, other = ours["attention_mask"][row].bool(), theirs["attention_mask"][row].bool()
        for key in ("input_ids", *model.spec.extra_inputs):
            assert ours[key][row][real].tolist() == theirs[key][row][other].tolist(), key
