"""`patchsieve eval BUNDLE --data FILE`: what each plan answers, and how often rightly."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from patchsieve.cli.arguments import count
from patchsieve.cli.loading import add_run_options, load, say_target
from patchsieve.cli.output import Progress, print_json
from patchsieve.tables import size, table

USUAL = 32  # new tokens of an answer


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
    from patchsieve.contract.errors import CapacityError, RequestError
    from patchsieve.contract.files import hash_file
    from patchsieve.contract.plan import NO_PRUNING
    from patchsieve.contract.writing import check_file
    from patchsieve.evaluation.answers import AnswerFile, ask, depends_on
    from patchsieve.evaluation.questions import questions_of
    from patchsieve.evaluation.report import report
    from patchsieve.runtime.records import Records

    if args.answers is not None:
        check_file(args.answers)
    records = Records(args.data, args.image_folder)
    model = load(args)
    plans = list(dict.fromkeys([NO_PRUNING, *(args.plan or [model.facts.default_plan])]))
    unknown = [plan for plan in plans if plan not in model.facts.plans]
    if unknown:
        raise RequestError(
            "the bundle holds no such plan",
            found=", ".join(unknown),
            expected=", ".join(model.facts.plans),
        )
    most = model.facts.limits.max_new_tokens
    asked = min(USUAL, most) if args.max_new_tokens is None else args.max_new_tokens
    if asked > most:
        raise CapacityError(
            "the bundle cannot hold answers of this length",
            found=f"--max-new-tokens {asked}",
            expected=f"at most {most}",
            do=f"give --max-new-tokens {most}, or export with --max-new-tokens {asked}",
        )
    model.spare_caches = len(plans)  # each plan's own, since they take turns
    questions = questions_of(records, model.facts.tokens.image_token, args.limit)
    shared, own = depends_on(model.facts, model.bundle.target)
    about = {
        "model": shared,
        "data": hash_file(args.data).sha256,
        "target": model.bundle.target,
        "max_new_tokens": asked,
    }
    progress = Progress(args.quiet or args.json)
    answers = ask(
        model,
        questions,
        plans,
        AnswerFile(args.answers, about, own),
        max_new_tokens=asked,
        progress=progress,
    )
    progress.done()
    model.close()
    found = report(questions, answers)
    if args.json:
        told = {"bundle": str(args.bundle), "data": str(args.data), "max_new_tokens": asked}
        print_json(told | {"target": model.bundle.target, "plans": found})
        return 0
    print(_table(found))
    why = " (what the bundle reserves)" if args.max_new_tokens is None and asked < USUAL else ""
    print(f"answers of at most {asked} new tokens{why}")
    say_target(args, model.bundle.choice)
    kinds = next(iter(found.values())).get("categories")
    if kinds:
        print(f"\n{_categories(found, list(kinds))}")
    return 0


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
