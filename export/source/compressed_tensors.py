"""compressed-tensors, as llm-compressor stores it: packed int4 and int8, int8, and fp8.

`pack-quantized`: `weight_packed` int32 [out, in * b / 32] (rounded up), whose fields, lowest first,
are input channels in their order, each with half its range added; `weight_shape` int [2] is out and
in; `weight_scale` [out, G], or [1] for all; `weight_zero_point`, if not symmetric, int32 packed
along the output axis [out * b / 32, G], or int8 [out, G] by older versions; `weight_g_idx` int32
[in], the group of each input channel, all -1 if there is no such order.

`int-quantized`, `naive-quantized`, `float-quantized`: `weight` int8 or fp8 (e4m3) [out, in] with
the same scales, and zero points int8.

Source: compressed-tensors, compressors/quantized_compressors/pack_quantized.py and
naive_quantized.py, quantization/lifecycle/forward.py (`dequantize`) and initialize.py (shapes).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from patchsieve.export.source.packed import (
    INT32,
    Layout,
    Parts,
    Scheme,
    mixed_groups,
    unpack,
)

_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")
_NO_FORMAT = ("dense", "mixed-precision")  # nothing is quantised; each group names its own
_FP8 = "F8_E4M3"
_PACKED, _PLAIN = "weight_packed", "weight"
_SCALE, _ZERO, _INDEX, _SHAPE = (
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
    "weight_shape",
)


class CompressedTensors(Layout):
    """compressed-tensors of int4, int8 and fp8."""

    method = "compressed-tensors"
    holders = (_PACKED, _PLAIN)
    ends = (_PACKED, _PLAIN, _SCALE, _ZERO, _INDEX, _SHAPE)

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        for entry in (settings, *self._groups()):
            name = entry.get("format") or _NO_FORMAT[0]
            if name not in (*_FORMATS, *_NO_FORMAT):
                raise self.refuse(f"format {name}", ", ".join(_FORMATS))
        for weights in self._weights():
            if weights.get("strategy") in ("block", "tensor_group"):
                raise self.refuse(f"scales by {weights['strategy']}", "tensor, channel or group")
        sparsity = settings.get("sparsity_config")
        if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
            raise self.refuse(f"sparsity_config, format {sparsity['format']}", "dense")
        if settings.get("transform_config"):
            raise self.refuse("a transform_config", "none: activations would be turned also")

    def shape(self, parts: Parts) -> tuple[int, int]:
        """Shape [out, in] of a matrix, by the headers of its tensors."""
        if _PACKED not in parts:
            out, channels = parts.shape(_PLAIN, ("I8", _FP8))
        else:
            out, words = parts.shape(_PACKED, INT32)
            parts.check(_SHAPE, (2,), ("I64", "I32"))
            said, channels = parts.fetch(_SHAPE).tolist()
            fitting = [words == -(-channels * bits // 32) for bits in (4, 8)]
            if said != out or not any(fitting):
                raise parts.refused(
                    f"the tensor {parts.name}.{_PACKED} does not fit its matrix",
                    f"{[out, words]} for the shape {[said, channels]}",
                    "a row of 4- or 8-bit numbers for each output channel",
                )
        count = self._count(parts, out)
        # A matrix with one scale in a row may be of a group of settings that names no size.
        parts.groups(channels, count, self._sizes() if count > 1 else ())
        if _INDEX in parts:
            parts.check(_INDEX, (channels,), INT32)
        if _ZERO in parts:
            self._check_zeros(parts, (out, channels), count)
        return out, channels

    def scheme(self, parts: Parts, shape: tuple[int, int]) -> Scheme:
        """What the values of a matrix [out, in] mean."""
        out, channels = shape
        scale = _spread(parts.fetch(_SCALE), out)
        zero = group = None
        if _ZERO in parts:
            zero = parts.fetch(_ZERO)
            if zero.dtype == torch.int32:  # packed along the output axis
                zero = unpack(zero.t(), _bits(parts, channels) or 4)[:, :out].t()
            zero = _spread(zero, out).expand(scale.shape)
        if _INDEX in parts and not bool((parts.fetch(_INDEX) == -1).any()):
            group = mixed_groups(parts, _INDEX, channels, scale.shape[1])
        return Scheme(_bits(parts, channels), scale, zero, group)

    def values(self, parts: Parts, shape: tuple[int, int]) -> Tensor:
        """The centred values of a matrix, [out, in]."""
        if _PACKED not in parts:
            return parts.fetch(_PLAIN)
        return unpack(parts.fetch(_PACKED), _bits(parts, shape[1]) or 4)[:, : shape[1]]

    def _groups(self) -> list[Mapping[str, Any]]:
        """The groups of layers in the settings."""
        groups = self.settings.get("config_groups")
        found = groups.values() if isinstance(groups, Mapping) else ()
        return [group for group in found if isinstance(group, Mapping)]

    def _weights(self) -> list[Mapping[str, Any]]:
        """What the settings say of the weights of each group."""
        found = (group.get("weights") for group in self._groups())
        return [weights for weights in found if isinstance(weights, Mapping)]

    def _sizes(self) -> list[object]:
        """The group sizes in the settings."""
        return [weights.get("group_size") for weights in self._weights()]

    def _count(self, parts: Parts, out: int) -> int:
        """Scales in a row."""
        shape = parts.tensors[_SCALE][0] if _SCALE in parts else (out, 1)
        expected = (1,) * len(shape) if len(shape) < 2 else (out, shape[1])
        parts.check(_SCALE, expected)
        return expected[1] if len(expected) == 2 else 1

    def _check_zeros(self, parts: Parts, shape: tuple[int, int], count: int) -> None:
        found, code = parts.tensors[_ZERO]
        if _PACKED in parts and code == "I32":
            bits = _bits(parts, shape[1]) or 4
            parts.check(_ZERO, (-(-shape[0] * bits // 32), count), INT32)
        else:
            expected = (1,) * len(found) if len(found) < 2 else (shape[0], count)
            parts.check(_ZERO, expected, ("I8", _FP8))


def _bits(parts: Parts, channels: int) -> int | None:
    """Bits of a whole number; None for fp8."""
    if _PACKED not in parts:
        return 8 if parts.tensors[_PLAIN][1] == "I8" else None
    return 4 if parts.tensors[_PACKED][0][1] == -(-channels // 8) else 8


def _spread(scale: Tensor, out: int) -> Tensor:
    """One number for all, [] or [1], as one for each output channel, [out, 1]."""
    return scale.reshape(1, 1).expand(out, 1) if scale.ndim < 2 else scale
