"""Threshold modules as a calibration starts with them: to be learned, constant, or by number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchsieve.calibration.train import load_heads_into
from patchsieve.contract.errors import PatchsieveError
from patchsieve.pruning.decoder.thresholds import Thresholds, logit
from patchsieve.pruning.heads import load_heads

if TYPE_CHECKING:
    from patchsieve.calibration.model import PrunedLlava

KEEP_ALL = 1e-4  # a theta_r that all scores but the lowest pass
OFF = 0.9999  # a theta_s that no spatial score passes: the highest is below 1 - 3 / 576


def learned_heads(
    sites: Sequence[int],
    grid: tuple[int, int],
    hidden: int,
    initial: tuple[float, float],
    parts: str = "both",
) -> dict[int, Thresholds]:
    """New heads of each site, to be learned.

    Args:
        sites: Decoder layers.
        grid: Patch rows and columns.
        hidden: Width of the modules.
        initial: theta_r and theta_s before training.
        parts: As ATP's: a threshold that judges nothing does not learn.
    """
    heads = {site: Thresholds(hidden, grid, initial=initial) for site in sites}
    for module in heads.values():
        module.head_r.requires_grad_(parts != "spatial")
        module.head_s.requires_grad_(parts != "redundant")
    return heads


def constant_heads(grid: tuple[int, int]) -> Thresholds:
    """Heads that ignore their input and at first keep everything."""
    heads = Thresholds(hidden=1, grid=grid)
    _zero(heads)
    return heads


class FixedCount(Thresholds):
    """The threshold that a fixed number of tokens exceeds, the same number for every image.

    ATP is compared to it: the same scores, but a ratio that does not adapt. Masks are as
    soft as ATP's, so that a language model is trained alike. What is stored are heads that keep
    everything; the number becomes the site's budget. Of equal scores all exceed the threshold; the
    budget then keeps those of the lowest index, in training as in a bundle.

    Differs from the paper: its fixed ratios rank by a score that it does not name.

    Args:
        count: Tokens that each image keeps.
        grid: Patch rows and columns.
    """

    def __init__(self, count: int, grid: tuple[int, int]) -> None:
        super().__init__(hidden=1, grid=grid)
        _zero(self)
        self.requires_grad_(False)
        self.count = count

    def forward(
        self, s_self: Tensor, s_cross: Tensor, patch_ids: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """theta_r halfway to the best that falls, and a theta_s that nothing passes; [B, 1]."""
        ordered = ((s_self + s_cross) / 2).detach().sort(-1, descending=True).values
        count = min(self.count, ordered.shape[-1])
        last = ordered[:, count - 1 : count]
        falls = torch.where(ordered < last, ordered, -torch.inf).amax(-1, keepdim=True)
        falls = torch.where(falls.isinf(), last - 1e-4, falls)  # of equal scores none falls
        middle = (last + falls) / 2  # of two neighbours in float32 it is one of the two
        return torch.where(middle < last, middle, falls), torch.full_like(last, OFF)


def fixed_counts(
    sites: Sequence[int], counts: Sequence[float], grid: tuple[int, int]
) -> dict[int, Thresholds]:
    """A number of tokens at each site, rounded."""
    pairs = zip(sites, counts, strict=True)
    return {site: FixedCount(round(count), grid) for site, count in pairs}


def go_on_from(folder: Path, model: PrunedLlava) -> None:
    """Put stored heads into a model that judges alike."""
    found, tensors = load_heads(folder)
    heads = next(iter(model.methods.values())).thresholds
    assert isinstance(heads, Thresholds)
    own: dict[str, Any] = {"sites": tuple(model.methods), "grid": model.grid}
    own |= {"hidden": heads.trunk.out_features, "activation": None, "scores": scores_of(model)}
    other = [name for name, value in own.items() if getattr(found, name) != value]
    if other:
        raise PatchsieveError(
            f"the heads in {folder} were learned with other options",
            found=", ".join(f"{name} {getattr(found, name)}" for name in other),
            expected=", ".join(f"{name} {own[name]}" for name in other),
            do="give the options that they were learned with, or remove --heads",
        )
    load_heads_into(model, tensors)


def scores_of(model: PrunedLlava) -> dict[str, Any]:
    """How a model scores tokens, as heads record it."""
    method = next(iter(model.methods.values()))
    alone = {} if method.parts == "both" else {"parts": method.parts}  # as older heads have it
    return alone | {
        "normalisation": method.normalisation,
        "modality": method.modality,
        "causal": method.causal,
        "granularities": list(method.granularities),
        "spatial_lambda": method.spatial_lambda,
    }


def set_constant(heads: object, theta_r: float, theta_s: float) -> None:
    """Give constant heads other thresholds."""
    assert isinstance(heads, Thresholds)
    with torch.no_grad():
        for head, theta in ((heads.head_r, theta_r), (heads.head_s, theta_s)):
            head.bias.fill_(logit(theta))


def _zero(heads: Thresholds) -> None:
    for parameter in heads.parameters():
        torch.nn.init.zeros_(parameter)
    set_constant(heads, KEEP_ALL, OFF)
