"""Tiny, randomly initialised members of the real model classes, with a tokenizer made in code: nothing is downloaded.

They are what the tests and the built-in demonstration run on. Everything is a function of the seed, and torch's
global random state is left as it was.

Trap: a tiny model knows nothing of images or language. What it shows is that the machinery works, never how good
a family is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm4vla_core.families import FamilySpec, family

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

# The fixed text of every prompt is a handful of tokens, so that a training step pays for the instruction only.
_PHRASES = (
    "system\nYou are a helpful assistant.",
    "user\n",
    "assistant\n",
    "What action should the robotic arm take to",
)
_WORDS = """
a action along an and are arm as at away axis back backward ball balls behind beside between big block blue board both
bottom bowl box bring burner by camera can caption carrot carry cell center close closed closer closes closest cloth
color colour column columns container corner count counter cube cubes cup cyan cylinder cylinders did do does door
down downwards drawer earlier edge eight empty far farther faucet first five flip fold for fork forward four fractions
from front fruit go goes grasp gray green grey grip gripper half hand handle height high higher highest hold holding
how in inside into is it knife knob lamp large later left let letter lever lid lift light list lit low lower lowest
magenta many me medium microwave middle motion move moved near nearest next no nothing object objects of off on one
onto open or orange order out oven over pan pick picture pink place plate point points position pot pull purple push
put raise reach red release remove right robot robotic rotate row rows set seven shape shapes shift shove side sink
six slide slightly small spatula spoon stack stay step steps stove sweep switch switched table take tap task than the
there this three through to tokens top touch towards towel tower toy tray turn two up upper upright upwards vessel was
way what where which white width with yellow yes you zero
"""
_CAPITALS = ("Answer", "Did", "How", "Is", "List", "Point", "The", "Through", "What", "Where", "Which")


def tiny_tokenizer(spec: FamilySpec | None = None, phrases: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 600 entries: a family's special tokens, bytes, common words of manipulation.

    A listed word is one token, with or without the blank before it; any other text falls back to bytes, so
    every text can be encoded and decoded. There are no merges to train, so it is the same everywhere. phrases: further
    texts that are one token each.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    spec = spec or family("qwen2_5_vl")
    specials = spec.special_tokens
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [blank + word for word in sorted(set(_WORDS.split())) for blank in ("", "Ġ") if len(blank + word) > 1]
    words += ["ĊĊ", *(blank + word for word in _CAPITALS for blank in ("", "Ġ"))]
    first = specials[:4] if spec.image_ids else specials  # Kosmos-2 takes the ids after the fourth for its images
    listing = [*first, *alphabet, *words, *specials[len(first) :]]
    vocab = {token: index for index, token in enumerate(listing)}
    # Whole words are looked up before any merge is tried (ignore_merges), and there are no merges: words or bytes.
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    core.add_tokens([AddedToken(phrase, normalized=False) for phrase in (*_PHRASES, *phrases)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=spec.answer_end,
        pad_token="<pad>" if "<pad>" in specials else specials[0],
        bos_token=next((token for token in ("<bos>", "<s>") if token in specials), None),
        unk_token="<unk>" if "<unk>" in specials else None,
        additional_special_tokens=list(specials),
        clean_up_tokenization_spaces=False,
    )


def tiny_base(
    spec: FamilySpec, tokenizer: PreTrainedTokenizerFast, seed: int, image_size: int
) -> tuple[Any, torch.Tensor | None]:
    """The headless base of a tiny member of `spec`'s real class, and its output layer (V, D) where that is not tied;
    on the CPU in fp32, initialised from `seed`."""
    import torch
    from transformers import AutoModel

    ids: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in spec.special_tokens}
    config = spec.tiny_config({**ids, "vocab": len(tokenizer)}, image_size)
    with torch.random.fork_rng(devices=[]):  # the library's own initialisation draws from the global state
        torch.manual_seed(seed)
        base = AutoModel.from_config(config, attn_implementation=spec.attention, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    initialise(base, spec, generator)
    words = base.get_submodule(spec.embeddings).weight  # (V, D)
    drawn = torch.randn(words.shape, generator=generator) / math.sqrt(words.shape[1])
    return base.eval(), None if config.tie_word_embeddings else drawn


def initialise(base: Any, spec: FamilySpec, generator: torch.Generator) -> None:
    """Draw every weight anew, scaled so that a model of this size learns within minutes.

    Fan-in scaling everywhere, 0.4 of it where a block writes into the residual stream; word embeddings with
    std 0.5, so that a word's identity survives the first attention layer; decoder query and key biases with std 0.5,
    which make attention depend on positions from the start. The library's 0.02 is made for widths of thousands.
    Parameters of no module (experts, latents, Gemma3's projection, which the library leaves at zero) are drawn last.
    """
    import torch
    from torch import nn

    embedding = base.get_submodule(spec.embeddings)
    with torch.no_grad():
        for name, module in base.named_modules():
            if isinstance(module, nn.Linear | nn.Conv3d | nn.Conv2d):
                fan_in = module.weight[0].numel()
                into_residual = name.endswith(("o_proj", "down_proj", "attn.proj"))
                module.weight.normal_(std=(0.4 if into_residual else 1.0) / math.sqrt(fan_in), generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
                    if name.endswith(("q_proj", "k_proj")):
                        module.bias.normal_(std=0.5, generator=generator)
        scale = 1.0 if spec.embed_scale == "none" else math.sqrt(embedding.embedding_dim)
        embedding.weight.normal_(std=0.5 / scale, generator=generator)
        for module in base.modules():
            if not isinstance(module, nn.Linear | nn.Conv3d | nn.Conv2d | nn.Conv1d | nn.Embedding):
                for parameter in module.parameters(recurse=False):
                    if parameter.dim() > 1:
                        parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]), generator=generator)
