"""Activation statistics of a checkpoint: what each matrix reads in the float32 model.

    from patchsieve.calibration.options import Data
    from patchsieve.calibration.statistics import collect
    from patchsieve.calibration.statistics_options import StatisticsOptions

    made = collect(checkpoint, Data(Path("conversations.json")), StatisticsOptions(), Path("stats"))

One layer is in memory at a time. The rows between layers lie in `OUT.partial`, with the statistics
of the layers that are done: from there `resume` continues a run that was interrupted.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from patchsieve.calibration.encoder import Encoder
from patchsieve.calibration.layerwise import Step
from patchsieve.calibration.llava_steps import Conversation, LlavaSteps, decoder_of
from patchsieve.calibration.options import Data
from patchsieve.calibration.resume import TrainingState, folder_of
from patchsieve.calibration.samples import Samples
from patchsieve.calibration.statistics_options import StatisticsOptions
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.writing import check_file, check_new, one_line, write_whole
from patchsieve.export.quantise.statistics import InputStatistics, Statistics
from patchsieve.export.source.checkpoint import Checkpoint
from patchsieve.runtime.records import Records

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Collected:
    """What a collection made.

    Attributes:
        out: The file.
        matrices: Matrices that it holds statistics of.
        records: Conversations that were fed.
        rows: Rows that entered the decoder.
        images: Images that entered the tower.
        records_without_image: Conversations that were skipped because their image is missing.
        seconds: Duration.
    """

    out: Path
    matrices: int
    records: int
    rows: int
    images: int
    records_without_image: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The result as `calibrate --statistics --json` prints it."""
        out = asdict(self)
        return {"statistics": str(out.pop("out"))} | out | {"seconds": round(self.seconds, 3)}


def collect(
    checkpoint: str,
    data: Data,
    options: StatisticsOptions,
    out: Path,
    *,
    revision: str | None = None,
    resume: bool = False,
    progress: Progress = lambda *_: None,
) -> Collected:
    """Collect the statistics of a checkpoint and write them.

    Args:
        checkpoint: Hugging Face directory or hub id.
        data: The conversations; `held_out` is not read.
        options: Which of them are fed.
        out: File to make.
        revision: Branch, tag or commit of a hub id; None for its main branch.
        resume: Continue the run that was interrupted.
        progress: Takes what is being done and how much of it is done, 0 to 1.

    Raises:
        PatchsieveError: The checkpoint or the data cannot be used, or there is nothing to resume.
    """
    started = time.monotonic()
    folder = _check_places(out, resume)
    progress("reading the data", 0.0)
    records = Records(data.path, data.image_folder)
    encoder = Encoder(checkpoint, revision=revision)
    samples = Samples(records, encoder, skip_missing=data.skip_missing)
    fed, steps = _plan(encoder, samples, options, folder)
    state = TrainingState(folder, _asked(checkpoint, revision, data, options), resume, "collection")
    rows = sum(len(each.token_ids) for each in fed)
    whole = _run(steps, state, Statistics(checkpoint, len(fed), rows, options.seed, {}), progress)
    whole.write(out)
    state.remove()
    return Collected(
        out=out,
        matrices=len(whole.inputs),
        records=len(fed),
        rows=rows,
        images=_images(fed),
        records_without_image=samples.missing,
        seconds=time.monotonic() - started,
    )


def _check_places(out: Path, resume: bool) -> Path:
    """The folder of the run's state; refuses an `out` that cannot be made."""
    check_new(out)
    check_file(out)
    partial = folder_of(out)
    if resume and not partial.is_dir():
        raise PatchsieveError(
            "there is nothing to resume", found=f"no {partial}", do="start without --resume"
        )
    return partial


