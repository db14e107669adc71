"""`patchsieve cost --config CONFIG_JSON --method M`, and `patchsieve cost BUNDLE`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from patchsieve import cost as costs
from patchsieve import inspection
from patchsieve.cli import export
from patchsieve.cli.arguments import integers
from patchsieve.cli.output import print_json
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.files import read
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.plan import NO_PRUNING, MethodPlan, Plan
from patchsieve.contract.precision import BYTES
from patchsieve.cost.methods import (
    OUTPUT_METHODS,
    PLACEMENTS,
    TOWER_PLACEMENTS,
    before_decoder,
    ivtp_plan,
)
from patchsieve.pruning.recipes import Size
from patchsieve.pruning.schedules import default_keep, num_to_keep
from patchsieve.tables import flops, plural, size, table

# Method -> the places where its cost is known, the usual one first.
METHODS: dict[str, tuple[str, ...]] = {
    "none": ("nowhere",),
    "random": ("decoder", "tower", "output"),
    "fastv": ("decoder",),
    "atp": ("decoder",),
    "gtp": ("tower",),
    "topk": ("tower", "output", "decoder"),
    "evit": ("tower",),
    "tome": ("tower", "output", "decoder"),
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
_TEXT_TOKENS = 512  # of a request, where no bundle limits it
_OWN = ("place", "survivors", "visual_tokens", "placement", "decoder_layers")


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
    add(
        "bundle", nargs="?", type=Path, help="take the model, its plan and its limits from a bundle"
    )
    add("--config", type=Path, metavar="JSON", help="take the model from a LLaVA config.json")
    plan = parser.add_argument_group(
        "what prunes where, as export takes it", conflict_handler="resolve"
    )
    plan.add_argument("--plan", metavar="PLAN", help="a plan file or, with a bundle, a plan's name")
    export.add_plan_arguments(plan)
    plan.add_argument(
        "--method", choices=tuple(METHODS), help="none (default), or one of these; see --place"
    )
    own = parser.add_argument_group("for costs alone")
    add = own.add_argument
    add(
        "--place",
        choices=("tower", "output", "decoder"),
        help="where --method acts, if it has a choice: topk and tome in the decoder if --sites or "
        "--num-keep is given (as export has it), else in the tower; random in the decoder. In the "
        "tower --sites are its layers and --group-layers its groups",
    )
    add(
        "--survivors",
        type=integers,
        metavar="N",
        help="tokens left by each site (or tower layer), instead of what the plan says: 126,88,20",
    )
    add(
        "--visual-tokens",
        type=int,
        metavar="N",
        help="tokens left at the end: the same as --num-keep, --encoder-keep or --projector-keep",
    )
    add(
        "--placement",
        choices=PLACEMENTS,
        help="where in a tower layer tokens are dropped (default: where the method does; start "
        "gives the papers' figures)",
    )
    add(
        "--decoder-layers",
        type=int,
        metavar="L",
        help="ivtp: first decoder layers that are grouped (default: 12, or all but the last)",
    )
    request = parser.add_argument_group("the request, and what counts")
    add = request.add_argument
    add(
        "--text-tokens",
        type=int,
        metavar="T",
        help=f"all that is not visual (default: a bundle's limit; else {_TEXT_TOKENS})",
    )
    add("--images", type=int, help="images of the request (default: a bundle's limit; else 1)")
    add(
        "--precision",
        choices=tuple(BYTES),
        help="type of keys and values (default: a bundle's own; else float16)",
    )
    add(
        "--convention",
        choices=tuple(_CONVENTIONS),
        help="papers: lm_head at every row, no projector (default with --config); runtime: what is "
        "executed, lm_head at the last row, projector, IVTP's side row and extra tower layer "
        "(default with a bundle, as inspect counts)",
    )


def run(args: argparse.Namespace) -> int:
    """Count, pruned beside unpruned."""
    shape, manifest = _model(args)
    limits = manifest.limits if manifest else None
    text_tokens = _first(args.text_tokens, limits and limits.max_text_tokens, _TEXT_TOKENS)
    images = _first(args.images, limits and limits.max_images, 1)
    precision = _first(args.precision, manifest and manifest.precision.decoder, "float16")
    convention = _first(args.convention, manifest and "runtime", "papers")
    name, chosen, is_exported = _chosen(args, shape, manifest)
    if args.placement is not None and getattr(chosen, "encoder", None) is None:
        raise PatchsieveError(
            "--placement has no effect on a plan that prunes nothing in the tower",
            found=args.placement,
        )
    if isinstance(chosen, costs.Schedule):
        schedule, is_exact = chosen, True
    else:
        schedule, is_exact = costs.of_plan(
            shape,
            chosen,
            _survivors(args, shape, chosen),
            text_tokens=text_tokens,
            placement=args.placement,
        )
    pruned, full = (
        costs.cost(
            shape,
            each,
            text_tokens,
            images=images,
            precision=precision,
            convention=_CONVENTIONS[convention],
        )
        for each in (schedule, costs.no_pruning(shape))
    )
    facts: dict[str, Any] = {
        "plan": name,
        "is_costs_only": not is_exported,
        "is_upper_bound": not is_exact,
        "convention": convention,
        "precision": precision,
        "text_tokens": text_tokens,
        "images": images,
    }
    if manifest is not None and manifest.plans.get(name) is chosen:
        held = inspection.plan_costs(manifest, name)
        facts["kv_bytes_reserved"] = held["kv_bytes"]
        facts["kv_bytes_reserved_unpruned"] = held["kv_bytes_unpruned"]
    if args.json:
        print_json(facts | as_dict(pruned, full))
    else:
        _print(facts, pruned, full)
    return 0


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


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
    return costs.from_bundle(args.bundle, manifest), manifest


def _chosen(
    args: argparse.Namespace, shape: costs.ModelShape, manifest: Manifest | None
) -> tuple[str, Plan | costs.Schedule, bool]:
    """The name of what is counted, its plan (or counts that no plan has), whether it exports."""
    shortcuts = export.given_shortcuts(args)
    if args.plan is not None and shortcuts:
        raise PatchsieveError("--plan says it all", found=", ".join(shortcuts), do="remove them")
    if not shortcuts:
        _refuse(args, allowed={"survivors", "placement"}, why="without --method")
        return *_named(args.plan, manifest), True
    place = _place(args)
    if place == "tower":
        return args.method, _in_tower(args, shape), args.method in EXPORTED[place]
    if place == "output":
        return args.method, _after_tower(args, shape), args.method in EXPORTED[place]
    if args.method == "ivtp":
        return args.method, _ivtp(args, shape), args.decoder_layers is None
    has_number = {"visual_tokens"} if args.method in ("topk", "tome") else set()
    why = f"with {args.method or 'no --method'}" + (" in the decoder" if place != "nowhere" else "")
    _refuse(args, allowed={"place", "survivors", "placement"} | has_number, why=why)
    own: dict[str, Any] = {"num_keep": _one_of(args, "num_keep", "visual_tokens")}
    if args.method == "atp":  # its ratio says how many it is taken to keep
        own["keep_ratio"] = None
    plan = _exported(args, own, shape)
    return args.method or export.name_of(plan), plan, True


def _exported(args: argparse.Namespace, own: dict[str, Any], shape: costs.ModelShape) -> Plan:
    """The plan that export makes of the same options, but for those in `own`."""
    size = Size(shape.vision.num_patches, shape.text.num_layers)
    given = vars(args) | {"checkpoint": None, "reuse": None} | own
    return export.plan_of(argparse.Namespace(**given), size)


def _one_of(args: argparse.Namespace, *names: str) -> Any:
    """The value of the one option of these that is given, None without."""
    given = [name for name in names if getattr(args, name) is not None]
    if len(given) > 1:
        raise PatchsieveError(
            "one of these options is enough", found=" and ".join(map(_option, given))
        )
    return getattr(args, given[0]) if given else None


def _place(args: argparse.Namespace) -> str:
    """Where the method acts."""
    if args.method is None:
        if args.place is not None:
            raise PatchsieveError("--place has no effect without --method", found=args.place)
        return "decoder"
    places = METHODS[args.method]
    is_export = "decoder" in places and (args.sites is not None or args.num_keep is not None)
    place: str = args.place or ("decoder" if is_export else places[0])
    if place not in places:
        raise PatchsieveError(
            f"the cost of {args.method} at this place is not known",
            found=place,
            expected=" or ".join(places),
        )
    return place


def _named(plan: str | None, manifest: Manifest | None) -> tuple[str, Plan]:
    """A plan file, a bundle's plan, or no pruning."""
    if manifest is None:
        return (NO_PRUNING, Plan()) if plan is None else (plan, Plan.from_file(Path(plan)))
    name = plan or manifest.default_plan
    if name not in manifest.plans:
        raise PatchsieveError(
            "the bundle has no such plan", found=name, expected=", ".join(manifest.plans)
        )
    return name, manifest.plans[name]


