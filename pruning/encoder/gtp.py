"""Group-wise token pruning of IVTP (Huang et al., "IVTP", ECCV 2024), inside the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchsieve.pruning.encoder.walk import TowerMethod, TowerSite
from patchsieve.pruning.rollout import importance, rollout_row, start_row, value_norms


@dataclass(frozen=True)
class GTP(TowerMethod):
    """Drop patches after each group of layers, by the class token's rollout row over the group.

    Each score is the rollout attention of the class token (eq. 3) times the length of the patch's
    value in the group's top layer, over their sum (eq. 4). What is dropped is dropped, not fused.

    The paper leaves open: the counts (by default a geometric fall, `TowerSchedule`), the heads
    (mean of their attention; `value_heads` for the values), a tower without a class token (every
    row is the start then, so a patch counts by the attention that all patches pay it), and where in
    its layer a group prunes. Here after it, so that a layer stays whole.

    Attributes:
        fusion: How the group's layers become one row: "rollout" (eq. 3); the class token's row of
            the top layer alone ("single"), or the "mean", "max" or product ("multiply") of the
            rows of all layers of the group (table 5). With groups of one layer all are layer-wise.
        identity_first: Add the identity in a group's lowest layer too, as Abnar & Zuidema do.
        value_heads: "concatenated" or "summed" (see `value_norms`).
    """

    name: ClassVar[str] = "gtp"

    fusion: str = "rollout"
    identity_first: bool = False
    value_heads: str = "concatenated"

    def scores(self, site: TowerSite) -> Tensor:
        """Score of each candidate, float32 [B, N] (eq. 4)."""
        if self.fusion == "rollout":
            row = rollout_row(site.group, site.cls, identity_first=self.identity_first)
        else:
            row = self._fused(site)
        value = site.group[-1].value
        assert value is not None  # a tower's layers bring theirs
        norms = value_norms(value, self.value_heads)
        return importance(site.candidates(row), site.candidates(norms))

    def _fused(self, site: TowerSite) -> Tensor:
        """Rows of single layers, fused without products of maps, [B, n]."""
        layers = site.group[-1:] if self.fusion == "single" else site.group
        rows = torch.stack([start_row(layer, site.cls) for layer in layers])  # [layers, B, n]
        if self.fusion == "max":
            return rows.amax(0)
        if self.fusion == "multiply":
            product = rows[0]
            for row in rows[1:]:
                product = product * row
            return product
        return rows.sum(0) / len(layers)
