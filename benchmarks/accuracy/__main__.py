"""The papers' tables on the demo model: what every method of pruning costs in answers.

    python -m benchmarks.accuracy                         # all tables, in order of importance
    python -m benchmarks.accuracy --tables main           # one
    python -m benchmarks.accuracy --questions 400 --no-training --work /tmp/try \
        --results /tmp/try --figures /tmp/try             # a try

Heads, bundles and answers are made by patchsieve's own export, calibrate and evaluation, on the CPU
backend, and kept in --work: an interrupted run continues, another table asks only what is new. Rows
whose decoder is trained take some 20 minutes of two cores each, the first time, that with the tower
100. Each table is printed as Markdown and written to benchmarks/results/accuracy-TABLE.json and
.md, figures of two of them to docs/.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import Future
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.asking import Askers, Task, load_questions
from benchmarks.accuracy.figures import draw_curves, draw_kinds
from benchmarks.accuracy.marks import Marks
from benchmarks.accuracy.places import Costs
from benchmarks.accuracy.plans import Row
from benchmarks.accuracy.report import to_dict, to_text, with_earlier
from benchmarks.accuracy.tables import LEARNED, TABLES, TRAINED, Table
from benchmarks.accuracy.workshop import Training, Workshop, digest, log
from patchsieve.evaluation.answers import Answer
from patchsieve.evaluation.questions import Question
from patchsieve.runtime.board import machine

ROOT = Path(__file__).resolve().parents[2]
_MODEL = ROOT / "examples" / "demo_model"
_DRAWN = 4000  # questions of the file, of which fewer may be asked
FIGURES = {"curves": draw_curves, "atp-ratios": partial(draw_kinds, labels=(TRAINED, LEARNED))}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tables", default=",".join(TABLES), help=f"comma-separated: {', '.join(TABLES)}")
    add("--questions", type=int, default=_DRAWN, help=f"held-out questions ({_DRAWN})")
    add("--checkpoint", type=Path, default=_MODEL / "checkpoint", help="LLaVA (the demo model)")
    add("--clip", type=Path, default=_MODEL / "clip", help="its CLIP, which judges words")
    add("--work", type=Path, default=ROOT / "demo" / "accuracy", help="folder to work in")
    add("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where JSON goes")
    add("--figures", type=Path, default=ROOT / "docs", help="where figures go")
    add("--workers", type=int, default=os.cpu_count(), help="processes that ask (all cores)")
    how = Training()
    add("--steps", type=int, default=how.steps, help=f"steps of ATP's heads ({how.steps})")
    add("--lm-steps", type=int, default=how.lm_steps, help=f"steps of decoders ({how.lm_steps})")
    steps = how.tower_steps
    add(
        "--tower-steps",
        type=int,
        nargs=len(steps),
        default=steps,
        help=f"steps of towers ({steps})",
    )
    add(
        "--finish-steps",
        type=int,
        default=how.finish_steps,
        help=f"further steps of decoders, with hard masks ({how.finish_steps})",
    )
    add("--learning-rate", type=float, default=how.rate, help=f"rate of ATP's heads ({how.rate})")
    add("--lambda-atp", type=float, default=how.weight, help=f"weight of eq. 12 ({how.weight})")
    add("--lambda-target", type=float, default=how.pull, help=f"weight of eq. 13 ({how.pull})")
    add("--no-training", action="store_true", help="leave out decoders that are not trained yet")
    add(
        "--rows",
        help="ask only rows whose label contains one of these words, with commas between them; "
        "the others keep what --results holds of them (default: all rows)",
    )
    add("--json", action="store_true", help="print JSON lines instead of Markdown")
    args = parser.parse_args(argv)
    args.tables = [name.strip() for name in args.tables.split(",")]
    if unknown := [name for name in args.tables if name not in TABLES]:
        parser.error(f"--tables | found: {', '.join(unknown)} | expected: {', '.join(TABLES)}")
    for option, folder in (("--checkpoint", args.checkpoint), ("--clip", args.clip)):
        if not (folder / "config.json").is_file():
            parser.error(f"{option} | found: no model in {folder} | expected: a checkpoint")
    return args


def only(table: Table, words: str) -> Table:
    """The table with rows left out whose label has none of the words; the first is always asked."""
    wanted = [word.strip() for word in words.split(",")]

    def checked(row: Row) -> Row:
        is_wanted = row is table.rows[0] or any(word in row.label for word in wanted)
        return row if is_wanted or row.not_run else replace(row, not_run="not run: --rows")

    parts = [replace(part, rows=tuple(map(checked, part.rows))) for part in table.parts]
    return replace(table, parts=tuple(parts))


def earlier(path: Path, run: dict[str, object], questions: int) -> dict[str, Any] | None:
    """What a file holds of the same table, model and number of questions; None without."""
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    is_same = (found["checkpoint"], found["questions"]) == (run["checkpoint"], questions)
    return found if is_same else None


def without_training(table: Table, shop: Workshop) -> Table:
    """The table with rows whose decoder would have to be trained first left out."""

    def checked(row: Row) -> Row:
        is_there = not row.trains or shop.trained_path(row).exists()
        return row if is_there else replace(row, not_run="not run: --no-training")

    parts = [replace(part, rows=tuple(map(checked, part.rows))) for part in table.parts]
    return replace(table, parts=tuple(parts))


def measure(
    table: Table, shop: Workshop, data: Path, questions: list[Question], askers: Askers
) -> dict[Row, Marks]:
    """The marks of every row of a table.

    Plans are exported while others are asked already.
    """
    drawn = digest(data.read_bytes())
    futures: dict[Row, Future[list[Answer]]] = {}
    by_plan: dict[tuple[str, bool], Future[list[Answer]]] = {}  # the same plan is asked once
    for row in table.rows:
        if row.not_run:
            continue
        work = shop.prepare(row)
        key = (work.about, row.is_blind)
        if key not in by_plan:
            name = work.plan + ("-blind" if row.is_blind else "")
            path = shop.folder / "answers" / f"{name}-{drawn}.jsonl"
            path.parent.mkdir(exist_ok=True)
            image = shop.grey if row.is_blind else None
            about = (len(questions), path, work.about, image)
            task = Task(work.bundle, work.plan, data, *about)
            by_plan[key] = askers.start(task, f"{table.name}: {row.label}")
        futures[row] = by_plan[key]
    askers.wait(list(by_plan.values()))
    return {row: Marks.of(questions, future.result()) for row, future in futures.items()}


def main(argv: list[str] | None = None) -> int:
    """Make the tables."""
    args = parse_arguments(argv)
    how = Training(
        steps=args.steps,
        lm_steps=args.lm_steps,
        tower_steps=tuple(args.tower_steps),
        finish_steps=args.finish_steps,
        rate=args.learning_rate,
        weight=args.lambda_atp,
        pull=args.lambda_target,
    )
    torch.set_num_threads(1)  # heads are learned while other processes ask
    shop = Workshop(args.checkpoint, args.clip, args.work, how)
    data = shop.questions("held-out", max(args.questions, _DRAWN))
    questions = load_questions(data, args.questions)
    costs = Costs.of(args.checkpoint, args.clip, data)
    args.results.mkdir(parents=True, exist_ok=True)
    run = {
        "checkpoint": shop.model,
        "training": asdict(how),
        "machine": machine.facts(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    with Askers(args.workers, log) as askers:
        for name in args.tables:
            table = TABLES[name](shop.budgets)
            if args.no_training:
                table = without_training(table, shop)
            if args.rows is not None:
                table = only(table, args.rows)
            marks = measure(table, shop, data, questions, askers)
            found = to_dict(table, marks, costs, run["date"]) | run
            path = args.results / f"accuracy-{name}.json"
            if known := earlier(path, run, len(questions)):
                found = with_earlier(found, known, table, costs)
            text = to_text(found)
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            path.with_suffix(".md").write_text(text, encoding="utf-8")
            if name in FIGURES:
                args.figures.mkdir(parents=True, exist_ok=True)
                drawn = FIGURES[name](found)
                (args.figures / f"accuracy-{name}.svg").write_text(drawn, encoding="utf-8")
            print(json.dumps(found) if args.json else text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
