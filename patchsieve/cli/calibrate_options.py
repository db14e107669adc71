"""The options of `patchsieve calibrate`, and which of them exclude each other."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from patchsieve.cli.arguments import integers, numbers
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import TRAINED_RULES
from patchsieve.contract.trained import LAYOUTS

# Options that a training cannot change when it is resumed.
_OF_A_TRAINING = (
    "checkpoint",
    "revision",
    "data",
    "image_folder",
    "skip_missing",
    "method",
    "sites",
    "target_tokens",
    "counts",
    "parts",
    "lambda_atp",
    "lambda_target",
    "temperature",
    "learning_rate",
    "lm_learning_rate",
    "batch_size",
    "accumulate",
    "seed",
    "normalisation",
    "causal",
    "modality",
    "hidden",
    "train_lm",
    "hard",
    "positions",
    "sections",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
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
        "--method",
        default="atp",
        choices=("atp", "quantile", "fixed"),
        help="atp (default) learns heads; quantile fixes constant thresholds; fixed keeps the same "
        "number of tokens for every image, the best by ATP's scores",
    )
    add(
        "-o",
        "--out",
        type=Path,
        required=True,
        metavar="OUT",
        help="directory to write: heads, or with --train-lm a whole checkpoint",
    )
    add(
        "--sites",
        type=integers,
        required=True,
        metavar="LAYERS",
        help="layers at whose input to prune; the paper's are 4,14,24 of 32",
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
        "--held-out", type=Path, metavar="DATA", help="data to count survivors on (default: --data)"
    )
    add(
        "--percentile",
        type=float,
        default=99.0,
        help="share of images, in per cent, whose survivors fit the reserved tokens (default: 99)",
    )
    scores = parser.add_argument_group("scores (recorded in OUT)")
    scores.add_argument(
        "--normalisation",
        default="minmax",
        help="how ATP scales its scores: minmax (default), rank, softmax, none",
    )
    scores.add_argument(
        "--modality", default="both", help="scores in S_red: both (default), self or cross"
    )
    scores.add_argument(
        "--parts",
        choices=("both", "redundant", "spatial"),
        default="both",
        help="atp: which rule keeps a token: redundant (S_red above theta_r), spatial (S_spatial "
        "above theta_s), or both (default: either is enough)",
    )
    scores.add_argument(
        "--causal", action="store_true", help="eq. 3 over causal pairs only (default: all pairs)"
    )
    scores.add_argument(
        "--hidden", type=int, default=64, help="width of a threshold module (default: 64)"
    )
    train = parser.add_argument_group("training (atp)")
    add = train.add_argument
    add("--steps", type=int, help="optimiser steps (default: what --epochs gives)")
    add("--epochs", type=float, default=1.0, help="passes over the data (default: 1)")
    add("--batch-size", type=int, default=4, help="samples in a batch on each device (default: 4)")
    add("--accumulate", type=int, default=1, help="batches in an optimiser step (default: 1)")
    add(
        "--learning-rate",
        type=float,
        default=1e-4,
        help="learning rate of the heads (default: 1e-4)",
    )
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
        default=2e-5,
        help="learning rate of the language model (default: 2e-5)",
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
    add("--lambda-atp", type=float, default=0.05, help="weight of eq. 12 (default: 0.05)")
    add("--lambda-target", type=float, default=0.2, help="weight of eq. 13 (default: 0.2)")
    add("--heads", type=Path, metavar="DIR", help="continue from these heads (default: new ones)")
    add(
        "--initial-theta-r",
        type=float,
        default=0.12,
        help="theta_r before training (default: 0.12)",
    )
    add(
        "--initial-theta-s",
        type=float,
        help="theta_s before training (default: 0.88, with --parts spatial 0.2); a low one lets "
        "the finest grid through, and training may stay there",
    )
    add("--temperature", type=float, default=50.0, help="T of eqs. 9 and 10 (default: 50)")
    add("--bf16", action="store_true", help="compute in bfloat16 (default: float32)")
    add(
        "--gradient-checkpointing",
        action="store_true",
        help="compute activations again in the backward pass, for less memory",
    )
    add("--workers", type=int, default=0, help="processes that load data (default: 0)")
    add("--save-steps", type=int, default=500, help="steps between checkpoints (default: 500)")
    add("--resume", action="store_true", help="continue the interrupted training in OUT.partial")
    add("--seed", type=int, default=0, help="seed of data order and new heads (default: 0)")


def trains(args: argparse.Namespace) -> bool:
    """Whether something learns."""
    return bool(args.method == "atp" or args.train_lm)


def check(args: argparse.Namespace) -> None:
    """Refuse options that would have no effect."""
    if args.train_lm and args.method == "quantile":
        raise PatchsieveError(
            "--train-lm changes the scores, so constants that were fixed to them would be wrong",
            found="--method quantile",
            expected="atp or fixed",
            do="train first, then fix constants of what was trained",
        )
    if not 0 < args.percentile <= 100:
        raise PatchsieveError(
            "--percentile is a percentage", found=args.percentile, expected="above 0, up to 100"
        )
    if args.method != "atp" and args.normalisation == "none":
        raise PatchsieveError(
            "scores that are not normalised have no constant threshold",
            found=f"--method {args.method} --normalisation none",
            expected="minmax, rank or softmax",
        )
    if args.method == "fixed" and args.normalisation == "rank":
        raise PatchsieveError(
            "ranks tie, so that no threshold lets a fixed number through",
            found="--method fixed --normalisation rank",
            expected="minmax or softmax",
        )
    if args.resume and not trains(args):
        raise PatchsieveError(
            "only a training is resumed", found=f"--resume --method {args.method}"
        )
    if args.heads is not None and args.method != "atp":
        raise PatchsieveError("only atp learns heads", found=f"--method {args.method} --heads")
    _check_numbers(args)
    if args.parts != "both" and args.method != "atp":
        raise PatchsieveError(
            f"--method {args.method} has no spatial pruning to leave out or to leave alone",
            found=f"--parts {args.parts}",
            do="remove --parts, or learn heads with --method atp",
        )
    if args.method == "fixed" and args.modality != "both":
        raise PatchsieveError(
            "fixed numbers go by both scores", found=f"--modality {args.modality}"
        )
    if args.hard and not args.train_lm:
        raise PatchsieveError(
            "hard masks teach the language model alone", found="--hard", do="add --train-lm"
        )
    given = [name for name in ("positions", "sections") if getattr(args, name) is not None]
    if args.hard and given:
        raise PatchsieveError(
            "the positions are those of the checkpoint that --hard continues",
            found=f"--{given[0]}",
            do=f"remove --{given[0]}",
        )
    if given and not args.train_lm:
        raise PatchsieveError(
            "a frozen language model keeps the positions that it was trained with",
            found=f"--{given[0]}",
            do=f"add --train-lm, or remove --{given[0]}",
        )
    if args.sections is not None and args.positions == TRAINED_RULES[0]:
        raise PatchsieveError("--sections is of --positions grid2d", found=args.positions)


def _check_numbers(args: argparse.Namespace) -> None:
    """Refuse a budget that is not given, given twice, or of another method."""
    if (args.counts is None) == (args.target_tokens is None):
        raise PatchsieveError(
            "calibrate needs one budget of tokens",
            found="none" if args.counts is None else "--target-tokens and --counts",
            expected="--target-tokens, or --counts with --method quantile or fixed",
            do="give one of them",
        )
    if args.counts is None:
        return
    if args.method == "atp":
        raise PatchsieveError(
            "learned heads find the number of tokens of each site themselves",
            found="--counts --method atp",
            do="give --target-tokens, or --method quantile or fixed",
        )
    if len(args.counts) != len(args.sites):
        raise PatchsieveError(
            "--counts and --sites do not pair",
            found=f"{len(args.counts)} numbers for {len(args.sites)} sites",
            expected="one number for each site",
            do="correct --counts",
        )
    if args.method == "fixed" and any(count % 1 for count in args.counts):
        raise PatchsieveError(
            "every image keeps a whole number of tokens",
            found=", ".join(f"{count:g}" for count in args.counts),
            expected="whole numbers with --method fixed",
            do="round --counts, or take --method quantile, whose counts are means",
        )


def check_sites(sites: list[int], layers: int) -> None:
    """Refuse layers that cannot prune one after the other."""
    if sites != sorted(set(sites)) or not 0 < sites[0] <= sites[-1] < layers:
        raise PatchsieveError(
            "the sites cannot be used",
            found=sites,
            expected=f"ascending layers from 1 to {layers - 1}",
        )


def check_partial(args: argparse.Namespace, partial: Path, last: Path | None) -> None:
    """Refuse to mix trainings: what is resumed must be what is asked for."""
    path = partial / "asked.json"
    given = {name: getattr(args, name) for name in _OF_A_TRAINING}
    asked = {name: str(v) if isinstance(v, Path) else v for name, v in given.items()}
    if not args.resume:
        if last is not None:
            raise PatchsieveError(
                f"{partial} holds a training that was interrupted",
                found=last.name,
                do="add --resume to continue it, or remove it",
            )
        partial.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asked) + "\n", encoding="utf-8")
        return
    try:
        # A training that began before these options were there has neither.
        before = {"parts": "both", "counts": asked["counts"]}
        found = before | json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:  # TypeError: no object
        raise PatchsieveError(f"{partial} cannot be resumed", found=error) from error
    other = [name for name in _OF_A_TRAINING if found.get(name) != asked[name]]
    if other:
        raise PatchsieveError(
            "the training to resume was another",
            found=", ".join(f"{name} {asked[name]}" for name in other),
            expected=", ".join(f"{name} {found.get(name)}" for name in other),
            do=f"give the same options, or remove {partial}",
        )
