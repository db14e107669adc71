"""Ask every question under every plan, and keep each answer as soon as it is given."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from patchsieve.errors import PatchsieveError
from patchsieve.evaluation.questions import Question
from patchsieve.manifest import Manifest
from patchsieve.runtime.model import Model
from patchsieve.runtime.result import Result
from patchsieve.writing import one_line

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Answer:
    """What one plan answered to one question, and what that took.

    Attributes:
        key: The question's.
        plan: The plan.
        text: The answer.
        token_ids: Its tokens.
        visual_tokens: Mean visual tokens over all layers, of all images together; 0 without images.
        kv_bytes: Used at the end of the answer.
        ttft_ms: Time to the first token.
        total_ms: Time to the last.
    """

    key: str
    plan: str
    text: str
    token_ids: tuple[int, ...]
    visual_tokens: float
    kv_bytes: int
    ttft_ms: float
    total_ms: float


class AnswerFile:
    """Answers as JSON lines, behind a first line that says what they belong to.

    Args:
        path: The file; None keeps nothing. What it holds already is not asked again.
        about: What must be the same for answers to be used again: bundle, data, options.

    Raises:
        PatchsieveError: The file belongs to another evaluation or is none.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self.path = path
        self.known: dict[tuple[str, str], Answer] = {}
        if path is None:
            return
        with one_line(path):
            if not path.exists():
                path.write_text(json.dumps(about) + "\n", encoding="utf-8")
                return
            content = path.read_bytes()
            if not content.endswith(b"\n"):  # a line that was cut by an interruption
                content = content[: content.rfind(b"\n") + 1]
                path.write_bytes(content)
        try:
            first, *lines = [json.loads(line) for line in content.splitlines()]
            answers = [Answer(**line | {"token_ids": tuple(line["token_ids"])}) for line in lines]
            different = sorted(key for key in {*first, *about} if first.get(key) != about.get(key))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PatchsieveError(
                f"{path} holds no answers of an evaluation", found=error, do="choose another file"
            ) from error
        if different:
            raise PatchsieveError(
                f"{path} holds the answers of another evaluation",
                found=f"another {', '.join(different)}",
                do="choose another file, or remove it",
            )
        self.known = {(answer.key, answer.plan): answer for answer in answers}

    def add(self, answer: Answer) -> None:
        """Keep an answer."""
        self.known[answer.key, answer.plan] = answer
        if self.path is not None:
            with one_line(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")


def ask(
    model: Model,
    questions: Sequence[Question],
    plans: Sequence[str],
    file: AnswerFile,
    *,
    max_new_tokens: int,
    progress: Progress = lambda *_: None,
) -> dict[str, list[Answer]]:
    """Ask greedily, plan beside plan on each question, so that a slow minute falls on all alike.

    A method that draws has a seed of its own for each question, the same for every plan.

    Returns:
        The answers to all questions, in their order, by plan.
    """
    answers: dict[str, list[Answer]] = {plan: [] for plan in plans}
    for done, question in enumerate(questions):
        progress(f"question {done + 1} of {len(questions)}", done / len(questions))
        for plan in plans:
            if (question.key, plan) not in file.known:
                result = model.generate(
                    [str(path) for path in question.images] or None,
                    question.prompt,
                    plan=plan,
                    max_new_tokens=max_new_tokens,
                    seed=done,
                )
                file.add(_answer(model, question, plan, result))
            answers[plan].append(file.known[question.key, plan])
    return answers


def _answer(model: Model, question: Question, plan: str, result: Result) -> Answer:
    return Answer(
        key=question.key,
        plan=plan,
        text=result.text,
        token_ids=tuple(result.token_ids),
        visual_tokens=mean_visual_tokens(model.facts, result),
        kv_bytes=result.kv_bytes["used"],
        ttft_ms=result.timings_ms["ttft"],
        total_ms=result.timings_ms["total"],
    )


def mean_visual_tokens(facts: Manifest, result: Result) -> float:
    """Visual rows of all images of a first turn, averaged over the decoder's layers."""
    kept: dict[int, int] = {}
    for site in result.sites:
        kept[site.layer] = kept.get(site.layer, 0) + len(site.kept)
    tokens, total = result.visual_tokens, 0
    for stage in facts.stages:
        tokens = kept.get(stage.first, tokens)
        total += stage.num_layers * tokens
    return total / facts.text.num_layers
