"""The reference: standard ONNX at opset 24, for any runtime that keeps to it, and for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from patchsieve.contract.targets import TARGETS
from patchsieve.export.lowering.base import Heads, Lowering, dtype_of, inputs_of


class Reference(Lowering):
    """RMSNormalization, RotaryEmbedding, Attention with an additive mask, TensorScatter."""

    target = TARGETS["reference"]

    def RMSNorm(self, node: ir.Node) -> Sequence[ir.Value]:
        """The sum is in float32 by the operator's default."""
        eps = node.attributes["eps"].as_float()
        return [self.op("RMSNormalization", *node.inputs, axis=-1, epsilon=eps)]

    def Rotary(self, node: ir.Node) -> Sequence[ir.Value]:
        """Four-dimensional, because TensorRT takes no other form."""
        states, cos, sin = inputs_of(node)
        heads = self.split_heads(states, node.attributes["num_heads"].as_int())
        return [self.merge_heads(self.op("RotaryEmbedding", heads, cos, sin))]

    def Attention(self, node: ir.Node) -> Sequence[ir.Value]:
        """Full attention; a bias is the operator's additive mask."""
        heads = Heads.of(node)
        query, key, value, *bias = inputs_of(node)
        rows, keys, values = (self.split_heads(t, heads.num_heads) for t in (query, key, value))
        kind = self.mask_type(heads, bool(bias))
        mask = [self.spell_rows(self.cast(each, dtype_of(each), kind), query) for each in bias]
        return [self.merge_heads(self.attend(rows, heads, keys, values, *mask))]

    def CachedAttention(self, node: ir.Node) -> Sequence[ir.Value]:
        """`is_causal` with a past means two things in two runtimes; the mask means one."""
        query, key, value, key_cache, value_cache, slot, _ = inputs_of(node)
        heads = Heads.of(node)
        keys, values = (
            self.op(
                "TensorScatter",
                cache,
                self.split_heads(rows, heads.num_kv_heads),
                slot,
                axis=-2,
                mode="linear",
            )
            for cache, rows in ((key_cache, key), (value_cache, value))
        )
        kind = self.mask_type(heads, has_mask=True)
        mask = self.once("mask", lambda: self._mask(key_cache, kind))
        rows = self.split_heads(query, heads.num_heads)
        return [self.merge_heads(self.attend(rows, heads, keys, values, mask)), keys, values]

    def mask_type(self, heads: Heads, has_mask: bool) -> ir.DataType:
        """Type of what is added to the products: the operator takes the queries' own."""
        return heads.dtype

    def attend(self, query: ir.Value, heads: Heads, *rest: ir.Value) -> ir.Value:
        """The attention itself, which a target may spell otherwise.

        Args:
            query: [B, H, L, D].
            heads: How many, and their scale.
            *rest: Keys and values [B, G, S, D], and the additive mask where there is one.

        Returns:
            [B, H, L, D].
        """
        # By default its softmax is of the inputs' type.
        wide: dict[str, Any] = {}
        if heads.dtype != ir.DataType.FLOAT:
            wide["softmax_precision"] = ir.DataType.FLOAT.value
        return self.op("Attention", query, *rest, scale=heads.scale, is_causal=0, **wide)

    def _mask(self, key_cache: ir.Value, dtype: ir.DataType) -> ir.Value:
        num_slots = self.op("Shape", key_cache, start=2, end=3)
        return self.additive_mask(self.op("Squeeze", num_slots, self.constant([0])), dtype)
