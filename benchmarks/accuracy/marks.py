"""Marks of plans and what may be said of them: intervals, paired differences, who beats whom."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from examples.demo_model.questions import COARSE, FINE
from patchsieve.evaluation.answers import Answer
from patchsieve.evaluation.metrics import Interval, bootstrap, exact_match, interval
from patchsieve.evaluation.questions import Question

T = TypeVar("T")
GROUPS: dict[str, Callable[[str], bool]] = {
    "all": lambda kind: True,
    "fine": lambda kind: kind in FINE,
    "coarse": lambda kind: kind in COARSE,
}


@dataclass(frozen=True)
class Marks:
    """How one plan did.

    Attributes:
        hits: 1 for a right answer, else 0, [Q].
        kinds: Kind of each question.
        tokens: Mean visual tokens over all layers in each answer, [Q].
        kv_bytes: Mean bytes of the cache at the end of an answer.
        pictures: The picture of each question; intervals come of drawing pictures.
    """

    hits: tuple[float, ...]
    kinds: tuple[str, ...]
    tokens: tuple[float, ...]
    kv_bytes: float
    pictures: tuple[str, ...]

    @classmethod
    def of(cls, questions: Sequence[Question], answers: Sequence[Answer]) -> Marks:
        """Mark answers by exact match."""
        pairs = list(zip(questions, answers, strict=True))
        return cls(
            tuple(exact_match(given.text, asked.references) for asked, given in pairs),
            tuple(asked.category for asked in questions),
            tuple(given.visual_tokens for given in answers),
            statistics.mean(given.kv_bytes for given in answers),
            tuple(asked.subject for asked in questions),
        )

    def accuracy(self, group: str = "all") -> Interval:
        """Share of right answers in a group of kinds, or in a kind."""
        return self._interval(self.hits, group)

    def share(self, group: str = "all") -> float:
        """The same without its interval, which takes time."""
        return _mean(_chosen(self.hits, self.kinds, group))

    def mean_tokens(self, group: str = "all") -> float:
        """Mean visual tokens in a group of kinds, or in a kind."""
        return _mean(_chosen(self.tokens, self.kinds, group))

    def minus(self, other: Marks, group: str = "all") -> Interval:
        """Paired difference of accuracy: the same questions, drawn together.

        Raises:
            ValueError: The other was asked other questions.
        """
        if (self.kinds, self.pictures) != (other.kinds, other.pictures):
            raise ValueError("marks of different questions cannot be paired")
        pairs = zip(self.hits, other.hits, strict=True)
        return self._interval([a - b for a, b in pairs], group)

    def _interval(self, values: Sequence[float], group: str) -> Interval:
        chosen = _chosen(values, self.kinds, group), _chosen(self.pictures, self.kinds, group)
        return interval(*chosen) if chosen[0] else Interval(0.0, 0.0, 0.0)

    def tokens_between(self, first: str, second: str) -> Interval:
        """Difference of the mean tokens of two groups of questions; pictures are drawn."""
        places = np.unique(self.pictures, return_inverse=True)[1]
        sums = []
        for group in (first, second):
            is_in = np.array([_belongs(kind, group) for kind in self.kinds], float)  # [Q]
            sums.append((np.bincount(places, is_in * self.tokens), np.bincount(places, is_in)))

        def away(drawn: np.ndarray) -> float:
            one, other = (
                tokens[drawn].sum() / max(1.0, counts[drawn].sum()) for tokens, counts in sums
            )
            return float(one - other)

        ends = bootstrap(away, len(sums[0][0]))
        return Interval(self.mean_tokens(first) - self.mean_tokens(second), *ends)

    def to_dict(self) -> dict[str, Any]:
        """The marks as JSON prints them."""
        kinds = sorted(set(self.kinds))
        return {
            "questions": len(self.hits),
            "accuracy": {group: self.accuracy(group).to_dict() for group in GROUPS},
            "accuracy_by_kind": {kind: self.share(kind) for kind in kinds},
            "tokens": {group: self.mean_tokens(group) for group in GROUPS},
            "tokens_by_kind": {kind: self.mean_tokens(kind) for kind in kinds},
            "kv_bytes": round(self.kv_bytes),
        }


def verdict(difference: Interval) -> str:
    """What a paired difference allows to say."""
    if difference.low > 0:
        return "beats"
    return "loses to" if difference.high < 0 else "no different from"


def _belongs(kind: str, group: str) -> bool:
    return GROUPS.get(group, lambda kind: kind == group)(kind)


def _chosen(values: Sequence[T], kinds: Sequence[str], group: str) -> list[T]:
    return [value for value, kind in zip(values, kinds, strict=True) if _belongs(kind, group)]


def _mean(values: Sequence[float]) -> float:
    """The mean, 0 where a try of few questions holds none of a group."""
    return statistics.mean(values) if values else 0.0
