"""What `cost` takes beside the options of `export`: counts for their own sake, older spellings.

`--method gtp --visual-tokens 64` is `--encoder gtp --encoder-keep 64`. `--survivors` says how many
tokens are left where the method does not, and a few methods have costs alone.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from patchsieve import cost as costs
from patchsieve import plans
from patchsieve.cli import plan_options
from patchsieve.cli.arguments import integers
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import NO_PRUNING, Plan
from patchsieve.cost.methods import PLACEMENTS, before_decoder
from patchsieve.pruning import catalogue
from patchsieve.pruning.entry import ADAPTS, DECODER, ENCODER, NUMBER, PROJECTOR, RECIPE
from patchsieve.pruning.recipes import Size
from patchsieve.pruning.schedules import default_keep, num_to_keep

# The words of --place, and the plan's own. Methods that act at several are taken in this order.
_PLACES = {"tower": ENCODER, "output": PROJECTOR, "decoder": DECODER}
# What has a cost and no plan, and what makes it: after the tower.
COSTS_ONLY = {"resampler": costs.resampler, "tome": costs.after_tower}
_OWN = ("place", "survivors", "visual_tokens", "placement", "decoder_layers")


@dataclass(frozen=True)
class Chosen:
    """What is counted.

    Attributes:
        name: Of the plan, or of the method.
        plan: The plan, or counts that no plan has.
        survivors: Tokens left at each decoder site, where the plan does not say.
        is_exported: Export makes such a plan.
    """

    name: str
    plan: Plan | costs.Schedule
    survivors: list[int] | None = None
    is_exported: bool = True


def add_arguments(group: Any) -> None:
    """Declare the options."""
    add = group.add_argument
    add(
        "--place",
        choices=tuple(_PLACES),
        help="where --method acts, which may also be a method of the tower or after it, or "
        "resampler: there --sites are tower layers and --group-layers its groups (default: the "
        "decoder if --sites or --num-keep is given, or the method keeps a ratio or adapts; else "
        "the tower)",
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


def places_of(method: str) -> list[str]:
    """The words of --place at which the cost of a method is known, the usual one first."""
    known = [word for word, place in _PLACES.items() if catalogue.find(place, method)]
    known += ["output"] if method in COSTS_ONLY else []
    in_decoder = catalogue.find(DECODER, method)
    if in_decoder is not None and in_decoder.leaves != NUMBER:
        known.sort(key="decoder".__ne__)
    return known


def choose(args: argparse.Namespace, shape: costs.ModelShape) -> Chosen:
    """What the options of a plan ask to count; `--plan` is not among them."""
    if args.method in (None, NO_PRUNING) or catalogue.find(RECIPE, args.method):
        place = RECIPE if args.method not in (None, NO_PRUNING) else DECODER
        _check_place(args)
    else:
        place = _place(args)
    if place == RECIPE:
        return _recipe(args, shape)
    if place == ENCODER:
        return _in_tower(args, shape)
    if place == PROJECTOR:
        return _after_tower(args, shape)
    return _in_decoder(args, shape)


def refuse(args: argparse.Namespace, *, allowed: set[str], why: str) -> None:
    """Refuse options that would have no effect."""
    idle = [plan_options.flag_of(n) for n in _OWN if n not in allowed and _has(args, n)]
    if idle:
        raise PatchsieveError(
            f"an option has no effect {why}", found=", ".join(idle), do="remove it"
        )


def _check_place(args: argparse.Namespace) -> None:
    if args.place is not None:
        raise PatchsieveError(
            "--place has no effect without a method that has a choice",
            found=f"--place {args.place} --method {args.method}",
            do="remove --place",
        )


def _place(args: argparse.Namespace) -> str:
    """Where the method acts, in the plan's own word."""
    places = places_of(args.method)
    is_export = "decoder" in places and (_has(args, "sites") or _has(args, "num_keep"))
    place = args.place or ("decoder" if is_export else places[0] if places else None)
    if place not in places:
        known = [plan_options.METHODS, catalogue.names(ENCODER), catalogue.names(PROJECTOR)]
        names = dict.fromkeys(name for each in (*known, COSTS_ONLY) for name in each)
        raise PatchsieveError(
            "the cost of this method is not known"
            + ("" if place is None else f" at --place {place}"),
            found=str(args.method)[:80],
            expected=" or ".join(places) or ", ".join(names),
            do="correct --place" if places else "correct --method",
        )
    return _PLACES[place]


