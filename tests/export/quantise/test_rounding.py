"""Rounding to int8 and int4 against a NumPy reference written from the formats' definitions."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from patchsieve.contract.formats import FORMATS
from patchsieve.contract.weights import WeightsFile
from patchsieve.export.quantise.hints import Grid, Hints
from patchsieve.export.quantise.rounding import dequantise, given, pack_int4, quantise
from patchsieve.export.weights import Weight, layout, write

INT8, INT4, INT4_64 = FORMATS["int8"], FORMATS["int4-32"], FORMATS["int4-64"]
NUMPY = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
}
TYPES = list(NUMPY)


def matrix(size_in: int = 128, size_out: int = 20, seed: int = 0) -> np.ndarray:
    """[in, out], channels of different sizes, a few large numbers."""
    rng = np.random.default_rng(seed)
    found = rng.standard_normal((size_in, size_out)) * rng.uniform(0.01, 2.0, size_out)
    found[rng.random(found.shape) < 0.01] *= 8
    return found.astype(np.float32)


def floats(scale: torch.Tensor) -> np.ndarray:
    return scale.float().numpy()


def as_type(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Numbers in a type, as float32 again."""
    return values.astype(NUMPY[dtype]).astype(np.float32)


def by_blocks(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """What is left of a matrix [in, out] in int4 with scales [in / block, out]."""
    wide = scale.repeat(len(weight) // len(scale), axis=0)
    return np.clip(np.rint(weight / wide), -8, 7) * wide


def errors(weight: np.ndarray, held: np.ndarray, blocks: int, cost: np.ndarray) -> np.ndarray:
    """Squared error of each block and column, weighted by input channel, [in / block, out]."""
    each = (held.astype(np.float64) - weight) ** 2 * cost[:, None]
    return each.reshape(blocks, -1, weight.shape[1]).sum(axis=1)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_int8_is_the_nearest_number_of_each_output_channel(dtype: torch.dtype) -> None:
    weight = matrix()
    numbers, scale = quantise(torch.from_numpy(weight), INT8, dtype)
    assert (numbers.dtype, scale.dtype) == (torch.int8, dtype)
    expected = as_type(np.abs(weight).max(axis=0) / np.float32(127), dtype)  # [out]
    assert np.array_equal(floats(scale), expected)
    whole = np.clip(np.rint(weight / expected), -127, 127)
    assert np.array_equal(numbers.numpy(), whole)
    assert np.array_equal(dequantise(numbers, scale).numpy(), (whole * expected).astype(np.float32))
    error = np.abs(dequantise(numbers, scale).numpy() - weight)
    step = 0.5 if dtype == torch.float32 else 1.0  # a scale that is rounded down clips the largest
    assert (error <= step * expected * 1.001).all()


@pytest.mark.parametrize("form", [INT4, INT4_64, FORMATS["int4-128"]], ids=lambda form: form.name)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_int4_takes_the_scale_of_least_error_in_each_block(form, dtype: torch.dtype) -> None:
    weight, blocks = matrix(), 128 // form.block
    numbers, scale = quantise(torch.from_numpy(weight), form, dtype)
    assert scale.shape == (blocks, 20) and scale.dtype == dtype
    assert int(numbers.min()) >= -8 and int(numbers.max()) <= 7
    found = floats(scale)
    whole = np.abs(weight).reshape(blocks, form.block, -1).max(axis=1) / np.float32(7)
    tried = [as_type(whole * (1 - step / 20), dtype) for step in range(8)]
    even = np.ones(len(weight))
    each = np.stack([errors(weight, by_blocks(weight, one), blocks, even) for one in tried])
    held = dequantise(numbers, scale).numpy()
    assert np.allclose(held, by_blocks(weight, found), rtol=1e-6, atol=0)
    ours = errors(weight, held, blocks, even)
    assert np.allclose(ours, each.min(axis=0), rtol=1e-5)
    assert (ours <= each[0] * (1 + 1e-6)).all()  # never worse than the scale of the largest number
    assert ours.sum() < 0.97 * each[0].sum()  # and better in the whole


def test_important_channels_are_rounded_more_finely() -> None:
    weight = matrix()
    cost = np.random.default_rng(1).uniform(0.01, 1.0, 128).astype(np.float32) ** 4
    plain = dequantise(*quantise(torch.from_numpy(weight), INT4, torch.float32)).numpy()
    hints = Hints(importance=torch.from_numpy(cost))
    guided = dequantise(*quantise(torch.from_numpy(weight), INT4, torch.float32, hints)).numpy()
    ours, before = (errors(weight, held, 4, cost) for held in (guided, plain))
    assert (ours <= before * (1 + 1e-5)).all()
    assert ours.sum() < 0.99 * before.sum()
    even = np.ones(128)
    assert errors(weight, guided, 4, even).sum() > errors(weight, plain, 4, even).sum()


def test_columns_are_rounded_alike_however_many_there_are() -> None:
    """The search takes 512 at once."""
    weight = torch.from_numpy(matrix(64, 1100))
    numbers, scale = quantise(weight, INT4, torch.float32)
    for first, last in ((0, 7), (505, 520), (1090, 1100)):
        some = quantise(weight[:, first:last].contiguous(), INT4, torch.float32)
        assert torch.equal(numbers[:, first:last], some[0])
        assert torch.equal(scale[:, first:last], some[1])


@pytest.mark.parametrize("form", [INT8, INT4], ids=lambda form: form.name)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_channel_of_zeros_stays_one_and_has_a_scale_that_divides(form, dtype) -> None:
    weight = matrix()
    weight[:, 3] = 0
    weight[:32, 5] = 0
    weight[:, 7] = 1e-30  # whose scale float16 cannot hold
    numbers, scale = quantise(torch.from_numpy(weight), form, dtype)
    assert torch.isfinite(scale.float()).all() and (scale != 0).all()
    held = dequantise(numbers, scale)
    assert torch.isfinite(held).all()
    assert (held[:, 3] == 0).all() and (held[:32, 5] == 0).all()
    assert held[:, 7].abs().max() <= 2e-30


def on_grid(bits: int, groups: int, dtype: torch.dtype) -> tuple[torch.Tensor, Grid]:
    """A matrix [128, 20] of whole numbers, all of which are there, times scales [groups, out]."""
    rng = np.random.default_rng(2)
    most = 1 << (bits - 1)
    whole = torch.from_numpy(rng.integers(-most, most, (128, 20)).astype(np.float32))
    whole[0], whole[1] = -most, most - 1
    scale = torch.from_numpy(rng.uniform(0.001, 0.02, (groups, 20)).astype(np.float32)).to(dtype)
    weight = whole * scale.float().repeat_interleave(128 // groups, 0)
    return weight, Grid(bits, scale[0] if groups == 1 and bits == 8 else scale)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("bits", "groups", "form"),
    [
        (4, 4, INT4),
        (4, 2, INT4),  # a scale for two of our blocks
        (4, 1, FORMATS["int4-128"]),
        (8, 1, INT8),
        (4, 1, INT8),  # one scale a channel, of four bits
    ],
    ids=str,
)
def test_numbers_of_a_quantised_checkpoint_are_held_exactly(
    bits: int, groups: int, form, dtype: torch.dtype
) -> None:
    weight, grid = on_grid(bits, groups, dtype)
    numbers, scale = quantise(weight, form, dtype, Hints(grid=grid))
    assert torch.equal(dequantise(numbers, scale), weight)
    without, its = quantise(weight, form, dtype)
    if bits == 4 and form.bits == 4:  # the search would take other scales: the largest is -8
        assert not torch.equal(dequantise(without, its), weight)


def test_a_grid_that_the_format_cannot_hold_counts_as_none() -> None:
    weight, grid = on_grid(4, 4, torch.float32)
    for form in (INT4_64, INT8):  # a scale of ours would serve several of theirs
        assert given(grid, form, 128) is None
        guided = quantise(weight, form, torch.float32, Hints(grid=grid))
        plain = quantise(weight, form, torch.float32)
        assert torch.equal(guided[0], plain[0]) and torch.equal(guided[1], plain[1])
    _, wide = on_grid(8, 1, torch.float32)
    assert given(wide, INT4, 128) is None


def test_four_bits_are_packed_as_onnx_packs_them() -> None:
    rng = np.random.default_rng(3)
    numbers = rng.integers(-8, 8, (32, 6)).astype(np.int8)
    content = pack_int4(torch.from_numpy(numbers)).numpy()
    assert content.shape == (32, 3) and content.dtype == np.uint8
    tensor = onnx.TensorProto(data_type=TensorProto.INT4, dims=numbers.shape)
    tensor.raw_data = content.tobytes()
    assert np.array_equal(numpy_helper.to_array(tensor).astype(np.int8), numbers)


class One:
    """A checkpoint of one matrix, [out, in]."""

    def __init__(self, weight: np.ndarray) -> None:
        self.held = torch.from_numpy(weight.T.copy())

    def read(self, name: str) -> torch.Tensor:
        assert name == "m.weight"
        return self.held


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("form", ["int8", "int8-weights", "int4-32", "int4-64", "int4-128"])
def test_a_stored_file_reads_as_the_rounded_matrix(form: str, kind: str, tmp_path) -> None:
    (tmp_path / "weights").mkdir()
    weight = matrix()
    entry = Weight("m.weight", "m.weight", weight.shape, True, form, True)
    path = tmp_path / "weights" / "x.safetensors"
    hints = Hints(input_scale=0.25)
    stored = write(
        path,
        WeightsFile("layer", 0, kind, form),
        [entry],
        One(weight),
        lambda _: None,
        lambda _: hints,
    )
    dtype = {str(each).removeprefix("torch."): each for each in TYPES}[kind]
    numbers, scale = quantise(torch.from_numpy(weight), FORMATS[form], dtype, hints)
    assert np.array_equal(stored[f"m.weight.{form}"].numpy().astype(np.int8), numbers.numpy())
    found = stored["m.weight.scale"].numpy().astype(np.float32)
    assert np.array_equal(found, floats(scale))
    assert float(stored["m.weight.input"].numpy().astype(np.float32)) == 0.25
    sizes = sum(part.num_bytes for part in layout(entry, kind))
    width = dtype.itemsize
    assert sizes == FORMATS[form].num_bytes(*weight.shape, kind) + width  # and the scale of rows
    assert sizes == sum(each.nbytes for each in stored.values())
