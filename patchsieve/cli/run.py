"""`patchsieve run BUNDLE --image I --prompt P`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from patchsieve.cli.arguments import add_target
from patchsieve.cli.output import Progress, print_json, size, table
from patchsieve.manifest import Manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("bundle", type=Path)
    add("--image", action="append", default=[], metavar="FILE", help="repeat it for several")
    add(
        "--prompt",
        action="append",
        required=True,
        help="repeat it for further turns of one conversation; <image> places an image",
    )
    add("--plan", help="which of the bundle's plans; its default otherwise")
    add("--raw", action="store_true", help="the prompt is the whole text, without chat template")
    add("--repick", action="store_true", help="each turn chooses the visual tokens anew")
    add_run_options(parser)
    sampling = parser.add_argument_group("sampling")
    add = sampling.add_argument
    add("--max-new-tokens", type=int, help="default: 128, or what the bundle reserves")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    add("--top-k", type=int, default=0)
    add("--top-p", type=float, default=1.0)
    add("--repetition-penalty", type=float, default=1.0)
    add("--seed", type=int)
    add("--stop", action="append", default=[], help="end before this text; repeatable")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that runs a bundle."""
    add = parser.add_argument
    add_target(parser)
    add("--threads", type=int, help="threads of the CPU backend")
    add(
        "--no-hash",
        action="store_true",
        help="check files by size, not by content",
    )
    add("--quiet", action="store_true", help="only the answer")


def load(args: argparse.Namespace) -> Any:
    """Load the bundle that the options name."""
    from patchsieve.runtime.model import Model

    progress = Progress(args.quiet or args.json)
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


def say_target(args: argparse.Namespace, model: Any) -> None:
    """Say on stderr which target was chosen, and why, where there was a choice."""
    if model.bundle.choice.why and not (args.quiet or args.json):
        print(model.bundle.choice, file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    """Answer each prompt in turn."""
    from patchsieve.runtime.result import Result

    model = load(args)
    chat = model.chat(plan=args.plan)
    results = []
    for turn, prompt in enumerate(args.prompt):
        result = Result()
        pieces = chat.stream(
            prompt,
            args.image if turn == 0 else None,
            repick=args.repick,
            raw=args.raw,
            result=result,
            **({} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}),
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            repetition_penalty=args.repetition_penalty,
            seed=args.seed,
            stop=tuple(args.stop),
        )
        for piece in pieces:
            if not args.json:
                sys.stdout.write(piece)
                sys.stdout.flush()
        if not args.json:
            print()
        results.append(result)
    if args.json:
        turns = [{"target": model.bundle.target} | result.to_dict() for result in results]
        print_json(turns[-1] if len(turns) == 1 else turns[-1] | {"turns": turns})
    elif not args.quiet:
        say_target(args, model)
        _summary(model.facts, results[-1])
    model.close()
    return 0


def _summary(facts: Manifest, result: Any) -> None:
    """Survivors, KV bytes and times, on stderr."""
    rows_fed, visual = result.prompt_tokens, result.visual_tokens
    out = [f"plan {result.plan}: {rows_fed} rows, {visual} of them visual"]
    if result.sites:
        rows = [
            (
                f"image {site.image}, layer {site.layer}",
                site.num_visual_before,
                len(site.kept),
                "capped by the budget" if site.is_capped else "",
            )
            for site in result.sites
        ]
        out.append(table(("tokens at the input of", "before", "kept", ""), rows))
    kv = result.kv_bytes
    stages = [
        (
            f"layers {stage['layers'][0]}-{stage['layers'][1]}",
            stage["slots_used"],
            stage["slots_reserved"],
            size(stage["used"]),
            size(stage["reserved"]),
        )
        for stage in kv["per_stage"]
    ]
    stages.append(("all", "", "", size(kv["used"]), size(kv["reserved"])))
    out.append(table(("KV cache", "rows", "slots", "used", "reserved"), stages))
    times = result.timings_ms
    shown = ("preprocess", "vision", "prefill", "decide", "ttft", "decode_per_token", "total")
    out.append(
        "ms: " + ", ".join(f"{key} {times[key]:.1f}" for key in shown if times.get(key) is not None)
    )
    out += result.notes
    print("\n".join(out), file=sys.stderr)
