"""Factors that make matrices easy to round, chosen by the error that rounding makes of outputs.

Some matrices read the same rows x. Dividing channel j of x by s_j and multiplying row j of the
matrices by s_j changes no product, but it changes what rounding does:

    SmoothQuant (arXiv 2211.10438, eq. 4)   s_j = max|x_j|**a / max_k|W_jk|**(1 - a)
    AWQ (arXiv 2306.00978, eq. 5)           s_j = (mean|x_j|)**a

The exponent a comes from a grid, as in AWQ. What decides is the predicted error of the outputs y,
with channels taken as uncorrelated and rounding errors as uniform:

    E[(dy_k)**2] = sum_j E[x_j**2] * dW_jk**2 + sum_j min(step**2 / 12, E[x_j**2]) * W_jk**2

dW is what the format really rounds. The second sum is for formats that round rows too, with one
step for all channels: step = (largest - smallest x) / 255.

Differs from the papers: both forms are tried with mean and largest |x|, for every format; the error
is predicted from statistics of each channel, so that no rows are kept; and s_j is a unit of the
channel, the norm's own weight, times a power of two. So a checkpoint whose channels are scaled,
with the inverse in the matrices, gets the same numbers, and stored norms round nothing. Where the
rows were measured, s_j = 1 and parts of the unit are tried too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchsieve.contract.formats import Format
from patchsieve.export.quantise import floats
from patchsieve.export.quantise.hints import Hints
from patchsieve.export.quantise.rounding import dequantise, quantise
from patchsieve.export.quantise.statistics import InputStatistics

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # finer steps gained nothing on the demo model
_STEPS = 255  # of the range of rows
_WIDEST = 12  # a factor is at most 2**12 from the middle one, per unit


@dataclass(frozen=True)
class Reader:
    """A matrix of those that read the same rows, as much as the search needs of it.

    Attributes:
        sample: Some of its columns, [in, out'], each at the scale at which its output counts.
        format: How it will be stored.
    """

    sample: Tensor
    format: Format


def folded(inputs: InputStatistics, factors: Tensor) -> InputStatistics:
    """Statistics of rows whose channels are divided by factors [in]."""
    return InputStatistics(
        inputs.mean / factors, inputs.square / factors**2, inputs.largest / factors
    )


def choose(
    readers: Sequence[Reader], inputs: InputStatistics, unit: Tensor, *, is_measured: bool = False
) -> Tensor:
    """The factors of the candidates that make the smallest error, [in].

    Args:
        readers: The matrices that read the rows.
        inputs: What is known of the rows.
        unit: Natural size of each channel, positive, [in].
        is_measured: The inputs are statistics.
    """
    inputs = folded(inputs, unit)
    readers = [_in_units(reader, inputs, unit) for reader in readers]
    weight = torch.cat([reader.sample for reader in readers], dim=1).abs().amax(1)  # [in]
    found, least = torch.ones_like(unit), torch.inf
    # What a norm's own weight says is known without statistics: only with them may it be left.
    own = _own_scales(unit) if is_measured else []
    for candidate in (*own, *_candidates(inputs, weight)):
        error = predicted_error(readers, inputs, candidate)
        if error < least:
            found, least = candidate, error
    factors = found * unit
    # Rounding ignores a power of two common to all, and this keeps the numbers where they were.
    return factors / _power_of_two(factors.median())


def predicted_error(readers: Sequence[Reader], inputs: InputStatistics, factors: Tensor) -> float:
    """Mean square error of the outputs over their mean square, summed over matrices.

    Args:
        readers: The matrices, unfolded.
        inputs: Statistics of the rows, unfolded.
        factors: What to fold, [in].
    """
    after, total = folded(inputs, factors), 0.0
    for reader in readers:
        weight = reader.sample * factors[:, None]  # [in, out']
        energy = (inputs.square @ reader.sample.square()).sum()
        error = after.square @ (_held(weight, reader.format, after) - weight).square()  # [out']
        if reader.format.is_dynamic:
            noise = (_span(after.largest) / _STEPS).square() / 12
            error += after.square.clamp(max=noise) @ weight.square()
        total += float(error.sum() / energy) if energy > 0 else 0.0
    return total


def _held(weight: Tensor, form: Format, inputs: InputStatistics) -> Tensor:
    """What a matrix [in, out] is read as after it was stored in a format."""
    if form.is_float:
        return floats.rounded(weight, form.block)
    return dequantise(*quantise(weight, form, torch.float32, Hints(importance=inputs.square)))


def _span(largest: Tensor) -> Tensor:
    """Expected range of rows, by the largest |x| of each channel, [in].

    A channel is taken to have its peak on one side of zero, on either with equal chance.
    """
    peaks = largest.sort(descending=True).values[:32]
    return peaks[0] + (peaks[1:] * 0.5 ** torch.arange(1, len(peaks))).sum()


def _in_units(reader: Reader, inputs: InputStatistics, unit: Tensor) -> Reader:
    """The matrix for rows in units, with outputs of deviation 1 on average."""
    weight = reader.sample * unit[:, None]
    size = (inputs.square @ weight.square()).mean().sqrt()
    return Reader(weight / (size if size > 0 else 1.0), reader.format)


def _candidates(inputs: InputStatistics, weight: Tensor) -> Iterator[Tensor]:
    """Factors to try, powers of two, [in]; `weight` is the largest |W| of each channel, [in]."""
    seen = set()
    weight = _bounded(weight)
    for size in map(_bounded, (inputs.mean, inputs.largest)):
        for a in EXPONENTS:
            for factors in (size**a, size**a / weight ** (1 - a)):
                candidate = _power_of_two(factors / factors.median())
                key = candidate.numpy().tobytes()
                if key not in seen:
                    seen.add(key)
                    yield candidate


def _own_scales(unit: Tensor) -> Iterator[Tensor]:
    """Factors over the unit that fold part of it, none of it first (s = 1), [in]."""
    yield 1 / unit
    for a in EXPONENTS[1:-1]:
        yield _power_of_two(_bounded(unit ** (a - 1)))


def _bounded(sizes: Tensor) -> Tensor:
    """Sizes over their median, kept within what a factor may be: a dead channel has size 0."""
    middle = sizes.median()
    if middle <= 0:
        return torch.ones_like(sizes)
    return (sizes / middle).clamp(2.0**-_WIDEST, 2.0**_WIDEST)


def _power_of_two(numbers: Tensor) -> Tensor:
    """The nearest powers of two, by ratio."""
    return torch.exp2(torch.log2(numbers).round())
