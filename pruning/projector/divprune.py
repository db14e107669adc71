"""DivPrune (Alvar et al., "DivPrune: Diversity-based Visual Token Pruning", CVPR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchsieve.pruning.encoder.walk import Kept, TowerMethod, TowerSite
from patchsieve.pruning.rows import unit
from patchsieve.pruning.select import LOWEST

_FARTHEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class DivPrune(TowerMethod):
    """Keep the tokens whose smallest distance to each other is large, chosen one by one.

    The distance is 1 - cosine of the projected tokens. The first token is the one whose nearest
    neighbour is farthest; each next is the one that is farthest from all that are chosen (max-min).
    Neither attention nor text is read. From the paper and its formulas alone.

    The paper leaves open: ties (the lower raster index here), a token without length (its cosine
    is 0) and tokens that equal a chosen one, which are chosen last and never twice.

    Differs from the paper: 64 of 576 are kept by default, where it keeps 9.8 %, 56.
    """

    name: ClassVar[str] = "divprune"

    def reduce(self, site: TowerSite, count: int) -> Kept:
        """Choose `count` tokens."""
        rows = unit(site.candidates(site.rows))  # [B, N, C]
        distance = 1 - rows @ rows.transpose(1, 2)  # [B, N, N]
        count = site.choices(count)
        return Kept.of(site, most_diverse(distance, count), count)


def most_diverse(distance: Tensor, count: int) -> Tensor:
    """Choose greedily, each time what is farthest from all that are chosen.

    A step is eight operators, none of which breaks ties or multiplies; `count` steps are unrolled.

    Args:
        distance: Symmetric, finite, float32 [B, N, N]; the diagonal is not read.
        count: How many to choose, at most N.

    Returns:
        bool [B, N].
    """
    num_tokens = distance.shape[1]
    places = torch.arange(num_tokens, device=distance.device)  # [N]
    nowhere, column = torch.full_like(places, num_tokens), torch.zeros_like(places)
    is_itself = places[:, None] == places  # [N, N]
    # To the nearest of all others at first, to the nearest of the chosen then.
    nearest = torch.where(is_itself, _FARTHEST, distance).amin(1, keepdim=True)  # [B, 1, N]
    distance = torch.where(is_itself, LOWEST, distance)  # so a chosen token is never chosen again
    for step in range(count):
        is_best = nearest == nearest.amax(-1, keepdim=True)
        best = torch.where(is_best, places, nowhere).amin(-1, keepdim=True)  # [B, 1, 1]
        row = distance.gather(1, best + column)  # [B, 1, N]
        nearest = torch.minimum(nearest, row) if step else row
    return nearest.squeeze(1) == LOWEST
