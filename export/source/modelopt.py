"""NVIDIA ModelOpt's export for Hugging Face: int4 blocks (AWQ), int8 channels, and fp8.

W4A16_AWQ: `weight` uint8 [out/2, in], the even output channel of two in the low half of a byte,
each half a two's complement from -8 to 7; `weight_scale` [out, in/g].
W8A8_SQ_PER_CHANNEL and W8A16: `weight` int8 [out, in], `weight_scale` [out].
FP8: `weight` fp8 (e4m3) [out, in], `weight_scale` [] or [1]; [out] for FP8_PER_CHANNEL_PER_TOKEN.

`pre_quant_scale` [in], if it could not be folded into the layer before, multiplies the input: here
it is folded into the matrix.

Source: TensorRT-Model-Optimizer, modelopt/torch/export/quant_utils.py (`pack_int4_in_uint8`,
`to_quantized_weight`, `process_layer_quant_config`, `postprocess_state_dict`) and
unified_export_hf.py. Formats with a second scale (NVFP4, W4A8_AWQ) are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchsieve.export.source.packed import FLOATS, Layout, Parts, Scheme

_SCALE, _SECOND, _BEFORE = "weight_scale", "weight_scale_2", "pre_quant_scale"
# How a matrix is stored in each format, by the type of its values.
_ALGORITHMS = {
    "W4A16_AWQ": "U8",
    "W8A8_SQ_PER_CHANNEL": "I8",
    "W8A16": "I8",
    "FP8": "F8_E4M3",
    "FP8_PER_CHANNEL_PER_TOKEN": "F8_E4M3",
}
_MIXED = "MIXED_PRECISION"


class ModelOpt(Layout):
    """ModelOpt's int4, int8 and fp8."""

    method = "modelopt"
    holders = ("weight",)
    ends = ("weight", _SCALE, _SECOND, _BEFORE)

    def shape(self, parts: Parts) -> tuple[int, int]:
        """Shape [out, in] of a matrix, by the headers of its tensors."""
        named = str(self.settings.get("quant_algo"))
        code = parts.tensors["weight"][1]
        fits = code in _ALGORITHMS.values() if named == _MIXED else _ALGORITHMS.get(named) == code
        if not fits or _SECOND in parts:
            raise self.refuse(
                f"quant_algo {named}, {parts.name}.weight in {code}", ", ".join(_ALGORITHMS)
            )
        rows, channels = parts.shape("weight", (code,))
        out = rows * 2 if code == "U8" else rows
        if code == "U8":
            count = parts.shape(_SCALE, FLOATS)[1]
            parts.check(_SCALE, (out, count))
            parts.groups(channels, count, [self.settings.get("group_size")])
        else:
            shape = parts.tensors[_SCALE][0] if _SCALE in parts else (out,)
            is_one = code == "F8_E4M3" and shape in ((), (1,))
            parts.check(_SCALE, shape if is_one else (out,))
        if _BEFORE in parts:
            parts.check(_BEFORE, (channels,))
        return out, channels

    def scheme(self, parts: Parts, shape: tuple[int, int]) -> Scheme:
        """What the values of a matrix [out, in] mean."""
        code, scale = parts.tensors["weight"][1], parts.fetch(_SCALE)
        if code != "U8":
            scale = scale.reshape(-1, 1).expand(shape[0], 1)
        factor = parts.fetch(_BEFORE) if _BEFORE in parts else None
        return Scheme({"U8": 4, "I8": 8}.get(code), scale, factor=factor)

    def values(self, parts: Parts, shape: tuple[int, int]) -> Tensor:
        """The centred values of a matrix, [out, in]."""
        stored = parts.fetch("weight")
        if stored.dtype != torch.uint8:
            return stored
        halves = torch.stack((stored & 15, stored >> 4), dim=1).flatten(0, 1)  # [out, in]
        return (halves ^ 8).to(torch.int8) - 8  # two's complement of four bits
