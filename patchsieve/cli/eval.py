"""`patchsieve eval BUNDLE --data FILE`: what each plan answers, and how often rightly."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchsieve.cli.arguments import count
from patchsieve.cli.loading import add_run_options, load, say_target
from patchsieve.cli.output import Progress, print_json
from patchsieve.tables import size, table

if TYPE_CHECKING:
    from patchsieve.evaluation.run import Evaluation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("bundle", type=Path)
    add("--data", type=Path, required=True, help="LLaVA's JSON or JSONL, or chat messages")
    add("--image-folder", type=Path, help="what image paths are relative to (the data's folder)")
    add("--plan", action="append", help='a plan beside "none"; repeatable (the default plan)')
    add("--limit", type=count, metavar="N", help="the first N questions only")
    add(
        "--max-new-tokens",
        type=count,
        metavar="N",
        help="the most tokens of an answer (32, or what the bundle reserves if that is fewer)",
    )
    add(
        "-o",
        "--answers",
        type=Path,
        metavar="FILE",
        help="keep every answer here, as JSON lines; what it holds already is not asked again",
    )
    add_run_options(parser)


def run(args: argparse.Namespace) -> int:
    """Ask, mark, print."""
    from patchsieve.contract.writing import check_file
    from patchsieve.evaluation.run import EvaluationOptions, evaluate
    from patchsieve.runtime.records import Records

    options = EvaluationOptions(
        tuple(args.plan or ()), args.limit, args.max_new_tokens, args.answers
    )
    if args.answers is not None:
        check_file(args.answers)
    records = Records(args.data, args.image_folder)
    model = load(args)
    progress = Progress.of(args)
    done = evaluate(model, records, options, progress=progress)
    progress.done()
    model.close()
    if args.json:
        print_json({"bundle": str(args.bundle), "data": str(args.data), **asdict(done)})
        return 0
    print(_report(done, is_length_given=args.max_new_tokens is not None))
    say_target(args, model.bundle.choice)
    return 0


def _report(done: Evaluation, is_length_given: bool) -> str:
    from patchsieve.evaluation.run import USUAL

    is_less = not is_length_given and done.max_new_tokens < USUAL
    why = " (what the bundle reserves)" if is_less else ""
    blocks = [f"{_table(done.plans)}\nanswers of at most {done.max_new_tokens} new tokens{why}"]
    if kinds := next(iter(done.plans.values())).get("categories"):
        blocks.append(_categories(done.plans, list(kinds)))
    return "\n\n".join(blocks)


def _table(found: dict[str, Any]) -> str:
    columns = ["plan", "exact match", "difference", "same answer"]
    columns += ["visual tokens, mean of layers", "KV", "TTFT ms"]
    extra = [name for name in ("vqa_accuracy", "yes_no") if any(name in p for p in found.values())]
    columns += [{"vqa_accuracy": "VQA accuracy", "yes_no": "yes/no F1"}[name] for name in extra]
    rows = []
    for name, plan in found.items():
        row = [
            name,
            _percent(plan["exact_match"]),
            _percent(plan["difference"], sign="+", unit="") if "difference" in plan else None,
            f"{100 * plan['agreement']['text']:.1f} %" if "agreement" in plan else None,
            f"{plan['visual_tokens']:.1f}",
            size(plan["kv_bytes"]),
            f"{plan['ttft_ms']:.0f}",
        ]
        if "vqa_accuracy" in extra:
            row.append(_percent(plan["vqa_accuracy"]))
        if "yes_no" in extra:
            row.append(f"{plan['yes_no']['f1']:.3f}")
        rows.append(row)
    questions = next(iter(found.values()))["questions"]
    note = f"{questions} questions; intervals of 95 %, images drawn; differences in points, paired"
    return f"{table(columns, rows)}\n{note}"


def _categories(found: dict[str, Any], kinds: list[str]) -> str:
    rows = [
        [
            kind,
            next(iter(found.values()))["categories"][kind]["questions"],
            *(
                f"{100 * plan['categories'][kind]['exact_match']['mean']:.1f} % of "
                f"{plan['categories'][kind]['visual_tokens']:.0f}"
                for plan in found.values()
            ),
        ]
        for kind in kinds
    ]
    return table(["exact match, tokens", "questions", *found], rows)


def _percent(found: dict[str, float], sign: str = "", unit: str = " %") -> str:
    mean, low, high = (f"{100 * found[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean}{unit} [{low}, {high}]"
