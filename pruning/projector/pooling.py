"""Spatial pooling: the grid of patches becomes a smaller one by averaging (IVTP's baseline)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchsieve.pruning.catalogue import Catalogued
from patchsieve.pruning.entry import PROJECTOR
from patchsieve.pruning.schedules import pooled_side


@dataclass(frozen=True)
class Pooling(Catalogued):
    """Average the patches of each cell of a k x k grid (adaptive average pooling).

    The paper leaves open: before or after the projector.

    Attributes:
        keep: Tokens left, a square number; by default the square nearest below 1/9 of the patches.
        place: "before" the projector, which then has fewer rows to project, or "after" it.
    """

    name: ClassVar[str] = "pooling"
    acts_at = PROJECTOR

    keep: int | None = None
    place: str = "before"

    def side(self, grid: tuple[int, int]) -> int:
        """Cells of a row and of a column, k (see `pooled_side`)."""
        return pooled_side(self.keep, grid)

    def pool(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features of all patches in raster order, [B, h * w, C] -> [B, k * k, C]."""
        height, width = grid
        batch, _, size = patches.shape
        k = self.side(grid)
        # .to() keeps a constant's numbers in a trace on fake weights; device= would lose them.
        down = cell_weights(height, k).to(patches.device, patches.dtype)  # [k, h]
        across = cell_weights(width, k).to(patches.device, patches.dtype)  # [k, w]
        rows = down @ patches.reshape(batch, height, width * size)  # [B, k, w * C]
        rows = across @ rows.reshape(batch * k, width, size)  # [B * k, k, C]
        return rows.reshape(batch, k * k, size)

    def sources(self, grid: tuple[int, int]) -> list[int]:
        """Token that each patch went to, [h * w]; cells may overlap: the lowest then."""
        k = self.side(grid)
        rows = [first_cell(place, grid[0], k) for place in range(grid[0])]
        columns = [first_cell(place, grid[1], k) for place in range(grid[1])]
        return [row * k + column for row in rows for column in columns]


def cell(index: int, length: int, cells: int) -> tuple[int, int]:
    """First place of a cell and the place after its last, as adaptive pooling divides a line."""
    return index * length // cells, -(-(index + 1) * length // cells)


def first_cell(place: int, length: int, cells: int) -> int:
    """Lowest cell that holds a place."""
    return next(i for i in range(cells) if cell(i, length, cells)[1] > place)


def cell_weights(length: int, cells: int) -> Tensor:
    """Weights that average each cell of a line, float32 [cells, length]."""
    weights = [[0.0] * length for _ in range(cells)]
    for index, row in enumerate(weights):
        first, end = cell(index, length, cells)
        row[first:end] = [1 / (end - first)] * (end - first)
    return torch.tensor(weights)
