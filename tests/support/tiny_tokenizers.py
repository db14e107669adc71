"""Tiny tokenizers of the kinds that LLaVA models use, trained on a few sentences."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SENTENCES = [
    "What is in this picture? Describe the image in detail.",
    "How many people are there, and what are they doing?",
    "USER: What colour is the cup? ASSISTANT: The cup is white and it stands on a table.",
    "A chat between a curious user and an artificial intelligence assistant.",
    "The cat is sleeping on the sofa next to the window.\nsystem user assistant [INST] [/INST]",
] * 4
IMAGE = "<image>"
# The pattern of Qwen2's tokenizer
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = {
    "qwen": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}
KINDS = ("qwen", "llama", "llama-first", "llama-strips", "qwen-strips", "llama-lstrip")


@cache
def tokenizer_json(kind: str) -> str:
    """Text of a tokenizer.json.

    `qwen`: byte-level BPE without BOS. `llama`: sentencepiece-style BPE as converted files have it,
    a space put before every piece of text, byte fallback, BOS by the post-processor. `llama-first`:
    the newer form that puts a space before the first piece only. `-strips`, `-lstrip`: the image
    token swallows the spaces around or before it.
    """
    family, _, variant = kind.partition("-")
    tokenizer = _qwen() if family == "qwen" else _llama(is_first_only=variant == "first")
    image = AddedToken(
        IMAGE,
        special=True,
        normalized=False,
        lstrip=variant in ("strips", "lstrip"),
        rstrip=variant == "strips",
    )
    tokenizer.add_special_tokens([image])
    return tokenizer.to_str()


def special_tokens(kind: str) -> dict[str, str]:
    """Named special tokens of a kind."""
    return SPECIAL[kind.partition("-")[0]]


def tokenizer(kind: str) -> Tokenizer:
    """A fresh tokenizer."""
    return Tokenizer.from_str(tokenizer_json(kind))


def _qwen() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def _llama(*, is_first_only: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    named = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=named + byte_tokens, show_progress=False
    )
    tokenizer.train_from_iterator([s.replace("\n", " ") for s in SENTENCES], trainer)
    # Byte tokens are ordinary entries of the vocabulary, not added ones
    content = json.loads(tokenizer.to_str())
    content["model"]["byte_fallback"] = True
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in named]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if is_first_only:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer
