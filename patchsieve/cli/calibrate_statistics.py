"""`patchsieve calibrate CHECKPOINT --data DATA --statistics -o STATS`: what the matrices read."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from patchsieve.calibration.options import Data
from patchsieve.calibration.statistics_options import StatisticsOptions
from patchsieve.cli.arguments import count
from patchsieve.cli.output import Progress, print_json, require
from patchsieve.contract.errors import PatchsieveError
from patchsieve.runtime.board.abilities import EXPORT

if TYPE_CHECKING:
    from patchsieve.calibration.statistics import Collected

_OWN = ("records", "max_tokens")  # fields that thresholds do not have


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Declare the options that thresholds do not have."""
    add, default = group.add_argument, StatisticsOptions()
    add(
        "--statistics",
        action="store_true",
        help="learn nothing: write a file OUT of activation statistics, by which `export "
        "--statistics` rounds to low precision",
    )
    add(
        "--records",
        type=count,
        metavar="N",
        help=f"conversations to draw from the data (default: {default.records})",
    )
    add(
        "--max-tokens",
        type=count,
        metavar="N",
        help="rows of a conversation, of text and images; later ones are cut off (default: "
        f"{default.max_tokens})",
    )


def check_absent(args: argparse.Namespace) -> None:
    """Refuse options of the statistics where none are collected."""
    for name in _OWN:
        if getattr(args, name) is not None:
            raise PatchsieveError(
                "only statistics take this option",
                found=_spelt(name),
                do=f"add --statistics, or remove {_spelt(name)}",
            )


def options_of(args: argparse.Namespace, others: dict[str, Any]) -> StatisticsOptions:
    """What to collect, as the command line says.

    Args:
        args: The command line.
        others: Options of thresholds, and their values where they are not given.

    Raises:
        PatchsieveError: An option of thresholds is given.
    """
    taken = {field.name for kind in (Data, StatisticsOptions) for field in fields(kind)}
    for name, default in others.items():
        if name not in taken - {"held_out"} and getattr(args, name) != default:
            raise PatchsieveError(
                "--statistics learns no thresholds",
                found=_spelt(name),
                do=f"remove {_spelt(name)}, or --statistics",
            )
    given = {name: getattr(args, name) for name in _OWN if getattr(args, name) is not None}
    return StatisticsOptions(seed=args.seed, **given)


def run(args: argparse.Namespace, options: StatisticsOptions, data: Data) -> int:
    """Collect, print what was fed."""
    require(EXPORT, "cpu,export", "calibrate --statistics")
    from patchsieve.calibration.statistics import collect

    progress = Progress(args.json)
    made = collect(
        args.checkpoint,
        data,
        options,
        args.out,
        revision=args.revision,
        resume=args.resume,
        progress=progress,
    )
    progress.done()
    if args.json:
        print_json(made.to_dict())
    else:
        print(_report(made))
    return 0


def _report(made: Collected) -> str:
    lines = [
        f"{made.out}: activation statistics of {made.matrices} matrices, {made.seconds:.1f} s",
        f"  {made.records} records with {made.images} images, {made.rows} rows in the decoder",
    ]
    if made.records_without_image:
        lines.append(f"  {made.records_without_image} records skipped: their images are missing")
    return "\n".join([*lines, f"export with: --statistics {made.out}"])


def _spelt(name: str) -> str:
    return f"--{name.replace('_', '-')}"
