"""`patchsieve calibrate CHECKPOINT --data DATA -o OUT`: thresholds or statistics of a model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from patchsieve.cli import calibrate_statistics
from patchsieve.cli.calibrate_options import add_arguments as add_arguments
from patchsieve.cli.calibrate_options import data_of, options_of, statistics_of
from patchsieve.cli.output import Progress, print_json, require
from patchsieve.pruning.heads import CONFIG
from patchsieve.runtime.board.abilities import CALIBRATION
from patchsieve.tables import table

if TYPE_CHECKING:
    from patchsieve.calibration.run import Calibration


def run(args: argparse.Namespace) -> int:
    """Calibrate, print what survives."""
    if args.statistics:
        return calibrate_statistics.run(args, statistics_of(args), data_of(args))
    options, data = options_of(args), data_of(args)
    require(CALIBRATION, "cpu,export,calibration", "calibrate")
    from patchsieve.calibration.run import calibrate, is_main_process

    progress = Progress(args.json or not is_main_process())
    made = calibrate(
        args.checkpoint,
        data,
        options,
        args.out,
        revision=args.revision,
        resume=args.resume,
        progress=progress,
    )
    progress.done()
    if not is_main_process():
        return 0
    if args.json:
        print_json(made.to_dict())
    else:
        print(_report(made, args.method))
    return 0


def _report(made: Calibration, method: str) -> str:
    """What was learned, and how to use it."""
    what = "language model and heads" if made.is_checkpoint else "heads"
    lines = [f"{made.out}: {method} {what} from {made.records} records, {made.seconds:.1f} s"]
    if made.records_without_image:
        lines.append(f"  {made.records_without_image} records skipped: their images are missing")
    columns = ("layer", "mean tokens", "fewest", "most", "reserved")
    sites = [site.to_dict() for site in made.sites]
    lines.append(table(columns, [tuple(site[key] for key in columns) for site in sites]))
    lines.append(
        f"average over all layers {made.average_tokens:.1f} tokens, target {made.target:g}"
    )
    lines.append(
        f"export with: patchsieve export {made.out} -o BUNDLE --method atp"
        if made.is_checkpoint
        else f"export with: --method atp --heads {made.out}  ({CONFIG} holds the sites)"
    )
    return "\n".join(lines)