def _in_decoder(args: argparse.Namespace, shape: costs.ModelShape) -> Chosen:
    """The plan that export makes of the same options."""
    found = catalogue.find(DECODER, args.method or "")
    has_number = found is not None and found.leaves == NUMBER
    allowed = {"place", "survivors", "placement"} | ({"visual_tokens"} if has_number else set())
    refuse(args, allowed=allowed, why=f"with --method {args.method or NO_PRUNING} in the decoder")
    own: dict[str, Any] = {"num_keep": _one_of(args, "num_keep", "visual_tokens")}
    adapts = found is not None and found.leaves == ADAPTS
    if adapts:  # its ratio says how many it is taken to keep
        own["keep_ratio"] = None
    plan = plan_options.plan_of(args, lambda: size_of(shape), **own)
    survivors = survivors_of(args, plan)
    if found is not None:
        _one_of(args, "survivors", "keep_ratio")
    if adapts and _has(args, "keep_ratio"):
        ratios = args.keep_ratio * (len(plan.sites) if len(args.keep_ratio) == 1 else 1)
        entering = before_decoder(shape, plan).llm[0]
        survivors = [num_to_keep(ratio, entering) for ratio in ratios]
    return Chosen(args.method or plans.name_of(plan), plan, survivors)


def _in_tower(args: argparse.Namespace, shape: costs.ModelShape) -> Chosen:
    """The plan of `export --encoder METHOD`."""
    _check_only(args, {"--sites", "--keep-ratio", "--group-layers"}, "--encoder")
    refuse(args, allowed={"place", "survivors", "visual_tokens", "placement"}, why="in the tower")
    plan = plans.build(
        encoder=args.method,
        encoder_keep=_last_count(args, shape),
        encoder_counts=args.survivors,
        encoder_layers=args.sites,
        encoder_group=args.group_layers,
    )
    return Chosen(args.method, plan)


def _after_tower(args: argparse.Namespace, shape: costs.ModelShape) -> Chosen:
    """The plan of `export --projector METHOD`, or the counts of what export has not."""
    _check_only(args, {"--keep-ratio"}, "--projector")
    refuse(args, allowed={"place", "visual_tokens"}, why="after the tower")
    keep = _last_count(args, shape)
    if catalogue.find(PROJECTOR, args.method):
        return Chosen(args.method, plans.build(projector=args.method, projector_keep=keep))
    keep = default_keep(shape.vision.num_patches) if keep is None else keep
    return Chosen(args.method, COSTS_ONLY[args.method](shape, keep), is_exported=False)


def _recipe(args: argparse.Namespace, shape: costs.ModelShape) -> Chosen:
    """The plan of a recipe, with counts or grouped layers of one's own."""
    allowed = {"visual_tokens", "survivors", "decoder_layers", "placement"}
    refuse(args, allowed=allowed, why=f"with {args.method}")
    plan = plan_options.plan_of(
        args,
        lambda: size_of(shape),
        num_keep=_last_count(args, shape),
        keep_ratio=None,
        layers=args.decoder_layers,
        counts=args.survivors,
    )
    return Chosen(args.method, plan, is_exported=args.decoder_layers is None)


def size_of(shape: costs.ModelShape) -> Size:
    """What a recipe must know of a model."""
    return Size(shape.vision.num_patches, shape.text.num_layers)


def survivors_of(args: argparse.Namespace, plan: Plan) -> list[int] | None:
    """Tokens left at each decoder site, if the command says so and not the plan."""
    if args.survivors is not None and not plan.sites:
        raise PatchsieveError(
            "--survivors has no effect on a plan without decoder sites", do="remove --survivors"
        )
    survivors: list[int] | None = args.survivors
    return survivors


def _last_count(args: argparse.Namespace, shape: costs.ModelShape) -> int | None:
    """Tokens at the end, if an option names them."""
    named = _one_of(args, "visual_tokens", "num_keep", "keep_ratio", "survivors")
    if args.keep_ratio is None:
        return None if args.survivors is not None else named
    if len(args.keep_ratio) != 1:
        raise PatchsieveError(
            "this method takes one keep ratio",
            found=len(args.keep_ratio),
            do="give --keep-ratio one number",
        )
    return num_to_keep(args.keep_ratio[0], shape.vision.num_patches)


def _check_only(args: argparse.Namespace, allowed: set[str], instead: str) -> None:
    """Refuse options of a plan that say nothing of a method before the decoder."""
    allowed = allowed | {"--method"}
    if others := [option for option in plan_options.given(args) if option not in allowed]:
        raise PatchsieveError(
            f"--method {args.method} does not take these options here",
            found=", ".join(others),
            do=f"name the method by {instead}, as export does, or remove them",
        )


def _one_of(args: argparse.Namespace, *names: str) -> Any:
    """The value of the one option of these that is given, None without."""
    named = [name for name in names if _has(args, name)]
    if len(named) > 1:
        flags = [plan_options.flag_of(name) for name in named]
        raise PatchsieveError(
            "these options say the same thing",
            found=" and ".join(flags),
            do=f"remove {' or '.join(flags)}",
        )
    return getattr(args, named[0]) if named else None


def _has(args: argparse.Namespace, name: str) -> bool:
    return getattr(args, name) is not None
