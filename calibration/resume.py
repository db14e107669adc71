"""The folder of an interrupted training: what it was asked to do, so that trainings do not mix."""

from __future__ import annotations

import json
from dataclasses import fields
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


def begin(partial: Path, asked: dict[str, Any], last: Path | None) -> None:
    """Make the folder of a new training.

    Args:
        partial: The folder.
        asked: What the training is asked to do.
        last: A checkpoint that the folder already holds.

    Raises:
        PatchsieveError: It holds one, so somebody may want to resume from it.
    """
    if last is not None:
        raise PatchsieveError(
            f"{partial} holds a training that was interrupted",
            found=last.name,
            do="add --resume to continue it, or remove it",
        )
    partial.mkdir(parents=True, exist_ok=True)
    (partial / _FILE).write_text(json.dumps(asked) + "\n", encoding="utf-8")


def check_same(partial: Path, asked: dict[str, Any]) -> None:
    """Refuse to continue a training with other options than it began with."""
    try:
        found = dict(json.loads((partial / _FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:  # TypeError, ValueError: no object
        raise PatchsieveError(
            f"{partial} cannot be resumed",
            found=error,
            do=f"remove {partial}, and start without --resume",
        ) from error
    other = [name for name in _OF_A_TRAINING if found.get(name) != asked[name]]
    if other:
        raise PatchsieveError(
            "the training to resume had other options",
            found=", ".join(f"{name} {asked[name]}" for name in other),
            expected=", ".join(f"{name} {found.get(name)}" for name in other),
            do=f"give the same options, or remove {partial}",
        )
