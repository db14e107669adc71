"""Ask every question under every plan, and keep each answer as soon as it is given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.writing import one_line
from patchsieve.evaluation.questions import Question
from patchsieve.runtime.model import Model
from patchsieve.runtime.result import Result

Progress = Callable[[str, float], None]
_HEADS = "heads/"  # thresholds in a bundle, each in a folder named by its content, as plans say it


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
        plan_sha256: Hash of what the plan does, see `depends_on`; empty where the file says it.
    """

    key: str
    plan: str
    text: str
    token_ids: tuple[int, ...]
    visual_tokens: float
    kv_bytes: int
    ttft_ms: float
    total_ms: float
    plan_sha256: str = ""


class AnswerFile:
    """Answers as JSON lines, after a first line that says what they belong to.

    Args:
        path: The file; None keeps nothing. What it holds already is not asked again.
        about: What must be the same for all answers to be used again: model, data, options.
        plans: Hash of what each plan does. Answers of a plan that did something else stay in the
            file and are not used.

    Raises:
        PatchsieveError: The file belongs to another evaluation or is none.
    """

    def __init__(
        self, path: Path | None, about: dict[str, Any], plans: Mapping[str, str] | None = None
    ) -> None:
        self.path, self.plans = path, dict(plans or {})
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
        self.known = {
            (answer.key, answer.plan): answer
            for answer in answers
            if answer.plan_sha256 == self.plans.get(answer.plan, "")
        }

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
                try:
                    result = model.generate(
                        [str(path) for path in question.images] or None,
                        question.content,
                        plan=plan,
                        system=question.system,
                        max_new_tokens=max_new_tokens,
                        seed=done,
                    )
                except PatchsieveError as error:
                    raise error.at(f"question {question.key} of the data") from error
                given = answer_of(model, question, plan, result)
                file.add(replace(given, plan_sha256=file.plans.get(plan, "")))
            answers[plan].append(file.known[question.key, plan])
    return answers


def depends_on(facts: Manifest, target: str) -> tuple[str, dict[str, str]]:
    """What answers depend on: the model, and each plan.

    A plan that comes to a bundle by `export --reuse` changes neither the model nor other plans.

    Args:
        facts: The bundle's manifest.
        target: What it runs as.

    Returns:
        Hash of what all plans share (weights, tokenizer, stages of the target, precision, what
        the checkpoint asks of answers), and for each plan the hash of its content, of its graphs
        and of its budgets.
    """
    graphs = facts.targets[target]
    own: dict[str, list[str]] = {plan: [] for plan in facts.plans}
    for graph in graphs:
        plan = facts.graphs[graph].identity.plan
        if plan in own:
            own[plan].append(graph)
    apart = {graph for of_plan in own.values() for graph in of_plan}
    in_graphs = {path for of_target in facts.targets.values() for path in of_target.values()}
    model: dict[str, Any] = {
        "files": {
            path: file.sha256
            for path, file in facts.files.items()
            if path not in in_graphs and not path.startswith(_HEADS)
        },
        "graphs": {g: facts.files[path].sha256 for g, path in graphs.items() if g not in apart},
        "facts": [asdict(part) for part in (facts.precision, facts.text, facts.tokens)],
    }
    if asked := facts.generation.options():
        model["generation"] = asked
    plans = {
        plan: {
            "content": facts.plans[plan].to_dict(),
            "graphs": {graph: facts.files[graphs[graph]].sha256 for graph in of_plan},
            "budgets": facts.budgets(plan),
        }
        for plan, of_plan in own.items()
    }
    return _digest(model), {plan: _digest(what) for plan, what in plans.items()}


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def answer_of(model: Model, question: Question, plan: str, result: Result) -> Answer:
    """What is kept of a result."""
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
