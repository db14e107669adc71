"""What a request may say of its tokens: how they are chosen, and when the answer ends."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from patchsieve.contract.errors import RequestError
from patchsieve.contract.manifest import Manifest

# Options of `patchsieve run`; Python users have all of them.
_ON_THE_COMMAND_LINE = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty"),
    *("no_repeat_ngram_size", "min_new_tokens", "seed", "stop"),
)


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen and when an answer ends.

    Attributes:
        max_new_tokens: Most tokens of one answer, at least 1.
        temperature: 0 is greedy; otherwise the logits are divided by it.
        top_k: Only tokens with at least the k-th highest logit are drawn; 0 is off.
        top_p: Only the most likely tokens that together reach this probability; 1 is off.
        repetition_penalty: Logits of tokens seen before are divided (if positive) or multiplied
            (if negative) by it; 1 is off. It and the next six act in greedy choice too, see the
            prompt with all its visual tokens, and mean what they mean in Hugging Face.
        no_repeat_ngram_size: So many tokens in a row come only once; 0 is off.
        min_length: No end token before prompt and answer are so long.
        min_new_tokens: No end token before the answer is so long.
        suppress_tokens: Tokens that never come.
        begin_suppress_tokens: Tokens that do not come first.
        bad_words_ids: Rows of tokens that never come.
        seed: Makes the draws repeatable; None takes fresh entropy from the system. Tokens and the
            noise of pruning methods are drawn from two separate streams of it.
        stop: Strings that end the answer and are not part of its text; a special token counts with
            its name. The token ids keep what was said, as in Hugging Face.
        ignore_eos: End tokens do not end the answer, so that every run has the same length.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_length: int = 0
    min_new_tokens: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            RequestError: An option has the wrong type or lies outside its range.
        """
        _check_int("max_new_tokens", self.max_new_tokens, 1)
        for name in ("top_k", "no_repeat_ngram_size", "min_length", "min_new_tokens"):
            _check_int(name, getattr(self, name), 0)
        if self.seed is not None:
            _check_int("seed", self.seed, 0)
        if not _is_real(self.temperature) or self.temperature < 0:
            raise _bad("temperature", self.temperature, "a number >= 0")
        if not _is_real(self.top_p) or not 0 < self.top_p <= 1:
            raise _bad("top_p", self.top_p, "a number above 0 and at most 1")
        if not _is_real(self.repetition_penalty) or self.repetition_penalty <= 0:
            raise _bad("repetition_penalty", self.repetition_penalty, "a number > 0")
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            object.__setattr__(self, name, _tokens(name, getattr(self, name)))
        words = self.bad_words_ids
        if not isinstance(words, (tuple, list)) or not all(words):
            raise _bad("bad_words_ids", words, "lists of token ids")
        words = tuple(_tokens("bad_words_ids", word) for word in words)
        object.__setattr__(self, "bad_words_ids", words)
        if not isinstance(self.stop, (tuple, list)) or not all(
            isinstance(text, str) and text for text in self.stop
        ):
            raise _bad("stop", self.stop, "a tuple of strings, none empty")
        object.__setattr__(self, "stop", tuple(self.stop))


# Of a request that takes the model's logits as they are, whatever its bundle asks.
PLAIN: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "bad_words_ids": (),
    "stop": (),
}


def options_of(asked: dict[str, Any], facts: Manifest) -> SamplingOptions:
    """Options of a request: its own, then what the bundle asks of every answer.

    Without a number of new tokens it is the usual, or what is reserved.
    """
    known = [option.name for option in fields(SamplingOptions)]
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise RequestError(
            "unknown option of a request",
            found=", ".join(unknown),
            expected=", ".join(known),
            do="remove it, or use one of those",
        )
    usual = min(SamplingOptions.max_new_tokens, facts.limits.max_new_tokens)
    return SamplingOptions(**{"max_new_tokens": usual} | facts.generation.options() | asked)


def _bad(name: str, value: object, expected: str) -> RequestError:
    option = f"--{name.replace('_', '-')}" if name in _ON_THE_COMMAND_LINE else name
    return RequestError(
        f"bad {name}", found=repr(value)[:60], expected=expected, do=f"give {option} {expected}"
    )


def _is_real(value: object) -> bool:
    return (
        isinstance(value, (int, float, np.integer, np.floating))
        and not isinstance(value, bool)
        and math.isfinite(value)
    )


def _tokens(name: str, value: object) -> tuple[int, ...]:
    if isinstance(value, (tuple, list)) and all(
        type(token) is int and token >= 0 for token in value
    ):
        return tuple(value)
    raise _bad(name, value, "token ids")


def _check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise _bad(name, value, f"a whole number >= {least}")
