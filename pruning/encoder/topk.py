"""TopK: the patches that resemble or interest the class token most (IVTP's baseline)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from patchsieve.pruning.encoder.walk import TowerMethod, TowerSite
from patchsieve.pruning.rollout import start_row
from patchsieve.pruning.rows import cosine


@dataclass(frozen=True)
class TopK(TowerMethod):
    """Keep the patches nearest to the class token, layer by layer or at once.

    IVTP's tables prune 22.26 patches after each layer (the default schedule); one shot is a
    schedule of one layer.

    The paper leaves open: the "similarity with the CLS token", attention or cosine, and a tower
    without one: there the mean over all rows takes its place.

    Attributes:
        score: "attention" of the class token, mean of heads, in the layer before; or "cosine" of
            the rows after it.
    """

    name: ClassVar[str] = "topk"

    score: str = "attention"

    def scores(self, site: TowerSite) -> Tensor:
        """Score of each candidate, float32 [B, N]."""
        if self.score == "attention":
            return site.candidates(start_row(site.group[-1], site.cls))
        rows = site.rows.float()
        centre = rows[:, :1] if site.has_cls else rows.sum(1, keepdim=True) / rows.shape[1]
        return site.candidates(cosine(rows, centre))
