"""The options of `patchsieve calibrate`; their defaults and checks are calibration/options.py."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from patchsieve.calibration.options import (
    METHODS,
    CalibrationOptions,
    Data,
    LanguageModelOptions,
    ScoreOptions,
    TrainingOptions,
)
from patchsieve.calibration.statistics_options import StatisticsOptions
from patchsieve.cli import calibrate_statistics, plan_options
from patchsieve.cli.arguments import integers, numbers
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import TRAINED_RULES
from patchsieve.contract.trained import LAYOUTS
from patchsieve.pruning import catalogue
from patchsieve.pruning.entry import DECODER

Kind = TypeVar("Kind")
_KINDS = (CalibrationOptions, ScoreOptions, LanguageModelOptions, TrainingOptions)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    _add_data(parser)
    _add_budget(parser)
    _add_scores(parser.add_argument_group("scores (recorded in OUT)"))
    training = parser.add_argument_group("training (atp)")
    _add_training(training)
    _add_language_model(training)
    _add_heads(training)
    calibrate_statistics.add_arguments(parser.add_argument_group("activation statistics"))
    parser.set_defaults(**_defaults())


def options_of(args: argparse.Namespace) -> CalibrationOptions:
    """The options that the command line gives.

    Raises:
        PatchsieveError: They contradict each other.
    """
    calibrate_statistics.check_absent(args)
    if args.sites is None:
        raise PatchsieveError(
            "thresholds need layers at which to prune",
            do="give --sites, such as 4,14,24, or collect activation statistics with --statistics",
        )
    counts = None if args.counts is None else tuple(args.counts)
    return _fill(
        CalibrationOptions,
        args,
        sites=tuple(args.sites),
        counts=counts,
        scores=_fill(ScoreOptions, args),
        language_model=_fill(LanguageModelOptions, args),
        training=_fill(TrainingOptions, args),
    )


def statistics_of(args: argparse.Namespace) -> StatisticsOptions:
    """The options that the command line gives with --statistics.

    Raises:
        PatchsieveError: There are options of thresholds among them.
    """
    return calibrate_statistics.options_of(args, {"sites": None, "held_out": None} | _defaults())


def data_of(args: argparse.Namespace) -> Data:
    """The conversations that the command line names."""
    return _fill(Data, args, path=args.data)


def _defaults() -> dict[str, Any]:
    """Options of thresholds that have a default."""
    defaults = {field.name: field.default for kind in _KINDS for field in fields(kind)}
    return {name: value for name, value in defaults.items() if value is not MISSING}


def _fill(kind: type[Kind], args: argparse.Namespace, **given: Any) -> Kind:
    """A dataclass whose fields are named as the options; `given` goes before the command line."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in vars(args).items() if name in names} | given)


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", help="Hugging Face directory or hub id")
    add("--revision", help="branch, tag or commit of a hub id (default: its main branch)")
    add(
        "--data",
        type=Path,
        required=True,
        help="conversations: LLaVA's JSON or JSONL, or chat messages",
    )
    add("--image-folder", type=Path, help="folder of relative image paths (default: the data's)")
    add("--skip-missing", action="store_true", help="skip records whose image does not exist")
    add(
        "-o",
        "--out",
        type=Path,
        required=True,
        metavar="OUT",
        help="directory to write: heads, or with --train-lm a whole checkpoint; with --statistics "
        "a file",
    )
    add(
        "--held-out", type=Path, metavar="DATA", help="data to count survivors on (default: --data)"
    )


def _add_budget(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--method",
        choices=METHODS,
        help="atp (default) learns heads; quantile fixes constant thresholds; fixed keeps the same "
        "number of tokens for every image, the best by ATP's scores",
    )
    add(
        "--sites",
        type=integers,
        metavar="LAYERS",
        help="layers at whose input to prune, such as the paper's 4,14,24 of 32; required without "
        "--statistics",
    )
    add(
        "--target-tokens",
        type=float,
        metavar="N",
        help="mean visual tokens over all layers (the paper's: 144 and 88 of 576); quantile and "
        "fixed keep one share of the tokens at every site to meet it",
    )
    add(
        "--counts",
        type=numbers,
        metavar="N,N,...",
        help="quantile, fixed: tokens that each site leaves, instead of --target-tokens: means of "
        "all images (quantile), or whole numbers (fixed)",
    )
    add(
        "--percentile",
        type=float,
        help="share of images, in per cent, whose survivors fit the reserved tokens (default: "
        "%(default)g)",
    )


def _add_scores(group: argparse._ArgumentGroup) -> None:
    for field in fields(ScoreOptions):  # options of ATP, as plans have them
        plan_options.add_option(group, catalogue.entry(DECODER, "atp"), field.name)
    group.add_argument(
        "--hidden", type=int, help="width of a threshold module (default: %(default)s)"
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--steps", type=int, help="optimiser steps (default: what --epochs gives)")
    add("--epochs", type=float, help="passes over the data (default: %(default)g)")
    add("--batch-size", type=int, help="samples in a batch on each device (default: %(default)s)")
    add("--accumulate", type=int, help="batches in an optimiser step (default: %(default)s)")
    add("--learning-rate", type=float, help="learning rate of the heads (default: %(default)g)")
    add("--lambda-atp", type=float, help="weight of eq. 12 (default: %(default)g)")
    add("--lambda-target", type=float, help="weight of eq. 13 (default: %(default)g)")
    add("--temperature", type=float, help="T of eqs. 9 and 10 (default: %(default)g)")
    add("--bf16", action="store_true", help="compute in bfloat16 (default: float32)")
    add(
        "--gradient-checkpointing",
        action="store_true",
        help="compute activations again in the backward pass, for less memory",
    )
    add("--workers", type=int, help="processes that load data (default: %(default)s)")
    add("--save-steps", type=int, help="steps between checkpoints (default: %(default)s)")
    add("--resume", action="store_true", help="continue the interrupted run in OUT.partial")
    add(
        "--seed",
        type=int,
        help="seed of data order, new heads and drawn records (default: %(default)s)",
    )


def _add_language_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--train-lm",
        action="store_true",
        help="also train the language model and the projector; OUT is then a whole checkpoint",
    )
    add(
        "--hard",
        action="store_true",
        help="with --train-lm: continue a checkpoint that --train-lm made, dropping tokens as a "
        "bundle does, without soft masks; its thresholds only keep the target",
    )
    add(
        "--lm-learning-rate",
        type=float,
        help="learning rate of the language model (default: %(default)g)",
    )
    add(
        "--positions",
        choices=TRAINED_RULES,
        help="positions of image tokens with --train-lm: grid2d (default), by row and column; or "
        "original, in sequence",
    )
    add(
        "--sections",
        choices=LAYOUTS,
        help="rotary frequencies with grid2d: by time, row and column as Qwen2-VL (default: "
        "mrope), or by row and column (2d)",
    )


def _add_heads(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--heads", type=Path, metavar="DIR", help="continue from these heads (default: new ones)")
    add(
        "--initial-theta-r",
        type=float,
        help="theta_r before training (default: %(default)g)",
    )
    add(
        "--initial-theta-s",
        type=float,
        help="theta_s before training (default: 0.88, with --parts spatial 0.2); a low one lets "
        "the finest grid through, and training may stay there",
    )
