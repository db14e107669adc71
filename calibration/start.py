"""The model that a calibration begins with, and the budget of tokens that it is to meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from patchsieve.calibration.encoder import Encoder
from patchsieve.calibration.model import PrunedLlava
from patchsieve.calibration.options import CalibrationOptions, check_sites
from patchsieve.calibration.survivors import check_counts, check_target, geometric_counts
from patchsieve.calibration.thresholds import (
    constant_heads,
    fixed_counts,
    go_on_from,
    learned_heads,
)
from patchsieve.contract.errors import PatchsieveError
from patchsieve.export.source.checkpoint import Checkpoint
from patchsieve.pruning.decoder.atp import ATP
from patchsieve.pruning.decoder.thresholds import INITIAL_THETA_S, Thresholds
from patchsieve.pruning.decoder.training import average_tokens

_SPATIAL_THETA_S = 0.2  # alone, the coarsest grids would have no gradient


@dataclass(frozen=True)
class Budget:
    """Tokens that may stay.

    Attributes:
        target_tokens: Mean visual tokens over all layers.
        counts: Tokens that each site leaves; None if heads are to find them.
    """

    target_tokens: float
    counts: tuple[float, ...] | None


def begin(encoder: Encoder, options: CalibrationOptions) -> tuple[PrunedLlava, Budget]:
    """The model with the thresholds that it begins with, and its budget.

    Raises:
        PatchsieveError: The layers cannot meet the budget, or there are no heads to continue from.
    """
    budget = _budget(options, encoder)
    return _build(encoder, options, budget), budget


def _budget(options: CalibrationOptions, encoder: Encoder) -> Budget:
    """The budget in tokens of this checkpoint; refuses one that its layers cannot meet."""
    num_layers, num_visual = encoder.config.text_config.num_hidden_layers, len(encoder.patch_ids)
    sites, target = options.sites, options.target_tokens
    check_sites(sites, num_layers)
    if options.counts is not None:
        check_counts(options.counts, num_visual)
        target = average_tokens(options.counts, sites, num_layers, num_visual)
        return Budget(target, options.counts)
    assert target is not None
    if options.method == "atp":
        check_target(num_visual, sites, num_layers, target)
        return Budget(target, None)
    return Budget(target, tuple(geometric_counts(num_visual, sites, num_layers, target)))


def _build(encoder: Encoder, options: CalibrationOptions, budget: Budget) -> PrunedLlava:
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
    return encoder.family.load(
        encoder.directory,
        encoder.config,
        Checkpoint(encoder.directory, encoder.family).dequantised(),
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
