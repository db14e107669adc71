"""The demo model's two tokenizers, learnt from its own questions, answers and captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from examples.make_checkpoint import make_tokenizer

from .questions import SHORT, Asker
from .scenes import make_scene

VOCABULARY = 566  # all pieces that the corpus teaches; `<image>` and `<pad>` not counted
_MARKS, _END = ("<|startoftext|>", "<|endoftext|>"), "</w>"  # of a text; of a word
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


def clip_tokenizer(lines: Sequence[str] | None = None, vocabulary: int = 1000) -> Any:
    """CLIP's kind: lower case, byte-level pieces that know where a word ends.

    Args:
        lines: Text to learn from, where not `corpus`.
        vocabulary: Most pieces.
    """
    learner = Tokenizer(models.BPE(end_of_word_suffix=_END, unk_token=_MARKS[1]))
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
        vocab_size=vocabulary,
        special_tokens=list(_MARKS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix=_END,
        show_progress=False,
    )
    learner.train_from_iterator(corpus() if lines is None else lines, trainer)
    _number(learner)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=learner,
        bos_token=_MARKS[0],
        eos_token=_MARKS[1],
        unk_token=_MARKS[1],
        pad_token=_MARKS[1],
    )


def _number(tokenizer: Tokenizer) -> None:
    """Number single characters by their order: the trainer does otherwise in each process."""
    learnt = json.loads(tokenizer.to_str())["model"]
    found: dict[str, int] = learnt["vocab"]

    def place(piece: str) -> tuple[int, int, str]:
        if piece in _MARKS:
            return 0, found[piece], ""
        is_merged = len(piece.removesuffix(_END)) > 1
        return (2, found[piece], "") if is_merged else (1, 0, piece)

    tokenizer.model = models.BPE(
        vocab={piece: index for index, piece in enumerate(sorted(found, key=place))},
        merges=[tuple(pair) for pair in learnt["merges"]],
        end_of_word_suffix=_END,
        unk_token=_MARKS[1],
    )
