"""PruMerge and PruMerge+ (Shang et al., "LLaVA-PruMerge", 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchsieve.pruning.encoder.walk import TowerMethod, TowerSite, gather_rows, places_of
from patchsieve.pruning.projector.mixed import Mixed
from patchsieve.pruning.rollout import Layer, start_row
from patchsieve.pruning.rows import unit
from patchsieve.pruning.select import LOWEST, apply_budget, ascending, first_best, keep_top


@dataclass(frozen=True)
class PruMerge(TowerMethod):
    """Keep the patches whose attention from the class token is an outlier, and merge the rest.

    An outlier is above Q3 + 1.5 (Q3 - Q1), the quartiles of an image's own attention. Queries and
    keys of all heads are one head: softmax(q k^T / sqrt(C)). Each patch that stays takes the sum of
    its nearest neighbours (by the cosine of the keys, among all other patches), each times its
    attention, not renormalised. One more token is the same sum over all that do not stay.

    Differs from the paper: the last layer that runs judges; the published code takes queries and
    keys of the next one, which a LLaVA never runs. Tokens leave in raster order, with the raster
    index of their patch; published is the order of their attention. An image without outliers keeps
    its best patch, where the published code fails. A tower without a class token uses the attention
    that all rows pay. `keep` bounds the count: the patches with the most attention stay then.

    Attributes:
        neighbours: Patches that each takes up, or all others if there are fewer.
    """

    name: ClassVar[str] = "prumerge"

    neighbours: int = 32

    def wanted(self, attention: Tensor) -> Tensor:
        """Which patches stay, by the attention of the candidates [B, N]; bool [B, N]."""
        return outliers(attention)

    def reduce(self, site: TowerSite, count: int) -> Mixed:
        """Keep at most `count` - 1 patches, and one more token."""
        layer, num_cls = site.group[-1], int(site.has_cls)
        query, key = one_head(layer.query), one_head(layer.key)
        attention = start_row(Layer(query, key, query.shape[-1] ** -0.5), site.cls)  # [B, n]
        scores = site.candidates(attention)  # [B, N]
        bound = torch.full((1,), count - 1, device=scores.device)
        keep, num_wanted = apply_budget(self.wanted(scores), scores, bound)
        stays = site.whole(keep, is_fused_kept=False)  # [B, n]
        begins = ascending(stays, count - 1 + num_cls)  # [B, K']
        begins = begins.clamp(max=stays.shape[1] - 1)  # the padding repeats the last row
        near = self._near(unit(key[:, 0]), begins, num_cls).float() * attention[:, None]
        rest = torch.where(stays, 0.0, attention)[:, None]  # [B, 1, n]
        moved = torch.where(stays, places_of(stays), count - 1 + num_cls)
        return Mixed(begins, torch.cat((near, rest), dim=1), moved, 1, num_wanted + 1)

    def _near(self, keys: Tensor, begins: Tensor, num_cls: int) -> Tensor:
        """Which rows each row of `begins` [B, K'] takes up, bool [B, K', n]."""
        num_rows, num_begun = keys.shape[1], begins.shape[1]
        places = torch.arange(num_rows, device=keys.device)  # [n]
        is_other = (begins[:, :, None] != places) & (places >= num_cls)
        similar = gather_rows(keys, begins) @ keys.transpose(1, 2)  # [B, K', n]
        similar = torch.where(is_other, similar, LOWEST).reshape(-1, num_rows)
        near = keep_top(similar, min(self.neighbours, num_rows - num_cls - 1))
        is_patch = torch.arange(num_begun, device=keys.device) >= num_cls
        # The class token takes up nothing.
        return near.reshape(-1, num_begun, num_rows) & is_patch[:, None]


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge, with patches at even distances in raster order beside its outliers.

    Of N patches with k outliers, every floor(floor(N / k) / 3)-th stays too, at least every one,
    from the first on; never the last patch, as in the published code. Distances are along the
    raster, not in the grid. All else is as in `PruMerge`.
    """

    name: ClassVar[str] = "prumerge-plus"

    def wanted(self, attention: Tensor) -> Tensor:
        """Which patches stay, by the attention of the candidates [B, N]; bool [B, N]."""
        is_outlier, size = outliers(attention), attention.shape[1]
        # Halves keep floor() away from whole numbers, where divisions of libraries round apart.
        count = is_outlier.float().sum(-1, keepdim=True)  # [B, 1]
        step = torch.floor(torch.full_like(count, size + 0.5) / count)
        step = torch.floor((step + 0.5) / 3).clamp(min=1)
        places = torch.arange(size, device=attention.device).float()  # [N]
        is_even = torch.floor((places + 0.5) / step) * step == places  # [B, N]
        return is_outlier | (is_even & (places < size - 1))


def outliers(values: Tensor) -> Tensor:
    """Mark values [B, N] above Q3 + 1.5 (Q3 - Q1), or the highest if none is; bool [B, N]."""
    ordered = torch.sort(values, dim=-1).values
    low, high = (_quantile(ordered, share) for share in (0.25, 0.75))  # [B, 1]
    return (values > high + 1.5 * (high - low)) | first_best(values)


def _quantile(ordered: Tensor, share: float) -> Tensor:
    """Quantile of ascending values, [B, N] -> [B, 1], linear between two of them."""
    place = share * (ordered.shape[1] - 1)
    below = int(place)
    above = min(below + 1, ordered.shape[1] - 1)
    left, right = ordered[:, below : below + 1], ordered[:, above : above + 1]
    return left + (right - left) * (place - below)


def one_head(states: Tensor) -> Tensor:
    """All heads side by side as one, [B, H, n, D] -> [B, 1, n, H * D]."""
    batch, heads, rows, size = states.shape
    return states.transpose(1, 2).reshape(batch, 1, rows, heads * size)
