"""What guides the rounding of a weights file: equal channels, importance, and scales of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from patchsieve.contract.formats import FORMATS
from patchsieve.export.quantise.hints import NOTHING
from patchsieve.export.quantise.smoothing import smoothed
from patchsieve.export.quantise.statistics import Statistics
from patchsieve.export.weights import HintsOf, Source, Weight


@dataclass(frozen=True)
class Guided:
    """A file's tensors, where they come from, and what is known of its matrices.

    Attributes:
        weights: The tensors; those whose rows have a static scale say so.
        source: Gives them with their channels made equal.
        hints: By a tensor's name in the checkpoint.
    """

    weights: tuple[Weight, ...]
    source: Source
    hints: HintsOf


def guide(
    weights: tuple[Weight, ...], source: Source, measured: Statistics | None = None
) -> Guided:
    """Guide the rounding of a file's matrices.

    Args:
        weights: The file's tensors, with their formats.
        source: Where they come from.
        measured: Statistics of the rows that the matrices multiply.
    """
    if all(FORMATS[weight.format].bits == 0 for weight in weights):
        return Guided(weights, source, lambda _: NOTHING)
    even = smoothed(source, weights, measured)

    def with_input(weight: Weight) -> Weight:
        is_low = weight.transposed and FORMATS[weight.format].is_dynamic
        return replace(weight, has_input=is_low and even.is_measured(weight.source))

    return Guided(tuple(map(with_input, weights)), even, even.hints)