def _survivors(args: argparse.Namespace, shape: costs.ModelShape, plan: Plan) -> Any:
    """Tokens left at each decoder site, if the command says so and not the plan; else None."""
    if args.method not in (None, NO_PRUNING) and (args.method == "ivtp" or not plan.sites):
        return None  # in the plan already
    if args.survivors is not None and not plan.sites:
        raise PatchsieveError("--survivors has no effect on a plan without decoder sites")
    if args.method != "atp" or args.keep_ratio is None:
        return _one_of(args, "survivors", "keep_ratio") and args.survivors
    _one_of(args, "survivors", "keep_ratio")
    ratios = args.keep_ratio * (len(plan.sites) if len(args.keep_ratio) == 1 else 1)
    entering = before_decoder(shape, plan).llm[0]
    return [num_to_keep(ratio, entering) for ratio in ratios]


def _in_tower(args: argparse.Namespace, shape: costs.ModelShape) -> Plan:
    """The plan of `export --encoder METHOD`."""
    _only(args, {"--sites", "--keep-ratio", "--group-layers"}, "--encoder")
    _refuse(args, allowed={"place", "survivors", "visual_tokens", "placement"}, why="in the tower")
    params = {
        "keep": _last_count(args, shape.vision.num_patches),
        "counts": args.survivors,
        "layers": args.sites,
        "group_layers": args.group_layers,
    }
    return Plan(encoder=MethodPlan(args.method, {k: v for k, v in params.items() if v is not None}))


