"""Products of TensorRT whose rows are rounded too, by a stored scale from activation statistics.

TensorRT has no dynamic form: every version refuses `DynamicQuantizeLinear` and `MatMulInteger`. Its
compiler makes a product in eight bits of QuantizeLinear -> DequantizeLinear -> MatMul, symmetric,
with one scale for all rows. Without statistics there is none, and the matrix alone is quantised.

Rows of int8 times a matrix of int4 cannot be built (TensorRT-RTX 1.7.1: "operand.h: CHECK(
is_constant()) failed"), so that only a matrix of eight bits has a scale for its rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from patchsieve.export.lowering.base import Lowering, dtype_of, format_of, inputs_of


class StaticRows(Lowering):
    """`Linear` rounds its rows to the matrix's type where a scale for them is stored."""

    def run(self) -> None:
        """Replace every open node."""
        self._rounded: dict[tuple[ir.Value, ir.DataType, bytes], ir.Value] = {}
        super().run()

    def Linear(self, node: ir.Node) -> Sequence[ir.Value]:
        """Matrices that multiply the same rows share these, so that a compiler may join them."""
        if len(inputs_of(node)) < 4 or format_of(node).has_levels:
            return super().Linear(node)
        rows, numbers, _, scale = inputs_of(node)
        stored = scale.const_value
        assert stored is not None, scale.name
        key = (rows, dtype_of(numbers), stored.numpy().tobytes())
        if key not in self._rounded:
            kind = dtype_of(numbers).value
            rounded = self.op("QuantizeLinear", rows, scale, output_dtype=kind)
            self._rounded[key] = self.op("DequantizeLinear", rounded, scale)
        return [self.op("MatMul", self._rounded[key], self.dequantised(node))]
