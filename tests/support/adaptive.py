"""A method for tests alone, before the decoder, whose number of survivors depends on the image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar
from unittest.mock import patch

import torch

from patchsieve.pruning import catalogue
from patchsieve.pruning.encoder.evit import Fused
from patchsieve.pruning.encoder.walk import Kept, TowerMethod, TowerSite, places_of
from patchsieve.pruning.entry import ADAPTS, ENCODER, PROJECTOR, Entry, Option
from patchsieve.pruning.rollout import start_row
from patchsieve.pruning.select import apply_budget, ascending


@dataclass(frozen=True)
class Above(TowerMethod):
    """Keep the patches that get more than `factor` times the mean of the class token's attention.

    Attributes:
        factor: Of the mean.
        fuse: Also leave one row, the sum of what is dropped, weighted by its attention.
    """

    name: ClassVar[str] = "above"

    factor: float = 1.0
    fuse: bool = False

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


def entry(place: str) -> Entry:
    """Its row in the catalogue, at a place."""
    own = (Option("factor", "number", "of the mean", 1.0), Option("fuse", "flag", "fuse", False))
    schedule = tuple(Option(name, "count", name, shown="a default") for name in ("keep", "group"))
    listed = (Option(name, "integers", name, shown="one") for name in ("layers", "counts"))
    where = "tests.support.adaptive:Above"
    options = (*schedule, *listed, *own) if place == ENCODER else (schedule[0], *own)
    return Entry("above", place, where, "keep what stands out", ADAPTS, options)


@contextmanager
def known() -> Iterator[None]:
    """Let plans name the method."""
    rows = {(place, "above"): entry(place) for place in (ENCODER, PROJECTOR)}
    with patch.dict(catalogue._BY_PLACE, rows):
        yield
