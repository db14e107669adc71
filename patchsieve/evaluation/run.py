"""Evaluate a bundle: ask questions with known answers under several plans, and mark the answers.

from patchsieve.evaluation.run import EvaluationOptions, evaluate
from patchsieve.runtime.model import Model
from patchsieve.runtime.records import Records

result = evaluate(Model("bundle"), Records(Path("questions.json")), EvaluationOptions(limit=100))
print(result.plans["none"]["exact_match"])
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchsieve.contract.errors import CapacityError, RequestError
from patchsieve.contract.files import hash_file
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.plan import NO_PRUNING
from patchsieve.evaluation.answers import AnswerFile, Progress, ask, depends_on
from patchsieve.evaluation.questions import questions_of
from patchsieve.evaluation.report import report
from patchsieve.runtime.model import Model
from patchsieve.runtime.records import Records

USUAL = 32  # new tokens of an answer


@dataclass(frozen=True)
class EvaluationOptions:
    """What is asked.

    Attributes:
        plans: Plans beside "none"; empty for the bundle's default plan.
        limit: The most questions; None for all.
        max_new_tokens: The most tokens of an answer; None for 32, or fewer if the bundle reserves
            fewer.
        answers: File that keeps every answer, as JSON lines; answers that it holds already are not
            asked again.
    """

    plans: tuple[str, ...] = ()
    limit: int | None = None
    max_new_tokens: int | None = None
    answers: Path | None = None

    def __post_init__(self) -> None:
        """Refuse numbers with which nothing is asked."""
        for name in ("limit", "max_new_tokens"):
            number, option = getattr(self, name), f"--{name.replace('_', '-')}"
            if number is not None and number < 1:
                raise RequestError(
                    "an evaluation needs a question and an answer",
                    found=f"{option} {number}",
                    expected="at least 1",
                    do=f"correct {option}",
                )


@dataclass(frozen=True)
class Evaluation:
    """How well each plan answered.

    Attributes:
        max_new_tokens: The most tokens of an answer.
        target: The target that the bundle ran as.
        plans: Marks and costs by plan, see `patchsieve.evaluation.report.report`.
    """

    max_new_tokens: int
    target: str
    plans: dict[str, dict[str, Any]]


def evaluate(
    model: Model,
    records: Records,
    options: EvaluationOptions | None = None,
    *,
    progress: Progress = lambda *_: None,
) -> Evaluation:
    """Ask every question under every plan.

    Args:
        model: The bundle; as many caches as plans stay allocated.
        records: Conversations, whose answers are the references.
        options: What is asked.
        progress: Takes what is being done and how much of it is done, 0 to 1.

    Raises:
        PatchsieveError: A plan is unknown, an answer too long for the bundle, a question does not
            fit it, or the file of answers belongs to another evaluation.
    """
    options = options or EvaluationOptions()
    plans = _plans(model.facts, options)
    max_new_tokens = _length(model.facts, options)
    model.spare_caches = len(plans)  # each plan's own, since they take turns
    questions = questions_of(records, model.facts.tokens.image_token, options.limit)
    shared, own = depends_on(model.facts, model.bundle.target)
    about = {
        "model": shared,
        "data": hash_file(records.path).sha256,
        "target": model.bundle.target,
        "max_new_tokens": max_new_tokens,
    }
    file = AnswerFile(options.answers, about, own)
    answers = ask(model, questions, plans, file, max_new_tokens=max_new_tokens, progress=progress)
    return Evaluation(max_new_tokens, model.bundle.target, report(questions, answers))


def _plans(facts: Manifest, options: EvaluationOptions) -> list[str]:
    """The plans to ask, the unpruned one first."""
    plans = list(dict.fromkeys([NO_PRUNING, *(options.plans or [facts.default_plan])]))
    unknown = [plan for plan in plans if plan not in facts.plans]
    if unknown:
        raise RequestError(
            "the bundle holds no such plan",
            found=", ".join(unknown),
            expected=", ".join(facts.plans),
            do="choose another --plan",
        )
    return plans


def _length(facts: Manifest, options: EvaluationOptions) -> int:
    """The most tokens of an answer."""
    most = facts.limits.max_new_tokens
    asked = min(USUAL, most) if options.max_new_tokens is None else options.max_new_tokens
    if asked > most:
        raise CapacityError(
            "the bundle cannot hold answers of this length",
            found=f"--max-new-tokens {asked}",
            expected=f"at most {most}",
            do=f"give --max-new-tokens {most}, or export with --max-new-tokens {asked}",
        )
    return asked
