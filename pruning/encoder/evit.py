"""EViT (Liang et al., "Not All Patches are What You Need", ICLR 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchsieve.pruning.encoder.walk import TowerMethod, TowerSite, gather_rows, places_of
from patchsieve.pruning.rollout import start_row
from patchsieve.pruning.select import ascending, keep_top


@dataclass(frozen=True)
class Fused:
    """Some rows stay, the others become one row at the end.

    Attributes:
        indices: Rows that stay, int64 [B, K - 1].
        weights: Weight of each row in the fused one, 0 for those that stay, float32 [B, n].
        moved: See `Reduction`.
    """

    indices: Tensor
    weights: Tensor
    moved: Tensor
    num_fused: int = 1
    sizes: None = None
    num_wanted: Tensor | None = None

    def rows(self, rows: Tensor) -> Tensor:
        """[B, n, C] -> [B, K, C]."""
        fused = self.weights[:, None] @ rows.float()  # [B, 1, C]
        return torch.cat((gather_rows(rows, self.indices), fused.to(rows.dtype)), dim=1)


@dataclass(frozen=True)
class EViT(TowerMethod):
    """Keep what the class token attends to, and fuse the rest into one row by its attention.

    Acts between attention and MLP. The fused row is sum(a_i x_i) over what is dropped, not
    renormalised, as published.

    Differs from the paper: survivors keep their raster order (its code leaves them in the order of
    their scores), and the fused row of an earlier layer is never a candidate: it is always fused
    again, with the attention that it gets itself, where the published code takes it for a patch. A
    tower without a class token uses the attention that all rows pay.

    Attributes:
        schedule: Where, and to how many rows, the fused one among them.
    """

    name: ClassVar[str] = "evit"

    def reduce(self, site: TowerSite, count: int) -> Fused:
        """Keep `count` - 1 patches and fuse the rest, the fused row of before included."""
        attention = start_row(site.group[-1], site.cls)  # [B, n]
        kept = keep_top(site.candidates(attention), count - 1)  # [B, N]
        stays = site.whole(kept, is_fused_kept=False)  # [B, n]
        moved = torch.where(stays, places_of(stays), count - 1 + site.has_cls)
        weights = torch.where(stays, 0.0, attention)
        return Fused(ascending(stays, count - 1 + site.has_cls), weights, moved)
