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
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from patchsieve.calibration import resume as resuming
from patchsieve.calibration.checkpoint import save_checkpoint
from patchsieve.calibration.encoder import Encoder
from patchsieve.calibration.model import PrunedLlava
from patchsieve.calibration.options import CalibrationOptions, Data
from patchsieve.calibration.samples import Samples
from patchsieve.calibration.start import Budget, begin
from patchsieve.calibration.survivors import Survivors, average, fix_thresholds, measure
from patchsieve.calibration.thresholds import scores_of
from patchsieve.calibration.train import HeadsTrainer, head_tensors, last_checkpoint
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.writing import check_folder, check_new, whole_or_nothing
from patchsieve.pruning.heads import HeadsConfig, save_heads
from patchsieve.runtime.records import Records

Progress = Callable[[str, float], None]
LOG = "log.jsonl"  # the Trainer's lines, beside what was learned


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

    Under torchrun every process calls it, and the first one writes.

    Args:
        checkpoint: Hugging Face directory or hub id.
        data: The conversations.
        options: What is learned, and how.
        out: Directory to make: heads, or a whole checkpoint if its language model is trained.
        revision: Branch, tag or commit of a hub id; None for its main branch.
        resume: Continue the training that was interrupted.
        progress: Takes what is being done and how much of it is done, 0 to 1.

    Raises:
        PatchsieveError: The checkpoint, the data or the options cannot be used.
    """
    started = time.monotonic()
    folder = _check_places(out, options, resume)
    progress("loading the checkpoint", 0.0)
    source = _read(checkpoint, revision, data, options)
    model, budget = begin(source.encoder, options)
    asked = resuming.asked(checkpoint, revision, data, options, **asdict(budget))
    training = resuming.TrainingState(folder, asked, resume)
    history = _learn(model, source.samples, options, budget, training, progress)
    sites = measure(model, source.held_out, options.percentile, options.batch_size, progress)
    if is_main_process():
        _save(out, source.encoder, model, _heads_config(options, model, sites), history)
        if options.trains:
            training.remove()
    return Calibration(
        out=out,
        is_checkpoint=options.language_model.train_lm,
        sites=sites,
        average_tokens=average(model, sites),
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


def _learn(
    model: PrunedLlava,
    samples: Samples,
    options: CalibrationOptions,
    budget: Budget,
    state: resuming.TrainingState,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Train the model, or fix its thresholds; gives the Trainer's log."""
    if not options.trains:
        if options.method == "quantile":
            assert budget.counts is not None
            fix_thresholds(model, samples, budget.counts, options.batch_size, progress)
        return []
    last = last_checkpoint(state.folder)
    if is_main_process():
        state.prepare(last)
    progress("training", 0.0)
    trainer = HeadsTrainer(model, samples, options.training, state.folder, progress)
    trainer.train(resume_from_checkpoint=str(last) if state.resumes and last else None)
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
