"""Ask questions under plans, in several processes, each plan's answers kept as they come."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from patchsieve.contract.files import hash_file
from patchsieve.evaluation.answers import Answer, AnswerFile, ask
from patchsieve.evaluation.questions import Question, questions_of
from patchsieve.runtime.model import Model
from patchsieve.runtime.records import Records

MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class Task:
    """A plan of a bundle and the questions that it is asked.

    Attributes:
        bundle: The bundle.
        plan: Its plan.
        data: The file of questions.
        limit: How many of them, the first ones.
        answers: Where answers are kept.
        about: What they depend on, but for the data.
        image: The one picture that all questions are asked about, instead of their own.
    """

    bundle: Path
    plan: str
    data: Path
    limit: int
    answers: Path
    about: str
    image: Path | None = None


def load_questions(data: Path, limit: int) -> list[Question]:
    """The first questions of a file."""
    return questions_of(Records(data, None), "<image>", limit)


def open_answers(task: Task) -> AnswerFile:
    """The answers so far; the number of questions may grow from run to run."""
    about = {
        "about": task.about,
        "data": hash_file(task.data).sha256,
        "max_new_tokens": MAX_NEW_TOKENS,
        "image": None if task.image is None else hash_file(task.image).sha256,
    }
    return AnswerFile(task.answers, about)


def answer(task: Task) -> list[Answer]:
    """Ask what was not asked yet. One thread: the processes share the cores."""
    questions, file = load_questions(task.data, task.limit), open_answers(task)
    if all((question.key, task.plan) in file.known for question in questions):
        return [file.known[question.key, task.plan] for question in questions]
    if task.image is not None:
        questions = [replace(question, images=[task.image]) for question in questions]
    model = Model(task.bundle, threads=1, check="size")
    model.pipeline.spare_images = 1  # the questions about an image follow each other
    given = ask(model, questions, [task.plan], file, max_new_tokens=MAX_NEW_TOKENS)
    model.close()
    return given[task.plan]


class Askers:
    """Processes that ask; a `with` block ends them.

    Args:
        count: How many.
        say: Takes a line when a task is done.
    """

    def __init__(self, count: int, say: Any) -> None:
        self._say = say
        self._pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))
        self._started: dict[Future[list[Answer]], tuple[Task, str, float]] = {}

    def __enter__(self) -> Askers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, task: Task, label: str) -> Future[list[Answer]]:
        """Begin with a task when a process is free."""
        future = self._pool.submit(answer, task)
        self._started[future] = (task, label, time.monotonic())
        return future

    def wait(self, futures: Sequence[Future[list[Answer]]]) -> None:
        """Wait, saying what is done."""
        for number, future in enumerate(as_completed(futures), 1):
            future.result()
            _, label, start = self._started[future]
            spent = time.monotonic() - start
            self._say(f"  {number} of {len(futures)} plans asked: {label} ({spent:.0f} s)")
