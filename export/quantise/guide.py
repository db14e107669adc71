"""What guides the rounding of a weights file: equal channels, importance, and scales of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchsieve.contract.formats import FLOAT, FORMATS
from patchsieve.export.quantise.hints import NOTHING, Grid, Hints
from patchsieve.export.quantise.rounding import dequantise, given, quantise
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
    formats = {_matrix(w): [w.format] for w in weights if w.transposed}
    if all(FORMATS[form].bits == 0 for (form,) in formats.values()):
        return Guided(weights, source, lambda _: NOTHING)
    grids = {_matrix(w): grid(w.source) for w in weights if w.transposed}
    forms = {_matrix(w): (FORMATS[w.format], w.shape[0]) for w in weights if w.transposed}
    kept = {name for name, found in grids.items() if given(found, *forms[name]) is not None}
    names = [w.source for w in weights]
    even = smoothed(source, names, formats, measured, _rounded, kept)

    def hints(name: str) -> Hints:
        matrix = name.removesuffix(".weight")
        found = even.inputs(matrix)
        scale = None if found is None else float(found.largest.max()) / 127
        own = grids[matrix] if matrix in kept else None
        return Hints(even.importance(matrix), own, scale or None)

    def with_input(weight: Weight) -> Weight:
        is_low = weight.transposed and FORMATS[weight.format].is_dynamic
        known = is_low and measured is not None and measured.of(_matrix(weight)) is not None
        return replace(weight, has_input=known)

    return Guided(tuple(map(with_input, weights)), even, hints)


def _matrix(weight: Weight) -> str:
    return weight.source.removesuffix(".weight")


def _rounded(weight: Tensor, form: str) -> Tensor:
    """What a matrix [in, out] is held as in a format."""
    if form == FLOAT:
        return weight
    return dequantise(*quantise(weight, FORMATS[form], torch.float32))
