"""ONNX Runtime on a CPU: opset 21, so that the runtimes of Python 3.10 load it too.

`GroupQueryAttention` writes into the bound cache and reads only the rows present, where the
standard `Attention` reads every slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from patchsieve import names
from patchsieve.export.lowering.base import Lowering, dtype_of, inputs_of

MICROSOFT = "com.microsoft"


class Cpu(Lowering):
    """Contrib operators that take and give rows with their heads side by side."""

    name = "cpu"
    opset = 21
    domains = {MICROSOFT: 1}

    def RMSNorm(self, node: ir.Node) -> Sequence[ir.Value]:
        """Spelt out; ONNX Runtime fuses these nodes into its own norm when it loads the graph."""
        hidden, weight = inputs_of(node)
        dtype = dtype_of(hidden)
        wide = self._cast(hidden, dtype, ir.DataType.FLOAT)
        square = self.op("Pow", wide, self.constant(2.0, np.float32))
        mean = self.op("ReduceMean", square, self.constant([-1]), keepdims=1)
        eps = self.constant(node.attributes["eps"].as_float(), np.float32)
        normed = self.op("Div", wide, self.op("Sqrt", self.op("Add", mean, eps)))
        return [self.op("Mul", self._cast(normed, ir.DataType.FLOAT, dtype), weight)]

    def Rotary(self, node: ir.Node) -> Sequence[ir.Value]:
        """The angles serve as the operator's table, each row its own entry."""
        states, cos, sin = inputs_of(node)
        first = self.constant([0])
        rows = self.once("row_numbers", self._row_numbers)
        tables = [self.op("Squeeze", table, first) for table in (cos, sin)]
        return [self.op("RotaryEmbedding", states, rows, *tables, domain=MICROSOFT)]

    def Attention(self, node: ir.Node) -> Sequence[ir.Value]:
        """Full attention; a bias is the operator's `attention_bias`."""
        query, key, value, *bias = inputs_of(node)
        attributes: dict[str, Any] = {
            "num_heads": node.attributes["num_heads"].as_int(),
            "scale": node.attributes["scale"].as_float(),
        }
        inputs: list[ir.Value | None] = [query, key, value]
        if bias:
            inputs += [None, None, self.spell_rows(bias[0], query)]
        return [self.op("MultiHeadAttention", *inputs, domain=MICROSOFT, **attributes)]

    def CachedAttention(self, node: ir.Node) -> Sequence[ir.Value]:
        """Past and present share their buffer when the caller binds it to both."""
        query, key, value, key_cache, value_cache, _, _ = inputs_of(node)
        total = self.once("total", self._total)
        int32 = ir.DataType.INT32
        total_32 = self.once("total_32", lambda: self.op("Cast", total, to=int32))
        last = self.once(
            "last_slot",
            lambda: self.op("Cast", self.op("Sub", total, self.constant([1])), to=int32),
        )
        bias = self.once(
            "bias",
            lambda: self.additive_mask(
                self.op("Squeeze", total, self.constant([0])), dtype_of(query)
            ),
        )
        return self.ops(
            "GroupQueryAttention",
            query,
            key,
            value,
            key_cache,
            value_cache,
            last,
            total_32,
            None,
            None,
            None,
            bias,
            domain=MICROSOFT,
            num_outputs=3,
            num_heads=node.attributes["num_heads"].as_int(),
            kv_num_heads=node.attributes["num_kv_heads"].as_int(),
            scale=node.attributes["scale"].as_float(),
        )

    def _row_numbers(self) -> ir.Value:
        length = self.op(
            "Squeeze", self.op("Shape", self.inputs[names.LAST_KEY]), self.constant([0])
        )
        numbers = self.op("Range", self.constant(0), length, self.constant(1))
        return self.op("Unsqueeze", numbers, self.constant([0]))  # [1, L]

    def _total(self) -> ir.Value:
        """Rows present once the new ones are written, [1]."""
        length = self.op("Shape", self.inputs[names.LAST_KEY])
        return self.op("Add", self.inputs[names.SLOT], length)

    def _cast(self, value: ir.Value, old: ir.DataType, new: ir.DataType) -> ir.Value:
        return value if old == new else self.op("Cast", value, to=new)
