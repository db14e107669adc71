"""Marks for answers, and how sure one can be of their means."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = {"a", "an", "the"}
_NO_WORD = re.compile(r"[^\w\s.:,'-]|(?<!\d)[.,:]|[.,:](?!\d)|'|(?<!\w)-|-(?!\w)")


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval of 95 %."""

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """The interval as JSON prints it."""
        return asdict(self)


def normalise(text: str) -> str:
    """An answer as marks compare it: lower case, no articles or punctuation, numbers as digits.

    Follows the VQA evaluation, but for contractions: both sides lose their apostrophes, so that
    "don't" and "dont" are the same word, as there.
    """
    words = _NO_WORD.sub(lambda found: "" if found[0] == "'" else " ", text.lower()).split()
    return " ".join(_DIGITS.get(word, word) for word in words if word not in _ARTICLES)


def exact_match(text: str, references: Sequence[str]) -> float:
    """1 where the answer is one of the references, else 0."""
    return float(normalise(text) in {normalise(reference) for reference in references})


def vqa_accuracy(text: str, references: Sequence[str]) -> float:
    """Soft accuracy of VQAv2: min(people who said so / 3, 1), averaged over leaving each one out.

    Args:
        text: The answer.
        references: What each person said, ten of them in VQAv2.
    """
    said = [normalise(reference) == normalise(text) for reference in references]
    others = [sum(said) - own for own in said]
    return float(np.mean([min(count / 3, 1.0) for count in others]))


def yes_or_no(text: str) -> bool | None:
    """What an answer says first; None for neither."""
    words = normalise(text).split()
    return {"yes": True, "no": False}.get(words[0]) if words else None


def yes_no_scores(said: Sequence[bool | None], truth: Sequence[bool]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of "yes", and its share, as POPE reports them.

    An answer that is neither counts as no for precision and recall, and as wrong for accuracy.
    """
    hits = sum(bool(a) and b for a, b in zip(said, truth, strict=True))
    positives, answered = sum(truth), sum(bool(a) for a in said)
    precision, recall = _ratio(hits, answered), _ratio(hits, positives)
    return {
        "accuracy": _ratio(sum(a == b for a, b in zip(said, truth, strict=True)), len(truth)),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_share": _ratio(answered, len(said)),
    }


def bootstrap(
    statistic: Callable[[np.ndarray], float], size: int, rounds: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Ends of the percentile bootstrap interval of 95 %.

    Args:
        statistic: Computes a number from the indices of a sample.
        size: How many can be drawn, and are drawn each time.
        rounds: Samples.
        seed: Of the draws, so that a report can be repeated.
    """
    rng = np.random.default_rng(seed)
    found = [statistic(rng.integers(size, size=size)) for _ in range(rounds)]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def interval(values: Sequence[float], subjects: Sequence[str] | None = None) -> Interval:
    """Mean of marks with its percentile bootstrap interval; of paired differences likewise.

    Questions about one image succeed and fail together, so images are drawn, each with all its
    questions (a cluster bootstrap): questions drawn one by one would give too narrow an interval.
    Where all are about one image, they are drawn one by one, and speak of that image alone.

    Args:
        values: One number per question, [Q]; not empty.
        subjects: What each question is about, [Q]; by default each about something of its own.
    """
    marks = np.asarray(values, float)  # [Q]
    places = np.arange(len(marks))
    if subjects is not None and len(set(subjects)) > 1:
        places = np.unique(subjects, return_inverse=True)[1]
    sums, counts = np.bincount(places, marks), np.bincount(places)  # [S]
    ends = bootstrap(lambda drawn: sums[drawn].sum() / counts[drawn].sum(), len(sums))
    return Interval(float(marks.mean()), *ends)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
