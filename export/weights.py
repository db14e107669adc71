"""Weights of a bundle: safetensors written a tensor at a time, that every graph points into."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnx_ir as ir
import torch
from torch import nn

from patchsieve.export.layers import Linear

DIRECTORY = "weights"  # inside the graphs' folder: external data must lie in or below it
DTYPES = {
    "float32": (torch.float32, ir.DataType.FLOAT, "F32"),
    "float16": (torch.float16, ir.DataType.FLOAT16, "F16"),
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
    """
    torch_dtype, onnx_dtype, code = DTYPES[precision]
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
            tensor = checkpoint.read(weight.source).to(torch_dtype)
            if weight.transposed:
                tensor = tensor.t()
            file.write(tensor.contiguous().numpy().data.cast("B"))
            progress(math.prod(weight.shape) * torch_dtype.itemsize)
    tensors = {}
    for weight in weights:
        start, stop = header[weight.name]["data_offsets"]  # type: ignore[index]
        tensors[weight.name] = ir.ExternalTensor(
            f"{DIRECTORY}/{path.name}",
            offset=8 + len(text) + start,
            length=stop - start,
            dtype=onnx_dtype,
            shape=ir.Shape(weight.shape),
            name=weight.name,
            base_dir=str(path.parent.parent),
        )
    return tensors
