"""Calibrations of a tiny LLaVA of 36 visual tokens and four layers, pruned at two of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from patchsieve.calibration.model import PrunedLlava
from patchsieve.calibration.options import Losses
from patchsieve.cli import main
from patchsieve.pruning.decoder.atp import ATP
from patchsieve.pruning.decoder.thresholds import ConstantThresholds, Thresholds

SITES, GRID, LAYERS, NUM_VISUAL = (1, 3), (6, 6), 4, 36
# Steps that reach the target: few, at a high rate.
TRAIN = ("--steps", "60", "--learning-rate", "0.02", "--lambda-target", "1")
TRAIN += ("--target-tokens", "18")


def methods(
    theta_r: float | None = None, theta_s: float = 1.0, sites: tuple[int, ...] = SITES
) -> dict[int, ATP]:
    """ATP at each site: constants, or heads of a fixed seed."""
    torch.manual_seed(1)
    return {
        site: ATP(
            thresholds=Thresholds(8, GRID, initial=(0.12, 0.12))
            if theta_r is None
            else ConstantThresholds(theta_r, theta_s)
        )
        for site in sites
    }


def pruned(
    checkpoint: Path, chosen: dict[int, ATP], attention: str = "sdpa", **losses: Any
) -> PrunedLlava:
    llava = LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation=attention
    )
    return PrunedLlava(llava, chosen, range(NUM_VISUAL), GRID, Losses(**losses))


def calibrate(checkpoint: Path, data: Path, out: Path, *more: str) -> None:
    """Run the command."""
    argv = ["calibrate", str(checkpoint), "--data", str(data), "-o", str(out), "--json"]
    argv += ["--sites", "1,3", "--hidden", "8", "--batch-size", "6", *more]
    assert main(argv) == 0
