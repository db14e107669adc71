"""`export --method ivtp`: the whole of IVTP, fitted to the model, and its options."""

from __future__ import annotations

import argparse
from typing import Any

from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.files import read
from patchsieve.contract.plan import CLS_SOURCES, TEXTS, Plan, PseudoCls
from patchsieve.pruning import recipes
from patchsieve.pruning.recipes import Size

_RECIPE = {"num_keep": "num_keep", "group": "group_layers", "fusion": "fusion", "block": "block"}
_PSEUDO_CLS = {"text": "text", "tau": "tau", "cls": "visual_cls"}
OPTIONS = (*_RECIPE.values(), *_PSEUDO_CLS.values())  # by their names in the parsed arguments


def add_arguments(group: Any) -> None:
    """Declare the options."""
    add = group.add_argument
    add("--num-keep", type=int, metavar="N", help="ivtp, topk, tome: tokens kept of an image (64)")
    add("--group-layers", type=int, metavar="L", help="ivtp: layers of a group (3)")
    add(
        "--fusion",
        choices=("rollout", "single", "mean", "max", "multiply"),
        help="ivtp: how a group's layers become one score (rollout)",
    )
    add("--block", choices=("visual", "prefix"), help="ivtp: rows of its maps in the decoder")
    add("--text", choices=TEXTS, help="ivtp: which words of the question judge (clip)")
    add("--tau", type=float, help="ivtp: least cosine of a word that judges (0.2)")
    add(
        "--visual-cls",
        choices=CLS_SOURCES,
        help="ivtp, topk: the tower layer whose class token judges (last)",
    )


def plan(args: argparse.Namespace, used: list[str], size: Size | None = None) -> Plan:
    """The plan of `--method ivtp`.

    Args:
        args: The parsed arguments.
        used: Options of the plan that were given.
        size: The model; by default the one that `args` names.

    Raises:
        PatchsieveError: An option of another method was given, or the model is too small.
    """
    own = ["--method", *("--" + name.replace("_", "-") for name in OPTIONS)]
    if others := [option for option in used if option not in own]:
        raise PatchsieveError(
            "ivtp chooses its sites and counts by the model",
            found=", ".join(others),
            expected=", ".join(own),
            do="remove them, or write the plan into a file for --plan",
        )
    size = _size_of(args) if size is None else size
    judge = PseudoCls(**_given(args, _PSEUDO_CLS))
    return recipes.ivtp(size, pseudo_cls=judge, **_given(args, _RECIPE))


def _size_of(args: argparse.Namespace) -> Size:
    """The size of the model that `export` is given."""
    if args.reuse is not None:
        facts = read(args.reuse)
        return Size(facts.vision.num_patches, facts.text.num_layers)
    if args.checkpoint is None:
        raise PatchsieveError("export needs a checkpoint and -o BUNDLE, or --reuse BUNDLE")
    from patchsieve.export.source.checkpoint import locate, read_config

    config = read_config(locate(args.checkpoint, args.revision, check=read_config))
    side = config.vision_config.image_size // config.vision_config.patch_size
    return Size(side * side, config.text_config.num_hidden_layers)


def pseudo_cls(args: argparse.Namespace) -> PseudoCls:
    """The pseudo-CLS of `--method topk`: the visual CLS, unless words are asked for."""
    return PseudoCls(**{"text": "none"} | _given(args, _PSEUDO_CLS))


def check_other_method(args: argparse.Namespace) -> None:
    """Refuse options of IVTP beside another method."""
    of_method = {"topk": {"num_keep", *_PSEUDO_CLS.values()}, "tome": {"num_keep"}}
    allowed = of_method.get(args.method, set())
    given = [name for name in OPTIONS if getattr(args, name) is not None and name not in allowed]
    if given:
        raise PatchsieveError(
            f"{args.method} has no such options",
            found=", ".join("--" + name.replace("_", "-") for name in given),
            do="remove them, or take --method ivtp",
        )


def _given(args: argparse.Namespace, options: dict[str, str]) -> dict[str, Any]:
    values = {name: getattr(args, option) for name, option in options.items()}
    return {name: value for name, value in values.items() if value is not None}
