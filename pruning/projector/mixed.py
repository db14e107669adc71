"""Tokens made of several rows: what methods after the tower that merge leave."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchsieve.pruning.encoder.walk import gather_rows


@dataclass(frozen=True)
class Mixed:
    """Each new row begins with an old one, or with nothing, and takes a weighted sum of old rows.

    Attributes:
        begins: Old row that each new one begins with, unchanged, int64 [B, K'].
        weights: What each new row takes of the old rows, float32 [B, K, n], K >= K'; the rows from
            K' on begin with nothing.
        moved: See `Reduction`.
        num_fused: Rows at the end that are no patches.
        num_wanted: See `Reduction`.
    """

    begins: Tensor
    weights: Tensor
    moved: Tensor
    num_fused: int
    num_wanted: Tensor | None = None
    sizes: None = None

    def rows(self, rows: Tensor) -> Tensor:
        """[B, n, C] -> [B, K, C]."""
        begun = gather_rows(rows, self.begins).float()  # [B, K', C]
        added, size = self.weights @ rows.float(), begun.shape[1]  # [B, K, C]
        if size == added.shape[1]:
            return (begun + added).to(rows.dtype)
        return torch.cat((begun + added[:, :size], added[:, size:]), dim=1).to(rows.dtype)
