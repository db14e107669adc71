"""Weights of a bundle: safetensors written a tensor at a time, that every graph points into."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnx_ir as ir
import torch
from torch import Tensor, nn

from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.formats import FLOAT, FORMATS, NVFP4
from patchsieve.contract.weights import WeightsFile
from patchsieve.export.graphs.layers import Linear
from patchsieve.export.quantise import floats
from patchsieve.export.quantise.hints import NOTHING, Hints
from patchsieve.export.quantise.rounding import pack_int4, quantise

DIRECTORY = "weights"  # inside the graphs' folder: external data must lie in or below it
DTYPES = {
    "float32": (torch.float32, ir.DataType.FLOAT, "F32"),
    "float16": (torch.float16, ir.DataType.FLOAT16, "F16"),
    "bfloat16": (torch.bfloat16, ir.DataType.BFLOAT16, "BF16"),
}
# Of safetensors. It has no code for four bits: two numbers are a byte.
_FP8 = "F8_E4M3"
_CODES = {code: dtype for _, dtype, code in DTYPES.values()}
_CODES |= {"I8": ir.DataType.INT8, _FP8: ir.DataType.FLOAT8E4M3FN}
_SIZES = {code: dtype.itemsize for dtype, _, code in DTYPES.values()}
_SIZES |= {"I8": 1, "U8": 1, _FP8: 1}
# After a matrix's name: its scales, the scale of these, and that of its rows.
SCALE, WHOLE, INPUT = ".scale", ".whole", ".input"


class Source(Protocol):
    """Where tensors come from."""

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor."""


INT8_LARGEST = 127  # what `Hints.input_scale` is over
HintsOf = Callable[[str], Hints]  # what is known of a matrix, by its tensor in the checkpoint


@dataclass(frozen=True)
class Weight:
    """One stored tensor.

    Attributes:
        name: Initializer in the graphs, and tensor in the stored file.
        source: Tensor in the checkpoint.
        shape: As stored.
        transposed: The checkpoint holds [out, in].
        format: How it is stored, a key of `formats.FORMATS`; a matrix that is transposed may have
            another than float.
        has_input: A scale for the rows that it multiplies is stored too.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    transposed: bool = False
    format: str = FLOAT
    has_input: bool = False

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Shape in the checkpoint."""
        return self.shape[::-1] if self.transposed else self.shape


