"""TensorRT-RTX 1.x: the reference graphs with caches of a fixed length."""

from __future__ import annotations

import onnx_ir as ir

from patchsieve.export.lowering.reference import Reference


class TensorRTRTX(Reference):
    """TensorScatter is the in-place KV update here: its length is fixed when an engine is built."""

    name = "tensorrt-rtx"
    static_slots = True

    def attend(self, *inputs: ir.Value, scale: float) -> ir.Value:
        """Float32 attention builds only as decomposable; ONNX Runtime refuses the attribute."""
        return self.op("Attention", *inputs, scale=scale, is_causal=0, TRT_decomposable=1)
