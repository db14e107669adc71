"""`patchsieve calibrate CHECKPOINT --data DATA -o OUT`: thresholds that fit a model."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchsieve.cli.arguments import integers
from patchsieve.cli.output import Progress, print_json, require, table
from patchsieve.errors import PatchsieveError
from patchsieve.heads import CONFIG
from patchsieve.plan import GRID2D, TRAINED_RULES
from patchsieve.trained import LAYOUTS

if TYPE_CHECKING:
    from patchsieve.calibrate import Encoder
    from patchsieve.calibration.model import PrunedLlava
    from patchsieve.calibration.samples import Samples
    from patchsieve.heads import HeadsConfig


# Options that a training cannot change when it is resumed.
_OF_A_TRAINING = (
    "checkpoint",
    "method",
    "sites",
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
    add("--data", type=Path, required=True, help="LLaVA's JSON or JSONL, or chat messages")
    add("--image-folder", type=Path, help="what image paths are relative to (the data's folder)")
    add("--skip-missing", action="store_true", help="leave out records whose image is not there")
    add(
        "--method",
        default="atp",
        choices=("atp", "quantile", "fixed"),
        help="learn heads; or fix constants (quantile); or the number of tokens of a site, the "
        "best by ATP's scores, n, n r, n r^2, ... (fixed)",
    )
    add(
        "-o",
        "--out",
        type=Path,
        required=True,
        metavar="OUT",
        help="directory to make: heads, or with --train-lm a whole checkpoint",
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
        required=True,
        metavar="N",
        help="mean visual tokens over all layers (the paper's: 144 and 88 of 576)",
    )
    add("--held-out", type=Path, metavar="DATA", help="data to count survivors on (--data)")
    add(
        "--percentile", type=float, default=99.0, help="of survivors, to reserve behind a site (99)"
    )
    scores = parser.add_argument_group("scores (recorded in OUT)")
    scores.add_argument("--normalisation", default="minmax", help="minmax, rank, softmax or none")
    scores.add_argument("--modality", default="both", help="of S_red: both, self or cross")
    scores.add_argument("--causal", action="store_true", help="eq. 3 over causal pairs only")
    scores.add_argument("--hidden", type=int, default=64, help="width of a threshold module (64)")
    train = parser.add_argument_group("training (atp)")
    add = train.add_argument
    add("--steps", type=int, help="optimiser steps, instead of --epochs")
    add("--epochs", type=float, default=1.0, help="passes over the data (1)")
    add("--batch-size", type=int, default=4, help="samples of one device at a time (4)")
    add("--accumulate", type=int, default=1, help="batches that one step sums (1)")
    add("--learning-rate", type=float, default=1e-4, help="of the heads (1e-4)")
    add(
        "--train-lm",
        action="store_true",
        help="train the language model and the projector too; OUT is then a whole checkpoint",
    )
    add(
        "--hard",
        action="store_true",
        help="--train-lm: finish a checkpoint that was trained so: tokens fall as in a bundle, "
        "without soft masks, and its thresholds only keep the target",
    )
    add("--lm-learning-rate", type=float, default=2e-5, help="of the language model (2e-5)")
    add(
        "--positions",
        choices=TRAINED_RULES,
        help="--train-lm: of image tokens: grid2d (default), by row and column; or original, in "
        "a row",
    )
    add(
        "--sections",
        choices=LAYOUTS,
        help="grid2d: rotary frequencies by time, row and column as Qwen2-VL's (mrope, default), "
        "or by row and column alone (2d)",
    )
    add("--lambda-atp", type=float, default=0.05, help="weight of eq. 12 (0.05)")
    add("--lambda-target", type=float, default=0.2, help="weight of eq. 13 (0.2)")
    add("--heads", type=Path, metavar="DIR", help="go on from these heads, not from new ones")
    add("--initial-theta-r", type=float, default=0.12, help="theta_r before training (0.12)")
    add(
        "--initial-theta-s",
        type=float,
        default=0.88,
        help="theta_s before training; a low one lets the finest grid through, and training may "
        "stay there (0.88)",
    )
    add("--temperature", type=float, default=50.0, help="T of eqs. 9 and 10 (50)")
    add("--bf16", action="store_true")
    add("--gradient-checkpointing", action="store_true")
    add("--workers", type=int, default=0, help="processes that load data (0)")
    add("--save-steps", type=int, default=500, help="steps between checkpoints (500)")
    add("--resume", action="store_true", help="go on from OUT.partial")
    add("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Calibrate, save the heads or the checkpoint, print what survives."""
    libraries = ("torch", "transformers", "accelerate", "safetensors")
    require(libraries, "cpu,export,calibration", "calibrate")
    _check_options(args)
    if os.path.lexists(args.out):
        raise PatchsieveError(
            f"{args.out} exists already", do="remove it, or choose another name with -o"
        )
    partial = args.out.with_name(args.out.name + ".partial")
    if args.resume and not partial.is_dir():
        raise PatchsieveError(
            "there is nothing to resume", found=f"no {partial}", do="start without --resume"
        )
    progress, started = Progress(args.json), time.monotonic()
    progress("loading the checkpoint", 0.0)
    model, samples, held_out, encoder = _load(args)
    if args.method == "atp" or args.train_lm:
        history = _train(args, model, samples, partial, progress)
    else:
        history = []
        if args.method == "quantile":
            _fix(args, model, samples, progress)
    config, report = _measure(args, model, held_out, progress)
    progress.done()
    if not _is_main_process():
        return 0
    _save(args, partial, config, model, history, encoder)
    report |= {
        "checkpoint" if args.train_lm else "heads": str(args.out),
        "position_rule": encoder.trained.position_rule,
        "records": len(samples),
        "records_without_image": samples.missing,
        "seconds": round(time.monotonic() - started, 3),
    }
    _tell(args, report)
    return 0


