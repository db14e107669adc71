"""Round a matrix to int8 or int4, symmetric about zero.

A number w is stored as q = clip(round(w / s)) and read as q * s. The scale s belongs to an output
channel (int8), or to a block of input channels of an output channel (int4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchsieve.contract.formats import Format
from patchsieve.export.quantise.hints import NOTHING, Grid, Hints

_LEAST, _MOST = -8, 7  # of four bits
# A block's scale over the one that reaches its largest number: smaller ones clip it, and round all
# others more finely.
_SHRINKS = tuple(1.0 - step / 20 for step in range(8))
_COLUMNS = 512  # rounded at once, so that the search takes little memory


def quantise(
    weight: Tensor, form: Format, dtype: torch.dtype, hints: Hints = NOTHING
) -> tuple[Tensor, Tensor]:
    """Whole numbers and scales of a matrix.

    Args:
        weight: [in, out].
        form: The format, of 8 or 4 bits.
        dtype: Type of the scales. They are rounded to it before the numbers are divided by them.
        hints: What guides the scales.

    Returns:
        int8 [in, out], and the scales: [out], or [in / block, out].
    """
    scale = given(hints.grid, form, len(weight))
    if form.block:
        columns = weight.split(_COLUMNS, dim=1)
        grids = [None] * len(columns) if scale is None else scale.split(_COLUMNS, 1)
        parts = [
            _blocks(c.float(), form.block, dtype, hints.importance, grid)
            for c, grid in zip(columns, grids, strict=True)
        ]
        return torch.cat([q for q, _ in parts], 1), torch.cat([s for _, s in parts], 1)
    least = -127 if scale is None else -128
    if scale is None:
        scale = weight.float().abs().amax(0) / 127
    scale = _usable(scale, dtype)
    return (weight.float() / scale.float()).round_().clamp_(least, 127).to(torch.int8), scale


def given(grid: Grid | None, form: Format, size_in: int) -> Tensor | None:
    """The scales of a grid as a format stores them; None if it cannot hold its numbers exactly.

    Args:
        grid: That of a matrix [in, out]; None without.
        form: The format.
        size_in: Input channels of the matrix.

    Returns:
        [out], or [in / block, out].
    """
    if grid is None or form.is_float or grid.bits > form.bits:
        return None
    scale = grid.scale if grid.scale.ndim == 2 else grid.scale[None]  # [G, out]
    if not form.block:
        return scale[0] if len(scale) == 1 else None
    blocks, rest = divmod(size_in // len(scale), form.block)
    return None if rest else scale.repeat_interleave(blocks, 0)


def dequantise(numbers: Tensor, scale: Tensor) -> Tensor:
    """The matrix [in, out] that whole numbers [in, out] and their scales stand for, float32."""
    if scale.ndim == 1:
        return numbers.float() * scale.float()
    block = len(numbers) // len(scale)
    return numbers.float() * scale.float().repeat_interleave(block, 0)


def pack_int4(numbers: Tensor) -> Tensor:
    """int8 [in, out] between -8 and 7 -> bytes [in, out / 2], the lower half of a byte first."""
    halves = numbers.view(torch.uint8) & 0xF
    return halves[:, 0::2] | (halves[:, 1::2] << 4)


def _blocks(
    weight: Tensor, block: int, dtype: torch.dtype, importance: Tensor | None, grid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Round columns [in, n], each block by the scale of least error."""
    size_in, size_out = weight.shape
    rows = weight.view(-1, block, size_out)  # [in / block, block, n]
    if grid is not None:
        best = _usable(grid, dtype)
    else:
        cost = None if importance is None else importance.float().view(-1, block, 1)
        best = _search(rows, dtype, cost)
    return _round(rows, best).to(torch.int8).view(size_in, size_out), best


def _search(rows: Tensor, dtype: torch.dtype, cost: Tensor | None) -> Tensor:
    """The scale of each block that makes the least squared error, weighted by `cost`."""
    whole = rows.abs().amax(1) / _MOST  # [in / block, n]
    best = _usable(whole, dtype)
    least: Tensor | None = None
    for shrink in _SHRINKS:
        scale = _usable(whole * shrink, dtype)
        error = (_round(rows, scale) * scale.float().unsqueeze(1)).sub_(rows).square_()
        total = (error if cost is None else error.mul_(cost)).sum(1)
        if least is None:
            least, best = total, scale
        else:
            better = total < least
            least, best = torch.where(better, total, least), torch.where(better, scale, best)
    return best


def _round(rows: Tensor, scale: Tensor) -> Tensor:
    return (rows / scale.float().unsqueeze(1)).round_().clamp_(_LEAST, _MOST)


def _usable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale in its type; 1 for a channel of zeros."""
    cast = scale.to(dtype)
    return torch.where(cast == 0, torch.ones_like(cast), cast)
