"""`patchsieve show BUNDLE --image I --prompt P -o page.html`: which patches survive, to look at."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from patchsieve.cli.arguments import whole
from patchsieve.cli.inputs import take_inputs
from patchsieve.cli.loading import add_request_options, add_run_options, load, say_target
from patchsieve.cli.output import Progress, print_json
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.writing import check_file, write_result
from patchsieve.tables import size, table

SUFFIXES = (".html", ".png")
TIMED_RUNS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("bundle", type=Path, help="the bundle's directory")
    add(
        "--image",
        action="append",
        required=True,
        metavar="FILE",
        help="an image file, or - for stdin; repeat it for several",
    )
    add(
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        help="the question, or - for stdin; repeat it to compare prompts about the same images; "
        "<image> places an image",
    )
    add_request_options(parser)
    add(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="the file to write: a page (.html) or a picture (.png)",
    )
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="the most tokens of an answer (default: 128, or what the bundle reserves if fewer)",
    )
    add(
        "--timed-runs",
        type=whole,
        default=TIMED_RUNS,
        metavar="N",
        help="runs of each prompt and plan whose median time is shown, after one that is not "
        "timed; 0 shows no times (default: 3)",
    )
    add_run_options(parser)


def run(args: argparse.Namespace) -> int:
    """Ask, draw, write."""
    out: Path = args.output
    if out.suffix.lower() not in SUFFIXES:
        raise PatchsieveError(
            "show cannot draw a file of this suffix",
            found=out.name,
            expected=" or ".join(SUFFIXES),
            do="give -o FILE.html, or -o FILE.png",
        )
    check_file(out)
    from patchsieve.show.collect import collect

    take_inputs(args)
    model = load(args)
    progress = Progress.of(args)
    options = {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}
    shown = collect(
        model,
        args.image,
        args.prompt,
        plan=args.plan,
        raw=args.raw,
        timed_runs=args.timed_runs,
        system=args.system,
        progress=progress,
        **options,
    )
    progress.done()
    model.close()
    content = _draw(shown, out.suffix.lower())
    write_result(out, content)
    summary = shown.summary()
    if args.json:
        print_json(
            {"output": str(out), "bytes": len(content), "target": model.bundle.target} | summary
        )
    else:
        print(f"wrote {out} ({size(len(content))})")
        if not args.quiet:
            print(_table(summary))
            say_target(args, model.bundle.choice)
    return 0


def _draw(shown: Any, suffix: str) -> bytes:
    if suffix == ".png":
        from patchsieve.show.sheet import draw

        return draw(shown)
    from patchsieve.show.html import render

    return render(shown).encode()


def _table(summary: dict[str, Any]) -> str:
    """Survivors of each prompt, image and place."""
    rows = [
        (
            f"prompt {number}, image {index}, "
            + ("decoder" if place["layer"] is None else f"layer {place['layer']}"),
            place["num_before"],
            place["num_after"],
            "capped by the budget" if place["capped"] else "",
        )
        for number, asked in enumerate(summary["prompts"], 1)
        for index, view in enumerate(asked["images"], 1)
        for place in view["places"]
    ]
    notes = summary["notes"]
    return "\n".join(
        [*([table(("tokens at the input of", "before", "kept", ""), rows)] if rows else []), *notes]
    )
