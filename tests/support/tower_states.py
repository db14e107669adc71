"""Made-up rows of a tower's layers."""

from __future__ import annotations

import torch

# What the layers hold: far from flat; all rows equal; values, keys and rows of length 0.
CONTENTS = ("random", "equal", "zero")
BATCH = 2


def states(seed: int, rows: int, width: int, content: str) -> torch.Tensor:
    """Rows [B, n, width] of a layer, the same for the same number of rows."""
    generator = torch.Generator().manual_seed(1000 * seed + rows)
    made = torch.randn(BATCH, rows, width, generator=generator)
    if content == "equal":
        return torch.eye(1, width).expand(BATCH, rows, -1) * 2  # lengths without rounding
    if content == "zero":
        made[:, 1::2] = 0
    return made


def heads(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[B, n, H * D] -> [B, H, n, D]."""
    return rows.reshape(*rows.shape[:2], num_heads, -1).transpose(1, 2)
