"""Weights of a bundle: safetensors written a tensor at a time, that every graph points into."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnx_ir as ir
import torch
from torch import Tensor, nn

from patchsieve.contract.errors import PatchsieveError
from patchsieve.export.graphs.layers import Linear

DIRECTORY = "weights"  # inside the graphs' folder: external data must lie in or below it
DTYPES = {
    "float32": (torch.float32, ir.DataType.FLOAT, "F32"),
    "float16": (torch.float16, ir.DataType.FLOAT16, "F16"),
    "bfloat16": (torch.bfloat16, ir.DataType.BFLOAT16, "BF16"),
}


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


def _cast(tensor: Tensor, weight: Weight, precision: str) -> Tensor:
    """Turn a tensor into a precision, and refuse numbers that this would make infinite."""
    cast = tensor.to(DTYPES[precision][0])
    if precision == "float16" and tensor.dtype != torch.float16 and cast.isinf().any():
        raise PatchsieveError(
            f"the weight {weight.source} does not fit float16",
            found=f"{tensor.float().abs().max():g}",
            expected=f"at most {torch.finfo(torch.float16).max:g}",
            do="choose bfloat16 or float32 for its part, with --precision",
        )
    return cast


def write(
    path: Path,
    weights: list[Weight],
    checkpoint: Source,
    precision: str,
    progress: Callable[[int], None],
) -> dict[str, ir.ExternalTensor]:
    """Write one safetensors file, a tensor at a time, and return how graphs refer to it.

    Args:
        path: The file, in the folder `weights` of the graphs' folder.
        weights: What it holds, in order.
        checkpoint: Where it comes from.
        precision: A key of DTYPES.
        progress: Told the bytes of each tensor written.

    Returns:
        One external tensor per weight.

    Raises:
        PatchsieveError: A number is too large for float16.
    """
    torch_dtype, _, code = DTYPES[precision]
    header: dict[str, object] = {}
    end = 0
    for weight in weights:
        start, end = end, end + math.prod(weight.shape) * torch_dtype.itemsize
        header[weight.name] = {
            "dtype": code,
            "shape": list(weight.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # data starts at a multiple of 64 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights:
            tensor = _cast(checkpoint.read(weight.source), weight, precision)
            if weight.transposed:
                tensor = tensor.t()
            # As bytes, because numpy has no bfloat16.
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            progress(math.prod(weight.shape) * torch_dtype.itemsize)
    return stored_weights(path)


def stored_weights(path: Path) -> dict[str, ir.ExternalTensor]:
    """How graphs refer to the tensors of a weights file, by name.

    Args:
        path: The file, in the folder `weights` of the graphs' folder.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    dtypes = {code: dtype for _, dtype, code in DTYPES.values()}
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        tensors[name] = ir.ExternalTensor(
            f"{DIRECTORY}/{path.name}",
            offset=8 + length + start,
            length=stop - start,
            dtype=dtypes[entry["dtype"]],
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
