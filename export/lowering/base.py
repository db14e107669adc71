"""What all lowerings share: each open operation is replaced by nodes that the target knows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience, tape
from onnx_ir.passes import common as passes

from patchsieve.contract import names
from patchsieve.contract.formats import FLOAT, FORMATS, Format
from patchsieve.contract.targets import QUANTISED_OPSET, Target
from patchsieve.export.graphs import ops
from patchsieve.export.lowering.constants import fold_constants


class Lowering(ABC):
    """The spelling of one target. A subclass names its row and writes one method per operation.

    A method takes the open node and returns the values that replace its outputs.
    """

    target: ClassVar[Target]
    domains: ClassVar[dict[str, int]] = {}  # opsets of operators that are not standard ONNX

    def __init__(self, graph: ir.Graph, attention: str = names.DECOMPOSED) -> None:
        self.graph, self.attention = graph, attention
        self.inputs = {value.name: value for value in graph.inputs}
        self._tape = tape.Tape()
        self._shared: dict[str, ir.Value] = {}
        self._shared_nodes: list[ir.Node] = []

    # Building blocks.

    def op(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Append a node and return its one output."""
        return self._tape.op(op_type, inputs, attributes, domain=domain)

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str,
        num_outputs: int,
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Append a node and return its outputs."""
        return self._tape.op_multi_out(
            op_type, inputs, attributes, domain=domain, num_outputs=num_outputs
        )

    def constant(self, value: object, dtype: np.dtype | type = np.int64) -> ir.Value:
        """A small constant, one for each value in the graph."""
        array = np.asarray(value, dtype=dtype)
        key = f"const.{array.dtype}.{array.shape}.{array.tobytes().hex()}"
        return self.once(key, lambda: self.op("Constant", value=ir.tensor(array)))

    def once(self, key: str, make: Callable[[], ir.Value]) -> ir.Value:
        """A value that is computed once at the head of the graph, from inputs and constants."""
        if key not in self._shared:
            outer, self._tape = self._tape, tape.Tape()
            self._shared[key] = make()
            self._shared_nodes += self._tape.nodes
            self._tape = outer
        return self._shared[key]

    def split_heads(self, rows: ir.Value, num_heads: int) -> ir.Value:
        """[B, L, H * D] -> [B, H, L, D]."""
        shape = self.constant([0, 0, num_heads, -1])
        return self.op("Transpose", self.op("Reshape", rows, shape), perm=[0, 2, 1, 3])

    def merge_heads(self, heads: ir.Value) -> ir.Value:
        """[B, H, L, D] -> [B, L, H * D]."""
        rows = self.op("Transpose", heads, perm=[0, 2, 1, 3])
        return self.op("Reshape", rows, self.constant([0, 0, -1]))

    def spell_rows(self, bias: ir.Value, query: ir.Value) -> ir.Value:
        """A bias [B, 1, 1, N] or [B, H, L, N] with its L rows spelt out.

        ONNX Runtime 1.31 broadcasts the axes of images and heads only, in `Attention` too.
        """
        rows = self.op("Shape", query, start=1, end=2)  # [1], holding L
        one = self.constant([1])
        return self.op("Expand", bias, self.op("Concat", one, one, rows, one, axis=0))

    def cast(self, value: ir.Value, old: ir.DataType, new: ir.DataType) -> ir.Value:
        """The value in another type."""
        return value if old == new else self.op("Cast", value, to=new)

    def norm_in_parts(self, node: ir.Node) -> ir.Value:
        """`ops.rms_norm` from plain operators, its sum in float32."""
        hidden, weight = inputs_of(node)
        dtype = dtype_of(hidden)
        wide = self.cast(hidden, dtype, ir.DataType.FLOAT)
        square = self.op("Pow", wide, self.constant(2.0, np.float32))
        mean = self.op("ReduceMean", square, self.constant([-1]), keepdims=1)
        eps = self.constant(node.attributes["eps"].as_float(), np.float32)
        normed = self.op("Div", wide, self.op("Sqrt", self.op("Add", mean, eps)))
        return self.op("Mul", self.cast(normed, ir.DataType.FLOAT, dtype), weight)

    def additive_mask(self, num_slots: ir.Value, dtype: ir.DataType) -> ir.Value:
        """0 where a row sees a slot, a large negative number elsewhere, [1, 1, L, num_slots]."""
        slot, last_key = self.inputs[names.SLOT], self.inputs[names.LAST_KEY]
        zero, one = self.constant(0), self.constant(1)
        slots = self.op("Range", zero, num_slots, one)
        length = self.op("Squeeze", self.op("Shape", last_key), self.constant([0]))
        rows = self.op("Add", self.op("Range", zero, length, one), slot)  # [L] slot of each row
        column = self.constant([1])
        causal = self.op("LessOrEqual", slots, self.op("Unsqueeze", last_key, column))
        itself = self.op("Equal", slots, self.op("Unsqueeze", rows, column))
        seen = self.op("Or", causal, itself)  # [L, num_slots]
        # Finite, so that softmax of a row without a visible slot is not NaN; -6e4 fits float16.
        hidden = self.constant(-6e4 if dtype == ir.DataType.FLOAT16 else -1e9, dtype.numpy())
        mask = self.op("Where", seen, self.constant(0, dtype.numpy()), hidden)
        return self.op("Unsqueeze", mask, self.constant([0, 1]))

    # The operations, one method each.

    def Linear(self, node: ir.Node) -> Sequence[ir.Value]:
        """`ops.linear`: the matrix is made floating point again right before the product.

        Compilers and ONNX Runtime find the pair and keep the matrix as it is stored: TensorRT in
        its weight-only kernels, ONNX Runtime as `MatMulNBits`.
        """
        rows, numbers, *scale = inputs_of(node)
        if not scale:
            return [self.op("MatMul", rows, numbers)]
        return [self.op("MatMul", rows, self.dequantised(node))]

    def dequantised(self, node: ir.Node) -> ir.Value:
        """The matrix of a node `Linear` in floating point, [in, out]."""
        rows, numbers, scale, *whole = inputs_of(node)
        form = format_of(node)
        if not form.block:
            return self.op("DequantizeLinear", numbers, scale, axis=1)
        block: dict[str, Any] = {"axis": 0, "block_size": form.block}
        if not form.has_levels:
            return self.op("DequantizeLinear", numbers, scale, **block)
        wide = self.op("DequantizeLinear", scale, *whole)
        matrix = self.op("DequantizeLinear", numbers, wide, **block)
        return self.cast(matrix, ir.DataType.FLOAT, dtype_of(rows))

    @abstractmethod
    def RMSNorm(self, node: ir.Node) -> Sequence[ir.Value]:
        """`ops.rms_norm`."""

    @abstractmethod
    def Rotary(self, node: ir.Node) -> Sequence[ir.Value]:
        """`ops.rotary`."""

    @abstractmethod
    def Attention(self, node: ir.Node) -> Sequence[ir.Value]:
        """`ops.attention`."""

    @abstractmethod
    def CachedAttention(self, node: ir.Node) -> Sequence[ir.Value]:
        """`ops.cached_attention`."""

    def Mark(self, node: ir.Node) -> Sequence[ir.Value]:
        """`ops.mark`: no node, only a name (a graph output keeps its own)."""
        return inputs_of(node)

    # The rewrite.

    def run(self) -> None:
        """Replace every open node."""
        named: set[str] = set()  # a matrix may be read twice: its first product has the name
        for node in list(self.graph):
            if node.domain != ops.DOMAIN:
                continue
            self._tape = tape.Tape()
            product = _product_of(node)
            new = list(getattr(self, node.op_type)(node))
            is_inner = not node.outputs[0].is_graph_output()
            convenience.replace_nodes_and_values(
                self.graph, node, [node], self._tape.nodes, node.outputs, new
            )
            if product is not None and is_inner and product not in named:
                named.add(product)
                new[0].name = product
            if node.op_type == "Mark" and is_inner:  # last: the replacement passes on its own name
                new[0].name = node.attributes["name"].as_string()
        first = next(iter(self.graph))
        self.graph.insert_before(first, self._shared_nodes)


@dataclass(frozen=True)
class Heads:
    """Attributes of an attention node; its dtype is that of the queries."""

    num_heads: int
    num_kv_heads: int
    scale: float
    dtype: ir.DataType

    @classmethod
    def of(cls, node: ir.Node) -> Heads:
        """Read them from a traced node."""
        num_heads = node.attributes["num_heads"].as_int()
        shared = node.attributes.get("num_kv_heads")
        return cls(
            num_heads=num_heads,
            num_kv_heads=num_heads if shared is None else shared.as_int(),
            scale=node.attributes["scale"].as_float(),
            dtype=dtype_of(inputs_of(node)[0]),
        )


def format_of(node: ir.Node) -> Format:
    """How the matrix of an open node `Linear` is stored."""
    named = node.attributes.get("format")
    return FORMATS[FLOAT if named is None else named.as_string()]


def _product_of(node: ir.Node) -> str | None:
    """What `verify` calls the product of an open node `Linear`; None for other nodes."""
    if node.op_type != "Linear":
        return None
    return names.product(str(inputs_of(node)[1].name).partition(".weight")[0])


def inputs_of(node: ir.Node) -> list[ir.Value]:
    """Inputs of an open node, all of which are there."""
    return [value for value in node.inputs if value is not None]


def dtype_of(value: ir.Value) -> ir.DataType:
    """Type of a traced value, all of which are typed."""
    assert value.dtype is not None, value.name
    return value.dtype


def shape_of(value: ir.Value) -> ir.Shape:
    """Shape of a graph's input or output."""
    assert value.shape is not None, value.name
    return value.shape


