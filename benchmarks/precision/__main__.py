"""What low precision costs in answers, and what it saves in time and bytes: docs/precision.md.

    python -m benchmarks.precision                          # answers and survivors
    python -m benchmarks.precision --outliers               # the same with outlier channels
    python -m benchmarks.precision --speed                  # speed; the machine must be idle
    python -m benchmarks.precision --questions 400 --results /tmp/try    # a try

Bundles are made by patchsieve's own export and kept in --work with every answer: an interrupted run
continues. Remove that folder after changing the code. The tables are printed as Markdown and
written to precision.json and .md in --results; one that is not made again stays as it was.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.accuracy.workshop import Training, Workshop
from benchmarks.bench_ivtp import SHAPES
from benchmarks.precision import accuracy, outliers, speed
from benchmarks.precision.bundles import CASES, FLOAT32, PRECISIONS, Bundles
from benchmarks.precision.report import into_page, misses, to_text
from patchsieve.runtime.board import machine

ROOT = Path(__file__).resolve().parents[2]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    plans = [case.name for case in CASES]
    add("--questions", type=int, default=4000, help="held-out questions (4000)")
    add("--precisions", nargs="+", default=PRECISIONS, help=f"{' '.join(PRECISIONS)} (default)")
    add("--plans", nargs="+", default=plans, choices=plans, help="all (default)")
    add("--statistics", action="store_true", help="guide the rounding by activation statistics")
    add("--model", type=Path, default=ROOT / "examples" / "demo_model", help="the demo model")
    add("--work", type=Path, default=ROOT / "demo" / "precision", help="folder to work in")
    add("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where JSON goes")
    add("--workers", type=int, default=os.cpu_count(), help="processes that ask (all cores)")
    add("--outliers", action="store_true", help="ask copies of the model with outlier channels")
    add("--speed", action="store_true", help="measure time and memory instead of answers")
    add("--shape", choices=SHAPES, default="default", help="of the model for --speed")
    add("--rounds", type=int, default=7, help="runs of every plan and precision for --speed (7)")
    add(
        "--page",
        action="store_true",
        help="only copy the tables of --results into docs/precision.md",
    )
    add("--json", action="store_true", help="print JSON instead of Markdown")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Make the tables."""
    args = parse_arguments(argv)
    path = args.results / "precision.json"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if args.page:
        page = ROOT / "docs" / "precision.md"
        page.write_text(into_page(page.read_text(encoding="utf-8"), known), encoding="utf-8")
        return 0
    shop = Workshop(args.model / "checkpoint", args.model / "clip", args.work, Training())
    bundles = Bundles(shop, args.model, args.statistics)
    cases = [case for case in CASES if case.name in args.plans]
    precisions = [FLOAT32, *(each for each in args.precisions if each != FLOAT32)]
    when = {
        "machine": machine.facts(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if args.speed:
        folder = args.work / "speed"
        found = known | {"speed": when | speed.measure(folder, precisions, args.shape, args.rounds)}
    elif args.outliers:
        base = [case for case in cases if case.checkpoint == "checkpoint" and case.name != "ivtp"]
        how = (args.model, args.work, base, precisions, args.questions, args.workers)
        found = known | {"outliers": when | outliers.measure(*how)}
    else:
        asked = accuracy.measure(shop, bundles, cases, precisions, args.questions, args.workers)
        found = known | {"accuracy": when | asked}
    args.results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(to_text(found), encoding="utf-8")
    print(json.dumps(found) if args.json else to_text(found), flush=True)
    for line in misses(found["accuracy"]) if "accuracy" in found else ():
        print(f"misses the bar: {line}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
