"""AWQ, as AutoAWQ stores it: the GEMM and the GEMV layout, 4 bits with zero points.

GEMM: `qweight` int32 [in, out/8], `qzeros` int32 [in/g, out/8], `scales` [in/g, out]. The eight
fields of an integer, lowest first, are output channels 0, 2, 4, 6, 1, 3, 5, 7 of their eight.

GEMV: `qweight` int32 [out, in/8], `qzeros` int32 [out, Z], `scales` [out, 8 * Z]. The fields are
input channels in their order; Z is padded, so the group size must come from the settings.

Sources: AutoAWQ, awq/modules/linear/gemm.py and gemv.py (`from_linear`), awq/utils/packing_utils.py
(`dequantize_gemm`). The 16-bit layouts of llm-awq and of AutoAWQ's gemv_fast are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from patchsieve.export.source.packed import FLOATS, INT32, Layout, Parts, Scheme, unpack

_FIELDS = 8
_NAMED = ("version", "checkpoint_format", "format")  # entries of the settings that name a layout
_GEMM, _GEMV = ("gemm", "exllama", "ipex"), "gemv"  # exllama and ipex are made of gemm when loaded
_SUPPORTED = "4 bits, in the layouts gemm or gemv of AutoAWQ"


class Awq(Layout):
    """AWQ of 4 bits."""

    method = "awq"
    holders = ("qweight",)
    ends = ("qweight", "qzeros", "scales")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        named = (str(settings[key]).lower() for key in _NAMED if settings.get(key))
        name, bits = next(named, _GEMM[0]), settings.get("bits", settings.get("w_bit", 4))
        if name not in (*_GEMM, _GEMV) or bits != 4:
            raise self.refuse(f"{bits} bits, layout {name}", _SUPPORTED)
        self.is_gemv = name == _GEMV

    def shape(self, parts: Parts) -> tuple[int, int]:
        """Shape [out, in] of a matrix, by the headers of its tensors."""
        rows, columns = parts.shape("qweight", INT32)
        count, width = parts.shape("scales", FLOATS)
        if self.is_gemv:
            parts.check("scales", (rows, width))
            parts.check("qzeros", (rows, width // _FIELDS), INT32)
            channels = columns * _FIELDS
            size = self._size(channels)
            if channels % size or width < channels // size:
                raise parts.refused(
                    f"the groups of {parts.name} do not divide its input channels",
                    f"{width} scales for {channels} channels, {size} in a group",
                    "a scale for each group",
                )
            return rows, channels
        parts.check("scales", (count, columns * _FIELDS))
        parts.check("qzeros", (count, columns), INT32)
        parts.groups(rows, count, [self._said()])
        return columns * _FIELDS, rows

    def scheme(self, parts: Parts, shape: tuple[int, int]) -> Scheme:
        """What the values of a matrix [out, in] mean."""
        scales, zeros = parts.fetch("scales"), parts.fetch("qzeros")
        if self.is_gemv:
            count = shape[1] // self._size(shape[1])
            return Scheme(4, scales[:, :count], unpack(zeros, 4)[:, :count])
        return Scheme(4, scales.t(), _in_order(unpack(zeros, 4)).t())

    def values(self, parts: Parts, shape: tuple[int, int]) -> Tensor:
        """The centred values of a matrix, [out, in]."""
        fields = unpack(parts.fetch("qweight"), 4)
        return fields if self.is_gemv else _in_order(fields).t()

    def _said(self) -> object:
        return self.settings.get("group_size", self.settings.get("q_group_size"))

    def _size(self, channels: int) -> int:
        """The group size, which a padded row of scales does not show."""
        said = self._said()
        if type(said) is not int or said == 0 or said < -1:
            raise self.refuse(f"a group size of {said!r} for the layout gemv", "a whole number")
        return channels if said == -1 else said


def _in_order(fields: Tensor) -> Tensor:
    """Fields [rows, out] with the output channels in their order: four even ones, then four odd."""
    return fields.unflatten(1, (-1, 2, 4)).transpose(2, 3).flatten(1)