def _plan(
    encoder: Encoder, samples: Samples, options: StatisticsOptions, folder: Path
) -> tuple[tuple[Conversation, ...], list[Step]]:
    """Draw the conversations that are fed, and make the steps; refuses what cannot be fed."""
    count = min(options.records, len(samples))
    drawn = sorted(random.Random(options.seed).sample(range(len(samples)), count))
    most = min(options.max_tokens, decoder_of(encoder).max_rows)
    fed = tuple(Conversation.of(samples[number], most) for number in drawn)
    if not _images(fed):
        raise PatchsieveError(
            "without an image the tower has no statistics",
            found=f"no image in the {count} records drawn from {samples.records.path}",
            do="raise --records, or give --data conversations about images",
        )
    source = Checkpoint(encoder.directory, encoder.family)
    made = LlavaSteps(encoder, source, fed, lambda: _pixels(samples, drawn), folder)
    source.require(made.wanted)
    return fed, made.steps


def _images(fed: Sequence[Conversation]) -> int:
    return sum(len(each.visual) for each in fed)


def _pixels(samples: Samples, drawn: Sequence[int]) -> Iterator[Tensor]:
    """The images of samples in their order, [1, 3, h, w] each."""
    for number in drawn:
        pixels = samples[number].pixel_values
        if pixels is not None:
            yield from pixels.split(1)


def _asked(
    checkpoint: str, revision: str | None, data: Data, options: StatisticsOptions
) -> dict[str, Any]:
    """What the run is asked to do, by the names of the options, as JSON holds it."""
    values: dict[str, Any] = {"checkpoint": checkpoint, "revision": revision, "data": data.path}
    values |= {"image_folder": data.image_folder, "skip_missing": data.skip_missing}
    asked: dict[str, Any] = json.loads(json.dumps(values | asdict(options), default=str))
    return asked


def _run(
    steps: Sequence[Step], state: TrainingState, empty: Statistics, progress: Progress
) -> Statistics:
    """Run the steps that are not done; gives the statistics of all.

    A step is done when its statistics are in the folder, which are written after its rows.
    """
    files = [state.folder / f"{number:03}.safetensors" for number in range(len(steps))]
    done = next((number for number, file in enumerate(files) if not file.exists()), len(files))
    with one_line(state.folder):
        state.prepare(files[done - 1] if done else None)
    _check_rows(steps, done, state.folder)
    shares = _shares(steps)
    for number in range(done, len(steps)):
        found = _run_step(steps[number], shares[number], shares[number + 1], progress)
        with one_line(files[number]):
            write_whole(files[number], replace(empty, inputs=found).to_bytes())
            _remove_rows(steps[number + 1 :], state.folder)
    inputs = [Statistics.read(file).inputs for file in files]
    return replace(empty, inputs={name: each[name] for each in inputs for name in each})


def _run_step(
    step: Step, before: float, after: float, progress: Progress
) -> dict[str, InputStatistics]:
    """Run a step, which takes the progress from one share of the work to another."""
    progress(step.label, before)
    return step.run(lambda done: progress(step.label, before + (after - before) * done))


def _shares(steps: Sequence[Step]) -> list[float]:
    """The share of all work before each step, and at last 1: rows by weights."""
    work = [sum(step.lengths) * sum(math.prod(w.shape) for w in step.weights) for step in steps]
    return [sum(work[:number]) / sum(work) for number in range(len(work) + 1)]


def _check_rows(steps: Sequence[Step], done: int, folder: Path) -> None:
    """Refuse a folder without the rows that the steps to come read."""
    made = {step.out for step in steps[:done]}
    for rows in {rows for step in steps[done:] for rows in step.reads} & made:
        size = rows.path.stat().st_size if rows.path.is_file() else None
        if size != rows.num_bytes:
            raise PatchsieveError(
                f"{folder} cannot be resumed",
                found=f"no {rows.path.name}" if size is None else f"{size} bytes of rows",
                expected=f"{rows.num_bytes} bytes of rows",
                do=f"remove {folder}, and start without --resume",
            )


def _remove_rows(steps: Sequence[Step], folder: Path) -> None:
    """Remove rows that none of these steps reads."""
    needed = {rows.path for step in steps for rows in step.reads}
    for path in folder.glob("*.rows"):
        if path not in needed:
            path.unlink()