def _tell(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Print what was learned, and how to use it."""
    if args.json:
        print_json(report)
        return
    what = "language model and heads" if args.train_lm else "heads"
    seconds = f"{report['seconds']:.1f} s"
    print(f"{args.out}: {args.method} {what} from {report['records']} records, {seconds}")
    if missing := report["records_without_image"]:
        print(f"  {missing} records left out: their images are not there")
    columns = ("layer", "mean tokens", "fewest", "most", "reserved")
    rows = [tuple(site[key] for key in columns) for site in report["sites"]]
    print(table(columns, rows))
    print(
        f"average over all layers {report['average_tokens']:.1f} tokens, target "
        f"{args.target_tokens:g}\n"
        + (
            f"export with: patchsieve export {args.out} -o BUNDLE --method atp"
            if args.train_lm
            else f"export with: --method atp --heads {args.out}  ({CONFIG} holds the sites)"
        )
    )


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options that would have no effect."""
    if args.train_lm and args.method == "quantile":
        raise PatchsieveError(
            "--train-lm moves the scores that constants are fixed to",
            found="--method quantile",
            expected="atp or fixed",
            do="train first, then fix constants of what was trained",
        )
    if args.heads is not None and args.method != "atp":
        raise PatchsieveError("only atp learns heads", found=f"--method {args.method} --heads")
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
            "the positions are those of the checkpoint that --hard goes on from",
            found=f"--{given[0]}",
            do="leave it away",
        )
    if given and not args.train_lm:
        raise PatchsieveError(
            "a frozen language model keeps the positions that it was trained with",
            found=f"--{given[0]}",
            do="add --train-lm, or leave it away",
        )
    if args.sections is not None and args.positions == TRAINED_RULES[0]:
        raise PatchsieveError("--sections is of --positions grid2d", found=args.positions)


