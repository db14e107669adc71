"""Rotary angles of rows that have a position on several axes (ATP-LLaVA section 3.3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def angles(positions: Tensor, inv_freq: Tensor, sections: Sequence[int] = ()) -> Tensor:
    """Angles by which each pair of numbers of a head is turned.

    The paper says "2D rotary embedding" and refers to RoFormer and Qwen2-VL; here as the latter:
    each axis has a section of the frequencies. A row whose positions are equal on all axes, as that
    of every text token, turns as it does without sections.

    Args:
        positions: int64 [..., L]; with sections [..., L, A], one for each.
        inv_freq: Radians per position, D / 2 of them, the fastest first.
        sections: How many of them turn by each axis; their sum is D / 2.

    Returns:
        Radians, float32 [..., L, D / 2].
    """
    if not sections:
        return positions.float().unsqueeze(-1) * inv_freq
    turned, first = [], 0
    for axis, count in enumerate(sections):
        part = inv_freq[first : first + count]  # not split(): TensorRT takes no sequences
        turned.append(positions[..., axis : axis + 1].float() * part)  # [..., L, section]
        first += count
    return torch.cat(turned, dim=-1)
