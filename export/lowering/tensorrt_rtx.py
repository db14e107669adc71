"""TensorRT-RTX 1.x for RTX desktops, whose parser takes what TensorRT 11 takes.

Measured with 1.7.1: `NonZero` is refused, though `supports_operator` says otherwise; `Attention`
with `nonpad_kv_seqlen` parses and loses the lengths. No graph uses either.
"""

from __future__ import annotations

from patchsieve.contract.targets import TARGETS
from patchsieve.export.lowering.tensorrt import TensorRT


class TensorRTRTX(TensorRT):
    """The graphs of TensorRT 11."""

    target = TARGETS["tensorrt-rtx"]
