"""TensorRT 10.3, on Orin with JetPack 6.1 and 6.2; later versions of 10 read these graphs too.

None of `Attention`, `RMSNormalization`, `RotaryEmbedding` and `TensorScatter` is there, so all is
spelt in parts, in the order in which TensorRT's compiler knows them as one attention: queries
scaled, product, mask added, softmax, product. Caches are past rows in and new rows out.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from patchsieve.contract.targets import TARGETS
from patchsieve.export.lowering.base import Heads, dtype_of, inputs_of
from patchsieve.export.lowering.new_rows import NewRows
from patchsieve.export.lowering.static_rows import StaticRows

FLOAT = ir.DataType.FLOAT


class JetPack6(NewRows, StaticRows):
    """Operators of opset 18; sums of norms and softmax in float32 whatever the weights are."""

    # Opset 18, and 21 for a graph that holds quantised weights. TensorRT 10.3 lists opsets up to 20
    # and reads the blocks of DequantizeLinear, which are of 21. No other operator here changed
    # between the two but in the types that it may have.
    target = TARGETS["jetpack6"]

    def RMSNorm(self, node: ir.Node) -> Sequence[ir.Value]:
        """The axes are a constant: TensorRT takes no others."""
        return [self.norm_in_parts(node)]

    def Rotary(self, node: ir.Node) -> Sequence[ir.Value]:
        """Halves of each head times cosines and sines."""
        states, *tables = inputs_of(node)
        num_heads = node.attributes["num_heads"].as_int()
        heads = self.op("Reshape", states, self.constant([0, 0, num_heads, -1]))  # [1, L, H, D]
        halves = {"axis": -1, "num_outputs": 2}
        first, second = self._tape.op_multi_out("Split", [heads], halves, num_outputs=2)
        cos, sin = (
            self.op("Unsqueeze", table, self.constant([2]))  # [1, L, 1, D / 2]
            for table in tables
        )
        turned = self.op(
            "Concat",
            self.op("Sub", self.op("Mul", first, cos), self.op("Mul", second, sin)),
            self.op("Add", self.op("Mul", second, cos), self.op("Mul", first, sin)),
            axis=-1,
        )
        return [self.op("Reshape", turned, self.constant([0, 0, -1]))]

    def Attention(self, node: ir.Node) -> Sequence[ir.Value]:
        """Full attention; a fourth input is added to the logits."""
        query, key, value, *rest = inputs_of(node)
        bias = [self.cast(added, dtype_of(added), FLOAT) for added in rest]
        return [self.attend(query, key, value, Heads.of(node), *bias)]

    def CachedAttention(self, node: ir.Node) -> Sequence[ir.Value]:
        """Attention over past and new rows; the new ones go out."""
        query, key, value, past_keys, past_values, _, _ = inputs_of(node)
        keys, values = self.present(past_keys, key), self.present(past_values, value)
        mask = self.once("mask", lambda: self.new_rows_mask(past_keys, FLOAT))
        return [self.attend(query, keys, values, Heads.of(node), mask), key, value]

    def attend(
        self,
        query: ir.Value,
        keys: ir.Value,
        values: ir.Value,
        heads: Heads,
        mask: ir.Value | None = None,
    ) -> ir.Value:
        """Softmax(Q K^T * scale + mask) V; heads that share a KV head become rows of it.

        Args:
            query: [B, L, H * D].
            keys: [B, N, G * D].
            values: [B, N, G * D].
            heads: How many, and their scale.
            mask: Added to the logits, float32, broadcastable to [B, H, L, N].

        Returns:
            [B, L, H * D].
        """
        scale = self.constant(heads.scale, heads.dtype.numpy())
        rows = self.op("Mul", self.split_heads(query, heads.num_heads), scale)
        by_head = self.op("Reshape", keys, self.constant([0, 0, heads.num_kv_heads, -1]))
        turned = self.op("Transpose", by_head, perm=[0, 2, 3, 1])  # [B, G, D, N]
        logits = self.op("MatMul", self._together(rows, heads), turned)
        logits = self.cast(logits, heads.dtype, FLOAT)
        if mask is not None:
            added = self.op("Add", self._apart(logits, heads), mask)
            logits = self._together(added, heads)
        weights = self.cast(self.op("Softmax", logits, axis=-1), FLOAT, heads.dtype)
        mixed = self.op("MatMul", weights, self.split_heads(values, heads.num_kv_heads))
        return self.merge_heads(self._apart(mixed, heads))

    def _together(self, value: ir.Value, heads: Heads) -> ir.Value:
        """[B, H, L, X] -> [B, G, H / G * L, X]."""
        if heads.num_heads == heads.num_kv_heads:
            return value
        return self.op("Reshape", value, self.constant([0, heads.num_kv_heads, -1, 0]))

    def _apart(self, value: ir.Value, heads: Heads) -> ir.Value:
        """[B, G, H / G * L, X] -> [B, H, L, X]."""
        if heads.num_heads == heads.num_kv_heads:
            return value
        return self.op("Reshape", value, self.constant([0, heads.num_heads, -1, 0]))
