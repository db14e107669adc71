"""GPTQ, as AutoGPTQ and GPTQModel store it: 4 or 8 bits, b in the following.

`qweight` int32 [in * b / 32, out], whose fields, lowest first, are input channels in their order;
`qzeros` int32 [G, out * b / 32]; `scales` [G, out]; `g_idx` int32 [in], the group of each input
channel. With act-order (`desc_act`) channels of a group are no neighbours.

`checkpoint_format` gptq (v1, which is meant where nothing is said) stores each zero less 1, gptq_v2
as it is. GPTQModel takes the 1 away from whole integers, so it is added to whole integers here:
the two differ for a zero of 0, whose 1 is borrowed from the next field.

Sources: AutoGPTQ, auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py (`pack`, `forward`) and
auto_gptq/quantization/config.py; GPTQModel, gptqmodel/utils/model.py
(`convert_gptq_v1_to_v2_format_module`) and gptqmodel/nn_modules/qlinear (`dequantize_weight`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from patchsieve.export.source.packed import (
    FLOATS,
    INT32,
    Layout,
    Parts,
    Scheme,
    mixed_groups,
    unpack,
)

_V1, _V2 = "gptq", "gptq_v2"
_ONES = {4: 0x11111111, 8: 0x01010101}  # 1 in every field of an integer
_NAMED = ("checkpoint_format", "format")


class Gptq(Layout):
    """GPTQ of 4 or 8 bits."""

    method = "gptq"
    holders = ("qweight",)
    ends = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        named = (str(settings[key]).lower() for key in _NAMED if settings.get(key))
        name = "marlin" if settings.get("is_marlin_format") else next(named, _V1)
        if name not in (_V1, _V2):
            raise self.refuse(f"checkpoint_format {name}", f"{_V1} or {_V2}")
        self.is_less_1 = name == _V1

    def shape(self, parts: Parts) -> tuple[int, int]:
        """Shape [out, in] of a matrix, by the headers of its tensors."""
        bits, out, count = self._bits(parts), *reversed(parts.shape("scales", FLOATS))
        rows, _ = parts.shape("qweight", INT32)
        channels = rows * 32 // bits
        parts.check("qweight", (rows, out), INT32)
        parts.check("qzeros", (count, out * bits // 32), INT32)
        if "g_idx" in parts:
            parts.check("g_idx", (channels,), INT32)
        elif self.settings.get("desc_act"):
            raise parts.refused(f"the quantised matrix {parts.name} lacks g_idx", None, "g_idx")
        is_one = not self.settings.get("dynamic")  # else layers may have other sizes
        parts.groups(channels, count, [self.settings.get("group_size")] if is_one else ())
        return out, channels

    def scheme(self, parts: Parts, shape: tuple[int, int]) -> Scheme:
        """What the values of a matrix [out, in] mean."""
        bits = self._bits(parts)
        scales, zeros = parts.fetch("scales"), parts.fetch("qzeros")
        if self.is_less_1:
            zeros = zeros + _ONES[bits]  # wraps at 2**32, as the writers do
        group = None
        if "g_idx" in parts:
            group = mixed_groups(parts, "g_idx", shape[1], scales.shape[0])
        return Scheme(bits, scales.t(), unpack(zeros, bits).t(), group)

    def values(self, parts: Parts, shape: tuple[int, int]) -> Tensor:
        """The centred values of a matrix, [out, in]."""
        return unpack(parts.fetch("qweight").t(), self._bits(parts))

    def _bits(self, parts: Parts) -> int:
        """The bits of a matrix, which may differ from those of the settings (`dynamic`)."""
        _, out = parts.shape("scales", FLOATS)
        _, words = parts.shape("qzeros", INT32)
        bits, rest = divmod(words * 32, out)
        if rest or bits not in _ONES:
            raise self.refuse(
                f"{words} integers for the zeros of {out} channels in {parts.name}",
                "4 or 8 bits for each number",
            )
        said = self.settings.get("bits")
        if isinstance(said, int) and said != bits and not self.settings.get("dynamic"):
            raise parts.refused(
                f"the tensors of {parts.name} do not have the bits of the settings", bits, said
            )
        return bits
