"""What guides the rounding of a weights file: equal channels, importance, and scales of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from patchsieve.contract.formats import FORMATS
from patchsieve.export.quantise.hints import NOTHING, Grid, Hints
from patchsieve.export.quantise.rounding import given
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
    weights: tuple[Weight, ...],
    source: Source,
    measured: Statistics | None = None,
    grid: Callable[[str], Grid | None] = lambda _: None,
) -> Guided:
    """Guide the rounding of a file's matrices.

    A matrix whose format holds the checkpoint's own numbers exactly keeps them: nothing is folded
    into it.

    Args:
        weights: The file's tensors, with their formats.
        source: Where they come from.
        measured: Statistics of the rows that the matrices multiply.
        grid: The grid that a tensor came with, by its name in the checkpoint.
    """
    if all(FORMATS[weight.format].bits == 0 for weight in weights):
        return Guided(weights, source, lambda _: NOTHING)
    grids = {weight.source: grid(weight.source) for weight in weights if weight.transposed}
    kept = [
        weight.source
        for weight in weights
        if weight.transposed
        and given(grids[weight.source], FORMATS[weight.format], weight.shape[0]) is not None
    ]
    even = smoothed(source, weights, measured, [name.removesuffix(".weight") for name in kept])

    def hints(name: str) -> Hints:
        return replace(even.hints(name), grid=grids[name] if name in kept else None)

    def with_input(weight: Weight) -> Weight:
        is_low = weight.transposed and FORMATS[weight.format].rounds_rows
        return replace(weight, has_input=is_low and even.is_measured(weight.source))

    return Guided(tuple(map(with_input, weights)), even, hints)
