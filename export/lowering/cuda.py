"""ONNX Runtime's CUDA provider: contrib operators where it has kernels for them, rows as caches.

Attention must take an additive mask here, because a row may see itself and not what lies just
before it. That decides the operator:

- `GroupQueryAttention`, which writes into a shared buffer, refuses `attention_bias` on CUDA up to
  ONNX Runtime 1.27, and has no float32 kernel.
- `Attention` and `TensorScatter` of opset 24 got CUDA kernels in 2026; before, they run on the CPU.
- `MultiHeadAttention` has taken the mask since 1.20, in float32 and float16. It is used.

It has no cache to write to, so caches are past rows in and new rows out. They grow in place all the
same: ONNX Runtime takes any device address for an input or output, so that the past is a view of
the buffer and the new rows are written straight after it. It also takes keys and values with
the heads of a row side by side, as they lie in this form: nothing is turned.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from patchsieve.contract.targets import TARGETS
from patchsieve.export.lowering.base import Heads, Lowering, inputs_of, length_of
from patchsieve.export.lowering.cpu import Cpu
from patchsieve.export.lowering.new_rows import NewRows


class Cuda(NewRows, Cpu):
    """Norm, rotary embedding and the tower's attention as on the CPU."""

    # Opset 18: of the operators that 21 changed, releases up to 1.24 have no CUDA kernel. They, and
    # a copy to the host and back for each, would go to the CPU without a word. Graphs that hold
    # quantised weights are of 21, and so are for 1.25 and later.
    target = TARGETS["cuda"]

    def Linear(self, node: ir.Node) -> Sequence[ir.Value]:
        """DequantizeLinear -> MatMul, fused into `MatMulNBits`: int4 since 1.20, int8 since 1.25.

        CUDA has kernels neither for `DynamicQuantizeLinear` nor for rows in int8.
        """
        return Lowering.Linear(self, node)

    def CachedAttention(self, node: ir.Node) -> Sequence[ir.Value]:
        """Attention over past and new rows; the new ones go out."""
        query, key, value, past_keys, past_values, _, _ = inputs_of(node)
        heads = Heads.of(node)
        head_dim = length_of(past_keys, 2) // heads.num_kv_heads
        mask = self.once("mask", lambda: self.new_rows_mask(past_keys, heads.dtype))
        keys, values = self.present(past_keys, key), self.present(past_values, value)
        return [self.attend_rows(query, keys, values, mask, heads, head_dim), key, value]