def length_of(value: ir.Value, axis: int) -> int:
    """Length of a fixed axis of a graph's input or output."""
    length = shape_of(value)[axis]
    assert isinstance(length, int), value.name
    return length


def lower(
    traced: ir.Model,
    lowering: type[Lowering],
    slots: int | None = None,
    attention: str = names.DECOMPOSED,
) -> ir.Model:
    """Derive a target's graph from a traced one, which stays as it is.

    Args:
        traced: What `trace` returned, initializers bound.
        lowering: The target.
        slots: Length of the caches, for a target that wants a number.
        attention: One of `names.ATTENTION_FORMS`, for a target that has them.
    """
    model = traced.clone()
    if lowering.target.has_fixed_slots and slots is not None:
        for value in (*model.graph.inputs, *model.graph.outputs):
            value.shape = ir.Shape(
                [slots if str(axis) == names.AXIS_SLOTS else axis for axis in shape_of(value)]
            )
    lowering(model.graph, attention).run()
    fold_constants(model.graph)
    for node in model.graph:
        node.version = None
    model.opset_imports.clear()
    model.opset_imports.update({"": _opset(model.graph, lowering)} | lowering.domains)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    model.producer_name = "patchsieve"
    model.producer_version = None
    return model


def _opset(graph: ir.Graph, lowering: type[Lowering]) -> int:
    """The target's opset, or a higher one where the graph holds quantised numbers."""
    if any(node.op_type == "DequantizeLinear" for node in graph):
        return max(lowering.target.opset, QUANTISED_OPSET)
    return lowering.target.opset
