"""Calibrate a checkpoint: learn when its visual tokens may be dropped, and count what survives.

    from patchsieve.calibration.options import CalibrationOptions, Data
    from patchsieve.calibration.run import calibrate

    options = CalibrationOptions(sites=(4, 14, 24), target_tokens=144)
    result = calibrate(checkpoint, Data(Path("conversations.json")), options, Path("heads"))

An interrupted training leaves its state in `OUT.partial`, from which `resume` continues.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from patchsieve.calibration import resume as resuming
from patchsieve.calibration.checkpoint import save_checkpoint
from patchsieve.calibration.encoder import Encoder
from patchsieve.calibration.model import PrunedLlava
from patchsieve.calibration.options import CalibrationOptions, Data, check_sites
from patchsieve.calibration.samples import Samples
from patchsieve.calibration.survivors import (
    Survivors,
    check_counts,
    check_target,
    fix_thresholds,
    geometric_counts,
    measure,
)
from patchsieve.calibration.thresholds import (
    constant_heads,
    fixed_counts,
    go_on_from,
    learned_heads,
    scores_of,
)
from patchsieve.calibration.train import HeadsTrainer, head_tensors, last_checkpoint
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.writing import check_folder, check_new, whole_or_nothing
from patchsieve.pruning.decoder.atp import ATP
from patchsieve.pruning.decoder.thresholds import INITIAL_THETA_S, Thresholds
from patchsieve.pruning.decoder.training import average_tokens
from patchsieve.pruning.heads import HeadsConfig, save_heads
from patchsieve.runtime.records import Records

Progress = Callable[[str, float], None]
LOG = "log.jsonl"  # the Trainer's lines, beside what was learned
_SPATIAL_THETA_S = 0.2  # alone, the coarsest grids would have no gradient


@dataclass(frozen=True)
class Calibration:
    """What a calibration made.

    Attributes:
        out: Directory of the heads or the checkpoint.
        is_checkpoint: It holds a whole checkpoint, whose language model was trained too.
        sites: Survivors of each site, on the held-out data.
        average_tokens: Mean visual tokens over all layers, on the same data.
        target: The mean that was asked for.
        position_rule: How the checkpoint's rows are numbered: "original" or "grid2d".
        records: Conversations that were learned from.
        records_without_image: Conversations that were skipped because their image is missing.
        seconds: Duration.
    """

    out: Path
    is_checkpoint: bool
    sites: tuple[Survivors, ...]
    average_tokens: float
    target: float
    position_rule: str
    records: int
    records_without_image: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The result as `calibrate --json` prints it."""
        out = asdict(self) | {"sites": [site.to_dict() for site in self.sites]}
        out["checkpoint" if out.pop("is_checkpoint") else "heads"] = str(out.pop("out"))
        return out | {"seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class _Source:
    """What is learned from: the conversations as a checkpoint reads them.

    Attributes:
        encoder: Makes samples of the checkpoint's conversations.
        samples: What is learned from.
        held_out: On what survivors are counted.
    """

    encoder: Encoder
    samples: Samples
    held_out: Samples


@dataclass(frozen=True)
class _Budget:
    """Tokens that may stay: the mean over all layers, and at each site if they are chosen."""

    target_tokens: float
    counts: tuple[float, ...] | None


def calibrate(
    checkpoint: str,
    data: Data,
    options: CalibrationOptions,
    out: Path,
    *,
    revision: str | None = None,
    resume: bool = False,
    progress: Progress = lambda *_: None,
) -> Calibration:
    """Learn the thresholds of a checkpoint, or its language model too, and write them.

    Started by torchrun, every process calls it, and the first one writes.

    Args:
        checkpoint: Hugging Face directory or hub id.
        data: The conversations.
        options: What is learned, and how.
        out: Directory to make: heads, or a whole checkpoint if its language model is trained.
        revision: Branch, tag or commit of a hub id; None for its main branch.
        resume: Continue the training that was interrupted.
        progress: Takes a line about the work and how much of it is done, 0 to 1.

    Raises:
        PatchsieveError: The checkpoint, the data or the options cannot be used.
    """
    started = time.monotonic()
    partial = _check_places(out, options, resume)
    progress("loading the checkpoint", 0.0)
    source = _read(checkpoint, revision, data, options)
    budget = _budget(options, source.encoder)
    model = _build(source.encoder, options, budget)
    history: list[dict[str, Any]] = []
    if options.trains:
        asked = resuming.asked(checkpoint, revision, data, options, **asdict(budget))
        history = _train(model, source.samples, options, partial, asked, resume, progress)
    elif options.method == "quantile":
        assert budget.counts is not None
        batch_size = options.training.batch_size
        fix_thresholds(model, source.samples, budget.counts, batch_size, progress)
    sites = measure(
        model, source.held_out, options.percentile, options.training.batch_size, progress
    )
    if is_main_process():
        _save(out, source.encoder, model, _heads_config(options, model, sites), history)
        if options.trains:
            shutil.rmtree(partial, ignore_errors=True)
    means, layers = [site.mean for site in sites], [site.layer for site in sites]
    return Calibration(
        out=out,
        is_checkpoint=options.language_model.train_lm,
        sites=sites,
        average_tokens=average_tokens(means, layers, model.num_layers, len(model.patch_ids)),
        target=budget.target_tokens,
        position_rule=source.encoder.trained.position_rule,
        records=len(source.samples),
        records_without_image=source.samples.missing,
        seconds=time.monotonic() - started,
    )


def is_main_process() -> bool:
    """Whether this is the first process of a training, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def _check_places(out: Path, options: CalibrationOptions, resume: bool) -> Path:
    """The folder of the training's state; refuses an `out` that cannot be made."""
    if resume and not options.trains:
        raise PatchsieveError(
            "only a training is resumed",
            found=f"--resume --method {options.method}",
            do="remove --resume",
        )
    check_new(out)
    check_folder(out)
    partial = resuming.folder_of(out)
    if resume and not partial.is_dir():
        raise PatchsieveError(
            "there is nothing to resume", found=f"no {partial}", do="start without --resume"
        )
    return partial


def _read(
    checkpoint: str, revision: str | None, data: Data, options: CalibrationOptions
) -> _Source:
    wanted, paths = options.language_model, [data.path, data.held_out or data.path]
    # First the files, which are at hand: a checkpoint may have to be downloaded.
    records = {path: Records(path, data.image_folder) for path in paths}
    encoder = Encoder(checkpoint, wanted.new_positions, wanted.sections, revision=revision)
    samples = {
        path: Samples(found, encoder, skip_missing=data.skip_missing)
        for path, found in records.items()
    }
    return _Source(encoder, *(samples[path] for path in paths))


def _budget(options: CalibrationOptions, encoder: Encoder) -> _Budget:
    """The budget in tokens of this checkpoint; refuses one that its layers cannot meet."""
    num_layers, num_visual = encoder.config.text_config.num_hidden_layers, len(encoder.patch_ids)
    sites, target = options.sites, options.target_tokens
    check_sites(sites, num_layers)
    if options.counts is not None:
        check_counts(options.counts, num_visual)
        target = average_tokens(options.counts, sites, num_layers, num_visual)
        return _Budget(target, options.counts)
    assert target is not None
    if options.method == "atp":
        check_target(num_visual, sites, num_layers, target)
        return _Budget(target, None)
    return _Budget(target, tuple(geometric_counts(num_visual, sites, num_layers, target)))


def _build(encoder: Encoder, options: CalibrationOptions, budget: _Budget) -> PrunedLlava:
    """The model with the thresholds that it begins with."""
    scores, wanted = options.scores, options.language_model
    methods = {
        site: ATP(thresholds=thresholds, **asdict(scores))
        for site, thresholds in _thresholds(encoder, options, budget.counts or ()).items()
    }
    losses = options.training.losses(budget.target_tokens)
    if wanted.hard:  # which tokens are worth their cost is no longer learned
        losses = replace(losses, lambda_atp=0.0)
    if options.method == "fixed":  # no budget is left to learn
        losses = replace(losses, target_tokens=None, lambda_atp=0.0)
    model = PrunedLlava(
        _llava(encoder, options),
        methods,
        encoder.patch_ids.tolist(),
        encoder.grid,
        losses,
        sections=encoder.trained.rotary_sections,
        train_lm=wanted.train_lm,
    )
    model.is_hard = wanted.hard
    if (heads := _stored_heads(encoder, options)) is not None:
        go_on_from(heads, model)
    return model


def _llava(encoder: Encoder, options: CalibrationOptions) -> Any:
    # Steps of 2e-5 are lost in bfloat16 weights: those that are trained stay float32, and --bf16
    # computes with a copy.
    is_half = options.training.bf16 and not options.language_model.train_lm
    return LlavaForConditionalGeneration.from_pretrained(
        encoder.directory,
        config=encoder.config,
        dtype=torch.bfloat16 if is_half else torch.float32,
        # On a CPU the backward pass of SDPA is slower than that of plain products.
        attn_implementation=None if torch.cuda.is_available() else "eager",
    )


def _thresholds(
    encoder: Encoder, options: CalibrationOptions, counts: Sequence[float]
) -> Mapping[int, Thresholds]:
    """The threshold modules that a calibration begins with, by site."""
    if options.method == "quantile":
        return {site: constant_heads(encoder.grid) for site in options.sites}
    if options.method == "fixed":
        return fixed_counts(options.sites, counts, encoder.grid)
    parts, theta_s = options.scores.parts, options.initial_theta_s
    if theta_s is None:
        theta_s = _SPATIAL_THETA_S if parts == "spatial" else INITIAL_THETA_S
    torch.manual_seed(options.training.seed)
    initial = (options.initial_theta_r, theta_s)
    return learned_heads(options.sites, encoder.grid, options.hidden, initial, parts)


def _stored_heads(encoder: Encoder, options: CalibrationOptions) -> Path | None:
    """Heads to continue from: those asked for, or the checkpoint's own for a hard finish."""
    if options.heads is not None or not options.language_model.hard or options.method != "atp":
        return options.heads
    if encoder.heads is None:
        raise PatchsieveError(
            "--hard continues a training of thresholds",
            found=f"none in {encoder.directory}",
            do="train with --train-lm alone before, or give --heads",
        )
    return encoder.heads


def _train(
    model: PrunedLlava,
    samples: Samples,
    options: CalibrationOptions,
    partial: Path,
    asked: dict[str, Any],
    resume: bool,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Train the model; gives the Trainer's log."""
    last = last_checkpoint(partial)
    if is_main_process():
        if resume:
            resuming.check_same(partial, asked)
        else:
            resuming.begin(partial, asked, last)
    progress("training", 0.0)
    trainer = HeadsTrainer(model, samples, options.training, partial, progress)
    trainer.train(resume_from_checkpoint=str(last) if resume and last else None)
    trainer.release()
    return trainer.state.log_history


def _heads_config(
    options: CalibrationOptions, model: PrunedLlava, sites: Sequence[Survivors]
) -> HeadsConfig:
    return HeadsConfig(
        sites=tuple(site.layer for site in sites),
        grid=model.grid,
        hidden=options.hidden if options.method == "atp" else 1,
        scores=scores_of(model),
        budgets=tuple(site.reserved for site in sites),
    )


def _save(
    out: Path,
    encoder: Encoder,
    model: PrunedLlava,
    heads: HeadsConfig,
    history: Sequence[dict[str, Any]],
) -> None:
    """Put what was learned in place, all or nothing."""
    with whole_or_nothing(out) as folder:
        if model.trains_lm:
            save_checkpoint(folder, model, heads, head_tensors(model), encoder)
        else:
            save_heads(folder, heads, head_tensors(model))
        lines = "".join(json.dumps(entry) + "\n" for entry in history)
        (folder / LOG).write_text(lines, encoding="utf-8")