def _load(args: argparse.Namespace) -> tuple[PrunedLlava, Samples, Samples, Encoder]:
    import torch
    from transformers import LlavaForConditionalGeneration

    from patchsieve.calibrate import Encoder
    from patchsieve.calibration.model import Losses, PrunedLlava
    from patchsieve.calibration.records import Records
    from patchsieve.calibration.samples import Samples
    from patchsieve.calibration.survivors import geometric_counts
    from patchsieve.calibration.thresholds import (
        constant_heads,
        fixed_counts,
        go_on_from,
        learned_heads,
    )
    from patchsieve.pruning.atp import ATP

    positions = (args.positions or GRID2D) if args.train_lm and not args.hard else None
    encoder = Encoder(args.checkpoint, positions, args.sections)

    def read(path: Path) -> Samples:
        return Samples(Records(path, args.image_folder), encoder, skip_missing=args.skip_missing)

    samples = read(args.data)
    held_out = samples if args.held_out is None else read(args.held_out)
    # Steps of 2e-5 are lost in bfloat16 weights: those that are trained stay float32, and --bf16
    # computes with a copy.
    is_half = args.bf16 and not args.train_lm
    llava: Any = LlavaForConditionalGeneration.from_pretrained(
        encoder.directory,
        dtype=torch.bfloat16 if is_half else torch.float32,
        # On a CPU the backward pass of SDPA is slower than that of plain products.
        attn_implementation=None if torch.cuda.is_available() else "eager",
    )
    num_layers = llava.config.text_config.num_hidden_layers
    _check_sites(args.sites, num_layers)
    torch.manual_seed(args.seed)
    if args.method == "atp":
        initial = (args.initial_theta_r, args.initial_theta_s)
        starts = learned_heads(args.sites, encoder.grid, args.hidden, initial)
    elif args.method == "quantile":
        starts = {site: constant_heads(encoder.grid) for site in args.sites}
    else:
        num_visual = len(encoder.patch_ids)
        counts = geometric_counts(num_visual, args.sites, num_layers, args.target_tokens)
        starts = fixed_counts(args.sites, counts, encoder.grid)
    methods = {
        site: ATP(
            thresholds=thresholds,
            normalisation=args.normalisation,
            modality=args.modality,
            causal=args.causal,
        )
        for site, thresholds in starts.items()
    }
    losses = Losses(args.target_tokens, args.lambda_atp, args.lambda_target, args.temperature)
    if args.hard:  # which tokens are worth their cost is no longer learned
        losses = replace(losses, lambda_atp=0.0)
    if args.method == "fixed":  # no budget is left to learn
        losses = replace(losses, target_tokens=None, lambda_atp=0.0)
    model = PrunedLlava(
        llava,
        methods,
        encoder.patch_ids.tolist(),
        encoder.grid,
        losses,
        sections=encoder.trained.rotary_sections,
        train_lm=args.train_lm,
    )
    model.is_hard = args.hard
    if heads := _heads_of(args, encoder):
        go_on_from(heads, model)
    return model, samples, held_out, encoder


def _heads_of(args: argparse.Namespace, encoder: Encoder) -> Path | None:
    """Heads to go on from; with --hard the checkpoint's own, unless others are given."""
    if args.heads is not None or not args.hard or args.method != "atp":
        found: Path | None = args.heads
        return found
    if encoder.heads is None:
        raise PatchsieveError(
            "--hard goes on from thresholds that were learned",
            found=f"none in {args.checkpoint}",
            do="train with --train-lm alone before, or give --heads",
        )
    return encoder.heads


def _check_sites(sites: list[int], layers: int) -> None:
    if sites != sorted(set(sites)) or not 0 < sites[0] <= sites[-1] < layers:
        raise PatchsieveError(
            "the sites cannot be used",
            found=sites,
            expected=f"ascending layers from 1 to {layers - 1}",
        )


