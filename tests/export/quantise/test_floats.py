"""FP8 and NVFP4, against ml_dtypes and plain NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from patchsieve.export.quantise import floats

FP4, FP8 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn


def matrix(size_in: int = 64, size_out: int = 6) -> torch.Tensor:
    """Channels of unlike size, a channel and a block of zeros."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((size_in, size_out)) * np.logspace(-3, 1, size_out)
    values[:, 2] = 0
    values[16:32, 3] = 0
    return torch.from_numpy(values).float()


def unpacked(codes: torch.Tensor) -> np.ndarray:
    """The numbers of bytes [in, out / 2], float32 [in, out]."""
    whole = codes.numpy()
    halves = np.stack([whole & 15, whole >> 4], -1).reshape(len(whole), -1)
    return halves.view(FP4).astype(np.float32)


def test_fp8_is_the_nearest_number_of_each_channel() -> None:
    weight = matrix()
    numbers, scale = floats.quantise(weight, torch.float32)
    expected = np.abs(weight.numpy()).max(0) / 448
    expected[2] = 1  # no scale is 0
    np.testing.assert_allclose(scale.numpy(), expected, rtol=1e-6)
    nearest = (weight.numpy() / scale.numpy()).astype(FP8).astype(np.float32)
    assert np.array_equal(numbers.float().numpy(), nearest)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_scale_that_is_rounded_down_makes_no_number_infinite(kind: torch.dtype) -> None:
    weight = torch.linspace(0.1, 1, 4096).repeat(2, 1)
    numbers, scale = floats.quantise(weight, kind)
    assert scale.dtype == kind and numbers.float().isfinite().all()
    assert ((numbers.float() * scale.float() - weight).abs() / weight).max() < 0.07


def test_fp4_is_the_nearest_number_and_a_tie_goes_to_the_even_code() -> None:
    # The largest is 6, and the scales are 1: the numbers are rounded as they are.
    values = np.concatenate([np.linspace(-6, 6, 97), [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]])
    column = np.concatenate([values, np.full(112 - len(values), 6)]).astype(np.float32)
    column[::16] = 6
    weight = torch.from_numpy(np.stack([column, -column], 1)) * 448
    codes, scale, whole = floats.quantise_blocks(weight, 16)
    assert scale.float().unique().tolist() == [448] and whole == 1
    expected = (weight.numpy() / 448).astype(FP4).astype(np.float32)
    assert np.array_equal(unpacked(codes), expected)


def test_a_block_has_a_scale_of_fp8_and_the_matrix_one_more() -> None:
    weight = matrix()
    codes, scale, whole = floats.quantise_blocks(weight, 16)
    assert (codes.dtype, codes.shape) == (torch.uint8, (64, 3))
    assert (scale.dtype, scale.shape) == (torch.float8_e4m3fn, (4, 6))
    assert (whole.dtype, whole.shape) == (torch.float32, ())
    largest = np.abs(weight.numpy()).reshape(4, 16, 6).max(1)
    assert float(whole) == pytest.approx(largest.max() / 6 / 448)
    exact = np.maximum(largest / 6 / float(whole), 2.0**-9)
    assert np.array_equal(scale.float().numpy(), exact.astype(FP8).astype(np.float32))
    assert (scale.float() > 0).all()
    read = unpacked(codes) * (scale.float().numpy() * float(whole)).repeat(16, 0)
    assert np.array_equal(read, floats.rounded(weight, 16).numpy())
    # A step is at most 2 of 6, so that half of it is a sixth of the largest; the scale adds some.
    bound = np.maximum(largest / 6 * 1.1, 2.0**-9 * float(whole) * 6).repeat(16, 0)
    assert (np.abs(read - weight.numpy()) <= bound).all()


def test_what_fp8_holds_is_what_its_numbers_say() -> None:
    weight = matrix()
    numbers, scale = floats.quantise(weight, torch.float32)
    assert torch.equal(floats.rounded(weight, 0), numbers.float() * scale)
    assert torch.equal(floats.rounded(torch.zeros(16, 2), 16), torch.zeros(16, 2))
