"""`patchsieve build BUNDLE --target T`."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

from patchsieve.cli.output import Progress, peak_memory, print_json, size, table
from patchsieve.errors import PatchsieveError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("bundle", type=Path)
    add("--target", default="tensorrt-rtx", help="what to compile for (default: tensorrt-rtx)")
    add("--memory-limit", type=float, metavar="GB", help="scratch memory that a kernel may ask for")
    add(
        "--compute-capability",
        action="append",
        default=[],
        metavar="M.N",
        help="GPUs to compile for, such as 8.9; the library's own list by default",
    )
    add("--force", action="store_true", help="build again what stands there")
    add("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Compile, and report what each engine cost."""
    from patchsieve.runtime.build import build

    limit = args.memory_limit
    if limit is not None and not 0 < limit < math.inf:
        raise PatchsieveError(
            "--memory-limit is not a size", found=limit, expected="gigabytes, above 0"
        )
    progress = Progress(args.quiet)
    start = time.perf_counter()
    engines = list(
        build(
            args.bundle,
            args.target,
            memory_limit=None if limit is None else int(limit * 1e9),
            compute_capabilities=tuple(args.compute_capability),
            force=args.force,
            progress=progress,
        )
    )
    progress.done()
    total = sum(engine.engine_bytes for engine in engines)
    seconds = time.perf_counter() - start
    peak = peak_memory()
    if args.json:
        print_json(
            {
                "bundle": str(args.bundle),
                "target": args.target,
                "engines": [
                    {
                        "graph": engine.graph,
                        "path": str(engine.path),
                        "bytes": engine.engine_bytes,
                        "seconds": round(engine.seconds, 3),
                        "was_there": engine.was_there,
                        "warnings": list(engine.warnings),
                    }
                    for engine in engines
                ],
                "bytes": total,
                "seconds": round(seconds, 3),
                "peak_memory_bytes": peak,
            }
        )
        return 0
    rows = [
        (
            engine.graph,
            size(engine.engine_bytes),
            "there" if engine.was_there else f"{engine.seconds:.1f}",
        )
        for engine in engines
    ]
    print(table(("engine", "size", "s"), [*rows, ("all", size(total), f"{seconds:.1f}")]))
    print(f"{args.bundle / 'engines' / args.target}, peak memory {size(peak or 0)}")
    for engine in engines:
        for warning in engine.warnings:
            print(f"{engine.graph}: {warning}")
    return 0
