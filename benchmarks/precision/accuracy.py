"""Answers and survivors of every plan in every precision, paired with those in float32."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.accuracy.asking import Task, load_questions
from benchmarks.accuracy.marks import Marks
from benchmarks.accuracy.workshop import Workshop, digest, log
from benchmarks.precision.asking import Given, answer, in_common
from benchmarks.precision.bundles import FLOAT32, Bundles, Case, size
from patchsieve.contract.files import read
from patchsieve.evaluation.answers import depends_on
from patchsieve.evaluation.questions import Question

_DRAWN = 4000  # questions of the file, of which fewer may be asked


def measure(
    shop: Workshop,
    bundles: Bundles,
    cases: Sequence[Case],
    precisions: Sequence[str],
    limit: int,
    workers: int,
) -> dict[str, Any]:
    """Ask every plan in every precision.

    Args:
        shop: Where questions and answers are.
        bundles: Where bundles are.
        cases: The plans.
        precisions: As `--precision` takes them, float32 first.
        limit: How many questions.
        workers: Processes that ask.

    Returns:
        What the table says, as JSON holds it.
    """
    data = shop.questions("held-out", max(limit, _DRAWN))
    questions = load_questions(data, limit)
    found: dict[tuple[str, str], Future[list[Given]]] = {}
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for precision in precisions:
            for case in cases:
                task = _task(shop, bundles.of(case, precision), case, data, limit)
                found[case.label, precision] = pool.submit(answer, task)
        for case in cases:
            floats = found[case.label, FLOAT32].result()
            for precision in precisions:
                given = found[case.label, precision].result()
                row: dict[str, Any] = {"plan": case.label, "precision": precision}
                row |= {"bytes": size(bundles.of(case, precision))}
                rows.append(row | compare(questions, given, floats))
                log(f"  {case.label}, {precision}: {_brief(rows[-1])}")
    return {"questions": len(questions), "rows": rows}


def _task(shop: Workshop, bundle: Path, case: Case, data: Path, limit: int) -> Task:
    """What is asked; answers are found again while the bundle's weights and graphs are the same."""
    shared, own = depends_on(read(bundle), "cpu")
    about = digest(shared, own[case.name], data.read_bytes())
    answers = shop.folder / "answers" / f"{case.name}-{bundle.parent.name}-{about}.jsonl"
    answers.parent.mkdir(exist_ok=True)
    return Task(bundle, case.name, data, limit, answers, about)


def compare(
    questions: Sequence[Question], given: Sequence[Given], floats: Sequence[Given]
) -> dict[str, Any]:
    """One precision of a plan beside float32: marks, points lost, answers and survivors."""
    own, whole = (Marks.of(questions, [one.answer for one in each]) for each in (given, floats))
    same = [a.answer.text == b.answer.text for a, b in zip(given, floats, strict=True)]
    return {
        "accuracy": own.accuracy().to_dict(),
        "lost": whole.minus(own).to_dict(),
        "answers_in_common": sum(same) / len(same),
        "survivors_in_common": in_common(given, floats),
        "tokens": own.mean_tokens(),
    }


def _brief(row: Mapping[str, Any]) -> str:
    shares = ", ".join(f"{p} {100 * s:.2f}" for p, s in row["survivors_in_common"].items())
    right, lost = 100 * row["accuracy"]["mean"], 100 * row["lost"]["mean"]
    return f"{right:.1f} right, {lost:+.2f} lost, {shares} % of the survivors in common"
