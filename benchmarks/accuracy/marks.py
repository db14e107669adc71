"""Marks of plans and what may be said of them: intervals, paired differences, who beats whom."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from examples.demo_model.questions import COARSE, FINE
from patchsieve.evaluation.answers import Answer
from patchsieve.evaluation.metrics import Interval, exact_match, interval
from patchsieve.evaluation.questions import Question

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
    """

    hits: tuple[float, ...]
    kinds: tuple[str, ...]
    tokens: tuple[float, ...]
    kv_bytes: float

    @classmethod
    def of(cls, questions: Sequence[Question], answers: Sequence[Answer]) -> Marks:
        """Mark answers by exact match."""
        pairs = list(zip(questions, answers, strict=True))
        return cls(
            tuple(exact_match(given.text, asked.references) for asked, given in pairs),
            tuple(asked.category for asked in questions),
            tuple(given.visual_tokens for given in answers),
            statistics.mean(given.kv_bytes for given in answers),
        )

    def accuracy(self, group: str = "all") -> Interval:
        """Share of right answers in a group of kinds, or in a kind."""
        return interval(_chosen(self.hits, self.kinds, group))

    def share(self, group: str = "all") -> float:
        """The same without its interval, which takes time."""
        return statistics.mean(_chosen(self.hits, self.kinds, group))

    def mean_tokens(self, group: str = "all") -> float:
        """Mean visual tokens in a group of kinds, or in a kind."""
        return statistics.mean(_chosen(self.tokens, self.kinds, group))

    def minus(self, other: Marks, group: str = "all") -> Interval:
        """Paired difference of accuracy: the same questions, drawn together.

        Raises:
            ValueError: The other was asked other questions.
        """
        if self.kinds != other.kinds:
            raise ValueError("marks of different questions cannot be paired")
        pairs = zip(self.hits, other.hits, strict=True)
        return interval(_chosen([a - b for a, b in pairs], self.kinds, group))

    def tokens_between(self, first: str, second: str) -> Interval:
        """Difference of the mean tokens of two groups of questions, bootstrapped in each."""
        rng = np.random.default_rng(0)
        means = []
        for group in (first, second):
            values = np.array(_chosen(self.tokens, self.kinds, group))
            means.append([rng.choice(values, len(values)).mean() for _ in range(2000)])
        away = np.subtract(*map(np.array, means))
        low, high = np.percentile(away, [2.5, 97.5])
        middle = self.mean_tokens(first) - self.mean_tokens(second)
        return Interval(middle, float(low), float(high))

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


def _chosen(values: Sequence[float], kinds: Sequence[str], group: str) -> list[float]:
    is_in = GROUPS.get(group, lambda kind: kind == group)
    found = [value for value, kind in zip(values, kinds, strict=True) if is_in(kind)]
    return found or [0.0]
