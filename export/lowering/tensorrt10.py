"""TensorRT 10.15 and 10.16, the latter on JetPack 7.2 (Orin and Thor).

10.15 is the first with TensorScatter, RMSNormalization and RotaryEmbedding; 10.14 has `Attention`
alone, 10.13 (JetPack 7.0 and 7.1) none of them. Those take the graphs of `jetpack6`, whose
operators are all old.
"""

from __future__ import annotations

from patchsieve.contract.targets import TARGETS
from patchsieve.export.lowering.tensorrt import TensorRT


class TensorRT10(TensorRT):
    """The graphs of TensorRT 11, which use none of what 11 added.

    Where `--attention` asks for it, `Attention` is four-dimensional with one output and no past, as
    10.15 takes it.
    """

    target = TARGETS["tensorrt10"]
