"""`patchsieve run BUNDLE --image I --prompt P`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from patchsieve.cli.inputs import images_of_turns, take_inputs
from patchsieve.cli.loading import add_request_options, add_run_options, load, say_target
from patchsieve.cli.output import print_json
from patchsieve.contract.errors import RequestError
from patchsieve.contract.manifest import Manifest
from patchsieve.tables import size, table

# Options whose default is the bundle's.
_GIVEN = ("max_new_tokens", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "stop")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("bundle", type=Path, help="the bundle's directory")
    add(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="an image file, or - for stdin; repeat it for several",
    )
    add(
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        help="the question, or - for stdin; repeat it for further turns of one conversation. Each "
        "<image>, in the order of all turns, places the next --image; images without one come "
        "before the first question",
    )
    add_request_options(parser)
    add("--repick", action="store_true", help="choose the visual tokens again in each turn")
    add_run_options(parser)
    _add_sampling(parser)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen, and when an answer ends."""
    add = parser.add_argument_group("sampling").add_argument
    whole: dict[str, Any] = {"type": int, "metavar": "N"}
    real: dict[str, Any] = {"type": float, "metavar": "X"}
    most = "the most tokens of an answer (default: 128, or what the bundle reserves if fewer)"
    add("--max-new-tokens", **whole, help=most)
    divisor = "divide the logits by X; 0 takes the likeliest token (default: 0)"
    add("--temperature", **real, default=0.0, help=divisor)
    add("--top-k", **whole, default=0, help="sample among the N likeliest tokens; 0: all (default)")
    nucleus = "sample among the fewest tokens whose probabilities reach X (default: 1, all tokens)"
    add("--top-p", **real, default=1.0, help=nucleus)
    penalty = "make earlier tokens less likely, if above 1 (default: the checkpoint's, or 1)"
    add("--repetition-penalty", **real, help=penalty)
    ngrams = "let no N tokens in a row come twice; 0 lets them (default: the checkpoint's, or 0)"
    add("--no-repeat-ngram-size", **whole, help=ngrams)
    least = "the fewest tokens of an answer (default: the checkpoint's, or 0)"
    add("--min-new-tokens", **whole, help=least)
    seed = "the seed of sampling and of methods that draw (default: a new one each run)"
    add("--seed", **whole, help=seed)
    stop = "end the answer before this text, which may hold special tokens; repeat it for several "
    stop += "(default: the checkpoint's)"
    add("--stop", action="append", metavar="TEXT", help=stop)


def run(args: argparse.Namespace) -> int:
    """Answer each prompt in turn."""
    from patchsieve.runtime.result import Result

    take_inputs(args)
    if args.raw and len(args.prompt) > 1:
        raise RequestError(
            "a raw prompt cannot be continued",
            found=f"--raw with {len(args.prompt)} prompts",
            do="give one --prompt, or leave out --raw",
        )
    model = load(args)
    mark = model.facts.tokens.image_token
    turns = images_of_turns(args.prompt, args.image, mark, is_raw=args.raw)
    if len(turns) > 1:
        _check_turns(model, args, turns)
    chat = model.chat(plan=args.plan, system=args.system)
    results = []
    for prompt, images in zip(args.prompt, turns, strict=True):
        result = Result()
        pieces = chat.stream(
            prompt,
            images,
            repick=args.repick,
            raw=args.raw,
            result=result,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            **{name: getattr(args, name) for name in _GIVEN if getattr(args, name) is not None},
        )
        for piece in pieces:
            if not args.json:
                sys.stdout.write(piece)
                sys.stdout.flush()
        if not args.json:
            print()
        results.append(result)
    if args.json:
        told = [{"target": model.bundle.target} | result.to_dict() for result in results]
        print_json(told[-1] if len(told) == 1 else told[-1] | {"turns": told})
    elif not args.quiet:
        say_target(args, model.bundle.choice)
        _summary(model.facts, results[-1])
    model.close()
    return 0


def _check_turns(model: Any, args: argparse.Namespace, turns: list[list[Any]]) -> None:
    """Refuse before the first answer what a later turn could not use."""
    from patchsieve.runtime.inputs.images import load_image

    for prompt, images in zip(args.prompt, turns, strict=True):
        model.bundle.prompts.user_message(prompt, len(images))
        for image in images:
            load_image(image)


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
