"""`patchsieve calibrate CHECKPOINT --data DATA -o OUT`: thresholds that fit a model."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchsieve.cli.calibrate_options import add_arguments as add_arguments
from patchsieve.cli.calibrate_options import check, check_partial, check_sites, trains
from patchsieve.cli.output import Progress, print_json, require
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import GRID2D
from patchsieve.contract.writing import check_folder, check_new
from patchsieve.pruning.heads import CONFIG
from patchsieve.runtime.board.abilities import CALIBRATION
from patchsieve.tables import table

if TYPE_CHECKING:
    from patchsieve.calibration.checkpoint import Encoder
    from patchsieve.calibration.model import PrunedLlava
    from patchsieve.calibration.samples import Samples
    from patchsieve.pruning.heads import HeadsConfig


def run(args: argparse.Namespace) -> int:
    """Calibrate, save the heads or the checkpoint, print what survives."""
    require(CALIBRATION, "cpu,export,calibration", "calibrate")
    check(args)
    check_new(args.out)
    check_folder(args.out)
    partial = args.out.with_name(args.out.name + ".partial")
    if args.resume and not partial.is_dir():
        raise PatchsieveError(
            "there is nothing to resume", found=f"no {partial}", do="start without --resume"
        )
    progress, started = Progress(args.json or not _is_main_process()), time.monotonic()
    progress("loading the checkpoint", 0.0)
    model, samples, held_out, encoder = _load(args)
    if trains(args):
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


def _load(args: argparse.Namespace) -> tuple[PrunedLlava, Samples, Samples, Encoder]:
    import torch

    from patchsieve.calibration.checkpoint import Encoder
    from patchsieve.calibration.model import Losses, PrunedLlava
    from patchsieve.calibration.samples import Samples
    from patchsieve.calibration.survivors import check_counts, check_target, geometric_counts
    from patchsieve.calibration.thresholds import (
        constant_heads,
        fixed_counts,
        go_on_from,
        learned_heads,
    )
    from patchsieve.pruning.decoder.atp import ATP
    from patchsieve.pruning.decoder.thresholds import INITIAL_THETA_S
    from patchsieve.pruning.decoder.training import average_tokens
    from patchsieve.runtime.records import Records

    positions = (args.positions or GRID2D) if args.train_lm and not args.hard else None
    encoder = Encoder(args.checkpoint, positions, args.sections, revision=args.revision)

    def read(path: Path) -> Samples:
        return Samples(Records(path, args.image_folder), encoder, skip_missing=args.skip_missing)

    samples = read(args.data)
    held_out = samples if args.held_out is None else read(args.held_out)
    # Steps of 2e-5 are lost in bfloat16 weights: those that are trained stay float32, and --bf16
    # computes with a copy.
    is_half = args.bf16 and not args.train_lm
    llava = encoder.family.load(
        encoder.directory,
        encoder.config,
        dtype=torch.bfloat16 if is_half else torch.float32,
        # On a CPU the backward pass of SDPA is slower than that of plain products.
        attn_implementation=None if torch.cuda.is_available() else "eager",
    )
    num_layers, num_visual = llava.config.text_config.num_hidden_layers, len(encoder.patch_ids)
    check_sites(args.sites, num_layers)
    if args.counts is not None:
        check_counts(args.counts, num_visual)
        args.target_tokens = average_tokens(args.counts, args.sites, num_layers, num_visual)
    elif args.method == "atp":
        check_target(num_visual, args.sites, num_layers, args.target_tokens)
    else:
        args.counts = geometric_counts(num_visual, args.sites, num_layers, args.target_tokens)
    torch.manual_seed(args.seed)
    if args.method == "atp":
        if args.initial_theta_s is None:  # alone, the coarsest grids would have no gradient
            args.initial_theta_s = 0.2 if args.parts == "spatial" else INITIAL_THETA_S
        initial = (args.initial_theta_r, args.initial_theta_s)
        starts = learned_heads(args.sites, encoder.grid, args.hidden, initial, args.parts)
    elif args.method == "quantile":
        starts = {site: constant_heads(encoder.grid) for site in args.sites}
    else:
        starts = fixed_counts(args.sites, args.counts or (), encoder.grid)
    methods = {
        site: ATP(
            thresholds=thresholds,
            normalisation=args.normalisation,
            modality=args.modality,
            causal=args.causal,
            parts=args.parts,
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
            "--hard continues a training of thresholds",
            found=f"none in {args.checkpoint}",
            do="train with --train-lm alone before, or give --heads",
        )
    return encoder.heads


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
        check_partial(args, partial, last)
    progress("training", 0.0)
    trainer = HeadsTrainer(model, samples, options, partial, progress)
    trainer.train(resume_from_checkpoint=str(last) if args.resume and last else None)
    trainer.release()
    return trainer.state.log_history


def _fix(
    args: argparse.Namespace, model: PrunedLlava, samples: Samples, progress: Progress
) -> None:
    from patchsieve.calibration.survivors import fix_thresholds

    fix_thresholds(model, samples, args.counts, args.batch_size, progress)


def _measure(
    args: argparse.Namespace, model: PrunedLlava, samples: Samples, progress: Progress
) -> tuple[HeadsConfig, dict[str, Any]]:
    """Count survivors on held-out data: the budgets, and the report."""
    from patchsieve.calibration.survivors import budgets, count_survivors
    from patchsieve.calibration.thresholds import scores_of
    from patchsieve.pruning.decoder.training import average_tokens
    from patchsieve.pruning.heads import HeadsConfig

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

    from patchsieve.calibration.checkpoint import save_checkpoint
    from patchsieve.calibration.train import head_tensors
    from patchsieve.contract.writing import whole_or_nothing
    from patchsieve.pruning.heads import save_heads

    with whole_or_nothing(args.out) as folder:
        if args.train_lm:
            save_checkpoint(folder, model, config, head_tensors(model), encoder)
        else:
            save_heads(folder, config, head_tensors(model))
        lines = "".join(json.dumps(entry) + "\n" for entry in history)
        (folder / "log.jsonl").write_text(lines, encoding="utf-8")
    if trains(args):
        shutil.rmtree(partial, ignore_errors=True)


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
