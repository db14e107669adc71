"""Ask questions under a plan, and keep every answer with the tokens that survived."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.accuracy.asking import MAX_NEW_TOKENS, Task, load_questions
from patchsieve.evaluation.answers import Answer, answer_of
from patchsieve.evaluation.questions import Question
from patchsieve.runtime.model import Model
from patchsieve.runtime.result import Result

TOWER, ALL = "tower", "all"


@dataclass(frozen=True)
class Given:
    """An answer, and what was left of its picture.

    Attributes:
        answer: The answer.
        kept: Raster ids of the survivors, by place: "tower", or the layer at whose input others
            were dropped.
    """

    answer: Answer
    kept: dict[str, list[int]]


class GivenFile:
    """Answers as JSON lines; a line that an interruption cut is asked again."""

    def __init__(self, path: Path) -> None:
        self.path, self.known = path, dict[str, Given]()
        if not path.exists():
            return
        whole = [line for line in path.read_bytes().splitlines(keepends=True) if line[-1:] == b"\n"]
        path.write_bytes(b"".join(whole))
        for line in map(json.loads, whole):
            answer = Answer(**line["answer"] | {"token_ids": tuple(line["answer"]["token_ids"])})
            self.known[answer.key] = Given(answer, line["kept"])

    def add(self, given: Given) -> None:
        """Keep an answer."""
        self.known[given.answer.key] = given
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(given), ensure_ascii=False) + "\n")


def answer(task: Task) -> list[Given]:
    """Ask what was not asked yet, on one thread: other processes ask beside this one."""
    questions, file = load_questions(task.data, task.limit), GivenFile(task.answers)
    absent = [question for question in questions if question.key not in file.known]
    if absent:
        model = Model(task.bundle, threads=1, check="size")
        model.pipeline.spare_images = 1  # the questions about an image follow each other
        for question in absent:
            file.add(_ask(model, task.plan, question))
        model.close()
    return [file.known[question.key] for question in questions]


def _ask(model: Model, plan: str, question: Question) -> Given:
    images = [str(path) for path in question.images]
    result = model.generate(
        images,
        question.content,
        plan=plan,
        system=question.system,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    answer = answer_of(model, question, plan, result)
    return Given(answer, _survivors(result))


def _survivors(result: Result) -> dict[str, list[int]]:
    """By place; a question is about one picture, so a place has one list."""
    places = [(TOWER, image.ids) for image in result.images]
    return dict([*places, *((str(site.layer), site.kept) for site in result.sites)])


def in_common(given: Sequence[Given], floats: Sequence[Given]) -> dict[str, float]:
    """The share of survivors that two runs have in common, by place, and of all places together.

    It counts tokens of all questions, and is a share of the longer of both lists: one that keeps
    more gains nothing. Empty if nothing is dropped anywhere.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for one, other in zip(given, floats, strict=True):
        for place, ids in other.kept.items():
            own, whole = set(one.kept[place]), set(ids)
            counts = len(own & whole), max(len(own), len(whole))
            found.setdefault(place, []).append(counts)
    counted = {place: np.sum(counts, axis=0) for place, counts in found.items()}
    if counted:
        counted = {ALL: np.sum(list(counted.values()), axis=0)} | counted
    return {place: float(same / total) for place, (same, total) in counted.items()}
