"""TensorRT 11.x, and what all TensorRTs with caches in place share: the reference, slots fixed.

TensorScatter is the in-place KV update there: a cache is a network input, its update a network
output at the same address, and its length is fixed when an engine is built. TensorRT 11 has
`TRT_Attention` besides, which skips unused slots; these graphs do not use it, because it takes no
mask together with a causal kind.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from patchsieve.export.lowering.base import Lowering
from patchsieve.export.lowering.reference import Heads, Reference


class TensorRT(Reference):
    """`Attention` in float16 and bfloat16; in float32, which has no fused kernel, its parts.

    A float32 `Attention` is taken only with the attribute `TRT_decomposable` (measured with
    TensorRT-RTX 1.7.1), which the ONNX checker and ONNX Runtime refuse.
    """

    name = "tensorrt"
    library = "tensorrt"
    versions = ">=11,<12"
    where = "data-centre and desktop cards, JetPack 7.2.2 with TensorRT 11"
    static_slots = True
    precisions = Lowering.precisions
    operators: str | None = "tensorrt-11"

    def attend(self, query: ir.Value, heads: Heads, *rest: ir.Value) -> ir.Value:
        """Softmax(Q K^T * scale + mask) V; heads that share a KV head become rows of it."""
        if heads.dtype != ir.DataType.FLOAT:
            # The parser refuses `softmax_precision`: how the fused kernel sums is its own affair.
            return self.op("Attention", query, *rest, scale=heads.scale, is_causal=0)
        keys, values, *mask = rest
        together = self.constant([0, heads.num_kv_heads, -1, 0])  # [B, G, H / G * L, ...]
        apart = self.constant([0, heads.num_heads, -1, 0])  # [B, H, L, ...]
        rows = self.op("Mul", query, self.constant(heads.scale, np.float32))
        rows = self.op("Reshape", rows, together)
        logits = self.op("MatMul", rows, self.op("Transpose", keys, perm=[0, 1, 3, 2]))
        if mask:
            logits = self.op("Add", self.op("Reshape", logits, apart), mask[0])
            weights = self.op("Reshape", self.op("Softmax", logits, axis=-1), together)
        else:
            weights = self.op("Softmax", logits, axis=-1)
        return self.op("Reshape", self.op("MatMul", weights, values), apart)
