"""What TensorRT's parser made of an ONNX file, in plain Python.

A build that succeeds proves little: a parser may drop an input without a word. Tests ask here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchsieve.runtime.trt.library import collect_messages, load_tensorrt, parse

Shape = tuple[int, ...]

# Inputs of the layer ATTENTION_INPUT, as TensorRT-RTX 1.7.1 numbers them.
_ATTENTION_MASK, _ATTENTION_KEY_LENGTH = 3, 6


@dataclass(frozen=True)
class TensorSummary:
    """Name, dtype and shape (-1 where dynamic) of a network's input or output."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class LayerSummary:
    """A layer of the parsed network; an empty string stands for an input that is not connected."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: tuple[TensorSummary, ...] = field(default=(), repr=False)  # the outputs


@dataclass(frozen=True)
class CacheUpdate:
    """A key/value cache written in place: `cache` and `result` share their memory."""

    name: str
    cache: str
    rows: str
    slot: str
    result: str


@dataclass(frozen=True)
class AttentionSummary:
    """An attention layer; `mask` and `key_length` are empty where nothing is attached.

    Causality is not among its facts: TensorRT's Python gives the layer as a plain one, without it.
    """

    name: str
    query: str
    key: str
    value: str
    mask: str = ""
    key_length: str = ""

    @property
    def has_mask(self) -> bool:
        """Whether a mask reached the network."""
        return bool(self.mask)


@dataclass(frozen=True)
class NetworkSummary:
    """What the parser made of an ONNX file, in plain Python."""

    inputs: tuple[TensorSummary, ...]
    outputs: tuple[TensorSummary, ...]
    layers: tuple[LayerSummary, ...] = field(repr=False)

    @property
    def cache_updates(self) -> tuple[CacheUpdate, ...]:
        """Every in-place cache update, in the order of the network."""
        return tuple(
            CacheUpdate(layer.name, cache, rows, slot, layer.outputs[0])
            for layer in self.layers
            if layer.kind == "KV_CACHE_UPDATE"
            for cache, rows, slot in [layer.inputs[:3]]
        )

    @property
    def attentions(self) -> tuple[AttentionSummary, ...]:
        """Every attention layer, in the order of the network."""
        return tuple(
            AttentionSummary(
                layer.name.removesuffix("_AttentionInput"),
                query=layer.inputs[0],
                key=layer.inputs[1],
                value=layer.inputs[2],
                mask=_nth(layer.inputs, _ATTENTION_MASK),
                key_length=_nth(layer.inputs, _ATTENTION_KEY_LENGTH),
            )
            for layer in self.layers
            if layer.kind == "ATTENTION_INPUT"
        )

    @property
    def constants(self) -> tuple[TensorSummary, ...]:
        """Every stored tensor."""
        return tuple(layer.tensors[0] for layer in self.layers if layer.kind == "CONSTANT")

    def stored(self, dtype: str) -> int:
        """Numbers of more than one dimension that are stored in a type, such as `INT4`."""
        return sum(
            math.prod(one.shape)
            for one in self.constants
            if one.dtype == dtype and len(one.shape) > 1
        )

    def count(self, kind: str) -> int:
        """Count the layers of a kind, such as `ROTARY_EMBEDDING`."""
        return sum(layer.kind == kind for layer in self.layers)


def parse_network(onnx_path: str | Path, *, target: str = "tensorrt-rtx") -> NetworkSummary:
    """Parse an ONNX file and say what the network holds, without building it.

    Raises:
        BackendMissingError: The library is absent.
        BundleError: The graph cannot be parsed.
    """
    trt = load_tensorrt(target)
    with collect_messages(trt) as messages:
        _, network, _ = parse(trt, Path(onnx_path), messages)
        return summarize(network)


def summarize(network: Any) -> NetworkSummary:
    """Read a parsed network (`INetworkDefinition`)."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return NetworkSummary(
        inputs=tuple(_tensor(network.get_input(i)) for i in range(network.num_inputs)),
        outputs=tuple(_tensor(network.get_output(i)) for i in range(network.num_outputs)),
        layers=tuple(
            LayerSummary(
                layer.type.name,
                layer.name,
                tuple(_name(layer.get_input(i)) for i in range(layer.num_inputs)),
                tuple(_name(layer.get_output(i)) for i in range(layer.num_outputs)),
                tuple(_tensor(layer.get_output(i)) for i in range(layer.num_outputs)),
            )
            for layer in layers
        ),
    )


def _nth(names: tuple[str, ...], index: int) -> str:
    return names[index] if index < len(names) else ""


def _name(tensor: Any) -> str:
    return "" if tensor is None else tensor.name


def _tensor(tensor: Any) -> TensorSummary:
    return TensorSummary(tensor.name, tensor.dtype.name, tuple(tensor.shape))
