"""From a traced graph to what a target accepts: one file per target.

A lowering says how each operation of `patchsieve.export.graphs.ops` is spelt, and which opset
results.
"""

from __future__ import annotations

from patchsieve.contract.errors import PatchsieveError
from patchsieve.export.lowering import (
    cpu,
    cuda,
    jetpack6,
    reference,
    tensorrt,
    tensorrt10,
    tensorrt_rtx,
)
from patchsieve.export.lowering.base import Lowering, lower

LOWERINGS: dict[str, type[Lowering]] = {
    "reference": reference.Reference,
    "cpu": cpu.Cpu,
    "cuda": cuda.Cuda,
    "jetpack6": jetpack6.JetPack6,
    "tensorrt": tensorrt.TensorRT,
    "tensorrt10": tensorrt10.TensorRT10,
    "tensorrt-rtx": tensorrt_rtx.TensorRTRTX,
}


def lowering(target: str) -> type[Lowering]:
    """Find the lowering of a target."""
    if target not in LOWERINGS:
        raise PatchsieveError(
            "unknown target", found=repr(target), expected=", ".join(sorted(LOWERINGS))
        )
    return LOWERINGS[target]


__all__ = ["LOWERINGS", "Lowering", "lower", "lowering"]
