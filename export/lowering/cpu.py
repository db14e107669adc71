"""ONNX Runtime on a CPU: opset 21, so that the runtimes of Python 3.10 load it too.

`GroupQueryAttention` writes into the bound cache and reads only the rows present, where the
standard `Attention` reads every slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from patchsieve.contract import names
from patchsieve.contract.targets import TARGETS
from patchsieve.export.lowering.base import (
    Heads,
    Lowering,
    dtype_of,
    format_of,
    inputs_of,
    length_of,
)

MICROSOFT = "com.microsoft"
GROUPED_WIDTH = 8  # GroupQueryAttention takes heads of a multiple of this width


class Cpu(Lowering):
    """Contrib operators that take and give rows with their heads side by side."""

    target = TARGETS["cpu"]
    domains = {MICROSOFT: 1}

    def RMSNorm(self, node: ir.Node) -> Sequence[ir.Value]:
        """Spelt out; ONNX Runtime fuses these nodes into its own norm when it loads the graph."""
        return [self.norm_in_parts(node)]

    def Linear(self, node: ir.Node) -> Sequence[ir.Value]:
        """In int8 the rows are rounded too, as they come, and products are summed in int32.

        `DynamicQuantizeLinear` has one scale for all rows. So each row is divided by its largest
        entry first: a row of small numbers keeps as many digits as any other.
        """
        if not format_of(node).is_dynamic:
            return super().Linear(node)
        rows, numbers, scale, *_ = inputs_of(node)
        kind = dtype_of(rows)
        wide = self.cast(rows, kind, ir.DataType.FLOAT)
        largest = self.op("ReduceMax", self.op("Abs", wide), self.constant([-1]), keepdims=1)
        # A row of zeros stays one.
        largest = self.op("Max", largest, self.constant(1e-30, np.float32))
        even = self.op("Div", wide, largest)
        whole, step, zero = self.ops("DynamicQuantizeLinear", even, domain="", num_outputs=3)
        summed = self.op("MatMulInteger", whole, numbers, zero)
        both = self.op("Mul", step, self.cast(scale, dtype_of(scale), ir.DataType.FLOAT))
        found = self.op("Mul", self.op("Cast", summed, to=ir.DataType.FLOAT), both)
        return [self.cast(self.op("Mul", found, largest), ir.DataType.FLOAT, kind)]

    def Rotary(self, node: ir.Node) -> Sequence[ir.Value]:
        """The angles serve as the operator's table, each row its own entry."""
        states, cos, sin = inputs_of(node)
        first = self.constant([0])
        rows = self._row_numbers(cos)
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
        if length_of(key_cache, 3) % GROUPED_WIDTH:
            return self._cached_in_parts(node)
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

    def _cached_in_parts(self, node: ir.Node) -> Sequence[ir.Value]:
        """The same for heads of another width: rows are scattered into the cache, then read."""
        query, key, value, key_cache, value_cache, slot, _ = inputs_of(node)
        heads, head_dim = Heads.of(node), length_of(key_cache, 3)
        total = self.once("total", self._total)
        slots = self.once("slots", lambda: self._slots(slot, total))

        def write(rows: ir.Value, cache: ir.Value) -> tuple[ir.Value, ir.Value]:
            """The cache with new rows in it, and all rows that count, [1, total, G * D]."""
            new = self.split_heads(rows, heads.num_kv_heads)  # [1, G, L, D]
            where = self.op("Expand", slots, self.op("Shape", new))
            cache = self.op("ScatterElements", cache, where, new, axis=2)
            first, axis = self.constant([0]), self.constant([2])
            return cache, self.merge_heads(self.op("Slice", cache, first, total, axis))

        key_cache, keys = write(key, key_cache)
        value_cache, values = write(value, value_cache)
        mask = self.once(
            "bias",
            lambda: self.additive_mask(self.op("Squeeze", total, self.constant([0])), heads.dtype),
        )
        mixed = self.attend_rows(query, keys, values, mask, heads, head_dim)
        return [mixed, key_cache, value_cache]

    def attend_rows(
        self,
        query: ir.Value,
        keys: ir.Value,
        values: ir.Value,
        mask: ir.Value,
        heads: Heads,
        head_dim: int,
    ) -> ir.Value:
        """Attention whose operator knows one count of heads: those of a KV head become its rows.

        Args:
            query: [1, L, H * D].
            keys: [1, N, G * D].
            values: [1, N, G * D].
            mask: Added to the logits, [1, 1, L, N].
            heads: How many, and their scale.
            head_dim: D.

        Returns:
            [1, L, H * D].
        """
        group = heads.num_heads // heads.num_kv_heads
        sizes = (heads.num_kv_heads, group, head_dim)
        repeats = self.constant([1, 1, group, 1])
        mixed = self.op(
            "MultiHeadAttention",
            self._stack(query, *sizes),
            keys,
            values,
            None,
            None,
            mask if group == 1 else self.once("masks", lambda: self.op("Tile", mask, repeats)),
            domain=MICROSOFT,
            num_heads=heads.num_kv_heads,
            scale=heads.scale,
        )
        mixed.dtype = heads.dtype  # which ONNX cannot infer after another domain's operator
        return self._unstack(mixed, *sizes)

    def _stack(self, query: ir.Value, kv_heads: int, group: int, head_dim: int) -> ir.Value:
        """[1, L, H * D] -> [1, H / G * L, G * D]; query head h reads KV head h // (H / G)."""
        if group == 1:
            return query
        apart = self.op("Reshape", query, self.constant([1, -1, kv_heads, group, head_dim]))
        turned = self.op("Transpose", apart, perm=[0, 3, 1, 2, 4])  # [1, H / G, L, G, D]
        return self.op("Reshape", turned, self.constant([1, -1, kv_heads * head_dim]))

    def _unstack(self, mixed: ir.Value, kv_heads: int, group: int, head_dim: int) -> ir.Value:
        """[1, H / G * L, G * D] -> [1, L, H * D]."""
        if group == 1:
            return mixed
        apart = self.op("Reshape", mixed, self.constant([1, group, -1, kv_heads, head_dim]))
        turned = self.op("Transpose", apart, perm=[0, 2, 3, 1, 4])  # [1, L, G, H / G, D]
        return self.op("Reshape", turned, self.constant([1, -1, kv_heads * group * head_dim]))

    def _slots(self, slot: ir.Value, total: ir.Value) -> ir.Value:
        """Slot of each new row, [1, 1, L, 1]."""
        first, last = (self.op("Squeeze", end, self.constant([0])) for end in (slot, total))
        numbers = self.op("Range", first, last, self.constant(1))
        return self.op("Unsqueeze", numbers, self.constant([0, 1, 3]))

    def _row_numbers(self, table: ir.Value) -> ir.Value:
        """0 to L - 1, [1, L], for a table of L rows."""
        last_key = self.inputs.get(names.LAST_KEY)
        if last_key is not None:  # a stage, all of whose tables have a row for each of its keys
            return self.once("row_numbers", lambda: self._numbers(self.op("Shape", last_key)))
        return self._numbers(self.op("Shape", table, start=1, end=2))

    def _numbers(self, length: ir.Value) -> ir.Value:
        """0 to L - 1, [1, L], from L as [1]."""
        end = self.op("Squeeze", length, self.constant([0]))
        numbers = self.op("Range", self.constant(0), end, self.constant(1))
        return self.op("Unsqueeze", numbers, self.constant([0]))

    def _total(self) -> ir.Value:
        """Rows present once the new ones are written, [1]."""
        length = self.op("Shape", self.inputs[names.LAST_KEY])
        return self.op("Add", self.inputs[names.SLOT], length)
