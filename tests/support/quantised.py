"""Quantised matrices as their methods write them, in NumPy, from the published layouts.

Nothing here shares code with the readers. Every writer rounds a matrix [out, in] and gives the
stored tensors, the numbers that they mean, and the grid if the numbers lie on a symmetric one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Written:
    """A quantised matrix.

    Attributes:
        tensors: What is stored, by the end of its name.
        weight: The numbers that it means, float32 [out, in].
        bits: Of the grid; None if the numbers lie on no symmetric one.
        scale: Of the grid, [out, G].
    """

    tensors: dict[str, Tensor]
    weight: np.ndarray
    bits: int | None = None
    scale: np.ndarray | None = None


@dataclass
class Rounded:
    """A matrix of whole numbers from 0 to 2**bits - 1.

    Attributes:
        numbers: [out, in].
        zero: [out, G].
        scale: float16, [out, G].
        index: Group of each input channel, [in].
    """

    numbers: np.ndarray
    zero: np.ndarray
    scale: np.ndarray
    index: np.ndarray
    bits: int

    def written(self, tensors: dict[str, np.ndarray], is_grid: bool) -> Written:
        """What a method stores of it."""
        weight = np.empty(self.numbers.shape, np.float32)
        for channel, group in enumerate(self.index):
            whole = self.numbers[:, channel] - self.zero[:, group]
            weight[:, channel] = whole.astype(np.float32) * self.scale[:, group].astype(np.float32)
        stored = {end: torch.from_numpy(np.ascontiguousarray(t)) for end, t in tensors.items()}
        if is_grid:
            return Written(stored, weight, self.bits, self.scale)
        return Written(stored, weight)


def round_matrix(
    weight: np.ndarray,
    bits: int,
    group: int,
    *,
    symmetric: bool,
    act_order: bool = False,
    seed: int = 0,
) -> Rounded:
    """Round to nearest in groups of `group` input channels (-1: all)."""
    out, channels = weight.shape
    size = channels if group == -1 else group
    index = np.arange(channels) // size
    if act_order:
        index = np.random.default_rng(seed).permutation(index)
    count, most = channels // size, 2**bits - 1
    numbers = np.empty((out, channels), np.int64)
    zero, scale = np.empty((out, count), np.int64), np.empty((out, count), np.float16)
    for number in range(count):
        members = weight[:, index == number]
        low, high = members.min(1), members.max(1)
        if symmetric:
            step = np.abs(members).max(1) / (most / 2)
            zero[:, number] = 2 ** (bits - 1)
        else:
            step = (high - low) / most
            zero[:, number] = np.clip(np.round(-low / step), 1, most)
        scale[:, number] = step
        whole = np.round(members / scale[:, number, None].astype(np.float32))
        numbers[:, index == number] = np.clip(whole + zero[:, number, None], 0, most)
    return Rounded(numbers, zero, scale, index, bits)


def packed(numbers: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Whole numbers [rows, columns] in int32 [rows, columns * bits / 32], the lowest field first.

    `order` says which number of a word's lies in each of its fields.
    """
    fields = 32 // bits
    padded = np.pad(numbers, ((0, 0), (0, -numbers.shape[1] % fields)))
    words = np.zeros((padded.shape[0], padded.shape[1] // fields), np.uint32)
    for word in range(words.shape[1]):
        for place in range(fields):
            number = padded[:, word * fields + (order or range(fields))[place]]
            words[:, word] |= (number.astype(np.uint32) << np.uint32(bits * place)).astype(
                np.uint32
            )
    return words.view(np.int32)


def awq(weight: np.ndarray, group: int = 128, symmetric: bool = False) -> Written:
    """AutoAWQ, gemm."""
    made = round_matrix(weight, 4, group, symmetric=symmetric)
    tensors = {
        "qweight": packed(made.numbers.T, 4, AWQ_ORDER),
        "qzeros": packed(made.zero.T, 4, AWQ_ORDER),
        "scales": made.scale.T,
    }
    return made.written(tensors, symmetric)


def awq_gemv(weight: np.ndarray, group: int = 128, symmetric: bool = False) -> Written:
    """AutoAWQ, gemv: scales and zeros of a row are padded."""
    made = round_matrix(weight, 4, group, symmetric=symmetric)
    count = made.scale.shape[1]
    multiple = {64: 2, 32: 4}.get(group, 1)
    width = -(-count // 8)
    width = -(-width // multiple) * multiple
    zeros = np.pad(made.zero, ((0, 0), (0, width * 8 - count)))
    tensors = {
        "qweight": packed(made.numbers, 4),
        "qzeros": packed(zeros, 4),
        "scales": np.pad(made.scale, ((0, 0), (0, width * 8 - count))),
    }
    return made.written(tensors, symmetric)


def gptq(
    weight: np.ndarray,
    group: int = 128,
    symmetric: bool = True,
    bits: int = 4,
    act_order: bool = False,
    version: int = 1,
) -> Written:
    """AutoGPTQ (v1 stores each zero less 1) and GPTQModel (v2)."""
    made = round_matrix(weight, bits, group, symmetric=symmetric, act_order=act_order)
    tensors = {
        "qweight": packed(made.numbers, bits).T,
        "qzeros": packed(made.zero.T - (version == 1), bits),
        "scales": made.scale.T,
        "g_idx": made.index.astype(np.int32),
    }
    return made.written(tensors, symmetric and not act_order)


def pack_quantized(
    weight: np.ndarray,
    group: int = 128,
    symmetric: bool = True,
    bits: int = 4,
    act_order: bool = False,
    zeros: str = "packed",
) -> Written:
    """compressed-tensors, pack-quantized; `zeros` is "packed", or "int8" as older versions."""
    made = round_matrix(weight, bits, group, symmetric=symmetric, act_order=act_order)
    tensors = {
        "weight_packed": packed(made.numbers, bits),
        "weight_scale": made.scale,
        "weight_shape": np.array(weight.shape, np.int64),
    }
    if not symmetric:
        centred = (made.zero - 2 ** (bits - 1)).astype(np.int8)
        is_packed = zeros == "packed"
        tensors["weight_zero_point"] = packed(made.zero.T, bits).T if is_packed else centred
    if act_order:
        tensors["weight_g_idx"] = made.index.astype(np.int32)
    return made.written(tensors, symmetric and not act_order)


def int_quantized(weight: np.ndarray, group: int = -1, symmetric: bool = True) -> Written:
    """compressed-tensors, int-quantized: int8 with a scale for each output channel."""
    made = round_matrix(weight, 8, group, symmetric=symmetric)
    tensors = {
        "weight": (made.numbers - 128).astype(np.int8),
        "weight_scale": made.scale,
        "input_scale": np.ones(1, np.float16),
    }
    if not symmetric:
        tensors["weight_zero_point"] = (made.zero - 128).astype(np.int8)
    return made.written(tensors, symmetric)


def int_quantized_tensor(weight: np.ndarray) -> Written:
    """compressed-tensors, int-quantized with one scale for all."""
    step = np.array([np.abs(weight).max() / 127.5], np.float16)
    numbers = np.clip(np.round(weight / step.astype(np.float32)), -128, 127).astype(np.int8)
    tensors = {"weight": torch.from_numpy(numbers)}
    tensors["weight_scale"] = torch.from_numpy(step)
    meant = numbers.astype(np.float32) * step.astype(np.float32)
    return Written(tensors, meant, 8, np.broadcast_to(step, (len(weight), 1)))


def float_quantized(weight: np.ndarray, per_channel: bool = True) -> Written:
    """compressed-tensors, float-quantized: fp8 with a scale for each output channel, or one."""
    most = np.abs(weight).max(axis=1 if per_channel else None, keepdims=True)
    step = (most.reshape(-1, 1) / 448).astype(np.float32)
    stored = torch.from_numpy(weight / step).to(torch.float8_e4m3fn)
    scale = torch.from_numpy(step if per_channel else step[0])
    return Written({"weight": stored, "weight_scale": scale}, stored.float().numpy() * step)


def modelopt_int4(weight: np.ndarray, group: int = 128, before: bool = False) -> Written:
    """ModelOpt, W4A16_AWQ; `before` leaves a scale of the input that was not folded away."""
    factor = np.linspace(0.5, 2, weight.shape[1], dtype=np.float32)
    smooth = weight / factor if before else weight
    blocks = smooth.reshape(len(weight), -1, group)
    step = (np.abs(blocks).max(-1) / 7).astype(np.float32)  # [out, in/g]
    numbers = np.clip(np.round(blocks / step[..., None]), -8, 7).astype(np.int8)
    halves = numbers.reshape(weight.shape).view(np.uint8) & 15
    tensors = {"weight": halves[0::2] | halves[1::2] << 4, "weight_scale": step}
    meant = (numbers.astype(np.float32) * step[..., None]).reshape(weight.shape)
    if before:
        tensors["pre_quant_scale"] = factor
        meant = meant * factor
    stored = {end: torch.from_numpy(np.ascontiguousarray(t)) for end, t in tensors.items()}
    return Written(stored, meant) if before else Written(stored, meant, 4, step)


def modelopt_int8(weight: np.ndarray) -> Written:
    """ModelOpt, W8A8_SQ_PER_CHANNEL."""
    step = (np.abs(weight).max(1) / 127).astype(np.float32)
    numbers = np.round(weight / step[:, None]).astype(np.int8)
    tensors = {"weight": numbers, "weight_scale": step}
    stored = {end: torch.from_numpy(t) for end, t in tensors.items()}
    return Written(stored, numbers.astype(np.float32) * step[:, None], 8, step[:, None])


def modelopt_fp8(weight: np.ndarray) -> Written:
    """ModelOpt, FP8."""
    step = np.float32(np.abs(weight).max() / 448)
    stored = torch.from_numpy(weight / step).to(torch.float8_e4m3fn)
    tensors = {"weight": stored, "weight_scale": torch.tensor(step), "input_scale": torch.ones(())}
    return Written(tensors, stored.float().numpy() * step)


@dataclass
class Case:
    """A way to write matrices, and what config.json says of it."""

    write: Callable[..., Written]
    settings: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, weight: np.ndarray) -> Written:
        """A matrix [out, in], written."""
        return self.write(weight, **self.options)


def _awq(group: int, version: str = "gemm", symmetric: bool = False) -> Case:
    settings = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": version,
        "modules_to_not_convert": ["vision_tower", "multi_modal_projector"],
    }
    writer = awq_gemv if version.lower() == "gemv" else awq
    return Case(writer, settings, {"group": group, "symmetric": symmetric})


def _gptq(group: int, version: int = 1, **options: Any) -> Case:
    settings = {
        "quant_method": "gptq",
        "bits": options.get("bits", 4),
        "group_size": group,
        "sym": options.get("symmetric", True),
        "desc_act": options.get("act_order", False),
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return Case(gptq, settings, {"group": group, "version": version, **options})


def _compressed(
    form: str, weights: dict[str, Any], write: Callable[..., Written], **o: Any
) -> Case:
    settings = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["re:vision_tower.*", "re:multi_modal_projector.*", "lm_head"],
        "sparsity_config": {},
        "transform_config": {},
    }
    return Case(write, settings, o)


def _packs(group: int, bits: int = 4, **options: Any) -> Case:
    weights = {
        "num_bits": bits,
        "group_size": None if group == -1 else group,
        "strategy": "channel" if group == -1 else "group",
    }
    options = {"group": group, "bits": bits, **options}
    return _compressed("pack-quantized", weights, pack_quantized, **options)


def _modelopt(algorithm: str, write: Callable[..., Written], **options: Any) -> Case:
    settings = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}
    if "group" in options:
        settings |= {"group_size": options["group"], "has_zero_point": False}
    return Case(write, settings, options)


CASES: dict[str, Case] = {
    "awq-128": _awq(128),
    "awq-64": _awq(64),
    "awq-32": _awq(32),
    "awq-one": _awq(-1),
    "awq-symmetric": _awq(32, symmetric=True),
    "awq-gemv-128": _awq(128, "gemv"),
    "awq-gemv-64": _awq(64, "gemv"),
    "awq-gemv-32": _awq(32, "GEMV", symmetric=True),
    "gptq-128": _gptq(128),
    "gptq-64": _gptq(64, symmetric=False),
    "gptq-32": _gptq(32, version=2),
    "gptq-one": _gptq(-1),
    "gptq-act-order": _gptq(32, act_order=True),
    "gptq-act-order-v2": _gptq(64, version=2, act_order=True, symmetric=False),
    "gptq-v2-asymmetric": _gptq(32, version=2, symmetric=False),
    "gptq-8": _gptq(64, bits=8),
    "gptq-8-one": _gptq(-1, bits=8),
    "gptq-8-asymmetric": _gptq(32, bits=8, symmetric=False, version=2),
    "pack-128": _packs(128),
    "pack-64": _packs(64, symmetric=False),
    "pack-32": _packs(32),
    "pack-older-zeros": _packs(32, symmetric=False, zeros="int8"),
    "pack-channel": _packs(-1),
    "pack-act-order": _packs(32, act_order=True),
    "pack-8": _packs(-1, bits=8),
    "pack-8-asymmetric": _packs(-1, bits=8, symmetric=False),
    "int8-channel": _compressed("int-quantized", {"num_bits": 8}, int_quantized),
    "int8-asymmetric": _compressed(
        "int-quantized", {"num_bits": 8}, int_quantized, symmetric=False
    ),
    "int8-tensor": _compressed("int-quantized", {"num_bits": 8}, int_quantized_tensor),
    "fp8-channel": _compressed("float-quantized", {"num_bits": 8}, float_quantized),
    "fp8-tensor": _compressed(
        "float-quantized", {"num_bits": 8}, float_quantized, per_channel=False
    ),
    "modelopt-int4": _modelopt("W4A16_AWQ", modelopt_int4, group=32),
    "modelopt-int4-before": _modelopt("W4A16_AWQ", modelopt_int4, group=64, before=True),
    "modelopt-int8": _modelopt("W8A8_SQ_PER_CHANNEL", modelopt_int8),
    "modelopt-fp8": _modelopt("FP8", modelopt_fp8),
}


def say(folder: Path, settings: dict[str, Any] | None) -> None:
    """Write into a config.json what it says of a quantisation."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(config | {"quantization_config": settings}))
