"""What an answer so far forbids or makes less likely, as transformers' logits processors do."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from patchsieve.runtime.sampling_options import SamplingOptions


class Penalties:
    """The penalties of one answer, and the tokens that they look back on.

    As in transformers, these tokens are the prompt, each image repeated for each of its visual
    tokens, and then the answer. Ids that have no logit (image tokens past V) are passed over.
    """

    def __init__(
        self,
        asked: SamplingOptions,
        eos_token_ids: Collection[int],
        prompt: Sequence[int] | np.ndarray,
    ) -> None:
        """Start an answer.

        Args:
            asked: The options.
            eos_token_ids: Tokens that end an answer; never bad words, and banned by `min_length`.
            prompt: Tokens before the answer, [L0].
        """
        self.asked, self.num_prompt, self._count = asked, len(prompt), len(prompt)
        self._ids = np.empty(len(prompt) + asked.max_new_tokens, dtype=np.int64)
        self._ids[: len(prompt)] = prompt
        self._eos = np.array(sorted(eos_token_ids), dtype=np.int64)
        words = [word for word in asked.bad_words_ids if len(word) > 1]
        single = [word[0] for word in asked.bad_words_ids if len(word) == 1]
        banned = {
            *asked.suppress_tokens,
            *(token for token in single if token not in eos_token_ids),
        }
        self._banned = np.array(sorted(banned), dtype=np.int64)
        self._banned_first = np.array(asked.begin_suppress_tokens, dtype=np.int64)
        self._words = [  # of each length: the tokens before the last, [K, P], and the last, [K]
            (np.array([word[:-1] for word in same]), np.array([word[-1] for word in same]))
            for length in sorted({len(word) for word in words})
            for same in [[word for word in words if len(word) == length]]
        ]
        self._seen: np.ndarray | None = None  # bool [V]
        least = max(asked.min_length, asked.min_new_tokens)
        self._is_idle = asked.repetition_penalty == 1 and not (
            asked.no_repeat_ngram_size or least or banned or self._words or len(self._banned_first)
        )

    def add(self, token: int) -> None:
        """Count a token to the answer."""
        if self._count == len(self._ids):
            self._ids = np.concatenate((self._ids, np.empty(self._count + 1, np.int64)))
        self._ids[self._count] = token
        self._count += 1
        if self._seen is not None and token < len(self._seen):
            self._seen[token] = True

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Scores of the next token, [V] -> [V]; what may not come is minus infinity."""
        if self._is_idle:
            return scores
        scores = scores.copy()
        self._repetition(scores)
        for banned in self._bans():
            scores[banned[(banned >= 0) & (banned < scores.size)]] = -np.inf
        return scores

    def _repetition(self, scores: np.ndarray) -> None:
        penalty = np.float32(self.asked.repetition_penalty)
        if penalty == 1:
            return
        if self._seen is None:
            self._seen = np.zeros(scores.size, dtype=bool)
            ids = self._ids[: self._count]
            self._seen[ids[(ids >= 0) & (ids < scores.size)]] = True
        found = scores[self._seen]
        scores[self._seen] = np.where(found < 0, found * penalty, found / penalty)

    def _bans(self) -> list[np.ndarray]:
        """Lists of tokens that may not come now."""
        asked, said = self.asked, self._count - self.num_prompt
        bans = [self._banned, *self._repeats(asked.no_repeat_ngram_size)]
        if said == 0:
            bans.append(self._banned_first)
        if self._count < asked.min_length or said < asked.min_new_tokens:
            bans.append(self._eos)
        for begins, ends in self._words:
            length = begins.shape[1]
            if length <= self._count:
                last = self._ids[self._count - length : self._count]
                bans.append(ends[(begins == last).all(axis=1)])
        return bans

    def _repeats(self, size: int) -> list[np.ndarray]:
        """Tokens that would repeat a row of `size` tokens."""
        starts = self._count - size + 1  # of the rows that there are
        if size == 0 or starts < 1:
            return []
        ids = self._ids[: self._count]
        matches = np.ones(starts, dtype=bool)
        for place in range(size - 1):
            matches &= ids[place : place + starts] == ids[starts + place]
        return [ids[size - 1 :][matches]]
