"""Settle, check and measure on a GPU; the last line printed is JSON.

    make gpu                                          # all of it, with the best target that runs
    python -m benchmarks.gpu --only bench --workdir D # one part; D keeps what is made
    python -m benchmarks.gpu --target cpu --shape tiny  # the whole command, without a GPU

Exit code: 0 when all was done, 1 when a part failed or had no time, 2 where no GPU target runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import ROOT
from benchmarks.gpu import hugging_face, parts
from benchmarks.gpu.bench import PROMPT, RUNS, SECONDS, SHAPES, Bench, run
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.choice import CPU_TARGETS, TARGETS, absent, choose
from benchmarks.gpu.report import write_report
from patchsieve.errors import BackendMissingError, PatchsieveError
from patchsieve.runtime.board.doctor import diagnose

PARTS = ("settle", "parity", "bench")
SCHEMA_VERSION = 1


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--only", choices=PARTS, action="append", help="this part; may be given again")
    add("--target", choices=TARGETS, help="the best that runs here by default")
    add("--shape", choices=tuple(SHAPES), default="7b", help="of the benchmark's model (7b)")
    add("--layers", type=int, metavar="N", help="only so many decoder layers, for a first look")
    add("--precision", default="float16", help="of the benchmark's model (float16)")
    add("--minutes", type=float, default=9.5, help="end within this time (9.5)")
    add("--workdir", type=Path, help="keep checkpoint, bundle and engines here, and find them")
    add("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where reports go")
    return parser.parse_args(argv)


def bench(args: argparse.Namespace, target: str, folder: Path, budget: Budget) -> dict[str, Any]:
    """The benchmark, and transformers beside it; what was measured stays when the time ends."""
    shape = SHAPES[args.shape]
    if args.layers:
        plans = {n: p for n, p in shape.plans.items() if max(p[0]) < args.layers}
        shape = replace(shape, layers=args.layers, plans=plans)
    work = Bench(shape, target, args.precision, folder, budget, args.device)
    facts: dict[str, Any] = {"shape": shape.name, "layers": shape.layers, "facts": work.facts}
    try:
        for text in run(work):
            print(text + "\n", flush=True)
        facts["transformers"] = _transformers(work, target)
    except PatchsieveError as error:
        facts["error"] = str(error)
    return facts


def _transformers(work: Bench, target: str) -> dict[str, Any]:
    """What transformers needs for the same, or why it was not asked."""
    try:
        device = hugging_face.device_of(target)
        if device == "cuda":
            work.budget.needs(SECONDS["transformers"], "transformers")
    except PatchsieveError as error:
        print(f"transformers: {error}", flush=True)
        return {"not_run": str(error)}
    told = hugging_face.measure(
        work.checkpoint,
        PROMPT,
        device=device,
        precision=work.precision if device == "cuda" else "float32",
        new_tokens=work.new_tokens,
        runs=RUNS if device == "cuda" else 1,
    )
    for form, times in told.items():
        if isinstance(times, dict):
            print(f"transformers, {form}: " + ", ".join(f"{k} {v}" for k, v in times.items()))
    return told


def failed(part: str, told: dict[str, Any]) -> bool:
    """Whether a part did not do what it is for; an answer "no" to a question is an answer."""
    if part == "parity":
        return bool(told.get("failed")) or not told.get("passed")
    return "error" in told


def main(argv: list[str] | None = None) -> int:
    """Run the parts that are asked for; return the exit code."""
    args = parse_arguments(argv)
    report = diagnose()
    try:
        target = choose(report, args.target)
    except BackendMissingError as error:
        print(f"gpu: {error}", file=sys.stderr)
        for line in absent(report):
            print(f"gpu: {line}", file=sys.stderr)
        return 2
    args.device = report["machine"]["label"]
    kind = "cpu-run" if target in CPU_TARGETS else "gpu"
    print(f"{kind}: {args.device}, target {target}", flush=True)
    results: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": args.device,
        "target": target,
        "machine": report["machine"],
        "versions": {"patchsieve": report["patchsieve"]} | report["libraries"],
        "absent": absent(report),
    }
    budget = Budget(args.minutes)
    with tempfile.TemporaryDirectory(prefix="gpu-") as temporary:
        folder = args.workdir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        work: dict[str, Callable[[], dict[str, Any]]] = {
            "settle": lambda: parts.settle(target, folder, budget),
            "parity": lambda: parts.parity(target, folder, budget),
            "bench": lambda: bench(args, target, folder, budget),
        }
        for part in args.only or PARTS:
            print(f"\n== {part}", flush=True)
            try:
                results[part] = work[part]()
            except PatchsieveError as error:
                results[part] = {"error": str(error)}
            if "error" in results[part]:
                print(f"{part}: {results[part]['error']}", file=sys.stderr)
    print(f"\nwritten to {write_report(args.results, results)}")
    print(json.dumps(results))
    return 1 if any(failed(part, results[part]) for part in args.only or PARTS) else 0


if __name__ == "__main__":
    sys.exit(main())
