"""`patchsieve verify BUNDLE --against CHECKPOINT`."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patchsieve.cli.arguments import add_target
from patchsieve.cli.loading import say_target
from patchsieve.cli.output import Progress, print_json, require
from patchsieve.cli.picture import picture
from patchsieve.contract.targets import CHECKABLE
from patchsieve.tables import table

DEPARTS = 1  # exit code
PROMPT = "Describe the image."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("bundle", type=Path)
    add("--against", required=True, metavar="CHECKPOINT", help="Hugging Face directory or hub id")
    add("--revision", help="branch, tag or commit of a hub id (default: its main branch)")
    add(
        "--image",
        action="append",
        metavar="FILE",
        help="an image, or - for stdin; repeated for several; a generated one by default",
    )
    add("--prompt", default=PROMPT, metavar="TEXT", help=f"the question, or - for stdin ({PROMPT})")
    add("--raw", action="store_true", help="the prompt is the whole text, without chat template")
    add("--plan", metavar="NAME", help='the pruned plan beside "none"; the default one otherwise')
    add("--max-new-tokens", type=int, default=32, metavar="N", help="greedy tokens to compare (32)")
    add_target(parser, f"the only one of {', '.join(CHECKABLE)}, else as for run")
    add("--threads", type=int, help="threads of the bundle's side")
    add("--quiet", action="store_true", help="only the table and the verdict")


def run(args: argparse.Namespace) -> int:
    """Compare, print the table, name the first part that departs."""
    libraries = ("torch", "transformers", "onnx", "onnxruntime")
    require(libraries, "cpu,export", "verify")
    from patchsieve.cli.inputs import take_inputs
    from patchsieve.contract.errors import RequestError
    from patchsieve.contract.plan import NO_PRUNING
    from patchsieve.verify.verification import Verification

    take_inputs(args)
    progress = Progress(args.quiet or args.json)
    progress("loading both", 0.0)
    with _quiet_libraries():
        both = Verification(
            args.bundle,
            args.against,
            target=args.target,
            threads=args.threads,
            revision=args.revision,
        )
    plans = dict.fromkeys((NO_PRUNING, args.plan or both.facts.default_plan))
    if not set(plans) <= set(both.facts.plans):
        raise RequestError(
            "the bundle holds no such plan", found=args.plan, expected=", ".join(both.facts.plans)
        )
    parts: list[Any] = []
    for done, plan in enumerate(plans):
        progress(f"comparing plan {plan}", (done + 1) / (len(plans) + 1))
        shown = args.image or [picture()]
        with _quiet_libraries():
            parts += both.compare(shown, args.prompt, plan, raw=args.raw, count=args.max_new_tokens)
    both.close()
    progress.done()
    first = next((part for part in parts if part.departs), None)
    if args.json:
        print_json(
            {
                "bundle": str(args.bundle),
                "against": args.against,
                "target": both.model.bundle.target,
                "precision": str(both.facts.precision),
                "plans": list(plans),
                "passed": first is None,
                "first_departure": None if first is None else first.to_dict(),
                "parts": [part.to_dict() for part in parts],
            }
        )
    else:
        seen: set[Any] = set()
        for plan in plans:
            shown = [part for part in parts if part.plan == plan]
            rows = [part for part in shown if (part.name, part.max_error, part.note) not in seen]
            as_above = (
                f", {len(shown) - len(rows)} parts as above" if len(rows) < len(shown) else ""
            )
            print(f"plan {plan}{as_above}\n{_table(rows)}\n")
            seen |= {(part.name, part.max_error, part.note) for part in shown}
        if first is None:
            print(f"{len(parts)} parts compared with {args.against}: the bundle agrees")
        else:
            print(f"first to depart: {first.name}, plan {first.plan}")
        say_target(args, both.choice)
    return 0 if first is None else DEPARTS


def _table(parts: list[Any]) -> str:
    rows = [
        (
            part.name,
            _number(part.max_error),
            _number(part.relative_error),
            _number(part.tolerance),
            "DEPARTS" if part.departs else "ok",
            part.note,
        )
        for part in parts
    ]
    return table(("part", "max error", "relative", "tolerance", "verdict", ""), rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep the progress bars and warnings of transformers off stderr."""
    import transformers

    log = transformers.utils.logging
    level = log.get_verbosity()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        log.enable_progress_bar()
