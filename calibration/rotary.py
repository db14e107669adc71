"""Positions on several axes inside Hugging Face's decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from patchsieve.pruning.rotary import angles


class GridRotary(nn.Module):
    """Turns rows by the sections of their positions; rows with one position as before.

    Args:
        base: The decoder's own rotary module.
        sections: Frequencies that turn by each axis.
    """

    def __init__(self, base: Any, sections: Sequence[int]) -> None:
        super().__init__()
        self.base, self.sections = base, tuple(sections)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [B, L, D] each, in the type of the rows `x`.

        Args:
            x: Any rows.
            position_ids: [B, L], or [B, L, A] with A sections.
        """
        if position_ids.ndim == 2:
            return self.base(x, position_ids)
        turn = angles(position_ids, self.base.inv_freq.float(), self.sections)  # [B, L, D / 2]
        both, scale = torch.cat((turn, turn), dim=-1), self.base.attention_scaling
        return (both.cos() * scale).to(x.dtype), (both.sin() * scale).to(x.dtype)


def install_sections(language_model: Any, sections: Sequence[int]) -> None:
    """Let a decoder take positions on several axes, once."""
    if sections and not isinstance(language_model.rotary_emb, GridRotary):
        language_model.rotary_emb = GridRotary(language_model.rotary_emb, sections)