def _after_tower(args: argparse.Namespace, shape: costs.ModelShape) -> Plan | costs.Schedule:
    """The plan of `export --projector METHOD`, or the counts of what export has not."""
    _only(args, {"--keep-ratio"}, "--projector")
    _refuse(args, allowed={"place", "visual_tokens"}, why="after the tower")
    keep = _last_count(args, shape.vision.num_patches)
    if args.method in OUTPUT_METHODS:
        return Plan(projector=MethodPlan(args.method, {} if keep is None else {"keep": keep}))
    keep = default_keep(args.method, shape.vision.num_patches) if keep is None else keep
    make = costs.resampler if args.method == "resampler" else costs.after_tower
    return make(shape, keep)


def _ivtp(args: argparse.Namespace, shape: costs.ModelShape) -> Plan:
    """The plan of `export --method ivtp`, with counts or grouped layers of one's own."""
    allowed = {"visual_tokens", "survivors", "decoder_layers", "placement"}
    _refuse(args, allowed=allowed, why="with ivtp")
    num_keep = _last_count(args, shape.vision.num_patches)
    own = {"num_keep": num_keep, "keep_ratio": None}
    plan = _exported(args, own, shape)
    if args.survivors is None and args.decoder_layers is None:
        return plan
    fitted = ivtp_plan(
        shape,
        64 if num_keep is None else num_keep,
        args.survivors,
        3 if args.group_layers is None else args.group_layers,
        args.decoder_layers,
    )
    return replace(fitted, pseudo_cls=plan.pseudo_cls)


def _last_count(args: argparse.Namespace, num_visual: int) -> Any:
    """Tokens at the end, if an option names them; else None."""
    named = _one_of(args, "visual_tokens", "num_keep", "keep_ratio", "survivors")
    if args.keep_ratio is None:
        return None if args.survivors is not None else named
    if len(args.keep_ratio) != 1:
        raise PatchsieveError("this method takes one keep ratio", found=len(args.keep_ratio))
    return num_to_keep(args.keep_ratio[0], num_visual)


def _only(args: argparse.Namespace, allowed: set[str], instead: str) -> None:
    """Refuse shortcuts of a plan that say nothing of a method before the decoder."""
    allowed = allowed | {"--method"}
    if others := [option for option in export.given_shortcuts(args) if option not in allowed]:
        raise PatchsieveError(
            f"--method {args.method} does not take these options here",
            found=", ".join(others),
            do=f"name the method by {instead}, as export does, or remove them",
        )


def _refuse(args: argparse.Namespace, *, allowed: set[str], why: str) -> None:
    """Refuse options that would have no effect."""
    idle = [_option(n) for n in _OWN if n not in allowed and getattr(args, n) is not None]
    if idle:
        raise PatchsieveError(f"an option has no effect {why}", found=", ".join(idle))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _print(facts: dict[str, Any], pruned: costs.Cost, full: costs.Cost) -> None:
    full_flops = full.flops.to_dict()
    rows: list[tuple[str, float, float, Callable[[float], str]]] = [
        (f"{part} FLOPs", count, full_flops[part], flops)
        for part, count in pruned.flops.to_dict().items()
    ]
    mean = "visual tokens, mean of layers"
    rows += [
        (mean, pruned.average_tokens, full.average_tokens, _mean),
        ("KV bytes of the prefill", pruned.kv_bytes, full.kv_bytes, size),
    ]
    if "kv_bytes_reserved" in facts:
        held = facts["kv_bytes_reserved"], facts["kv_bytes_reserved_unpruned"]
        rows.append(("KV bytes reserved", *held, size))
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
        f"{plural(facts['text_tokens'], 'text token')}, {plural(facts['images'], 'image')}, "
        f"{facts['precision']}, counted as {facts['convention']} (see --convention)"
    )
    if facts["is_costs_only"]:
        print(f"costs only: export makes no such plan of {facts['plan']} in this version")
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


def _mean(count: float) -> str:
    return f"{count:.4f}".rstrip("0").rstrip(".")
