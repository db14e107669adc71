"""The demo model's two tokenizers, learnt from its own questions, answers and captions."""

from __future__ import annotations

from functools import cache
from typing import Any

import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from examples.make_checkpoint import make_tokenizer

from .questions import SHORT, Asker
from .scenes import make_scene

VOCABULARY = 566  # all pieces that the corpus teaches; `<image>` and `<pad>` not counted
_SCENES = 400  # scenes whose questions are read


@cache
def corpus() -> tuple[str, ...]:
    """What users and the model say, as the chat template has it; an answer follows a space."""
    asker = Asker(seed=0)
    lines = ["USER: ", " ASSISTANT:", SHORT]
    for index in range(_SCENES):
        for question in asker.ask(make_scene("train", index), 20):
            lines += [question.text, f" {question.word}", f" {question.sentence}"]
    return tuple(lines)


def language_tokenizer() -> Any:
    """Llama's kind, with byte fallback: each word of the corpus becomes one token."""
    return make_tokenizer("llama", VOCABULARY, lines=corpus())


def clip_tokenizer() -> Any:
    """CLIP's kind: lower case, byte-level pieces that know where a word ends."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    learner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(corpus(), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=learner,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
