"""Settle, check and measure on a GPU; the last line printed is JSON.

    make gpu                                          # all of it, with the best target that runs
    python -m benchmarks.gpu --only bench --workdir D # one part; D keeps what is made
    python -m benchmarks.gpu --only smoke             # the first run on a new machine: no TensorRT
    python -m benchmarks.gpu --dry                    # the same rehearsed on a CPU
    python -m benchmarks.gpu --target cpu --shape tiny  # the whole command, without a GPU

The report is on disk after every part. Exit code: 0 when all was done, 1 when a part failed or had
no time, 2 where no GPU target runs or the report cannot be written.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import ROOT
from benchmarks.gpu import hugging_face, parts, smoke
from benchmarks.gpu.bench import PROMPT, RUNS, SECONDS, SHAPES, Bench, run
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.choice import CPU_TARGETS, TARGETS, absent, choose
from benchmarks.gpu.parts import Keep
from benchmarks.gpu.report import Report
from patchsieve.contract.errors import BackendMissingError, PatchsieveError
from patchsieve.runtime.board.doctor import diagnose

PARTS = ("smoke", "settle", "parity", "bench")
SETTLE_SHARE = 1 / 3  # of the time that is left, where other parts come after it
SCHEMA_VERSION = 1


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--only", choices=PARTS, action="append", help="this part; may be given again")
    add("--dry", action="store_true", help="rehearse the smoke part on a CPU, and nothing else")
    add("--target", choices=TARGETS, help="the best that runs here by default")
    add("--shape", choices=tuple(SHAPES), default="7b", help="shape of the benchmark's model (7b)")
    add("--layers", type=int, metavar="N", help="only so many decoder layers, for a first look")
    add("--precision", default="float16", help="precision of the benchmark's model (float16)")
    add("--minutes", type=float, default=9.5, help="end within this time (9.5)")
    add("--workdir", type=Path, help="keep checkpoint, bundle and engines here, and find them")
    add("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where reports go")
    args = parser.parse_args(argv)
    args.only = list(dict.fromkeys(args.only or (["smoke"] if args.dry else PARTS)))
    if args.dry and args.only != ["smoke"]:
        parser.error("--dry rehearses the smoke part alone")
    return args


def bench(
    args: argparse.Namespace, target: str, folder: Path, budget: Budget, keep: Keep
) -> dict[str, Any]:
    """The benchmark, and transformers beside it; what was measured stays when the time ends."""
    shape = SHAPES[args.shape]
    if args.layers:
        plans = {n: p for n, p in shape.plans.items() if max(p[0]) < args.layers}
        shape = replace(shape, layers=args.layers, plans=plans)
    work = Bench(shape, target, args.precision, folder, budget, args.device)
    facts: dict[str, Any] = {"shape": shape.name, "layers": shape.layers, "facts": work.facts}
    work.keep = lambda: keep(facts)
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
        return "error" in told or bool(told.get("failed")) or not told.get("passed")
    return "error" in told or bool(told.get("wrong"))


def target_of(args: argparse.Namespace, report: dict[str, Any]) -> str | None:
    """The target to measure; the smoke part needs none, for it brings its own library.

    Raises:
        BackendMissingError: No GPU target runs here, or no GPU is there.
    """
    is_smoke_alone = args.only == ["smoke"] and args.target is None
    if args.dry or (is_smoke_alone and report["machine"]["gpus"]):
        return None
    return choose(report, args.target)


def head(args: argparse.Namespace, target: str | None, report: dict[str, Any]) -> dict[str, Any]:
    """What every report begins with."""
    kind = "dry-run" if args.dry else "cpu-run" if target in CPU_TARGETS else "gpu"
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": args.device,
        "target": target,
        "machine": report["machine"],
        "versions": {"patchsieve": report["patchsieve"]} | report["libraries"],
        "absent": absent(report),
    }


def run_part(
    part: str,
    args: argparse.Namespace,
    target: str | None,
    folder: Path,
    budget: Budget,
    keep: Keep,
) -> dict[str, Any]:
    """What a part found; "error" where it could not be done."""
    try:
        if part == "smoke":
            return smoke_part(args, target, folder, budget, keep)
        assert target is not None  # only the smoke part does without
        if part == "settle":
            is_last = part == args.only[-1]
            longest = budget.left_s * (1 if is_last else SETTLE_SHARE)
            return parts.settle(target, folder, budget, longest)
        if part == "parity":
            return parts.parity(target, folder, budget, keep=keep)
        return bench(args, target, folder, budget, keep)
    except PatchsieveError as error:
        return {"error": str(error)}


def smoke_part(
    args: argparse.Namespace, target: str | None, folder: Path, budget: Budget, keep: Keep
) -> dict[str, Any]:
    """The first run, where there is a GPU or where it is rehearsed."""
    if target in CPU_TARGETS:
        print("not run: it needs a GPU; --dry rehearses it without", flush=True)
        return {"not_run": "it needs a GPU"}
    return smoke.run(folder, budget, is_dry=args.dry, keep=keep)


def main(argv: list[str] | None = None) -> int:
    """Run the parts that are asked for; return the exit code."""
    args = parse_arguments(argv)
    budget = Budget(args.minutes)
    machine = diagnose()
    args.device = machine["machine"]["label"]
    try:
        target = target_of(args, machine)
        report = Report(args.results, head(args, target, machine), args.only)
    except BackendMissingError as error:
        print(f"gpu: {error}", file=sys.stderr)
        for line in absent(machine):
            print(f"gpu: {line}", file=sys.stderr)
        return 2
    except PatchsieveError as error:  # the reports' folder
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    print(f"{report.results['kind']}: {args.device}, target {target or 'none'}", flush=True)
    with tempfile.TemporaryDirectory(prefix="gpu-") as temporary:
        folder = args.workdir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for part in args.only:
            print(f"\n== {part}", flush=True)
            found = run_part(part, args, target, folder, budget, partial(report.keep, part))
            report.finish(part, found)
            if "error" in found:
                print(f"{part}: {found['error']}", file=sys.stderr)
    print(f"\nwritten to {report.path}")
    print(json.dumps(report.results))
    return 1 if any(failed(part, report.results[part]) for part in args.only) else 0


if __name__ == "__main__":
    sys.exit(main())