def weights_of(module: nn.Module, prefix: str = "", source_prefix: str = "") -> Iterator[Weight]:
    """The parameters of a graph module as stored tensors."""
    for path, part in module.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            turned = isinstance(part, Linear) and name == "weight"
            yield Weight(prefix + full, source_prefix + full, tuple(parameter.shape), turned)


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it: its name, its type by the code of safetensors, its shape."""

    name: str
    code: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * _SIZES[self.code]


@dataclass(frozen=True)
class Packing:
    """How a format of `patchsieve.contract.weights` stores a tensor.

    Attributes:
        layout: What is stored of a tensor whose part computes in a type.
        pack: The numbers of these, from the checkpoint's tensor in its stored order.
    """

    layout: Callable[[Weight, str], list[Stored]]
    pack: Callable[[Tensor, Weight, str, Hints], list[Tensor]]


def _float_layout(weight: Weight, kind: str) -> list[Stored]:
    return [Stored(weight.name, DTYPES[kind][2], weight.shape)]


def _as_float(tensor: Tensor, weight: Weight, kind: str, hints: Hints) -> list[Tensor]:
    """The tensor in a type; refuses numbers that this would make infinite."""
    cast = tensor.to(DTYPES[kind][0])
    if kind == "float16" and tensor.dtype != torch.float16 and cast.isinf().any():
        raise PatchsieveError(
            f"the weight {weight.source} does not fit float16",
            found=f"{tensor.float().abs().max():g}",
            expected=f"at most {torch.finfo(torch.float16).max:g}",
            do="choose bfloat16 or float32 for its part, with --precision",
        )
    return [cast]


_FLOAT = Packing(_float_layout, _as_float)


def _low_layout(weight: Weight, kind: str) -> list[Stored]:
    form, code = FORMATS[weight.format], DTYPES[kind][2]
    size_in, size_out = weight.shape
    name = packed(weight.name, weight.format)
    scales = (size_in // form.block, size_out) if form.block else (size_out,)
    if form.bits == 4:
        stored = [Stored(name, "U8", (size_in, size_out // 2))]
    else:
        stored = [Stored(name, _FP8 if form.is_float else "I8", weight.shape)]
    if form.has_levels:
        levels = Stored(weight.name + SCALE, _FP8, scales), Stored(weight.name + WHOLE, "F32", ())
        return [*stored, *levels]
    stored.append(Stored(weight.name + SCALE, code, scales))
    return [*stored, Stored(weight.name + INPUT, code, ())] if weight.has_input else stored


def _as_low(tensor: Tensor, weight: Weight, kind: str, hints: Hints) -> list[Tensor]:
    form, dtype = FORMATS[weight.format], DTYPES[kind][0]
    if form.has_levels:
        return list(floats.quantise_blocks(tensor, form.block))
    most = floats.LARGEST if form.is_float else INT8_LARGEST
    numbers, scale = (
        floats.quantise(tensor, dtype) if form.is_float else quantise(tensor, form, dtype, hints)
    )
    parts = [pack_int4(numbers) if form.bits == 4 else numbers, scale]
    if weight.has_input:
        assert hints.input_scale is not None, weight.name
        parts.append(torch.tensor(hints.input_scale * INT8_LARGEST / most, dtype=dtype))
    return parts


_LOW = Packing(_low_layout, _as_low)
PACKINGS = {name: _LOW if form.bits else _FLOAT for name, form in FORMATS.items()}


def packed(name: str, form: str) -> str:
    """What a file calls the numbers of a matrix in a format."""
    return name if form == FLOAT else f"{name}.{form}"


def layout(weight: Weight, kind: str) -> list[Stored]:
    """What a file whose part has a type stores of a tensor."""
    return PACKINGS[weight.format].layout(weight, kind)


def write(
    path: Path,
    entry: WeightsFile,
    weights: Sequence[Weight],
    source: Source,
    progress: Callable[[int], None],
    hints: HintsOf = lambda _: NOTHING,
) -> dict[str, ir.ExternalTensor]:
    """Write one safetensors file, a tensor at a time, and return how graphs refer to it.

    Args:
        path: The file, in the folder `weights` of the graphs' folder.
        entry: Its type and format.
        weights: What it holds, in order.
        source: Where it comes from.
        progress: Called with the bytes of each tensor written.
        hints: What guides the rounding of a matrix.

    Returns:
        One external tensor per stored tensor.

    Raises:
        PatchsieveError: A number is too large for float16.
    """
    header: dict[str, object] = {}
    end = 0
    for stored in (stored for weight in weights for stored in layout(weight, entry.type)):
        start, end = end, end + stored.num_bytes
        header[stored.name] = {
            "dtype": stored.code,
            "shape": list(stored.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # data starts at a multiple of 64 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights:
            tensor = source.read(weight.source)
            tensor = tensor.t() if weight.transposed else tensor
            pack = PACKINGS[weight.format].pack
            for numbers in pack(tensor, weight, entry.type, hints(weight.source)):
                # As bytes, because numpy has no bfloat16.
                content = numbers.contiguous().flatten().view(torch.uint8).numpy()
                file.write(content.data)
                progress(content.nbytes)
    return stored_weights(path)


def stored_weights(path: Path) -> dict[str, ir.ExternalTensor]:
    """How graphs refer to the tensors of a weights file, by name.

    Args:
        path: The file, in the folder `weights` of the graphs' folder.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        four_bits = ir.DataType.FLOAT4E2M1 if name.endswith(NVFP4) else ir.DataType.INT4
        dtype, shape = _CODES.get(entry["dtype"], four_bits), entry["shape"]
        if dtype == four_bits:
            shape = [*shape[:-1], 2 * shape[-1]]
        tensors[name] = ir.ExternalTensor(
            f"{DIRECTORY}/{path.name}",
            offset=8 + length + start,
            length=stop - start,
            dtype=dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=str(path.parent.parent),
        )
    return tensors


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules built inside have parameters of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
