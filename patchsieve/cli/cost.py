"""`patchsieve cost --config CONFIG_JSON --method M`, and `patchsieve cost BUNDLE`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from patchsieve import cost as costs
from patchsieve.cli.arguments import integers, numbers
from patchsieve.cli.output import print_json, size, table
from patchsieve.cost.methods import (
    DEFAULT_KEEP_RATIO,
    FIXED_RATIO,
    NUM_KEPT,
    OUTPUT_METHODS,
    PLACEMENTS,
    TOWER_PLACEMENTS,
)
from patchsieve.errors import PatchsieveError
from patchsieve.manifest import Manifest, read
from patchsieve.plan import NO_PRUNING, Plan
from patchsieve.precision import BYTES
from patchsieve.pruning.schedules import group_ends, num_to_keep

# Method -> the places where its cost is known, the usual one first.
METHODS: dict[str, tuple[str, ...]] = {
    "none": ("nowhere",),
    "random": ("decoder", "tower", "output"),
    "fastv": ("decoder",),
    "atp": ("decoder",),
    "gtp": ("tower",),
    "topk": ("tower", "output"),
    "evit": ("tower",),
    "tome": ("tower", "output"),
    "pooling": ("output",),
    "resampler": ("output",),
    "ivtp": ("both",),
}
# What `export` takes in this version, and where; all else is costs only.
EXPORTED: dict[str, tuple[str, ...]] = {
    "nowhere": ("none",),
    "decoder": ("random", "fastv", "atp", "topk", "tome", "ivtp"),
    "tower": tuple(TOWER_PLACEMENTS),
    "output": OUTPUT_METHODS,
    "both": ("ivtp",),
}
_CONVENTIONS = {"papers": costs.PAPERS, "runtime": costs.RUNTIME}
_PLAN_OPTIONS = (
    "plan",
    "place",
    "sites",
    "keep_ratio",
    "survivors",
    "visual_tokens",
    "placement",
    "group_layers",
    "decoder_layers",
)
GTP_GROUP = 3  # tower layers of a group


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    exported = list(dict.fromkeys(chain(*EXPORTED.values())))
    only = [name for name in METHODS if name not in exported]
    parser.description = (
        "FLOPs, tokens per layer and KV bytes of a plan, counted from shapes with no weights. A "
        "multiply-accumulate is 2 FLOPs; norms, softmax and the decisions are not counted. "
        f"Pruning methods of this version: {', '.join(exported)}. Costs only: {', '.join(only)}."
    )
    add = parser.add_argument
    add("bundle", nargs="?", type=Path, help="take the model and its plan from a bundle")
    add("--config", type=Path, metavar="JSON", help="take the model from a LLaVA config.json")
    plan = parser.add_argument_group("what prunes where")
    add = plan.add_argument
    add("--plan", metavar="PLAN", help="a plan file or, with a bundle, the name of its plan")
    add("--method", choices=tuple(METHODS), help="none (default), or one of these")
    add("--place", choices=("tower", "output", "decoder"), help="where, for methods with a choice")
    add("--sites", type=integers, metavar="LAYERS", help="layers of the decoder or the tower")
    add(
        "--keep-ratio",
        type=numbers,
        metavar="R",
        help="fraction KEPT, one or one per site (random, fastv: 0.5)",
    )
    add("--survivors", type=integers, metavar="N", help="tokens left behind each site: 126,88,20")
    add(
        "--visual-tokens",
        type=int,
        metavar="N",
        help=f"tokens left at the end (usually {NUM_KEPT})",
    )
    add("--placement", choices=PLACEMENTS, help="where in a tower layer tokens go (default: start)")
    add("--group-layers", type=int, metavar="L", help="gtp, ivtp: layers of a group (3)")
    add(
        "--decoder-layers", type=int, metavar="L", help="ivtp: grouped decoder layers (default: 12)"
    )
    request = parser.add_argument_group("the request, and what counts")
    add = request.add_argument
    add("--text-tokens", type=int, default=512, metavar="T", help="all that is not visual (512)")
    add("--images", type=int, default=1, help="images of the request (1)")
    add("--precision", choices=tuple(BYTES), help="of keys and values (float16)")
    add(
        "--convention",
        choices=tuple(_CONVENTIONS),
        default="papers",
        help="papers: lm_head at every row, no projector (default); runtime: what is executed, "
        "lm_head at the last row, projector, and IVTP's side row and extra tower layer",
    )


def run(args: argparse.Namespace) -> int:
    """Count, pruned beside unpruned."""
    shape, manifest = _model(args)
    schedule, is_exact = _schedule(args, shape, manifest)
    precision = args.precision or (manifest.precision.decoder if manifest else "float16")
    pruned, full = (
        costs.cost(
            shape,
            each,
            args.text_tokens,
            images=args.images,
            precision=precision,
            convention=_CONVENTIONS[args.convention],
        )
        for each in (schedule, costs.no_pruning(shape))
    )
    name = args.method or args.plan or (manifest.default_plan if manifest else NO_PRUNING)
    facts = {
        "plan": name,
        "is_costs_only": args.method is not None and not _is_exported(args),
        "is_upper_bound": not is_exact,
        "convention": args.convention,
        "precision": precision,
        "text_tokens": args.text_tokens,
        "images": args.images,
    }
    if args.json:
        print_json(facts | as_dict(pruned, full))
    else:
        _print(facts, pruned, full)
    return 0


def as_dict(pruned: costs.Cost, full: costs.Cost) -> dict[str, Any]:
    """A cost as commands print it in JSON, the unpruned one beside it."""
    return _facts(pruned) | {
        "unpruned": _facts(full),
        "ratio": pruned.flops.total / full.flops.total,
        "kv_ratio": pruned.kv_bytes / full.kv_bytes,
    }


def _facts(each: costs.Cost) -> dict[str, Any]:
    return {
        "flops": each.flops.to_dict(),
        "tokens_per_layer": {"vision": each.vision_tokens, "llm": each.llm_tokens},
        "average_tokens": each.average_tokens,
        "kv_bytes": each.kv_bytes,
    }


def _model(args: argparse.Namespace) -> tuple[costs.ModelShape, Manifest | None]:
    if (args.bundle is None) == (args.config is None):
        raise PatchsieveError(
            "cost needs a model",
            found="two" if args.bundle else "none",
            expected="--config CONFIG_JSON, or a bundle",
        )
    if args.config is not None:
        return costs.read_shape(args.config), None
    manifest = read(args.bundle)
    return costs.from_manifest(manifest), manifest


def _schedule(
    args: argparse.Namespace, shape: costs.ModelShape, manifest: Manifest | None
) -> tuple[costs.Schedule, bool]:
    """Tokens per layer, and whether they are known or an upper bound."""
    if args.method is None:
        _refuse(args, allowed={"plan", "survivors"}, why="without --method")
        return costs.of_plan(shape, _plan(args.plan, manifest), args.survivors)
    if args.plan is not None:
        raise PatchsieveError("--plan says it all", found="--method", do="leave it away")
    places = METHODS[args.method]
    place = args.place or places[0]
    if place not in places:
        raise PatchsieveError(
            f"the cost of {args.method} at this place is not known",
            found=place,
            expected=" or ".join(places),
        )
    build = {
        "nowhere": _nowhere,
        "decoder": _in_decoder,
        "tower": _in_tower,
        "output": _after_tower,
        "both": _ivtp,
    }[place]
    return build(args, shape), True


def _is_exported(args: argparse.Namespace) -> bool:
    place = args.place or METHODS[args.method][0]
    return args.method in EXPORTED[place]


def _plan(plan: str | None, manifest: Manifest | None) -> Plan:
    if manifest is None:
        return Plan() if plan is None else Plan.from_file(Path(plan))
    name = plan or manifest.default_plan
    if name not in manifest.plans:
        raise PatchsieveError(
            "the bundle has no such plan", found=name, expected=", ".join(manifest.plans)
        )
    return manifest.plans[name]


def _nowhere(args: argparse.Namespace, shape: costs.ModelShape) -> costs.Schedule:
    _refuse(args, allowed=set(), why="with --method none")
    return costs.no_pruning(shape)


def _in_decoder(args: argparse.Namespace, shape: costs.ModelShape) -> costs.Schedule:
    why = f"with {args.method} in the decoder"
    _refuse(args, allowed={"place", "sites", "keep_ratio", "survivors"}, why=why)
    if args.sites is None:
        raise PatchsieveError(f"--method {args.method} needs --sites", expected="e.g. --sites 2")
    counts = args.survivors
    if counts is None:
        ratios = args.keep_ratio
        if ratios is None and args.method not in FIXED_RATIO:
            raise PatchsieveError(
                f"{args.method} keeps as many tokens as the image needs",
                expected="--survivors, one number for each site, or --keep-ratio",
            )
        ratios = ratios or [DEFAULT_KEEP_RATIO]
        ratios = ratios * (len(args.sites) if len(ratios) == 1 else 1)
        counts = [num_to_keep(ratio, shape.num_visual) for ratio in ratios]
    return costs.in_decoder(shape, counts, args.sites)


def _in_tower(args: argparse.Namespace, shape: costs.ModelShape) -> costs.Schedule:
    allowed = {"place", "sites", "survivors", "visual_tokens", "keep_ratio", "placement"}
    allowed |= {"group_layers"} if args.method == "gtp" else set()
    _refuse(args, allowed=allowed, why=f"with {args.method} in the tower")
    placement = args.placement
    if placement is None and args.convention == "runtime":
        placement = TOWER_PLACEMENTS[args.method]
    layers = range(shape.vision.num_layers_run) if args.sites is None else args.sites
    counts = args.survivors
    if counts is None:
        n = shape.vision.num_patches
        if args.method == "gtp":
            group = args.group_layers or GTP_GROUP
            layers = (
                group_ends(shape.vision.num_layers_run, group) if args.sites is None else layers
            )
            counts = costs.geometric(n, _last_count(args, n), len(layers))
        else:
            counts = costs.linear(n, _last_count(args, n), len(layers))
    return costs.in_tower(shape, counts, layers, placement or "start")


def _after_tower(args: argparse.Namespace, shape: costs.ModelShape) -> costs.Schedule:
    allowed = {"place", "visual_tokens", "keep_ratio"}
    _refuse(args, allowed=allowed, why=f"with {args.method} after the tower")
    make = costs.resampler if args.method == "resampler" else costs.after_tower
    return make(shape, _last_count(args, shape.num_visual))


def _ivtp(args: argparse.Namespace, shape: costs.ModelShape) -> costs.Schedule:
    allowed = {"visual_tokens", "keep_ratio", "survivors", "group_layers", "decoder_layers"}
    _refuse(args, allowed=allowed, why="with ivtp")
    is_runtime = args.convention == "runtime"
    return costs.ivtp(
        shape,
        _last_count(args, shape.vision.num_patches),
        counts=args.survivors,
        group_layers=3 if args.group_layers is None else args.group_layers,
        decoder_layers=12 if args.decoder_layers is None else args.decoder_layers,
        text_tokens=args.text_tokens,
        has_side_row=is_runtime,
        has_joint_cls=is_runtime,
    )


def _last_count(args: argparse.Namespace, num_visual: int) -> int:
    """Tokens at the end, of whichever option names them."""
    named = ("visual_tokens", "keep_ratio", "survivors")
    given = [_option(name) for name in named if getattr(args, name) is not None]
    if len(given) > 1:
        raise PatchsieveError("one of these options is enough", found=" and ".join(given))
    if args.keep_ratio is None:
        return min(NUM_KEPT, num_visual) if args.visual_tokens is None else args.visual_tokens
    if len(args.keep_ratio) != 1:
        raise PatchsieveError("this method takes one keep ratio", found=len(args.keep_ratio))
    return num_to_keep(args.keep_ratio[0], num_visual)


def _refuse(args: argparse.Namespace, *, allowed: set[str], why: str) -> None:
    """Refuse options that would have no effect."""
    idle = [_option(n) for n in _PLAN_OPTIONS if n not in allowed and getattr(args, n) is not None]
    if idle:
        raise PatchsieveError(f"an option has no effect {why}", found=", ".join(idle))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _print(facts: dict[str, Any], pruned: costs.Cost, full: costs.Cost) -> None:
    full_flops = full.flops.to_dict()
    rows: list[tuple[str, float, float, Callable[[float], str]]] = [
        (f"{part} FLOPs", count, full_flops[part], _flops)
        for part, count in pruned.flops.to_dict().items()
    ]
    mean = "visual tokens, mean of layers"
    rows += [
        (mean, pruned.average_tokens, full.average_tokens, _mean),
        ("KV bytes", pruned.kv_bytes, full.kv_bytes, size),
    ]
    print(
        table(
            ("", facts["plan"], "unpruned", "%"),
            [
                (name, write(a), write(b), f"{100 * a / b:.1f}" if b else "-")
                for name, a, b, write in rows
            ],
        )
    )
    print(f"tower rows: {_runs(pruned.vision_tokens)}")
    print(f"visual tokens in the decoder: {_runs(pruned.llm_tokens)}")
    print(
        f"{facts['text_tokens']} text tokens, {facts['images']} image(s), {facts['precision']}, "
        f"counted as {facts['convention']} (see --convention)"
    )
    if facts["is_costs_only"]:
        print(f"costs only: export has no {facts['plan']} at this place in this version")
    if facts["is_upper_bound"]:
        print("an upper bound: the plan adapts to the image and was counted at its budget")


def _runs(counts: tuple[int, ...]) -> str:
    """Counts by layer, equal neighbours together: 0-3: 576, 4-31: 126."""
    parts, layer = [], 0
    for count, same in groupby(counts):
        last = layer + len(list(same)) - 1
        parts.append(f"{layer}-{last}: {count}" if last > layer else f"{layer}: {count}")
        layer = last + 1
    return ", ".join(parts)


def _flops(count: float) -> str:
    return f"{count / 1e12:.3f} T" if count >= 1e10 or not count else f"{count / 1e9:.3f} G"


def _mean(count: float) -> str:
    return f"{count:.4f}".rstrip("0").rstrip(".")
