"""Options of every command that runs a bundle, and the bundle that they name."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from patchsieve.cli.arguments import add_target
from patchsieve.cli.output import Progress

if TYPE_CHECKING:
    from patchsieve.runtime.target import Choice


def add_request_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that asks a question."""
    add = parser.add_argument
    add(
        "--system",
        metavar="TEXT",
        help="the system prompt, which the chat template places; it judges no visual token "
        "(default: what the template writes without one)",
    )
    add("--plan", metavar="NAME", help="the plan to follow (default: the bundle's own)")
    add(
        "--raw",
        action="store_true",
        help="take each prompt as the whole text, without the chat template",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that runs a bundle."""
    add = parser.add_argument
    add_target(parser)
    add("--threads", type=int, help="the threads of the CPU backend (default: one for each core)")
    add(
        "--no-hash",
        action="store_true",
        help="check the bundle's files by size only, not by content",
    )
    add("--quiet", action="store_true", help="print the result only, with no progress and no notes")


def load(args: argparse.Namespace) -> Any:
    """Load the bundle that the options name."""
    from patchsieve.runtime.model import Model

    progress = Progress.of(args)
    files = 0

    def step(path: str) -> None:
        nonlocal files
        files += 1
        progress(f"checking {path}", min(files / 100, 0.99))

    model = Model(
        args.bundle,
        target=args.target,
        threads=args.threads,
        check="size" if args.no_hash else "hash",
        progress=step if progress.is_terminal else None,
    )
    progress.done()
    return model


def say_target(args: argparse.Namespace, choice: Choice) -> None:
    """Say on stderr which target was chosen, and why, if there was a choice."""
    if choice.why and not (args.quiet or args.json):
        print(choice, file=sys.stderr)
