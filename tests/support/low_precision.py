"""A product of rows and one stored matrix, in each low-precision spelling, as small ONNX graphs.

The spellings are written here by hand, so that they check what the lowerings write.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

NUMPY = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    TensorProto.INT8: np.dtype(np.int8),
    TensorProto.FLOAT8E4M3FN: np.dtype(ml_dtypes.float8_e4m3fn),
}
STORED = {
    "float": None,
    "int8": TensorProto.INT8,
    "int4": TensorProto.INT4,
    "fp8": TensorProto.FLOAT8E4M3FN,
    "nvfp4": TensorProto.FLOAT4E2M1,
}
FOUR_BITS = (TensorProto.INT4, TensorProto.FLOAT4E2M1)
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Form:
    """How a matrix is stored and multiplied.

    Attributes:
        name: "float", "int8", "int4-B" with blocks of B, "fp8" or "nvfp4".
        is_static: The rows are quantised too, by one stored scale.
    """

    name: str
    is_static: bool = False

    @property
    def block(self) -> int:
        """Entries of the input axis that share a scale; 0 if all do."""
        return 16 if self.name == "nvfp4" else int(self.name.partition("-")[2] or 0)

    @property
    def stored(self) -> int | None:
        """ONNX type of the stored matrix; None for that of the rows."""
        return STORED[self.name.partition("-")[0]]

    def num_bytes(self, shape: tuple[int, int], type_: int) -> int:
        """Bytes of matrix and scales."""
        rows, columns = shape
        width = NUMPY[type_].itemsize
        if self.stored is None:
            return rows * columns * width
        if self.name == "nvfp4":  # FP8 scales, and one of float32
            return rows * columns // 2 + rows // self.block * columns + 4
        scales = (rows // self.block if self.block else 1) * columns * width
        return rows * columns // (2 if self.stored in FOUR_BITS else 1) + scales


class _Graph:
    """Nodes and stored tensors; the tensors lie inside the model, or in a file beside it."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.nodes = folder, list[onnx.NodeProto]()
        self.stored, self.content = list[onnx.TensorProto](), b""
        self.rng = np.random.default_rng(0)

    def store(self, name: str, type_: int, shape: tuple[int, ...], content: bytes) -> str:
        tensor = onnx.TensorProto(name=name, data_type=type_, dims=shape)
        if self.folder is None or not shape:
            tensor.raw_data = content
        else:
            self.content += b"\0" * (-len(self.content) % 64)
            place = {"location": WEIGHTS, "offset": len(self.content), "length": len(content)}
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            self.content += content
        self.stored.append(tensor)
        return name

    def numbers(self, name: str, type_: int, shape: tuple[int, ...], most: float = 0.01) -> str:
        """Positive numbers up to `most`."""
        values = np.asarray(self.rng.uniform(0.5, 1.0, shape) * most)
        return self.store(name, type_, shape, values.astype(NUMPY[type_]).tobytes())

    def matrix(self, type_: int, shape: tuple[int, int]) -> str:
        """Random entries, -127 to 127 where integers of 8 bits, any pattern where 4."""
        count = shape[0] * shape[1]
        if type_ in FOUR_BITS:
            content = self.rng.integers(0, 256, count // 2, np.uint8).tobytes()
        elif type_ == TensorProto.INT8:
            content = self.rng.integers(-127, 128, count).astype(np.int8).tobytes()
        else:
            content = self.rng.standard_normal(count).astype(NUMPY[type_]).tobytes()
        return self.store("matrix", type_, shape, content)

    def op(self, op: str, *inputs: str, **attributes: int) -> str:
        output = f"{op}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output


def spelt(
    form: Form,
    type_: int,
    opset: int = 24,
    shape: tuple[int, int] = (256, 8),
    folder: Path | None = None,
) -> onnx.ModelProto:
    """The graph y = x W.

    Args:
        form: The spelling.
        type_: ONNX type of x, y and the scales.
        opset: Of the graph.
        shape: Of W, [in, out].
        folder: Takes the tensors, in a file; None if they lie in the model.
    """
    graph = _Graph(folder)
    x, weight = "x", _weight(graph, form, type_, shape)
    if form.is_static:
        scale = graph.numbers("input", type_, ())
        x = graph.op("QuantizeLinear", x, scale, output_dtype=form.stored)
        x = graph.op("DequantizeLinear", x, scale)
    graph.nodes.append(helper.make_node("MatMul", [x, weight], ["y"]))
    values = [
        helper.make_tensor_value_info(name, type_, [1, "rows", width])
        for name, width in zip("xy", shape, strict=True)
    ]
    made = helper.make_graph(graph.nodes, "product", values[:1], values[1:], graph.stored)
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=11)
    if folder is not None:
        (folder / WEIGHTS).write_bytes(graph.content)
        onnx.save(model, folder / "product.onnx")
    return model


def _weight(graph: _Graph, form: Form, type_: int, shape: tuple[int, int]) -> str:
    if form.stored is None:
        return graph.matrix(type_, shape)
    matrix = graph.matrix(form.stored, shape)
    blocks = (shape[0] // form.block, shape[1]) if form.block else shape[1:]
    if form.name == "nvfp4":
        eighth = graph.numbers("scale", TensorProto.FLOAT8E4M3FN, blocks, 100.0)
        whole = graph.numbers("global", TensorProto.FLOAT, (), 0.001)
        scale = graph.op("DequantizeLinear", eighth, whole)
        wide = graph.op("DequantizeLinear", matrix, scale, axis=0, block_size=form.block)
        return wide if type_ == TensorProto.FLOAT else graph.op("Cast", wide, to=type_)
    scale = graph.numbers("scale", type_, blocks)
    if form.block:
        return graph.op("DequantizeLinear", matrix, scale, axis=0, block_size=form.block)
    return graph.op("DequantizeLinear", matrix, scale, axis=1)
