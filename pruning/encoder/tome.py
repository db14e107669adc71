"""ToMe (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023), from the paper alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from patchsieve.pruning.encoder.walk import TowerMethod, TowerSite, gather_rows, places_of
from patchsieve.pruning.rows import mean_over, unit
from patchsieve.pruning.select import LOWEST, ascending, first_best_of_rows, keep_top


@dataclass(frozen=True)
class Merged:
    """Some rows of set A are added to rows of set B; the new order is [A unmerged | B].

    A holds the rows of even place, B those of odd place.

    Attributes:
        stays: Rows of A that stay, int64 [B, a - r].
        goes: Rows of A that merge, int64 [B, r].
        onto: 1 where a row of B takes one of `goes`, float32 [B, b, r].
        old_sizes: Patches that each row stands for, [B, n].
        moved: See `Reduction`.
    """

    stays: Tensor
    goes: Tensor
    onto: Tensor
    old_sizes: Tensor
    moved: Tensor
    num_fused: int = 0
    num_wanted: None = None

    def rows(self, rows: Tensor) -> Tensor:
        """Means weighted by size, [B, n, C] -> [B, K, C]."""
        summed = self._sum(rows.float() * self.old_sizes[:, :, None])
        return (summed / self.sizes[:, :, None]).to(rows.dtype)

    @cached_property
    def sizes(self) -> Tensor:
        """[B, K]."""
        return self._sum(self.old_sizes[:, :, None])[:, :, 0]

    def _sum(self, rows: Tensor) -> Tensor:
        even, odd = rows[:, ::2], rows[:, 1::2]  # [B, a, C], [B, b, C]
        merged = odd + self.onto @ gather_rows(even, self.goes)
        return torch.cat((gather_rows(even, self.stays), merged), dim=1)


@dataclass(frozen=True)
class ToMe(TowerMethod):
    """Merge the most similar rows between attention and MLP, a fixed number in each layer.

    Rows are divided by place into A (even) and B (odd); each of A looks for the most similar of B,
    by the cosine of its keys, averaged over the heads; the r best pairs merge into their mean
    weighted by size. The class token, in A, never merges. A row counts in attention by its size
    (proportional attention).

    Attributes:
        proportional: Add log(size) to the attention's products.
    """

    name: ClassVar[str] = "tome"

    proportional: bool = True

    @property
    def is_proportional(self) -> bool:
        """See `TowerMethod.is_proportional`."""
        return self.proportional

    def reduce(self, site: TowerSite, count: int) -> Merged:
        """Merge until `count` tokens are left."""
        num_rows = site.rows.shape[1]
        num_merged = num_rows - int(site.has_cls) - count  # r
        metric = unit(mean_over(site.group[-1].key.float(), 1))  # [B, n, D]
        even, odd = metric[:, ::2], metric[:, 1::2]
        similar = even @ odd.transpose(1, 2)  # [B, a, b]
        best = first_best_of_rows(similar)  # [B, a, b]
        score = similar.amax(-1)  # [B, a]
        if site.has_cls:
            is_cls = torch.arange(even.shape[1], device=score.device) == 0
            score = torch.where(is_cls, LOWEST, score)
        merges = keep_top(score, num_merged)  # [B, a]
        stays = ~merges
        goes_to = ascending(merges, num_merged)  # [B, r]
        num_stay = even.shape[1] - num_merged
        target = (best.float() * torch.arange(odd.shape[1], device=score.device)).sum(-1)  # [B, a]
        target = target.to(torch.int64)
        chosen = target.gather(1, goes_to)  # [B, r]
        columns = torch.arange(odd.shape[1], device=score.device)[:, None]
        onto = (columns == chosen[:, None]).float()  # [B, b, r]
        even_moved = torch.where(stays, places_of(stays), target + num_stay)  # [B, a]
        moved = interleave(even_moved, num_stay)[:, :num_rows]
        sizes = torch.ones_like(site.rows[:, :, 0], dtype=torch.float32)  # [B, n]
        sizes = sizes if site.sizes is None else site.sizes
        return Merged(ascending(stays, num_stay), goes_to, onto, sizes, moved)


def interleave(even: Tensor, first: int) -> Tensor:
    """New places of all rows from those of set A [B, a]; B's begin at `first`; [B, 2 a]."""
    places = torch.arange(even.shape[1], device=even.device) + first
    odd = places.expand(even.shape)  # one more than B holds where n is odd: cut off by the caller
    return torch.stack((even, odd), dim=-1).reshape(even.shape[0], -1)
