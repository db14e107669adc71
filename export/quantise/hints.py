"""What is known of a matrix before it is rounded."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The symmetric grid on which all numbers of a matrix lie: whole numbers times a scale.

    Attributes:
        bits: 4 for whole numbers from -8 to 7, 8 for -128 to 127.
        scale: [in/g, out] for blocks of g numbers along the input axis, [out] for one block each.
    """

    bits: int
    scale: Tensor


@dataclass(frozen=True)
class Hints:
    """Hints for one matrix.

    Attributes:
        importance: Mean of x**2 of each input channel, [in]; None if it is not known.
        grid: The grid that the checkpoint came with; None if its numbers lie on none.
    """

    importance: Tensor | None = None
    grid: Grid | None = None
