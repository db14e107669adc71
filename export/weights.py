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
from patchsieve.contract.weights import FLOAT, WeightsFile
from patchsieve.export.graphs.layers import Linear

DIRECTORY = "weights"  # inside the graphs' folder: external data must lie in or below it
DTYPES = {
    "float32": (torch.float32, ir.DataType.FLOAT, "F32"),
    "float16": (torch.float16, ir.DataType.FLOAT16, "F16"),
    "bfloat16": (torch.bfloat16, ir.DataType.BFLOAT16, "BF16"),
}
_CODES = {code: dtype for _, dtype, code in DTYPES.values()}  # of safetensors
_SIZES = {code: dtype.itemsize for dtype, _, code in DTYPES.values()}  # bytes of a number


class Source(Protocol):
    """Where tensors come from."""

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor."""


@dataclass(frozen=True)
class Weight:
    """One stored tensor.

    Attributes:
        name: Initializer in the graphs, and tensor in the stored file.
        source: Tensor in the checkpoint.
        shape: As stored.
        transposed: The checkpoint holds [out, in].
    """

    name: str
    source: str
    shape: tuple[int, ...]
    transposed: bool = False

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
    pack: Callable[[Tensor, Weight, str], list[Tensor]]


def _float_layout(weight: Weight, kind: str) -> list[Stored]:
    return [Stored(weight.name, DTYPES[kind][2], weight.shape)]


def _as_float(tensor: Tensor, weight: Weight, kind: str) -> list[Tensor]:
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


PACKINGS = {FLOAT: Packing(_float_layout, _as_float)}


def layout(weight: Weight, entry: WeightsFile) -> list[Stored]:
    """What a file of a format stores of a tensor."""
    return PACKINGS[entry.format].layout(weight, entry.type)


def write(
    path: Path,
    entry: WeightsFile,
    weights: Sequence[Weight],
    source: Source,
    progress: Callable[[int], None],
) -> dict[str, ir.ExternalTensor]:
    """Write one safetensors file, a tensor at a time, and return how graphs refer to it.

    Args:
        path: The file, in the folder `weights` of the graphs' folder.
        entry: Its type and format.
        weights: What it holds, in order.
        source: Where it comes from.
        progress: Called with the bytes of each tensor written.

    Returns:
        One external tensor per stored tensor.

    Raises:
        PatchsieveError: A number is too large for float16.
    """
    header: dict[str, object] = {}
    end = 0
    for stored in (stored for weight in weights for stored in layout(weight, entry)):
        start, end = end, end + stored.num_bytes
        header[stored.name] = {
            "dtype": stored.code,
            "shape": list(stored.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # data starts at a multiple of 64 bytes
    pack = PACKINGS[entry.format].pack
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights:
            tensor = source.read(weight.source)
            for numbers in pack(tensor.t() if weight.transposed else tensor, weight, entry.type):
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
        tensors[name] = ir.ExternalTensor(
            f"{DIRECTORY}/{path.name}",
            offset=8 + length + start,
            length=stop - start,
            dtype=_CODES[entry["dtype"]],
            shape=ir.Shape(entry["shape"]),
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
