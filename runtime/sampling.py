"""From logits to the next token: greedy, or sampled as Hugging Face's processors would."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from patchsieve.contract.errors import PatchsieveError, RequestError
from patchsieve.runtime.penalties import Penalties
from patchsieve.runtime.sampling_options import SamplingOptions

_SORTED_FIRST = (1024, 16384)  # tokens sorted for top-p before all are: most nuclei are smaller


def streams(seed: int | None) -> tuple[np.random.Generator, np.random.Generator]:
    """The two random streams of a request: noise of pruning methods, and draws of tokens.

    One stream for both would draw tokens by the numbers that chose the visual tokens. The noise has
    the seed itself; `Generator.spawn` would be shorter, but needs NumPy 1.25.
    """
    root = np.random.SeedSequence(seed)
    return np.random.default_rng(root), np.random.default_rng(root.spawn(1)[0])


class Sampler:
    """Chooses the tokens of one answer; holds its random state.

    The order and the mathematics are those of Hugging Face: penalties, temperature, top-k, top-p.
    Ties at the k-th logit are all kept, as there. Differs: among equal logits at the
    edge of the top-p nucleus the lower ids are kept, where Hugging Face leaves it to the sort.
    """

    def __init__(
        self,
        options: SamplingOptions,
        eos_token_ids: Collection[int] = (),
        prompt: Sequence[int] | np.ndarray = (),
    ) -> None:
        """Start an answer.

        Args:
            options: How to choose.
            eos_token_ids: Tokens that end an answer.
            prompt: Tokens before it, each image's repeated, [L0]; only the penalties read them.
        """
        self.options = options
        self.eos_token_ids = frozenset(int(token) for token in eos_token_ids)
        self._penalties = Penalties(options, self.eos_token_ids, prompt)
        self._rng = streams(options.seed)[1]

    def is_eos(self, token_id: int) -> bool:
        """Whether `token_id` ends the answer."""
        return token_id in self.eos_token_ids and not self.options.ignore_eos

    def next_token(self, logits: np.ndarray) -> int:
        """Choose the next token of the answer.

        Args:
            logits: One row of logits, [V].

        Returns:
            The token's id.

        Raises:
            PatchsieveError: A logit is NaN or infinite.
            RequestError: The options forbid every token.
        """
        if self.options.temperature == 0:
            # argmax takes the first of equal maxima: the lower id
            token = int(np.argmax(self._penalised(logits)))
        else:
            ids, probabilities = self.candidates(logits)
            edges = np.cumsum(probabilities)
            drawn = int(np.searchsorted(edges, self._rng.random() * edges[-1], side="right"))
            token = int(ids[min(drawn, len(ids) - 1)])
        self._penalties.add(token)
        return token

    def candidates(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that may be drawn and their probabilities; `temperature` must not be 0.

        Args:
            logits: One row of logits, [V].

        Returns:
            Ids, ascending, int64 [K], and probabilities, float64 [K], that add up to 1.

        Raises:
            PatchsieveError: A logit is NaN or infinite.
            RequestError: `temperature` is 0, or the options forbid every token.
        """
        options = self.options
        if options.temperature == 0:
            raise RequestError(
                "greedy choice has no distribution",
                found="temperature 0",
                expected="a temperature above 0",
                do="give --temperature a number above 0",
            )
        scores = self._penalised(logits)
        ids = np.flatnonzero(scores > -np.inf)
        if 0 < options.top_k < ids.size:
            split = scores.size - options.top_k
            ids = np.flatnonzero(scores >= np.partition(scores, split)[split])  # [K]
        # float64 and the maximum taken off first: a tiny temperature overflows float32
        scaled = (scores[ids].astype(np.float64) - scores[ids].max()) / options.temperature
        probabilities = np.exp(scaled)
        probabilities /= probabilities.sum()
        if options.top_p < 1:
            kept = _nucleus(probabilities, options.top_p)
            ids, probabilities = ids[kept], probabilities[kept]
            probabilities = probabilities / probabilities.sum()
        return ids.astype(np.int64), probabilities

    def _penalised(self, logits: np.ndarray) -> np.ndarray:
        """float32 scores after the penalties, [V]: finite, or minus infinity where forbidden."""
        scores = np.asarray(logits, dtype=np.float32)
        if scores.ndim != 1 or scores.size == 0:
            raise PatchsieveError(
                "bad logits", found=f"shape {scores.shape}", expected="[V]", do="pass one row"
            )
        finite = np.isfinite(scores)
        if not finite.all():
            raise PatchsieveError(
                "the model returned logits that are not finite",
                found=f"{int(scores.size - finite.sum())} of {scores.size}",
                do="use a wider type (bf16 or fp32) or re-export; `patchsieve verify` names the"
                " first layer that departs",
            )
        scores = self._penalties(scores)
        if scores.max() == -np.inf:
            raise RequestError(
                "the options forbid every token",
                found=f"{scores.size} tokens, all suppressed",
                do="shorten suppress_tokens or bad_words_ids, or lower no_repeat_ngram_size",
            )
        return scores


def _nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """Indices, ascending, of the fewest most likely entries that reach `top_p`, [K] -> [K'].

    An entry stays while the mass of the entries above it is below `top_p`, which is Hugging Face's
    ascending rule (drop while the cumulated mass is at most 1 - top_p) read from the other end.
    """
    for size in (*_SORTED_FIRST, probabilities.size):
        if size < probabilities.size:
            split = probabilities.size - size
            edge = np.partition(probabilities, split)[split]
            pool = np.flatnonzero(probabilities >= edge)  # all ties of the edge: the order is exact
        else:
            pool = np.arange(probabilities.size)
        order = pool[np.argsort(-probabilities[pool], kind="stable")]
        mass = np.cumsum(probabilities[order])
        if mass[-1] >= top_p or len(pool) == probabilities.size:
            break
    above = np.concatenate(([0.0], mass[:-1]))
    return np.sort(order[above < top_p])
