"""What guides the rounding of a weights file: equal channels, importance, and scales of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchsieve.contract.formats import FLOAT, FORMATS
from patchsieve.export.quantise.hints import NOTHING, Hints
from patchsieve.export.quantise.rounding import dequantise, quantise
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
    formats = {_matrix(w): [w.format] for w in weights if w.transposed}
    if all(FORMATS[form].bits == 0 for (form,) in formats.values()):
        return Guided(weights, source, lambda _: NOTHING)
    even = smoothed(source, [w.source for w in weights], formats, measured, _rounded)

    def hints(name: str) -> Hints:
        matrix = name.removesuffix(".weight")
        found = even.inputs(matrix)
        scale = None if found is None else float(found.largest.max()) / 127
        return Hints(even.importance(matrix), input_scale=scale or None)

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
