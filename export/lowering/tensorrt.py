"""TensorRT 11.x, and what all TensorRTs with caches in place share: the reference, slots fixed.

TensorScatter is the in-place KV update there: a cache is a network input, its update a network
output at the same address, and its length is fixed when an engine is built. TensorRT 11 also has
`TRT_Attention`, which skips unused slots; these graphs do not use it, because it takes no mask
together with a causal kind, and 11.1 and 11.2 get its key lengths wrong.
"""

from __future__ import annotations

import onnx_ir as ir

from patchsieve.contract import names
from patchsieve.contract.targets import TARGETS
from patchsieve.export.lowering.base import Heads
from patchsieve.export.lowering.reference import Reference
from patchsieve.export.lowering.static_rows import StaticRows

FLOAT = ir.DataType.FLOAT


class TensorRT(StaticRows, Reference):
    """Attention in parts; `--attention` asks for the operator in float16 and bfloat16.

    Scores and softmax of the parts are float32, all else has the part's own type. NVIDIA's own
    decoders are built so (TensorRT-Model-Connect), because TensorRT's fused kernels for a mask fail
    at a head width of 128: 11.2 crashes while it compiles several or dynamic rows and errs by 0.16
    at 1,290 float16 keys, 10.16 refuses 2,048 slots, and SM 8.6 has no kernel for a long cache.
    Without a mask, as in a tower, none of that was reported; but where a card has no kernel for a
    head width the operator cannot be built either, which its parts always can.

    In float32 `Attention` has no fused kernel: it is taken only with the attribute
    `TRT_decomposable` (measured with TensorRT-RTX 1.7.1), which the ONNX checker and ONNX Runtime
    refuse.
    """

    target = TARGETS["tensorrt"]

    def mask_type(self, heads: Heads, has_mask: bool) -> ir.DataType:
        """That of the scores."""
        return heads.dtype if self._is_fused(heads, has_mask) else FLOAT

    def attend(self, query: ir.Value, heads: Heads, *rest: ir.Value) -> ir.Value:
        """Softmax(Q K^T * scale + mask) V."""
        keys, values, *mask = rest
        if self._is_fused(heads, bool(mask)):
            # The parser refuses `softmax_precision`: how the fused kernel sums is its own affair.
            return self.op("Attention", query, *rest, scale=heads.scale, is_causal=0)
        # Scaled before the product, where TensorRT's own matcher of attention looks for the factor.
        rows = self.op("Mul", query, self.constant(heads.scale, heads.dtype.numpy()))
        turned = self.op("Transpose", keys, perm=[0, 1, 3, 2])  # [B, G, D, S]
        # Both factors become float32 right at the product, so that a compiler may read them as they
        # lie and only sum in float32. TF32 multiplies numbers of 11 significant bits exactly.
        scores = self.op(
            "MatMul",
            self.cast(self._together(rows, heads), heads.dtype, FLOAT),
            self.cast(turned, heads.dtype, FLOAT),
        )  # [B, G, H / G * L, S]
        if mask:
            scores = self.op("Add", self._apart(scores, heads), mask[0])  # [B, H, L, S]
            weights = self._together(self.op("Softmax", scores, axis=-1), heads)
        else:
            weights = self.op("Softmax", scores, axis=-1)
        mixed = self.op("MatMul", self.cast(weights, FLOAT, heads.dtype), values)
        return self._apart(mixed, heads)

    def _is_fused(self, heads: Heads, has_mask: bool) -> bool:
        if heads.dtype == FLOAT or self.attention == names.DECOMPOSED:
            return False
        return self.attention == names.FUSED or not has_mask

    # Query heads that share a KV head become rows of it: a reshape, which moves nothing. Repeating
    # the keys and values for each query head would read H / G times the cache at every token.

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
