"""VisionZip (Yang et al., "Longer is Better but Not Necessary in VLMs", CVPR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchsieve.pruning.encoder.walk import TowerMethod, TowerSite, gather_rows, places_of
from patchsieve.pruning.projector.mixed import Mixed
from patchsieve.pruning.rollout import start_row
from patchsieve.pruning.rows import mean_over, unit
from patchsieve.pruning.select import ascending, first_best_of_rows, keep_top

CONTEXTUAL_SHARE = 10 / 64  # of the tokens: 10 of 64, 20 of 128, 30 of 192 in the paper


@dataclass(frozen=True)
class VisionZip(TowerMethod):
    """Keep the dominant patches, and merge the rest into a few contextual tokens.

    Dominant are those that get the most attention of the class token in the last layer that runs,
    summed over the heads; the class token itself is one of them. Of the R patches that remain,
    every floor(R / M)-th is a target, M in all. Each further one goes to the target whose key,
    averaged over the heads, has the highest cosine with its own. A contextual token is the target
    plus the mean of what went there: a sum, as the published code has it.

    Differs from the paper: the class token comes after the dominant patches, not before. How many
    tokens are contextual follows from `keep` (`CONTEXTUAL_SHARE`). A tower without a class token
    uses the attention that all rows pay.

    Attributes:
        class_token: The class token is one of the tokens, if the tower has one. A model that feeds
            its class token anyway then gets it twice.
    """

    name: ClassVar[str] = "visionzip"

    class_token: bool = True

    def reduce(self, site: TowerSite, count: int) -> Mixed:
        """Leave `count` tokens: dominant patches, the class token, contextual tokens."""
        num_cls, num_rows = int(site.has_cls), site.rows.shape[1]
        num_contextual = max(1, int(count * CONTEXTUAL_SHARE + 0.5))  # M
        num_copies = int(site.has_cls and self.class_token)
        num_dominant = count - num_contextual - num_copies
        attention = start_row(site.group[-1], site.cls)  # [B, n]
        dominant = keep_top(site.candidates(attention), num_dominant)
        stays = site.whole(dominant, is_fused_kept=False)  # [B, n]
        kept = ascending(stays, num_cls + num_dominant)
        remaining = ascending(~stays, num_rows - num_cls - num_dominant)  # [B, R]
        step = remaining.shape[1] // num_contextual
        targets = remaining[:, : step * num_contextual : step]  # [B, M]
        goes = assigned(site, stays, targets)  # [B, M, n]
        is_target = targets[:, :, None] == torch.arange(num_rows, device=stays.device)
        places = torch.arange(num_contextual, device=stays.device).float()[:, None]
        place = ((goes | is_target).float() * places).sum(1).to(torch.int64)  # [B, n]
        first = num_cls + num_dominant + num_copies  # the first contextual token
        moved = torch.where(stays, places_of(stays), place + first)
        shares = goes.float() / goes.float().sum(-1, keepdim=True).clamp(min=1)  # [B, M, n]
        nothing = torch.zeros_like(attention)[:, None].expand(-1, first, -1)
        begins = torch.cat((kept, *[torch.zeros_like(kept[:, :1])] * num_copies, targets), dim=1)
        weights = torch.cat((nothing, shares), dim=1)  # [B, K, n]
        return Mixed(begins, weights, moved, num_copies + num_contextual)


def assigned(site: TowerSite, stays: Tensor, targets: Tensor) -> Tensor:
    """Which target [B, M] takes each row that neither stays nor is a target, bool [B, M, n]."""
    keys = unit(mean_over(site.group[-1].key.float(), 1))  # [B, n, D]
    similar = keys @ gather_rows(keys, targets).transpose(1, 2)  # [B, n, M]
    nearest = first_best_of_rows(similar).transpose(1, 2)  # [B, M, n]
    is_target = targets[:, :, None] == torch.arange(keys.shape[1], device=keys.device)
    is_free = ~stays & (is_target.float().sum(1) == 0)  # [B, n]
    return nearest & is_free[:, None]
