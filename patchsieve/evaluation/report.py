"""From answers to a report: marks with intervals, beside those of the unpruned plan."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from patchsieve.contract.plan import NO_PRUNING
from patchsieve.evaluation.answers import Answer
from patchsieve.evaluation.metrics import (
    exact_match,
    interval,
    normalise,
    vqa_accuracy,
    yes_no_scores,
    yes_or_no,
)
from patchsieve.evaluation.questions import Question


def report(questions: Sequence[Question], answers: dict[str, list[Answer]]) -> dict[str, Any]:
    """What each plan scored.

    Args:
        questions: All that were asked.
        answers: By plan, in the order of the questions.

    Returns:
        By plan: `exact_match`, `vqa_accuracy` where people voted, `yes_no` where every reference
        is yes or no, `agreement` with the unpruned plan (text and tokens) and the `difference` of
        the marks to it, `categories`, `visual_tokens`, `kv_bytes` and times (medians).
    """
    full = answers.get(NO_PRUNING)
    return {plan: _plan(questions, given, full) for plan, given in answers.items()}


def _plan(
    questions: Sequence[Question], given: list[Answer], full: list[Answer] | None
) -> dict[str, Any]:
    marks, subjects = _marks(questions, given), [question.subject for question in questions]
    out: dict[str, Any] = {
        "questions": len(questions),
        "exact_match": interval(marks, subjects).to_dict(),
        "visual_tokens": _mean_tokens(given),
        "kv_bytes": round(statistics.mean(answer.kv_bytes for answer in given)),
        "ttft_ms": statistics.median(answer.ttft_ms for answer in given),
        "total_ms": statistics.median(answer.total_ms for answer in given),
    }
    votes = [(q, a) for q, a in zip(questions, given, strict=True) if q.is_vote]
    if votes:
        soft = [vqa_accuracy(a.text, q.references) for q, a in votes]
        out["vqa_accuracy"] = interval(soft, [q.subject for q, _ in votes]).to_dict()
    truths = [yes_or_no(question.references[0]) for question in questions]
    if all(truth is not None for truth in truths):
        said = [yes_or_no(answer.text) for answer in given]
        out["yes_no"] = yes_no_scores(said, [bool(truth) for truth in truths])
    kinds = sorted({question.category for question in questions} - {""})
    for kind in kinds:
        chosen = [k for k, question in enumerate(questions) if question.category == kind]
        own = [marks[k] for k in chosen]
        out.setdefault("categories", {})[kind] = {
            "questions": len(chosen),
            "exact_match": interval(own, [subjects[k] for k in chosen]).to_dict(),
            "visual_tokens": _mean_tokens([given[k] for k in chosen]),
        }
    if full is not None and given is not full:
        pairs = list(zip(given, full, strict=True))
        out["agreement"] = {
            "text": _share(normalise(a.text) == normalise(b.text) for a, b in pairs),
            "tokens": _share(a.token_ids == b.token_ids for a, b in pairs),
        }
        others = _marks(questions, full)
        away = [mark - other for mark, other in zip(marks, others, strict=True)]
        out["difference"] = interval(away, subjects).to_dict()
    return out


def _marks(questions: Sequence[Question], given: Sequence[Answer]) -> list[float]:
    return [exact_match(a.text, q.references) for q, a in zip(questions, given, strict=True)]


def _mean_tokens(given: Sequence[Answer]) -> float:
    """Over the questions that show an image."""
    shown = [answer.visual_tokens for answer in given if answer.visual_tokens]
    return statistics.mean(shown) if shown else 0.0


def _share(truths: Any) -> float:
    return statistics.mean(map(float, truths))
