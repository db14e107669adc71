"""What is known of a matrix beside its numbers when it is quantised."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Numbers that a matrix already lies on: whole numbers times a scale, zero in the middle.

    Attributes:
        bits: 4 for -8 to 7, 8 for -128 to 127.
        scale: [in / block, out], or [out] if an output channel has one scale.
    """

    bits: int
    scale: Tensor


@dataclass(frozen=True)
class Hints:
    """What guides the rounding of one matrix.

    Attributes:
        importance: Mean of x**2 of each input channel, [in]: how much an error of its weights
            counts. None if nothing is known: all count alike.
        grid: The scales that the checkpoint came with; None for a float checkpoint.
        input_scale: Largest |x| of the rows that the matrix multiplies, over 127: the static scale
            that TensorRT's int8 rounds them by. None without statistics.
    """

    importance: Tensor | None = None
    grid: Grid | None = None
    input_scale: float | None = None


NOTHING = Hints()
