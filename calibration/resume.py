"""The folder of an interrupted run: what it was asked to do, so that runs do not mix."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from patchsieve.calibration.options import CalibrationOptions, Data
from patchsieve.contract.errors import PatchsieveError

# What a training cannot change when it is resumed, by the names of the options.
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
_FILE = "asked.json"


def folder_of(out: Path) -> Path:
    """Where a training whose result is to be `out` keeps its state."""
    return out.with_name(out.name + ".partial")


def asked(
    checkpoint: str, revision: str | None, data: Data, options: CalibrationOptions, **found: Any
) -> dict[str, Any]:
    """What a training is asked to do, as JSON holds it.

    Args:
        checkpoint: Directory or hub id.
        revision: Branch, tag or commit of a hub id.
        data: The conversations.
        options: How it learns.
        found: Values that were only known with the checkpoint, instead of the options'.
    """
    parts = (data, options, options.scores, options.language_model, options.training)
    values = {field.name: getattr(part, field.name) for part in parts for field in fields(part)}
    values |= {"checkpoint": checkpoint, "revision": revision, "data": data.path} | found
    named = {name: values[name] for name in _OF_A_TRAINING}
    asked: dict[str, Any] = json.loads(json.dumps(named, default=str))
    return asked


@dataclass(frozen=True)
class TrainingState:
    """Where a training, or another long run, keeps what it needs to be resumed.

    Attributes:
        folder: Holds the Trainer's checkpoints, and what the training was asked to do.
        asked: What it is asked to do now, see `asked`.
        resumes: Continue from what the folder holds.
        run: What kind of run it is, for people.
    """

    folder: Path
    asked: dict[str, Any]
    resumes: bool
    run: str = "training"

    def prepare(self, last: Path | None) -> None:
        """Make the folder of a new training, or check that of the one to resume.

        Args:
            last: The newest checkpoint in the folder.

        Raises:
            PatchsieveError: A new training would overwrite another, or the one to resume began
                with other options.
        """
        if self.resumes:
            self._check_same()
            return
        if last is not None:
            raise PatchsieveError(
                f"{self.folder} holds a {self.run} that was interrupted",
                found=last.name,
                do="add --resume to continue it, or remove it",
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _FILE).write_text(json.dumps(self.asked) + "\n", encoding="utf-8")

    def remove(self) -> None:
        """Remove the folder: its result is in place."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _check_same(self) -> None:
        try:
            found = dict(json.loads((self.folder / _FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:  # TypeError, ValueError: no object
            raise PatchsieveError(
                f"{self.folder} cannot be resumed",
                found=error,
                do=f"remove {self.folder}, and start without --resume",
            ) from error
        other = [name for name in self.asked if found.get(name) != self.asked[name]]
        if other:
            raise PatchsieveError(
                f"the {self.run} to resume had other options",
                found=", ".join(f"{name} {self.asked[name]}" for name in other),
                expected=", ".join(f"{name} {found.get(name)}" for name in other),
                do=f"give the same options, or remove {self.folder}",
            )
