"""The options of a plan, which `export` and `cost` take: made of the catalogue of methods."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from patchsieve import plans
from patchsieve.cli.arguments import integers, numbers
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import NO_PRUNING, POSITION_RULES, Plan
from patchsieve.pruning import catalogue
from patchsieve.pruning.entry import DECODER, ENCODER, PLACES, PROJECTOR, RECIPE, Entry, Option
from patchsieve.pruning.recipes import Size

METHODS = tuple(dict.fromkeys((NO_PRUNING, *catalogue.names(DECODER), *catalogue.names(RECIPE))))
_OF_PLANS = ("method", "sites", "budget", "encoder", "projector", "positions")
_TYPES: dict[str, Any] = {
    "count": int,
    "integers": integers,
    "ratio": numbers,
    "number": float,
    "text": str,
    "folder": Path,
}


def add_arguments(group: Any) -> None:
    """Declare the options, for an argparse parser or a group of it."""
    add = group.add_argument
    of_decoder = f"{', '.join(METHODS[1:-1])} or {METHODS[-1]}"
    add("--method", metavar="METHOD", help=f"prune in the decoder: none (default), {of_decoder}")
    fitted = [entry.name for entry in catalogue.ENTRIES if entry.published is not None]
    add(
        "--sites",
        type=integers,
        metavar="LAYERS",
        help="layers at whose input to prune: 4,14,24"
        + (f" (default of {', '.join(fitted)}: as published)" if fitted else ""),
    )
    add(
        "--budget",
        type=integers,
        metavar="N",
        help="visual tokens of an image to reserve after the sites, one number or one per site "
        "(default: what the method keeps)",
    )
    _add_options(group, (RECIPE, DECODER))
    help = f"prune inside the vision tower: {', '.join(catalogue.names(ENCODER))}"
    add("--encoder", metavar="METHOD", help=help)
    _add_options(group, (ENCODER,))
    help = f"prune between tower and decoder: {', '.join(catalogue.names(PROJECTOR))}"
    add("--projector", metavar="METHOD", help=help)
    _add_options(group, (PROJECTOR,))
    add(
        "--positions",
        choices=POSITION_RULES,
        help="numbers of the image tokens that enter the decoder: original, with gaps; grid2d, by "
        "row and column; or contiguous (default: as the checkpoint was trained)",
    )


def given(args: argparse.Namespace) -> list[str]:
    """The options of a plan that were given, as they are typed."""
    named = (*_OF_PLANS, *(keyword for keyword, _ in _by_keyword(PLACES)))
    return [flag_of(name) for name in named if getattr(args, name) is not None]


def flag_of(keyword: str) -> str:
    """An option as it is typed."""
    return "--" + keyword.replace("_", "-")


def plan_of(args: argparse.Namespace, size: Callable[[], Size], **further: Any) -> Plan:
    """The plan of a file, or of the options.

    Args:
        args: The parsed arguments.
        size: Measures the model, where the plan is fitted to it.
        further: Options of `patchsieve.plans.build` instead of those in `args`.

    Raises:
        PatchsieveError: Both are given, or the options make no plan.
    """
    if args.plan is not None:
        if used := given(args):
            raise PatchsieveError("--plan says it all", found=", ".join(used), do="remove them")
        return Plan.from_file(Path(args.plan))
    options = {name: getattr(args, name) for name in _OF_PLANS}
    options |= {keyword: getattr(args, keyword) for keyword, _ in _by_keyword(PLACES)}
    options |= further
    is_fitted = plans.needs_size(options["method"], options["sites"])
    return plans.build(**options, size=size() if is_fitted else None)


def _add_options(group: Any, places: tuple[str, ...]) -> None:
    """Declare the options of all methods of some places, each once."""
    for keyword, pairs in _by_keyword(places):
        _add(group, flag_of(keyword), pairs[0][1], _help(pairs))


def add_option(group: Any, entry: Entry, name: str) -> None:
    """Declare one option of one method, for a command of that method alone."""
    option = entry.option(name)
    default = default_of(option)
    help = option.help + (f" (default: {default})" if default else "")
    _add(group, flag_of(name), option, help)


def _add(group: Any, flag: str, option: Option, help: str) -> None:
    words: dict[str, Any] = {"help": help}
    if option.kind == "flag":
        words |= {"action": "store_true", "default": None}
    else:
        words |= {"type": _TYPES[option.kind], "choices": option.choices or None}
        words |= {"metavar": option.metavar}
    group.add_argument(flag, **words)


def _by_keyword(places: tuple[str, ...]) -> Iterator[tuple[str, list[tuple[Entry, Option]]]]:
    """Every option on the command line, with the methods that have it."""
    having: dict[str, list[tuple[Entry, Option]]] = {}
    for entry in catalogue.ENTRIES:
        for option in entry.options if entry.place in places else ():
            # The decoder's part of a recipe is set by the recipe's options.
            is_part = entry.place == DECODER and catalogue.find(RECIPE, entry.name) is not None
            if option.word is not None and not is_part:
                having.setdefault(entry.keyword(option), []).append((entry, option))
    yield from having.items()


def _help(pairs: list[tuple[Entry, Option]]) -> str:
    """What an option sets, for whom, and its default."""
    names = [entry.name for entry, _ in pairs]
    place = pairs[0][0].place
    everyone = catalogue.names(place) if place in (ENCODER, PROJECTOR) else []
    who = "" if names == everyone else f"{', '.join(names)}: "
    by_default: dict[str, list[str]] = {}
    for entry, option in pairs:
        by_default.setdefault(default_of(option), []).append(entry.name)
    usual = max(by_default, key=lambda default: len(by_default[default]))
    others = [f"{', '.join(n)}: {d}" for d, n in by_default.items() if d != usual and d]
    default = "; ".join([*([usual] if usual else []), *others])
    return f"{who}{pairs[0][1].help}" + (f" (default: {default})" if default else "")


def default_of(option: Option) -> str:
    """An option's default in words; nothing where it has none."""
    if option.shown or option.default is None:
        return option.shown
    if isinstance(option.default, bool):
        return "yes" if option.default else "no"
    if isinstance(option.default, tuple):
        return ",".join(map(str, option.default))
    return str(option.default)
