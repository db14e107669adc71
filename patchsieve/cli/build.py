"""`patchsieve build BUNDLE --target T`."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchsieve.cli.arguments import add_target, gigabytes
from patchsieve.cli.loading import say_target
from patchsieve.cli.output import Progress, print_json
from patchsieve.contract import engine_memory, files, manifest
from patchsieve.contract.links import locate
from patchsieve.contract.targets import AHEAD_OF_TIME
from patchsieve.tables import size, table

if TYPE_CHECKING:
    from patchsieve.runtime.building.build import Built
    from patchsieve.runtime.building.build_request import Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("bundle", type=Path)
    add_target(parser, "the only one with engines, else the only one that can be built here")
    add(
        "--memory-limit",
        type=gigabytes,
        metavar="GB",
        help="scratch memory that a kernel may ask for",
    )
    add(
        "--optimization-level",
        type=int,
        metavar="N",
        help="how long to look for fast kernels, 0 to 5; the library's own level by default",
    )
    add(
        "--weight-streaming",
        choices=("auto", "on", "off"),
        default="auto",
        help="let weights stay in host memory; auto: where they exceed the GPU's memory",
    )
    add(
        "--device-memory",
        type=gigabytes,
        metavar="GB",
        help="memory of the GPU that will run the engines, for --weight-streaming auto",
    )
    add(
        "--compute-capability",
        action="append",
        default=[],
        metavar="M.N",
        help="GPU to compile for, such as 8.9; may be repeated "
        f"({', '.join(AHEAD_OF_TIME)}; default: the library's own list)",
    )
    add("--force", action="store_true", help="build engines again that exist already")
    add("--dry-run", action="store_true", help="print the equivalent trtexec lines, build nothing")
    add("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Compile, and report what each engine cost."""
    from patchsieve.runtime.building.build import build
    from patchsieve.runtime.building.build_request import Request
    from patchsieve.runtime.target import AUTO, Choice, choose_to_build
    from patchsieve.runtime.trt.engines import Options

    choice = Choice(args.target)
    if args.target == AUTO:
        choice = choose_to_build(files.read(args.bundle))
        args.target = choice.target
    request = Request(
        target=args.target,
        options=Options(
            workspace_bytes=args.memory_limit,
            optimization_level=args.optimization_level,
            compute_capabilities=tuple(args.compute_capability),
        ),
        streaming=args.weight_streaming,
        device_bytes=args.device_memory,
        force=args.force,
    )
    if args.dry_run:
        code = _dry_run(args, request)
        say_target(args, choice)
        return code
    progress = Progress.of(args)

    def told(text: str) -> None:
        progress.done()
        print(f"patchsieve: {text}", file=sys.stderr)

    start = time.perf_counter()
    try:
        built = list(build(args.bundle, request, progress=progress, told=told))
    finally:
        progress.done()
    _report(args, built, time.perf_counter() - start)
    say_target(args, choice)
    return 0


def _dry_run(args: argparse.Namespace, request: Request) -> int:
    from patchsieve.runtime.building.build_request import graphs_of, options_of, should_stream
    from patchsieve.runtime.building.trtexec import command_line
    from patchsieve.runtime.trt.device import find_device
    from patchsieve.runtime.trt.engines import misfit

    facts, target = files.read(args.bundle), request.target
    streams, _ = should_stream(facts, request, find_device())
    lines = {
        graph: command_line(
            args.bundle, facts, target, graph, options_of(facts, request, graph, streams)
        )
        for graph in graphs_of(facts, target)
        if not misfit(facts, graph)
    }
    expected = _expected(facts, target)
    if locate(args.bundle).repository is not None:
        print(
            "patchsieve: the bundle is a snapshot of links, which some versions of NVIDIA's tool "
            "refuse: copy it first with cp -L -r",
            file=sys.stderr,
        )
    if args.json:
        about = {"bundle": str(args.bundle), "target": target, "commands": lines}
        print_json(about | {"expected_memory_bytes": expected})
        return 0
    for graph, line in lines.items():
        if graph in expected:
            print(f"# {graph}: at most about {size(expected[graph])} of memory")
        print(line)
    return 0


def _expected(facts: manifest.Manifest, target: str) -> dict[str, int]:
    """Most memory of building each graph's engine, where that was measured."""
    return engine_memory.expectations(facts) if target == engine_memory.MEASURED else {}


def _report(args: argparse.Namespace, built: list[Built], seconds: float) -> None:
    made = [one for one in built if one.engine is not None]
    total = sum(one.engine.size for one in made if one.engine)
    expected = _expected(files.read(args.bundle), args.target)
    peaks = [one.engine.peak_bytes or 0 for one in made if one.engine and not one.was_there]
    if args.json:
        print_json(
            {
                "bundle": str(args.bundle),
                "target": args.target,
                "engines": [_facts(one, expected.get(one.graph)) for one in built],
                "bytes": total,
                "seconds": round(seconds, 3),
                "peak_memory_bytes": max(peaks, default=0),
            }
        )
        return
    rows = [_row(one, expected.get(one.graph)) for one in built]
    peak = size(max(peaks)) if peaks else "-"
    most = size(max(expected.values())) if expected else "-"
    rows.append(("all", size(total), f"{seconds:.1f}", peak, most, ""))
    print(table(("engine", "size", "s", "peak memory", "expected", "rung"), rows))
    print(args.bundle / "engines" / args.target)
    for one in built:
        for text in (
            *([one.note] if one.note else []),
            *(one.engine.warnings if one.engine else ()),
        ):
            print(f"{one.graph}: {text}")


def _row(one: Built, expected: int | None) -> tuple[str, ...]:
    if one.engine is None:
        return (one.graph, "-", "-", "-", "-", "not built")
    engine = one.engine
    return (
        one.graph,
        size(engine.size),
        "there" if one.was_there else f"{engine.seconds:.1f}",
        "-" if engine.peak_bytes is None else size(engine.peak_bytes),
        "-" if expected is None else size(expected),
        engine.rung,
    )


def _facts(one: Built, expected: int | None) -> dict[str, Any]:
    engine = one.engine
    facts: dict[str, Any] = {
        "graph": one.graph,
        "path": str(one.path),
        "was_there": one.was_there,
        "note": one.note,
    }
    if engine is None:
        return facts | {"bytes": 0}
    return facts | {
        "bytes": engine.size,
        "seconds": engine.seconds,
        "base_memory_bytes": engine.base_bytes,
        "peak_memory_bytes": engine.peak_bytes,
        "expected_memory_bytes": expected,
        "rung": engine.rung,
        "failed": [asdict(attempt) for attempt in engine.failed],
        "options": asdict(engine.options),
        "library": str(engine.library),
        "gpu": None if engine.gpu is None else asdict(engine.gpu),
        "warnings": list(engine.warnings),
    }
