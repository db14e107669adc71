"""The reference: standard ONNX at opset 24, for any runtime that keeps to it and for the eye."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from patchsieve.export.lowering.base import Lowering


class Reference(Lowering):
    """RMSNormalization, RotaryEmbedding, Attention with an additive mask, TensorScatter."""

    name = "reference"
    opset = 24

    def RMSNorm(self, node: ir.Node) -> Sequence[ir.Value]:
        """The sum is in float32 by the operator's default."""
        eps = node.attributes["eps"].as_float()
        return [self.op("RMSNormalization", *node.inputs, axis=-1, epsilon=eps)]

    def Rotary(self, node: ir.Node) -> Sequence[ir.Value]:
        """Four-dimensional, because TensorRT takes no other form."""
        states, cos, sin = node.inputs
        heads = self.split_heads(states, node.attributes["num_heads"].as_int())
        return [self.merge_heads(self.op("RotaryEmbedding", heads, cos, sin))]

    def Attention(self, node: ir.Node) -> Sequence[ir.Value]:
        """Full attention without a mask."""
        num_heads = node.attributes["num_heads"].as_int()
        heads = [self.split_heads(rows, num_heads) for rows in node.inputs]
        return [self.merge_heads(self.attend(*heads, scale=node.attributes["scale"].as_float()))]

    def CachedAttention(self, node: ir.Node) -> Sequence[ir.Value]:
        """`is_causal` with a past means two things in two runtimes; the mask means one."""
        query, key, value, key_cache, value_cache, slot, _ = node.inputs
        num_kv_heads = node.attributes["num_kv_heads"].as_int()
        keys, values = (
            self.op(
                "TensorScatter",
                cache,
                self.split_heads(rows, num_kv_heads),
                slot,
                axis=-2,
                mode="linear",
            )
            for cache, rows in ((key_cache, key), (value_cache, value))
        )
        mask = self.once("mask", lambda: self._mask(key_cache, query.dtype))
        heads = self.split_heads(query, node.attributes["num_heads"].as_int())
        mixed = self.attend(heads, keys, values, mask, scale=node.attributes["scale"].as_float())
        return [self.merge_heads(mixed), keys, values]

    def attend(self, *inputs: ir.Value, scale: float) -> ir.Value:
        """The attention node itself, which a target may decorate."""
        return self.op("Attention", *inputs, scale=scale, is_causal=0)

    def _mask(self, key_cache: ir.Value, dtype: ir.DataType) -> ir.Value:
        num_slots = self.op("Shape", key_cache, start=2, end=3)
        return self.additive_mask(self.op("Squeeze", num_slots, self.constant([0])), dtype)
