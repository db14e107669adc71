"""Constants that are casts and reshapes of constants, made constants again.

Traced unoptimised, an axis is a scalar that is cast and reshaped. TensorRT's parsers read axes only
where they are constants themselves: up to 10.1 of Slice, in TensorRT-RTX 1.7.1 still of ReduceMean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience


def fold_constants(graph: ir.Graph) -> None:
    """Replace each Cast and Reshape of a constant by a constant."""
    for node in list(graph):  # in the order of computation
        folded = _fold(node, [_array(value) for value in node.inputs])
        if folded is not None and not node.outputs[0].is_graph_output():
            constant = ir.node("Constant", [], {"value": ir.tensor(folded)})
            convenience.replace_nodes_and_values(
                graph, node, [node], [constant], node.outputs, constant.outputs
            )


def _fold(node: ir.Node, inputs: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """The node's output, where all inputs are known; None for other operators."""
    arrays = [array for array in inputs if array is not None]
    if len(arrays) < len(inputs):
        return None
    if node.op_type == "Reshape":
        return arrays[0].reshape(arrays[1])
    if node.op_type == "Cast":
        return arrays[0].astype(ir.DataType(node.attributes["to"].as_int()).numpy())
    return None


def _array(value: ir.Value | None) -> np.ndarray | None:
    """What a Constant node holds; None for what any other node gives, and for weights."""
    producer = None if value is None else value.producer()
    if value is None or producer is None or producer.op_type != "Constant":
        return None
    tensor = convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()
