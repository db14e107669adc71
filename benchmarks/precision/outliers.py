"""Checkpoints with outlier channels, rounded with and without channels made equal."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.accuracy.workshop import Training, Workshop
from benchmarks.precision.accuracy import measure as measure_answers
from benchmarks.precision.bundles import Bundles, Case
from tests.support.outliers import massive_channels, scaled_channels

KINDS: dict[str, Callable[[Path, Path], Path]] = {
    "norms' channels times 30": scaled_channels,
    "tower's channels times 300": massive_channels,
}


def measure(
    model: Path,
    work: Path,
    cases: Sequence[Case],
    precisions: Sequence[str],
    limit: int,
    workers: int,
) -> dict[str, Any]:
    """Ask the demo model with outliers, beside itself in float32.

    Args:
        model: Folder of the demo model.
        work: Folder to work in.
        cases: Plans on its base checkpoint.
        precisions: float32 first.
        limit: How many questions.
        workers: Processes that ask.
    """
    rows: list[dict[str, Any]] = []
    for number, (kind, make) in enumerate(KINDS.items()):
        place = work / f"outliers-{number}"
        if not (place / "model" / "clip").exists():
            shutil.rmtree(place / "model", ignore_errors=True)
            (place / "model").mkdir(parents=True)
            make(model / "checkpoint", place / "model" / "checkpoint")
            shutil.copytree(model / "clip", place / "model" / "clip")
        for is_smoothed in (True, False):
            folder = place / ("smoothed" if is_smoothed else "plain")
            own = place / "model"
            shop = Workshop(own / "checkpoint", own / "clip", folder, Training())
            with _smoothing(is_smoothed):
                asked = measure_answers(
                    shop, Bundles(shop, own, False), cases, precisions, limit, workers
                )
            rows += [{"outliers": kind, "smoothed": is_smoothed, **row} for row in asked["rows"]]
    return {"questions": limit, "rows": rows}


@contextmanager
def _smoothing(is_on: bool) -> Iterator[None]:
    """Inside, exports of this process make channels equal or leave them."""
    if is_on:
        yield
        return
    with patch("patchsieve.export.quantise.smoothing.groups_of", lambda tensors: []):
        yield
