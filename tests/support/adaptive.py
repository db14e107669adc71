"""A method for tests alone, before the decoder, whose number of survivors depends on the image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar
from unittest.mock import patch

import torch

from patchsieve.pruning import table
from patchsieve.pruning.encoder.evit import Fused
from patchsieve.pruning.encoder.walk import Kept, TowerSite, places_of
from patchsieve.pruning.rollout import start_row
from patchsieve.pruning.schedules import TowerSchedule
from patchsieve.pruning.select import apply_budget, ascending


@dataclass(frozen=True)
class Above:
    """Keep the patches that get more than `factor` times the mean of the class token's attention.

    Attributes:
        schedule: Where, and how many at most.
        factor: Of the mean.
        fuse: Also leave one row, the sum of what is dropped, weighted by its attention.
    """

    name: ClassVar[str] = "above"
    reads: ClassVar[tuple[str, ...]] = ()
    is_inside: ClassVar[bool] = False
    is_merging: ClassVar[bool] = False
    is_proportional: ClassVar[bool] = False
    adapts: ClassVar[bool] = True

    schedule: TowerSchedule = TowerSchedule()
    factor: float = 1.0
    fuse: bool = False

    def places(self, num_patches: int, num_layers: int) -> dict[int, int]:
        return self.schedule.places(self.name, num_patches, num_layers)

    def reduce(self, site: TowerSite, count: int) -> Kept | Fused:
        attention = start_row(site.group[-1], site.cls)  # [B, n]
        scores = site.candidates(attention)  # [B, N]
        wanted = scores >= self.factor * scores.sum(-1, keepdim=True) / scores.shape[1]
        wanted = wanted | (scores == scores.amax(-1, keepdim=True))
        bound = torch.tensor([count - self.fuse])
        keep, num_wanted = apply_budget(wanted, scores, bound)
        if not self.fuse:
            return Kept.up_to(site, keep, num_wanted, count)
        stays = site.whole(keep, is_fused_kept=False)
        moved = torch.where(stays, places_of(stays), count - 1 + site.has_cls)
        indices = ascending(stays, count - 1 + site.has_cls).clamp(max=stays.shape[1] - 1)
        weights = torch.where(stays, 0.0, attention)
        return Fused(indices, weights, moved, num_wanted=num_wanted + 1)


@contextmanager
def known() -> Iterator[None]:
    """Let plans name the method."""
    tables = (table.ENCODERS, table.PROJECTORS)
    with patch.dict(tables[0], {"above": Above}), patch.dict(tables[1], {"above": Above}):
        yield
