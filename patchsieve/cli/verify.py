"""`patchsieve verify BUNDLE --against CHECKPOINT`."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchsieve.cli.arguments import add_target
from patchsieve.cli.loading import say_target
from patchsieve.cli.output import Progress, print_json, require
from patchsieve.cli.picture import picture
from patchsieve.contract.targets import CHECKABLE
from patchsieve.tables import table

if TYPE_CHECKING:
    from patchsieve.contract.manifest import Manifest
    from patchsieve.verify.parts import Part
    from patchsieve.verify.verification import Verification

DEPARTS = 1  # exit code
PROMPT = "Describe the image."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("bundle", type=Path)
    add(
        "--against",
        required=True,
        metavar="CHECKPOINT",
        help="the Hugging Face directory or hub id of the model",
    )
    add("--revision", help="branch, tag or commit of the hub id (default: its main branch)")
    add(
        "--image",
        action="append",
        metavar="FILE",
        help="an image file, or - for stdin; may be repeated (default: a generated image)",
    )
    add(
        "--prompt",
        default=PROMPT,
        metavar="TEXT",
        help=f"the question, or - for stdin (default: {PROMPT})",
    )
    add(
        "--raw",
        action="store_true",
        help="take the prompt as the whole text, without a chat template",
    )
    add("--plan", metavar="NAME", help='plan to compare beside "none" (default: the bundle\'s own)')
    add(
        "--max-new-tokens",
        type=int,
        default=32,
        metavar="N",
        help="greedy tokens to compare (default: 32)",
    )
    add_target(parser, f"the only one of {', '.join(CHECKABLE)}, else as for run")
    add("--threads", type=int, help="threads that run the bundle (default: ONNX Runtime's choice)")
    add("--quiet", action="store_true", help="print the table and the verdict only")


def run(args: argparse.Namespace) -> int:
    """Compare, print the table, name the first part that departs."""
    libraries = ("torch", "transformers", "onnx", "onnxruntime")
    require(libraries, "cpu,export", "verify")
    from patchsieve.cli.inputs import take_inputs
    from patchsieve.verify.verification import Verification

    take_inputs(args)
    progress = Progress.of(args)
    progress("loading both", 0.0)
    with _quiet_libraries():
        both = Verification(
            args.bundle,
            args.against,
            target=args.target,
            threads=args.threads,
            revision=args.revision,
        )
    plans = _plans(args.plan, both.facts)
    parts: list[Part] = []
    for done, plan in enumerate(plans):
        progress(f"comparing plan {plan}", (done + 1) / (len(plans) + 1))
        shown = args.image or [picture()]
        with _quiet_libraries():
            parts += both.compare(shown, args.prompt, plan, raw=args.raw, count=args.max_new_tokens)
    both.close()
    progress.done()
    first = next((part for part in parts if part.departs), None)
    if args.json:
        print_json(_as_json(args, both, plans, parts, first))
    else:
        _print_tables(plans, parts)
        if first is None:
            print(f"{len(parts)} parts compared with {args.against}: the bundle agrees")
        else:
            print(f"first to depart: {_named(first)}")
        say_target(args, both.choice)
    return 0 if first is None else DEPARTS


def _plans(wanted: str | None, facts: Manifest) -> list[str]:
    """The plans to compare: "none" and the one that is wanted."""
    from patchsieve.contract.errors import RequestError
    from patchsieve.contract.plan import NO_PRUNING

    plan = wanted or facts.default_plan
    if plan not in facts.plans:
        raise RequestError(
            "the bundle holds no such plan",
            found=plan,
            expected=", ".join(facts.plans),
            do="choose one of these with --plan",
        )
    return list(dict.fromkeys((NO_PRUNING, plan)))


def _as_json(
    args: argparse.Namespace,
    both: Verification,
    plans: list[str],
    parts: list[Part],
    first: Part | None,
) -> dict[str, Any]:
    """All parts, and the first that departs."""
    return {
        "bundle": str(args.bundle),
        "against": args.against,
        "target": both.model.bundle.target,
        "precision": both.facts.numbers,
        "plans": plans,
        "passed": first is None,
        "first_departure": None if first is None else first.to_dict(),
        "parts": [part.to_dict() for part in parts],
    }


def _print_tables(plans: list[str], parts: list[Part]) -> None:
    """A table for each plan; what a plan before it has shown with the same numbers is left out.

    Single matrices are left out too unless they depart: their layer's line names the worst.
    """
    seen: set[tuple[object, ...]] = set()
    for plan in plans:
        shown = [
            part for part in parts if part.plan == plan and (part.departs or not part.is_product)
        ]
        rows = [part for part in shown if _numbers(part) not in seen]
        more = f", {len(shown) - len(rows)} parts as above" if len(rows) < len(shown) else ""
        print(f"plan {plan}{more}\n{_table(rows)}\n")
        seen |= set(map(_numbers, shown))


def _numbers(part: Part) -> tuple[object, ...]:
    return part.name, part.max_error, part.own_error, part.note


def _table(parts: list[Part]) -> str:
    has_own = any(part.own_error is not None for part in parts)
    rows = [
        (
            part.name,
            _number(part.max_error),
            _number(part.relative_error),
            _number(part.mean_error),
            *((_number(part.own_error),) if has_own else ()),
            _number(part.tolerance),
            "DEPARTS" if part.departs else "ok",
            part.note,
        )
        for part in parts
    ]
    own = ("own",) if has_own else ()
    header = ("part", "max error", "relative", "row mean", *own, "tolerance", "verdict", "")
    return table(header, rows)


def _named(part: Part) -> str:
    """A part that departs, in one line."""
    said = f"{part.name}, plan {part.plan}"
    if part.own_error is None or part.tolerance is None:
        return said
    return f"{said}: own error {part.own_error:.1e}, its format allows {part.tolerance:.1e}"


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