def _train(
    args: argparse.Namespace,
    model: PrunedLlava,
    samples: Samples,
    partial: Path,
    progress: Progress,
) -> list[dict[str, Any]]:
    from patchsieve.calibration.train import HeadsTrainer, TrainingOptions, last_checkpoint

    options = TrainingOptions(
        **{name: getattr(args, name) for name in TrainingOptions.__dataclass_fields__}
    )
    last = last_checkpoint(partial)
    if _is_main_process():
        _check_partial(args, partial, last)
    progress("training", 0.1)
    trainer = HeadsTrainer(model, samples, options, partial, quiet=args.json)
    trainer.train(resume_from_checkpoint=str(last) if args.resume and last else None)
    trainer.release()
    return trainer.state.log_history


def _check_partial(args: argparse.Namespace, partial: Path, last: Path | None) -> None:
    """Refuse to mix trainings: what is resumed must be what is asked for."""
    path = partial / "asked.json"
    asked = {name: getattr(args, name) for name in _OF_A_TRAINING}
    if not args.resume:
        if last is not None:
            raise PatchsieveError(
                f"{partial} holds a training that was interrupted",
                found=last.name,
                do="add --resume to go on with it, or remove it",
            )
        partial.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asked) + "\n", encoding="utf-8")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PatchsieveError(f"{partial} cannot be resumed", found=error) from error
    other = [name for name in _OF_A_TRAINING if found.get(name) != asked[name]]
    if other:
        raise PatchsieveError(
            "the training to resume was another",
            found=", ".join(f"{name} {asked[name]}" for name in other),
            expected=", ".join(f"{name} {found.get(name)}" for name in other),
            do=f"give the same options, or remove {partial}",
        )


def _fix(
    args: argparse.Namespace, model: PrunedLlava, samples: Samples, progress: Progress
) -> None:
    from patchsieve.calibration.survivors import fix_thresholds

    fix_thresholds(model, samples, args.target_tokens, args.batch_size, progress)


def _measure(
    args: argparse.Namespace, model: PrunedLlava, samples: Samples, progress: Progress
) -> tuple[HeadsConfig, dict[str, Any]]:
    """Count survivors on held-out data: the budgets, and the report."""
    from patchsieve.calibration.survivors import budgets, count_survivors
    from patchsieve.calibration.thresholds import scores_of
    from patchsieve.heads import HeadsConfig
    from patchsieve.pruning.training import average_tokens

    counts = count_survivors(model, samples, args.batch_size, progress)
    sites, num_visual = list(counts), len(model.patch_ids)
    means = [sum(numbers) / len(numbers) for numbers in counts.values()]
    reserved = budgets(counts, args.percentile)
    config = HeadsConfig(
        sites=tuple(sites),
        grid=model.grid,
        hidden=args.hidden if args.method == "atp" else 1,
        scores=scores_of(model),
        budgets=reserved,
    )
    average = average_tokens(means, sites, model.num_layers, num_visual)
    per_site = [
        {
            "layer": site,
            "mean tokens": round(mean, 2),
            "fewest": min(counts[site]),
            "most": max(counts[site]),
            "reserved": room,
        }
        for site, mean, room in zip(sites, means, reserved, strict=True)
    ]
    return config, {"sites": per_site, "average_tokens": average, "target": args.target_tokens}


def _save(
    args: argparse.Namespace,
    partial: Path,
    config: HeadsConfig,
    model: PrunedLlava,
    history: list[dict[str, Any]],
    encoder: Encoder,
) -> None:
    """Put what was learned in place, whole; the Trainer's checkpoints have served."""
    import shutil

    from patchsieve.calibrate import save_checkpoint
    from patchsieve.calibration.train import head_tensors
    from patchsieve.heads import save_heads
    from patchsieve.writing import whole_or_nothing

    with whole_or_nothing(args.out) as folder:
        if args.train_lm:
            save_checkpoint(folder, model, config, head_tensors(model), encoder)
        else:
            save_heads(folder, config, head_tensors(model))
        lines = "".join(json.dumps(entry) + "\n" for entry in history)
        (folder / "log.jsonl").write_text(lines, encoding="utf-8")
    shutil.rmtree(partial, ignore_errors=True)


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
