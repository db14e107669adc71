"""Round a matrix to FP8 (E4M3), or to NVFP4: FP4 (E2M1) in blocks with scales of FP8.

FP8: w is stored as q = fp8(w / s) and read as q * s, with a scale s for each output channel. NVFP4:
w is stored as q = fp4(w / (s * g)) and read as q * s * g, with an FP8 scale s for each block of
input channels of an output channel, and one float32 scale g for the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 448  # of FP8
_LEAST = 2.0**-9  # the least above 0: TensorRT takes no scale of 0
_STEPS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of FP4
# Halfway between two steps; a number right there goes to the step of an even code.
_HALVES = tuple((low + high) / 2 for low, high in zip(_STEPS, _STEPS[1:], strict=False))


def quantise(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """FP8 numbers [in, out] of a matrix [in, out], and scales [out] of a type."""
    wide = weight.float()
    scale = (wide.abs().amax(0) / LARGEST).to(dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    numbers = (wide / scale.float()).clamp_(-LARGEST, LARGEST)
    return numbers.to(torch.float8_e4m3fn), scale


def quantise_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """NVFP4 of a matrix.

    Args:
        weight: [in, out].
        block: Input channels that share a scale.

    Returns:
        Bytes [in, out / 2], the lower half of a byte first; FP8 scales [in / block, out]; the scale
        of these, float32 [].
    """
    wide = weight.float()
    rows = wide.reshape(-1, block, wide.shape[1])  # [in / block, block, out]
    largest = rows.abs().amax(1) / _STEPS[-1]
    whole = largest.max() / LARGEST
    whole = torch.where(whole == 0, torch.ones_like(whole), whole)
    scale = (largest / whole).clamp(_LEAST, LARGEST).to(torch.float8_e4m3fn)
    codes = _codes(rows / (scale.float() * whole).unsqueeze(1)).view(wide.shape)
    return codes[:, 0::2] | (codes[:, 1::2] << 4), scale, whole


def rounded(weight: Tensor, block: int) -> Tensor:
    """What a matrix [in, out] is held as, float32: NVFP4 if it has blocks, FP8 if not."""
    if not block:
        numbers, scale = quantise(weight, torch.float32)
        return numbers.float() * scale
    codes, scale, whole = quantise_blocks(weight, block)
    halves = torch.stack([codes & 15, codes >> 4], -1).view(weight.shape).long()
    steps = torch.tensor([*_STEPS, *(-step for step in _STEPS)])
    return steps[halves] * (scale.float() * whole).repeat_interleave(block, 0)


def _codes(values: Tensor) -> Tensor:
    """The codes of the nearest FP4 numbers, a sign and three bits in each byte."""
    halves = torch.tensor(_HALVES)
    # `bucketize` leaves a number that equals a half below it: right where that code is even.
    odd = torch.arange(len(halves)) % 2 == 1
    halves = torch.where(odd, halves.nextafter(torch.zeros(())), halves)
    codes = torch.bucketize(values.abs().contiguous(), halves, out_int32=True).to(torch.uint8)
    return codes | (values.signbit().to(torch.uint8) << 3)
